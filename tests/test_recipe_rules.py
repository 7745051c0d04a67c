"""First weights by recipe, and the rate and the grid that follow from the width and the run."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from dqt.numerics.formats import FORMATS
from dqt.quantize import quantize_
from dqt.recipes import LR_WIDTH, STRICT_REACH, Recipe, headroom_rule, lr_rule, recipe_for

FIRST_WEIGHTS = [
    *((method, None, 1.0) for method in ("fp32", "bf16", "bitnet")),
    *(("strict", bits, 1.5 if bits in ("1", "ternary", "2", "3") else 1.0) for bits in FORMATS),
    *(("residual", bits, 1.5 if bits in ("1", "ternary", "2") else 1.0) for bits in FORMATS),
    ("paper", "8", None),
]


@pytest.mark.parametrize(("method", "bits", "gain"), FIRST_WEIGHTS)
def test_new_weights_are_as_long_as_their_inputs_ask_for(
    method: str, bits: str | None, gain: float | None
) -> None:
    assert recipe_for(method, bits).init_gain == gain
    assert recipe_for(method, bits, trained=True).init_gain is None


def test_the_learning_rate_falls_as_the_width_grows() -> None:
    for method in ("residual", "strict", "fp32", "bitnet"):
        recipe = recipe_for(method)
        assert lr_rule(recipe, 4 * LR_WIDTH) == pytest.approx(lr_rule(recipe, LR_WIDTH) / 4)
    assert lr_rule(recipe_for("residual"), LR_WIDTH) == 4e-3
    assert lr_rule(recipe_for("residual", 4), LR_WIDTH) == 2.8e-3
    adafactor = recipe_for("strict", optimizer="adafactor")  # its rate is relative to the weight
    assert lr_rule(adafactor, 4 * LR_WIDTH) == lr_rule(adafactor, LR_WIDTH)


@pytest.mark.parametrize("bits", ["7", "8"])
@pytest.mark.parametrize("walk", [0.075, 0.3])
@pytest.mark.parametrize("spread", [0.02, 0.01])
def test_a_strict_grid_reaches_as_far_as_weights_will_grow(bits: str, walk: float, spread: float) -> None:
    recipe = recipe_for("strict", bits)
    linear = nn.Linear(128, 600, bias=False)
    nn.init.normal_(linear.weight, std=spread)
    quantize_(linear, bits, headroom=headroom_rule(recipe, walk, spread))
    weight: Any = linear.weight
    reach = float(weight.scale) * FORMATS[bits].half_range
    assert reach == pytest.approx(STRICT_REACH * walk, rel=0.02)


@pytest.mark.parametrize(
    ("recipe", "walk", "headroom"),
    [
        (recipe_for("strict", 8), 0.01, 1.0),  # a short run at a low rate
        (recipe_for("strict", "ternary"), 0.3, 1.0),
        (recipe_for("strict", 4), 0.3, 1.0),
        (recipe_for("residual", 4), 0.3, 1.0),
        (recipe_for("strict", 8, scale_rule="absmax"), 0.3, 1.0),
        (recipe_for("strict", 8, optimizer="sgd"), 0.3, 1.0),
        (recipe_for("strict", 8, trained=True), 0.3, 1.0),
        (recipe_for("residual", 4, headroom=1.5), 0.3, 1.5),
    ],
)
def test_other_grids_are_their_recipe_s(recipe: Recipe, walk: float, headroom: float) -> None:
    assert headroom_rule(recipe, walk, 0.02) == headroom
