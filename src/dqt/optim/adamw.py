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
from typing import Any

import torch
from torch import Tensor

from dqt import ops
from dqt.errors import ConfigError, did_you_mean
from dqt.numerics import philox
from dqt.optim.base import QuantizedOptimizer
from dqt.optim.fused import adam_update
from dqt.optim.moments import (
    SECOND_MOMENTS,
    exact_sqrt,
    first_moment_rows,
    init_moments,
    is_factored,
    ordered_mean,
    second_moment_rows,
    update_clip,
    update_factors,
)
from dqt.optim.writeback import DEFAULT_HYSTERESIS
from dqt.tensor import QuantizedTensor


class AdamW(QuantizedOptimizer):
    """AdamW that writes low-bit weights back in place.

    Args:
        named_parameters: `model.named_parameters()`, or groups whose "params" are (name, parameter) pairs.
        lr: Learning rate, in units of the weights.
        betas: Decay of the first and second moment; a first one of 0 keeps no first moment.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled weight decay.
        seed: Of all random rounding, in [0, 2**32).
        residual_bits: Remainder kept for each weight: 0 is strict, 2 to 8 or 16 bits residual, "auto" 8 bits
            below 5-bit weights and 0 from there on.
        hysteresis: How far beyond a cell's boundary a weight with a residual moves before its code changes,
            in grid steps.
        second_moment: "full", or "factored" for matrices.
        rounding: "stochastic", or "nearest" (which changes no code in strict low-bit training; for
            comparisons).
        clip_update: Limits each tensor's step: its direction is divided by what the gradient's root mean
            square, over the running one, has above this number; 0 does not clip. For gradient release, where
            the global norm can't be clipped.

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
        clip_update: float = 0.0,
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
            "clip_update": clip_update,
        }
        super().__init__(named_parameters, defaults)

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        if not all(0.0 <= beta < 1.0 for beta in group["betas"]):
            raise ConfigError(f"betas={group['betas']} must be in [0, 1)")
        if not group["eps"] > 0.0:
            raise ConfigError(f"eps={group['eps']} must be positive")
        if not 0.0 <= group["clip_update"] < float("inf"):
            raise ConfigError(f"clip_update={group['clip_update']} must be finite and not negative")
        kind = group["second_moment"]
        if kind not in SECOND_MOMENTS:
            raise ConfigError(f"unknown second_moment {kind!r}; {did_you_mean(kind, SECOND_MOMENTS)}")

    def begin(
        self, grad: Tensor, state: dict[str, Any], group: dict[str, Any], shape: torch.Size
    ) -> tuple[Tensor, Tensor] | None:
        kind = "factored" if is_factored(group["second_moment"], shape) else "full"
        if state["step"] == 1:
            init_moments(state, grad, group["betas"][0], kind)
        if kind == "full" and not group["clip_update"]:
            return None
        means = ops.mean_squares(grad.float().contiguous())
        if group["clip_update"]:
            update_clip(state, float(ordered_mean(means[0])), group["betas"][1], group["clip_update"])
        return update_factors(state, means, group["betas"][1]) if kind == "factored" else None

    def direction(
        self,
        grad: Tensor,
        state: dict[str, Any],
        group: dict[str, Any],
        factors: tuple[Tensor, Tensor] | None,
        rows: slice,
    ) -> Tensor:
        beta1, beta2 = group["betas"]
        correction1, sqrt_correction2 = corrections(group, state)
        m = first_moment_rows(state, grad, rows, beta1)
        v = second_moment_rows(state, factors, grad, rows, beta2)
        return m / exact_sqrt(v).div_(sqrt_correction2).add_(group["eps"]).mul_(correction1)

    def fused(
        self,
        name: str,
        weight: QuantizedTensor,
        grad: Tensor,
        state: dict[str, Any],
        group: dict[str, Any],
        factors: tuple[Tensor, Tensor] | None,
        residual_bits: int,
    ) -> bool:
        return adam_update(
            weight,
            grad,
            state,
            factors,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            betas=group["betas"],
            corrections=corrections(group, state),
            eps=group["eps"],
            residual_bits=residual_bits,
            hysteresis=group["hysteresis"],
            nearest=group["rounding"] == "nearest",
            counter=(group["seed"], philox.Purpose.UPDATE, philox.stream_of(name), state["step"]),
            stats=self._stats if self.collect_telemetry else None,
        )


def corrections(group: dict[str, Any], state: dict[str, Any]) -> tuple[float, float]:
    """What the first moment, and the root of the second, are divided by.

    1 - beta1**t, times what an update clip divides the direction by, and the root of 1 - beta2**t.
    """
    beta1, beta2 = group["betas"]
    step = state["step"]
    clip = state["clip"] if group["clip_update"] else 1.0
    return (1 - beta1**step) * clip, math.sqrt(1 - beta2**step)
