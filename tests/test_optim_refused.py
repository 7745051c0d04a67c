"""What the optimizers refuse: settings, parameters and gradients that make no sense."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import nn

import dqt
from dqt.errors import ConfigError, NonFiniteError
from dqt.optim import SGD, Adafactor, AdamW, GradientRelease
from optim_cases import (
    CASES,
    assert_equal_state,
    build,
    make_model,
    model_of,
    run,
    set_gradients,
)

REFUSED = [
    ({"significance": -1.0}, "significance=-1.0 must be finite"),
    ({"lr": -1.0}, "lr=-1.0 must be finite"),
    ({"lr": float("nan")}, "lr=nan must be finite"),
    ({"lr": float("inf")}, "lr=inf must be finite"),
    ({"weight_decay": -0.1}, "weight_decay=-0.1"),
    ({"weight_decay": float("inf")}, "weight_decay=inf"),
    ({"betas": (1.0, 0.9)}, r"betas=\(1.0, 0.9\) must be in \[0, 1\)"),
    ({"betas": (0.9, -0.1)}, "betas"),
    ({"eps": 0.0}, "eps=0.0 must be at least 1e-18"),
    ({"seed": -1}, r"seed=-1 must be in \[0, 2\*\*32\)"),
    ({"seed": 2**32}, "seed=4294967296"),
    ({"residual_bits": 1}, "residual_bits=1 is not one of"),
    ({"residual_bits": 9}, "residual_bits=9 is not one of"),
    ({"residual_bits": "8"}, "residual_bits=8 is not one of|residual_bits='8' is not one of"),
    ({"hysteresis": 0.5, "residual_bits": 8}, "hysteresis=0.5 must be in"),
    ({"hysteresis": 0.5}, "hysteresis=0.5 must be in"),  # with residual_bits="auto"
    ({"hysteresis": -0.1, "residual_bits": 8}, "hysteresis=-0.1"),
    ({"second_moment": "factord"}, "did you mean 'factored'"),
    ({"rounding": "stochstic"}, "did you mean 'stochastic'"),
    ({"first_moment": None}, "unknown first_moment None"),
    ({"betas": (0.9,)}, r"betas=\(0.9,\) must be two numbers"),
    ({"betas": 0.9}, "betas=0.9 must be two numbers"),
    ({"lr": "x"}, "lr='x' must be a number"),
    ({"eps": None}, "eps=None must be a number"),
    ({"seed": 1.5}, "seed=1.5 must be an integer"),
]


@pytest.mark.parametrize(("settings", "message"), REFUSED)
def test_settings_that_make_no_sense(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        AdamW(make_model().named_parameters(), **settings)
    # A later group too; it is not kept.
    optimizer = AdamW(make_model().named_parameters())
    with pytest.raises(ConfigError, match=message):
        optimizer.add_param_group({"params": [("extra", nn.Parameter(torch.ones(1)))], **settings})
    assert len(optimizer.param_groups) == 1


# What a group is at the first step, what it becomes, and what is said.
KEPT: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"betas": (0.0, 0.95)}, {"betas": (0.9, 0.95)}, "exp_avg of .* is missing.*has to start above it"),
    ({}, {"betas": (0.0, 0.95)}, r"exp_avg of .* is torch.float32 \(.*now asks for missing"),
    ({}, {"first_moment": "int8"}, "exp_avg.* of .*asks for torch"),
    ({}, {"second_moment": "factored"}, "exp_avg_sq.* of .*asks for"),
    ({"residual_bits": 0}, {"residual_bits": 8}, "residual of .* is missing"),
    ({"residual_bits": 8}, {"residual_bits": 0}, "residual of .* is torch.uint8"),
    ({"residual_bits": 8}, {"residual_bits": 4}, r"residual of .* asks for torch.uint8 \("),
    ({}, {"learn_scale": True}, "scale.* of .* is missing"),
]


def assert_refused_in_mid_run(
    model: nn.Module, optimizer: AdamW, change: dict[str, Any], message: str, release: bool
) -> None:
    """The next step refuses what has become of the group, and changes nothing."""
    if release:
        GradientRelease(optimizer)
    optimizer.param_groups[0].update(change)
    before = copy.deepcopy(model)
    loss = model(torch.ones(2, 10)).sum()
    if not release:
        loss.backward()
    with pytest.raises(ConfigError, match=message):
        loss.backward() if release else optimizer.step()
    assert_equal_state(model, before)


@pytest.mark.parametrize("release", [False, True])
@pytest.mark.parametrize(("settings", "change", "message"), KEPT)
def test_what_a_group_keeps_cannot_change_in_mid_run(
    settings: dict[str, Any], change: dict[str, Any], message: str, release: bool
) -> None:
    """A kernel would read a moment that is not there, and a residual changes what a step is."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(10, 12, bias=False))
    dqt.quantize_(model, "ternary")
    optimizer = AdamW(model.named_parameters(), lr=0.1, **settings)
    run(model, optimizer, range(1))
    optimizer.zero_grad()
    assert_refused_in_mid_run(model, optimizer, change, message, release)


