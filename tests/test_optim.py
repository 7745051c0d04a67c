"""The optimizers as torch optimizers: the ordinary rule on floats, state that survives, order and blocks that
do not matter, refusals, and telemetry."""

from __future__ import annotations

import copy
import functools
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.optimization import Adafactor as HuggingFaceAdafactor

import dqt
from dqt.errors import ConfigError, NonFiniteError
from dqt.optim import SGD, Adafactor, AdamW, PaperAdamW
from dqt.optim.base import QuantizedOptimizer
from dqt.optim.writeback import read_residual
from dqt.tensor import QuantizedTensor


def make_model(bits: str | int = "ternary", **settings: Any) -> nn.Sequential:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(10, 12), nn.LayerNorm(12), nn.Linear(12, 9, bias=False))
    dqt.quantize_(model, bits, **settings)
    return model


def set_gradients(model: nn.Module, step: int) -> None:
    """The same gradients for equally named parameters, whatever their order."""
    for name, parameter in model.named_parameters():
        generator = torch.Generator().manual_seed(1000 * step + sum(name.encode()))
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def run(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        set_gradients(model, step)
        optimizer.step()


def assert_equal_state(model: nn.Module, other: nn.Module) -> None:
    ours, theirs = model.state_dict(), other.state_dict()
    assert list(ours) == list(theirs)
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name


def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)  # type: ignore[no-any-return]


# -- float parameters ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("beta1", [0.0, 0.9])
def test_float_parameters_follow_torch(beta1: float, weight_decay: float) -> None:
    ours = nn.ParameterDict(
        {"a": torch.randn(5, 7), "b": torch.randn(4), "c": torch.randn(2, 3, 4), "d": torch.randn(())}
    )
    theirs = copy.deepcopy(ours)
    settings = {"lr": 0.03, "betas": (beta1, 0.95), "eps": 1e-6, "weight_decay": weight_decay}
    pair = (AdamW(ours.named_parameters(), **settings), torch.optim.AdamW(theirs.parameters(), **settings))  # type: ignore[arg-type]
    for step in range(10):
        for model, optimizer in zip((ours, theirs), pair, strict=True):
            run(model, optimizer, range(step, step + 1))
        for name in ours:
            torch.testing.assert_close(ours[name], theirs[name], rtol=2e-6, atol=2e-7)


# Ours, the published implementation, and how far float parameters may be apart after ten steps.
PUBLISHED: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any], float]] = {
    "Adafactor, relative step": (Adafactor, HuggingFaceAdafactor, 1e-6),
    "Adafactor, momentum": (
        functools.partial(Adafactor, lr=0.05, beta1=0.9, weight_decay=0.1, scale_parameter=False),
        functools.partial(
            HuggingFaceAdafactor,
            lr=0.05,
            beta1=0.9,
            weight_decay=0.1,
            scale_parameter=False,
            relative_step=False,
        ),
        1e-6,
    ),
    "SGD, momentum": (
        functools.partial(SGD, lr=0.05, momentum=0.9),
        functools.partial(torch.optim.SGD, lr=0.05, momentum=0.9),
        1e-6,
    ),
    "SGD, decay": (
        functools.partial(SGD, lr=0.05, weight_decay=0.1),
        functools.partial(torch.optim.SGD, lr=0.05, weight_decay=0.1),
        1e-6,
    ),
    "AdamW, bf16 and int8": (
        functools.partial(AdamW, lr=0.05, first_moment="bf16", second_moment="int8"),
        functools.partial(torch.optim.AdamW, lr=0.05, betas=(0.9, 0.95), weight_decay=0.0),
        5e-3,
    ),
    "AdamW, int8 and int8": (
        functools.partial(AdamW, lr=0.05, first_moment="int8", second_moment="int8"),
        functools.partial(torch.optim.AdamW, lr=0.05, betas=(0.9, 0.95), weight_decay=0.0),
        1e-2,
    ),
}


