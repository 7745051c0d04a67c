"""The loops of others train low-bit weights: Trainer and accelerate, against a plain torch loop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    get_scheduler,
)

import dqt
import dqt.hf
from dqt.errors import ConfigError, FloatWriteError
from dqt.models import build_config, build_model
from dqt.optim import GradientRelease
from dqt.optim.base import QuantizedOptimizer
from train_helpers import STDLIB

STEPS, BATCH, LENGTH = 8, 4, 32
SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2}
TOKENS = torch.frombuffer(bytearray((STDLIB / "decoder.py").read_bytes()), dtype=torch.uint8).long()
WINDOWS = TOKENS.unfold(0, LENGTH, LENGTH)
DATA = [{"input_ids": window, "labels": window} for window in WINDOWS]


def new_model(bits: str | int = "ternary", **settings: Any) -> tuple[PreTrainedModel, QuantizedOptimizer]:
    config = build_config("micro", vocab_size=256, seq_len=LENGTH, overrides=SIZES)
    model = build_model(config, 0, init_gain=1.5)
    dqt.quantize_(model, bits)
    dqt.fuse_(model)
    model.config.use_cache = False  # as Trainer sets it; with a cache, fused layers take torch's attention
    return model, dqt.optim.AdamW(model.named_parameters(), lr=4e-3, seed=3, **settings)


class Losses(TrainerCallback):
    """What Trainer logs."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.seen += [logs["loss"]] if "loss" in logs else []


