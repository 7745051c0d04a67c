"""What lies between the products of a decoder layer, each in one pass: RMS norm, SwiGLU, rotary embedding.

The functions take `float32` tensors and are the operations `torch.ops.dqt.*`; see `dqt.ops.reference` for
what is computed, and `dqt.fused` for their gradients. PyTorch's own operations make five to nine passes over
the same numbers, which took as long as half of the integer products (8 layers of width 512).
"""

from __future__ import annotations

import torch
from torch import Tensor

from dqt.errors import ConfigError
from dqt.ops import reference
from dqt.ops.registry import fits, operation

__all__ = ["rms_norm", "rms_norm_backward", "rotary", "swiglu", "swiglu_backward", "swiglu_quantized"]


@operation("(Tensor x, Tensor weight, float eps) -> (Tensor, Tensor)", reference.rms_norm)
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Norm of rows, and its reciprocal root for the backward pass; see `reference.rms_norm`."""
    fits("rms_norm", "x", x, torch.float32, None, None)
    fits("rms_norm", "weight", weight, torch.float32, x.shape[1])
    return x.new_empty(x.shape), x.new_empty(x.shape[:1])


@operation(
    "(Tensor dy, Tensor x, Tensor weight, Tensor rstd) -> (Tensor, Tensor)", reference.rms_norm_backward
)
def rms_norm_backward(dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x and weight; see `reference.rms_norm_backward`."""
    fits("rms_norm_backward", "dy", dy, torch.float32, None, None)
    fits("rms_norm_backward", "x", x, torch.float32, *dy.shape)
    fits("rms_norm_backward", "weight", weight, torch.float32, dy.shape[1])
    fits("rms_norm_backward", "rstd", rstd, torch.float32, dy.shape[0])
    return dy.new_empty(dy.shape), dy.new_empty(dy.shape[1:])


@operation("(Tensor gate, Tensor up) -> Tensor", reference.swiglu)
def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up; see `reference.swiglu`."""
    _fits_gate("swiglu", gate, up=up)
    return gate.new_empty(gate.shape)


@operation("(Tensor gate, Tensor up) -> (Tensor, Tensor)", reference.swiglu_quantized)
def swiglu_quantized(gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Int8 codes and scales of the rows of silu(gate) * up, which itself never reaches memory."""
    _fits_gate("swiglu_quantized", gate, up=up)
    return gate.new_empty(gate.shape, dtype=torch.int8), gate.new_empty(gate.shape[:1])


@operation("(Tensor dh, Tensor gate, Tensor up) -> (Tensor, Tensor)", reference.swiglu_backward)
def swiglu_backward(dh: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of gate and up; see `reference.swiglu_backward`."""
    _fits_gate("swiglu_backward", gate, up=up, dh=dh)
    return gate.new_empty(gate.shape), gate.new_empty(gate.shape)


@operation(
    "(Tensor x, Tensor cos, Tensor sin, bool transposed=False) -> Tensor",
    reference.rotary,
    sizes=lambda x, *_: (x.shape[1], x.shape[2]),
)
def rotary(x: Tensor, cos: Tensor, sin: Tensor, transposed: bool = False) -> Tensor:
    """Rotary embedding of [batch, positions, heads, width]; see `reference.rotary`."""
    fits("rotary", "x", x, torch.float32, None, None, None, None)
    if x.shape[-1] % 2:
        raise ConfigError(f"rotary: a head of width {x.shape[-1]} has no two halves")
    for name, angles in (("cos", cos), ("sin", sin)):
        fits("rotary", name, angles, torch.float32, x.shape[1], x.shape[-1])
    return x.new_empty(x.shape)


def _fits_gate(operation: str, gate: Tensor, **others: Tensor) -> None:
    fits(operation, "gate", gate, torch.float32, None, None)
    for name, tensor in others.items():
        fits(operation, name, tensor, torch.float32, *gate.shape)
