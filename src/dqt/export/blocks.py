"""GGUF blocks, written from integer codes: nothing is scaled or rounded on the way.

A block is a run of a row's weights with one `float16` scale d. Scales of `dqt` are `float16` values by
design, so a weight's value in a block is what it was in training, to the bit:

    type    weights  bits a weight   value                 takes
    Q1_0    128      1.125           ±d                    1 bit (d is half a scale)
    TQ2_0   256      2.0625          (q - 1) d, q 0 to 3   ternary; 2 bits, with d = -scale and q = 1 - code
    Q4_0    32       4.5             (q - 8) d             3 and 4 bits
    Q8_0    32       8.5             q d                   5 to 8 bits

A row that is no multiple of the block of its format's type fits another type that holds its integers as
exactly: the next larger one, and floats in the end. That is for the user to ask for, because it costs bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from dqt.numerics.formats import Format


@dataclass(frozen=True)
class BlockType:
    """A type of GGUF blocks.

    Attributes:
        name: As GGUF names it.
        block: Weights in a block.
        bytes: Bytes that it takes.
        lowest: The least integer that it holds, in steps of d.
        highest: The greatest.
        pack: Integers [blocks, block] to bytes without the scale.
        scale_first: Whether the scale comes before them.
        zero: Whether 0 is one of its integers.
    """

    name: str
    block: int
    bytes: int
    lowest: int
    highest: int
    pack: Callable[[np.ndarray], np.ndarray]
    scale_first: bool = True
    zero: bool = True

    @property
    def bits(self) -> float:
        """Bits a weight, the scale included."""
        return 8 * self.bytes / self.block

    def orientation(self, format: Format) -> int:
        """1 if it holds the format's integers, -1 if it does with their signs turned, 0 if it does not."""
        low, high = _integer_range(format)
        if not self.zero and low <= 0 <= high and format.levels > 2:
            return 0
        if self.lowest <= low and high <= self.highest:
            return 1
        return -1 if self.lowest <= -high and -low <= self.highest else 0


def _pack_q1_0(steps: np.ndarray) -> np.ndarray:
    return np.packbits(steps > 0, axis=-1, bitorder="little")


def _pack_tq2_0(steps: np.ndarray) -> np.ndarray:
    """Two halves of 32 bytes; byte i of a half holds its weights i, i + 32, i + 64 and i + 96."""
    fields = (steps + 1).astype(np.uint8).reshape(len(steps), 2, 4, 32)
    parts = [fields[:, :, i] << np.uint8(2 * i) for i in range(4)]
    return (parts[0] | parts[1] | parts[2] | parts[3]).reshape(len(steps), 64)


def _pack_q4_0(steps: np.ndarray) -> np.ndarray:
    """Byte i holds the weights i and i + 16."""
    fields = (steps + 8).astype(np.uint8)
    return fields[:, :16] | fields[:, 16:] << np.uint8(4)


def _pack_q8_0(steps: np.ndarray) -> np.ndarray:
    return steps.astype(np.int8).view(np.uint8)


# Smallest first.
BLOCK_TYPES = (
    BlockType("Q1_0", 128, 18, -1, 1, _pack_q1_0, zero=False),
    BlockType("TQ2_0", 256, 66, -1, 2, _pack_tq2_0, scale_first=False),
    BlockType("Q4_0", 32, 18, -8, 7, _pack_q4_0),
    BlockType("Q8_0", 32, 34, -128, 127, _pack_q8_0),
)


def _integer_range(format: Format) -> tuple[int, int]:
    factor = format.product_factor
    return int((format.qmin - format.offset) * factor), int((format.qmax - format.offset) * factor)


def block_type(format: Format, columns: int, other: bool = False) -> BlockType | None:
    """The smallest type that holds a format's integers in rows of `columns`.

    Args:
        format: The format.
        columns: Weights in a row.
        other: Whether a larger type than the format's own may be used where rows do not fit.

    Returns:
        The type; None if there is none.
    """
    holding = [type for type in BLOCK_TYPES if type.orientation(format)]
    return next((type for type in (holding if other else holding[:1]) if columns % type.block == 0), None)


def to_blocks(type: BlockType, format: Format, integers: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Writes a weight as blocks.

    Args:
        type: A type that holds the format's integers.
        format: The format of the weight.
        integers: `int8` [rows, columns], without the format's offset (`QuantizedTensor.product_codes`).
        scale: `float16` [rows], of one integer step.

    Returns:
        `uint8` [rows, columns / block * bytes].
    """
    sign = type.orientation(format)
    rows = len(integers)
    steps = (integers.astype(np.int16) * sign).reshape(-1, type.block)
    d = np.repeat((scale * np.float16(sign)).astype(np.float16), len(steps) // rows)
    scales = d.view(np.uint8).reshape(-1, 2)
    packed = type.pack(steps)
    parts = (scales, packed) if type.scale_first else (packed, scales)
    return np.concatenate(parts, axis=1).reshape(rows, -1)
