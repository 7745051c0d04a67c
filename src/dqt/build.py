"""From a recipe to a model with its weights, and to the optimizer for them."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from dqt.baselines import bitnet_
from dqt.errors import ConfigError
from dqt.optim import SGD, Adafactor, AdamW, PaperAdafactor, PaperAdamW
from dqt.optim.base import QuantizedOptimizer
from dqt.quantize import quantize_
from dqt.recipe import Recipe, refuse_rules
from dqt.recipes import LR_WIDTH, lr_rule
from dqt.rules import QuantizeReport, Rule, linear_modules
from dqt.tensor import QuantizedTensor


def prepare_model_(
    model: nn.Module,
    recipe: Recipe,
    rules: Mapping[str, Rule] | None = None,
    materialize: Callable[[str], None] | None = None,
    calibrate: Mapping[str, Any] | None = None,
    keep_remainder: bool = False,
) -> QuantizeReport:
    """Puts a recipe's weights into a model, in place.

    Args:
        model: A float model.
        recipe: What to do with it.
        rules: Name patterns to bits, or None to leave float; see `dqt.quantize_`. Low-bit methods only; for
            `paper` they come after its own, which is to quantize everything.
        materialize: Makes a module of a model on the meta device real; see `dqt.quantize_`.
        calibrate: A batch on which codes are chosen; see `dqt.quantize_`.
        keep_remainder: See `dqt.quantize_`; only where the recipe has a residual.

    Returns:
        What was converted and what was left.

    Raises:
        ConfigError: If the method can't follow a rule, or the model has nothing that a rule names.
    """
    refuse_rules(recipe, rules or {})
    if recipe.method == "bitnet":
        report = bitnet_(model)
        if hasattr(model, "save_pretrained"):
            from dqt.hf import remember

            remember(model)
        return report
    if not recipe.quantized:
        return QuantizeReport()
    assert recipe.bits is not None
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "quantize_: rules that matched no module")  # is an error here
        report = quantize_(
            model,
            recipe.bits,
            {"*": recipe.bits, **(rules or {})} if recipe.method == "paper" else rules,
            scale_rule=recipe.scale_rule,
            headroom=recipe.headroom,
            per_row=recipe.per_row,
            products=recipe.products,
            materialize=materialize,
            calibrate=calibrate,
            keep_remainder=keep_remainder and recipe.residual_bits > 0,
        )
    if report.unmatched_rules:
        raise ConfigError(
            f"rules that match no module of this model: {', '.join(report.unmatched_rules)}; dqt inspect "
            "shows the names of a run's weights"
        )
    return report


def build_optimizer(
    model: nn.Module, recipe: Recipe, lr: float | None = None, seed: int = 0
) -> QuantizedOptimizer:
    """The optimizer of a recipe, in groups: low-bit weights, float matrices, vectors (not decayed).

    The linear weights of a float method are the counterpart of low-bit ones, so that two methods can be
    compared with equal moments.

    What changes in the course of a run is for the loop to set, before each step and in every group: "lr" by
    `dqt.train.schedule.lr_factor`, and "significance" (0 here) to recipe.significance * step / steps.

    Args:
        model: As `prepare_model_` left it.
        recipe: Which optimizer, and its settings.
        lr: Learning rate; None takes the recipe's, or that of `lr_rule` for the model's width.
        seed: Of the random rounding.
    """
    lr = recipe.lr if lr is None else lr
    lr = lr_rule(recipe, _width(model)) if lr is None else lr
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    main = {"lr": lr, **_group(recipe, recipe.betas, recipe.first_moment, recipe.second_moment)}
    main["weight_decay"] = recipe.weight_decay
    options: dict[str, Any] = {
        "seed": seed,
        "residual_bits": recipe.residual_bits,
        "hysteresis": recipe.hysteresis,
        "rounding": recipe.rounding,
        "drop_smallest": recipe.drop_smallest,
        "error_feedback": recipe.error_feedback,
        "learn_scale": recipe.scale_rule == "learned",
    }
    if recipe.method == "paper":
        group: list[dict[str, Any]] = [{"params": named, **main}]
        options["frozen_scale"] = recipe.frozen_scale
        if recipe.optimizer == "adafactor":
            return PaperAdafactor(group, clip_threshold=recipe.clip_update, **options)
        return PaperAdamW(group, eps=recipe.eps, **options)
    linear = set() if recipe.quantized else {id(module.weight) for _, module in linear_modules(model)}
    is_main = {name: isinstance(p, QuantizedTensor) or id(p) in linear for name, p in named}
    plain = _group(recipe, recipe.float_betas, recipe.float_first_moment, recipe.float_second_moment)
    plain |= {"lr": lr, "weight_decay": 0.0}
    decayed = {**plain, "weight_decay": 0.0 if recipe.quantized else recipe.weight_decay}
    groups = [
        {"params": [(n, p) for n, p in named if is_main[n]], **main},
        {"params": [(n, p) for n, p in named if not is_main[n] and p.ndim >= 2], **decayed},
        {"params": [(n, p) for n, p in named if not is_main[n] and p.ndim < 2], **plain},
    ]
    groups = [group for group in groups if group["params"]]
    match recipe.optimizer:
        case "adafactor":
            return Adafactor(groups, clip_threshold=recipe.clip_update, **options)
        case "sgd":
            return SGD(groups, **options)
    return AdamW(groups, eps=recipe.eps, clip_update=recipe.clip_update, **options)


def _group(recipe: Recipe, betas: tuple[float, float], first: str, second: str) -> dict[str, Any]:
    """How an optimizer keeps its moments, under its own names."""
    match recipe.optimizer:
        case "adafactor":
            return {"beta1": betas[0], "first_moment": first}
        case "sgd":
            return {"momentum": betas[0], "first_moment": first}
    return {"betas": betas, "first_moment": first, "second_moment": second}


def _width(model: nn.Module) -> int:
    """The width that `lr_rule` takes: the config's, or the inputs of the first linear layer."""
    width = getattr(getattr(model, "config", None), "hidden_size", None)
    if width is not None:
        return int(width)
    return next((m.in_features for m in model.modules() if isinstance(m, nn.Linear)), LR_WIDTH)


def autocast(recipe: Recipe, device: str) -> contextlib.AbstractContextManager[Any]:
    """The context that a recipe's forward pass runs in: bfloat16 autocast where it has any, else nothing."""
    if recipe.autocasts:
        return torch.autocast(device, torch.bfloat16)
    return contextlib.nullcontext()
