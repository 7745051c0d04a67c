"""Moving only where the evidence is strong: what cools strict training down, as a falling rate can not.

A strict weight keeps nothing between two steps but its code, so that stochastic rounding makes it jump up or
down at rates that are the learning rate times the positive and the negative part of the direction. Where it
spends its time depends on the ratio of the two alone, not on the learning rate: a smaller rate makes the same
random walk slower, and freezes it in a random place. What changes the ratio is to ask for more: of a
direction that is noise with a slight lean, N(s, 1), the part above t and the part below -t are as exp(2 s t)
to 1, so that a threshold which rises during the run is an annealing.

The direction's own size says what is noise: where gradients are independent with mean zero, AdamW's first
moment after t steps, over 1 - beta1^t, has the standard deviation

    sqrt((1 - beta1) / (1 + beta1) * (1 + beta1^t) / (1 - beta1^t))

times the root mean square of the gradient, by which it is divided. The threshold is in these units, those of
a z-test.

A move uses its evidence up: the first moment of a weight whose code has moved begins again at zero. It lets
an average be long, as it else goes on pushing what has already moved. Strict ternary, micro with 4 layers,
1.25M tokens, rate 1e-2, seed 1000, by beta1 and the threshold at the end, with and without it: 0.95 and 4
2.450, 2.445; 0.95 and 3 2.412, 2.414; 0.98 and 3 2.418, 2.451; 0.98 and 2 2.408 with it; 0.99 and 2 2.427
with it, 0.98 and 4 2.539, 0.98 and 1 2.499. After 2.5M tokens, seed 0: 0.98 and 2 2.145 with it; without it
0.95 and 3 2.172, 0.95 and 4 2.235; BitNet 2.115.

Of no use: a threshold that begins at 0.4 of its end (2.565 for 2.445), a beta1 that rises from 0.9 to 0.98
(2.457) or 0.99 (2.467 with moves forgotten), three times the rate for low-bit weights alone (2.681).
"""

from __future__ import annotations

import math

import torch


def least_direction(significance: float, beta1: float, step: int, clip: float = 1.0) -> float:
    """The magnitude below which a direction of AdamW does not move its weight.

    Args:
        significance: In standard deviations of what noise alone makes of a direction.
        beta1: Decay of the first moment; 0 is none.
        step: Of the optimizer, from 1: an average of few gradients is noisier.
        clip: What the direction was divided by, see `AdamW`'s `clip_update`.
    """
    young = beta1**step
    variance = (1 - beta1) / (1 + beta1) * (1 + young) / (1 - young)
    least = significance * math.sqrt(variance) / clip
    return float(torch.tensor(least, dtype=torch.float32))  # as a kernel gets it