@pytest.mark.parametrize("case", PUBLISHED)
def test_float_parameters_follow_the_published_optimizers(case: str) -> None:
    make_ours, make_theirs, bound = PUBLISHED[case]
    torch.manual_seed(0)
    ours = nn.ParameterDict({"a": torch.randn(5, 7), "b": torch.randn(4), "c": torch.randn(4, 6)})
    theirs = copy.deepcopy(ours)
    pair = (make_ours(ours.named_parameters()), make_theirs(theirs.parameters()))
    for model, optimizer in zip((ours, theirs), pair, strict=True):
        run(model, optimizer, range(10))
    for name in ours:
        assert (ours[name] - theirs[name]).abs().max() <= bound * theirs[name].abs().max(), name


def test_groups_have_their_own_settings_and_schedulers_work() -> None:
    model = make_model()
    named = list(model.named_parameters())
    optimizer = AdamW(
        [{"params": named[:2]}, {"params": named[2:], "lr": 0.5, "betas": (0.5, 0.5), "weight_decay": 0.1}],
        lr=0.1,
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    run(model, optimizer, range(1))
    scheduler.step()
    assert [group["lr"] for group in optimizer.param_groups] == [0.05, 0.25]
    assert "exp_avg" in optimizer.state[model[2].weight]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.0, 0.1]


def test_a_closure_is_called_with_gradients() -> None:
    model = make_model()
    optimizer = AdamW(model.named_parameters())

    def closure() -> Tensor:
        loss: Tensor = model(torch.ones(2, 10)).square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) > 0


def test_parameters_without_a_gradient_are_left_alone() -> None:
    model = make_model()
    before = copy.deepcopy(model)
    optimizer = AdamW(model.named_parameters(), lr=1.0)
    optimizer.step()
    assert_equal_state(model, before)
    assert not optimizer.state


def test_a_step_between_forward_and_backward_is_an_error() -> None:
    model = make_model()
    optimizer = AdamW(model.named_parameters(), lr=0.1)
    loss = model(torch.randn(3, 10)).sum()
    run(model, optimizer, range(1))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# -- results that do not depend on how they are computed -----------------------------------------------------

Builder = Callable[[nn.Module], QuantizedOptimizer]
OPTIMIZERS: dict[str, tuple[str, dict[str, Any]]] = {
    "strict": ("8", {"residual_bits": 0}),
    "strict binary, no momentum": ("1", {"residual_bits": 0, "betas": (0.0, 0.95)}),
    "residual": ("ternary", {"residual_bits": 8}),
    "residual, factored": ("4", {"residual_bits": 8, "second_moment": "factored", "betas": (0.0, 0.95)}),
    "residual of 3 bits": ("3", {"residual_bits": 3, "weight_decay": 0.1}),
    "residual of 16 bits": ("2", {"residual_bits": 16}),
    "nearest": ("5", {"residual_bits": 8, "rounding": "nearest"}),
    "int8 moments": ("8", {"residual_bits": 0, "first_moment": "int8", "second_moment": "int8"}),
    "bf16 first moment": ("4", {"residual_bits": 8, "first_moment": "bf16", "second_moment": "factored"}),
    "SGD": ("8", {"optimizer": SGD, "residual_bits": 0, "momentum": 0.9, "lr": 0.02}),
    "Adafactor": ("8", {"optimizer": Adafactor, "residual_bits": 0, "beta1": 0.9, "lr": 0.5}),
}
CASES = [*OPTIMIZERS, "paper"]


def build(case: str, model: nn.Module, named: Any = None, seed: int = 5) -> QuantizedOptimizer:
    named = model.named_parameters() if named is None else named
    if case == "paper":
        return PaperAdamW(named, lr=0.02, seed=seed)
    settings = {"optimizer": AdamW, "lr": 0.02, **OPTIMIZERS[case][1]}
    optimizer: QuantizedOptimizer = settings.pop("optimizer")(named, seed=seed, **settings)
    return optimizer


