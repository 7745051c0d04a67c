"""The sampler: every window once an epoch, a pure function of seed and index."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dqt.data.sampler import Sampler, fixed_windows
from dqt.data.shards import TokenShards
from dqt.errors import ConfigError, DataError

# (tokens, sequence length) with at least one window
SIZES = st.tuples(st.integers(1, 40), st.integers(1, 400)).map(lambda pair: (pair[0] + pair[1], pair[0]))


@given(SIZES, st.integers(0, 2**32 - 1), st.integers(0, 3))
def test_an_epoch_visits_every_window_once(size: tuple[int, int], seed: int, epoch: int) -> None:
    n_tokens, seq_len = size
    sampler = Sampler(n_tokens, seq_len, seed)
    first = epoch * sampler.windows
    starts = sorted(sampler.window(first + index) for index in range(sampler.windows))
    assert np.diff(starts).tolist() == [seq_len] * (sampler.windows - 1)
    assert starts[0] >= 0
    assert starts[-1] + seq_len + 1 <= n_tokens
    assert n_tokens - sampler.windows * seq_len <= 2 * seq_len  # tokens left out


@given(SIZES, st.lists(st.integers(0, 2000), min_size=1, max_size=30))
def test_a_sample_depends_on_its_index_alone(size: tuple[int, int], indices: list[int]) -> None:
    in_any_order = Sampler(*size, seed=7)
    assert [in_any_order.window(i) for i in indices] == [Sampler(*size, seed=7).window(i) for i in indices]


def test_order_and_offset_differ_between_epochs_and_seeds() -> None:
    def epoch_starts(seed: int, epoch: int) -> list[int]:
        sampler = Sampler(10_000, 50, seed)
        return [sampler.window(epoch * sampler.windows + index) for index in range(sampler.windows)]

    orders = [epoch_starts(*pair) for pair in ((0, 0), (0, 1), (1, 0))]
    assert len({tuple(order) for order in orders}) == 3
    assert len({min(order) for order in orders}) == 3
    assert all(order != sorted(order) for order in orders)


def test_every_token_is_reached_by_some_epoch() -> None:
    sampler = Sampler(100, 9, seed=3)
    targets = {sampler.window(i) + k for i in range(60 * sampler.windows) for k in range(1, 10)}
    assert targets == set(range(1, 100))


def test_batch_reads_inputs_and_one_target_more() -> None:
    shards = TokenShards(np.arange(1000, dtype=np.uint16))
    sampler = Sampler(len(shards), 16, seed=0)
    batch = sampler.batch(shards, first_sample=sampler.windows - 2, batch_size=4)  # across two epochs
    assert (batch.shape, batch.dtype) == ((4, 17), torch.int64)
    assert (batch.diff(dim=1) == 1).all()
    starts = [sampler.window(sampler.windows - 2 + index) for index in range(4)]
    assert batch[:, 0].tolist() == starts
    assert torch.equal(batch[2:], sampler.batch(shards, sampler.windows, 2))


@given(SIZES, st.integers(1, 60))
def test_fixed_windows_are_even_and_do_not_overlap(size: tuple[int, int], count: int) -> None:
    n_tokens, seq_len = size
    starts = fixed_windows(n_tokens, seq_len, count)
    assert len(starts) == min(count, (n_tokens - 1) // seq_len)
    assert starts[0] == 0
    assert starts[-1] + seq_len + 1 <= n_tokens
    gaps = np.diff(starts)
    assert (gaps >= seq_len).all()
    assert len(gaps) == 0 or gaps.max() - gaps.min() <= 1


@pytest.mark.parametrize(
    ("n_tokens", "seq_len", "error", "message"),
    [
        (100, 0, ConfigError, "at least 1, not 0"),
        (100, 100, DataError, "100 tokens for a sequence length of 100: .* length of 99 or less"),
        (1, 1, DataError, "too little text: 1 tokens for a sequence length of 1: give more$"),
    ],
)
def test_lengths_without_a_window_are_refused(
    n_tokens: int, seq_len: int, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        Sampler(n_tokens, seq_len, seed=0)
    with pytest.raises(error, match=message):
        fixed_windows(n_tokens, seq_len, 4)


def test_evaluation_without_windows_is_refused() -> None:
    with pytest.raises(ConfigError, match="number of evaluation windows"):
        fixed_windows(100, 10, 0)
