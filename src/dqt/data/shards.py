"""Tokens on disk: one flat little-endian array per split, and a hash for each 64 KiB of it.

`uint16` for vocabularies up to 65,536 tokens, `uint32` above. Every read checks the blocks that it touches
against their SHA-256, whenever they were changed: a damaged block is named before a step sees it, a file of
any size opens at once, and one that shrinks can't kill the process, as a memory map's would. The price is a
hash of 64 KiB a sequence, 40 to 150 µs.

    train.bin     the tokens
    train.sums    32 bytes a block; its own hash is in the manifest
"""

from __future__ import annotations

import hashlib
import os
import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from dqt.errors import DataError

BLOCK = 64 << 10
"""Bytes that share a hash."""

_HASHED_AT_OPEN = 256 << 20  # bytes; SHA-256 takes 0.2 to 0.5 s for this much
_DTYPES = ("uint8", "uint16", "uint32")


class TokenShards:
    """A read-only sequence of tokens in memory.

    Args:
        tokens: a one-dimensional integer array.

    Attributes:
        marks: of conversations, what every token is (`dqt.data.chat`); None for plain text.
    """

    marks: TokenShards | None = None

    def __init__(self, tokens: np.ndarray) -> None:
        self._tokens = tokens

    def __len__(self) -> int:
        return len(self._tokens)

    def read(self, start: int, count: int) -> np.ndarray:
        """Returns the tokens from `start` as int64 [count]; outside of the sequence is an IndexError.

        Raises:
            DataError: they can't be read, or were changed.
        """
        if start < 0 or count < 0 or start + count > len(self):
            raise IndexError(f"tokens {start} to {start + count} of {len(self)}")
        return self._slice(start, count).astype(np.int64)

    def _slice(self, start: int, count: int) -> np.ndarray:
        return self._tokens[start : start + count]

    def counts(self, vocab_size: int) -> np.ndarray:
        """How often each token occurs: int64 [vocab_size]; read in pieces, so that memory stays bounded."""
        total = np.zeros(vocab_size, dtype=np.int64)
        for start in range(0, len(self), 1 << 22):
            piece = self._slice(start, min(1 << 22, len(self) - start))
            total += np.bincount(piece, minlength=vocab_size)
        return total