def new_trainer(
    directory: Path,
    model: PreTrainedModel,
    optimizer: torch.optim.Optimizer | None,
    callbacks: list[TrainerCallback] | None = None,
    **settings: Any,
) -> Trainer:
    defaults = {
        "max_steps": STEPS,
        "per_device_train_batch_size": BATCH,
        "train_sampling_strategy": "sequential",
        "lr_scheduler_type": "linear",
        "logging_steps": 1,
        "save_steps": STEPS // 2,
        "eval_strategy": "steps",
        "eval_steps": STEPS // 2,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    arguments = TrainingArguments(str(directory), **{**defaults, **settings})
    return Trainer(
        model,
        arguments,
        train_dataset=DATA,
        eval_dataset=DATA[:BATCH],
        optimizers=(optimizer, None),
        callbacks=callbacks,
    )


def linear(optimizer: torch.optim.Optimizer) -> Any:
    return get_scheduler("linear", optimizer, num_warmup_steps=0, num_training_steps=STEPS)


def plain_loop(bits: str | int, accumulation: int) -> tuple[list[float], PreTrainedModel, QuantizedOptimizer]:
    model, optimizer = new_model(bits)
    schedule, batches, losses = linear(optimizer), iter(WINDOWS.split(BATCH)), []
    for _ in range(STEPS):
        total = 0.0
        for _ in range(accumulation):
            batch = next(batches)
            loss = model(input_ids=batch, labels=batch).loss / accumulation
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses, model, optimizer


def accelerate_loop(
    bits: str | int, accumulation: int, save: Path | None = None, resume: Path | None = None
) -> tuple[list[float], PreTrainedModel, QuantizedOptimizer]:
    model, own = new_model(bits)
    accelerator = Accelerator(gradient_accumulation_steps=accumulation, cpu=True)
    batches = DataLoader(WINDOWS[: STEPS * accumulation * BATCH], batch_size=BATCH)  # type: ignore[arg-type]
    model, optimizer, loader, schedule = accelerator.prepare(model, own, batches, linear(own))
    done = 0
    if resume is not None:
        accelerator.load_state(str(resume))
        done = STEPS // 2
        loader = accelerator.skip_first_batches(loader, done * accumulation)
    losses, total = [], 0.0
    for batch in loader:
        with accelerator.accumulate(model):
            loss = model(input_ids=batch, labels=batch).loss
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        total += loss.item() / accumulation
        if accelerator.sync_gradients:
            losses.append(total)
            total, done = 0.0, done + 1
            if save is not None and done == STEPS // 2:
                accelerator.save_state(str(save))
    return losses, accelerator.unwrap_model(model), own


def assert_same_state(
    ours: tuple[torch.nn.Module, torch.optim.Optimizer], theirs: tuple[torch.nn.Module, torch.optim.Optimizer]
) -> None:
    """Codes, scales, floats, moments and residuals, to the bit."""
    first, second = ours[0].state_dict(), theirs[0].state_dict()
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name
    states = ours[1].state_dict()["state"], theirs[1].state_dict()["state"]
    assert states[0].keys() == states[1].keys()
    for number, state in states[0].items():
        assert state.keys() == states[1][number].keys()
        for key, value in state.items():
            other = states[1][number][key]
            assert torch.equal(value, other) if isinstance(value, Tensor) else value == other, key


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("bits", ["ternary", 8])
def test_three_loops_take_the_same_steps(bits: str | int, accumulation: int, tmp_path: Path) -> None:
    losses, *expected = plain_loop(bits, accumulation)
    assert losses[-1] < losses[0] - 0.3
    theirs, *state = accelerate_loop(bits, accumulation)
    assert theirs == losses
    assert_same_state((expected[0], expected[1]), (state[0], state[1]))

    model, optimizer = new_model(bits)
    logged = Losses()
    trainer = new_trainer(tmp_path, model, optimizer, [logged], gradient_accumulation_steps=accumulation)
    trainer.train()
    assert logged.seen == pytest.approx(losses, abs=1e-6)  # it logs float32 sums
    assert_same_state((expected[0], expected[1]), (model, optimizer))


def test_trainer_resumes_to_the_bit(tmp_path: Path) -> None:
    whole = new_model("ternary", second_moment="factored", first_moment="int8")
    trainer = new_trainer(tmp_path, *whole, gradient_accumulation_steps=2)
    trainer.train()
    pieces = new_model("ternary", second_moment="factored", first_moment="int8")
    resumed = new_trainer(tmp_path / "pieces", *pieces, gradient_accumulation_steps=2)
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{STEPS // 2}"))
    assert_same_state(whole, pieces)
    assert resumed.evaluate()["eval_loss"] == trainer.evaluate()["eval_loss"]
    # A checkpoint of Trainer is a model for from_pretrained, and this one for Trainer again.
    read = AutoModelForCausalLM.from_pretrained(tmp_path / f"checkpoint-{STEPS}")
    for name, tensor in whole[0].state_dict().items():
        assert torch.equal(tensor, read.state_dict()[name]), name
    optimizer = dqt.optim.AdamW(read.named_parameters(), lr=1e-3)
    again = new_trainer(tmp_path / "again", read, optimizer, max_steps=1, eval_strategy="no")
    again.train()
    assert optimizer.state_dict()["state"][1]["step"] == 1


def test_trainer_brings_the_best_model_back(tmp_path: Path) -> None:
    model, optimizer = new_model()
    trainer = new_trainer(tmp_path, model, optimizer, load_best_model_at_end=True)
    trainer.train()
    best = AutoModelForCausalLM.from_pretrained(trainer.state.best_model_checkpoint)
    assert all(torch.equal(t, model.state_dict()[name]) for name, t in best.state_dict().items())


def test_accelerate_resumes_to_the_bit(tmp_path: Path) -> None:
    losses, *whole = accelerate_loop("ternary", 2, save=tmp_path / "state")
    later, *pieces = accelerate_loop("ternary", 2, resume=tmp_path / "state")
    assert later == losses[STEPS // 2 :]
    assert_same_state((whole[0], whole[1]), (pieces[0], pieces[1]))


class Release(TrainerCallback):
    """Gradient release in Trainer: bound when it has placed the model, which replaces what hooks hang on."""

    def __init__(self, optimizer: QuantizedOptimizer) -> None:
        self.optimizer = optimizer

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        GradientRelease(self.optimizer)


def test_gradient_release_in_trainer(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"max_grad_norm": 0.0, "eval_strategy": "no", "save_strategy": "no"}
    plain, released = new_model(), new_model()
    new_trainer(tmp_path, *plain, **settings).train()
    new_trainer(tmp_path, *released, [Release(released[1])], **settings).train()
    assert_same_state(plain, released)

    model, optimizer = new_model()
    trainer = new_trainer(
        tmp_path, model, optimizer, [Release(optimizer)], gradient_accumulation_steps=2, **settings
    )
    with pytest.raises(ConfigError, match="gradients can't be accumulated"):
        trainer.train()


@pytest.mark.parametrize("name", ["adamw_torch_fused", "adamw_torch", "adafactor", "sgd"])
def test_optimizers_of_trainer_s_own_are_refused(name: str, tmp_path: Path) -> None:
    model, _ = new_model()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items() if key.endswith(".codes")}
    trainer = new_trainer(tmp_path, model, None, optim=name)
    with pytest.raises(FloatWriteError, match=r"train it with dqt.optim \(Trainer's optimizers="):
        trainer.train()
    for key, tensor in before.items():
        assert torch.equal(tensor, model.state_dict()[key])
