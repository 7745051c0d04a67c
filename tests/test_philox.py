"""Philox equals the published vectors, and its numbers depend on the key and the element index alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dqt.errors import ConfigError
from dqt.numerics.philox import MAX_ELEMENTS, Purpose, canonical_name, philox4x32, random_uint32, stream_of

# Random123's kat_vectors, philox4x32 with 10 rounds: counter, key, output.
ONES = 0xFFFFFFFF
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ONES, ONES, ONES, ONES), (ONES, ONES), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_known_answers(counter: tuple[int, ...], key: tuple[int, int], expected: tuple[int, ...]) -> None:
    words = philox4x32(tuple(torch.tensor([word]) for word in counter), key)  # type: ignore[arg-type]
    assert tuple(int(word) for word in words) == expected


def test_the_counter_layout() -> None:
    """Element 4 * c0 + lane of the whole tensor; step in c1, stream in (c2, c3), purpose in the key."""
    stream, step, seed = 0x0370734413198A2E, 0x85A308D3, 0xA4093822
    numbers = random_uint32(seed, 0x299F31D0, stream, step, 4 * 7, 4)
    counter = (7, step, stream & ONES, stream >> 32)
    expected = philox4x32(tuple(torch.tensor([word]) for word in counter), (seed, 0x299F31D0))  # type: ignore[arg-type]
    assert torch.equal(numbers, torch.cat(expected))


@given(st.integers(0, 200), st.integers(0, 60))
def test_a_slice_is_the_slice_of_the_whole(start: int, count: int) -> None:
    whole = random_uint32(1, Purpose.UPDATE, 12345, 6, 0, 300)
    assert torch.equal(random_uint32(1, Purpose.UPDATE, 12345, 6, start, count), whole[start : start + count])


def test_every_word_of_the_key_changes_the_numbers() -> None:
    base = {
        "seed": 1,
        "purpose": 0,
        "stream": stream_of("layers.0.weight"),
        "step": 1,
        "start": 0,
        "count": 16,
    }
    changes = [
        {},
        {"seed": 2},
        {"purpose": Purpose.BACKWARD},
        {"step": 2},
        {"stream": stream_of("layers.1.weight")},
        {"stream": base["stream"] ^ (1 << 63)},
        {"start": 16},
    ]
    draws = [tuple(random_uint32(**{**base, **change}).tolist()) for change in changes]
    assert len({number for draw in draws for number in draw}) == 16 * len(changes)


def test_the_numbers_are_uniform() -> None:
    numbers = random_uint32(0, Purpose.UPDATE, stream_of("w"), 1, 0, 1 << 16)
    assert numbers.dtype == torch.int64
    assert 0 <= int(numbers.min()) < int(numbers.max()) < 2**32
    counts = np.bincount((numbers >> 24).numpy(), minlength=256)
    chi_square = float(((counts - 256) ** 2 / 256).sum())
    assert 175 < chi_square < 350  # 255 degrees of freedom: 4 standard deviations
    for bit in range(32):
        ones = int((numbers >> bit & 1).sum())
        assert abs(ones - 2**15) < 4 * 2**7  # 4 standard deviations


@pytest.mark.parametrize("name", ["seed", "purpose", "step"])
@pytest.mark.parametrize("word", [-1, 2**32])
def test_words_out_of_range_are_refused(name: str, word: int) -> None:
    arguments = {"seed": 0, "purpose": 0, "stream": 0, "step": 0, "start": 0, "count": 4, name: word}
    with pytest.raises(ConfigError, match=f"{name} {word} is out of range"):
        random_uint32(**arguments)


def test_a_tensor_of_too_many_elements_is_refused() -> None:
    last = random_uint32(0, 0, 0, 0, MAX_ELEMENTS - 2, 2)
    assert last.shape == (2,)
    with pytest.raises(ConfigError, match=r"limit is 2\*\*34"):
        random_uint32(0, 0, 0, 0, MAX_ELEMENTS - 2, 3)
    with pytest.raises(ConfigError):
        random_uint32(0, 0, 0, 0, -1, 3)


@pytest.mark.parametrize(
    "wrapped",
    [
        "module.model.layers.0.weight",
        "_orig_mod.model.layers.0.weight",
        "module._orig_mod.model._fsdp_wrapped_module.layers.0.weight",
        "model.layers.0._checkpoint_wrapped_module.weight",
    ],
)
def test_wrapper_prefixes_play_no_part(wrapped: str) -> None:
    assert canonical_name(wrapped) == "model.layers.0.weight"
    assert stream_of(wrapped) == stream_of("model.layers.0.weight") < 2**64


@pytest.mark.parametrize("name", ["model.submodule.weight", "my_orig_mod.weight"])
def test_a_name_that_only_ends_like_a_wrapper_is_kept(name: str) -> None:
    assert canonical_name(name) == name
