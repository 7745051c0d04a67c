"""Which tokens make sample number i: a pure function of (seed, i).

Each epoch cuts the tokens into windows that do not overlap, from an offset of its own, and visits them in a
permutation of its own: the order of Philox keys, one per window. Nothing is drawn, so nothing has to be
saved: a run resumes from the number of samples it has seen, on any number of workers. The price is that up to
two windows of tokens at the ends are left out of an epoch (others in the next), and a sort per epoch with 8
bytes of memory a window.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from dqt.data.chat import BEGIN, LEARNT
from dqt.data.shards import TokenShards
from dqt.errors import ConfigError, DataError
from dqt.numerics.philox import Purpose, random_uint32, stream_of

IGNORED = -100
"""A target that is not learnt, as torch's cross-entropy has it."""

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


class ConversationSampler:
    """Maps the global sample index to a conversation: the order of Philox keys, anew in each epoch.

    A conversation is a sample of its own, from its first token on, cut at the sequence length; a batch is as
    long as its longest one. So an answer always has its own question before it, and nothing else's, which
    packing several into a sequence would not give; the price is the padding at the end of the shorter ones.
    Those whose answers lie beyond the sequence length altogether are left out.

    Args:
        marks: Of all tokens of the split, see `dqt.data.chat`.
        seq_len: Tokens in a sample at most.
        seed: Of the order.

    Attributes:
        windows: Conversations, which is samples in an epoch.
        cut: Conversations of which the end is left out.
        left_out: Conversations of which nothing could be learnt.

    Raises:
        DataError: No conversation is left.
    """

    def __init__(self, marks: TokenShards, seq_len: int, seed: int) -> None:
        self.seq_len, self.seed, self.marks = seq_len, seed, marks
        every = marks.read(0, len(marks)).astype(np.uint8)
        starts = np.flatnonzero(every & BEGIN)
        whole = np.append(starts[1:], len(every))
        ends = np.minimum(whole, starts + seq_len + 1)
        learnt = np.append(0, np.cumsum(every & LEARNT, dtype=np.int64))
        usable = learnt[ends] - learnt[np.minimum(starts + 1, ends)] > 0
        self.starts, self.ends = starts[usable], ends[usable]
        self.windows, self.left_out = len(self.starts), int((~usable).sum())
        self.cut = int((ends < whole)[usable].sum())
        if not self.windows:
            raise DataError(
                f"no conversation has an answer within {seq_len} tokens: give others, or a higher --seq-len"
            )
        self._epoch = -1
        self._order = np.empty(0, dtype=np.int64)

    def window(self, sample_index: int) -> int:
        """The number of a sample's conversation."""
        epoch, index = divmod(sample_index, self.windows)
        if epoch != self._epoch:
            keys = random_uint32(self.seed, Purpose.SAMPLER, _STREAM, epoch, 0, self.windows).numpy()
            self._epoch, self._order = epoch, np.argsort(keys, kind="stable")
        return int(self._order[index])

    def batch(
        self, shards: TokenShards, first_sample: int, batch_size: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Reads consecutive samples; see `rows`."""
        samples = range(first_sample, first_sample + batch_size)
        return self.rows(shards, [self.window(sample) for sample in samples])

    def rows(self, shards: TokenShards, numbers: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Reads conversations.

        Returns:
            Tokens int64 [B, S + 1], zeros after a conversation's end, and the targets int64 [B, S], one token
            further, `IGNORED` where nothing is learnt.
        """
        longest = max(int(self.ends[n] - self.starts[n]) for n in numbers)
        tokens = np.zeros((len(numbers), longest), dtype=np.int64)
        targets = np.full((len(numbers), longest - 1), IGNORED, dtype=np.int64)
        for row, number in enumerate(numbers):
            start, count = int(self.starts[number]), int(self.ends[number] - self.starts[number])
            tokens[row, :count] = shards.read(start, count)
            learnt = self.marks.read(start, count)[1:] & LEARNT > 0
            targets[row, : count - 1][learnt] = tokens[row, 1:count][learnt]
        return torch.from_numpy(tokens), torch.from_numpy(targets)

    def fixed(self, count: int) -> list[int]:
        """Evenly spaced conversations for evaluation, all where there are no more."""
        count = min(count, self.windows)
        return [index * self.windows // count for index in range(count)]


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
