"""Rows 9 and 10: NaN, Inf and spikes are found before anything changes, and dealt with as configured."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dqt.data.prepare import prepare_corpus
from dqt.errors import ConfigError, LossSpikeError, NonFiniteError
from dqt.optim import checks
from dqt.optim.base import QuantizedOptimizer
from dqt.train import learner
from dqt.train.checkpoint import list_checkpoints, read_state
from dqt.train.config import resolve
from dqt.train.guard import MOST_IN_A_ROW, LossWatch
from dqt.train.learner import Learner
from dqt.train.resume import last_good
from train_helpers import metrics_of, micro_config, run_micro

WEIGHT = "model.layers.1.mlp.up_proj.weight"
WITH_MOMENTS = {"optim__betas": [0.9, 0.95], "optim__second_moment": "full"}


# -- mutations -----------------------------------------------------------------------------------------------


def checking_the_loss(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(math, "isfinite", lambda value: True)


def checking_gradients(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(QuantizedOptimizer, "check_gradient", lambda self, name, parameter, unchanged="": 1.0)


def checking_the_state(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(checks, "require_finite", lambda name, parameter, state, unchanged: None)


def watching_the_loss(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(LossWatch, "limit", lambda self: math.inf)


def moving_on_in_the_data(patch: pytest.MonkeyPatch) -> None:
    """A run that goes back meets the same batch again."""
    patch.setattr(Learner, "samples_a_step", 0)


# -- row 9 ---------------------------------------------------------------------------------------------------


def a_learner(tmp_path: Path, **values: Any) -> Learner:
    config = resolve(micro_config(tmp_path, **values))
    return Learner(config, prepare_corpus(config.data, tmp_path.parent / "dqt-cache"))


def parameter_of(model: torch.nn.Module) -> Any:
    return dict(model.named_parameters())[WEIGHT]


def in_the_loss(subject: Learner, value: float) -> Callable[[], None]:
    patch = pytest.MonkeyPatch()
    original = learner.language_model_loss
    patch.setattr(learner, "language_model_loss", lambda *arguments: original(*arguments) + value)
    return patch.undo


def in_one_gradient_element(subject: Learner, value: float) -> Callable[[], None]:
    def spoil(grad: Tensor) -> Tensor:
        grad = grad.clone()
        grad[5, 7] = value
        return grad

    return parameter_of(subject.model).register_hook(spoil).remove


def in_an_update(subject: Learner, value: float, key: str = "exp_avg") -> Callable[[], None]:
    moment = subject.optimizer.state[parameter_of(subject.model)][key]
    whole = moment.clone()
    moment[5, 7] = value
    return lambda: moment.copy_(whole)


def in_a_second_moment(subject: Learner, value: float) -> Callable[[], None]:
    return in_an_update(subject, value, "exp_avg_sq")


def in_a_scale(subject: Learner, value: float) -> Callable[[], None]:
    scale = parameter_of(subject.model).scale
    whole = scale.clone()
    scale.fill_(value)
    return lambda: scale.copy_(whole)


PLACES: list[tuple[Callable[[Learner, float], Callable[[], None]], str]] = [
    (in_the_loss, r"the loss is (nan|inf|-inf)"),
    (in_one_gradient_element, rf"the gradient of {WEIGHT} holds 1 NaN or Inf of 2048 elements"),
    (in_an_update, rf"the update of {WEIGHT} would not be finite, because exp_avg holds NaN or Inf"),
    (in_a_second_moment, rf"the update of {WEIGHT} would not be finite, because exp_avg_sq holds"),
    (in_a_scale, rf"the loss is nan|the scale of {WEIGHT} is not finite"),
]


def everything(subject: Learner) -> dict[str, Tensor]:
    state = {f"model/{name}": tensor.clone() for name, tensor in subject.model.state_dict().items()}
    for name, parameter in subject.model.named_parameters():
        for key, value in subject.optimizer.state[parameter].items():
            state[f"{name}/{key}"] = torch.as_tensor(value).clone()
    return state


@pytest.mark.row(9, checking_the_loss, checking_gradients, checking_the_state)
@pytest.mark.parametrize("released", [False, True])
def test_found_before_anything_changes(released: bool, tmp_path: Path) -> None:
    subject = a_learner(tmp_path, train__gradient_release=released, **WITH_MOMENTS)
    subject.train_step(telemetry=False)
    start = {name: tensor.clone() for name, tensor in everything(subject).items()}
    for spoil, message in PLACES:
        for value in (math.nan, math.inf, -math.inf):
            undo = spoil(subject, value)
            before = everything(subject)
            try:
                with pytest.raises(NonFiniteError, match=rf"step 2 \(samples 2 to 3\): .*({message})"):
                    subject.train_step(telemetry=False)
                after = everything(subject)
            finally:
                undo()
            # With gradient release, parameters that came before it in the backward pass are updated by then.
            kept = [name for name in before if not released or WEIGHT in name]
            assert [name for name in kept if not same(after[name], before[name])] == []
            assert (subject.step, subject.samples) == (1, 2)
            assert all(parameter.grad is None for parameter in subject.model.parameters())
    assert released or all(same(tensor, start[name]) for name, tensor in everything(subject).items())


def same(first: Tensor, second: Tensor) -> bool:
    return torch.equal(first.nan_to_num(), second.nan_to_num())


def bad_at(patch: pytest.MonkeyPatch, samples: set[int], add: float) -> None:
    """Spoils the loss of the batches that begin with these samples, wherever they come."""
    original = Learner._backward

    def backward(self: Learner, *batch: Any) -> float:
        loss = learner.language_model_loss

        def spoilt(*arguments: Any) -> Tensor:
            return loss(*arguments) + (add if self.samples in samples else 0.0)

        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(learner, "language_model_loss", spoilt)
            return original(self, *batch)

    patch.setattr(Learner, "_backward", backward)


@pytest.mark.row(9, checking_the_loss, moving_on_in_the_data)
@pytest.mark.parametrize(
    ("policy", "steps", "event"),
    [
        ("stop", 3, None),
        ("skip", 6, {"step": 4, "event": "skipped"}),
        ("rollback", 6, {"step": 3, "event": "went back to step 3"}),
    ],
)
def test_as_configured(
    policy: str, steps: int, event: dict[str, Any] | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of steps with 2 samples, the fourth (samples 6 and 7) is bad."""
    bad_at(monkeypatch, {6}, math.nan)
    if policy == "stop":
        with pytest.raises(NonFiniteError, match=r"step 4 \(samples 6 to 7\): the loss is nan"):
            run_micro(tmp_path, train__on_nonfinite=policy)
        assert json.loads((tmp_path / "run" / "run.json").read_text())["state"] == "failed"
        newest = read_state(list_checkpoints(tmp_path / "run" / "checkpoints")[-1])
        assert (newest["step"], newest["good"]) == (3, True)
        return
    assert run_micro(tmp_path, train__on_nonfinite=policy).steps == 6
    lines = metrics_of(tmp_path / "run")
    assert [{key: line[key] for key in ("step", "event")} for line in lines if "event" in line] == [event]
    newest = read_state(list_checkpoints(tmp_path / "run" / "checkpoints")[-1])
    assert newest["samples"] == (12 if policy == "skip" else 14)
    trained = [line["step"] for line in lines if "loss" in line]
    assert trained == ([1, 2, 3, 5, 6] if policy == "skip" else [1, 2, 3, 4, 5, 6])


