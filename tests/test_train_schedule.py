"""The learning rate schedules, at their corners and as a whole."""

from __future__ import annotations

import pytest

from dqt.errors import ConfigError
from dqt.train.schedule import SCHEDULES, lr_factor, root_of_squares

CORNERS = [  # kind, step, total, warmup, final, factor
    ("cosine", 1, 100, 10, 0.0, 0.1),
    ("cosine", 10, 100, 10, 0.0, 1.0),
    ("cosine", 55, 100, 10, 0.0, 0.5),
    ("cosine", 100, 100, 10, 0.0, 0.0),
    ("cosine", 100, 100, 10, 0.1, 0.1),
    ("cosine", 1, 100, 0, 0.0, 1.0),
    ("cosine", 500, 100, 10, 0.1, 0.1),
    ("linear", 55, 100, 10, 0.0, 0.5),
    ("linear", 100, 100, 10, 0.2, 0.2),
    ("wsd", 10, 100, 10, 0.0, 1.0),
    ("wsd", 60, 100, 10, 0.0, 1.0),
    ("wsd", 80, 100, 10, 0.0, 0.5),
    ("wsd", 100, 100, 10, 0.0, 0.0),
    ("cosine", 50, 100, 2000, 0.0, 0.025),
    ("linear", 1, 1, 0, 0.0, 1.0),
]


@pytest.mark.parametrize(("kind", "step", "total", "warmup", "final", "factor"), CORNERS)
def test_corners(kind: str, step: int, total: int, warmup: int, final: float, factor: float) -> None:
    assert lr_factor(step, total, warmup, kind, final) == pytest.approx(factor, abs=1e-12)


@pytest.mark.parametrize("kind", SCHEDULES)
def test_rises_then_never_rises_again(kind: str) -> None:
    factors = [lr_factor(step, 200, 20, kind, 0.1) for step in range(1, 201)]
    assert factors[:20] == sorted(factors[:20])
    assert factors[19:] == sorted(factors[19:], reverse=True)
    assert all(0 < factor <= 1 for factor in factors)


def test_unknown_schedule_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'cosine'"):
        lr_factor(1, 10, kind="cosin")


@pytest.mark.parametrize("kind", SCHEDULES)
@pytest.mark.parametrize("total", [1, 7, 1000, 4321])
def test_the_root_of_squares_is_that_of_all_steps(kind: str, total: int) -> None:
    shape = total // 10, kind, 0.1, 0.3
    squares = [lr_factor(step, total, *shape) ** 2 for step in range(1, total + 1)]
    assert root_of_squares(total, *shape) == pytest.approx(sum(squares) ** 0.5, rel=2e-3)
