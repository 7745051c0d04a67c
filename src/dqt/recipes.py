"""Recipes: what each method and bit width uses, in one table.

    strict      the codes are all that a weight knows between two steps
    residual    k bits of remainder for each weight, part of the optimizer's state
    paper       the published code of arXiv 2412.04787, exactly
    fp32, bf16  full precision; bf16 is autocast over float32 weights, as people train
    bitnet      BitNet b1.58: float32 master weights, ternary in the forward pass

Unless a method is given, it is strict at 5 bits and more, where strict training is as good as FP32, and
residual below, where its rounding noise shows and grows with the run (4-bit strict 1.612 against 1.554 with a
residual). Each default below stands with the measurement that chose it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from dqt.choices import FLOAT_RESIDUAL, GATED_ROUNDINGS, PRODUCTS, TRAINED_PRODUCTS, Products
from dqt.errors import ConfigError, did_you_mean
from dqt.numerics.formats import GAUSSIAN_STEP, Format, parse_bits
from dqt.recipe import FLOAT_METHODS, METHODS, Recipe, refuse_unread

__all__ = ["METHODS", "Recipe", "headroom_rule", "lr_rule", "recipe_for"]


def recipe_for(
    method: str | None = None, bits: str | int | None = None, *, trained: bool = False, **overrides: Any
) -> Recipe:
    """The default recipe of a method and bit width.

    Args:
        method: One of `METHODS`; None takes strict at 5 bits and more, residual below.
        bits: "ternary" or 1 to 8; None is ternary for the low-bit methods. Not for the float methods.
        trained: Whether it is for weights that were trained before, as floats.
        **overrides: Fields of `Recipe` to replace.

    Raises:
        ConfigError: If a name is unknown, or the settings do not go together.
    """
    if method is not None and method not in METHODS:
        raise ConfigError(f"unknown method {method!r}; {did_you_mean(method, METHODS)}")
    if method in FLOAT_METHODS:
        allowed = (None, "ternary") if method == "bitnet" else (None,)
        if bits not in allowed:
            raise ConfigError(
                f"method {method} has no --bits {bits}: leave bits out, or use method strict or residual"
            )
        defaults: dict[str, Any] = {"method": method, "bits": None, "init_gain": _INIT_GAIN}
    else:
        fmt = parse_bits("ternary" if bits is None else bits)
        method = method or ("strict" if fmt.bits >= 5 else "residual")
        defaults = {"method": method, "bits": fmt.name, **_LOW_BIT[method](fmt)}
    if trained:
        defaults |= _of_trained(method, defaults["bits"])
    defaults |= _OPTIMIZERS.get(overrides.get("optimizer", "adamw"), {})
    if not overrides.get("betas", (0.9,))[0] or overrides.get("error_feedback") == "eco":
        defaults.pop("first_moment", None)  # there is none to save, or what is fed back would be rounded away
    if overrides.get("error_feedback") == "eco":
        defaults.pop("rounding", None)
    if (
        overrides.get("error_feedback") == "eco"
        or overrides.get("drop_smallest")
        or overrides.get("rounding") in GATED_ROUNDINGS
    ):
        defaults.pop("significance", None)  # see `update_conflicts`
    if overrides.get("residual_bits") == FLOAT_RESIDUAL:
        defaults.pop("rounding", None)  # it is not rounded
    defaults |= _of_environment(overrides.get("environment", "fp32"), {**defaults, **overrides})
    recipe = Recipe(**{**defaults, **overrides})
    kind = {key: overrides[key] for key in ("optimizer", "environment") if key in overrides}
    if len(kind) < len(overrides):
        refuse_unread(recipe, recipe_for(method, bits, trained=trained, **kind))
    return recipe


def _of_environment(environment: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What an environment changes in a recipe: moments become its own, as in the paper, and so do gradients.

    So does strict's int8 first moment. A factored second moment stays, and where there is no first moment
    none appears.
    """
    if environment not in ("bf16", "fp8"):
        return {}
    changes: dict[str, Any] = {}
    for prefix in ("", "float_"):
        if settings.get(f"{prefix}betas", (0.9,))[0]:
            changes[f"{prefix}first_moment"] = environment
        if settings.get(f"{prefix}second_moment", "full") == "full":
            changes[f"{prefix}second_moment"] = environment
    products = settings.get("products", Products())
    kinds = dict.fromkeys(PRODUCTS, "fp8") if environment == "fp8" else {}
    changes["products"] = replace(products, **kinds, gradient=environment)
    return changes


