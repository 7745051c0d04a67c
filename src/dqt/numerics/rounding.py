"""Rounding of displacements on an integer grid.

Only the displacement is rounded, never the float sum of a position and a displacement: at code 100 a float32
sum loses everything below 4e-6, and `floor(x + rand)` moves values that lie exactly on the grid (+3.9e-6 a
step, always upwards). With d in grid steps and r a uniform 32-bit number,

    move = sign(d) * (floor|d| + [r < floor(2**32 * frac|d|)])

so the bias is below 2**-32, a zero displacement never moves anything, and every operation is exact in
float32: frac has at most 24 significant bits, and a power of two times it loses none.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

MAX_MOVE = 2.0**24
"""Displacements are clamped to this many steps: larger than any grid, and floor and cast stay exact."""

WORD_BITS = 32

Rounding = Callable[[Tensor, Tensor | None], Tensor]
"""A rounding rule: (displacement in steps, random words or None) -> whole steps, `int32`."""


def stochastic_rounding(displacement: Tensor, random: Tensor | None, word_bits: int = WORD_BITS) -> Tensor:
    """Unbiased rounding: away from zero with the probability of the fraction.

    Args:
        displacement: Finite `float32` tensor, in grid steps.
        random: `int64` tensor of the same shape, uniform in [0, 2**word_bits).
        word_bits: Bits of a random word; below 32 only for exhaustive tests.

    Returns:
        `int32` tensor of whole steps.
    """
    assert random is not None, "stochastic rounding needs random words"
    magnitude = displacement.abs().clamp_(max=MAX_MOVE)
    whole = magnitude.floor()
    # The cast truncates, so it is a floor.
    threshold = ((magnitude - whole) * float(2**word_bits)).to(torch.int64)
    steps = whole.to(torch.int32) + (random < threshold)
    return torch.where(displacement < 0, -steps, steps)


def nearest_rounding(displacement: Tensor, random: Tensor | None = None) -> Tensor:
    """Rounds to the nearest whole step, halves away from zero; `random` is not used."""
    magnitude = displacement.abs().clamp_(max=MAX_MOVE)
    whole = magnitude.floor()
    steps = (whole + (magnitude - whole >= 0.5)).to(torch.int32)
    return torch.where(displacement < 0, -steps, steps)


ROUNDINGS: dict[str, Rounding] = {"stochastic": stochastic_rounding, "nearest": nearest_rounding}
