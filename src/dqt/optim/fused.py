"""Adam's direction, the write-back and the packing in one pass over a weight, by the CPU kernel.

The kernel keeps a segment of 512 weights in the first-level cache from the gradient to the packed code, where
the reference makes some thirty passes. Its result is bit for bit that of `AdamW.direction` and `write_back`.
"""

from __future__ import annotations

import ctypes
import math
from typing import Any

import torch
from torch import Tensor

from dqt.errors import ConfigError
from dqt.ops import cpu
from dqt.optim.writeback import WriteBackStats
from dqt.tensor import QuantizedTensor


def adam_update(
    weight: QuantizedTensor,
    grad: Tensor,
    state: dict[str, Any],
    factors: tuple[Tensor, Tensor] | None,
    *,
    lr: float,
    weight_decay: float,
    betas: tuple[float, float],
    corrections: tuple[float, float],
    eps: float,
    residual_bits: int,
    hysteresis: float,
    nearest: bool,
    counter: tuple[int, int, int, int],
    stats: WriteBackStats | None,
) -> bool:
    """One step of a weight.

    Args:
        weight: The weight; its codes change.
        grad: Gradient matrix [rows, columns].
        state: The optimizer's state of the weight: moments and residual, which change.
        factors: Row and column factors of a factored second moment, or None for a full one.
        lr: Learning rate.
        weight_decay: Decoupled weight decay.
        betas: Moment decays.
        corrections: See `dqt.optim.adamw.corrections`.
        eps: Added to the root of the second moment.
        residual_bits: 0 is strict.
        hysteresis: h, in grid steps.
        nearest: Round to nearest instead of stochastically.
        counter: Seed, purpose, stream and step of the random numbers.
        stats: Counts to add to, or None.

    Returns:
        Whether there is a kernel for this case; if not, nothing was changed.
    """
    residual = state.get("residual")
    lib = cpu.usable(weight.codes, grad, residual)
    if lib is None or grad.dtype != torch.float32:
        return False
    grad = grad.contiguous()
    fmt = weight.format
    unit = 2 ** (residual_bits - 1) if residual_bits else 1
    row_factor, column_factor = factors or (None, None)
    seed, purpose, stream, step = counter
    args = cpu.Update(
        codes=cpu.pointer(weight.codes, torch.uint8),
        scale=cpu.pointer(weight.scale, torch.float32),
        grad=cpu.pointer(grad, torch.float32),
        exp_avg=cpu.pointer(state.get("exp_avg"), torch.float32),
        exp_avg_sq=cpu.pointer(state.get("exp_avg_sq"), torch.float32),
        row_factor=cpu.pointer(row_factor, torch.float32),
        column_factor=cpu.pointer(column_factor, torch.float32),
        residual=cpu.pointer(residual, torch.int16 if residual_bits == 16 else torch.uint8),
        rows=weight.rows,
        columns=weight.shape[-1],
        code_bytes=weight.codes.shape[-1],
        residual_bytes=0 if residual is None else residual.shape[-1] * residual.element_size(),
        stream=stream,
        seed=seed,
        purpose=purpose,
        step=step,
        scale_per_row=int(weight.scale.ndim > 0),
        bits=fmt.bits,
        qmin=fmt.qmin,
        levels=fmt.levels,
        residual_bits=residual_bits,
        threshold=math.floor((0.5 + hysteresis) * unit),
        nearest=int(nearest),
        bottom=(fmt.qmin - fmt.offset) * unit,
        lr_unit=lr * unit,
        decay=lr * weight_decay,
        beta1=betas[0],
        one_minus_beta1=1 - betas[0],
        beta2=betas[1],
        one_minus_beta2=1 - betas[1],
        correction1=corrections[0],
        sqrt_correction2=corrections[1],
        eps=eps,
    )
    if lib.dqt_update(ctypes.byref(args)):
        raise ConfigError(
            f"the update kernel refuses {tuple(weight.shape)} {fmt} with {residual_bits} residual bits"
        )
    torch.autograd.graph.increment_version((weight, weight.codes))
    if stats is not None:
        stats.elements += weight.numel()
        stats.flipped += args.stats[0]
        stats.saturated += args.stats[1]
        stats.zeros += 0 if fmt.offset else args.stats[2]
        if residual is not None:
            stats.residual_squares += args.stats[3] / unit**2
            stats.residual_elements += weight.numel()
    return True
