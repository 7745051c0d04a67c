"""What every optimizer here shares: named parameters, checks, random streams, and state that loads as saved.

A subclass is an update rule. It sees a parameter as a matrix and returns an update direction for a few rows
at a time; low-bit weights take it through the shared write-back, float parameters by the ordinary rule.

Parameters must be named, because a weight's random numbers are keyed by its name: neither the order of the
parameters nor the number of processes changes a result.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dqt.errors import ConfigError, DqtError, NonFiniteError, did_you_mean
from dqt.numerics import philox
from dqt.numerics.rounding import ROUNDINGS
from dqt.optim.writeback import (
    WriteBackStats,
    check_residual,
    default_residual_bits,
    new_residual,
    write_back,
)
from dqt.tensor import QuantizedTensor

if TYPE_CHECKING:
    from dqt.optim.release import GradientRelease

BLOCK_ELEMENTS = 2**16
"""Elements a write-back handles at a time: its int64 temporaries of half a MB stay in a core's L2 cache."""


class QuantizedOptimizer(torch.optim.Optimizer):
    """Base of the optimizers that train low-bit weights in place, and float parameters beside them.

    Attributes:
        collect_telemetry: Whether steps count what happens to the codes.
        release: What updates the parameters inside the backward pass, or None; see `GradientRelease`.
    """

    release: GradientRelease | None = None
    _lost_release = False

    def __init__(self, named_parameters: Iterable[Any], defaults: dict[str, Any]) -> None:
        super().__init__(named_parameters, defaults)
        self.collect_telemetry = True
        self._stats = WriteBackStats()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group; refuses unnamed parameters, name collisions and settings that make no sense."""
        super().add_param_group(param_group)
        try:
            self._check_names()
            self._check_group(self.param_groups[-1])
        except ConfigError:
            self.param_groups.pop()
            raise

    def _check_names(self) -> None:
        if "param_names" not in self.param_groups[-1]:
            raise ConfigError(
                "parameters must be named, because the random rounding of a weight is keyed by its name: "
                "pass model.named_parameters(), or [(name, parameter), ...] as a group's params"
            )
        seen: dict[int, str] = {}
        for name in (name for group in self.param_groups for name in group["param_names"]):
            stream = philox.stream_of(name)
            if stream in seen:
                raise ConfigError(
                    f"parameters {seen[stream]!r} and {name!r} have the same random stream: rename one"
                )
            seen[stream] = name

    def _check_group(self, group: dict[str, Any]) -> None:
        if not 0.0 <= group["lr"] < float("inf"):
            raise ConfigError(f"lr={group['lr']} must be finite and not negative")
        if not 0.0 <= group["weight_decay"] < float("inf"):
            raise ConfigError(f"weight_decay={group['weight_decay']} must be finite and not negative")
        if not 0 <= group["seed"] < 2**32:
            raise ConfigError(f"seed={group['seed']} must be in [0, 2**32)")
        if group["rounding"] not in ROUNDINGS:
            raise ConfigError(
                f"unknown rounding {group['rounding']!r}; {did_you_mean(group['rounding'], ROUNDINGS)}"
            )
        check_residual(0 if group["residual_bits"] == "auto" else group["residual_bits"], group["hysteresis"])

    # -- one step --------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Updates all parameters that have a gradient.

        Raises:
            NonFiniteError: If a gradient holds NaN or Inf; nothing was changed then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._lost_release:
            raise DqtError(
                "this optimizer is a copy of one with gradient release, and a copy has no hooks: make a "
                "GradientRelease for it"
            )
        if self.release is not None:
            self.release.end_step()
            return loss
        for name, parameter, _ in self.with_gradient():
            self.check_gradient(name, parameter)
        self.begin_step()
        for name, parameter, group in self.with_gradient():
            self.update_parameter(name, parameter, group)
        return loss

    def with_gradient(self) -> Iterator[tuple[str, Tensor, dict[str, Any]]]:
        """Name, parameter and group of every parameter that has a gradient."""
        for group in self.param_groups:
            for name, parameter in zip(group["param_names"], group["params"], strict=True):
                if parameter.grad is not None:
                    yield name, parameter, group

    def check_gradient(
        self, name: str, parameter: Tensor, unchanged: str = "no parameter was changed"
    ) -> float:
        """The norm of a parameter's gradient.

        Raises:
            NonFiniteError: If it holds NaN or Inf, with `unchanged` in the message.
        """
        grad = parameter.grad
        assert grad is not None
        # A norm is not finite if an element is not, or where a square overflows, which Adam divides by.
        norm = float(torch.linalg.vector_norm(grad))
        if not math.isfinite(norm):
            bad = int((~grad.isfinite()).sum())
            what = f"{bad} NaN or Inf of {grad.numel()} elements" if bad else "values too large to square"
            raise NonFiniteError(
                f"the gradient of {name} holds {what}; {unchanged}. Lower the learning rate, or look at the "
                "batch"
            )
        return norm

    def begin_step(self) -> None:
        """Called before the first parameter of a step is updated."""
        self._stats = WriteBackStats()

    def update_parameter(self, name: str, parameter: Tensor, group: dict[str, Any]) -> None:
        """Takes one parameter's step; its gradient has been checked."""
        state = self.state[parameter]
        state["step"] = state.get("step", 0) + 1
        if isinstance(parameter, QuantizedTensor):
            self._step_quantized(name, parameter, state, group)
        else:
            self._step_float(parameter, state, group)

    def _step_quantized(
        self, name: str, weight: QuantizedTensor, state: dict[str, Any], group: dict[str, Any]
    ) -> None:
        assert weight.grad is not None
        grad = weight.grad.reshape(weight.rows, weight.shape[-1])
        bits = group["residual_bits"]
        bits = default_residual_bits(weight) if bits == "auto" else bits
        if bits and "residual" not in state:
            state["residual"] = new_residual(weight, bits)
        factors = self.begin(grad, state, group, weight.shape)
        if self.fused(name, weight, grad, state, group, factors, bits):
            return
        for rows in row_blocks(weight):
            write_back(
                weight,
                self.direction(grad[rows].float(), state, group, factors, rows),
                rows,
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                rounding=ROUNDINGS[group["rounding"]],
                random=self._random(name, weight, state["step"], group, rows),
                residual=state.get("residual"),
                residual_bits=bits,
                hysteresis=group["hysteresis"],
                stats=self._stats if self.collect_telemetry else None,
            )

    def _step_float(self, parameter: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        assert parameter.grad is not None
        shape = parameter.shape
        grad = parameter.grad.reshape(-1, shape[-1]) if len(shape) > 1 else parameter.grad.reshape(1, -1)
        factors = self.begin(grad, state, group, shape)
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        direction = self.direction(grad.float(), state, group, factors, slice(None))
        parameter.add_(direction.view(shape).to(parameter.dtype), alpha=-group["lr"])

    def _random(
        self, name: str, weight: QuantizedTensor, step: int, group: dict[str, Any], rows: slice
    ) -> Tensor | None:
        if group["rounding"] == "nearest":
            return None
        columns = weight.shape[-1]
        return philox.random_uint32(
            group["seed"],
            philox.Purpose.UPDATE,
            philox.stream_of(name),
            step,
            rows.start * columns,
            (rows.stop - rows.start) * columns,
            weight.device,
        ).view(-1, columns)

    # -- the update rule, written by subclasses --------------------------------------------------------------

    def begin(
        self, grad: Tensor, state: dict[str, Any], group: dict[str, Any], shape: torch.Size
    ) -> tuple[Tensor, Tensor] | None:
        """Makes the state on the first step, and does what needs the whole gradient matrix [rows, columns].

        Returns:
            Row and column factors of a factored second moment, or None.
        """
        raise NotImplementedError

    def direction(
        self,
        grad: Tensor,
        state: dict[str, Any],
        group: dict[str, Any],
        factors: tuple[Tensor, Tensor] | None,
        rows: slice,
    ) -> Tensor:
        """Update direction for some rows of the gradient matrix, `float32`; the caller multiplies by -lr."""
        raise NotImplementedError

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
        """Does direction and write-back in one kernel, with the same result, if it can take this case."""
        return False

    # -- telemetry and state ---------------------------------------------------------------------------------

    def telemetry(self) -> dict[str, float | None]:
        """Flip rate, shares of saturated and zero codes, and residual spread of the last step."""
        return self._stats.summary()

    def __getstate__(self) -> dict[str, Any]:
        """What `copy.deepcopy` takes; hooks stay with the parameters that they were put on."""
        lost = self.release is not None or self._lost_release
        own = {"collect_telemetry": self.collect_telemetry, "_stats": self._stats, "_lost_release": lost}
        return {**super().__getstate__(), **own}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what `state_dict` gave, every tensor in the dtype it was saved in.

        torch's own method casts state to the parameter's dtype, which would turn integer state into floats.

        Raises:
            ConfigError: If the parameter names differ.
        """
        ours = [name for group in self.param_groups for name in group["param_names"]]
        theirs = [name for group in state_dict["param_groups"] for name in group.get("param_names", [])]
        if ours != theirs:
            differing = sorted(set(ours) ^ set(theirs)) or ["the order of the parameters"]
            raise ConfigError(f"the optimizer state is of other parameters: {', '.join(differing[:5])}")
        super().load_state_dict({"state": {}, "param_groups": state_dict["param_groups"]})
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for index, saved in state_dict["state"].items():
            parameter = parameters[int(index)]
            self.state[parameter] = {
                key: value.detach().clone().to(parameter.device) if isinstance(value, Tensor) else value
                for key, value in saved.items()
            }


def row_blocks(weight: QuantizedTensor) -> Iterator[slice]:
    """Slices of about `BLOCK_ELEMENTS` elements that cover a weight's rows."""
    height = max(1, BLOCK_ELEMENTS // max(1, weight.shape[-1]))
    for start in range(0, weight.rows, height):
        yield slice(start, min(start + height, weight.rows))
