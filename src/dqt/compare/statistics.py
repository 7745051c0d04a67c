"""Means over seeds with their 95 % intervals, and differences of arms that share their seeds.

Two arms of one seed start from the same random words and read the same text in the same order, so most of
what differs between seeds cancels in their difference: gaps are means of the differences seed by seed, never
differences of means. The interval is Student's t, which is honest for three or five seeds and takes the
losses for normally distributed; it says nothing about other models, other text or other lengths of run.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean and how far to trust it.

    Attributes:
        values: What it is the mean of, in order of seed.
        mean: Their mean; NaN of none.
        half: Half the width of the 95 % interval; NaN of fewer than two.
    """

    values: tuple[float, ...]
    mean: float
    half: float

    @property
    def upper(self) -> float:
        """Upper end of the interval; NaN of fewer than two values."""
        return self.mean + self.half


def estimate(values: Iterable[float]) -> Estimate:
    """Mean of some values and its 95 % interval."""
    found = tuple(values)
    n = len(found)
    mean = statistics.fmean(found) if n else math.nan
    half = t_quantile(n - 1) * statistics.stdev(found) / math.sqrt(n) if n > 1 else math.nan
    return Estimate(found, mean, half)


def paired_difference(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Estimate:
    """How much more `ours` is than `theirs`, over the seeds that both have."""
    return estimate(ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys()))


def t_quantile(freedom: int, confidence: float = CONFIDENCE) -> float:
    """The t that |T| stays below with the given probability, by bisection.

    Args:
        freedom: Degrees of freedom, 1 or more.
        confidence: In (0, 1).
    """
    low, high = 0.0, 1.0
    while t_within(high, freedom) < confidence:
        high *= 2
    while high - low > 1e-12 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if t_within(middle, freedom) < confidence else (low, middle)
    return high


def t_within(t: float, freedom: int) -> float:
    """P(|T| < t) of Student's t, by its finite series for whole degrees of freedom.

    (Abramowitz and Stegun, 26.7.3 and 26.7.4.)
    """
    angle = math.atan(t / math.sqrt(freedom))
    cosine_squared = math.cos(angle) ** 2
    odd = freedom % 2
    term = math.cos(angle) if odd else 1.0
    total = 0.0
    for index in range(freedom // 2):
        total += term
        term *= cosine_squared * (2 * index + 1 + odd) / (2 * index + 2 + odd)
    total *= math.sin(angle)
    return 2 / math.pi * (angle + total) if odd else total
