"""What an optimizer's state must be like before a kernel sees it.

Kernels get pointers: a state tensor of another size would be read beyond its end, so that a saved state is
compared, tensor by tensor, with the one that this optimizer would make. And a NaN in a moment or a scale
would reach integers without a trace, so that a step can look for them first. That is one more pass over the
moments kept in floats (8 and 16 bits a weight less than that, factored ones next to none), which is why
`check_state` is off unless asked for: `dqt train` asks, at under a hundredth of a step's time.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dqt.errors import ConfigError, NonFiniteError
from dqt.optim.moments import Form
from dqt.tensor import QuantizedTensor


def require_kept(name: str, state: Mapping[str, Any], expected: Mapping[str, Form]) -> None:
    """Compares a parameter's state with the tensors that its group asks for, at every step.

    Raises:
        ConfigError: They differ, because the group was changed after the first step.
    """
    kept = _forms(state)
    for key in kept.keys() | expected.keys():
        if (ours := kept.get(key)) != (theirs := expected.get(key)):
            raise ConfigError(
                f"{key} of {name} is {_text(ours)}, and its group now asks for {_text(theirs)}: how moments, "
                "residual and scale are kept can't change after the first step; set the group back (a first "
                "beta that rises from 0 has to start above it)"
            )


def require_fitting(name: str, saved: Mapping[str, Any], expected: Mapping[str, Form]) -> None:
    """Compares a saved state with the tensors that a first step would create.

    Raises:
        ConfigError: A tensor is missing, unknown, of another shape or dtype, or not finite; or a number is no
            number.
    """
    tensors = _forms(saved)
    for key in sorted({*tensors, *expected}):
        if (theirs := tensors.get(key)) != (ours := expected.get(key)):
            raise ConfigError(
                f"{key} of {name} is {_text(theirs)} in the saved state, and should be {_text(ours)}"
            )
        if saved[key].is_floating_point() and not _finite(saved[key]):
            raise ConfigError(f"{key} of {name} holds NaN or Inf in the saved state")
    step = saved.get("step")
    if type(step) is not int or not 0 <= step < 2**32:
        raise ConfigError(f"the saved state of {name} has step {step!r}")
    for key, value in saved.items():
        if key not in tensors and not (type(value) in (int, float) and math.isfinite(value)):
            raise ConfigError(f"{key} of {name} is {value!r} in the saved state, which is no finite number")


def require_finite(name: str, parameter: Tensor, state: Mapping[str, Any], unchanged: str) -> None:
    """Looks for NaN and Inf in what a step multiplies a gradient with.

    Raises:
        NonFiniteError: With `unchanged` in the message.
    """
    for key, value in state.items():
        if isinstance(value, Tensor) and value.is_floating_point() and not _finite(value):
            raise NonFiniteError(
                f"the update of {name} would not be finite, because {key} holds NaN or Inf; {unchanged}. "
                "Go on from a checkpoint"
            )
    if isinstance(parameter, QuantizedTensor) and not bool(
        (parameter.scale.isfinite() & (parameter.scale > 0)).all()
    ):
        raise NonFiniteError(
            f"the scale of {name} is not finite and positive; {unchanged}. Go on from a checkpoint"
        )


def _finite(tensor: Tensor) -> bool:
    """A sum is one pass without a copy; if it overflows, the elements decide. Float8 has none of its own."""
    if tensor.itemsize == 1:
        return all(bool(part.float().isfinite().all()) for part in tensor.flatten().split(2**20))
    return bool(tensor.sum(dtype=torch.float32).isfinite()) or bool(tensor.isfinite().all())


def _forms(state: Mapping[str, Any]) -> dict[str, Form]:
    return {key: (t.dtype, tuple(t.shape)) for key, t in state.items() if isinstance(t, Tensor)}


def _text(form: Form | None) -> str:
    return "missing" if form is None else f"{form[0]} {form[1]}"
