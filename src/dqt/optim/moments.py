"""First and second moments of gradients, in the forms that an optimizer can keep them.

First moment m, an exponential average of gradients (none if beta1 is 0):

    "fp32"      4 bytes a weight
    "bf16"      2: the upper half of a float32, rounded stochastically
    "int8"      1: m = code * scale, code in [-127, 127], a scale for each 128 columns of a row

Second moment v, an exponential average of squares:

    "full"      4 bytes a weight, float32
    "int8"      1: sqrt(v) = code * scale, code in [0, 255], a scale for each 128 columns of a row
    "factored"  averages of the rows' and columns' mean squares, about nothing a weight, from which
                sqrt(v) = sqrt(row / mean(row)) * sqrt(column) (Adafactor, arXiv 1804.04235, eq. 4)

Choices. The root of v is stored, not v: eight bits of v would span gradients of 1 to 16 in a block, eight
bits of the root span 1 to 255. What is not zero is stored as 1 at least, because a root that is lost to
rounding would be divided by; such weights move less than they should, never more. Blocks of 128 cost 0.03
bytes a weight, and run along a row so that a row can be updated by itself. Rounding is stochastic, because an
average that changes by less than half a code a step would otherwise stand still; it takes 16 bits, the lower
half of a random word for m and the upper half for v. The new moments enter the direction before they are
rounded. Vectors keep float32, which costs nothing.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dqt import ops
from dqt.ops.reference import SMALLEST_ABSMAX, exact_sqrt

FIRST_MOMENTS = ("fp32", "bf16", "int8")
SECOND_MOMENTS = ("full", "int8", "factored")
BLOCK = 128
"""Columns that share a scale of an int8 moment."""

_FIRST_TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8}


class Moments:
    """The moments of one parameter, seen as a matrix [rows, columns] and read a few rows at a time.

    They live in the optimizer's `state[parameter]`, under torch's names where torch has them: "exp_avg",
    "exp_avg_sq", "exp_avg_sq_row", "exp_avg_sq_col", and "exp_avg_scale", "exp_avg_sq_scale" for int8.

    Attributes:
        first: One of `FIRST_MOMENTS`, or None.
        second: One of `SECOND_MOMENTS`, or None.
        inverses: Reciprocal of the denominator in a row and a column factor, from `update_factors`.
    """

    def __init__(self, state: dict[str, Any], first: str | None, second: str | None) -> None:
        self.state, self.first, self.second = state, first, second
        self.inverses: tuple[Tensor, Tensor] | None = None

    @property
    def rounded(self) -> bool:
        """Whether the moments are rounded, so that they need random words."""
        return self.first in ("bf16", "int8") or self.second == "int8"

    def create(self, grad: Tensor) -> None:
        """Adds zero moments for a gradient matrix to the state."""
        rows, columns = grad.shape
        scales = (rows, -(-columns // BLOCK))

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float32, device=grad.device)

        if self.first is not None:
            self.state["exp_avg"] = torch.zeros_like(grad, dtype=_FIRST_TYPES[self.first])
        if self.first == "int8":
            self.state["exp_avg_scale"] = zeros(*scales)
        if self.second == "factored":
            self.state["exp_avg_sq_row"] = zeros(rows)
            self.state["exp_avg_sq_col"] = zeros(columns)
        elif self.second is not None:
            dtype = torch.uint8 if self.second == "int8" else torch.float32
            self.state["exp_avg_sq"] = torch.zeros_like(grad, dtype=dtype)
        if self.second == "int8":
            self.state["exp_avg_sq_scale"] = zeros(*scales)

    def update_factors(
        self,
        squares: tuple[Tensor, Tensor],
        beta2: float,
        root_factor: float = 1.0,
        eps: float = 0.0,
        floor: float = 0.0,
    ) -> None:
        """First pass of a factored second moment: its averages, and the reciprocal of the denominator

            sqrt(row / mean(row)) * (sqrt(column) * root_factor + eps)

        in two factors, so that no weight needs a root or a division (a third of a step's time). So eps is
        relative to the row's size; a row without any gradient counts as 1e-15 of the mean.

        Args:
            squares: Mean squares of the gradient's rows and columns.
            beta2: Decay.
            root_factor: See `Rule`.
            eps: See `Rule`.
            floor: Added to the mean squares.
        """
        row, column = self.state["exp_avg_sq_row"], self.state["exp_avg_sq_col"]
        for average, mean in zip((row, column), squares, strict=True):
            average.mul_(beta2).add_((mean + floor) * (1 - beta2))
        mean = ordered_mean(row).clamp_min(torch.finfo(torch.float32).tiny)
        row_root = exact_sqrt(row / mean).clamp_min_(1e-15)
        self.inverses = 1 / row_root, 1 / (exact_sqrt(column) * root_factor + eps)

    def update_root(
        self, grad: Tensor, rows: slice, beta2: float, weight2: float, random: Tensor | None
    ) -> Tensor | None:
        """Brings v of some rows up to date; its root [rows, columns], or None if it is none or factored."""
        if self.second is None or self.inverses is not None:
            return None
        stored = self.state["exp_avg_sq"][rows]
        entering = (grad * grad).mul_(weight2)
        if self.second == "full":
            return exact_sqrt(stored.mul_(beta2).add_(entering))
        scale = self.state["exp_avg_sq_scale"]
        old = stored.float().mul_(_by_block(scale[rows], grad.shape[1]))
        root = exact_sqrt(old.square_().mul_(beta2).add_(entering))
        assert random is not None
        scale[rows], value = _scaled(root, 255.0)
        code = _round(value, random >> 16).clamp_max_(255)
        stored.copy_(torch.where(value > 0, code.clamp_min(1), code))
        return root

    def update_first(
        self, x: Tensor, rows: slice, beta1: float, weight1: float, random: Tensor | None
    ) -> Tensor:
        """Lets x enter m of some rows; m [rows, columns], or x itself without a first moment."""
        if self.first is None:
            return x
        stored = self.state["exp_avg"][rows]
        if self.first == "fp32":
            return stored.mul_(beta1).add_(x * weight1)
        assert random is not None
        if self.first == "bf16":
            m = stored.float().mul_(beta1).add_(x * weight1)
            bits = m.view(torch.int32) + (random & 0xFFFF).to(torch.int32)
            stored.copy_((bits & -0x10000).view(torch.float32))
            return m
        scale = self.state["exp_avg_scale"]
        m = stored.float().mul_(_by_block(scale[rows], x.shape[1])).mul_(beta1).add_(x * weight1)
        scale[rows], value = _scaled(m, 127.0)
        code = _round(value.abs(), random & 0xFFFF).clamp_max_(127)
        stored.copy_(torch.where(m < 0, -code, code))
        return m


def _by_block(scale: Tensor, columns: int) -> Tensor:
    return scale.repeat_interleave(BLOCK, dim=1)[:, :columns]


def _scaled(values: Tensor, top: float) -> tuple[Tensor, Tensor]:
    """Scale of each block, and the values in units of it: top * value / largest."""
    columns = values.shape[1]
    blocks = F.pad(values, (0, -columns % BLOCK)).unflatten(1, (-1, BLOCK))
    largest = blocks.abs().amax(dim=2)
    # A tensor divided by a tensor: `top / largest` would be torch's reciprocal times top, rounded twice.
    inverse = torch.where(largest > SMALLEST_ABSMAX, torch.full_like(largest, top) / largest, 0.0)
    return largest / top, values * _by_block(inverse, columns)


def _round(value: Tensor, random16: Tensor) -> Tensor:
    """Stochastic rounding of numbers in [0, 255] by 16 random bits, `int32`."""
    whole = value.floor()
    threshold = ((value - whole) * 65536.0).to(torch.int32)
    return whole.to(torch.int32) + (random16 < threshold)


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


def mean_squares(grad: Tensor) -> tuple[Tensor, Tensor]:
    """Mean squares of the rows and columns of a gradient matrix."""
    return ops.mean_squares(grad.float().contiguous())
