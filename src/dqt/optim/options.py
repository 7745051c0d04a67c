"""What a parameter group may say, whatever the optimizer: the options, and what is refused when it is added.

Settings are compared one by one with their ranges, and in pairs with what goes together in an update, by the
table that recipes use too (`dqt.choices.update_conflicts`).
"""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Integral, Real
from typing import Any, TypedDict

from dqt.choices import (
    DEFAULT_HYSTERESIS,
    ERROR_FEEDBACKS,
    FIRST_MOMENTS,
    ROUNDINGS,
    SECOND_MOMENTS,
    check_residual,
    update_conflicts,
)
from dqt.errors import ConfigError, did_you_mean
from dqt.tensor import QuantizedTensor


class Options(TypedDict, total=False):
    """What every optimizer here takes beside its own arguments, for all parameters or in a group.

    Attributes:
        seed: Of all random rounding, in [0, 2**32).
        residual_bits: Remainder kept for each weight: 0 is strict, 2 to 8 or 16 bits residual, "auto" 8 bits
            below 5-bit weights and 0 from there on.
        hysteresis: How far beyond a cell's boundary a weight with a residual moves before its code changes,
            in grid steps.
        rounding: "stochastic", or "low_discrepancy", which adds less noise; for comparison one of the others
            in `dqt.numerics.rounding`.
        drop_smallest: Share of the smallest updates of a low-bit weight that is dropped; for comparison.
        significance: A gradient moves only weights whose direction is this many times what noise alone would
            make of it, and the first moment of a weight whose code has changed begins anew (AdamW only); see
            `dqt.optim.significance`.
        learn_scale: Train the scales of low-bit weights too (AdamW only); see `dqt.optim.learned_scale`.
        error_feedback: "none", or "eco"; see `dqt.optim.eco`.
        first_moment: How a first moment is kept: "none", "fp32", "bf16", "int8" or "fp8"; see
            `dqt.optim.moments`.
    """

    seed: int
    residual_bits: int | str
    hysteresis: float
    rounding: str
    drop_smallest: float
    significance: float
    learn_scale: bool
    error_feedback: str
    first_moment: str


DEFAULTS: dict[str, Any] = {
    "seed": 0,
    "residual_bits": "auto",
    "hysteresis": DEFAULT_HYSTERESIS,
    "rounding": "stochastic",
    "drop_smallest": 0.0,
    "significance": 0.0,
    "learn_scale": False,
    "error_feedback": "none",
    "first_moment": "fp32",
}

_NUMBERS = (
    *("lr", "weight_decay", "hysteresis", "drop_smallest", "significance", "eps", "betas", "beta1"),
    *("momentum", "clip_update", "clip_threshold", "decay_rate"),
)


def check_options(group: Mapping[str, Any]) -> None:
    """Refuses options that are of another type, out of range, or unknown names.

    Raises:
        ConfigError: With the option.
    """
    _require_numbers(group)
    if not 0.0 <= group["lr"] < float("inf"):
        raise ConfigError(f"lr={group['lr']} must be finite and not negative")
    if not 0.0 <= group["weight_decay"] < float("inf"):
        raise ConfigError(f"weight_decay={group['weight_decay']} must be finite and not negative")
    if not 0 <= group["seed"] < 2**32:
        raise ConfigError(f"seed={group['seed']} must be in [0, 2**32)")
    for key, names in (
        ("rounding", ROUNDINGS),
        ("error_feedback", ERROR_FEEDBACKS),
        ("first_moment", FIRST_MOMENTS),
        ("second_moment", SECOND_MOMENTS),
    ):
        if key in group and (value := group[key]) not in names:
            raise ConfigError(f"unknown {key} {value!r}; {did_you_mean(value, names)}")
    if not 0.0 <= group["drop_smallest"] < 1.0:
        raise ConfigError(f"drop_smallest={group['drop_smallest']} must be in [0, 1)")
    if not 0.0 <= group["significance"] < float("inf"):
        raise ConfigError(f"significance={group['significance']} must be finite and not negative")
    check_residual(0 if group["residual_bits"] == "auto" else group["residual_bits"], group["hysteresis"])


def check_pairs(group: Mapping[str, Any], kind: str, published: bool, first_moment: str) -> None:
    """Refuses what does not go together: of low-bit weights, and of all in the paper's step.

    Args:
        group: Checked one by one.
        kind: Of the optimizer, "adamw", "adafactor" or "sgd".
        published: Whether the step is the paper's.
        first_moment: How it is kept; "none" too where its decay is 0.

    Raises:
        ConfigError: With the pair.
    """
    if not published and not any(isinstance(parameter, QuantizedTensor) for parameter in group["params"]):
        return
    for wrong, message in update_conflicts(
        kind,
        published=published,
        first_moment=first_moment,
        second_moment=group.get("second_moment", "none"),
        residual_bits=group["residual_bits"],
        rounding=group["rounding"],
        drop_smallest=group["drop_smallest"],
        significance=group["significance"],
        error_feedback=group["error_feedback"],
        learns_scale=group["learn_scale"],
    ):
        if wrong:
            raise ConfigError(message)


def _require_numbers(group: Mapping[str, Any]) -> None:
    for key in _NUMBERS:
        if key in group:
            value = group[key]
            pair = key == "betas" or (key == "eps" and "decay_rate" in group)  # Adafactor's has two
            parts = tuple(value) if pair and isinstance(value, tuple | list) else (value,)
            if len(parts) != (2 if pair else 1) or not all(isinstance(part, Real) for part in parts):
                raise ConfigError(f"{key}={value!r} must be {'two numbers' if pair else 'a number'}")
    if not isinstance(group["seed"], Integral):
        raise ConfigError(f"seed={group['seed']!r} must be an integer")
