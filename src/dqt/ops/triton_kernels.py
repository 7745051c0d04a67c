"""The elementwise operations for CUDA, in Triton, bit for bit `dqt.ops.reference`.

Tested with Triton's interpreter on the CPU, and compiled for a GPU without one. Never run or timed on a GPU:
none was at hand. What bit equality takes: `enable_fp_fusion=False` (no a * b + c in one rounding) and IEEE
division (`tl.div_rn`). The optimizer's update has no kernel here yet, and runs on the reference.

Packing works on groups of eight values: n-bit codes of eight values are n whole bytes at any n, so that one
text packs every width.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

GROUPS = 128  # of eight values: the tile of a program
BLOCK = 1024
ROWS, COLUMNS = 32, 64  # the tile of a column reduction
_EXACT = {"enable_fp_fusion": False}


@triton.jit
def _absmax_bits(x):
    """|x| as bits, which order like the numbers, and put Inf and NaN above all of them."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _scale_and_inverse(top):
    """Scale and 127 / absmax of rows or columns whose largest bits are `top`; NaN and 0 if not finite."""
    finite = top < 0x7F800000
    absmax = top.to(tl.float32, bitcast=True)
    nan = tl.full(top.shape, 0x7FC00000, tl.int32).to(tl.float32, bitcast=True)
    useful = finite & (absmax > 1e-30)
    top_code = tl.full(top.shape, 127.0, tl.float32)
    scale = tl.where(finite, tl.div_rn(absmax, top_code), nan)
    return scale, tl.where(useful, tl.div_rn(top_code, tl.where(useful, absmax, 1.0)), 0.0)


@triton.jit
def _rounded(v, inverse):
    """Half to even: 1.5 * 2**23 has the integers as its last bits. A zero `inverse` keeps NaN from casts."""
    return ((tl.where(inverse == 0.0, 0.0, v) + 12582912.0) - 12582912.0).to(tl.int8)


@triton.jit
def _quantize_rows(x, q, scale, columns, block: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, block)
    top = tl.zeros([block], tl.int32)
    for start in range(0, columns, block):
        c = start + lanes
        top = tl.maximum(top, _absmax_bits(tl.load(x + row * columns + c, mask=c < columns, other=0.0)))
    s, inverse = _scale_and_inverse(tl.zeros([1], tl.int32) + tl.max(top, 0))
    tl.store(scale + row + tl.arange(0, 1), s)
    for start in range(0, columns, block):
        c = start + lanes
        v = tl.load(x + row * columns + c, mask=c < columns, other=0.0)
        tl.store(q + row * columns + c, _rounded(v * inverse, inverse), mask=c < columns)


@triton.jit
def _quantize_columns(
    x, factor, q, scale, rows, columns, scaled: tl.constexpr, height: tl.constexpr, width: tl.constexpr
):
    c = tl.program_id(0).to(tl.int64) * width + tl.arange(0, width)[None, :]
    inside = c < columns
    top = tl.zeros([1, width], tl.int32)
    for start in range(0, rows, height):
        r = (start + tl.arange(0, height)[:, None]).to(tl.int64)
        v = tl.load(x + r * columns + c, mask=(r < rows) & inside, other=0.0)
        if scaled:
            v = v * tl.load(factor + r, mask=r < rows, other=0.0)
        top = tl.maximum(top, tl.max(_absmax_bits(v), 0)[None, :])
    s, inverse = _scale_and_inverse(top)
    tl.store(scale + c, s, mask=inside)
    for start in range(0, rows, height):
        r = (start + tl.arange(0, height)[:, None]).to(tl.int64)
        mask = (r < rows) & inside
        v = tl.load(x + r * columns + c, mask=mask, other=0.0)
        if scaled:
            v = v * tl.load(factor + r, mask=r < rows, other=0.0)
        tl.store(q + r * columns + c, _rounded(v * inverse, inverse), mask=mask)


