"""Philox4x32-10, a counter-based random generator (Salmon et al., SC 2011), in plain tensor operations.

Every random number is a pure function of (seed, purpose, stream, step, element index), so results do not
depend on the order of the parameters, on threads, or on how a tensor is sharded, and the random state of a
run is just (seed, step). The layout of the counter, the same in every backend:

    key = (seed, purpose)        c0 = element index // 4, lane = element index % 4
    c1  = step                   (c2, c3) = 64-bit stream, the hash of a parameter's name

The cost of a reference in eager `int64` arithmetic: about 15 ns a number, which bounds the reference
write-back.
"""

from __future__ import annotations

import enum
import hashlib

import torch
from torch import Tensor

from dqt.errors import ConfigError

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_MASK = 0xFFFFFFFF
_ROUNDS = 10
MAX_ELEMENTS = 2**34
_WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


class Purpose(enum.IntEnum):
    """What random numbers are for; part of the key, so that no two uses share numbers."""

    UPDATE = 0
    MOMENT = 1
    SAMPLER = 2
    INIT = 3
    MERGE = 4
    BACKWARD = 16  # plus the micro-batch


def philox4x32(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """The bare generator.

    Args:
        counter: Four `int64` tensors with values in [0, 2**32), broadcastable to one shape.
        key: Two integers in [0, 2**32).

    Returns:
        Four `int64` tensors with values in [0, 2**32).
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        # The products have 64 bits and wrap in int64; shifting and masking gives the unsigned halves all the
        # same.
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1 = ((product1 >> 32) & _MASK) ^ c1 ^ k0, product1 & _MASK
        c2, c3 = ((product0 >> 32) & _MASK) ^ c3 ^ k1, product0 & _MASK
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def random_uint32(
    seed: int,
    purpose: int,
    stream: int,
    step: int,
    start: int,
    count: int,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Random 32-bit numbers for the elements [start, start + count) of a tensor.

    Args:
        seed: The run's seed, in [0, 2**32).
        purpose: A `Purpose`.
        stream: 64-bit hash that names the tensor, see `stream_of`.
        step: Optimizer step (or epoch), in [0, 2**32).
        start: Index of the first element in the flattened, unsharded tensor.
        count: Number of elements.
        device: Where the numbers are made.

    Returns:
        `int64` tensor [count] with values in [0, 2**32).

    Raises:
        ConfigError: If a word of the key or counter is out of range.
    """
    for name, word in (("seed", seed), ("purpose", purpose), ("step", step)):
        if not 0 <= word <= _MASK:
            raise ConfigError(f"{name} {word} is out of range: it must be in [0, 2**32)")
    if start < 0 or start + count > MAX_ELEMENTS:
        raise ConfigError(f"a tensor of {start + count} elements has no random stream: the limit is 2**34")
    first, last = start // 4, (start + count + 3) // 4
    c0 = torch.arange(first, last, dtype=torch.int64, device=device)
    c1, c2, c3 = (
        torch.full((1,), word, dtype=torch.int64, device=device)
        for word in (step, stream & _MASK, stream >> 32)
    )
    lanes = torch.stack(philox4x32((c0, c1, c2, c3), (seed, int(purpose))), dim=-1)
    return lanes.flatten()[start - 4 * first :][:count]


def canonical_name(name: str) -> str:
    """A parameter's full name without the parts that wrappers (DDP, FSDP, `torch.compile`) add."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def stream_of(name: str) -> int:
    """64-bit stream of a parameter: BLAKE2b of its canonical name, so that position and rank play no part."""
    return int.from_bytes(hashlib.blake2b(canonical_name(name).encode(), digest_size=8).digest(), "little")