class ShardFile(TokenShards):
    """A sequence of tokens in a file, checked as it is read.

    Args:
        path: the file.
        dtype: of its tokens.
        sums: SHA-256 of each block, one after the other.
        vocab_size: tokens that there are.

    Raises:
        DataError: the file can't be opened.
    """

    def __init__(self, path: Path, dtype: np.dtype, sums: bytes, vocab_size: int) -> None:
        self._path, self._dtype, self._sums, self._vocab_size = path, dtype, sums, vocab_size
        try:
            self._descriptor = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror}") from error
        weakref.finalize(self, os.close, self._descriptor)
        self._size = os.fstat(self._descriptor).st_size

    def __len__(self) -> int:
        return self._size // self._dtype.itemsize

    def verify(self) -> None:
        """Reads and checks all of it."""
        for start in range(0, len(self), 1 << 22):
            self._slice(start, min(1 << 22, len(self) - start))

    def _slice(self, start: int, count: int) -> np.ndarray:
        begin, end = start * self._dtype.itemsize, (start + count) * self._dtype.itemsize
        first = begin // BLOCK
        raw = self._blocks(first, -(-end // BLOCK))
        tokens = np.frombuffer(raw, self._dtype, count, begin - first * BLOCK)
        if count and tokens.max() >= self._vocab_size:
            at = start + int(tokens.argmax())
            raise DataError(f"{self._path}: token {at} is {tokens.max()}, and there are {self._vocab_size}")
        return tokens

    def _blocks(self, first: int, last: int) -> bytes:
        """The bytes of some blocks."""
        begin, end = first * BLOCK, min(last * BLOCK, self._size)
        try:
            raw = os.pread(self._descriptor, end - begin, begin)
        except OSError as error:
            raise DataError(f"{self._path} cannot be read at byte {begin}: {error.strerror}") from error
        for number in range(first, last):
            at = number * BLOCK
            block = raw[at - begin : at - begin + BLOCK]
            if not _matches(block, self._sums, number) or len(block) != min(BLOCK, self._size - at):
                raise DataError(
                    f"{self._path} was altered between bytes {at} and {at + BLOCK} (its SHA-256 differs): "
                    f"delete {self._path.parent} to have it prepared again"
                )
        return raw


def _matches(block: bytes, sums: bytes, number: int) -> bool:
    return hashlib.sha256(block).digest() == sums[32 * number : 32 * number + 32]


def token_dtype(vocab_size: int) -> np.dtype:
    """The smallest stored type that holds the vocabulary."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


def write_shard(path: Path, arrays: Iterable[np.ndarray], dtype: np.dtype) -> dict[str, Any]:
    """Writes arrays of token ids one after the other, and their hashes beside them.

    Returns:
        The manifest's entry of the file: its name, dtype, number of tokens, SHA-256, and that of the hashes.
    """
    digest, sums, rest = hashlib.sha256(), bytearray(), b""
    tokens = 0
    with path.open("wb") as file:
        for array in arrays:
            raw = array.astype(dtype).tobytes()
            digest.update(raw)
            file.write(raw)
            tokens += len(array)
            rest += raw
            whole = len(rest) - len(rest) % BLOCK
            sums += _sums(rest[:whole])
            rest = rest[whole:]
        sums += _sums(rest)
        file.flush()
        os.fsync(file.fileno())
    path.with_suffix(".sums").write_bytes(sums)
    return {
        "file": path.name,
        "dtype": dtype.name,
        "tokens": tokens,
        "sha256": digest.hexdigest(),
        "sums_sha256": hashlib.sha256(sums).hexdigest(),
    }


def _sums(raw: bytes) -> bytes:
    return b"".join(hashlib.sha256(raw[at : at + BLOCK]).digest() for at in range(0, len(raw), BLOCK))


def open_shard(
    directory: Path, entry: dict[str, Any], vocab_size: int, verify: bool | None = None
) -> ShardFile:
    """Opens a file that `write_shard` wrote.

    Args:
        directory: where it lies.
        entry: what `write_shard` returned; nothing in it is believed.
        vocab_size: tokens that there are.
        verify: whether to check all of it at once; None does so for files up to 256 MiB.

    Raises:
        DataError: the file is missing, of another size, or altered; or the entry makes no sense.
    """
    name, dtype_name, tokens = entry["file"], entry["dtype"], entry["tokens"]
    advice = f"delete {directory} to have it prepared again"
    if not isinstance(name, str) or Path(name).name != name or dtype_name not in _DTYPES:
        raise DataError(f"{directory} names a file {name!r} of {dtype_name!r}, which no dqt wrote: {advice}")
    path = directory / name
    sums_path = path.with_suffix(".sums")
    for each in (path, sums_path):
        if not each.is_file() or each.is_symlink():
            raise DataError(f"{each} is missing, or not a plain file: {advice}")
    dtype = np.dtype(dtype_name).newbyteorder("<")
    size, expected = path.stat().st_size, tokens * dtype.itemsize
    if type(tokens) is not int or size != expected:
        raise DataError(f"{path} has {size} bytes instead of {expected}: {advice}")
    if sums_path.stat().st_size != 32 * -(-size // BLOCK):
        raise DataError(f"{sums_path} was altered: {advice}")
    sums = sums_path.read_bytes()
    if hashlib.sha256(sums).hexdigest() != entry["sums_sha256"]:
        raise DataError(f"{sums_path} was altered (its SHA-256 differs from the manifest's): {advice}")
    shard = ShardFile(path, dtype, sums, vocab_size)
    if verify or (verify is None and size <= _HASHED_AT_OPEN):
        shard.verify()
    return shard
