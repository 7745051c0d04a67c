"""SGD with momentum on low-bit weights.

    m = momentum m + g               direction = m

as in `torch.optim.SGD` without dampening. The one difference: weight decay is decoupled, as in every
optimizer here, where torch adds it to the gradient (the same without momentum).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Unpack

from torch import Tensor

from dqt.errors import ConfigError
from dqt.optim.base import QuantizedOptimizer
from dqt.optim.moments import Moments
from dqt.optim.options import Options
from dqt.optim.rule import Rule


class SGD(QuantizedOptimizer):
    """SGD that writes low-bit weights back in place.

    Args:
        named_parameters: `model.named_parameters()`, or groups whose "params" are (name, parameter) pairs.
        lr: Learning rate, in units of the weights.
        momentum: Decay of the first moment; 0 keeps none.
        weight_decay: Decoupled weight decay.
        **options: What all optimizers take; see `dqt.optim.options.Options`.

    Raises:
        ConfigError: If parameters are unnamed, or a setting makes no sense.
    """

    kind = "sgd"

    def __init__(
        self,
        named_parameters: Iterable[Any],
        lr: float = 1e-3,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(
            named_parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}, options
        )

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        if not 0.0 <= group["momentum"] < 1.0:
            raise ConfigError(f"momentum={group['momentum']} must be in [0, 1)")

    def decay_of_first(self, group: dict[str, Any]) -> float:
        return float(group["momentum"])

    def rule(self, parameter: Tensor, grad: Tensor, moments: Moments, group: dict[str, Any]) -> Rule:
        decay = group["lr"] * group["weight_decay"]
        return Rule(lr=group["lr"], decay=decay, beta1=self.first_beta(group), weight1=1.0)