def model_of(case: str) -> nn.Module:
    if case == "paper":
        torch.manual_seed(3)
        model = nn.Sequential(nn.Linear(10, 12, bias=False), nn.Linear(12, 9, bias=False))
        dqt.quantize_(model, 4, {"*": 4}, scale_rule="paper")
        return model
    return make_model(OPTIMIZERS[case][0])


@pytest.mark.parametrize("case", CASES)
def test_a_round_trip_in_mid_run_is_bitwise(case: str) -> None:
    model = model_of(case)
    optimizer = build(case, model)
    run(model, optimizer, range(3))
    saved_model, saved_state = through_a_file(model.state_dict()), through_a_file(optimizer.state_dict())
    run(model, optimizer, range(3, 6))

    other = model_of(case)
    other.load_state_dict(saved_model)
    resumed = build(case, other, seed=99)  # settings come from the state
    resumed.load_state_dict(saved_state)
    before = copy.deepcopy(saved_state)
    run(other, resumed, range(3, 6))
    assert_equal_state(model, other)
    ours, theirs = optimizer.state_dict(), resumed.state_dict()
    assert ours["param_groups"] == theirs["param_groups"]
    for index, state in ours["state"].items():
        assert state.keys() == theirs["state"][index].keys()
        for key, value in state.items():
            if isinstance(value, Tensor):
                assert value.dtype == theirs["state"][index][key].dtype
                assert torch.equal(value, theirs["state"][index][key]), key
            else:
                assert value == theirs["state"][index][key] == 6
    # Loading copies: training on did not change what was loaded.
    for index, state in before["state"].items():
        assert all(
            torch.equal(v, saved_state["state"][index][k]) for k, v in state.items() if isinstance(v, Tensor)
        )


@pytest.mark.parametrize(("residual_bits", "dtype"), [(8, torch.uint8), (3, torch.uint8), (16, torch.int16)])
def test_integer_state_stays_integer(residual_bits: int, dtype: torch.dtype) -> None:
    model = make_model()
    optimizer = AdamW(model.named_parameters(), residual_bits=residual_bits)
    run(model, optimizer, range(1))
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.state[model[0].weight]["residual"].dtype == dtype
    assert optimizer.state[model[0].weight]["step"] == 1