# Standard deviation of first weights times the root of their inputs. Micro with 4 layers, where transformers'
# 0.02 is a gain of 0.23, nats by gain:
#   FP32, 2.5e-3, 2.5M tokens, five seeds      1 1.924 ± 0.061    0.02 1.958 ± 0.067
#   8-bit strict, the same                     1 1.934 ± 0.060    0.02 1.964 ± 0.073
#   BitNet, 3e-3, 1.25M, one seed, cosine      1 2.386, 1.5 2.418, 0.02 2.462
_INIT_GAIN = 1.0

# A ternary weight can't grow beyond its frozen scale, so it must start as long as float weights would become.
# Gain 0.7: 3.02 nats, 1.0: 2.83, 1.5: 2.81 (micro, 0.6M tokens); 1.5: 2.413, 2.0: 2.456 (1.5M tokens).
# transformers' 0.02, a gain of 0.23 at this width: 3.53.
_LOW_BIT_INIT_GAIN = 1.5


def _strict(fmt: Format) -> dict[str, Any]:
    return {
        # From 0.02 on a grid made for twice that 4 bits have 2.368 nats, not 2.326 (at 5e-3), and 5 bits
        # 2.264, not 2.268 (2.5e-3; micro with 4 layers, 1.25M tokens, seed 1000).
        "init_gain": _INIT_GAIN if fmt.bits >= 4 else _LOW_BIT_INIT_GAIN,
        # 1 byte a weight, not 8. 8 bits against FP32 of the same seed, three seeds (micro, 1.5M tokens, lr
        # 2.5e-3): float32 moments +0.001, +0.028, +0.014 nats; factored second +0.016, +0.015, +0.000; int8
        # first beside it +0.009, +0.010, +0.006; bf16 first +0.016, +0.020, -0.000.
        "first_moment": "int8",
        "second_moment": "factored",
        **(_COOLED if fmt.bits <= 2 else _LESS_NOISE),
    }


# A weight of 2 bits is noise unless something cools it, see `dqt.optim.significance`. Strict ternary, micro,
# 1.5M tokens, seed 0: without 2.79 nats at 5e-3 and 2.83 at 1e-2; a threshold of 4, beta1 0.95, wsd 2.488. It
# helps 1 and 2 bits too, not 3 (2.66 against 2.61) or 4 (2.392 against 2.389). Micro with 4 layers, 2.5M
# tokens, seed 0: threshold 4, beta1 0.95 2.235; 3, 0.95 2.172; 2, 0.98, momentum begun anew by a move 2.145
# (five seeds of the first and the last: 2.237 ± 0.013, 2.175 ± 0.028; BitNet 2.110 ± 0.023).
_COOLED: dict[str, Any] = {"significance": 2.0, "betas": (0.98, 0.95)}


# Micro with 4 layers, 2.5M tokens, against stochastic rounding on the same five seeds: ternary with an 8-bit
# residual -0.036 ± 0.046 nats, with a 6-bit one -0.080 ± 0.050, 4 bits with an 8-bit one -0.016 ± 0.022,
# 8-bit strict -0.003 ± 0.014. Where moves are cooled it is worse: strict ternary +0.033 (1.25M tokens, seed
# 1000).
_LESS_NOISE: dict[str, Any] = {"rounding": "low_discrepancy"}


def _residual(fmt: Format) -> dict[str, Any]:
    return {
        **_LESS_NOISE,
        # No first moment: 2.413 nats at 4e-3; beta1 = 0.9 at half the rate 2.561 (one seed, not tuned).
        "betas": (0.0, 0.95),
        "init_gain": _LOW_BIT_INIT_GAIN if fmt.bits <= 2 else _INIT_GAIN,
        "residual_bits": 8,  # ternary: k = 8: 1.865, 6: 1.911, 4: 2.083
        "second_moment": "factored",  # ternary 1.865 against 1.876 with the full one
    }


