"""Rows 1, 13 and 19: a run in pieces is the run in one, bit for bit, and no other run is taken for it."""

from __future__ import annotations

import json
import random
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from nursery import Nursery, named, wait_until
from runs import arguments
from small import FACTS, contents, take_step
from torch import nn

import dqt
from dqt.data.sampler import Sampler
from dqt.errors import ConfigError
from dqt.optim.base import QuantizedOptimizer
from dqt.train import checkpoint, resume
from dqt.train.checkpoint import list_checkpoints, read_state, restore, save_checkpoint
from dqt.train.learner import Learner
from train_helpers import assert_same_tensors, metrics_of, run_micro, without_times

# -- mutations -----------------------------------------------------------------------------------------------


def the_place_in_the_data(patch: pytest.MonkeyPatch) -> None:
    original = Learner.restore

    def forgetful(self: Learner, found: resume.Found) -> None:
        original(self, found)
        self.samples = 0

    patch.setattr(Learner, "restore", forgetful)


def the_optimizer_s_state(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(QuantizedOptimizer, "load_state_dict", lambda self, state: None)


def integers_in_the_state(patch: pytest.MonkeyPatch) -> None:
    """torch's own way casts every state tensor to the dtype of its parameter."""
    patch.setattr(QuantizedOptimizer, "load_state_dict", torch.optim.Optimizer.load_state_dict)


def comparing_the_runs(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(resume, "require_same_run", lambda found, config, data_hash: [])


# -- row 1 ---------------------------------------------------------------------------------------------------

EPOCHS = {
    "data__max_bytes": 1000,
    "data__val_fraction": 0.2,
    "train__steps": 24,
    "train__checkpoint_every": 1,
}


@pytest.mark.row(1, the_place_in_the_data, the_optimizer_s_state)
@pytest.mark.parametrize("release", [False, True])
def test_any_number_of_pieces(release: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped after 5, 6 and 17 of 24 steps, in the middle of epochs; batches are noted as they are read."""
    batches: list[list[int]] = []
    original = Sampler.batch

    def note(self: Sampler, shards: Any, first: int, size: int) -> torch.Tensor:
        batch = original(self, shards, first, size)
        batches.append(batch.flatten().tolist())
        assert self.windows < 40, "not one epoch is over"
        return batch

    monkeypatch.setattr(Sampler, "batch", note)
    values = {**EPOCHS, "train__gradient_release": release, "train__keep_checkpoints": 30}
    run_micro(tmp_path, train__out=str(tmp_path / "whole"), **values)
    whole, batches[:] = batches.copy(), []
    original_step = Learner.train_step
    for last in (5, 6, 17, 24):

        def stopping(self: Learner, telemetry: bool, last: int = last) -> dict[str, Any]:
            line = original_step(self, telemetry)
            if self.step == last < 24:
                signal.raise_signal(signal.SIGTERM)
            return line

        with monkeypatch.context() as patch:
            patch.setattr(Learner, "train_step", stopping)
            run_micro(tmp_path, train__out=str(tmp_path / "pieces"), resume="auto", **values)
    assert batches == whole
    for step in (6, 18, 24):
        for name in ("model.safetensors", "optimizer.safetensors"):
            file = Path("checkpoints", f"step-{step:06d}", name)
            assert_same_tensors(tmp_path / "whole" / file, tmp_path / "pieces" / file)
    lines = [
        [line for line in without_times(metrics_of(tmp_path / run)) if "loss" in line]
        for run in ("whole", "pieces")
    ]
    assert lines[0] == lines[1]


ADAMW = [
    {"betas": (0.9 if first != "none" else 0.0, 0.95), "second_moment": second}
    | ({"first_moment": first} if first != "none" else {})
    for first, second in (("fp32", "full"), ("bf16", "int8"), ("int8", "factored"), ("none", "int8"))
]
CASES: list[tuple[str, dict[str, Any]]] = [
    *(("AdamW", {**each, "residual_bits": bits}) for each in ADAMW for bits in (0, 5, 16)),
    ("AdamW", {"clip_update": 1.0, "residual_bits": 8}),
    ("Adafactor", {"lr": 1e-2}),
    ("Adafactor", {"beta1": 0.9, "first_moment": "int8", "residual_bits": 8}),
    ("SGD", {"lr": 0.1}),
    ("SGD", {"lr": 0.1, "momentum": 0.9, "first_moment": "bf16"}),
]


@pytest.mark.row(1, the_optimizer_s_state, integers_in_the_state)
def test_every_optimizer_and_state(tmp_path: Path) -> None:
    for number, (name, options) in enumerate(CASES):
        for bits in ("1", "ternary", 4, 8):

            def fresh(name: str = name, options: Mapping[str, Any] = options, bits: Any = bits) -> Any:
                torch.manual_seed(1)
                model = nn.Sequential(nn.Linear(150, 6), nn.Linear(6, 3, bias=False))
                dqt.quantize_(model, bits=bits, rules={"1": None})
                return model, getattr(dqt.optim, name)(model.named_parameters(), seed=5, **options)

            model, optimizer = fresh()
            for step in range(4):
                if step == 2:
                    directory = tmp_path / f"{number}-{bits}"
                    saved = save_checkpoint(directory, step, model, optimizer, FACTS)
                take_step(model, optimizer, step)
            resumed, its_optimizer = fresh()
            restore(saved, read_state(saved), resumed, its_optimizer)
            for step in (2, 3):
                take_step(resumed, its_optimizer, step)
            ours, theirs = contents(resumed, its_optimizer), contents(model, optimizer)
            assert ours.keys() == theirs.keys()
            different = [
                key
                for key in ours
                if ours[key].dtype != theirs[key].dtype or not torch.equal(ours[key], theirs[key])
            ]
            assert different == [], (name, options, bits)


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """Sets the number of threads, until the test is over."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.row(1, the_optimizer_s_state)
def test_state_goes_on_with_another_number_of_threads(tmp_path: Path, threads: Callable[[int], None]) -> None:
    """By equal gradients: what a run does not promise are equal float sums in between."""

    def fresh() -> tuple[nn.Module, QuantizedOptimizer]:
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(600, 500), nn.Linear(500, 7))
        dqt.quantize_(model, bits="ternary", rules={"1": None})
        return model, dqt.optim.AdamW(model.named_parameters(), seed=5, second_moment="int8")

    threads(1)
    model, optimizer = fresh()
    for step in range(4):
        if step == 2:
            saved = save_checkpoint(tmp_path, step, model, optimizer, FACTS)
        take_step(model, optimizer, step)
    threads(2)
    resumed, its_optimizer = fresh()
    restore(saved, read_state(saved), resumed, its_optimizer)
    for step in (2, 3):
        take_step(resumed, its_optimizer, step)
    ours, theirs = contents(resumed, its_optimizer), contents(model, optimizer)
    assert [key for key, tensor in ours.items() if not torch.equal(tensor, theirs[key])] == []


@pytest.mark.row(1, the_place_in_the_data)
def test_a_run_goes_on_with_another_number_of_threads(
    tmp_path: Path, threads: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same run with the same batches; its losses are as near as float sums in another order."""
    whole = run_micro(tmp_path, train__out=str(tmp_path / "whole"))
    original = Learner.train_step

    def stopping(self: Learner, telemetry: bool) -> dict[str, Any]:
        line = original(self, telemetry)
        if self.step == 3:
            signal.raise_signal(signal.SIGTERM)
        return line

    with monkeypatch.context() as patch:
        patch.setattr(Learner, "train_step", stopping)
        run_micro(tmp_path, train__out=str(tmp_path / "pieces"))
    pieces = run_micro(tmp_path, train__out=str(tmp_path / "pieces"), train__threads=2, resume="auto")
    assert torch.get_num_threads() == 2
    losses = [
        [line["loss"] for line in metrics_of(run.directory.path) if "loss" in line] for run in (whole, pieces)
    ]
    assert losses[1] == pytest.approx(losses[0], abs=1e-4)


# -- row 13 --------------------------------------------------------------------------------------------------

OTHER_RUNS: list[tuple[dict[str, Any], str]] = [
    ({"quant__bits": "4"}, "quant.bits: ternary, now 4"),
    ({"quant__method": "strict"}, "quant.method: residual, now strict"),
    ({"model__hidden_size": 64}, "model.hidden_size: 32, now 64"),
    ({"model__num_hidden_layers": 1}, "model.num_hidden_layers: 2, now 1"),
    ({"optim__second_moment": "full"}, "optim.second_moment: factored, now full"),
    ({"train__seed": 1}, "train.seed: 0, now 1"),
    ({"train__batch_size": 4}, "train.batch_size: 2, now 4"),
    ({"data__vocab_size": 280}, "data.hash"),
    ({"data__val_fraction": 0.1}, "data.hash"),
]


@pytest.mark.row(13, comparing_the_runs)
def test_another_run_is_refused_side_by_side(tmp_path: Path) -> None:
    run_micro(tmp_path)
    before = sorted((path, path.stat().st_mtime_ns) for path in (tmp_path / "run").rglob("*"))
    for values, part in OTHER_RUNS:
        with pytest.raises(ConfigError) as error:
            run_micro(tmp_path, resume="auto", **{"train__steps": 9, **values})
        assert part in str(error.value)
        assert "another run" in str(error.value)
    assert sorted((path, path.stat().st_mtime_ns) for path in (tmp_path / "run").rglob("*")) == before


def test_keys_that_came_later_do_not_make_another_run(tmp_path: Path) -> None:
    run_micro(tmp_path)
    path = list_checkpoints(tmp_path / "run" / "checkpoints")[-1]
    state = read_state(path)
    for section, key in (("optim", "float_first_moment"), ("train", "on_spike"), ("train", "fused")):
        del state["config"][section][key]
    config = resume.saved_config(tmp_path / "run")
    assert resume.require_same_run(resume.Found(path, state), config, state["data_hash"]) == []


def test_a_key_that_came_later_is_read_as_what_runs_did_without_it(tmp_path: Path) -> None:
    """Strict ternary has moved only what is significant since there is a key for it."""
    run_micro(tmp_path, quant__method="strict", quant__bits="ternary")
    path = list_checkpoints(tmp_path / "run" / "checkpoints")[-1]
    state = read_state(path)
    config = resume.saved_config(tmp_path / "run")
    assert resume.require_same_run(resume.Found(path, state), config, state["data_hash"]) == []
    del state["config"]["optim"]["significance"]
    with pytest.raises(ConfigError, match=r"optim.significance: 0.0, now 2.0"):
        resume.require_same_run(resume.Found(path, state), config, state["data_hash"])
    assert (
        resume.require_same_run(
            resume.Found(path, state), config.override({"optim.significance": 0.0}), state["data_hash"]
        )
        == []
    )


# -- row 19 --------------------------------------------------------------------------------------------------

STEPS, KILLS = 2000, 50
TINY = {
    "model__hidden_size": 8,
    "model__intermediate_size": 8,
    "model__num_hidden_layers": 1,
    "data__vocab_size": 257,
    "train__steps": STEPS,
    "train__seq_len": 8,
    "train__checkpoint_every": 25,
    "train__eval_every": 500,
    "train__log_every": 100,
}


def later_saves_to_be_forgotten(patch: pytest.MonkeyPatch) -> None:
    """Only for its name: in the child processes a resumed run begins its optimizer anew."""


def forget_the_optimizer() -> None:
    checkpoint.restore.__globals__["_join"] = lambda optimizer, tensors, described: optimizer.state_dict()


@pytest.mark.slow
@pytest.mark.row(19, later_saves_to_be_forgotten)
def test_fifty_kills(tmp_path: Path, nursery: Nursery, mutation: Any) -> None:
    """A micro model, 2,000 steps, killed 50 times by SIGKILL at random moments, and resumed each time.

    Every process is a `dqt train` of its own, but forked from one that has imported everything (see
    nursery.py), because 50 imports would take most of the time. A kill comes at a random time after the
    process has reached its first step; the run is as long as it takes for 50 of them.
    """
    chance = random.Random(0)
    env = {"DQT_CACHE": str(tmp_path / "cache")}
    steps, kills = (STEPS, KILLS) if mutation is None else (200, 4)
    values = {**TINY, "train__steps": steps}
    status, output = nursery.run(arguments(tmp_path / "whole", **values), env=env)
    assert status == 0, output
    whole = [line for line in metrics_of(tmp_path / "whole") if "memory_bytes" in line]
    seconds = whole[-1]["elapsed"]
    first = [(named(forget_the_optimizer), [])] if mutation else []
    out = tmp_path / "killed"
    killed = 0
    while True:
        child = nursery.start(arguments(out, "--resume", "auto", **values), first, env=env)
        if killed < kills:
            wait_until(lambda: "writing to" in child.output)  # noqa: B023
            time.sleep(chance.uniform(0, 1.6 * seconds / kills))
            child.kill(signal.SIGKILL)
            if child.wait() == -signal.SIGKILL:
                killed += 1
                continue
        else:
            status = child.wait()
            assert status == 0, child.output
        break
    assert killed > 0.8 * kills, f"the run was over after {killed} kills"
    final = Path("checkpoints", f"step-{steps:06d}")
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert_same_tensors(tmp_path / "whole" / final / name, out / final / name)
    records = [json.loads((run / "run.json").read_text()) for run in (tmp_path / "whole", out)]
    assert records[0]["summary"]["val_loss"] == records[1]["summary"]["val_loss"]
    assert len(list((out / "checkpoints").iterdir())) <= 4
    if steps == STEPS:
        memory = [line["memory_bytes"] for line in whole]
        assert memory[-1] - memory[len(memory) // 4] < 8e6, "memory grows with steps"
