"""State dicts of low-bit models: plain tensors, and nothing is loaded that does not fit."""

from __future__ import annotations

import io
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import dqt


def make_model(per_row: bool = False) -> nn.Sequential:
    model = nn.Sequential(nn.Linear(6, 9), nn.LayerNorm(9), nn.Linear(9, 3, bias=False))
    dqt.quantize_(model, "ternary", per_row=per_row)
    return model


def test_a_state_dict_holds_plain_tensors_in_a_plain_file() -> None:
    model = make_model(per_row=True)
    state = model.state_dict()
    assert set(state) == {
        *(
            "0.weight.codes",
            "0.weight.scale",
            "0.bias",
            "1.weight",
            "1.bias",
            "2.weight.codes",
            "2.weight.scale",
        )
    }
    assert {type(value) for value in state.values()} == {Tensor}
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    other = make_model(per_row=True)
    assert str(other.load_state_dict(loaded)) == "<All keys matched successfully>"
    for name, value in other.state_dict().items():
        assert torch.equal(value, state[name]), name
    assert other[0].weight.codes.data_ptr() != loaded["0.weight.codes"].data_ptr()


def _without(*keys: str) -> Callable[[dict[str, Tensor]], None]:
    def change(state: dict[str, Tensor]) -> None:
        for key in keys:
            del state[key]

    return change


def _with(key: str, value: Tensor) -> Callable[[dict[str, Tensor]], None]:
    return lambda state: state.update({key: value})


# What is done to the state dict of Linear(6, 9) at ternary, and what the error says.
DAMAGE = {
    "codes missing": (_without("0.weight.codes"), "Missing key.*0.weight.codes"),
    "scale missing": (_without("2.weight.scale"), "Missing key.*2.weight.scale"),
    "both missing": (
        _without("0.weight.codes", "0.weight.scale"),
        "Missing key.*0.weight.codes.*0.weight.scale",
    ),
    "wrong shape": (
        _with("0.weight.codes", torch.zeros(8, 2, dtype=torch.uint8)),
        r"0.weight.codes is torch.uint8 \(8, 2\), the model's is torch.uint8 \(9, 2\)",
    ),
    "wrong dtype": (
        _with("0.weight.codes", torch.zeros(9, 2)),
        r"0.weight.codes is torch.float32 \(9, 2\), the model's is torch.uint8",
    ),
    "scale of another kind": (
        _with("0.weight.scale", torch.ones(9, 1)),
        r"0.weight.scale is torch.float32 \(9, 1\), the model's is torch.float32 \(\)",
    ),
    "the unused ternary pattern": (
        _with("0.weight.codes", torch.full((9, 2), 0b10, dtype=torch.uint8)),
        "0.weight.codes: codes outside of the ternary format",
    ),
    "scale of zero": (
        _with("0.weight.scale", torch.tensor(0.0)),
        "0.weight.scale must be finite and positive",
    ),
    "scale of NaN": (_with("0.weight.scale", torch.tensor(float("nan"))), "0.weight.scale must be finite"),
    "a float tensor": (
        _with("0.weight", torch.zeros(9, 6)),
        "0.weight is a float tensor, but the model's is ternary codes: quantize after loading",
    ),
}


@pytest.mark.parametrize("name", list(DAMAGE))
@pytest.mark.parametrize("strict", [True, False])
def test_a_state_dict_that_does_not_fit_changes_no_weight(name: str, strict: bool) -> None:
    damage, message = DAMAGE[name]
    model = make_model()
    codes = model[0].weight.codes.clone()
    state = make_model().state_dict()
    damage(state)
    if "missing" in name and not strict:
        result = model.load_state_dict(state, strict=False)
        assert all(key in str(result.missing_keys) for key in ("weight",))
    else:
        with pytest.raises(RuntimeError, match=f"(?s){message}"):
            model.load_state_dict(state, strict=strict)
    if name != "scale missing":
        assert torch.equal(model[0].weight.codes, codes)


def test_a_float_model_refuses_codes() -> None:
    with pytest.raises(RuntimeError, match=r"(?s)Missing key.*0.weight.*Unexpected key.*0.weight.codes"):
        nn.Sequential(nn.Linear(6, 9)).load_state_dict(nn.Sequential(*make_model()[:1]).state_dict())


def test_the_subclass_itself_is_not_pickled() -> None:
    with pytest.raises(TypeError, match=r"save model.state_dict\(\)"):
        torch.save(make_model(), io.BytesIO())
