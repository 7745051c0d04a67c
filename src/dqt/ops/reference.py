"""The operations in plain PyTorch: the specification of every faster kernel, bit for bit, on any device.

Symmetric absmax to [-127, 127], rounding half to even: scale = absmax / 127, q = rint(x * (127 / absmax)),
all in float32, one IEEE division a row. A row with NaN or Inf gets a NaN scale and zero codes, so that the
error reaches the loss (where it is reported) instead of a float-to-integer cast (where NaN silently becomes
0).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

INT8_MAX = 127.0
SMALLEST_ABSMAX = 1e-30
"""Below this 127 / absmax nears float32's overflow; such a row counts as zero."""


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantizes each row to int8.

    Args:
        x: Float tensor [rows, columns].

    Returns:
        `int8` codes [rows, columns] and `float32` scale [rows], so that x is about codes * scale[:, None].
    """
    return _quantize(x, dim=1)


def quantize_columns(x: Tensor, row_factor: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Quantizes each column of x * row_factor[:, None] to int8.

    Args:
        x: Float tensor [rows, columns].
        row_factor: `float32` [rows], or None for 1.

    Returns:
        `int8` codes [rows, columns] and `float32` scale [columns], so that the product is about
        codes * scale.
    """
    return _quantize(x if row_factor is None else x.float() * row_factor[:, None], dim=0)


def scale_product(
    product: Tensor, row_scale: Tensor, column_scale: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """Turns an integer product into floats.

    Args:
        product: `int32` [rows, columns].
        row_scale: `float32` [rows].
        column_scale: `float32` [columns], or None for 1.
        bias: Float tensor [columns], or None for 0.

    Returns:
        `float32` [rows, columns]: ((product * row_scale) * column_scale) + bias.
    """
    y = product.float().mul_(row_scale[:, None])
    if column_scale is not None:
        y.mul_(column_scale)
    return y if bias is None else y.add_(bias.float())


LANES = 16
COLUMN_ROWS = 64


def mean_squares(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean squares of rows and columns, summed in a fixed order, so that every backend gives the same bits.

    A row is summed in 16 interleaved lanes, whose halves are then added (8, 4, 2, 1); a column row by row in
    blocks of 64 rows, then block by block.

    Args:
        x: `float32` [rows, columns], neither zero.

    Returns:
        `float32` [rows] and [columns].
    """
    rows, columns = x.shape
    squares = x.float().square()
    lanes = F.pad(squares, (0, -columns % LANES)).unflatten(1, (-1, LANES))
    total = lanes[:, 0].clone()
    for i in range(1, lanes.shape[1]):
        total += lanes[:, i]
    while total.shape[1] > 1:
        half = total.shape[1] // 2
        total = total[:, :half] + total[:, half:]
    blocks = F.pad(squares, (0, 0, 0, -rows % COLUMN_ROWS)).unflatten(0, (-1, COLUMN_ROWS))
    partial = blocks[:, 0].clone()
    for i in range(1, COLUMN_ROWS):
        partial += blocks[:, i]
    column = partial[0].clone()
    for i in range(1, partial.shape[0]):
        column += partial[i]
    return total[:, 0] / columns, column / rows


def _quantize(x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    x = x.float()
    if x.numel() == 0:
        return torch.zeros_like(x, dtype=torch.int8), x.new_zeros(x.shape[1 - dim])
    # Two reductions without a temporary are as fast as abs().amax(), and a third of the memory traffic.
    absmax = torch.maximum(x.amax(dim, keepdim=True), -x.amin(dim, keepdim=True))
    finite = absmax.isfinite()
    if not finite.all():
        x = torch.where(finite, x, 0.0)
    scale = torch.where(finite, absmax / INT8_MAX, torch.nan)
    # A tensor divided by a tensor: `127.0 / absmax` would be torch's reciprocal times 127, rounded twice.
    inverse = torch.where(
        finite & (absmax > SMALLEST_ABSMAX), torch.full_like(absmax, INT8_MAX) / absmax, 0.0
    )
    return (x * inverse).round_().to(torch.int8), scale.squeeze(dim)
