"""The optimizers and state types that every test of the optimizers runs over, and small models for them."""

from __future__ import annotations

import io
from typing import Any

import torch
from torch import nn

import dqt
from dqt.optim import SGD, Adafactor, AdamW, PaperAdafactor, PaperAdamW
from dqt.optim.base import QuantizedOptimizer


def make_model(bits: str | int = "ternary", **settings: Any) -> nn.Sequential:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(10, 12), nn.LayerNorm(12), nn.Linear(12, 9, bias=False))
    dqt.quantize_(model, bits, **settings)
    return model


def set_gradients(model: nn.Module, step: int) -> None:
    """The same gradients for equally named parameters, whatever their order."""
    for name, parameter in model.named_parameters():
        generator = torch.Generator().manual_seed(1000 * step + sum(name.encode()))
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def run(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        set_gradients(model, step)
        optimizer.step()


def assert_equal_state(model: nn.Module, other: nn.Module) -> None:
    ours, theirs = model.state_dict(), other.state_dict()
    assert list(ours) == list(theirs)
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name


def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)  # type: ignore[no-any-return]


# Bits, and the settings beside lr 0.02; AdamW unless said otherwise.
OPTIMIZERS: dict[str, tuple[str, dict[str, Any]]] = {
    "strict": ("8", {"residual_bits": 0}),
    "strict binary, no momentum": ("1", {"residual_bits": 0, "betas": (0.0, 0.95)}),
    "residual": ("ternary", {"residual_bits": 8}),
    "residual, factored": ("4", {"residual_bits": 8, "second_moment": "factored", "betas": (0.0, 0.95)}),
    "residual of 3 bits": ("3", {"residual_bits": 3, "weight_decay": 0.1}),
    "residual of 16 bits": ("2", {"residual_bits": 16}),
    "nearest": ("5", {"residual_bits": 8, "rounding": "nearest"}),
    "low discrepancy": ("8", {"residual_bits": 0, "rounding": "low_discrepancy"}),
    "low discrepancy, residual": ("ternary", {"residual_bits": 6, "rounding": "low_discrepancy"}),
    "int8 moments": ("8", {"residual_bits": 0, "first_moment": "int8", "second_moment": "int8"}),
    "int8 and factored": ("8", {"residual_bits": 0, "first_moment": "int8", "second_moment": "factored"}),
    "clipped": ("4", {"residual_bits": 8, "clip_update": 0.5}),
    "fp8 moments": ("8", {"residual_bits": 0, "first_moment": "fp8", "second_moment": "fp8"}),
    "bf16 moments": ("4", {"residual_bits": 8, "first_moment": "bf16", "second_moment": "bf16"}),
    "bf16 first moment": ("4", {"residual_bits": 8, "first_moment": "bf16", "second_moment": "factored"}),
    "no first moment": ("4", {"residual_bits": 8, "first_moment": "none", "second_moment": "fp8"}),
    "float residual": ("4", {"residual_bits": 32, "weight_decay": 0.1}),
    "gated": ("ternary", {"residual_bits": 0, "rounding": "gated", "lr": 0.5}),
    "agreed": ("ternary", {"residual_bits": 0, "rounding": "agreed", "lr": 0.2}),
    "noise": ("8", {"residual_bits": 0, "rounding": "noise", "lr": 0.2}),
    "biased": ("8", {"residual_bits": 0, "rounding": "biased"}),
    "learned": ("8", {"residual_bits": 8, "rounding": "learned"}),
    "significance": ("ternary", {"residual_bits": 0, "significance": 0.7, "lr": 0.2}),
    "dropped": ("8", {"residual_bits": 0, "drop_smallest": 0.2}),
    "paper, dropped": ("4", {"optimizer": PaperAdamW, "drop_smallest": 0.2}),
    "paper, nearest": ("4", {"optimizer": PaperAdamW, "rounding": "nearest"}),
    "learned scale": ("4", {"residual_bits": 8, "learn_scale": True}),
    "ECO": ("8", {"residual_bits": 0, "error_feedback": "eco", "second_moment": "factored"}),
    "ECO, SGD": ("8", {"optimizer": SGD, "residual_bits": 0, "momentum": 0.9, "error_feedback": "eco"}),
    "SGD": ("8", {"optimizer": SGD, "residual_bits": 0, "momentum": 0.9}),
    "Adafactor": ("8", {"optimizer": Adafactor, "residual_bits": 0, "beta1": 0.9, "lr": 0.5}),
    "Adafactor, fp8": (
        "8",
        {"optimizer": Adafactor, "residual_bits": 8, "beta1": 0.9, "first_moment": "fp8"},
    ),
    "paper": ("4", {"optimizer": PaperAdamW, "residual_bits": 0}),
    "paper, fp8 moments": ("4", {"optimizer": PaperAdamW, "first_moment": "fp8", "second_moment": "fp8"}),
    "paper, Adafactor": ("4", {"optimizer": PaperAdafactor, "residual_bits": 0}),
}
CASES = [*OPTIMIZERS]
DRAWS_NOTHING = ["nearest", "float residual", "learned", "paper, nearest"]


def build(case: str, model: nn.Module, named: Any = None, seed: int = 5) -> QuantizedOptimizer:
    """The optimizer of a case."""
    named = model.named_parameters() if named is None else named
    settings = {"optimizer": AdamW, "lr": 0.02, **OPTIMIZERS[case][1]}
    optimizer: QuantizedOptimizer = settings.pop("optimizer")(named, seed=seed, **settings)
    return optimizer


def model_of(case: str) -> nn.Module:
    """The model of a case; every parameter of a paper's is on a grid."""
    bits, settings = OPTIMIZERS[case]
    if settings.get("optimizer") not in (PaperAdamW, PaperAdafactor):
        return make_model(bits)
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(10, 12, bias=False), nn.Linear(12, 9, bias=False))
    dqt.quantize_(model, bits, {"*": bits}, scale_rule="paper")
    return model
