"""What can be chosen by name or number, and what fits together: all that a config is checked against.

Without torch, whose import takes a second or two, so that a config is read, refused or planned at once. What
the names stand for is where it is computed: `numerics.rounding`, `numerics.scales`, `optim.moments`,
`optim.writeback`; a test holds that both know the same names.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from dqt.errors import ConfigError, did_you_mean

SCALE_RULES = ("gaussian", "absmean", "absmax", "trained", "learned", "paper")
ROUNDINGS = ("stochastic", "low_discrepancy", "nearest", "gated", "agreed", "noise", "biased", "learned")
KERNEL_ROUNDINGS = ("stochastic", "nearest", "low_discrepancy")
"""Those that the update kernel knows, by its numbers (`DqtRounding`)."""
GATED_ROUNDINGS = ("gated", "agreed")
"""Those that look at the first moment."""

FIRST_MOMENTS = ("none", "fp32", "bf16", "int8", "fp8")
SECOND_MOMENTS = ("none", "full", "bf16", "int8", "fp8", "factored")
ERROR_FEEDBACKS = ("none", "eco")

LEAST_EPS = 1e-18
"""Of AdamW. A factored second moment multiplies 1 / eps by up to 1e15, which float32 has to hold."""

FLOAT_RESIDUAL = 32
RESIDUAL_BITS = (0, 2, 3, 4, 5, 6, 7, 8, 16, FLOAT_RESIDUAL)
DEFAULT_HYSTERESIS = 0.056

PRODUCTS = ("forward", "grad_input", "grad_weight")
PRODUCT_KINDS = ("int8", "float", "fp8")
COMPUTE_BITS = ("stored", "ternary")
GRADIENTS = ("fp32", "bf16", "fp8")

TERNARIZED = ("4", "5", "6", "7", "8")
"""The bits that `compute_bits` = "ternary" can round: enough of them, and a grid that contains zero."""


def no_ternarization(bits: str) -> str:
    """What to say where `compute_bits` = "ternary" meets other bits than `TERNARIZED`."""
    return (
        f"compute_bits=ternary rounds stored integers of 4 to 8 bits, not {bits}: store 8 bits, or leave "
        "compute_bits out (a rule can leave a weight float)"
    )


def check_residual(residual_bits: int, hysteresis: float) -> None:
    """Raises `ConfigError` unless the residual can hold half a step plus the hysteresis."""
    if residual_bits not in RESIDUAL_BITS:
        raise ConfigError(
            f"residual_bits={residual_bits} is not one of {RESIDUAL_BITS} (0 is strict, 32 is float)"
        )
    if not 0.0 <= hysteresis <= 0.45:
        raise ConfigError(f"hysteresis={hysteresis} must be in [0, 0.45]: the residual spans one grid step")


def update_conflicts(
    optimizer: str,
    *,
    published: bool,
    first_moment: str,
    second_moment: str,
    residual_bits: int | str,
    rounding: str,
    drop_smallest: float,
    significance: float,
    error_feedback: str,
    learns_scale: bool,
) -> Iterator[tuple[object, str]]:
    """What does not go together in updates of low-bit weights: whether it is so here, and what to say then.

    Args:
        optimizer: "adamw", "adafactor" or "sgd".
        published: Whether the step is the paper's, `PaperAdamW` or `PaperAdafactor`; of method `paper`.
        first_moment: How it is kept; "none" too where its decay is 0.
        second_moment: How it is kept.
        residual_bits: 0 for none.
        rounding: One of `ROUNDINGS`.
        drop_smallest: Share of updates; 0 for none.
        significance: 0 for none.
        error_feedback: One of `ERROR_FEEDBACKS`.
        learns_scale: Whether scales are trained.
    """
    yield (
        published and residual_bits,
        f"the paper's step keeps no residual: residual_bits={residual_bits} needs AdamW or method residual",
    )
    yield (
        published and rounding not in ("stochastic", "nearest"),
        f"the paper's step rounds values, not moves, so no rounding={rounding}: use nearest, or AdamW or "
        "method strict",
    )
    yield (
        published and optimizer == "adamw" and second_moment == "factored",
        "the paper's step divides by a full second moment: for a factored one use PaperAdafactor or "
        "optimizer adafactor",
    )
    yield (
        significance and (optimizer != "adamw" or published),
        f"significance={significance} is about AdamW's direction and single moves: use AdamW, and method "
        "strict or residual",
    )
    choosers = {
        "significance": (significance, "significance=0"),
        "drop_smallest": (drop_smallest, "drop_smallest=0"),
        "rounding": (rounding if rounding in GATED_ROUNDINGS else "", "rounding=stochastic"),
    }
    chosen = {key: each for key, each in choosers.items() if each[0]}
    yield (
        len(chosen) > 1,
        f"{' and '.join(f'{key}={value}' for key, (value, _) in chosen.items())} each choose which weights "
        f"move, and one would undo the other: set {' or '.join(without for _, without in chosen.values())}",
    )
    yield (
        learns_scale and (optimizer != "adamw" or published or error_feedback == "eco"),
        "scales are trained (learn_scale, scale_rule=learned) with AdamW in methods strict and residual, "
        "without error feedback: use these, or a frozen rule such as gaussian",
    )
    yield (
        residual_bits == FLOAT_RESIDUAL and rounding != "stochastic",
        f"a float residual is not rounded, so no rounding={rounding}: use residual_bits=16 or less",
    )
    yield (
        rounding in GATED_ROUNDINGS and first_moment == "none",
        f"rounding={rounding} looks at the first moment: set betas to keep one, as in 0.95, 0.95",
    )
    yield (
        rounding == "gated" and optimizer != "adamw",
        f"rounding=gated compares the first moment with the second, and {optimizer} does not: use AdamW, or "
        "rounding=agreed",
    )
    if error_feedback == "eco":
        yield (
            significance,
            f"error_feedback=eco feeds back what rounding lost, and significance={significance} begins the "
            "moment that it goes into anew: set significance=0",
        )
        yield (
            residual_bits or published,
            "error_feedback=eco takes a residual's place, in AdamW and SGD: set residual_bits=0 (method "
            "strict), or use the residual without error feedback",
        )
        yield (
            optimizer == "adafactor" or rounding not in ("stochastic", "nearest"),
            "error_feedback=eco is published for AdamW and SGD, rounding stochastic or nearest: use those",
        )
        yield (
            first_moment != "fp32" or second_moment not in ("none", "full", "factored"),
            "error_feedback=eco goes into an fp32 first moment, beside a full or factored second one: set "
            "the moments so, and betas to keep one",
        )


@dataclass(frozen=True)
class Products:
    """How a linear layer multiplies with a weight.

    Kinds of products: "int8" (integers), "float" (the input's float dtype), or "fp8" (float8 numbers times
    integer codes, emulated in float32 products: no hardware for it was at hand). Only "fp8" goes alone.

    Attributes:
        forward: y = x Wᵀ. "int8" and "fp8" quantize x per token; "float" takes x as it is.
        grad_input: dx = dy W.
        grad_weight: dW = dyᵀ x.
        compute_bits: "stored", or "ternary": products take clamp(round(codes / mean|codes|), -1, 1) times
            that mean, as BitNet does with its float weights; the gradient goes straight through.
        gradient: What dW is rounded to before the optimizer sees it: "fp32" leaves it, "bf16", or "fp8" (e4m3
            in blocks of 128). It still lies in a float32 tensor.
    """

    forward: str = "int8"
    grad_input: str = "int8"
    grad_weight: str = "int8"
    compute_bits: str = "stored"
    gradient: str = "fp32"

    def __post_init__(self) -> None:
        for name in PRODUCTS:
            kind = getattr(self, name)
            if kind not in PRODUCT_KINDS:
                raise ConfigError(f"unknown product {name}={kind!r}; {did_you_mean(kind, PRODUCT_KINDS)}")
        kinds = {getattr(self, name) for name in PRODUCTS}
        if "fp8" in kinds and len(kinds) > 1:
            raise ConfigError("fp8 products go alone: set forward, grad_input and grad_weight all to fp8")
        for name, names in (("compute_bits", COMPUTE_BITS), ("gradient", GRADIENTS)):
            if (value := getattr(self, name)) not in names:
                raise ConfigError(f"unknown {name}={value!r}; {did_you_mean(value, names)}")


INT8_PRODUCTS = Products()
FLOAT_PRODUCTS = Products("float", "float", "float")
TRAINED_PRODUCTS = Products(forward="float")
"""Of weights that were trained before, as floats: some of their activations are hundreds of times the others.

SmolLM2-135M, 8 bits, 20 steps of fine-tuning, against FP32: int8 activations +0.021 nats, these +0.004, float
products in the backward pass too +0.004 (docs/finetune.md). Most of it is one layer's, and not one that its
own error gives away: so all layers have them.
"""
