"""Float8 rounding is exact: over all random words the round-ups are the fraction; Inf is never 448."""

from __future__ import annotations

import pytest
import torch

from dqt.numerics.float8 import E4M3, E5M2, LARGEST, quantize_float8, stochastic_e4m3

# Every e4m3 number from 0 to 448, in order.
NUMBERS = torch.arange(127, dtype=torch.uint8).view(E4M3).float()


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_count_of_round_ups_equals_the_fraction(sign: float) -> None:
    """Between each pair of neighbours, at every sixteenth of the way, over all words of 16 bits."""
    words = torch.arange(2**16)
    low, high = NUMBERS[:-1], NUMBERS[1:]
    for sixteenth in range(16):
        value = low + (high - low) * (sixteenth / 16)  # exact
        ups = torch.zeros(len(low), dtype=torch.int64)
        for chunk in words.split(2**13):
            rounded = sign * stochastic_e4m3(
                sign * value[:, None].expand(-1, len(chunk)), chunk.expand(len(low), -1)
            )
            assert ((rounded == low[:, None]) | (rounded == high[:, None])).all()
            ups += (rounded == high[:, None]).sum(1)
        assert torch.equal(ups, torch.full_like(ups, sixteenth * 2**12))


def test_what_is_an_e4m3_number_stays() -> None:
    for words in (torch.zeros(127, dtype=torch.int64), torch.full((127,), 2**16 - 1)):
        assert torch.equal(stochastic_e4m3(NUMBERS, words), NUMBERS)
        assert torch.equal(stochastic_e4m3(NUMBERS, words).to(E4M3).float(), NUMBERS)


@pytest.mark.parametrize("dtype", [E4M3, E5M2], ids=str)
def test_rows_reach_the_largest_number_and_round_to_nearest(dtype: torch.dtype) -> None:
    x = torch.randn(5, 300, generator=torch.Generator().manual_seed(1)) * torch.logspace(-20, 20, 5)[:, None]
    codes, scale = quantize_float8(x, dtype)
    assert codes.dtype == dtype
    assert torch.equal(codes.float().abs().amax(1), torch.full((5,), LARGEST[dtype]))
    relative = {E4M3: 2**-4, E5M2: 2**-3}[dtype]
    smallest = {E4M3: 2**-10, E5M2: 2**-17}[dtype]
    error = (codes.float() - x / scale[:, None]).abs()
    assert (error <= (x / scale[:, None]).abs() * relative + smallest).all()


@pytest.mark.parametrize("dtype", [E4M3, E5M2], ids=str)
@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
def test_what_is_not_finite_is_a_nan_scale(dtype: torch.dtype, bad: float) -> None:
    x = torch.ones(3, 4)
    x[1, 2] = bad
    x[2] = 0.0
    codes, scale = quantize_float8(x, dtype)
    values = codes.float() * scale[:, None]
    assert values[1].isnan().all()
    assert torch.equal(values[0], torch.ones(4))
    assert torch.equal(values[2], torch.zeros(4))


def test_an_empty_tensor() -> None:
    codes, scale = quantize_float8(torch.zeros(0, 4), E4M3)
    assert (codes.shape, scale.shape) == ((0, 4), (0,))
