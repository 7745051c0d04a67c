"""Which tokens make sample number i: a pure function of (seed, i).

Each epoch cuts the tokens into windows that do not overlap, from an offset of its own, and visits them in a
permutation of its own: the order of Philox keys, one per window. Nothing is drawn, so nothing has to be
saved: a run resumes from the number of samples it has seen, on any number of workers. The price is that up to
two windows of tokens at the ends are left out of an epoch (others in the next), and a sort per epoch with 8
bytes of memory a window.
"""

from __future__ import annotations

import numpy as np
import torch

from dqt.data.shards import TokenShards
from dqt.errors import ConfigError, DataError
from dqt.numerics.philox import Purpose, random_uint32, stream_of

_STREAM = stream_of("dqt.data.sampler")


class Sampler:
    """Maps the global sample index to a window of `seq_len + 1` tokens: inputs, and targets one further.

    Args:
        n_tokens: tokens in the split.
        seq_len: tokens per sample.
        seed: of the order.

    Attributes:
        windows: samples per epoch.

    Raises:
        ConfigError: a sequence length below 1.
        DataError: fewer tokens than one window.
    """

    def __init__(self, n_tokens: int, seq_len: int, seed: int) -> None:
        self.seq_len = seq_len
        self.seed = seed
        # One window less than would fit leaves room for offsets, by at least a window's length.
        self.windows = max(1, _count_windows(n_tokens, seq_len) - 1)
        self._offsets = n_tokens - self.windows * seq_len
        self._epoch = -1
        self._starts = np.empty(0, dtype=np.int64)

    def window(self, sample_index: int) -> int:
        """Returns the first token of a sample; it ends `seq_len + 1` tokens later."""
        epoch, index = divmod(sample_index, self.windows)
        if epoch != self._epoch:  # only the current epoch is kept
            self._epoch, self._starts = epoch, self._order(epoch)
        return int(self._starts[index])

    def batch(self, shards: TokenShards, first_sample: int, batch_size: int) -> torch.Tensor:
        """Reads consecutive samples.

        Returns:
            int64 [batch_size, seq_len + 1].
        """
        samples = range(first_sample, first_sample + batch_size)
        rows = [shards.read(self.window(sample), self.seq_len + 1) for sample in samples]
        return torch.from_numpy(np.stack(rows))

    def _order(self, epoch: int) -> np.ndarray:
        """The starts of an epoch's windows: int64 [windows]."""
        keys = random_uint32(self.seed, Purpose.SAMPLER, _STREAM, epoch, 0, self.windows + 1).numpy()
        offset = int(keys[-1]) * self._offsets >> 32
        return offset + np.argsort(keys[:-1], kind="stable") * self.seq_len


def fixed_windows(n_tokens: int, seq_len: int, count: int) -> list[int]:
    """Returns the starts of `count` windows of `seq_len + 1` tokens for evaluation, evenly spaced.

    No token is a target twice. Where fewer windows fit, all that fit are returned.

    Raises:
        ConfigError: a length or a count below 1.
        DataError: fewer tokens than one window.
    """
    if count < 1:
        raise ConfigError(f"the number of evaluation windows must be at least 1, not {count}")
    count = min(count, _count_windows(n_tokens, seq_len))
    return [index * (n_tokens - 1) // count for index in range(count)]


def _count_windows(n_tokens: int, seq_len: int) -> int:
    if seq_len < 1:
        raise ConfigError(f"the sequence length must be at least 1, not {seq_len}")
    if n_tokens <= seq_len:
        shorter = f", or a sequence length of {n_tokens - 1} or less" if n_tokens > 1 else ""
        raise DataError(
            f"too little text: {n_tokens} tokens for a sequence length of {seq_len}: give more{shorter}"
        )
    return (n_tokens - 1) // seq_len
