"""Gradient release: each parameter is updated inside the backward pass, and its gradient freed at once.

    release = dqt.optim.GradientRelease(optimizer)
    loss.backward()          # updates every parameter as soon as its gradient is complete
    optimizer.step()         # ends the step
    release.remove()         # back to ordinary steps

Only the largest gradient lives at a time instead of all of them: 4 bytes a weight, three times what a ternary
weight and its residual take. The update is that of an ordinary step, with the same names, random streams and
step counts, so that codes and state are bitwise the same. A weight used in several places (an embedding that
is the output head) is updated once, when the last of its contributions is in.

What it costs: all that needs every gradient at once is gone. The global norm can't be clipped (the optimizers
offer `clip_update`, which limits each tensor's own step), gradients can't be accumulated over several
backward passes, and NaN or Inf is found before its own tensor changes, when others already have.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from dqt.errors import ConfigError, DqtError
from dqt.optim.base import QuantizedOptimizer

_ALREADY_CHANGED = "it was not changed, parameters that come after it in the model were"


class GradientRelease:
    """Binds an optimizer's updates to the backward pass, until `remove`.

    Hooks belong to the parameters they were put on. A deepcopy of model or optimizer has none, nor have
    parameters that are added or replaced later; the next `step` says so.

    Args:
        optimizer: Any optimizer of `dqt.optim`. Its `step` has to be called after each backward pass.

    Raises:
        ConfigError: If its gradients are released already, or some are there.
    """

    def __init__(self, optimizer: QuantizedOptimizer) -> None:
        if optimizer.release is not None:
            raise ConfigError("this optimizer's gradients are released already: call remove() before")
        for name, parameter, _ in optimizer.with_gradient():
            raise ConfigError(
                f"{name} has a gradient of {tuple(parameter.shape)}: step and zero_grad() first"
            )
        self._optimizer = optimizer
        self._done: set[Tensor] = set()
        self._squares = 0.0
        self._handles = [
            parameter.register_post_accumulate_grad_hook(functools.partial(self._update, number, name))
            for number, group in enumerate(optimizer.param_groups)
            for name, parameter in zip(group["param_names"], group["params"], strict=True)
            if parameter.requires_grad
        ]
        optimizer.release, optimizer._lost_release = self, False

    @property
    def norm(self) -> float:
        """Global norm of the gradients of the last backward pass."""
        return math.sqrt(self._squares)

    @torch.no_grad()
    def _update(self, group_number: int, name: str, parameter: Tensor) -> None:
        optimizer = self._optimizer
        if parameter in self._done:
            raise ConfigError(
                f"a second gradient of {name} before optimizer.step(): with gradient release the first is "
                "gone, so gradients can't be accumulated. Use a larger batch, or no gradient release"
            )
        if not self._done:
            optimizer.check_groups()
            optimizer.begin_step()
            self._squares = 0.0
        group = optimizer.param_groups[group_number]  # looked up, because load_state_dict replaces groups
        optimizer.check_kept(name, parameter, group)
        self._squares += optimizer.check_gradient(name, parameter, _ALREADY_CHANGED) ** 2
        optimizer.update_parameter(name, parameter, group)
        parameter.grad = None
        self._done.add(parameter)

    def end_step(self) -> None:
        """Called by the optimizer's `step`: makes sure that the backward pass has updated what it should."""
        for name, _, _ in self._optimizer.with_gradient():
            raise DqtError(
                f"gradient release has no hook on {name}, which has a gradient: it was added, replaced or "
                "unfrozen since. Call remove() and make a new GradientRelease"
            )
        if not self._done:
            raise DqtError(
                "gradient release: no parameter of this optimizer had a gradient since the last step. Call "
                "backward() first; a copied model needs an optimizer and a GradientRelease of its own"
            )
        self._done.clear()

    def forget(self) -> None:
        """Drops a step that failed half-way; parameters that were updated stay so."""
        self._done.clear()

    def remove(self) -> None:
        """Takes the hooks off; the optimizer's `step` is an ordinary one again."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._optimizer.release = None
