"""The published optimizer step of Direct Quantized Training (arXiv 2412.04787), in packed storage.

It is kept apart from the shared write-back because it differs in every part: AdamW with the old eps rule, a
scale that is recomputed at each step from the signed maximum, and a value that is rounded rather than a
displacement, so that a weight moves whenever the scale does:

    m, v as in Adam;   step_size = lr * sqrt(1 - b2^t) / (1 - b1^t)
    w'     = w - step_size * m / (sqrt(v) + eps)          eps before bias correction
    w'     = w' - lr * decay * w'                         on every parameter
    scale' = max(w) / qmax                                of the weights before the step; signed, not absolute
    codes  = clamp(SR(w' / scale'), qmin, qmax)           P(up) = fraction; or to nearest, for comparison

Compare with `dqt.optim.AdamW`, which beats it by 0.2 to 0.4 nats. To find out what makes the difference, its
choices can be taken back one by one (`dqt compare why`): float parameters beside the low-bit ones follow the
same step, and a frozen scale stays what it was at the start.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Unpack

import torch
from torch import Tensor

from dqt.errors import ConfigError, DivergedError
from dqt.optim import fused
from dqt.optim.adafactor import Adafactor
from dqt.optim.adamw import AdamW
from dqt.optim.base import QuantizedOptimizer
from dqt.optim.moments import Moments
from dqt.optim.options import Options
from dqt.optim.rule import Rule
from dqt.optim.step import Step, row_blocks
from dqt.tensor import QuantizedTensor


class _PaperStep(QuantizedOptimizer):
    """The published rounding, for any optimizer.

    Attributes:
        frozen_scale: Keep each scale, instead of recomputing it at every step.
    """

    published = True
    frozen_scale = False

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "frozen_scale": self.frozen_scale}

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        if group.get("clip_update"):
            raise ConfigError("the paper's step has no clip_update: leave it out, or use AdamW")
        for name, parameter in zip(group["param_names"], group["params"], strict=True):
            if isinstance(parameter, QuantizedTensor) and (parameter.format.offset or parameter.scale.ndim):
                raise ConfigError(
                    f"{name} is not on a grid of 2 bits or more with one scale, as the paper's recipe needs: "
                    "use dqt.quantize_(model, bits, rules={'*': bits}, scale_rule='paper')"
                )

    def check_gradient(
        self, name: str, parameter: Tensor, unchanged: str = "no parameter was changed"
    ) -> float:
        norm = super().check_gradient(name, parameter, unchanged)
        if (
            isinstance(parameter, QuantizedTensor)
            and parameter.numel()
            and not self.frozen_scale
            and largest_code(parameter) <= 0
        ):
            raise DivergedError(
                f"{name} has no positive weight left at step {self.state[parameter].get('step', 0) + 1}, so "
                f"the paper's scale, taken from the signed maximum, is undefined; {unchanged}. Lower the "
                "learning rate, or use another method"
            )
        return norm

    def _write(self, step: Step, weight: QuantizedTensor) -> None:
        fmt = weight.format
        new_scale = (
            weight.scale.clone() if self.frozen_scale else weight.scale * largest_code(weight) / fmt.qmax
        )
        if step.rounding != "stochastic" or not fused.update(step, new_scale):
            for rows, direction in step.directions():
                codes = weight.unpack_rows(rows)
                w = codes * weight.scale - step.rule.lr * direction
                w = w - step.rule.decay * w
                value = round_value(w / new_scale, step.random(rows)).clamp_(fmt.qmin, fmt.qmax)
                new_codes = value.to(torch.int32)
                if step.stats is not None:
                    step.stats.count(weight, codes.to(torch.int32) - fmt.qmin, new_codes - fmt.qmin)
                weight.write_codes(new_codes, rows)
        weight.scale.copy_(new_scale)


class PaperAdamW(_PaperStep, AdamW):
    """The published step; low-bit parameters must have one scale each, and 2 bits or more.

    Args:
        named_parameters: `model.named_parameters()`; as published, all on the grid.
        lr: Learning rate.
        betas: Decay of the first and second moment.
        eps: Added to the root of the second moment before bias correction.
        weight_decay: Applied to every parameter, after the step.
        frozen_scale: Keep each scale, instead of recomputing it at every step.
        **options: What all optimizers take; see `dqt.optim.options.Options`.
    """

    def __init__(
        self,
        named_parameters: Iterable[Any],
        lr: float = 5e-4,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
        *,
        frozen_scale: bool = False,
        **options: Unpack[Options],
    ) -> None:
        self.frozen_scale = frozen_scale
        options.setdefault("residual_bits", 0)
        super().__init__(named_parameters, lr, betas, eps, weight_decay, **options)

    def rule(self, parameter: Tensor, grad: Tensor, moments: Moments, group: dict[str, Any]) -> Rule:
        beta1, beta2 = self.first_beta(group), group["betas"][1]
        step = moments.state["step"]
        return Rule(
            lr=group["lr"] * math.sqrt(1 - beta2**step) / (1 - beta1**step),
            decay=group["lr"] * group["weight_decay"],
            beta1=beta1,
            weight1=1 - beta1,
            beta2=beta2,
            eps=group["eps"],
        )


class PaperAdafactor(_PaperStep, Adafactor):
    """Adafactor in AdamW's place, the paper's second optimizer; parameters as for `PaperAdamW`.

    The published code holds none. Assumed is what `transformers.Trainer` takes for "adafactor", which the
    rest of the published code is built on: no relative step, a learning rate that does not follow the size of
    the weight, no first moment, updates clipped at 1.

    Args:
        named_parameters: `model.named_parameters()`; as published, all on the grid.
        lr: Learning rate.
        clip_threshold: Largest rms of an update; 0 does not clip.
        weight_decay: Applied to every parameter, after the step.
        frozen_scale: Keep each scale, instead of recomputing it at every step.
        **options: What all optimizers take; see `dqt.optim.options.Options`.
    """

    def __init__(
        self,
        named_parameters: Iterable[Any],
        lr: float = 5e-4,
        clip_threshold: float = 1.0,
        weight_decay: float = 0.01,
        *,
        frozen_scale: bool = False,
        **options: Unpack[Options],
    ) -> None:
        self.frozen_scale = frozen_scale
        options.setdefault("residual_bits", 0)
        super().__init__(
            named_parameters,
            lr,
            clip_threshold=clip_threshold,
            weight_decay=weight_decay,
            scale_parameter=False,
            **options,
        )


def largest_code(weight: QuantizedTensor) -> int:
    """The signed maximum of a weight's codes."""
    blocks = row_blocks(weight.rows, weight.shape[-1])
    return max(int(weight.unpack_rows(rows).max()) for rows in blocks)


def round_value(value: Tensor, random: Tensor | None) -> Tensor:
    """Rounding of a value: up with the probability of its fraction, by 32-bit words; without, to nearest."""
    if random is None:
        return (value + 0.5).floor()
    low = value.floor()
    threshold = ((value - low) * 2.0**32).to(torch.int64)
    return low + (random < threshold)
