"""`Recipe`: everything that defines a method but the model, the data and the length of the run.

It is checked when it is made: what can't go together is refused with the reason and the nearest setting that
works. Which recipe a method and bit width have by default stands in `dqt.recipes`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from dqt.choices import (
    DEFAULT_HYSTERESIS,
    ERROR_FEEDBACKS,
    FIRST_MOMENTS,
    LEAST_EPS,
    ROUNDINGS,
    SCALE_RULES,
    SECOND_MOMENTS,
    TERNARIZED,
    Products,
    check_residual,
    no_ternarization,
    update_conflicts,
)
from dqt.errors import ConfigError, did_you_mean
from dqt.numerics.formats import FORMATS, parse_bits
from dqt.train.schedule import SCHEDULES

METHODS = ("strict", "residual", "paper", "fp32", "bf16", "bitnet")
FLOAT_METHODS = ("fp32", "bf16", "bitnet")
LOW_BIT_METHODS = ("strict", "residual", "paper")
OPTIMIZERS = ("adamw", "adafactor", "sgd")
ENVIRONMENTS = ("fp32", "bf16", "fp8")


@dataclass(frozen=True)
class Recipe:
    """A method as numbers.

    Attributes:
        method: One of `METHODS`.
        bits: Name of the format of linear weights; None for the float methods.
        lr: Peak learning rate; None follows `dqt.recipes.lr_rule`.
        optimizer: One of `OPTIMIZERS`.
        warmup_steps: Steps of linear warm-up; None means a tenth of the run.
        schedule: Decay after it: "cosine", "linear" or "wsd".
        grad_clip: Global gradient norm to clip to; 0 does not clip.
        clip_update: Clip of each tensor's step, see `AdamW`, and Adafactor's clip_threshold; 0 does not clip.
        betas: Moment decay of low-bit weights, or of the layers' linear weights where the method is a float
            one; a first one of 0 keeps no first moment. Adafactor and SGD take the first one alone.
        float_betas: Moment decay of all other parameters.
        eps: Of AdamW.
        weight_decay: Decoupled, on low-bit weights (on everything for `paper`), and on the float matrices of
            the float methods.
        init_gain: Standard deviation of new linear weights times the root of their inputs; None leaves the
            model's own initialization.
        scale_rule: How the grid step is set at the start; None is the default of each weight's format.
        headroom: Factor on the rule's scale.
        per_row: One scale a row.
        frozen_scale: Keep the scale of the start; only `paper` can do without.
        residual_bits: k, 0 is strict.
        hysteresis: h, in grid steps.
        second_moment: Of what `betas` is for: one of `SECOND_MOMENTS`.
        first_moment: Of the same: one of `FIRST_MOMENTS`.
        float_first_moment: Of all other matrices.
        float_second_moment: Of all other matrices.
        rounding: Of the write-back, one of `dqt.numerics.rounding.ROUNDINGS`.
        drop_smallest: Share of the smallest updates that is dropped.
        significance: At the end of the run, of the optimizer's option of that name; it rises from 0.
        error_feedback: One of `dqt.optim.eco.ERROR_FEEDBACKS`.
        products: How linear layers multiply, see `Products`.
        environment: What the rest of a low-bit method computes in: one of `ENVIRONMENTS`.
    """

    method: str
    bits: str | None
    lr: float | None = None
    optimizer: str = "adamw"
    warmup_steps: int | None = None
    schedule: str = "wsd"
    grad_clip: float = 1.0
    clip_update: float = 0.0
    betas: tuple[float, float] = (0.9, 0.95)
    float_betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.0
    init_gain: float | None = None
    scale_rule: str | None = None
    headroom: float = 1.0
    per_row: bool = False
    frozen_scale: bool = True
    residual_bits: int = 0
    hysteresis: float = DEFAULT_HYSTERESIS
    second_moment: str = "full"
    first_moment: str = "fp32"
    float_first_moment: str = "fp32"
    float_second_moment: str = "full"
    rounding: str = "stochastic"
    drop_smallest: float = 0.0
    significance: float = 0.0
    error_feedback: str = "none"
    products: Products = field(default_factory=Products)
    environment: str = "fp32"

    def __post_init__(self) -> None:
        for key, names in (
            ("method", METHODS),
            ("bits", (None, *FORMATS)),
            ("optimizer", OPTIMIZERS),
            ("schedule", SCHEDULES),
            ("second_moment", SECOND_MOMENTS),
            ("float_second_moment", SECOND_MOMENTS),
            ("first_moment", FIRST_MOMENTS),
            ("float_first_moment", FIRST_MOMENTS),
            ("scale_rule", (None, *SCALE_RULES)),
            ("rounding", ROUNDINGS),
            ("error_feedback", ERROR_FEEDBACKS),
            ("environment", ENVIRONMENTS),
        ):
            if (value := getattr(self, key)) not in names:
                raise ConfigError(f"unknown {key} {value!r}; {did_you_mean(value, filter(None, names))}")
        check_residual(self.residual_bits, self.hysteresis)
        for wrong, message in _conflicts(self):
            if wrong:
                raise ConfigError(message)

    @property
    def quantized(self) -> bool:
        """Whether weights are low-bit integers between steps."""
        return self.method not in FLOAT_METHODS

    @property
    def fusible(self) -> bool:
        """Whether `dqt.fuse_` is for it: baselines and `paper` run the layers that people run.

        So does what runs under autocast, because the fused layers are float32 ones.
        """
        return self.quantized and self.method != "paper" and not self.autocasts

    @property
    def autocasts(self) -> bool:
        """Whether models run under autocast to bfloat16."""
        return self.method == "bf16" or self.environment != "fp32"

    @property
    def first_moments(self) -> tuple[str, str]:
        """How first moments are kept, of low-bit weights and of float matrices."""
        return (
            self.first_moment if self.betas[0] else "none",
            self.float_first_moment if self.float_betas[0] else "none",
        )


_NOT_PAPER = tuple(method for method in METHODS if method != "paper")
READERS = {
    **dict.fromkeys(("scale_rule", "headroom", "per_row", "products"), LOW_BIT_METHODS),
    **dict.fromkeys(("residual_bits", "hysteresis"), ("residual",)),
    **dict.fromkeys(("float_betas", "float_first_moment", "float_second_moment"), _NOT_PAPER),
}
"""Which methods read a setting; those that are not here are read by all, or refused by others."""


def refuse_unread(recipe: Recipe, plain: Recipe) -> None:
    """Refuses settings that would do nothing.

    Args:
        recipe: What was asked for.
        plain: The recipe of the same method and optimizer without being asked for anything.

    Raises:
        ConfigError: They differ in what method or optimizer do not read.
    """
    for key, methods in READERS.items():
        if recipe.method not in methods and (value := getattr(recipe, key)) != getattr(plain, key):
            raise ConfigError(
                f"method {recipe.method} reads no {key}, so not {value!r}: leave it out; "
                f"{', '.join(methods)} would"
            )
    if recipe.optimizer != "adamw":
        for key, asked in (
            ("eps", recipe.eps != plain.eps),
            ("second of the betas", recipe.betas[1] != plain.betas[1]),
        ):
            if asked:
                raise ConfigError(
                    f"{recipe.optimizer} reads no {key}: leave it as it is, or use optimizer adamw"
                )


def refuse_rules(recipe: Recipe, rules: Mapping[str, str | int | None]) -> None:
    """Refuses rules for weights, name patterns to bits or None for float, that a recipe can't follow.

    Raises:
        ConfigError: With the pattern.
    """
    if rules and not recipe.quantized:
        raise ConfigError(
            f"method {recipe.method} takes no rules or bits of embeddings: its weights are floats"
        )
    for pattern, bits in rules.items():
        name = None if bits is None else parse_bits(bits).name
        if recipe.method == "paper" and name == "1":
            raise ConfigError(f"rule {pattern!r}: method paper has no 1-bit format, its grid contains zero")
        if recipe.products.compute_bits == "ternary" and name not in (None, *TERNARIZED):
            raise ConfigError(f"rule {pattern!r}: {no_ternarization(str(name))}")


def _conflicts_of_numbers(recipe: Recipe) -> Iterator[tuple[object, str]]:
    yield (
        recipe.lr is not None and not 0 < recipe.lr < math.inf,
        f"lr={recipe.lr} makes no sense: use a number above 0",
    )
    yield (
        not LEAST_EPS <= recipe.eps < math.inf,
        f"eps={recipe.eps} makes no sense: use {LEAST_EPS} or more",
    )
    for key in ("weight_decay", "grad_clip", "clip_update", "warmup_steps"):
        value = getattr(recipe, key)
        yield value is not None and not 0 <= value < math.inf, f"{key}={value} makes no sense: use 0 or more"
    for key in ("betas", "float_betas"):
        betas = getattr(recipe, key)
        yield (
            len(betas) != 2 or not all(0 <= beta < 1 for beta in betas),
            f"{key}={betas} makes no sense: use two numbers, 0 up to below 1",
        )
    yield not 0 < recipe.headroom <= 1000, f"headroom={recipe.headroom} must be above 0, and 1000 at the most"


def _conflicts(recipe: Recipe) -> Iterator[tuple[object, str]]:
    """What does not go together: whether it is so here, and what to say then."""
    method, optimizer, bits = recipe.method, recipe.optimizer, recipe.bits
    yield from _conflicts_of_numbers(recipe)
    yield (
        method == "strict" and recipe.residual_bits,
        f"method strict keeps no residual: residual_bits={recipe.residual_bits} needs method residual",
    )
    yield (
        method == "residual" and not recipe.residual_bits,
        "method residual needs residual_bits of 2 to 8, 16, or 32 for floats; with 0 it is method strict",
    )
    yield (
        recipe.init_gain is not None and not 0 < recipe.init_gain <= 100,
        f"init_gain={recipe.init_gain} must be above 0, and 100 at the most",
    )
    yield (
        not recipe.frozen_scale and method != "paper",
        f"method {method} has no scale to recompute: frozen_scale = false is for method paper",
    )
    yield from _conflicts_of_products(recipe)
    yield from _conflicts_of_paper(recipe)
    yield from _conflicts_of_rounding(recipe)
    # Which moments an optimizer has.
    for key in ("second_moment", "float_second_moment"):
        kind = getattr(recipe, key)
        yield (
            optimizer == "adafactor" and kind != "factored",
            f"Adafactor's second moment is factored, not {key}={kind}: leave it out, or use optimizer adamw",
        )
        yield (
            optimizer == "sgd" and kind != "none",
            f"SGD has no second moment, so no {key}={kind}: leave it out, or use optimizer adamw",
        )
        yield (
            optimizer == "adamw" and kind == "none",
            f"AdamW divides by a second moment, so {key}=none needs optimizer sgd; factored is the smallest",
        )
    yield (
        optimizer == "sgd" and recipe.clip_update,
        f"SGD has no running square to hold clip_update={recipe.clip_update} against: leave it out",
    )
    for key, betas in (("first_moment", recipe.betas), ("float_first_moment", recipe.float_betas)):
        kind = getattr(recipe, key)
        yield (
            kind not in ("none", "fp32") and not betas[0],
            f"{key}={kind} keeps nothing where the first of the betas is 0: set betas too, or leave it out",
        )
    yield (
        recipe.quantized and bits is None,
        f"method {method} needs bits: ternary, or 1 to 8",
    )
    yield (
        not recipe.quantized and bits is not None,
        f"method {method} has no bits={bits}: leave bits out, or use method strict or residual",
    )


def _conflicts_of_products(recipe: Recipe) -> Iterator[tuple[object, str]]:
    environment, products = recipe.environment, recipe.products
    yield (
        environment != "fp32" and not recipe.quantized,
        f"environment={environment} is for low-bit methods: use method bf16 for bfloat16 floats, or strict",
    )
    yield (
        (products.forward == "fp8") != (environment == "fp8"),
        "fp8 products are those of environment=fp8, which has no others: set environment alone",
    )
    if products.compute_bits == "ternary":
        yield (
            recipe.method not in ("strict", "residual") or recipe.bits not in TERNARIZED,
            "compute_bits=ternary rounds stored integers of 4 to 8 bits, which method "
            f"{recipe.method}{f' with {recipe.bits} bits' if recipe.bits else ''} has not: use method strict "
            "with bits 8, or bits ternary without compute_bits",
        )
        yield (
            recipe.scale_rule == "learned",
            "compute_bits=ternary has its own scale, the mean of the codes: leave scale_rule=learned out",
        )
        yield (
            recipe.per_row,
            "compute_bits=ternary takes one mean for a tensor, not one for a row: set per_row=false",
        )


def _conflicts_of_rounding(recipe: Recipe) -> Iterator[tuple[object, str]]:
    rounding = recipe.rounding
    if not recipe.quantized:
        for key, default in (
            ("rounding", "stochastic"),
            ("drop_smallest", 0),
            ("significance", 0),
            ("error_feedback", "none"),
        ):
            value = getattr(recipe, key)
            yield (
                value != default,
                f"method {recipe.method} rounds no weights, so no {key}={value}: use strict or residual",
            )
    yield (
        not 0 <= recipe.drop_smallest < 1,
        f"drop_smallest={recipe.drop_smallest} is a share: use 0 up to below 1",
    )
    yield (
        not 0 <= recipe.significance <= 100,
        f"significance={recipe.significance} is in standard deviations: use 0 to 100, such as 3",
    )
    if recipe.quantized:
        yield from update_conflicts(
            recipe.optimizer,
            published=recipe.method == "paper",
            first_moment=recipe.first_moments[0],
            second_moment=recipe.second_moment,
            residual_bits=recipe.residual_bits,
            rounding=rounding,
            drop_smallest=recipe.drop_smallest,
            significance=recipe.significance,
            error_feedback=recipe.error_feedback,
            learns_scale=recipe.scale_rule == "learned",
        )


def _conflicts_of_paper(recipe: Recipe) -> Iterator[tuple[object, str]]:
    if recipe.method != "paper":
        return
    yield (
        recipe.bits == "1",
        ("method paper has no 1-bit format, its grid contains zero: use bits ternary, or method strict"),
    )
    yield recipe.per_row, "method paper has one scale a tensor: leave per_row out, or use method strict"
    yield recipe.optimizer == "sgd", "method paper has no SGD: use optimizer adamw or adafactor"
    yield (
        recipe.optimizer == "adamw" and recipe.clip_update,
        ("method paper has no clip_update: it is the published step"),
    )
