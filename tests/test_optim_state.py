"""State of the optimizers: it survives a file, takes the bytes it should, and does not depend on how a step
is computed; telemetry."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dqt
from dqt.optim import AdamW
from dqt.optim.writeback import read_residual
from dqt.tensor import QuantizedTensor
from optim_cases import (
    CASES,
    DRAWS_NOTHING,
    OPTIMIZERS,
    assert_equal_state,
    build,
    make_model,
    model_of,
    run,
    through_a_file,
)


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
                assert value == theirs["state"][index][key]
        assert state["step"] == 6
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


@pytest.mark.parametrize("case", [case for case in CASES if case not in DRAWS_NOTHING])
def test_the_seed_changes_the_rounding(case: str) -> None:
    codes = []
    for seed in (0, 0, 1):
        model = model_of(case)
        run(model, build(case, model, seed=seed), range(4))
        codes.append(model[0].weight.codes)  # type: ignore[index, union-attr]
    assert torch.equal(codes[0], codes[1])
    if OPTIMIZERS[case][1].get("residual_bits", 0) == 0:
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
        ({"first_moment": "none", "second_moment": "fp8", "residual_bits": 0}, 1.0 + 4 / 64),
        ({"first_moment": "fp8", "second_moment": "bf16", "residual_bits": 0}, 3.0 + 4 / 64),
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