def test_unnamed_parameters_are_refused_with_the_reason() -> None:
    model = make_model()
    for parameters in (model.parameters(), [{"params": list(model.parameters())}]):
        with pytest.raises(ConfigError, match=r"keyed by its name: pass model.named_parameters\(\)"):
            AdamW(parameters)


@pytest.mark.parametrize("names", [("w", "w"), ("module.w", "w")])
@pytest.mark.parametrize("groups", [1, 2])
def test_names_with_one_random_stream_are_refused(names: tuple[str, str], groups: int) -> None:
    named = [(name, nn.Parameter(torch.ones(2))) for name in names]
    arguments = named if groups == 1 else [{"params": [pair]} for pair in named]
    with pytest.raises((ConfigError, ValueError), match=r"same random stream|more than one parameter group"):
        AdamW(arguments)


def test_state_of_other_parameters_is_refused() -> None:
    model = make_model()
    state = AdamW(model.named_parameters()).state_dict()
    for named in ([*model.named_parameters()][::-1], [*model.named_parameters()][:2]):
        with pytest.raises(ConfigError, match="the optimizer state is of other parameters"):
            AdamW(named).load_state_dict(state)
    named = [*model.named_parameters()]
    with pytest.raises(ConfigError, match="the groups that they are in"):
        AdamW([{"params": named[:2]}, {"params": named[2:]}]).load_state_dict(state)
    with pytest.raises(ConfigError, match="entries of no parameter: 99"):
        AdamW(named).load_state_dict({**state, "state": {99: {"step": 1}}})


@pytest.mark.parametrize(("kind", "missing"), [(SGD, "momentum"), (Adafactor, "beta1")])
def test_state_of_another_optimizer_is_refused(kind: Any, missing: str) -> None:
    model = make_model()
    state = AdamW(model.named_parameters()).state_dict()
    with pytest.raises(ConfigError, match=f"of another optimizer: it has no {missing}"):
        kind(model.named_parameters()).load_state_dict(state)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lr": math.nan}, "lr=nan"),
        ({"significance": -3.0}, "significance=-3"),
        ({"rounding": "x"}, "round"),
    ],
)
@pytest.mark.parametrize("release", [False, True])
def test_settings_are_checked_in_mid_run_and_in_a_saved_state(
    change: dict[str, Any], message: str, release: bool
) -> None:
    """A learning rate that is NaN would throw every weight to an end of its grid."""
    model = nn.Sequential(nn.Linear(10, 12, bias=False))
    dqt.quantize_(model, "ternary")
    optimizer = AdamW(model.named_parameters())
    state = optimizer.state_dict()
    state["param_groups"][0] |= change
    with pytest.raises(ConfigError, match=message):
        AdamW(model.named_parameters()).load_state_dict(state)
    assert_refused_in_mid_run(model, optimizer, change, message, release)


def test_a_state_of_a_version_without_an_option_loads() -> None:
    model = make_model()
    optimizer = AdamW(model.named_parameters())
    run(model, optimizer, range(1))
    state = optimizer.state_dict()
    for key in ("learn_scale", "significance", "first_moment"):
        del state["param_groups"][0][key]
    other = AdamW(model.named_parameters())
    other.load_state_dict(state)
    assert other.param_groups[0]["learn_scale"] is False
    assert other.param_groups[0]["first_moment"] == "fp32"


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_gradient_that_is_not_finite_changes_nothing(case: str, bad: float) -> None:
    model = model_of(case)
    optimizer = build(case, model)
    run(model, optimizer, range(2))
    before, state = copy.deepcopy(model), copy.deepcopy(optimizer.state_dict())
    name, last = list(model.named_parameters())[-1]
    set_gradients(model, 2)
    assert last.grad is not None
    last.grad.view(-1)[3] = bad
    with pytest.raises(
        NonFiniteError, match=rf"gradient of {name} holds 1 NaN or Inf of {last.numel()} elements"
    ):
        optimizer.step()
    assert_equal_state(model, before)
    assert str(optimizer.state_dict()) == str(state)


@pytest.mark.parametrize("case", CASES)
def test_a_gradient_too_large_to_square_changes_nothing(case: str) -> None:
    """1e30 is finite, its square is not: Adam would divide Inf by Inf, and an integer cast hides the NaN."""
    model = model_of(case)
    optimizer = build(case, model)
    before = copy.deepcopy(model)
    set_gradients(model, 0)
    last = list(model.parameters())[-1]
    assert last.grad is not None
    last.grad.mul_(1e30)
    with pytest.raises(NonFiniteError, match="too large to square"):
        optimizer.step()
    assert_equal_state(model, before)


def test_large_gradients_of_both_signs_are_fine() -> None:
    model = make_model(8)
    optimizer = AdamW(model.named_parameters(), lr=1e-3)
    for parameter in model.parameters():
        parameter.grad = torch.full(parameter.shape, 1e15)
        parameter.grad.view(-1)[::2] = -1e15
    optimizer.step()
    assert all(p.dequantize().isfinite().all() for p in model.parameters())
