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

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from dqt.baselines import bitnet_
from dqt.errors import ConfigError, did_you_mean
from dqt.numerics.formats import parse_bits
from dqt.numerics.rounding import ROUNDINGS
from dqt.numerics.scales import SCALE_RULES
from dqt.optim import AdamW, PaperAdamW
from dqt.optim.base import QuantizedOptimizer
from dqt.optim.moments import FIRST_MOMENTS, SECOND_MOMENTS
from dqt.optim.writeback import DEFAULT_HYSTERESIS, check_residual
from dqt.quantize import QuantizeReport, Rule, linear_modules, quantize_
from dqt.tensor import Products, QuantizedTensor

METHODS = ("strict", "residual", "paper", "fp32", "bf16", "bitnet")
FLOAT_METHODS = ("fp32", "bf16", "bitnet")


@dataclass(frozen=True)
class Recipe:
    """Everything that defines a method but the model, the data and the length of the run.

    Attributes:
        method: One of `METHODS`.
        bits: Name of the format of linear weights; None for the float methods.
        lr: Peak learning rate.
        warmup_steps: Steps of linear warm-up; None means a tenth of the run.
        schedule: Decay after it: "cosine", "linear" or "wsd".
        grad_clip: Global gradient norm to clip to; 0 does not clip.
        clip_update: Clip of each tensor's step, see `AdamW`; 0 does not clip.
        betas: Moment decay of low-bit weights, or of the layers' linear weights where the method is a float
            one; a first one of 0 keeps no first moment.
        float_betas: Moment decay of all other parameters.
        eps: Of the optimizer.
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
        second_moment: Of what `betas` is for: "full", "int8" or "factored".
        first_moment: Of the same: "fp32", "bf16" or "int8".
        float_first_moment: Of all other matrices.
        float_second_moment: Of all other matrices.
        rounding: Of the write-back.
        products: Which products are integer.
    """

    method: str
    bits: str | None
    lr: float
    warmup_steps: int | None = None
    schedule: str = "cosine"
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
    products: Products = field(default_factory=Products)

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ConfigError(f"unknown method {self.method!r}; {did_you_mean(self.method, METHODS)}")
        check_residual(self.residual_bits, self.hysteresis)
        if self.method == "strict" and self.residual_bits:
            raise ConfigError(
                f"method strict keeps no residual: residual_bits={self.residual_bits} needs method residual"
            )
        if self.method == "residual" and not self.residual_bits:
            raise ConfigError(
                "method residual needs residual_bits of 2 to 8 or 16; with 0 it is method strict"
            )
        if self.method == "paper" and self.clip_update:
            raise ConfigError("method paper has no clip_update: it is the published step")
        if not self.frozen_scale and self.method != "paper":
            raise ConfigError(
                f"method {self.method} has no scale to recompute: frozen_scale = false is for method paper"
            )
        if self.init_gain is not None and not 0 < self.init_gain <= 100:
            raise ConfigError(f"init_gain={self.init_gain} must be above 0, and 100 at the most")
        if self.method == "paper" and self.bits == "1":
            raise ConfigError(
                "method paper has no 1-bit format, its grid contains zero: use bits ternary, or method strict"
            )
        for key, names in (
            ("second_moment", SECOND_MOMENTS),
            ("float_second_moment", SECOND_MOMENTS),
            ("first_moment", FIRST_MOMENTS),
            ("float_first_moment", FIRST_MOMENTS),
            ("scale_rule", (None, *SCALE_RULES)),
            ("rounding", ROUNDINGS),
        ):
            if (value := getattr(self, key)) not in names:
                raise ConfigError(f"unknown {key} {value!r}; {did_you_mean(value, filter(None, names))}")

    @property
    def quantized(self) -> bool:
        """Whether weights are low-bit integers between steps."""
        return self.method not in FLOAT_METHODS

    @property
    def fusible(self) -> bool:
        """Whether `dqt.fuse_` is for it: baselines and `paper` run the layers that people run."""
        return self.quantized and self.method != "paper"


