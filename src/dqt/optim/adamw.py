"""AdamW on low-bit weights: the direction of Adam, the integers of the shared write-back.

    m = b1 m + (1 - b1) g            v = b2 v + (1 - b2) g²
    direction = (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)

(arXiv 1711.05101, algorithm 2.) Without a first moment (b1 = 0) and with a factored second moment a weight
has no float state at all. Float parameters in the same optimizer follow the same rule, and equal
`torch.optim.AdamW` to rounding.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Unpack

from torch import Tensor

from dqt.choices import LEAST_EPS
from dqt.errors import ConfigError
from dqt.optim.base import QuantizedOptimizer
from dqt.optim.moments import Moments, ordered_mean, update_clip
from dqt.optim.options import Options
from dqt.optim.rule import Rule


class AdamW(QuantizedOptimizer):
    """AdamW that writes low-bit weights back in place.

    Args:
        named_parameters: `model.named_parameters()`, or groups whose "params" are (name, parameter) pairs.
        lr: Learning rate, in units of the weights.
        betas: Decay of the first and second moment; a first one of 0 keeps no first moment.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled weight decay.
        second_moment: "full", "bf16", "int8", "fp8" or "factored", of matrices; see `dqt.optim.moments`.
        clip_update: Limits each tensor's step: its direction is divided by what the gradient's root mean
            square, over the running one, has above this number; 0 does not clip. For gradient release, where
            the global norm can't be clipped.
        **options: What all optimizers take; see `dqt.optim.options.Options`.

    Raises:
        ConfigError: If parameters are unnamed, or a setting makes no sense.
    """

    kind = "adamw"

    def __init__(
        self,
        named_parameters: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        second_moment: str = "full",
        clip_update: float = 0.0,
        **options: Unpack[Options],
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        more = {"second_moment": second_moment, "clip_update": clip_update}
        super().__init__(named_parameters, {**defaults, **more}, options)

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        if not all(0.0 <= beta < 1.0 for beta in group["betas"]):
            raise ConfigError(f"betas={group['betas']} must be in [0, 1)")
        if not group["eps"] >= LEAST_EPS:
            raise ConfigError(f"eps={group['eps']} must be at least {LEAST_EPS}")
        if not 0.0 <= group["clip_update"] < float("inf"):
            raise ConfigError(f"clip_update={group['clip_update']} must be finite and not negative")
        if group["second_moment"] == "none":
            raise ConfigError("AdamW divides by a second moment; for one without take SGD")

    def decay_of_first(self, group: dict[str, Any]) -> float:
        return float(group["betas"][0])

    def rule(self, parameter: Tensor, grad: Tensor, moments: Moments, group: dict[str, Any]) -> Rule:
        beta1, beta2 = self.first_beta(group), group["betas"][1]
        step = moments.state["step"]
        divisor = 1 - beta1**step
        squares = None
        if moments.second == "factored" or group["clip_update"]:
            squares = self.mean_squares(parameter, grad)
        if squares is not None and group["clip_update"]:
            update_clip(moments.state, float(ordered_mean(squares[0])), beta2, group["clip_update"])
            divisor *= moments.state["clip"]
        root_factor, eps = divisor / math.sqrt(1 - beta2**step), group["eps"] * divisor
        if squares is not None and moments.second == "factored":
            moments.update_factors(squares, beta2, root_factor, eps)
        return Rule(
            lr=group["lr"],
            decay=group["lr"] * group["weight_decay"],
            beta1=beta1,
            weight1=1 - beta1,
            beta2=beta2,
            root_factor=root_factor,
            eps=eps,
        )
