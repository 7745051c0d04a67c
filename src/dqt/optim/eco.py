"""Error feedback into the momentum, as published: ECO (arXiv 2601.22101, algorithm 3), for comparison.

After a weight was rounded, what the rounding kept back enters the first moment, so that the next step tries
again. With e = (weight before rounding) - (weight after), both in float,

    m = m + (1 - 1 / beta1) * denominator * e / lr        denominator = (1 - beta1^t) (sqrt(v_hat) + eps)

by which the next step moves by (1 - beta1) e more, the one after by beta1 times that, and so on: e in all. It
needs no memory of its own, and a float32 first moment. What rounding takes from a moment in fewer bits would
be more than what is fed back. Reference only: there is no kernel.
"""

from __future__ import annotations

from torch import Tensor

from dqt.optim.step import Step


def feed_back(step: Step, rows: slice, lost: Tensor) -> None:
    """Adds what rounding kept back of some rows, in units of the weight, to their first moment."""
    rule = step.rule
    if rule.lr:
        factor = (1 - 1 / rule.beta1) / rule.lr
        step.moments.state["exp_avg"][rows] += lost * rule.denominator(step.moments, rows) * factor
