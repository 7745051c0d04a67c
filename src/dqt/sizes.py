"""Sizes that the code and the formula of its memory share, and how sizes are written. No torch."""

from __future__ import annotations

FLOAT_BLOCK = 2**22
"""Elements of a weight that are made floats at a time."""

SCALE_BLOCK = 128
"""Columns of a row that share a scale, in float8 numbers and in the optimizer's moments."""

CHUNK_LOGITS = 2**22
"""Logits in a chunk: 16 MB in float32. Larger ones spill the cache, smaller ones make thin products."""


def packed_size(count: int, bits: int) -> int:
    """Bytes that a row of `count` values takes at `bits` bits each."""
    return (count * bits + 7) // 8


def format_bytes(size: float) -> str:
    """A size in the unit that suits it, as in "1.3 GB" (powers of 1,000)."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(size) < 999.5:
            return f"{size:.0f} B" if unit == "B" else f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"
