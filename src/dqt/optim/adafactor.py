"""Adafactor on low-bit weights (arXiv 1804.04235, algorithms 4 to 6).

    v  = b2 v + (1 - b2) (g² + eps1),   b2 = 1 - t^decay_rate, of matrices from row and column means
    x  = g / sqrt(v),    clipped:  x / max(1, rms(x) / clip_threshold)
    m  = b1 m + (1 - b1) a x            a = lr, times max(eps2, rms(weight)) if it is relative
    weight -= m + a * weight_decay * weight

Without a learning rate it is min(1e-2, 1 / sqrt(t)), the paper's relative step. As in `transformers`, whose
results float parameters equal to rounding, the learning rate enters the first moment.

The second moment of matrices is always factored, that being the method. Clipping by rms needs a pass of its
own over the gradient, before any weight moves.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Unpack

import torch
from torch import Tensor

from dqt import ops
from dqt.errors import ConfigError
from dqt.optim.base import QuantizedOptimizer
from dqt.optim.moments import Moments, ordered_mean
from dqt.optim.options import Options
from dqt.optim.rule import Rule
from dqt.optim.step import row_blocks
from dqt.tensor import QuantizedTensor


class Adafactor(QuantizedOptimizer):
    """Adafactor that writes low-bit weights back in place.

    Args:
        named_parameters: `model.named_parameters()`, or groups whose "params" are (name, parameter) pairs.
        lr: Learning rate; None takes the relative step.
        eps: Added to squared gradients; least rms of a weight that scales its learning rate.
        clip_threshold: Largest rms of an update before the learning rate; 0 does not clip.
        decay_rate: Exponent of the second moment's decay, negative.
        beta1: Decay of the first moment; 0 keeps none.
        weight_decay: Decoupled weight decay.
        scale_parameter: Multiply the learning rate by the rms of the weight.
        **options: What all optimizers take; see `dqt.optim.options.Options`.

    Raises:
        ConfigError: If parameters are unnamed, or a setting makes no sense.
    """

    kind = "adafactor"

    def __init__(
        self,
        named_parameters: Iterable[Any],
        lr: float | None = None,
        eps: tuple[float, float] = (1e-30, 1e-3),
        clip_threshold: float = 1.0,
        decay_rate: float = -0.8,
        beta1: float = 0.0,
        weight_decay: float = 0.0,
        scale_parameter: bool = True,
        **options: Unpack[Options],
    ) -> None:
        defaults = {
            "lr": 1e-2 if lr is None else lr,
            "relative_step": lr is None,
            "eps": eps,
            "clip_threshold": clip_threshold,
            "decay_rate": decay_rate,
            "beta1": beta1,
            "weight_decay": weight_decay,
            "scale_parameter": scale_parameter,
            "second_moment": "factored",
        }
        super().__init__(named_parameters, defaults, options)

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        if not (group["eps"][0] >= 1e-30 and group["eps"][1] > 0.0):  # less than the published would overflow
            raise ConfigError(f"eps={group['eps']} must be at least 1e-30, and positive")
        if not 0.0 <= group["clip_threshold"] < float("inf"):
            raise ConfigError(f"clip_threshold={group['clip_threshold']} must be finite and not negative")
        if not group["decay_rate"] < 0.0:
            raise ConfigError(f"decay_rate={group['decay_rate']} must be negative")
        if not 0.0 <= group["beta1"] < 1.0:
            raise ConfigError(f"beta1={group['beta1']} must be in [0, 1)")
        if group["second_moment"] != "factored":
            raise ConfigError("Adafactor's second moment is factored; for another one use AdamW")

    def decay_of_first(self, group: dict[str, Any]) -> float:
        return float(group["beta1"])

    def rule(self, parameter: Tensor, grad: Tensor, moments: Moments, group: dict[str, Any]) -> Rule:
        step, beta1 = moments.state["step"], self.first_beta(group)
        beta2 = 1.0 - step ** group["decay_rate"]
        if moments.second == "factored":
            moments.update_factors(self.mean_squares(parameter, grad), beta2, floor=group["eps"][0])
            rms = rms_of_direction(grad, moments)
        else:
            squares = grad.float().square() + group["eps"][0]
            v = moments.state["exp_avg_sq"].mul_(beta2).add_(squares * (1 - beta2))
            rms = float(ordered_mean((squares / v).flatten()).sqrt())
        lr = min(group["lr"], 1 / math.sqrt(step)) if group["relative_step"] else group["lr"]
        if group["scale_parameter"]:
            lr *= max(group["eps"][1], rms_of_weight(parameter))
        limit = group["clip_threshold"]
        clipped = lr / max(1.0, rms / limit) if limit else lr
        return Rule(
            lr=1.0 if beta1 else clipped,
            decay=lr * group["weight_decay"],
            beta1=beta1,
            weight1=(1 - beta1) * clipped,
            beta2=1.0,  # v is up to date already, because its direction was measured
            normalize_first=True,
        )


def rms_of_direction(grad: Tensor, moments: Moments) -> float:
    """Root mean square of g / sqrt(v) for a factored v, in one pass over the gradient."""
    assert moments.inverses is not None
    row_inverse, column_inverse = moments.inverses
    of_rows = ops.row_squares(grad.float().contiguous(), column_inverse)
    return math.sqrt(float(ordered_mean(of_rows * row_inverse.square())))


def rms_of_weight(parameter: Tensor) -> float:
    """Root mean square of a weight's values."""
    if not isinstance(parameter, QuantizedTensor):
        matrix = parameter.detach().float().reshape(-1, parameter.shape[-1] if parameter.ndim else 1)
        return math.sqrt(float(ordered_mean(ops.row_squares(matrix.contiguous(), None))))
    of_rows = []
    for rows in row_blocks(parameter.rows, parameter.shape[-1]):
        values = parameter.unpack_rows(rows).float() - parameter.format.offset
        of_rows.append(ops.row_squares(values, None))
    return math.sqrt(float(ordered_mean(torch.cat(of_rows) * parameter.scale.flatten().square())))
