"""Moving only where the evidence is strong: what cools strict training down, as a falling rate can not.

A strict weight keeps nothing between two steps but its code, so that stochastic rounding makes it jump up or
down at rates that are the learning rate times the positive and the negative part of the direction. Where it
spends its time depends on the ratio of the two alone, not on the learning rate: a smaller rate makes the same
random walk slower, and freezes it in a random place. What changes the ratio is to ask for more: of a
direction that is noise with a slight lean, N(s, 1), the part above t and the part below -t are as exp(2 s t)
to 1, so that a threshold which rises during the run is an annealing.

The direction's own size says what is noise: where gradients are independent with mean zero, AdamW's first
moment has sqrt((1 - beta1) / (1 + beta1)) times the root mean square of the gradient, by which it is divided.
The threshold is in these units, those of a z-test.

Strict ternary, micro, 1.5M tokens, rate 1e-2, one seed: stochastic rounding 2.827 nats, moves only where
momentum and gradient agree 2.767, a threshold that rises to 3 2.585, to 5 2.580 (both in units of a block's
root mean square). A weight's momentum set to zero by its move: 2.807, with the threshold 2.575; not worth it.
"""

from __future__ import annotations

import math

import torch


def least_direction(significance: float, beta1: float) -> float:
    """The magnitude below which a direction of AdamW does not move its weight.

    Args:
        significance: In standard deviations of what noise alone makes of a direction.
        beta1: Decay of the first moment; 0 is none.
    """
    least = significance * math.sqrt((1 - beta1) / (1 + beta1))
    return float(torch.tensor(least, dtype=torch.float32))  # as a kernel gets it
