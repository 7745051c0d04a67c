"""Row and column quantization to int8 in plain PyTorch: the specification of every faster kernel.

Symmetric absmax to [-127, 127], rounding half to even: scale = absmax / 127, q = rint(x * (127 / absmax)), all in
float32, one IEEE division a row. A row with NaN or Inf gets a NaN scale and zero codes, so that the error reaches
the loss (where it is reported) instead of a float-to-integer cast (where NaN silently becomes 0).
"""

from __future__ import annotations

import torch
from torch import Tensor

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


def quantize_columns(x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantizes each column to int8.

    Args:
        x: Float tensor [rows, columns].

    Returns:
        `int8` codes [rows, columns] and `float32` scale [columns], so that x is about codes * scale.
    """
    return _quantize(x, dim=0)


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
    inverse = torch.where(finite & (absmax > SMALLEST_ABSMAX), INT8_MAX / absmax, 0.0)
    return (x * inverse).round_().to(torch.int8), scale.squeeze(dim)