@triton.jit
def _scale_product(
    product,
    row_scale,
    column_scale,
    bias,
    y,
    columns,
    by_column: tl.constexpr,
    add: tl.constexpr,
    block: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * block + tl.arange(0, block)
    inside = c < columns
    v = tl.load(product + row * columns + c, mask=inside, other=0).to(tl.float32) * tl.load(row_scale + row)
    if by_column:
        v = v * tl.load(column_scale + c, mask=inside, other=0.0)
    if add:
        v = v + tl.load(bias + c, mask=inside, other=0.0)
    tl.store(y + row * columns + c, v, mask=inside)


@triton.jit
def _unpacked(row, size, group, lane, bits: tl.constexpr, signed: tl.constexpr):
    """Fields [groups, 8] of a packed row of `size` bytes, `int32`."""
    bit = lane * bits
    byte = group * bits + bit // 8
    low = tl.load(row + byte, mask=byte < size, other=0).to(tl.int32)
    high = tl.load(row + byte + 1, mask=byte + 1 < size, other=0).to(tl.int32)
    field = ((low | (high << 8)) >> (bit % 8)) & ((1 << bits) - 1)
    if signed:
        field = (field ^ (1 << (bits - 1))) - (1 << (bits - 1))
    return field


@triton.jit
def _store_packed(row, size, first_group, values, lane, bits: tl.constexpr, groups: tl.constexpr):
    """Writes the lowest bits of values [groups, 8]; those beyond the row must be 0."""
    word = tl.sum((values & ((1 << bits) - 1)).to(tl.int64) << (lane * bits), 1)
    at = (first_group + tl.arange(0, groups)) * bits
    for k in tl.static_range(bits):
        tl.store(row + at + k, ((word >> (8 * k)) & 0xFF).to(tl.uint8), mask=at + k < size)


@triton.jit
def _unpack(packed, values, size, count, bits: tl.constexpr, signed: tl.constexpr, groups: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1) * groups + tl.arange(0, groups)[:, None]
    lane = tl.arange(0, 8)[None, :]
    c = group * 8 + lane
    field = _unpacked(packed + row * size, size, group, lane, bits, signed)
    tl.store(values + row * count + c, field.to(values.dtype.element_ty), mask=c < count)


@triton.jit
def _pack(values, packed, size, count, bits: tl.constexpr, groups: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * groups
    lane = tl.arange(0, 8)[None, :]
    c = (first + tl.arange(0, groups)[:, None]) * 8 + lane
    v = tl.load(values + row * count + c, mask=c < count, other=0).to(tl.int32)
    _store_packed(packed + row * size, size, first, v, lane, bits, groups)


# -- launchers: what `registry` calls, with the arguments of the operation and its results ------------------


def quantize_rows(rows: int, columns: int, x: Tensor, q: Tensor, scale: Tensor) -> None:
    if rows:
        _quantize_rows[(rows,)](x, q, scale, columns, block=BLOCK, **_EXACT)


def quantize_columns(
    rows: int, columns: int, x: Tensor, row_factor: Tensor | None, q: Tensor, scale: Tensor
) -> None:
    if columns:
        _quantize_columns[(triton.cdiv(columns, COLUMNS),)](
            *(x, x if row_factor is None else row_factor, q, scale, rows, columns),
            scaled=row_factor is not None,
            height=ROWS,
            width=COLUMNS,
            **_EXACT,
        )


def scale_product(
    rows: int,
    columns: int,
    product: Tensor,
    row_scale: Tensor,
    column_scale: Tensor | None,
    bias: Tensor | None,
    y: Tensor,
) -> None:
    if rows and columns:
        _scale_product[(rows, triton.cdiv(columns, BLOCK))](
            *(product, row_scale, row_scale if column_scale is None else column_scale),
            *(row_scale if bias is None else bias, y, columns),
            by_column=column_scale is not None,
            add=bias is not None,
            block=BLOCK,
            **_EXACT,
        )


def unpack(rows: int, size: int, packed: Tensor, bits: int, count: int, signed: bool, values: Tensor) -> None:
    if rows and count:
        _unpack[(rows, triton.cdiv(count, 8 * GROUPS))](
            packed, values, size, count, bits=bits, signed=signed, groups=GROUPS
        )


def pack(rows: int, count: int, values: Tensor, bits: int, packed: Tensor) -> None:
    if rows and count:
        size = packed.shape[-1]
        _pack[(rows, triton.cdiv(count, 8 * GROUPS))](values, packed, size, count, bits=bits, groups=GROUPS)
