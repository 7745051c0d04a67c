"""When the C library gives freed memory back to the system: a choice between time and space.

torch asks for aligned blocks, and glibc (2.36 here) seldom reuses a freed block for an aligned one of the
same size, so that its heap grows beyond what lives: by 60 % in a step of `tiny` with 8 x 256 tokens. Blocks
that it maps one by one go back as soon as they are freed, but each new one is then filled with fresh pages:
2.3 times the time of that step. Elsewhere than on glibc both functions do nothing.
"""

from __future__ import annotations

import contextlib
import ctypes

_M_MMAP_THRESHOLD = -3
_MAPPED_BYTES = 2**20


def give_back() -> None:
    """Hands what is free now back to the system."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def give_back_at_once() -> None:
    """From now on, blocks of 1 MB and more go back as soon as they are freed: least memory, more time."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _MAPPED_BYTES)
        give_back()
