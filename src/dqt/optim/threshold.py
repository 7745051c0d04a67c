"""The threshold of `learned` rounding: one number a tensor, trained so that rounding is unbiased over it.

A displacement moves its weight one step further where its fraction reaches the threshold. After each step of
the optimizer the threshold goes up by a sixteenth if more steps were moved than all displacements together
asked for, and else down; it begins as rounding to nearest. Both sums are integers, so neither the number of
threads nor the order changes a bit. Unbiased is the sum over the tensor, not each weight: what is below the
threshold never moves, which is what `learned` is there to compare with stochastic rounding.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dqt.numerics.rounding import MAX_MOVE, threshold_rounding

_UNITS = 2.0**20
_RATE, _LOWEST = 15 / 16, 2.0**-24


class LearnedThreshold:
    """Rounds the displacements of one parameter at one step, and then trains its threshold.

    Args:
        state: The parameter's, which keeps "threshold".
    """

    def __init__(self, state: dict[str, Any]) -> None:
        self._state = state
        self._threshold = state.get("threshold", 0.5)
        self._surplus = 0

    def __call__(self, displacement: Tensor, random: Tensor | None = None) -> Tensor:
        """Whole steps, `int32`."""
        steps = threshold_rounding(displacement, self._threshold)
        wanted = (displacement.abs().clamp_(max=MAX_MOVE) * _UNITS).to(torch.int64)
        self._surplus += int(steps.abs().sum()) * int(_UNITS) - int(wanted.sum())
        return steps

    def finish(self) -> None:
        """Trains the threshold, after all of the parameter's displacements."""
        moved = self._threshold / _RATE if self._surplus > 0 else self._threshold * _RATE
        self._state["threshold"] = min(1.0, max(_LOWEST, moved))
