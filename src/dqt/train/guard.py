"""What counts as a loss that has gone wrong, and what a run may do about it.

A spike is a loss above the median of the last 64 by more than `threshold` deviations: 1.48 times the median
absolute deviation, which is the standard deviation of a Gaussian and which single outliers do not move, but
at least 1 % of the median. The losses are saved with a checkpoint, so that a resumed run judges as one that
never stopped. The price is that the first 32 steps are not judged, and that a slow drift is no spike.

    stop      the run ends with an error before anything changed; the last checkpoint stays
    skip      the step changes nothing, and the run goes on with the next batch
    rollback  the run goes back to the last good checkpoint and on with the batches after the bad one, which
              the same weights would only run into again
    ignore    a spike is noted; no checkpoint counts as good until it is over
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Iterable

STOP, SKIP, ROLLBACK, IGNORE = "stop", "skip", "rollback", "ignore"
ON_NONFINITE = (STOP, SKIP, ROLLBACK)
ON_SPIKE = (IGNORE, STOP, SKIP, ROLLBACK)
MOST_IN_A_ROW = 10
"""Steps that may go wrong one after the other, at the same place, before a run ends in any case."""

WINDOW, _FIRST = 64, 32


class LossWatch:
    """The recent losses of a run.

    Args:
        threshold: Deviations above the median from which a loss is a spike.
        losses: Of a run that goes on.
    """

    def __init__(self, threshold: float, losses: Iterable[float] = ()) -> None:
        self.threshold = threshold
        self._losses = deque(losses, maxlen=WINDOW)
        self.good = True

    @property
    def losses(self) -> list[float]:
        """The losses that the next one is compared with, oldest first."""
        return list(self._losses)

    def limit(self) -> float:
        """The highest loss that is no spike."""
        if len(self._losses) < _FIRST:
            return math.inf
        median = statistics.median(self._losses)
        deviation = 1.4826 * statistics.median(abs(loss - median) for loss in self._losses)
        return median + self.threshold * max(deviation, 0.01 * abs(median))

    def add(self, loss: float) -> None:
        """Takes in the loss of a step that was done."""
        self.good = loss <= self.limit()
        self._losses.append(loss)
