"""The smallest things that can be saved: two low-bit layers and their optimizer, or a run of a second."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from torch import nn

import dqt
from dqt.optim.base import QuantizedOptimizer
from dqt.train.checkpoint import read_state, restore, save_checkpoint

FACTS: dict[str, Any] = {"seed": 0, "samples": 0, "elapsed": 1.5, "data_hash": "0", "config": {"train": {}}}


def model_and_optimizer(steps: int = 1) -> tuple[nn.Module, QuantizedOptimizer]:
    """A model that has taken some steps, always the same ones."""
    torch.manual_seed(7)
    model = nn.Sequential(nn.Linear(12, 8), nn.Linear(8, 4, bias=False))
    dqt.quantize_(model, bits="ternary")
    optimizer = dqt.optim.AdamW(model.named_parameters(), lr=0.05, seed=3)
    for step in range(steps):
        take_step(model, optimizer, step)
    return model, optimizer


def take_step(model: nn.Module, optimizer: torch.optim.Optimizer, number: int) -> None:
    """An update by gradients that only the number decides."""
    generator = torch.Generator().manual_seed(number)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    optimizer.step()
    optimizer.zero_grad()


def save(directory: Path, step: int, **facts: Any) -> Path:
    """A checkpoint of a model after so many steps."""
    return save_checkpoint(directory, step, *model_and_optimizer(step), {**FACTS, **facts})


def contents(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Every tensor of both, by name."""
    found = {f"model/{name}": tensor.clone() for name, tensor in model.state_dict().items()}
    for index, state in optimizer.state_dict()["state"].items():
        found |= {f"{index}/{key}": torch.as_tensor(value).clone() for key, value in state.items()}
    return found


def require_whole(checkpoint: Path) -> None:
    """Asserts that a checkpoint verifies, loads, and is what was saved at its step."""
    state = read_state(checkpoint)
    model, optimizer = model_and_optimizer()
    restore(checkpoint, state, model, optimizer)
    expected, found = _expected(state["step"]), contents(model, optimizer)
    assert found.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())


@functools.cache
def _expected(step: int) -> dict[str, torch.Tensor]:
    return contents(*model_and_optimizer(step))
