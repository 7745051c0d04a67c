"""Scales that are trained with the codes (`scale_rule` = "learned"), one number a tensor or a row.

    g  = sum(dW * value)                      value = weight / scale, in grid steps
    v  = b2 v + (1 - b2) g²                   the b2 of the weights, no first moment
    scale = scale * (1 - lr g / (sqrt(v / (1 - b2^t)) + eps))

The step is relative to the scale, so that the weights' learning rate fits both. The network is given the
scale's nearest float16 value, as always, so that export stays exact; the state keeps the float32 one, which
small steps would otherwise never change. Frozen scales are the default: a moving scale moves every weight
with it, and ternary with a residual has 2.068 nats with a learned one (at 2.8e-3; 2e-3 2.077) and 2.016 with
a frozen one (4e-3; micro with 4 layers, 2.5M tokens, seed 1000).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dqt.numerics.scales import round_to_float16
from dqt.ops.reference import exact_sqrt, row_sums
from dqt.optim.moments import ordered_mean
from dqt.optim.step import row_blocks
from dqt.tensor import QuantizedTensor

_EPS = 1e-12
_LARGEST_STEP = 0.5


def update_scale(
    weight: QuantizedTensor, grad: Tensor, state: dict[str, Any], lr: float, beta2: float
) -> None:
    """One step of a weight's scale.

    Args:
        weight: Its scale changes, its codes do not.
        grad: Of the weight, as a matrix [rows, columns].
        state: Of the weight, with "scale", "scale_sq" and "step".
        lr: Learning rate, relative to the scale.
        beta2: Decay of the squares.
    """
    parts = []
    for rows in row_blocks(*grad.shape):
        value = weight.unpack_rows(rows).float() - weight.format.offset
        parts.append(row_sums(grad[rows].float() * value))
    of_rows = torch.cat(parts)
    g = of_rows[:, None] if weight.scale.ndim else ordered_mean(of_rows) * len(of_rows)
    scale, squares = state["scale"], state["scale_sq"]
    squares.mul_(beta2).add_(g * g * (1 - beta2))
    step = g / (exact_sqrt(squares / (1 - beta2 ** state["step"])) + _EPS) * lr
    scale.mul_(1 - step.clamp(-_LARGEST_STEP, _LARGEST_STEP))
    weight.scale.copy_(round_to_float16(scale))
