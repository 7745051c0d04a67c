"""Formats are what the names promise; packing is the documented little-endian bit stream, without loss."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dqt.errors import ConfigError
from dqt.numerics.formats import FORMATS, Format, parse_bits
from dqt.numerics.packing import pack, unpack
from dqt.sizes import packed_size

# name, bits, smallest and largest value in grid steps, levels
TABLE = [
    ("1", 1, -0.5, 0.5, 2),
    ("ternary", 2, -1, 1, 3),
    ("2", 2, -2, 1, 4),
    ("3", 3, -4, 3, 8),
    ("4", 4, -8, 7, 16),
    ("5", 5, -16, 15, 32),
    ("6", 6, -32, 31, 64),
    ("7", 7, -64, 63, 128),
    ("8", 8, -128, 127, 256),
]


@pytest.mark.parametrize(("name", "bits", "low", "high", "levels"), TABLE)
def test_formats(name: str, bits: int, low: float, high: float, levels: int) -> None:
    fmt = parse_bits(name)
    assert (fmt.bits, fmt.qmin - fmt.offset, fmt.qmax - fmt.offset, fmt.levels) == (bits, low, high, levels)
    assert fmt.half_range == high
    assert ((low * fmt.product_factor) % 1, (high * fmt.product_factor) % 1) == (0, 0)
    assert parse_bits(fmt) is fmt
    assert parse_bits(f" {name.upper()} ") is fmt


def test_the_table_is_complete() -> None:
    assert [row[0] for row in TABLE] == list(FORMATS)
    assert all(parse_bits(n).bits == n for n in range(1, 9))


@pytest.mark.parametrize("bits", [0, 9, -1, "16", "", "two", None, True, 2.5, "tenary"])
def test_unknown_bits_are_refused_with_the_valid_names(bits: object) -> None:
    with pytest.raises(ConfigError, match=r"unknown bits.*valid: 1, ternary, 2"):
        parse_bits(bits)  # type: ignore[arg-type]


def test_a_misspelt_name_gets_the_nearest_one() -> None:
    with pytest.raises(ConfigError, match="did you mean 'ternary'"):
        parse_bits("tenary")


def bit_stream(row: list[int], bits: int) -> bytes:
    """The documented layout, in Python integers: value i takes the bits [i*n, (i+1)*n)."""
    number = sum((value % 2**bits) << (bits * i) for i, value in enumerate(row))
    return number.to_bytes(-(-len(row) * bits // 8), "little")


@st.composite
def values_of_a_format(draw: st.DrawFn) -> tuple[Format, torch.Tensor]:
    fmt = draw(st.sampled_from(list(FORMATS.values())))
    shape = (*draw(st.lists(st.integers(0, 5), max_size=3)), draw(st.integers(0, 35)))
    seed = draw(st.integers(0, 2**31))
    values = np.random.default_rng(seed).integers(fmt.qmin, fmt.qmax + 1, shape)
    return fmt, torch.from_numpy(values)


@given(values_of_a_format(), st.sampled_from([torch.int64, torch.int32, torch.int16]))
def test_round_trip_size_and_layout(case: tuple[Format, torch.Tensor], dtype: torch.dtype) -> None:
    fmt, values = case
    packed = pack(values.to(dtype), fmt.bits)
    assert packed.dtype == torch.uint8
    assert packed.is_contiguous()
    assert packed.shape == (*values.shape[:-1], packed_size(values.shape[-1], fmt.bits))
    restored = unpack(packed, fmt.bits, values.shape[-1], fmt.signed)
    assert restored.dtype == torch.int8
    assert torch.equal(restored, values.to(torch.int8))
    # A 0 in the shape leaves no row to compare.
    if values.numel():
        rows = zip(values.reshape(-1, values.shape[-1]), packed.reshape(-1, packed.shape[-1]), strict=True)
        for row, data in rows:
            assert bytes(data.tolist()) == bit_stream(row.tolist(), fmt.bits)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("signed", [True, False])
def test_every_value_at_every_place_of_a_group(bits: int, signed: bool) -> None:
    low = -(2 ** (bits - 1)) if signed else 0
    line = torch.arange(low, low + 2**bits)
    values = torch.stack([line.roll(shift) for shift in range(8)])
    restored = unpack(pack(values, bits), bits, values.shape[1], signed)
    assert torch.equal(restored.to(torch.int64), values)


@pytest.mark.parametrize("bits", range(1, 9))
def test_non_contiguous_values_pack_as_their_copies(bits: int) -> None:
    values = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (13, 11))
    assert torch.equal(pack(values.T, bits), pack(values.T.contiguous(), bits))
    packed = pack(values, bits)
    assert torch.equal(unpack(packed[3:7], bits, 11, signed=True), values[3:7].to(torch.int8))


def test_only_the_low_bits_are_kept_and_the_padding_is_zero() -> None:
    assert pack(torch.tensor([0b1011, 0b111]), 2).tolist() == [0b1111]
    assert pack(torch.full((3,), -1), 5).tolist() == [0xFF, 0x7F]
