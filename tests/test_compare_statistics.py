"""Intervals against published quantiles and worked examples, and which learning rates are tried."""

from __future__ import annotations

import math
import random

import pytest

from dqt.compare.statistics import estimate, paired_difference, t_quantile, t_within
from dqt.compare.tuning import MOST_RATES, best_rate, next_rates

# degrees of freedom, confidence, quantile as printed in tables
QUANTILES = [
    (1, 0.95, 12.706),
    (2, 0.95, 4.303),
    (3, 0.95, 3.182),
    (4, 0.95, 2.776),
    (5, 0.95, 2.571),
    (9, 0.95, 2.262),
    (30, 0.95, 2.042),
    (120, 0.95, 1.980),
    (4, 0.99, 4.604),
    (7, 0.90, 1.895),
]


@pytest.mark.parametrize(("freedom", "confidence", "quantile"), QUANTILES)
def test_quantiles_are_those_of_the_tables(freedom: int, confidence: float, quantile: float) -> None:
    assert t_quantile(freedom, confidence) == pytest.approx(quantile, abs=5e-4)
    assert t_within(t_quantile(freedom, confidence), freedom) == pytest.approx(confidence)


def test_a_worked_example() -> None:
    found = estimate([2.0, 4.0, 4.0, 6.0])  # standard deviation √(8/3)
    assert found.mean == 4.0
    assert found.half == pytest.approx(3.1824 * math.sqrt(8 / 3) / 2, rel=1e-4)
    assert found.upper == found.mean + found.half


@pytest.mark.parametrize("values", [[], [1.5]])
def test_one_value_has_no_interval(values: list[float]) -> None:
    found = estimate(values)
    assert math.isnan(found.half)
    assert found.mean == 1.5 if values else math.isnan(found.mean)


def test_pairs_cancel_what_seeds_share() -> None:
    ours, theirs = {0: 2.10, 1: 2.50, 2: 1.90, 3: 9.0}, {0: 2.00, 1: 2.39, 2: 1.81, 7: 0.0}
    found = paired_difference(ours, theirs)
    assert found.values == pytest.approx((0.10, 0.11, 0.09))
    assert found.mean == pytest.approx(0.10)
    assert found.half == pytest.approx(4.3027 * 0.01 / math.sqrt(3), rel=1e-4)
    assert found.half < estimate(ours.values()).half / 10


def test_intervals_cover_the_truth_as_often_as_they_say() -> None:
    draw = random.Random(0)
    samples = [estimate(draw.gauss(3.0, 0.5) for _ in range(5)) for _ in range(4000)]
    covered = sum(abs(found.mean - 3.0) <= found.half for found in samples) / len(samples)
    assert covered == pytest.approx(0.95, abs=3 * math.sqrt(0.95 * 0.05 / len(samples)))


INF = math.inf
# losses by rate, around 4 -> what is tried next
NEXT: list[tuple[dict[float, float], list[float]]] = [
    ({}, [2, 4, 8]),
    ({2: 1.1, 4: 1.0, 8: 1.2}, []),
    ({2: 1.0, 4: 1.1, 8: 1.2}, [1]),
    ({2: 1.2, 4: 1.1, 8: 1.0}, [16]),
    ({2: 1.2, 4: 1.1, 8: INF}, []),
    ({2: 1.0, 4: INF, 8: INF}, [1]),
    ({2: INF, 4: INF, 8: INF}, [1]),
    ({1: 1.1, 2: 1.0, 4: 1.1, 8: 1.2}, []),
]


@pytest.mark.parametrize(("losses", "expected"), NEXT)
def test_the_grid_is_extended_where_the_best_is_at_an_end(
    losses: dict[float, float], expected: list[float]
) -> None:
    assert next_rates(4.0, losses) == expected


@pytest.mark.parametrize("sign", [1, -1])
def test_the_grid_ends(sign: int) -> None:
    losses: dict[float, float] = {}
    while rates := next_rates(0.0123456, losses):
        losses |= {rate: sign * rate for rate in rates}
    assert len(losses) == MOST_RATES
    assert best_rate(losses) == (min(losses) if sign > 0 else max(losses))
    assert 0.0123 in losses


def test_the_best_rate_is_one_that_has_a_loss() -> None:
    assert best_rate({1.0: INF, 2.0: 3.0, 4.0: 3.1}) == 2.0
    assert best_rate({1.0: INF}) is None
    assert best_rate({}) is None
