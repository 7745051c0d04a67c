"""First and second moments of gradients, in the forms that an optimizer can keep them.

    first moment    none (beta1 = 0), or an exponential average in float32
    second moment   "full": an exponential average of squares in float32, 4 bytes a weight
                    "factored": averages of the rows' and columns' mean squares, about nothing a weight, from which
                    v = row * column / mean(row) (Adafactor, arXiv 1804.04235, eq. 4). Measured: no loss.

State tensors live in the optimizer's `state[parameter]` under torch's names where torch has them. A gradient is seen
as a matrix [rows, columns] and read a few rows at a time, so that temporaries stay small and in cache.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

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


def update_factors(state: dict[str, Any], grad: Tensor, beta2: float) -> None:
    """First pass of a factored second moment: the averages of row and column mean squares."""
    squares = grad.float().square()
    state["exp_avg_sq_row"].lerp_(squares.mean(dim=1), 1 - beta2)
    state["exp_avg_sq_col"].lerp_(squares.mean(dim=0), 1 - beta2)


def second_moment_rows(state: dict[str, Any], grad: Tensor, rows: slice, beta2: float) -> Tensor:
    """Second moment of some rows, brought up to date with their `grad` [rows, columns] if it is a full one."""
    if "exp_avg_sq" in state:
        return state["exp_avg_sq"][rows].mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    row, column = state["exp_avg_sq_row"], state["exp_avg_sq_col"]
    mean = row.mean().clamp_min(torch.finfo(torch.float32).tiny)
    return (row[rows] / mean)[:, None] * column


def first_moment_rows(state: dict[str, Any], grad: Tensor, rows: slice, beta1: float) -> Tensor:
    """First moment of some rows, brought up to date with their `grad`; the gradient itself without one."""
    return state["exp_avg"][rows].lerp_(grad, 1 - beta1) if "exp_avg" in state else grad
