"""Rounding of displacements on an integer grid.

Only the displacement is rounded, never the float sum of a position and a displacement: at code 100 a float32
sum loses everything below 4e-6, and `floor(x + rand)` moves values that lie exactly on the grid (+3.9e-6 a
step, always upwards). With d in grid steps, f the fraction of |d| and r a uniform 32-bit number,

    move = sign(d) * (floor|d| + [r < floor(2**32 * P)])

Stochastic rounding has P = f: the bias is below 2**-32, a zero displacement never moves anything, and every
operation is exact in float32, because f has at most 24 significant bits and a power of two times it loses
none. The other rules are there to be compared with it:

    stochastic  P = f: unbiased
    low_discrepancy  P = f and unbiased, but a weight's random words of successive steps are no independent
                draws: r begins anywhere, goes on by the golden ratio each step, and counts from the other end
                for d > 0, so that the move is floor(d + r). See `golden_sequence`.
    nearest     P = [f >= 1/2]: small displacements are lost, whatever their sum
    noise       nearest after noise with a triangular density on +-1/2, which is P = 2 f**2 below 1/2 and
                1 - 2 (1 - f)**2 above: between nearest (no noise) and stochastic (uniform noise)
    biased      P = min(1, f + 1/128) unless d is a whole number: away from where the weight is, so that no
                direction is too weak to move it (the signed SR-eps of arXiv 2202.12276 for a descent step)
    learned     P = [f >= t]: deterministic, with a threshold for each tensor that is trained until the sum of
                moves equals the sum of displacements; see `dqt.optim.threshold`
    gated       stochastic, of the direction u |u| in place of u: moves concentrate where the momentum is
                large against the root of the squares, that is where gradients agree over time
    agreed      stochastic, where momentum and gradient point the same way; other weights keep still
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

MAX_MOVE = 2.0**24
"""Displacements are clamped to this many steps: larger than any grid, and floor and cast stay exact."""

WORD_BITS = 32

GOLDEN = 0x9E3779B9
"""2**32 times the golden ratio's fraction. Simulated, 0.41, 0.38, 0.24 and 0.15 of the range are as good."""

BIAS = 1 / 128
"""Of `biased`: enough that a weight moves once in 128 steps, however weak its gradient is."""

Steps = Callable[[Tensor, Tensor | None], Tensor]
"""(displacement in steps, random words or None) -> whole steps, `int32`."""

Gate = Callable[[Tensor, Tensor], Tensor]
"""(direction, gradient) -> direction."""


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
    whole, fraction = _split(displacement)
    threshold = (fraction * float(2**word_bits)).to(torch.int64)  # the cast truncates, so it is a floor
    return _signed(whole.to(torch.int32) + (random < threshold), displacement)


def golden_sequence(first: Tensor, step: int) -> Tensor:
    """Random words of a step, which follow from an element's first one by steps of the golden ratio.

    For each element alone they are uniform at any step, over the first word, and over any n successive steps
    they lie about evenly in their range: no n of them can all be small. So of a displacement d that changes
    little in 1 / d steps, what SR keeps or gives by chance is given back soon, without memory. Independent
    words let it add up: the variance that rounding adds to a weight in a well, against stochastic rounding
    (simulated, `benchmarks/rounding.py`), is 0.32 to 0.52 times as large with a first moment, and 0.66 times
    without one, where successive displacements are independent: there it must be that a move up is likelier
    taken back, as words near one end are followed by words that are not.

    Args:
        first: `int64` words in [0, 2**32).
        step: Number of the step.
    """
    mask = 2**WORD_BITS - 1
    return (first + (step * GOLDEN & mask)) & mask


def low_discrepancy_rounding(
    displacement: Tensor, random: Tensor | None, word_bits: int = WORD_BITS
) -> Tensor:
    """Stochastic rounding with the word counted from the other end for positive displacements.

    That is floor(d + r / 2**word_bits), up to the last bit.
    """
    assert random is not None, "low-discrepancy rounding needs the words of its sequence"
    return stochastic_rounding(
        displacement, torch.where(displacement > 0, 2**word_bits - 1 - random, random), word_bits
    )


def nearest_rounding(displacement: Tensor, random: Tensor | None = None) -> Tensor:
    """Rounds to the nearest whole step, halves away from zero; `random` is not used."""
    return threshold_rounding(displacement, 0.5)


def noise_rounding(displacement: Tensor, random: Tensor | None, word_bits: int = WORD_BITS) -> Tensor:
    """Nearest, halves up in magnitude, of |d| plus the mean of two uniform numbers in [-1/2, 1/2)."""
    assert random is not None, "noise needs random words"
    whole, fraction = _split(displacement)
    half = word_bits // 2
    # fraction + (a + b) / 2**(half + 1) - 1/2 >= 1/2 for the word's two halves a and b
    noise = (random >> half) + (random & (2**half - 1))
    up = noise >= ((1.0 - fraction) * float(2 ** (half + 1))).ceil().to(torch.int64)
    return _signed(whole.to(torch.int32) + up, displacement)


def biased_rounding(displacement: Tensor, random: Tensor | None, word_bits: int = WORD_BITS) -> Tensor:
    """Stochastic, with a probability that is `BIAS` too high wherever it is not zero."""
    assert random is not None, "biased rounding needs random words"
    whole, fraction = _split(displacement)
    threshold = (fraction * float(2**word_bits)).to(torch.int64) + int(BIAS * 2**word_bits)
    up = (random < threshold) & (fraction > 0)
    return _signed(whole.to(torch.int32) + up, displacement)


def threshold_rounding(displacement: Tensor, threshold: float) -> Tensor:
    """Away from zero where the fraction reaches a threshold in (0, 1]."""
    whole, fraction = _split(displacement)
    return _signed(whole.to(torch.int32) + (fraction >= threshold), displacement)


def _split(displacement: Tensor) -> tuple[Tensor, Tensor]:
    """Whole steps and fraction of the magnitude."""
    magnitude = displacement.abs().clamp_(max=MAX_MOVE)
    whole = magnitude.floor()
    return whole, magnitude - whole


def _signed(steps: Tensor, displacement: Tensor) -> Tensor:
    return torch.where(displacement < 0, -steps, steps)


def gate_by_size(direction: Tensor, gradient: Tensor) -> Tensor:
    """u |u|."""
    return direction * direction.abs()


def gate_by_agreement(direction: Tensor, gradient: Tensor) -> Tensor:
    """u where it has the gradient's sign, else 0."""
    return torch.where(direction * gradient > 0, direction, 0.0)


@dataclass(frozen=True)
class Rounding:
    """A rule of rounding.

    Attributes:
        steps: Rounds a displacement; `learned` begins so, before its threshold is trained.
        draws: Whether it takes random words.
        sequence: The words of a step from those of step 0; None draws new ones each step.
        gate: What becomes of the direction before; None leaves it.
    """

    steps: Steps
    draws: bool = True
    sequence: Callable[[Tensor, int], Tensor] | None = None
    gate: Gate | None = None


ROUNDINGS: dict[str, Rounding] = {
    "stochastic": Rounding(stochastic_rounding),
    "low_discrepancy": Rounding(low_discrepancy_rounding, sequence=golden_sequence),
    "nearest": Rounding(nearest_rounding, draws=False),
    "gated": Rounding(stochastic_rounding, gate=gate_by_size),
    "agreed": Rounding(stochastic_rounding, gate=gate_by_agreement),
    "noise": Rounding(noise_rounding),
    "biased": Rounding(biased_rounding),
    "learned": Rounding(nearest_rounding, draws=False),
}