@pytest.mark.row(9, checking_the_loss)
def test_it_gives_up_after_a_while(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bad_at(monkeypatch, set(range(4, 1000)), math.nan)
    for policy in ("skip", "rollback"):
        with pytest.raises(NonFiniteError, match=f"{MOST_IN_A_ROW} times in a row"):
            run_micro(
                tmp_path, train__on_nonfinite=policy, train__steps=20, train__out=str(tmp_path / policy)
            )


@pytest.mark.row(9, checking_the_loss)
def test_a_run_that_skipped_resumes_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bad_at(monkeypatch, {4}, math.nan)
    for name in ("whole", "again"):
        run_micro(tmp_path, train__on_nonfinite="skip", train__out=str(tmp_path / name))
    monkeypatch.undo()
    resumed = run_micro(
        tmp_path,
        resume=str(tmp_path / "again" / "checkpoints" / "step-000003"),
        train__on_nonfinite="skip",
        train__out=str(tmp_path / "branch"),
    )
    summary = json.loads((tmp_path / "whole" / "run.json").read_text())["summary"]
    assert resumed.evaluation.loss == summary["val_loss"]
    assert any(line.get("event") == "skipped" for line in metrics_of(tmp_path / "again"))


def test_skip_and_gradient_release_do_not_go_together(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="use rollback or stop"):
        micro_config(tmp_path, train__on_nonfinite="skip", train__gradient_release=True)


# -- row 10 --------------------------------------------------------------------------------------------------

LONG = {
    "train__steps": 44,
    "train__checkpoint_every": 12,
    "train__eval_every": 44,
    "model__num_hidden_layers": 1,
    "model__hidden_size": 16,
}


@pytest.mark.row(10, watching_the_loss, moving_on_in_the_data)
@pytest.mark.parametrize("policy", ["ignore", "stop", "skip", "rollback"])
def test_a_spike(policy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss is 50 nats too high from the 38th step on, to the end; to skip, at that step only."""
    last = {"ignore": 200, "stop": 200, "skip": 76, "rollback": 78}[policy]
    bad_at(monkeypatch, set(range(74, last, 2)), 50.0)
    directory = tmp_path / "run" / "checkpoints"
    if policy == "stop":
        with pytest.raises(LossSpikeError, match=r"step 38 \(samples 74 to 75\): the loss is 5.*, a spike"):
            run_micro(tmp_path, train__on_spike=policy, **LONG)
    else:
        assert run_micro(tmp_path, train__on_spike=policy, **LONG).steps == 44
    states = {path.name: read_state(path) for path in list_checkpoints(directory)}
    good = last_good(directory, lambda line: None)
    assert good is not None
    events = [line["event"] for line in metrics_of(tmp_path / "run") if "event" in line]
    if policy in ("ignore", "stop"):
        assert good.path.name == "step-000036"
        assert events == []
    else:
        assert good.path.name == "step-000044"
        assert events == {"skip": ["skipped"], "rollback": ["went back to step 36"] * 2}[policy]
    if policy == "ignore":
        assert [states[name]["good"] for name in ("step-000036", "step-000044")] == [True, False]
    assert all(loss < 20 for loss in good.state["losses"])


def test_the_watch_judges_by_median_and_deviation() -> None:
    watch = LossWatch(10.0)
    for number in range(31):
        watch.add(3.0 + 0.1 * (number % 3))
    assert watch.limit() == math.inf  # too few
    watch.add(3.1)
    assert watch.limit() == pytest.approx(3.1 + 10 * 1.4826 * 0.1)
    assert LossWatch(10.0, watch.losses).limit() == watch.limit()
    watch.add(99.0)
    assert not watch.good
    assert watch.limit() < 5
    steady = LossWatch(5.0, [2.0] * 40)
    assert steady.limit() == pytest.approx(2.0 + 5 * 0.02)  # at least 1 %
