"""Exact int8 x int8 -> int32 matrix products through `torch._int_mm`, with its traps guarded.

What goes wrong without the guards (each has a test):

- Without AVX512-VNNI `_int_mm` is a naive loop, 35 times slower than a float32 product. There we take float32
  products over chunks of 1,024 along the inner dimension, which are exact: 128 * 128 * 1024 = 2**24.
- A dimension of size 1 whose stride is 0 (an expanded tensor, or its transpose) gives wrong numbers silently.
- int32 wraps from an inner dimension of 131,072 at full range; longer ones are refused, because the sum does
  not fit into the result either.
- CUDA wants more than 16 rows and inner and outer sizes in multiples of 8. Never run: no GPU was at hand.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn import functional as F

from dqt.errors import ConfigError
from dqt.numerics import packing
from dqt.ops import reference

EXACT_FLOAT32_INNER = 1024
MAX_INNER = 131_071


@functools.cache
def has_fast_int8() -> bool:
    """Whether this CPU has AVX512-VNNI, without which `torch._int_mm` is slow."""
    return bool(torch.cpu._is_vnni_supported())


def int_mm(a: Tensor, b: Tensor) -> Tensor:
    """Exact integer matrix product.

    Args:
        a: `int8` [rows, inner], any strides.
        b: `int8` [inner, columns], any strides.

    Returns:
        `int32` [rows, columns].

    Raises:
        ConfigError: If the inner dimension is so long that int32 could wrap.
    """
    rows, inner = a.shape
    columns = b.shape[1]
    require_no_overflow(inner)
    if 0 in (rows, inner, columns):
        return torch.zeros(rows, columns, dtype=torch.int32, device=a.device)
    if a.device.type == "cuda":
        return _int_mm_padded(a, b)
    if not has_fast_int8():
        return int_mm_by_float(a, b)
    return torch._int_mm(_canonical(a), _canonical(b))


def packed_linear(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    outputs: int,
    bits: int,
    signed: bool,
    per_row: bool,
    bias: Tensor | None = None,
) -> Tensor:
    """A linear layer on packed codes, for a few tokens: what int8 products give, in one operation.

    Args:
        x: Float tensor [tokens, columns], quantized to int8 a token.
        codes: Packed `uint8` [outputs, bytes].
        scale: `float32`, one number, or one an output.
        outputs: Rows of the weight.
        bits: Width of a code.
        signed: Two's complement; if not, one bit, {0, 1} for {-scale / 2, scale / 2}.
        per_row: Whether there is one scale an output.
        bias: Float tensor [outputs] or None.

    Returns:
        `float32` [tokens, outputs].
    """
    q, row_scale = reference.quantize_rows(x)
    values = packing.unpack(codes, bits, x.shape[1], signed)
    if not signed:
        values, scale = values.to(torch.int8) * 2 - 1, scale / 2
    product = int_mm(q, values.T)
    if per_row:
        return reference.scale_product(product, row_scale, scale.flatten(), bias)
    return reference.scale_product(product, row_scale * scale.flatten(), None, bias)


def require_no_overflow(inner: int) -> None:
    """Raises `ConfigError` if int32 could wrap in a sum of as many products of int8."""
    if inner > MAX_INNER:
        raise ConfigError(
            f"an int8 product over {inner} terms can overflow int32 (limit {MAX_INNER}): "
            "use a smaller batch, or a float product for this layer"
        )


def int_mm_by_float(a: Tensor, b: Tensor) -> Tensor:
    """`int_mm` in float32 products over chunks short enough to be exact; for CPUs without VNNI."""
    total = torch.zeros(a.shape[0], b.shape[1], dtype=torch.int32, device=a.device)
    with torch.autocast(a.device.type, enabled=False):  # which would round the codes to bfloat16
        for start in range(0, a.shape[1], EXACT_FLOAT32_INNER):
            chunk = slice(start, start + EXACT_FLOAT32_INNER)
            total += (a[:, chunk].float() @ b[chunk].float()).to(torch.int32)
    return total


def _canonical(x: Tensor) -> Tensor:
    """`x` with ordinary strides where a dimension of size 1, or a stride of 0, would mislead `_int_mm`."""
    return x.clone(memory_format=torch.contiguous_format) if 1 in x.shape or 0 in x.stride() else x


def _int_mm_padded(a: Tensor, b: Tensor) -> Tensor:
    """CUDA: pads rows to at least 24, and all sizes to multiples of 8, with zeros."""
    rows, inner = a.shape
    columns = b.shape[1]
    a = F.pad(a, (0, -inner % 8, 0, max(24 - rows, -rows % 8)))
    b = F.pad(b, (0, -columns % 8, 0, -inner % 8))
    return torch._int_mm(a.contiguous(), b)[:rows, :columns]
