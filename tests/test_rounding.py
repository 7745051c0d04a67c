"""Stochastic rounding is exact: over all random words the count of round-ups *is* the fraction.

The contract, for a displacement d in grid steps and a random word r of b bits:
move = sign(d) * (floor|d| + [r < floor(2**b * frac|d|)]). At a small b every word can be tried.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dqt.numerics.rounding import MAX_MOVE, ROUNDINGS, nearest_rounding, stochastic_rounding


@pytest.mark.parametrize("word_bits", [1, 4, 8])
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("whole", [0, 1, 5, 1000])
def test_the_count_of_round_ups_equals_the_fraction(word_bits: int, sign: int, whole: int) -> None:
    words = 2**word_bits
    numerators = torch.arange(words)
    displacement = sign * (whole + numerators.float() / words)
    every_word = torch.arange(words).expand(words, words)
    moves = stochastic_rounding(displacement[:, None].expand(words, words), every_word, word_bits)
    beyond = sign * moves - whole
    assert ((beyond == 0) | (beyond == 1)).all()
    assert torch.equal(beyond.sum(dim=1), numerators)


def test_values_on_the_grid_never_move_further() -> None:
    whole = torch.tensor([0.0, -0.0, 1.0, -1.0, 7.0, -100.0, 2.0**23])[:, None]
    words = torch.tensor([0, 1, 2**31, 2**32 - 1])
    moves = stochastic_rounding(whole.expand(-1, 4), words.expand(7, -1))
    assert torch.equal(moves.float(), whole.expand(-1, 4))


@given(st.floats(-2000, 2000, width=32))
def test_the_threshold_is_the_fraction_to_32_bits(displacement: float) -> None:
    """The number of words that round up is floor(2**32 * fraction), so the bias is below 2**-32."""
    fraction = abs(displacement) - math.floor(abs(displacement))
    ups = math.floor(fraction * 2**32)  # exact: Python floats hold 53 bits
    words = torch.tensor([word for word in (0, ups - 1, ups, 2**32 - 1) if 0 <= word < 2**32])
    moves = stochastic_rounding(torch.tensor(displacement).expand(len(words)), words)
    expected = [math.floor(abs(displacement)) + (word < ups) for word in words.tolist()]
    assert [abs(move) for move in moves.tolist()] == expected
    assert all(move == 0 or (move < 0) == (displacement < 0) for move in moves.tolist())


@pytest.mark.parametrize("name", list(ROUNDINGS))
@pytest.mark.parametrize("displacement", [1e9, 3e38, 2.0**24 + 2])
def test_huge_displacements_are_clamped_and_keep_their_sign(name: str, displacement: float) -> None:
    values = torch.tensor([displacement, -displacement])
    moves = ROUNDINGS[name](values, torch.zeros(2, dtype=torch.int64))
    assert moves.dtype == torch.int32
    assert moves.tolist() == [MAX_MOVE, -MAX_MOVE]


def test_the_displacement_is_left_as_it_was() -> None:
    values = torch.tensor([0.25, -3.5])
    for rounding in ROUNDINGS.values():
        rounding(values, torch.zeros(2, dtype=torch.int64))
        assert values.tolist() == [0.25, -3.5]


@given(st.floats(-1000, 1000, width=32))
def test_nearest(displacement: float) -> None:
    expected = math.copysign(math.floor(abs(displacement) + 0.5), displacement)
    assert nearest_rounding(torch.tensor([displacement])).item() == expected


def test_a_small_displacement_is_kept_on_average() -> None:
    """1e-6 of a step is lost by `floor(100 + d + rand)` in float32; here it moves one weight in a million."""
    words = torch.arange(0, 2**32, 2**12)  # every 4096th word
    moves = stochastic_rounding(torch.full((len(words),), 1e-5), words)
    assert int(moves.sum()) == math.ceil(math.floor(float(torch.tensor(1e-5)) * 2**32) / 2**12)