def recipe_for(method: str | None = None, bits: str | int | None = None, **overrides: Any) -> Recipe:
    """The default recipe of a method and bit width.

    Args:
        method: One of `METHODS`; None takes strict at 5 bits and more, residual below.
        bits: "ternary" or 1 to 8; None is ternary for the low-bit methods. Not for the float methods.
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
        return replace(_FLOAT_RECIPES[method], **overrides)
    fmt = parse_bits("ternary" if bits is None else bits)
    method = method or ("strict" if fmt.bits >= 5 else "residual")
    recipe = _LOW_BIT_RECIPES[method](fmt.name)
    return replace(recipe, **overrides)


def _strict(bits: str) -> Recipe:
    # From 4 bits on the model's own small weights have room to grow on a grid coarser than the least-error
    # one, at the price of its rounding noise. 8 bits against FP32 of the same seed, two seeds (micro, 1.5M
    # tokens, lr 2.5e-3): headroom 3 +0.029, +0.026 nats; 2 +0.006, +0.016; 1.5 +0.004 (one seed).
    wide = parse_bits(bits).bits >= 4
    return Recipe(
        method="strict",
        bits=bits,
        lr=2.5e-3 if wide else 1e-3,
        init_gain=None if wide else _LOW_BIT_INIT_GAIN,
        headroom=2.0 if wide else 1.0,
    )


def _residual(bits: str) -> Recipe:
    return Recipe(
        method="residual",
        bits=bits,
        # 4e-3 is best at width 128 (2.451, 2.386, 2.417 nats at 2.5e-3, 4e-3, 6e-3). Lower here because the
        # grid step falls as 1/sqrt(width); that the best rate does too is a guess, not a measurement.
        lr=3e-3,
        # No first moment: 2.413 nats at 4e-3; beta1 = 0.9 at half the rate 2.561 (one seed, not tuned).
        betas=(0.0, 0.95),
        init_gain=_LOW_BIT_INIT_GAIN if parse_bits(bits).bits <= 2 else 1.0,
        residual_bits=8,  # ternary: k = 8: 1.865, 6: 1.911, 4: 2.083
        second_moment="factored",  # ternary 1.865 against 1.876 with the full one
    )


# A ternary weight can't grow beyond its frozen scale, so it must start as long as float weights would become.
# Gain 0.7: 3.02 nats, 1.0: 2.83, 1.5: 2.81 (micro, 0.6M tokens); 1.5: 2.413, 2.0: 2.456 (1.5M tokens).
# transformers' 0.02, a gain of 0.23 at this width: 3.53.
_LOW_BIT_INIT_GAIN = 1.5


def _paper(bits: str) -> Recipe:
    return Recipe(
        method="paper",
        bits=bits,
        lr=5e-4,
        warmup_steps=2000,
        betas=(0.9, 0.999),
        eps=1e-6,
        weight_decay=0.01,
        scale_rule="paper",
        frozen_scale=False,
        products=Products(forward="int8", grad_input="float", grad_weight="float"),
    )


_LOW_BIT_RECIPES = {"strict": _strict, "residual": _residual, "paper": _paper}
_FLOAT_RECIPES = {method: Recipe(method=method, bits=None, lr=2.5e-3) for method in FLOAT_METHODS}


def prepare_model_(
    model: nn.Module,
    recipe: Recipe,
    rules: Mapping[str, Rule] | None = None,
    materialize: Callable[[str], None] | None = None,
) -> QuantizeReport:
    """Puts a recipe's weights into a model, in place.

    Args:
        model: A float model.
        recipe: What to do with it.
        rules: Name patterns to bits, or None to leave float; see `dqt.quantize_`. Low-bit methods only; for
            `paper` they come after its own, which is to quantize everything.
        materialize: Makes a module of a model on the meta device real; see `dqt.quantize_`.

    Returns:
        What was converted and what was left.

    Raises:
        ConfigError: If rules are given for a method that has none.
    """
    if rules and not recipe.quantized:
        raise ConfigError(f"method {recipe.method} takes no rules: its weights are floats")
    if recipe.method == "bitnet":
        return bitnet_(model)
    if not recipe.quantized:
        return QuantizeReport()
    assert recipe.bits is not None
    return quantize_(
        model,
        recipe.bits,
        {"*": recipe.bits, **(rules or {})} if recipe.method == "paper" else rules,
        scale_rule=recipe.scale_rule,
        headroom=recipe.headroom,
        per_row=recipe.per_row,
        products=recipe.products,
        materialize=materialize,
    )


def build_optimizer(
    model: nn.Module, recipe: Recipe, lr: float | None = None, seed: int = 0
) -> QuantizedOptimizer:
    """The optimizer of a recipe, in groups: low-bit weights, float matrices, vectors (not decayed).

    The linear weights of a float method are the counterpart of low-bit ones, so that two methods can be
    compared with equal moments.
    """
    lr = recipe.lr if lr is None else lr
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if recipe.method == "paper":
        frozen = recipe.frozen_scale
        return PaperAdamW(
            named, lr, recipe.betas, recipe.eps, recipe.weight_decay, seed=seed, frozen_scale=frozen
        )
    linear = set() if recipe.quantized else {id(module.weight) for _, module in linear_modules(model)}
    main = [(n, p) for n, p in named if isinstance(p, QuantizedTensor) or id(p) in linear]
    rest = [(n, p) for n, p in named if not isinstance(p, QuantizedTensor) and id(p) not in linear]
    matrices = [(n, p) for n, p in rest if p.ndim >= 2]
    vectors = [(n, p) for n, p in rest if p.ndim < 2]
    plain = {
        "betas": recipe.float_betas,
        "first_moment": recipe.float_first_moment,
        "second_moment": recipe.float_second_moment,
    }
    groups: list[dict[str, Any]] = [
        {"params": main},
        {"params": matrices, **plain, "weight_decay": 0.0 if recipe.quantized else recipe.weight_decay},
        {"params": vectors, **plain, "weight_decay": 0.0},
    ]
    return AdamW(
        [group for group in groups if group["params"]],
        lr,
        recipe.betas,
        recipe.eps,
        recipe.weight_decay,
        seed=seed,
        residual_bits=recipe.residual_bits,
        hysteresis=recipe.hysteresis,
        second_moment=recipe.second_moment,
        first_moment=recipe.first_moment,
        rounding=recipe.rounding,
        clip_update=recipe.clip_update,
    )


def autocast(recipe: Recipe, device: str) -> contextlib.AbstractContextManager[Any]:
    """The context that a recipe's forward pass runs in: bfloat16 autocast for `bf16`, else nothing."""
    if recipe.method == "bf16":
        return torch.autocast(device, torch.bfloat16)
    return contextlib.nullcontext()
