"""Blocks hold what the codes are, to the bit, for every format and scale."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch

from dqt.export.blocks import BLOCK_TYPES, block_type, to_blocks
from dqt.export.hf import pack_ternary
from dqt.numerics.formats import FORMATS
from dqt.tensor import QuantizedTensor

OWN = {"1": "Q1_0", "ternary": "TQ2_0", "2": "TQ2_0", "3": "Q4_0", "4": "Q4_0"}


def decode(kind: str, blocks: np.ndarray) -> np.ndarray:
    """The floats of blocks, by llama.cpp's own Python package, which lacks one type."""
    if kind != "Q1_0":
        return gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[kind])
    parts = blocks.reshape(len(blocks), -1, 18)
    d = parts[..., :2].copy().view(np.float16).astype(np.float32)
    bits = np.unpackbits(parts[..., 2:], axis=-1, bitorder="little")
    return np.where(bits, d, -d).reshape(len(blocks), -1)


@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("bits", FORMATS)
def test_a_weight_is_the_same_in_blocks(bits: str, per_row: bool) -> None:
    format = FORMATS[bits]
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(format.qmin, format.qmax + 1, (6, 512), generator=generator)
    codes[0, :2] = torch.tensor([format.qmin, format.qmax])
    scale = torch.rand((6, 1) if per_row else (), generator=generator).half().float() + 2**-10
    scale = scale.half().float()
    weight = QuantizedTensor.from_float((codes - format.offset) * scale, scale, format)
    assert torch.equal(weight.unpack().to(codes), codes)
    integers, step = weight.product_codes()
    types = [kind for kind in BLOCK_TYPES if kind.orientation(format)]
    assert types[0].name == OWN.get(bits, "Q8_0")
    for kind in types:
        rows = step.flatten().expand(6).half().numpy()
        blocks = to_blocks(kind, format, integers.numpy(), rows)
        assert blocks.shape == (6, 512 // kind.block * kind.bytes)
        assert np.array_equal(decode(kind.name, blocks), weight.dequantize().numpy()), kind.name


@pytest.mark.parametrize(
    ("bits", "columns", "own", "any_type"),
    [
        ("ternary", 256, "TQ2_0", "TQ2_0"),
        ("ternary", 128, None, "Q4_0"),
        ("ternary", 100, None, None),
        ("1", 384, "Q1_0", "Q1_0"),
        ("1", 320, None, "Q4_0"),
        ("4", 32, "Q4_0", "Q4_0"),
        ("5", 96, "Q8_0", "Q8_0"),
    ],
)
def test_which_type_takes_a_row(bits: str, columns: int, own: str | None, any_type: str | None) -> None:
    found = [block_type(FORMATS[bits], columns, other) for other in (False, True)]
    assert [kind and kind.name for kind in found] == [own, any_type]


def test_ternary_packing_is_that_of_transformers() -> None:
    from transformers.integrations.bitnet import pack_weights, unpack_weights

    codes = torch.randint(-1, 2, (16, 5), generator=torch.Generator().manual_seed(0), dtype=torch.int8)
    packed = pack_ternary(codes)
    assert torch.equal(packed, pack_weights(codes.clone()))
    with torch.compiler.set_stance("force_eager"):
        assert torch.equal(unpack_weights(packed, torch.float32), codes.float())
