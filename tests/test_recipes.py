"""Recipes: the default method of each bit width, what goes together, and which parameters get which rule."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any

import pytest
import torch
from torch import nn

from dqt.build import autocast, build_optimizer, prepare_model_
from dqt.choices import Products
from dqt.errors import ConfigError
from dqt.numerics.formats import FORMATS
from dqt.numerics.scales import default_scale_rule
from dqt.optim import SGD, Adafactor, AdamW, PaperAdafactor, PaperAdamW
from dqt.recipes import (
    FINE_TUNING_RATE,
    LR_WIDTH,
    METHODS,
    Recipe,
    lr_rule,
    recipe_for,
)
from dqt.tensor import QuantizedTensor


class Toy(nn.Module):
    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.embed = nn.Embedding(13, 8)
        self.up = nn.Linear(8, 12, bias=bias)
        self.norm = nn.RMSNorm(12)
        self.lm_head = nn.Linear(12, 13, bias=False)


# bits -> method unless one is given, residual bits
DEFAULTS: list[tuple[str | int | None, str, int]] = [
    *((bits, "residual", 8) for bits in (None, "ternary", "1", 1, "2", 2, 3, 4)),
    *((bits, "strict", 0) for bits in (5, "6", 7, "8", 8)),
]


@pytest.mark.parametrize(("bits", "method", "residual_bits"), DEFAULTS)
def test_defaults(bits: str | int | None, method: str, residual_bits: int) -> None:
    recipe = recipe_for(None, bits)
    assert (recipe.method, recipe.residual_bits) == (method, residual_bits)
    assert recipe.bits == ("ternary" if bits is None else str(bits))
    assert recipe.quantized


@pytest.mark.parametrize("bits", list(FORMATS))
@pytest.mark.parametrize("method", ["strict", "residual"])
def test_trained_weights_are_fine_tuned_but_where_nothing_of_them_is_left(method: str, bits: str) -> None:
    recipe = recipe_for(method, bits, trained=True)
    assert (recipe.scale_rule, recipe.per_row, recipe.headroom) == ("trained", True, 1.0)
    assert recipe.products == Products(forward="float")
    expected = (FINE_TUNING_RATE, "cosine") if FORMATS[bits].bits >= 3 else (None, "wsd")
    assert (recipe.lr, recipe.schedule) == expected
    assert recipe_for(method, bits, trained=True, products=Products()).products == Products()


@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_a_recipe_for_its_bits(method: str) -> None:
    bits_of_method = [None] if method in ("fp32", "bf16", "bitnet") else [*FORMATS]
    for bits in bits_of_method:
        if (method, bits) == ("paper", "1"):
            continue  # refused, see test_paper.py
        recipe = recipe_for(method, bits)
        assert (recipe.method, recipe.bits) == (method, bits)
        assert recipe.quantized is (method in ("strict", "residual", "paper"))
        expected = (5e-4, "cosine") if method == "paper" else (None, "wsd")
        assert (recipe.lr, recipe.schedule) == expected
        assert lr_rule(recipe, LR_WIDTH) > 0
        assert recipe == recipe_for(method, bits)
        assert dataclasses.replace(recipe, lr=0.1) == recipe_for(method, bits, lr=0.1)


COMPUTED = Products(compute_bits="ternary")
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"method": "strikt"}, "did you mean 'strict'"),
    ({"method": "paper "}, "did you mean 'paper'"),
    ({"bits": 9}, "unknown bits 9"),
    ({"method": "strict", "bits": "tern"}, "did you mean 'ternary'"),
    ({"method": "fp32", "bits": 8}, "method fp32 has no --bits 8"),
    ({"method": "bf16", "bits": "ternary"}, "method bf16 has no --bits ternary"),
    ({"method": "bitnet", "bits": 4}, "method bitnet has no --bits 4"),
    ({"method": "strict", "bits": 4, "residual_bits": 8}, "residual_bits=8 needs method residual"),
    ({"method": "residual", "bits": 4, "residual_bits": 0}, "with 0 it is method strict"),
    ({"method": "strict", "bits": 4, "frozen_scale": False}, "frozen_scale = false is for method paper"),
    ({"method": "residual", "residual_bits": 9}, "residual_bits=9 is not one of"),
    ({"method": "residual", "hysteresis": 0.5}, "hysteresis=0.5 must be in"),
    ({"second_moment": "factord"}, "did you mean 'factored'"),
    ({"optimizer": "adam"}, "did you mean 'adamw'"),
    (
        {"optimizer": "adafactor", "second_moment": "full"},
        "is factored, not second_moment=full",
    ),
    ({"optimizer": "sgd", "float_second_moment": "int8"}, "no float_second_moment=int8: leave it out"),
    ({"optimizer": "sgd", "clip_update": 1.0}, "no running square"),
    ({"second_moment": "none"}, "needs optimizer sgd"),
    ({"first_moment": "int8"}, "first_moment=int8 keeps nothing where the first of the betas is 0"),
    ({"method": "fp32", "float_betas": (0.0, 0.9), "float_first_moment": "fp8"}, "float_first_moment=fp8"),
    ({"method": "paper", "second_moment": "factored"}, "optimizer adafactor"),
    ({"method": "paper", "optimizer": "sgd"}, "use optimizer adamw or adafactor"),
    ({"method": "paper", "residual_bits": 8}, "needs AdamW or method residual"),
    ({"method": "residual", "rounding": "gated"}, "set betas to keep one"),
    ({"method": "strict", "first_moment": "none", "rounding": "agreed"}, "set betas to keep one"),
    (
        {"method": "strict", "optimizer": "sgd", "rounding": "gated"},
        "use AdamW, or rounding=agreed",
    ),
    ({"method": "paper", "rounding": "noise"}, "use nearest, or AdamW or method strict"),
    ({"method": "residual", "residual_bits": 32, "rounding": "nearest"}, "use residual_bits=16 or less"),
    ({"method": "strict", "drop_smallest": 1.0}, "use 0 up to below 1"),
    ({"method": "fp32", "drop_smallest": 0.2}, "use strict or residual"),
    ({"method": "fp32", "significance": 2.0}, "use strict or residual"),
    ({"method": "strict", "significance": -1.0}, "use 0 to 100"),
    ({"method": "paper", "significance": 2.0}, "use AdamW, and method strict"),
    ({"method": "strict", "optimizer": "sgd", "significance": 2.0}, "use AdamW"),
    ({"method": "bitnet", "rounding": "gated"}, "use strict or residual"),
    ({"method": "strict", "significance": 2.0, "rounding": "gated"}, "set significance=0 or rounding=stoch"),
    ({"method": "strict", "significance": 2.0, "drop_smallest": 0.2}, "each choose which weights move"),
    (
        {"method": "strict", "rounding": "agreed", "drop_smallest": 0.2},
        "set drop_smallest=0 or rounding=",
    ),
    (
        {"method": "strict", "error_feedback": "eco", "significance": 2.0, "first_moment": "fp32"},
        "set significance=0",
    ),
    ({"eps": 1e-24}, "eps=1e-24 makes no sense: use 1e-18 or more"),
    ({"method": "residual", "error_feedback": "eco"}, "takes a residual's place"),
    ({"method": "strict", "error_feedback": "eco", "rounding": "gated"}, "rounding stochastic or nearest"),
    ({"method": "strict", "error_feedback": "eco", "optimizer": "adafactor"}, "AdamW and SGD"),
    ({"method": "strict", "error_feedback": "eco", "first_moment": "int8"}, "fp32 first moment"),
    ({"method": "strict", "error_feedback": "ecco"}, "did you mean 'eco'"),
    ({"method": "paper", "scale_rule": "learned"}, "a frozen rule such as gaussian"),
    (
        {"method": "strict", "bits": 8, "scale_rule": "learned", "products": COMPUTED},
        "leave scale_rule=learned",
    ),
    ({"environment": "fp16"}, "did you mean 'bf16'|did you mean 'fp8'"),
    ({"method": "bitnet", "environment": "bf16"}, "use method bf16 for bfloat16 floats"),
    ({"method": "strict", "bits": 8, "products": Products(*(["fp8"] * 3))}, "set environment alone"),
    ({"method": "strict", "bits": "3", "products": COMPUTED}, "strict with 3 bits has not"),
    ({"method": "paper", "bits": "8", "products": COMPUTED}, "use method strict with bits 8"),
    ({"method": "strict", "bits": "8", "per_row": True, "products": COMPUTED}, "set per_row=false"),
    ({"scale_rule": "absmeen"}, "did you mean 'absmean'"),
    ({"rounding": "neerest"}, "did you mean 'nearest'"),
    ({"method": "paper", "bits": 1}, "use bits ternary, or method strict"),
    ({"schedule": "cosinus"}, "did you mean 'cosine'"),
    ({"betas": (1.5, 0.9)}, "betas=.* use two numbers, 0 up to below 1"),
    ({"betas": (0.9,)}, "use two numbers"),
    ({"lr": -1.0}, "lr=-1.0 makes no sense"),
    ({"eps": 0.0}, "eps=0.0 makes no sense"),
    ({"weight_decay": -0.1}, "weight_decay=-0.1 makes no sense"),
    ({"headroom": -1.0}, "headroom=-1.0 must be above 0"),
    ({"method": "paper", "per_row": True}, "leave per_row out, or use method strict"),
    # What would do nothing.
    *(
        ({"method": method, key: value}, f"method {method} reads no {key}")
        for method, key, value in (
            ("fp32", "residual_bits", 8),
            ("fp32", "hysteresis", 0.1),
            ("fp32", "scale_rule", "absmax"),
            ("fp32", "headroom", 2.0),
            ("fp32", "per_row", True),
            ("bf16", "products", Products(grad_input="float")),
            ("bitnet", "products", Products(forward="float")),
            ("strict", "hysteresis", 0.1),
            ("paper", "hysteresis", 0.1),
            ("paper", "float_betas", (0.8, 0.9)),
            ("paper", "float_first_moment", "bf16"),
            ("paper", "float_second_moment", "bf16"),
        )
    ),
    ({"optimizer": "sgd", "eps": 1e-6}, "sgd reads no eps"),
    ({"optimizer": "adafactor", "betas": (0.0, 0.99)}, "adafactor reads no second of the betas"),
]


@pytest.mark.parametrize(("arguments", "message"), REFUSED)
def test_refusals(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        recipe_for(**arguments)


def test_a_recipe_is_checked_however_it_is_made() -> None:
    with pytest.raises(ConfigError, match="unknown method"):
        Recipe(method="adam", bits=None, lr=1.0)
    with pytest.raises(ConfigError):
        dataclasses.replace(recipe_for("residual", 4), residual_bits=1)
    with pytest.raises(ConfigError, match="unknown bits '9'"):
        Recipe("strict", "9")
    with pytest.raises(ConfigError, match="method fp32 has no bits=4"):
        Recipe("fp32", "4")


def test_bitnet_takes_the_name_of_its_format() -> None:
    assert recipe_for("bitnet", "ternary") == recipe_for("bitnet")


# method, bits, rules -> formats of the weights
PREPARED: list[tuple[str, Any, Any, dict[str, str]]] = [
    ("strict", 8, None, {"up.weight": "8"}),
    ("residual", "ternary", {"embed": 8}, {"up.weight": "ternary", "embed.weight": "8"}),
    ("residual", 4, {"*": None}, {}),
    ("paper", 4, None, dict.fromkeys(("embed.weight", "up.weight", "norm.weight", "lm_head.weight"), "4")),
    ("paper", 4, {"norm": None, "embed": None}, {"up.weight": "4", "lm_head.weight": "4"}),
    ("fp32", None, None, {}),
    ("bf16", None, None, {}),
    ("bitnet", None, None, {}),
]


@pytest.mark.parametrize(("method", "bits", "rules", "expected"), PREPARED)
def test_prepare_model(method: str, bits: Any, rules: Any, expected: dict[str, str]) -> None:
    model = Toy(bias=False)
    recipe = recipe_for(method, bits)
    report = prepare_model_(model, recipe, rules)
    formats = {n: str(p.format) for n, p in model.named_parameters() if isinstance(p, QuantizedTensor)}
    assert formats == expected == {entry.name: str(entry.format) for entry in report.converted}
    # Each weight has the scale rule of its own format, but for the paper's.
    rules_used = {entry.name: entry.scale_rule for entry in report.converted}
    defaults = {entry.name: default_scale_rule(entry.format) for entry in report.converted}
    assert rules_used == (dict.fromkeys(expected, "paper") if method == "paper" else defaults)
    optimizer = build_optimizer(model, recipe)
    assert type(optimizer) is (PaperAdamW if method == "paper" else AdamW)
    named = [name for group in optimizer.param_groups for name in group["param_names"]]
    assert sorted(named) == sorted(name for name, _ in model.named_parameters())


@pytest.mark.parametrize("method", ["fp32", "bf16", "bitnet"])
def test_methods_without_rules_refuse_them(method: str) -> None:
    with pytest.raises(ConfigError, match=f"method {method} takes no rules"):
        prepare_model_(Toy(), recipe_for(method), {"embed": 8})


def test_each_kind_of_parameter_gets_its_own_rule() -> None:
    model = Toy()
    model.lm_head.requires_grad_(False)
    recipe = recipe_for(
        "residual", 4, weight_decay=0.1, betas=(0.0, 0.9), float_betas=(0.8, 0.95), second_moment="factored"
    )
    prepare_model_(model, recipe)
    optimizer = build_optimizer(model, recipe, lr=0.5, seed=3)
    settings = {
        tuple(g["param_names"]): (g["betas"], g["weight_decay"], g["second_moment"])
        for g in optimizer.param_groups
    }
    assert settings == {
        ("up.weight",): ((0.0, 0.9), 0.1, "factored"),
        ("embed.weight",): ((0.8, 0.95), 0.0, "full"),
        ("up.bias", "norm.weight"): ((0.8, 0.95), 0.0, "full"),
    }
    assert all((g["lr"], g["seed"], g["residual_bits"]) == (0.5, 3, 8) for g in optimizer.param_groups)


def test_float_methods_treat_linear_weights_as_others_treat_low_bit_ones() -> None:
    recipe = recipe_for("fp32", weight_decay=0.1, betas=(0.0, 0.9), second_moment="factored")
    optimizer = build_optimizer(Toy(), recipe)
    settings = {
        tuple(g["param_names"]): (g["betas"], g["weight_decay"], g["second_moment"])
        for g in optimizer.param_groups
    }
    assert settings == {
        ("up.weight",): ((0.0, 0.9), 0.1, "factored"),
        ("embed.weight", "lm_head.weight"): ((0.9, 0.95), 0.1, "full"),
        ("up.bias", "norm.weight"): ((0.9, 0.95), 0.0, "full"),
    }
    # 8 is what the first linear layer of the model takes.
    assert all(group["lr"] == lr_rule(recipe, 8) for group in optimizer.param_groups)


def test_autocast_is_for_bf16_only() -> None:
    for method in METHODS:
        context = autocast(recipe_for(method), "cpu")
        assert isinstance(context, torch.autocast if method == "bf16" else contextlib.nullcontext)


def test_a_rate_of_zero_is_one_and_a_config_may_have_no_width() -> None:
    model = Toy()
    assert all(g["lr"] == 0.0 for g in build_optimizer(model, recipe_for("fp32"), lr=0.0).param_groups)
    model.config = object()  # type: ignore[assignment]
    recipe = recipe_for("fp32")
    assert build_optimizer(model, recipe).param_groups[0]["lr"] == lr_rule(recipe, 8)


# method, optimizer, settings -> class, groups' settings of low-bit and of float matrices
OPTIMIZERS: list[tuple[str, str, dict[str, Any], type, dict[str, Any], dict[str, Any]]] = [
    (
        "residual",
        "adamw",
        {},
        AdamW,
        {"betas": (0.0, 0.95), "second_moment": "factored"},
        {"second_moment": "full"},
    ),
    ("residual", "adamw", {"betas": (0.8, 0.9), "first_moment": "none"}, AdamW, {"first_moment": "none"}, {}),
    ("strict", "adamw", {"second_moment": "fp8"}, AdamW, {"second_moment": "fp8"}, {"second_moment": "full"}),
    (
        "strict",
        "adafactor",
        {"clip_update": 0.0},
        Adafactor,
        {"beta1": 0.0, "relative_step": True, "scale_parameter": True, "clip_threshold": 0.0},
        {"beta1": 0.0},
    ),
    (
        "residual",
        "adafactor",
        {"betas": (0.9, 0.95), "first_moment": "bf16"},
        Adafactor,
        {"beta1": 0.9, "first_moment": "bf16", "clip_threshold": 1.0},
        {"beta1": 0.0},
    ),
    ("strict", "sgd", {}, SGD, {"momentum": 0.9}, {"momentum": 0.9}),
    ("fp32", "adafactor", {}, Adafactor, {}, {"second_moment": "factored", "lr": 1e-2}),
    (
        "paper",
        "adafactor",
        {},
        PaperAdafactor,
        {"lr": 5e-4, "relative_step": False, "weight_decay": 0.01},
        {},
    ),
    ("paper", "adamw", {"first_moment": "fp8"}, PaperAdamW, {"first_moment": "fp8", "eps": 1e-6}, {}),
]


@pytest.mark.parametrize(("method", "name", "settings", "kind", "low_bit", "plain"), OPTIMIZERS)
def test_optimizers(
    method: str,
    name: str,
    settings: dict[str, Any],
    kind: type,
    low_bit: dict[str, Any],
    plain: dict[str, Any],
) -> None:
    model = Toy(bias=False)
    recipe = recipe_for(method, None, optimizer=name, **settings)
    prepare_model_(model, recipe)
    optimizer = build_optimizer(model, recipe)
    assert type(optimizer) is kind
    for parameter, expected in (("up.weight", low_bit), ("embed.weight", plain)):
        (group,) = [group for group in optimizer.param_groups if parameter in group["param_names"]]
        assert {key: group[key] for key in expected} == expected
    for parameter in model.parameters():
        parameter.grad = torch.ones(parameter.shape)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for group in optimizer.param_groups:
        group["lr"] = 0.1
    optimizer.step()
    assert any(not torch.equal(value, before[name]) for name, value in model.state_dict().items())
