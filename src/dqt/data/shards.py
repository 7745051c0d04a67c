"""Tokens on disk: one flat little-endian array per split, memory-mapped.

`uint16` for vocabularies up to 65,536 tokens, `uint32` above. A memory map costs no start-up time and no
memory of its own, and lets processes share the page cache; the price is that a torn file shows only when it
is read. So each file's size is checked when it is opened, and its hash too where that takes less than a
second.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from dqt.errors import DataError

_HASHED_AT_OPEN = 256 << 20  # bytes; SHA-256 takes 0.2 to 0.5 s for this much


class TokenShards:
    """A read-only sequence of tokens, memory-mapped or in memory.

    Args:
        tokens: a one-dimensional integer array.
    """

    def __init__(self, tokens: np.ndarray) -> None:
        self._tokens = tokens

    def __len__(self) -> int:
        return len(self._tokens)

    def read(self, start: int, count: int) -> np.ndarray:
        """Returns the tokens from `start` as int64 [count]; outside of the sequence is an IndexError."""
        if start < 0 or count < 0 or start + count > len(self):
            raise IndexError(f"tokens {start} to {start + count} of {len(self)}")
        return self._tokens[start : start + count].astype(np.int64)

    def counts(self, vocab_size: int) -> np.ndarray:
        """How often each token occurs: int64 [vocab_size]; read in pieces, so that memory stays bounded."""
        total = np.zeros(vocab_size, dtype=np.int64)
        for start in range(0, len(self), 1 << 24):
            total += np.bincount(self._tokens[start : start + (1 << 24)], minlength=vocab_size)
        return total


def token_dtype(vocab_size: int) -> np.dtype:
    """The smallest stored type that holds the vocabulary."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


def write_shard(path: Path, arrays: Iterable[np.ndarray], dtype: np.dtype) -> dict[str, Any]:
    """Writes arrays of token ids one after the other.

    Returns:
        The manifest's entry of the file: its name, dtype, number of tokens and SHA-256.
    """
    digest = hashlib.sha256()
    tokens = 0
    with path.open("wb") as file:
        for array in arrays:
            raw = array.astype(dtype).tobytes()
            digest.update(raw)
            file.write(raw)
            tokens += len(array)
    return {"file": path.name, "dtype": dtype.name, "tokens": tokens, "sha256": digest.hexdigest()}


def open_shard(directory: Path, entry: dict[str, Any], verify: bool | None = None) -> TokenShards:
    """Maps a file that `write_shard` wrote.

    Args:
        directory: where it lies.
        entry: what `write_shard` returned.
        verify: whether to check the hash as well as the size; None does so for files up to 256 MiB.

    Raises:
        DataError: the file is missing, of another size, or altered.
    """
    path = directory / entry["file"]
    dtype = np.dtype(entry["dtype"]).newbyteorder("<")
    advice = f"delete {directory} to have it prepared again"
    if not path.is_file():
        raise DataError(f"{path} is missing: {advice}")
    size, expected = path.stat().st_size, entry["tokens"] * dtype.itemsize
    if size != expected:
        raise DataError(f"{path} has {size} bytes instead of {expected}: {advice}")
    if verify or (verify is None and size <= _HASHED_AT_OPEN):
        with path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != entry["sha256"]:
                raise DataError(f"{path} was altered (its SHA-256 differs from the manifest's): {advice}")
    return TokenShards(np.memmap(path, dtype=dtype, mode="r"))
