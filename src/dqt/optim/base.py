"""What every optimizer here shares: named parameters, checks, one step, and state that loads as saved.

A subclass says what its `Rule` is for one parameter at one step, and nothing else. The base keeps the
moments, follows the rule, and writes the result back: to low-bit weights through the shared write-back, to
float parameters by plain arithmetic. Both have a kernel that does it in one pass over the parameter, and a
reference that defines it.

Parameters must be named, because a weight's random numbers are keyed by its name: neither the order of the
parameters nor the number of processes changes a result.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from dqt.errors import ConfigError, DqtError, NonFiniteError, did_you_mean
from dqt.numerics import philox
from dqt.numerics.rounding import ROUNDINGS
from dqt.optim import checks, fused
from dqt.optim.eco import feed_back
from dqt.optim.learned_scale import update_scale
from dqt.optim.moments import Form, Moments, mean_squares, ordered_mean
from dqt.optim.options import DEFAULTS, check_options, check_pairs
from dqt.optim.rule import Rule
from dqt.optim.significance import least_direction
from dqt.optim.step import Step, gradient_matrix, matrix_shape, write_float
from dqt.optim.threshold import LearnedThreshold
from dqt.optim.writeback import (
    WriteBackStats,
    default_residual_bits,
    residual_form,
    residual_from,
    write_back,
)
from dqt.tensor import QuantizedTensor

if TYPE_CHECKING:
    from dqt.optim.release import GradientRelease


class QuantizedOptimizer(torch.optim.Optimizer):
    """Base of the optimizers that train low-bit weights in place, and float parameters beside them.

    Attributes:
        collect_telemetry: Whether steps count what happens to the codes.
        check_state: Whether steps look for NaN and Inf in moments and scales too; see `dqt.optim.checks`.
        release: What updates the parameters inside the backward pass, or None; see `GradientRelease`.
    """

    kind: ClassVar[str]
    """Name of the rule, one of `dqt.recipe.OPTIMIZERS`."""

    published: ClassVar[bool] = False
    """Whether the step is the paper's."""

    release: GradientRelease | None = None
    _lost_release = False

    def __init__(
        self, named_parameters: Iterable[Any], defaults: Mapping[str, Any], options: Mapping[str, Any]
    ) -> None:
        for key in options:
            if key not in DEFAULTS:
                known = (*defaults, *DEFAULTS)
                raise ConfigError(f"{type(self).__name__} takes no {key!r}; {did_you_mean(key, known)}")
        super().__init__(named_parameters, {**defaults, **DEFAULTS, **options})
        self.collect_telemetry = True
        self.check_state = False
        self._stats = WriteBackStats()
        self._squares: dict[Tensor, tuple[Tensor, Tensor]] = {}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group; refuses unnamed parameters, name collisions and settings that make no sense."""
        super().add_param_group(param_group)
        try:
            self._check_names()
            self._check_group(self.param_groups[-1])
        except ConfigError:
            self.param_groups.pop()
            raise
        self._take_remainders(self.param_groups[-1])

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
        """Refuses settings that make no sense; subclasses add their own."""
        check_options(group)
        first = group["first_moment"] if self.first_beta(group) else "none"
        check_pairs(group, self.kind, self.published, first)

    def check_groups(self) -> None:
        """Refuses what has become of the groups' settings, such as a learning rate that is NaN."""
        for group in self.param_groups:
            self._check_group(group)

    def _take_remainders(self, group: dict[str, Any]) -> None:
        """Begins residuals with what rounding left of trained weights; so a state saved now has them."""
        for parameter in group["params"]:
            if isinstance(parameter, QuantizedTensor) and parameter.kept_remainder is not None:
                if bits := _residual_bits(parameter, group):
                    state = self._new_state(parameter, group, parameter.device)
                    state["residual"] = residual_from(parameter.kept_remainder, bits)
                    self.state[parameter] = state
                parameter.kept_remainder = None

    # -- the update rule, written by subclasses --------------------------------------------------------------

    def decay_of_first(self, group: dict[str, Any]) -> float:
        """The setting that is the decay of the first moment."""
        raise NotImplementedError

    def first_beta(self, group: dict[str, Any]) -> float:
        """Decay of the first moment; 0 keeps none."""
        return 0.0 if group["first_moment"] == "none" else self.decay_of_first(group)

    def rule(self, parameter: Tensor, grad: Tensor, moments: Moments, group: dict[str, Any]) -> Rule:
        """The rule of one parameter at the step `moments.state["step"]`.

        Does what needs the whole gradient matrix [rows, columns], such as the factors of a second moment.
        """
        raise NotImplementedError

    # -- one step --------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Updates all parameters that have a gradient.

        Raises:
            NonFiniteError: If a gradient holds NaN or Inf; nothing was changed then.
            ConfigError: If a group asks for other state than it did at the first step, or for what makes no
                sense; nothing was changed.
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
        self._squares.clear()
        self.check_groups()
        for name, parameter, group in self.with_gradient():
            self.check_kept(name, parameter, group)
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

    def check_kept(self, name: str, parameter: Tensor, group: dict[str, Any]) -> None:
        """Refuses a group whose moments, residual or learned scale are others than at the first step."""
        if state := self.state.get(parameter):
            checks.require_kept(name, state, self._forms(parameter, group))

    def check_gradient(
        self, name: str, parameter: Tensor, unchanged: str = "no parameter was changed"
    ) -> float:
        """The norm of a parameter's gradient.

        Raises:
            NonFiniteError: If it, or with `check_state` what it meets, holds NaN or Inf, with `unchanged` in
                the message.
        """
        if self.check_state:
            checks.require_finite(name, parameter, self.state.get(parameter, {}), unchanged)
        grad = gradient_matrix(parameter)
        # A norm is not finite if an element is not, or where a square overflows, which Adam divides by.
        if "exp_avg_sq_row" in self.state.get(
            parameter, {}
        ):  # then the squares are wanted anyway, a pass the less
            self._squares[parameter] = mean_squares(grad)
            norm = math.sqrt(grad.numel() * float(ordered_mean(self._squares[parameter][0])))
        else:
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
        if not parameter.numel():
            return  # no elements have no mean square
        state = self.state[parameter]
        grad = gradient_matrix(parameter)
        if not state:
            state.update(self._new_state(parameter, group, grad.device))
        state["step"] += 1
        moments, residual_bits = self._moments(parameter, group, state), _residual_bits(parameter, group)
        rule = self.rule(parameter, grad, moments, group)
        clip = state["clip"] if group.get("clip_update") else 1.0
        step = Step(
            parameter=parameter,
            grad=grad,
            moments=moments,
            rule=rule,
            seed=group["seed"],
            stream=philox.stream_of(name),
            rounding=group["rounding"],
            residual_bits=residual_bits,
            hysteresis=group["hysteresis"],
            drop_smallest=group["drop_smallest"],
            least=least_direction(group["significance"], self.first_beta(group), state["step"], clip),
            error_feedback=group["error_feedback"],
            stats=self._stats if self.collect_telemetry else None,
        )
        if isinstance(parameter, QuantizedTensor):
            if group["learn_scale"]:
                update_scale(parameter, grad, state, group["lr"], group["betas"][1])
            self._write(step, parameter)
        elif not fused.update(step):
            write_float(step)

    def _write(self, step: Step, weight: QuantizedTensor) -> None:
        if fused.update(step):
            return
        learned = LearnedThreshold(self.state[weight]) if step.rounding == "learned" else None
        for rows, direction in step.directions():
            before = weight.unpack_rows(rows).clone() if step.least else None  # of 8 bits it is a view
            lost = write_back(
                weight,
                direction,
                rows,
                lr=step.rule.lr,
                decay=step.rule.decay,
                rounding=learned or ROUNDINGS[step.rounding].steps,
                random=step.random(rows),
                residual=step.residual,
                residual_bits=step.residual_bits,
                hysteresis=step.hysteresis,
                stats=step.stats,
            )
            if before is not None:
                step.moments.forget_first(rows, weight.unpack_rows(rows) != before)
            if step.error_feedback == "eco":
                feed_back(step, rows, lost)
        if learned is not None:
            learned.finish()

    def _forms(self, parameter: Tensor, group: dict[str, Any]) -> dict[str, Form]:
        """The tensors of a parameter's state, as its group asks for them."""
        forms = self._moments(parameter, group, {}).forms(*matrix_shape(parameter))
        if isinstance(parameter, QuantizedTensor):
            if bits := _residual_bits(parameter, group):
                forms["residual"] = residual_form(parameter, bits)
            if group["learn_scale"]:
                scale = torch.float32, tuple(parameter.scale.shape)
                forms |= {"scale": scale, "scale_sq": scale}
        return forms

    def _new_state(self, parameter: Tensor, group: dict[str, Any], device: torch.device) -> dict[str, Any]:
        """What a parameter's first step starts from."""
        state: dict[str, Any] = {"step": 0}
        for key, (dtype, shape) in self._forms(parameter, group).items():
            state[key] = torch.zeros(shape, dtype=dtype, device=device)
        if isinstance(parameter, QuantizedTensor) and "scale" in state:
            state["scale"].copy_(parameter.scale)
        return state

    def _moments(self, parameter: Tensor, group: dict[str, Any], state: dict[str, Any]) -> Moments:
        """The parameter's moments as its group keeps them; a vector is small, and keeps float32."""
        first = group["first_moment"] if self.first_beta(group) else "none"
        second = group.get("second_moment", "none")
        if parameter.ndim < 2:
            first, second = (
                "none" if kind == "none" else top for kind, top in ((first, "fp32"), (second, "full"))
            )
        return Moments(state, first, second)

    def mean_squares(self, parameter: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
        """Mean squares of a gradient's rows and columns, from the check if there was one."""
        squares = self._squares.pop(parameter, None)
        return mean_squares(grad) if squares is None else squares

    # -- telemetry and state ---------------------------------------------------------------------------------

    def telemetry(self) -> dict[str, float | None]:
        """Flip rate, shares of saturated and zero codes, and residual spread of the last step."""
        return self._stats.summary()

    def __getstate__(self) -> dict[str, Any]:
        """What `copy.deepcopy` takes; hooks stay with the parameters that they were put on."""
        lost = self.release is not None or self._lost_release
        own = {"collect_telemetry": self.collect_telemetry, "check_state": self.check_state}
        return {
            **super().__getstate__(),
            **own,
            "_stats": self._stats,
            "_lost_release": lost,
            "_squares": {},
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what `state_dict` gave, every tensor in the dtype it was saved in.

        torch's own method casts state to the parameter's dtype, which would turn integer state into floats.

        Raises:
            ConfigError: If the parameters or their groups differ, or a state tensor is not what a step of
                this optimizer expects; nothing was changed then.
        """
        saved_groups = [{**DEFAULTS, **group} for group in state_dict["param_groups"]]  # of older versions
        split = [group["param_names"] for group in self.param_groups]
        saved_split = [group.get("param_names", []) for group in saved_groups]
        ours, theirs = [*itertools.chain(*split)], [*itertools.chain(*saved_split)]
        if split != saved_split:
            differing = sorted(set(ours) ^ set(theirs)) or ["their order, or the groups that they are in"]
            raise ConfigError(f"the optimizer state is of other parameters: {', '.join(differing[:5])}")
        for group, saved in zip(self.param_groups, saved_groups, strict=True):
            if missing := sorted(group.keys() - saved.keys()):
                raise ConfigError(f"the optimizer state is of another optimizer: it has no {missing[0]}")
            self._check_group({**saved, "params": group["params"]})
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        groups = [group for group in saved_groups for _ in group["param_names"]]
        if strange := {str(index) for index in state_dict["state"]} - {str(i) for i in range(len(ours))}:
            raise ConfigError(
                f"the optimizer state has entries of no parameter: {', '.join(sorted(strange)[:5])}"
            )
        for index, saved in state_dict["state"].items():
            forms = self._forms(parameters[int(index)], groups[int(index)])
            checks.require_fitting(ours[int(index)], saved, forms)
        super().load_state_dict({"state": {}, "param_groups": saved_groups})
        for index, saved in state_dict["state"].items():
            parameter = parameters[int(index)]
            self.state[parameter] = {
                key: value.detach().clone().to(parameter.device) if isinstance(value, Tensor) else value
                for key, value in saved.items()
            }


def _residual_bits(parameter: Tensor, group: dict[str, Any]) -> int:
    """The width of a parameter's residual; 0 is strict."""
    if not isinstance(parameter, QuantizedTensor):
        return 0
    bits = group["residual_bits"]
    return default_residual_bits(parameter) if bits == "auto" else int(bits)