def _of_trained(method: str, bits: str | None) -> dict[str, Any]:
    """What a trained model changes: it has its weights, and they have outliers.

    So every row has a step of its own, from 3 bits on one that reaches most of the largest weight, and
    activations stay float in the forward pass. Loss on code after conversion of SmolLM2-135M, 2.155 as
    floats: 8 bits, absmax a row 2.180 (of which int8 activations are 0.024), absmax a tensor 2.245, gaussian
    a row 3.67, gaussian a tensor 10.9. Up to 2 bits, 15 and more by any rule, it starts anew, at the rate and
    with the schedule of a new model.
    """
    # All fine-tuning was measured with a cosine.
    changes: dict[str, Any] = {"lr": FINE_TUNING_RATE, "schedule": "cosine", "init_gain": None}
    if method in ("strict", "residual"):
        assert bits is not None
        if parse_bits(bits).bits <= 2:
            del changes["lr"], changes["schedule"]
        changes |= {"per_row": True, "scale_rule": "trained"}
        changes["products"] = TRAINED_PRODUCTS
    return changes


def _paper(fmt: Format) -> dict[str, Any]:
    return {
        "lr": 5e-4,
        "warmup_steps": 2000,
        "schedule": "cosine",
        "betas": (0.9, 0.999),
        "eps": 1e-6,
        "weight_decay": 0.01,
        "scale_rule": "paper",
        "frozen_scale": False,
        "products": Products(forward="int8", grad_input="float", grad_weight="float"),
    }


_LOW_BIT = {"strict": _strict, "residual": _residual, "paper": _paper}

# What an optimizer changes in every recipe. Adafactor as published has no first moment and clips its updates.
_OPTIMIZERS: dict[str, dict[str, Any]] = {
    "adafactor": {
        "first_moment": "fp32",
        "significance": 0.0,
        **dict.fromkeys(("second_moment", "float_second_moment"), "factored"),
        **dict.fromkeys(("betas", "float_betas"), (0.0, 0.95)),
        "clip_update": 1.0,
    },
    "sgd": {
        "first_moment": "fp32",
        "significance": 0.0,
        **dict.fromkeys(("second_moment", "float_second_moment"), "none"),
        **dict.fromkeys(("betas", "float_betas"), (0.9, 0.95)),
    },
}

# Peak learning rates at LR_WIDTH, by method, or method and bits. Measured there, nats at the rates that were
# tried. Micro with 4 layers, wsd, 1.25M tokens, seed 1000:
#   fp32       1.25e-3 2.313, 1.77e-3 2.258, 2.5e-3 2.236, 5e-3 2.331
#   bitnet     1.5e-3  2.426,                3e-3   2.319, 6e-3 2.367
#   strict 8   1.25e-3 2.333,                2.5e-3 2.227, 5e-3 2.318
#   residual 4 1.4e-3 2.304, 2e-3 2.263, 2.8e-3 2.233, 4e-3 2.271, 5.6e-3 2.329
#   residual ternary       2e-3 2.349, 2.8e-3 2.326, 4e-3 2.320, 8e-3 2.441
#   strict ternary         5e-3 2.417, 1e-2   2.408, 2e-2 2.414
# Strict 4, micro, cosine, 1.5M tokens, seed 0: 2.5e-3 2.397, 5e-3 2.379, 1e-2 2.511.
# All others take the rate of their method, or of the nearest width that was measured: guesses.
LEARNING_RATES = {
    "fp32": 2.5e-3,
    "bf16": 2.5e-3,
    "bitnet": 3e-3,
    "strict": 2.5e-3,
    **dict.fromkeys(("strict 1", "strict ternary", "strict 2"), 1e-2),
    **dict.fromkeys(("strict 3", "strict 4"), 5e-3),
    "residual": 4e-3,
    **dict.fromkeys(("residual 3", "residual 4"), 2.8e-3),
    "paper": 5e-4,  # as published, at any width: its recipe sets it
}

FINE_TUNING_RATE = 5e-5
"""Of trained models, by any method and at any width, if their weights keep at least 3 bits."""

