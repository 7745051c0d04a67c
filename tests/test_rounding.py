"""Every rounding keeps its contract exactly: over all random words the count of round-ups *is* what it says.

The contract of stochastic rounding, for a displacement d in grid steps and a random word r of b bits:
move = sign(d) * (floor|d| + [r < floor(2**b * frac|d|)]). At a small b every word can be tried.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dqt.numerics.rounding import (
    BIAS,
    MAX_MOVE,
    ROUNDINGS,
    biased_rounding,
    golden_sequence,
    low_discrepancy_rounding,
    nearest_rounding,
    noise_rounding,
    stochastic_rounding,
    threshold_rounding,
)
from dqt.optim.threshold import LearnedThreshold


def noise_count(numerator: int, words: int) -> int:
    """Pairs of halves whose sum reaches twice the half's range times what is missing: two triangles."""
    half = math.isqrt(words)
    least = math.ceil(2 * half * (words - numerator) / words)
    return sum(1 for a in range(half) for b in range(half) if a + b >= least)


def biased_count(numerator: int, words: int) -> int:
    return min(words, numerator + int(BIAS * words)) if numerator else 0


COUNTS = [  # rounding, bits of a word, how many of all words round up a fraction of numerator / words
    *((stochastic_rounding, bits, lambda numerator, words: numerator) for bits in (1, 4, 8)),
    *((low_discrepancy_rounding, bits, lambda numerator, words: numerator) for bits in (1, 4, 8)),
    *((noise_rounding, bits, noise_count) for bits in (4, 8)),
    *((biased_rounding, bits, biased_count) for bits in (7, 8, 9)),
]


@pytest.mark.parametrize(("rounding", "word_bits", "count"), COUNTS)
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("whole", [0, 1, 5, 1000])
def test_the_count_of_round_ups_is_exact(
    rounding: Callable[..., torch.Tensor],
    word_bits: int,
    count: Callable[[int, int], int],
    sign: int,
    whole: int,
) -> None:
    words = 2**word_bits
    displacement = sign * (whole + torch.arange(words).float() / words)
    every_word = torch.arange(words).expand(words, words)
    moves = rounding(displacement[:, None].expand(words, words), every_word, word_bits)
    beyond = sign * moves - whole
    assert ((beyond == 0) | (beyond == 1)).all()
    assert beyond.sum(dim=1).tolist() == [count(numerator, words) for numerator in range(words)]


def test_noise_is_between_nearest_and_stochastic() -> None:
    """2 f² below a half and 1 - 2 (1 - f)² above, to what a word of 16 bits can tell."""
    fraction = torch.arange(0, 64).float() / 64
    words = torch.arange(2**16)
    moves = noise_rounding(fraction[:, None].expand(-1, 2**16), words.expand(64, -1), 16)
    expected = torch.where(fraction < 0.5, 2 * fraction**2, 1 - 2 * (1 - fraction) ** 2)
    assert (moves.float().mean(1) - expected).abs().max() < 2 / 2**8


@given(st.floats(-1000, 1000, width=32), st.floats(2**-10, 1.0, width=32))
def test_a_threshold_moves_what_reaches_it(displacement: float, threshold: float) -> None:
    magnitude = abs(displacement)
    expected = math.floor(magnitude) + (magnitude - math.floor(magnitude) >= threshold)
    moved = threshold_rounding(torch.tensor([displacement]), threshold).item()
    assert moved == math.copysign(expected, displacement)


@pytest.mark.parametrize("size", [0.01, 0.3, 3.0])
def test_a_learned_threshold_becomes_unbiased_over_the_tensor(size: float) -> None:
    state: dict[str, float] = {}
    generator = torch.Generator().manual_seed(1)
    moved = wanted = 0.0
    for step in range(400):
        rounding = LearnedThreshold(state)
        for _ in range(2):  # blocks of one parameter
            displacement = torch.randn(2000, generator=generator) * size
            steps = rounding(displacement)
            if step >= 200:
                moved, wanted = moved + float(steps.abs().sum()), wanted + float(displacement.abs().sum())
        rounding.finish()
    assert moved == pytest.approx(wanted, rel=0.1)  # it swings by a sixteenth
    assert 0 < state["threshold"] <= 1


@given(st.integers(0, 2**32 - 1), st.floats(-3, 3, width=32), st.integers(1, 2**32 - 1))
def test_low_discrepancy_gives_back_what_it_keeps(first: int, displacement: float, step: int) -> None:
    """In 1,000 steps moves add up to a constant displacement within 3; SR's are 16 away, root mean square."""
    words = torch.stack([golden_sequence(torch.tensor(first), (step + i) % 2**32) for i in range(1000)])
    moves = low_discrepancy_rounding(torch.tensor(displacement).expand(1000), words)
    due = torch.arange(1, 1001, dtype=torch.float64) * displacement
    assert (moves.cumsum(0) - due).abs().max() < 3


def test_a_golden_sequence_is_uniform_at_every_step() -> None:
    first = torch.arange(0, 2**32, 2**20)
    for step in (1, 2, 1000, 2**32 - 1):
        words = golden_sequence(first, step).sort().values
        assert (words.diff() == 2**20).all()
        assert 0 <= int(words[0]) < 2**20


def test_low_discrepancy_is_the_floor_of_the_sum() -> None:
    displacement = torch.tensor([0.25, -0.25, 1.75, -1.75, 0.0, -2.0])[:, None]
    words = torch.arange(0, 2**32, 2**16) + 2**15
    moves = low_discrepancy_rounding(displacement.expand(-1, len(words)), words.expand(6, -1))
    assert torch.equal(moves.double(), (displacement.double() + words.double() / 2**32).floor())


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
    moves = ROUNDINGS[name].steps(values, torch.zeros(2, dtype=torch.int64))
    assert moves.dtype == torch.int32
    assert moves.tolist() == [MAX_MOVE, -MAX_MOVE]


def test_the_displacement_is_left_as_it_was() -> None:
    values = torch.tensor([0.25, -3.5])
    for rounding in ROUNDINGS.values():
        rounding.steps(values, torch.zeros(2, dtype=torch.int64))
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
