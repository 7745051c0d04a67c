"""What inspection counts, and that it finds float copies wherever they hide."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

import dqt
from dqt.inspection import bars, inspect_model
from dqt.tensor import QuantizedTensor

ALL_BITS = ("1", "ternary", *(str(n) for n in range(2, 9)))
STORED_BITS = {"ternary": 2} | {str(n): n for n in range(1, 9)}


def make_model(bits: str = "ternary") -> nn.Module:
    model = nn.Sequential(
        nn.Embedding(50, 64), nn.Linear(64, 96, bias=False), nn.LayerNorm(96), nn.Linear(96, 64)
    )
    dqt.quantize_(model, bits)
    return model


def weight_of(model: nn.Module) -> QuantizedTensor:
    weight = model[1].weight  # type: ignore[index]
    assert isinstance(weight, QuantizedTensor)
    return weight


@pytest.mark.parametrize("bits", ALL_BITS)
def test_counts_are_those_of_the_tensors(bits: str) -> None:
    model = make_model(bits)
    weight = weight_of(model)
    facts = next(facts for facts in inspect_model(model).tensors if facts.name == "1.weight")
    assert facts.format == bits
    assert facts.bytes == weight.codes.nbytes + 4
    assert facts.bits_per_weight == pytest.approx(STORED_BITS[bits] + 32 / weight.numel())
    assert facts.scale == pytest.approx(float(weight.scale))
    codes = weight.unpack()
    assert sum(facts.codes) == weight.numel()
    assert list(facts.codes) == [
        int((codes == c).sum()) for c in range(weight.format.qmin, weight.format.qmax + 1)
    ]
    ends = (codes == weight.format.qmin) | (codes == weight.format.qmax)
    assert facts.saturated == pytest.approx(float(ends.float().mean()))
    assert facts.zeros == (None if bits == "1" else pytest.approx(float((codes == 0).float().mean())))


def test_floats_and_totals() -> None:
    inspection = inspect_model(make_model())
    by_name = {facts.name: facts for facts in inspection.tensors}
    assert by_name["0.weight"].bits_per_weight == 32
    assert by_name["0.weight"].codes == ()
    content = inspection.to_dict()
    assert content["all"]["bytes"] == sum(facts.bytes for facts in inspection.tensors)
    assert content["quantized"]["tensors"] == 2
    assert content["quantized"]["bits_per_weight"] == pytest.approx(2, abs=0.02)
    assert content["float_copies"] == []


def test_a_tied_weight_counts_once() -> None:
    model = nn.ModuleList([nn.Linear(16, 16), nn.Linear(16, 16)])
    model[1].weight = model[0].weight
    dqt.quantize_(model, 4)
    assert sum(facts.name.endswith("weight") for facts in inspect_model(model).tensors) == 1


HIDING_PLACES: dict[str, Callable[[nn.Module, torch.Tensor], None]] = {
    "parameter": lambda module, copy: module.register_parameter("master", nn.Parameter(copy)),
    "buffer": lambda module, copy: module.register_buffer("master", copy),
    "attribute": lambda module, copy: setattr(module, "cache", copy),
    "container": lambda module, copy: setattr(module, "cache", {"key": [copy]}),
    "half precision": lambda module, copy: setattr(module, "cache", copy.bfloat16()),
    "transposed": lambda module, copy: setattr(module, "cache", copy.T.contiguous()),
    "flat and scaled": lambda module, copy: setattr(module, "cache", -3 * copy.flatten()),
    "with a remainder": lambda module, copy: setattr(
        module, "cache", copy + 0.3 * copy.std() * torch.randn(96, 64)
    ),
}


@pytest.mark.parametrize("place", HIDING_PLACES)
@pytest.mark.parametrize("bits", ["1", "ternary", "8"])
def test_a_float_copy_is_found(place: str, bits: str) -> None:
    model = make_model(bits)
    HIDING_PLACES[place](model[2], weight_of(model).dequantize())  # type: ignore[index]
    inspection = inspect_model(model)
    assert len(inspection.float_copies) == 1
    assert "1.weight" in inspection.float_copies[0]
    assert "FLOAT COPIES" in str(inspection)


def test_the_master_that_a_weight_was_rounded_from_is_found() -> None:
    linear = nn.Linear(64, 64)
    master = linear.weight.detach().clone()
    model = nn.Sequential(linear)
    dqt.quantize_(model, "ternary")
    model.master = master  # type: ignore[assignment]
    assert len(inspect_model(model).float_copies) == 1


def test_a_float_tensor_of_the_same_size_is_no_copy() -> None:
    model = make_model()
    model.other = nn.Parameter(torch.randn(96, 64))
    model.zero = torch.zeros(96, 64)  # type: ignore[assignment]
    inspection = inspect_model(model)
    assert inspection.float_copies == ()
    assert inspection.float_tensors_searched >= 2


def test_a_float_copy_in_a_file_is_found(tmp_path: Path) -> None:
    model = make_model()
    clean, dirty = tmp_path / "model.safetensors", tmp_path / "optimizer.safetensors"
    safetensors.torch.save_file(model.state_dict(), clean)
    safetensors.torch.save_file({"1.weight/master": weight_of(model).dequantize()}, dirty)
    assert inspect_model(model, [clean]).float_copies == ()
    (found,) = inspect_model(model, [clean, dirty]).float_copies
    assert "optimizer.safetensors 1.weight/master" in found


def test_text_shows_every_matrix_and_the_verdict() -> None:
    model = make_model("4")
    inspection = inspect_model(model)
    text = str(inspection)
    assert all(name in text for name in ("0.weight", "1.weight", "3.weight"))
    assert all(bars(facts.codes).rstrip() in text for facts in inspection.quantized)
    assert "no float copy" in text
    assert "float32 takes" in text
    assert "no low-bit weights" in str(inspect_model(nn.Linear(4, 4)))


@pytest.mark.parametrize(
    ("counts", "drawn"),
    [((), ""), ((0, 0), "  "), ((1, 1000), "▁█"), ((5, 10, 5), "▄█▄"), ((1,) * 256, "█" * 16)],
)
def test_bars(counts: tuple[int, ...], drawn: str) -> None:
    assert bars(counts) == drawn
