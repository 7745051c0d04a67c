"""First and second moments of gradients, in the forms that an optimizer can keep them.

    first moment    none (beta1 = 0), or an exponential average in float32
    second moment   "full": an exponential average of squares in float32, 4 bytes a weight
                    "factored": averages of the rows' and columns' mean squares, about nothing a weight, from
                    which v = row * column / mean(row) (Adafactor, arXiv 1804.04235, eq. 4). Measured: no
                    loss.

State tensors live in the optimizer's `state[parameter]` under torch's names where torch has them. A gradient
is seen as a matrix [rows, columns] and read a few rows at a time, so that temporaries stay small and in
cache.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from dqt.ops.reference import exact_sqrt as exact_sqrt

SECOND_MOMENTS = ("full", "factored")


def is_factored(second_moment: str, shape: torch.Size) -> bool:
    """A vector has no rows and columns to factor, and keeps the full second moment."""
    return second_moment == "factored" and len(shape) >= 2


def init_moments(state: dict[str, Any], grad: Tensor, beta1: float, second_moment: str) -> None:
    """Adds zero moments for a gradient matrix [rows, columns] to `state`."""
    if beta1:
        state["exp_avg"] = torch.zeros_like(grad, dtype=torch.float32)
    if second_moment == "factored":
        state["exp_avg_sq_row"] = torch.zeros(grad.shape[0], dtype=torch.float32, device=grad.device)
        state["exp_avg_sq_col"] = torch.zeros(grad.shape[1], dtype=torch.float32, device=grad.device)
    else:
        state["exp_avg_sq"] = torch.zeros_like(grad, dtype=torch.float32)


def update_factors(
    state: dict[str, Any], means: tuple[Tensor, Tensor], beta2: float
) -> tuple[Tensor, Tensor]:
    """First pass of a factored second moment: brings the averages of row and column mean squares up to date.

    Args:
        state: Has the averages.
        means: Mean squares of the gradient's rows and columns.
        beta2: Decay.

    Returns:
        Row factor [rows] and column factor [columns], whose products are the second moment.
    """
    row, column = state["exp_avg_sq_row"], state["exp_avg_sq_col"]
    row.mul_(beta2).add_(means[0] * (1 - beta2))
    column.mul_(beta2).add_(means[1] * (1 - beta2))
    return row / ordered_mean(row).clamp_min(torch.finfo(torch.float32).tiny), column


def update_clip(state: dict[str, Any], mean_square: float, beta2: float, limit: float) -> None:
    """Sets `state["clip"]`, what the update direction is divided by: max(1, ratio / limit).

    ratio is the root mean square of the gradient over its running one, both over the whole tensor. It stands
    for the root mean square of the direction g / sqrt(v) that Adafactor (arXiv 1804.04235, section 6) and
    StableAdamW (2304.13013) clip by: with the tensor's mean of v in place of each element's, it is known
    before the first element is updated, without another pass of roots and divisions.

    Args:
        state: Keeps the running mean of squares, a number, beside the moments.
        mean_square: Of the gradient.
        beta2: Decay of the second moment.
        limit: Adafactor's d.
    """
    step = state["step"]
    before = state.get("mean_square", mean_square * (1 - beta2 ** (step - 1)))  # switched on in mid run
    running = before * beta2 + mean_square * (1 - beta2)
    corrected = running / (1 - beta2**step)
    ratio = math.sqrt(mean_square / corrected) if corrected else 0.0
    state["mean_square"], state["clip"] = running, max(1.0, ratio / limit)


def ordered_mean(values: Tensor) -> Tensor:
    """Mean of a vector, in an order that the number of threads does not change; torch splits longer sums."""
    return torch.as_tensor(sum(part.sum() for part in values.split(16384)) / values.numel())


# The products and sums below are separate operations on purpose: torch's lerp_, addcmul_ and add_(alpha=)
# fuse them on some CPUs, and the kernels must give the same bits everywhere.


def second_moment_rows(
    state: dict[str, Any], factors: tuple[Tensor, Tensor] | None, grad: Tensor, rows: slice, beta2: float
) -> Tensor:
    """Second moment of some rows, a full one brought up to date with their `grad` [rows, columns]."""
    if factors is not None:
        return factors[0][rows, None] * factors[1]
    return state["exp_avg_sq"][rows].mul_(beta2).add_((grad * grad).mul_(1 - beta2))


def first_moment_rows(state: dict[str, Any], grad: Tensor, rows: slice, beta1: float) -> Tensor:
    """First moment of some rows, brought up to date with their `grad`; the gradient itself without one."""
    return state["exp_avg"][rows].mul_(beta1).add_(grad * (1 - beta1)) if "exp_avg" in state else grad