LR_WIDTH = 128
"""The width at which the learning rates were measured; at others they are those times LR_WIDTH / width.

Micro with 4 layers, wsd, 1.25M tokens, seed 1000, nats by rate, that of the rule in brackets:
              width 64                                      width 256
  fp32        3.5e-3 2.564, [5e-3] 2.513, 7.1e-3 2.555      0.88e-3 2.124, [1.25e-3] 2.098, 1.77e-3 2.117
  bitnet      4.2e-3 2.789, [6e-3] 2.696, 8.5e-3 2.724      1.06e-3 2.188, [1.5e-3] 2.134, 2.12e-3 2.144
  strict 8    3.5e-3 2.582, [5e-3] 2.528, 7.1e-3 2.489      [1.25e-3] 2.105, 1.77e-3 2.120
  residual 4  4e-3 2.551, [5.6e-3] 2.546, 8e-3 2.542
  residual t  5.6e-3 2.678, [8e-3] 2.676, 1.13e-2 2.734     1.4e-3 2.103, [2e-3] 2.075, 2.8e-3 2.140
On seeds 1000 to 1002 strict 8 at width 64 has 2.533 at 5e-3, 2.522 at 7.1e-3. Beyond 256 it is an
extrapolation; the rates of GPT-3 fall as fast, 6e-4 at width 768 and 1.2e-4 at 4096 (arXiv 2005.14165, table
2.1), and are 1.4 and 1.5 times FP32's by this rule.
"""

STRICT_REACH = 2.1
"""How far a strict grid of 7 and 8 bits reaches, in units of sqrt(sum of lr^2), if first weights do not.

Adam moves a weight by about the learning rate at a time, and without decay that is a random walk: FP32
weights end at a root mean square of 0.9 to 1.0 times sqrt(s^2 + sum of lr^2), where s is that of first
weights, 1 % of them beyond 2.6 times (micro with 4 layers, 2.5M tokens). 8 bits against FP32 by the reach,
one seed where no interval stands:
  width 64   from 0.02   0.74 +0.044 nats, 1.5 +0.009, 2.1 +0.005, 3.0 +0.000, 4.5 +0.000
  width 128  from 0.02   2.1 +0.006 ± 0.009 (five seeds; seeds 0 and 1 +0.017, +0.002), 3.1 +0.022, +0.006,
                         4.2 +0.004
  width 128  from 0.088  2.4 +0.013 ± 0.043 (five seeds), 3.5, as first weights ask, +0.010 ± 0.020 (five)
Before, with stochastic rounding: width 128 and longer first weights 4.6 +0.040, 9.2 +0.080; micro with 2
layers, 1.5M tokens, two seeds: 2.0 +0.004 (one), 2.7 +0.006 and +0.016, 4.0 +0.029 and +0.026.
A 7-bit grid of this reach has the step of an 8-bit one of twice as much. Of 4 bits the step is sixteen times
as long, and counts for more than the ends: width 128 at 5e-3, seed 0, 0.7 +0.085 with 17 % of the weights
there, 2.0 +0.227.
"""

_SGD_FACTOR, _ADAFACTOR_RATE = 100.0, 1e-2  # guesses, but for Adafactor's, which is the published cap


def lr_rule(recipe: Recipe, width: int) -> float:
    """The default learning rate of a recipe for a model of a width.

    The rate at the width where it was measured, times LR_WIDTH / width; but for Adafactor's, which is
    relative to the size of a weight.
    """
    if recipe.optimizer == "adafactor":
        return _ADAFACTOR_RATE
    rate = LEARNING_RATES.get(f"{recipe.method} {recipe.bits}", LEARNING_RATES[recipe.method])
    rate *= _SGD_FACTOR if recipe.optimizer == "sgd" else 1.0
    return rate * LR_WIDTH / width


def headroom_rule(recipe: Recipe, walk: float, spread: float) -> float:
    """The default headroom of a recipe in a run from new weights; the recipe's own where there is no rule.

    Strict grids of 7 and 8 bits reach as far as weights will grow, `STRICT_REACH` * walk, and no less far
    than first weights ask for.

    Args:
        recipe: Strict, or any.
        walk: Root of the sum of the squared learning rates of all steps.
        spread: Standard deviation of first weights.
    """
    if recipe.method != "strict" or recipe.optimizer != "adamw" or recipe.bits not in ("7", "8"):
        return recipe.headroom
    if recipe.scale_rule not in (None, "gaussian"):
        return recipe.headroom
    fmt = parse_bits(recipe.bits)
    first_reach = fmt.half_range * GAUSSIAN_STEP[fmt.name] * spread
    return round(max(1.0, STRICT_REACH * walk / first_reach), 3)