@pytest.mark.parametrize("case", CASES)
def test_neither_blocks_nor_order_nor_wrappers_change_a_result(
    case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = []
    for blocks, order, prefix in ((2**16, 1, ""), (7, 1, ""), (40, -1, "module._orig_mod.")):
        monkeypatch.setattr("dqt.optim.step.BLOCK_ELEMENTS", blocks)
        monkeypatch.setattr("dqt.optim.fused.update", lambda *args: False)
        model = model_of(case)
        named = [(prefix + name, parameter) for name, parameter in model.named_parameters()][::order]
        run(model, build(case, model, named), range(4))
        results.append(model)
    assert_equal_state(results[0], results[1])
    assert_equal_state(results[0], results[2])


@pytest.mark.parametrize("case", [case for case in CASES if case != "nearest"])
def test_the_seed_changes_the_rounding(case: str) -> None:
    codes = []
    for seed in (0, 0, 1):
        model = model_of(case)
        run(model, build(case, model, seed=seed), range(4))
        codes.append(model[0].weight.codes)  # type: ignore[index, union-attr]
    assert torch.equal(codes[0], codes[1])
    if OPTIMIZERS.get(case, ("", {"residual_bits": 0}))[1]["residual_bits"] == 0:
        assert not torch.equal(codes[0], codes[2])


def test_weights_with_different_names_round_independently() -> None:
    flips = []
    for name in ("a", "b"):
        model = nn.ModuleDict({name: nn.Linear(20, 20, bias=False)})
        with torch.no_grad():
            model[name].weight.copy_(torch.linspace(-1, 1, 400).view(20, 20))
        dqt.quantize_(model, 4)
        before = model[name].weight.unpack()
        model[name].weight.grad = torch.ones(20, 20)
        AdamW(model.named_parameters(), lr=0.5 * float(model[name].weight.scale), residual_bits=0).step()
        flips.append(model[name].weight.unpack() != before)
    assert 0.3 < (flips[0] != flips[1]).float().mean() < 0.7


# -- refusals ------------------------------------------------------------------------------------------------

REFUSED = [
    ({"lr": -1.0}, "lr=-1.0 must be finite"),
    ({"lr": float("nan")}, "lr=nan must be finite"),
    ({"lr": float("inf")}, "lr=inf must be finite"),
    ({"weight_decay": -0.1}, "weight_decay=-0.1"),
    ({"weight_decay": float("inf")}, "weight_decay=inf"),
    ({"betas": (1.0, 0.9)}, r"betas=\(1.0, 0.9\) must be in \[0, 1\)"),
    ({"betas": (0.9, -0.1)}, "betas"),
    ({"eps": 0.0}, "eps=0.0 must be positive"),
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


# -- telemetry -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", ["1", "ternary", "4"])
@pytest.mark.parametrize("k", [0, 8])
def test_telemetry(bits: str, k: int) -> None:
    model = make_model(bits)
    weights = [p for p in model.parameters() if isinstance(p, QuantizedTensor)]
    optimizer = AdamW(model.named_parameters(), lr=0.1, residual_bits=k)
    for step in range(3):
        before = torch.cat([w.unpack().flatten() for w in weights])
        run(model, optimizer, range(step, step + 1))
        after = torch.cat([w.unpack().flatten() for w in weights])
        fmt, n = weights[0].format, after.numel()
        spread = None
        if k:
            rest = [read_residual(optimizer.state[w]["residual"], k, w.shape[1]).flatten() for w in weights]
            spread = pytest.approx(float((torch.cat(rest).double() / 128).square().mean().sqrt()), rel=1e-6)
        assert optimizer.telemetry() == {
            "flip_rate": pytest.approx(int((before != after).sum()) / n),
            "saturated": pytest.approx(int(((after == fmt.qmin) | (after == fmt.qmax)).sum()) / n),
            "zeros": pytest.approx(0.0 if bits == "1" else int((after == 0).sum()) / n),
            "residual_spread": spread,
        }


def test_telemetry_can_be_switched_off_and_without_weights_is_zero() -> None:
    model = make_model()
    optimizer = AdamW(model.named_parameters(), lr=0.1)
    optimizer.collect_telemetry = False
    run(model, optimizer, range(1))
    assert optimizer.telemetry() == {
        "flip_rate": 0.0,
        "saturated": 0.0,
        "zeros": 0.0,
        "residual_spread": None,
    }


# -- what state takes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "bytes_a_weight"),
    [
        ({"betas": (0.9, 0.95), "residual_bits": 0}, 8.0),
        ({"betas": (0.0, 0.95), "residual_bits": 0}, 4.0),
        ({"betas": (0.0, 0.95), "residual_bits": 8, "second_moment": "factored"}, 1.0 + 8 / 64),
        ({"betas": (0.0, 0.95), "residual_bits": 4, "second_moment": "factored"}, 0.5 + 8 / 64),
    ],
)
def test_bytes_of_state(settings: dict[str, Any], bytes_a_weight: float) -> None:
    layer = nn.Linear(64, 64, bias=False)
    dqt.quantize_(layer, "ternary")
    optimizer = AdamW(layer.named_parameters(), **settings)
    run(layer, optimizer, range(1))
    state = optimizer.state[layer.weight]
    assert sum(v.nbytes for v in state.values() if isinstance(v, Tensor)) == bytes_a_weight * 64 * 64
