"""The loop: what a run leaves behind, that it is deterministic, and how it stops."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from dqt.data.prepare import prepare_corpus
from dqt.errors import ConfigError, DqtError, NonFiniteError
from dqt.train.config import Config, resolve
from dqt.train.loop import train
from dqt.train.metrics import Console, code_histograms, format_duration, progress_text
from dqt.train.rundir import RunDirectory
from dqt.train.trainer import Trainer
from train_helpers import assert_same_tensors, metrics_of, micro_config, run_micro, without_times


def trainer_for(tmp_path: Path, **values: Any) -> Trainer:
    config = resolve(micro_config(tmp_path, **values))
    corpus = prepare_corpus(config.data, tmp_path.parent / "dqt-cache")
    return Trainer(config, corpus, RunDirectory(tmp_path / "run"), Console(None))


def test_what_a_run_leaves_behind(tmp_path: Path) -> None:
    stream = io.StringIO()
    config = micro_config(tmp_path, train__accumulation=2)
    result = train(config, cache_dir=tmp_path / "cache", stream=stream)
    run = tmp_path / "run"
    assert {path.name for path in run.iterdir()} == {
        "config.toml",
        "metrics.jsonl",
        "run.json",
        "checkpoints",
        "model",
    }

    reports = [line for line in metrics_of(run) if "loss" in line]
    assert [line["step"] for line in reports] == list(range(1, 7))
    assert set(reports[0]) == {
        *(
            "step",
            "tokens",
            "loss",
            "lr",
            "tokens_per_second",
            "memory_bytes",
            "flip_rate",
            "saturated",
            "zeros",
        ),
        *("residual_spread", "grad_norm", "elapsed"),
    }
    assert [line["tokens"] for line in reports] == [64 * step for step in range(1, 7)]
    assert [line["step"] for line in metrics_of(run) if "val_loss" in line] == [3, 6]
    codes = [line["codes"] for line in metrics_of(run) if "codes" in line][-1]
    assert sum(codes["model.layers.0.mlp.up_proj.weight"]) == 32 * 64

    record = json.loads((run / "run.json").read_text())
    summary = record["summary"]
    assert (record["state"], result.state) == ("finished", "finished")
    assert summary["val_loss"] == result.evaluation.loss == metrics_of(run)[-2]["val_loss"]
    assert summary["memory"][-1]["total"] == result.memory.total.total
    assert summary["memory"][-1]["total"] < summary["memory"][-1]["fp32_adamw"]
    assert summary["samples"] == [{"prompt": result.prompt, "text": result.sample}]
    assert summary["unigram_nats"] == result.unigram_nats
    assert "step 6/6" in stream.getvalue()
    assert "ternary" in stream.getvalue()


def test_the_effective_config_reproduces_the_run(tmp_path: Path) -> None:
    first = run_micro(tmp_path, quant__bits="ternary", train__steps=4)
    written = Config.from_toml(tmp_path / "run" / "config.toml").override(
        {"train.out": str(tmp_path / "again")}
    )
    again = train(written, cache_dir=tmp_path.parent / "dqt-cache")
    assert again.evaluation == first.evaluation
    assert again.sample == first.sample
    assert without_times(metrics_of(tmp_path / "again")) == without_times(metrics_of(tmp_path / "run"))
    file = Path("model") / "model.safetensors"
    assert_same_tensors(tmp_path / "run" / file, tmp_path / "again" / file)


def test_another_seed_is_another_run(tmp_path: Path) -> None:
    losses = [run_micro(tmp_path, train__seed=seed, train__out=str(tmp_path / f"{seed}")) for seed in (0, 1)]
    assert losses[0].evaluation.loss != losses[1].evaluation.loss


@pytest.mark.parametrize(
    ("method", "bits", "lr"),
    [
        ("residual", "ternary", 1e-2),
        ("strict", "8", 5e-3),
        ("fp32", None, 1e-2),
        ("bitnet", None, 1e-2),
        ("bf16", None, 1e-2),
    ],
)
def test_it_learns(method: str, bits: str | None, lr: float, tmp_path: Path) -> None:
    result = run_micro(
        tmp_path,
        quant__method=method,
        quant__bits=bits,
        model__hidden_size=64,
        train__steps=200,
        train__seq_len=32,
        train__batch_size=8,
        train__eval_every=200,
        train__eval_windows=20,
        optim__lr=lr,
    )
    assert result.evaluation.loss < result.unigram_nats - 0.2


def test_accumulation_is_a_larger_batch(tmp_path: Path) -> None:
    """Two passes of 2 sequences give the gradients of one pass of 4."""
    gradients = []
    for batch_size, accumulation in ((4, 1), (2, 2)):
        trainer = trainer_for(
            tmp_path,
            quant__method="fp32",
            optim__grad_clip=0,
            train__batch_size=batch_size,
            train__accumulation=accumulation,
        )
        trainer.optimizer.step = lambda model=trainer.model: gradients.append(  # type: ignore[method-assign,misc]
            {name: p.grad.clone() for name, p in model.named_parameters()}
        )
        trainer.train_step(telemetry=False)
    for name, grad in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], grad, rtol=1e-4, atol=1e-7)


def test_activation_checkpointing_changes_nothing(tmp_path: Path) -> None:
    lines = [
        trainer_for(tmp_path, train__activation_checkpointing=flag).train_step(telemetry=False)
        for flag in (False, True)
    ]
    assert lines[0] == lines[1]


def test_gradients_are_clipped_to_the_norm(tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path, optim__grad_clip=0.01)
    norms = []
    trainer.optimizer.step = lambda: norms.append(  # type: ignore[method-assign]
        torch.nn.utils.get_total_norm(
            [p.grad for p in trainer.model.parameters() if p.grad is not None]
        ).item()
    )
    line = trainer.train_step(telemetry=False)
    assert line["grad_norm"] > 0.1
    assert norms == [pytest.approx(0.01, rel=1e-4)]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_before_the_update(value: float, tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path)
    trainer.train_step(telemetry=False)
    norm = trainer.model.model.norm.weight
    norm.data[0] = value
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    with pytest.raises(NonFiniteError, match=r"step 2 \(samples 2 to 3\): the loss is nan"):
        trainer.train_step(telemetry=False)
    for name, tensor in trainer.model.state_dict().items():
        assert torch.equal(tensor.nan_to_num(), before[name].nan_to_num())


def test_a_gradient_that_is_not_finite_is_named_with_the_step(tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path)
    name = "model.layers.1.mlp.up_proj.weight"
    weight = dict(trainer.model.named_parameters())[name]
    weight.register_hook(lambda grad: grad.index_fill(0, torch.tensor([3]), float("nan")))
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    with pytest.raises(NonFiniteError, match=rf"step 1 \(samples 0 to 1\): .*{name}"):
        trainer.train_step(telemetry=False)
    assert all(torch.equal(tensor, before[name]) for name, tensor in trainer.model.state_dict().items())


def test_a_failed_run_says_so_and_can_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = Trainer.train_step

    def fail_at_five(self: Trainer, telemetry: bool) -> dict[str, Any]:
        if self.step == 4:
            raise NonFiniteError("the loss is nan at step 5")
        return original(self, telemetry)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", fail_at_five)
        with pytest.raises(NonFiniteError):
            run_micro(tmp_path)
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (record["state"], record["summary"]["error"]) == ("failed", "the loss is nan at step 5")
    with pytest.raises(ConfigError, match="run that is failed"):
        run_micro(tmp_path)
    assert run_micro(tmp_path, resume="auto").state == "finished"


def test_a_run_that_is_made_longer_keeps_its_grid(tmp_path: Path) -> None:
    """Of a longer run from the start the grid would reach further; this one has its scales already."""
    settings = {"quant__bits": "8", "optim__lr": 0.3}
    run_micro(tmp_path, train__steps=4, **settings)
    config = tmp_path / "run" / "config.toml"
    headroom = Config.from_toml(config).quant.headroom
    assert headroom > 1
    assert run_micro(tmp_path, resume="auto", train__steps=9, **settings).steps == 9
    assert Config.from_toml(config).quant.headroom == headroom
    run_micro(tmp_path, train__steps=9, train__out=str(tmp_path / "longer"), **settings)
    assert Config.from_toml(tmp_path / "longer" / "config.toml").quant.headroom > headroom
    with pytest.raises(ConfigError, match=r"quant.headroom: .*, now 9.0"):
        run_micro(tmp_path, resume="auto", train__steps=10, quant__headroom=9.0, **settings)


def test_a_rule_that_names_nothing_is_a_slip(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"match no module of this model: \*\.up_poj;"):
        run_micro(tmp_path, quant__bits="4", quant__rules={"*.up_poj": "8", "*.up_proj": "8"})


def test_out_of_memory_says_what_the_run_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Trainer, telemetry: bool) -> dict[str, Any]:
        torch.empty(2**60, dtype=torch.uint8)
        return {}

    monkeypatch.setattr(Trainer, "train_step", fail)
    with pytest.raises(DqtError, match=r"out of memory: this run needs about \d+ MB; .* train.seq_len"):
        run_micro(tmp_path)


# -- signals -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_step_and_leaves_a_usable_run(
    number: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Trainer.train_step

    def signal_at_four(self: Trainer, telemetry: bool) -> dict[str, Any]:
        if self.step == 3:
            os.kill(os.getpid(), number)
        return original(self, telemetry)

    whole = run_micro(tmp_path, train__out=str(tmp_path / "whole"))
    handlers = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", signal_at_four)
        stopped = run_micro(tmp_path)
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert (stopped.state, stopped.steps) == ("interrupted", 4)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["state"] == "interrupted"
    assert (tmp_path / "run" / "model" / "dqt.json").is_file()
    with pytest.raises(ConfigError, match="interrupted: go on with --resume auto"):
        run_micro(tmp_path)
    resumed = run_micro(tmp_path, resume="auto")
    assert resumed.evaluation == whole.evaluation


def test_a_second_signal_leaves_at_once() -> None:
    code = (
        "import os, signal, time\n"
        "from dqt.train.signals import StopRequest\n"
        "with StopRequest() as stop:\n"
        "    stop.graceful()\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    print(stop.name, flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    time.sleep(60)\n"
        "    print('still here')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["SIGTERM"]
    assert done.returncode == 128 + signal.SIGINT


# -- what people see -----------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


LINE = {
    "step": 7,
    "loss": 3.14159,
    "lr": 1e-3,
    "tokens_per_second": 12345.6,
    "memory_bytes": 1.5e9,
    "flip_rate": 0.0123,
}


def test_the_live_line() -> None:
    text = progress_text(LINE, 100, 61)
    assert text == "step   7/100  loss 3.142  lr 1.00e-03  12,346 tokens/s  1.5 GB  flips 1.23%  1:01 left"
    assert "flips" not in progress_text({**LINE, "flip_rate": None}, 100, 61)
    assert [format_duration(seconds) for seconds in (0, 59.6, 3600 * 2 + 65)] == ["0:00", "1:00", "2:01:05"]


def test_a_terminal_has_one_line_and_a_file_a_few() -> None:
    terminal, file = Terminal(), io.StringIO()
    for stream in (terminal, file):
        console = Console(stream)
        for step in range(5):
            console.progress(f"step {step}")
        console.say("done")
    assert terminal.getvalue().count("\n") == 1
    assert terminal.getvalue().endswith("\r      \rdone\n")
    assert file.getvalue() == "step 0\ndone\n"


def test_code_histograms_count_every_code(tmp_path: Path) -> None:
    model = trainer_for(tmp_path, quant__bits="3").model
    name = "model.layers.0.mlp.down_proj.weight"
    codes = dict(model.named_parameters())[name].unpack()
    assert code_histograms(model)[name] == [(codes == code).sum().item() for code in range(-4, 4)]
