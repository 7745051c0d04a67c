"""AdamW on low-bit weights: the direction of Adam, the integers of the shared write-back.

    m = b1 m + (1 - b1) g            v = b2 v + (1 - b2) g²
    direction = (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)

(arXiv 1711.05101, algorithm 2.) Without a first moment (b1 = 0) and with a factored second moment a weight has no
float state at all. Float parameters in the same optimizer follow the same rule, and equal `torch.optim.AdamW` to
rounding.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from dqt.errors import ConfigError, did_you_mean
from dqt.optim.base import QuantizedOptimizer
from dqt.optim.moments import (
    SECOND_MOMENTS,
    first_moment_rows,
    init_moments,
    is_factored,
    second_moment_rows,
    update_factors,
)
from dqt.optim.writeback import DEFAULT_HYSTERESIS


class AdamW(QuantizedOptimizer):
    """AdamW that writes low-bit weights back in place.

    Args:
        named_parameters: `model.named_parameters()`, or groups whose "params" are (name, parameter) pairs.
        lr: Learning rate, in units of the weights.
        betas: Decay of the first and second moment; a first one of 0 keeps no first moment.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled weight decay.
        seed: Of all random rounding, in [0, 2**32).
        residual_bits: Remainder kept for each weight: 0 is strict, 2 to 8 or 16 bits residual, "auto" 8 bits below
            5-bit weights and 0 from there on.
        hysteresis: How far beyond a cell's boundary a weight with a residual moves before its code changes, in grid
            steps.
        second_moment: "full", or "factored" for matrices.
        rounding: "stochastic", or "nearest" (which changes no code in strict low-bit training; for comparisons).

    Raises:
        ConfigError: If parameters are unnamed, or a setting makes no sense.
    """

    def __init__(
        self,
        named_parameters: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        seed: int = 0,
        residual_bits: int | str = "auto",
        hysteresis: float = DEFAULT_HYSTERESIS,
        second_moment: str = "full",
        rounding: str = "stochastic",
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "seed": seed,
            "residual_bits": residual_bits,
            "hysteresis": hysteresis,
            "second_moment": second_moment,
            "rounding": rounding,
        }
        super().__init__(named_parameters, defaults)

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        if not all(0.0 <= beta < 1.0 for beta in group["betas"]):
            raise ConfigError(f"betas={group['betas']} must be in [0, 1)")
        if not group["eps"] > 0.0:
            raise ConfigError(f"eps={group['eps']} must be positive")
        kind = group["second_moment"]
        if kind not in SECOND_MOMENTS:
            raise ConfigError(f"unknown second_moment {kind!r}; {did_you_mean(kind, SECOND_MOMENTS)}")

    def begin(self, grad: Tensor, state: dict[str, Any], group: dict[str, Any], shape: torch.Size) -> None:
        kind = "factored" if is_factored(group["second_moment"], shape) else "full"
        if state["step"] == 1:
            init_moments(state, grad, group["betas"][0], kind)
        if kind == "factored":
            update_factors(state, grad, group["betas"][1])

    def direction(
        self, grad: Tensor, state: dict[str, Any], group: dict[str, Any], rows: slice
    ) -> Tensor:
        beta1, beta2 = group["betas"]
        correction1 = 1 - beta1 ** state["step"]
        correction2 = 1 - beta2 ** state["step"]
        m = first_moment_rows(state, grad, rows, beta1)
        v = second_moment_rows(state, grad, rows, beta2)
        denominator = (v.sqrt() / math.sqrt(correction2)).add_(group["eps"])
        return m / denominator.mul_(correction1)
