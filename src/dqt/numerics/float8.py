"""Float8 numbers: e4m3 (4 significant bits, up to 448) and e5m2 (3 bits, up to 57,344), with scales.

Rounding is written out, because a cast is not enough: torch turns Inf into 448 on its way to e4m3, and rounds
to nearest only. Values are scaled to the format's largest number first, so nothing overflows; what is not
finite gets a NaN scale, so that the error reaches the loss.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from dqt.sizes import SCALE_BLOCK

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2

LARGEST = {E4M3: 448.0, E5M2: 57344.0}
SMALLEST_E4M3 = 2.0**-9
"""The smallest e4m3 number above zero, and the step below 2**-6."""


def stochastic_e4m3(values: Tensor, random16: Tensor) -> Tensor:
    """Rounds to e4m3 numbers, up in magnitude with the probability of the fraction.

    Args:
        values: `float32`, magnitudes up to 448.
        random16: Uniform integers in [0, 2**16), of the same shape.

    Returns:
        `float32` tensor of e4m3 numbers.
    """
    magnitude = values.abs()
    # frexp's mantissa is in [1/2, 1): four significant bits are steps of 2**(exponent - 4).
    exponent = torch.frexp(magnitude).exponent.clamp_(min=-5)
    step = torch.ldexp(torch.ones_like(magnitude), exponent - 4)
    code = magnitude / step  # exact, in [0, 16)
    whole = code.floor()
    up = random16 < ((code - whole) * 65536.0).to(torch.int32)
    return ((whole + up) * step).clamp_(max=LARGEST[E4M3]).copysign_(values)


def nearest_in_blocks(x: Tensor) -> Tensor:
    """`float32` [rows, columns] with every 128 columns of a row rounded to e4m3 numbers times one scale."""
    blocks = F.pad(x.float(), (0, -x.shape[1] % SCALE_BLOCK)).view(-1, SCALE_BLOCK)
    codes, scale = quantize_float8(blocks, E4M3)
    return (codes.float() * scale[:, None]).view(x.shape[0], -1)[:, : x.shape[1]]


def quantize_float8(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Scales each row to the format's largest number and rounds it to nearest.

    Args:
        x: Float tensor [rows, columns].
        dtype: `E4M3` or `E5M2`.

    Returns:
        Codes of that dtype [rows, columns] and `float32` scale [rows]; x is about codes * scale[:, None]. A
        row with NaN or Inf has zeros and a NaN scale.
    """
    x = x.float()
    largest = x.abs().amax(1, keepdim=True) if x.numel() else x.new_zeros(x.shape[0], 1)
    finite = largest.isfinite()
    scale = torch.where(finite, largest / LARGEST[dtype], torch.nan)
    scaled = torch.where(finite & (scale > torch.finfo(torch.float32).tiny), x / scale, 0.0)
    return scaled.clamp_(-LARGEST[dtype], LARGEST[dtype]).to(dtype), scale.squeeze(1)
