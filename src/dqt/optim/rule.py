"""An update rule as numbers: what distinguishes one optimizer's step from another's.

    x  = g / denominator            if the gradient is normalized first (Adafactor), else g
    m  = beta1 m + weight1 x        if there is a first moment, else x
    direction = m / denominator     if it is not yet normalized (AdamW), else m
    denominator = sqrt(v) * root_factor + eps,     v = beta2 v + weight2 g²

(For a factored v see `Moments.update_factors`.) Without a second moment (SGD) nothing is divided. The weight
then moves by -lr * direction - decay * weight.
One form for all optimizers, so that there is one reference and one kernel; the price is that bias corrections
are folded into `root_factor` and `eps`, which moves a result by a rounding against the textbook's order, and
saves a division a weight.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from dqt.ops.reference import exact_sqrt
from dqt.optim.moments import Moments


@dataclass(frozen=True)
class Rule:
    """One parameter's update at one step; see the module for the equations.

    Attributes:
        lr: Multiplies the direction.
        decay: Share of the weight that is taken away: learning rate times weight decay.
        beta1: Decay of the first moment.
        weight1: Weight of what enters it.
        beta2: Decay of the second moment.
        root_factor: Multiplies its root.
        eps: Is added to that.
        normalize_first: Divide before the first moment, not after.
    """

    lr: float
    decay: float
    beta1: float = 0.0
    weight1: float = 1.0
    beta2: float = 0.0
    root_factor: float = 1.0
    eps: float = 0.0
    normalize_first: bool = False

    @property
    def weight2(self) -> float:
        """Weight of the squares that enter the second moment."""
        return 1 - self.beta2

    def direction(self, grad: Tensor, moments: Moments, rows: slice, random: Tensor | None) -> Tensor:
        """Direction of some rows, whose moments are brought up to date.

        Args:
            grad: `float32` [rows, columns].
            moments: The parameter's moments.
            rows: Which rows of the parameter.
            random: Words [rows, columns] for rounded moments; None if there are none.

        Returns:
            `float32` [rows, columns]; may be `grad` itself.
        """
        root = moments.update_root(grad, rows, self.beta2, self.weight2, random)

        def normalized(x: Tensor) -> Tensor:
            if moments.inverses is not None:
                return x * (moments.inverses[0][rows, None] * moments.inverses[1])
            return x if root is None else x / (root * self.root_factor).add_(self.eps)

        # Products and sums are separate operations on purpose: torch's fused ones (lerp_, addcmul_, alpha=)
        # round once on some CPUs and twice on others, and the kernels must give the same bits everywhere.
        x = normalized(grad) if self.normalize_first else grad
        m = moments.update_first(x, rows, self.beta1, self.weight1, random)
        return m if self.normalize_first else normalized(m)

    def denominator(self, moments: Moments, rows: slice) -> Tensor | float:
        """What the first moment of some rows was divided by, for a second moment that is not rounded."""
        if moments.inverses is not None:
            return 1 / (moments.inverses[0][rows, None] * moments.inverses[1])
        if moments.second == "none":
            return 1.0
        return exact_sqrt(moments.state["exp_avg_sq"][rows]) * self.root_factor + self.eps
