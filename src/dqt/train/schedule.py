"""Learning rate schedules as one pure function of the step, so that a resumed run has nothing to restore.

All begin with a linear warm-up. Then `cosine` and `linear` fall over the rest of the run; `wsd` (warm-up,
stable, decay) stays at the peak and falls linearly over the last `decay_fraction` of all steps. The first
update already has a rate above zero (1/warmup of the peak), and the last has the final one.
"""

from __future__ import annotations

import math

from dqt.errors import ConfigError, did_you_mean

SCHEDULES = ("cosine", "linear", "wsd")

DECAY_FRACTION = 0.4
"""Share of the run in which `wsd` decays.

Nats after 1.25M tokens, a fifth of it warm-up (micro with 4 layers, seed 1000, one run each). With 0.8 there
is no stay at the peak.
                                           cosine   0.2     0.4     0.8
  FP32, 2.5e-3                             2.318    2.261   2.258   2.282
  BitNet, 3e-3                             2.386    2.328   2.319
  4 bits + residual, 2.8e-3                         2.241   2.233
  ternary + residual, 2.8e-3                        2.355   2.326   2.353
  ternary + residual, 4e-3                 2.350    2.365   2.320   2.320
"""


def lr_factor(
    step: int,
    total: int,
    warmup: int = 0,
    kind: str = "wsd",
    final: float = 0.0,
    decay_fraction: float = DECAY_FRACTION,
) -> float:
    """The learning rate of a step as a fraction of the peak.

    Args:
        step: 1 for the first update, `total` for the last; beyond it the final rate holds.
        total: Updates in the run.
        warmup: Updates of linear warm-up; where it exceeds `total`, the peak is never reached.
        kind: "cosine", "linear" or "wsd".
        final: Fraction of the peak at the last update.
        decay_fraction: Share of `total` that decays, for "wsd".

    Returns:
        A number in [0, 1].

    Raises:
        ConfigError: If there is no such schedule.
    """
    if kind not in SCHEDULES:
        raise ConfigError(f"unknown schedule {kind!r}; {did_you_mean(kind, SCHEDULES)}")
    if step < warmup:
        return step / warmup
    start = max(warmup, 1)
    if kind == "wsd":
        start = max(start, total - math.ceil(total * decay_fraction))
    progress = min(1.0, max(0, step - start) / max(1, total - start))
    shape = 0.5 * (1.0 + math.cos(math.pi * progress)) if kind == "cosine" else 1.0 - progress
    return final + (1.0 - final) * shape


def root_of_squares(
    total: int,
    warmup: int = 0,
    kind: str = "wsd",
    final: float = 0.0,
    decay_fraction: float = DECAY_FRACTION,
) -> float:
    """Root of the sum over all steps of `lr_factor` squared, from a thousand of them if there are more.

    Times the peak it is how far a weight gets that moves by the learning rate at a time, in directions of
    its own: 0.61 sqrt(total) for `cosine`, 0.82 for `wsd`, with a tenth of warm-up.
    """
    count = min(total, 1000)
    steps = (1 + round(i * (total - 1) / max(1, count - 1)) for i in range(count))
    squares = (lr_factor(step, total, warmup, kind, final, decay_fraction) ** 2 for step in steps)
    return math.sqrt(total * math.fsum(squares) / max(1, count))
