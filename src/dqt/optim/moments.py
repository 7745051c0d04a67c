"""First and second moments of gradients, in the forms that an optimizer can keep them.

First moment m, an exponential average of gradients ("none", or a beta1 of 0, keeps none):

    "fp32"      4 bytes a weight
    "bf16"      2: the upper half of a float32
    "int8"      1: m = code * scale, code in [-127, 127]
    "fp8"       1: m = code * scale, code an e4m3 number

Second moment v, an exponential average of squares; all but the first keep its root:

    "full"      4 bytes a weight, float32, v itself
    "bf16"      2: the upper half of a float32
    "int8"      1: sqrt(v) = code * scale, code in [0, 255]
    "fp8"       1: sqrt(v) = code * scale, code an e4m3 number
    "factored"  averages of the rows' and columns' mean squares, about nothing a weight, from which
                sqrt(v) = sqrt(row / mean(row)) * sqrt(column) (Adafactor, arXiv 1804.04235, eq. 4)

Codes have a scale for each 128 columns of a row. All but float32 is rounded stochastically. "fp8", and "bf16"
of a second moment, are there for the paper's environments and have no kernel: they run on the reference.

Choices. The root of v is stored, not v: eight bits of v would span gradients of 1 to 16 in a block, eight
bits of the root span 1 to 255, e4m3 spans 1 to 229,376 with 3 to 6 % between neighbours. What is not zero is
stored as the smallest code at least, because a root that is lost to rounding would be divided by; such
weights move less than they should, never more. Blocks of 128 cost 0.03 bytes a weight, and run along a row so
that a row can be updated by itself. Rounding is stochastic, because an average that changes by less than half
a code a step would otherwise stand still; it takes 16 bits, the lower half of a random word for m and the
upper half for v. The new moments enter the direction before they are rounded. Vectors keep float32, which
costs nothing.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dqt import ops
from dqt.numerics.float8 import E4M3, LARGEST, SMALLEST_E4M3, stochastic_e4m3
from dqt.ops.reference import SMALLEST_ABSMAX, exact_sqrt
from dqt.sizes import SCALE_BLOCK

Form = tuple[torch.dtype, tuple[int, ...]]
"""Type and shape of a tensor."""

_FIRST_TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8, "fp8": E4M3}
_SECOND_TYPES = {"full": torch.float32, "bf16": torch.bfloat16, "int8": torch.uint8, "fp8": E4M3}
_TOP = {torch.int8: 127.0, torch.uint8: 255.0, E4M3: LARGEST[E4M3]}
_SMALLEST = {torch.uint8: 1.0, E4M3: SMALLEST_E4M3}


class Moments:
    """The moments of one parameter, seen as a matrix [rows, columns] and read a few rows at a time.

    They live in the optimizer's `state[parameter]`, under torch's names where torch has them: "exp_avg",
    "exp_avg_sq", "exp_avg_sq_row", "exp_avg_sq_col", and "exp_avg_scale", "exp_avg_sq_scale" for codes.

    Attributes:
        first: One of `FIRST_MOMENTS`.
        second: One of `SECOND_MOMENTS`.
        inverses: Reciprocal of the denominator in a row and a column factor, from `update_factors`.
    """

    def __init__(self, state: dict[str, Any], first: str, second: str) -> None:
        self.state, self.first, self.second = state, first, second
        self.inverses: tuple[Tensor, Tensor] | None = None

    @property
    def rounded(self) -> bool:
        """Whether the moments are rounded, so that they need random words."""
        return self.first not in ("none", "fp32") or self.second not in ("none", "full", "factored")

    def forms(self, rows: int, columns: int) -> dict[str, Form]:
        """The tensors that the moments of a matrix are, all zero at first."""
        forms: dict[str, Form] = {}
        types = {"exp_avg": _FIRST_TYPES.get(self.first), "exp_avg_sq": _SECOND_TYPES.get(self.second)}
        for key, dtype in types.items():
            if dtype is not None:
                forms[key] = dtype, (rows, columns)
            if dtype in _TOP:
                forms[f"{key}_scale"] = torch.float32, (rows, -(-columns // SCALE_BLOCK))
        if self.second == "factored":
            forms["exp_avg_sq_row"] = torch.float32, (rows,)
            forms["exp_avg_sq_col"] = torch.float32, (columns,)
        return forms

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
        if self.second == "none" or self.inverses is not None:
            return None
        entering = (grad * grad).mul_(weight2)
        if self.second == "full":
            v: Tensor = self.state["exp_avg_sq"][rows]
            return exact_sqrt(v.mul_(beta2).add_(entering))
        old = self._read("exp_avg_sq", rows)
        root = exact_sqrt(old.square_().mul_(beta2).add_(entering))
        assert random is not None
        self._write("exp_avg_sq", rows, root, random >> 16)
        return root

    def update_first(
        self, x: Tensor, rows: slice, beta1: float, weight1: float, random: Tensor | None
    ) -> Tensor:
        """Lets x enter m of some rows; m [rows, columns], or x itself without a first moment."""
        if self.first == "none":
            return x
        if self.first == "fp32":
            stored: Tensor = self.state["exp_avg"][rows]
            return stored.mul_(beta1).add_(x * weight1)
        m = self._read("exp_avg", rows).mul_(beta1).add_(x * weight1)
        assert random is not None
        self._write("exp_avg", rows, m, random & 0xFFFF)
        return m

    def forget_first(self, rows: slice, which: Tensor) -> None:
        """Sets m to zero where `which` [rows, columns] says so."""
        if self.first != "none":
            stored: Tensor = self.state["exp_avg"][rows]
            stored.copy_(torch.where(which, 0.0, stored.float()))

    def _read(self, key: str, rows: slice) -> Tensor:
        """A stored moment as new floats."""
        stored: Tensor = self.state[key][rows]
        if stored.dtype not in _TOP:
            return stored.float()
        return stored.float().mul_(_by_block(self.state[f"{key}_scale"][rows], stored.shape[1]))

    def _write(self, key: str, rows: slice, values: Tensor, random16: Tensor) -> None:
        """Rounds values into a stored moment."""
        stored: Tensor = self.state[key][rows]
        if stored.dtype not in _TOP:
            bits = values.view(torch.int32) + random16.to(torch.int32)
            stored.copy_((bits & -0x10000).view(torch.float32))
            return
        top = _TOP[stored.dtype]
        self.state[f"{key}_scale"][rows], scaled = _scaled(values, top)
        if stored.dtype == E4M3:
            code = stochastic_e4m3(scaled.clamp_(-top, top), random16)
        else:
            code = _round(scaled.abs(), random16).clamp_max_(int(top)).copysign(scaled)
        if key == "exp_avg_sq":
            code = torch.where(scaled > 0, code.clamp_min(_SMALLEST[stored.dtype]), code)
        stored.copy_(code)


def _by_block(scale: Tensor, columns: int) -> Tensor:
    return scale.repeat_interleave(SCALE_BLOCK, dim=1)[:, :columns]


def _scaled(values: Tensor, top: float) -> tuple[Tensor, Tensor]:
    """Scale of each block, and the values in units of it: top * value / largest."""
    columns = values.shape[1]
    blocks = F.pad(values, (0, -columns % SCALE_BLOCK)).unflatten(1, (-1, SCALE_BLOCK))
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
