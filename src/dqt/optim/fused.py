"""A parameter's whole update in one pass, by the CPU kernel: moments, direction, write-back and packing.

The kernel keeps 128 elements in the first-level cache from the gradient to the packed code, where the
reference makes some thirty passes. Its results are bit for bit those of `Rule.direction` and `write_back`, or
`write_float`.
"""

from __future__ import annotations

import ctypes
import math
from typing import Any

import torch
from torch import Tensor

from dqt.choices import KERNEL_ROUNDINGS
from dqt.errors import ConfigError
from dqt.numerics import philox
from dqt.ops import cpu
from dqt.optim.moments import Moments
from dqt.optim.step import Step
from dqt.tensor import QuantizedTensor

_FIRST = {"none": 0, "fp32": 1, "bf16": 2, "int8": 3}
_SECOND = {"none": 0, "full": 1, "int8": 3, "factored": 4}
_TYPES = {1: torch.float32, 2: torch.bfloat16}


def update(step: Step, paper_scale: Tensor | None = None) -> bool:
    """One step of a parameter.

    Args:
        step: What to do.
        paper_scale: The new scale of the paper's recipe, which rounds values on it; see `dqt.optim.paper`.

    Returns:
        Whether there is a kernel for this case; if not, nothing was changed.
    """
    parameter, grad = step.parameter, step.grad
    weight = parameter if isinstance(parameter, QuantizedTensor) else None
    lib = cpu.usable(weight.codes if weight is not None else parameter, grad)
    if lib is None or grad.dtype != torch.float32:
        return False
    if not _has_kernel(step):
        return False
    if weight is None and (parameter.dtype != torch.float32 or not parameter.is_contiguous()):
        return False
    grad = grad.contiguous()
    rule = step.rule
    args = cpu.Update(
        grad=cpu.pointer(grad, torch.float32, parameter.numel()),
        rows=grad.shape[0],
        columns=grad.shape[1],
        stream=step.stream,
        seed=step.seed,
        purpose=philox.Purpose.UPDATE,
        moment_purpose=philox.Purpose.MOMENT,
        step=step.number,
        rounding=KERNEL_ROUNDINGS.index(step.rounding) if weight is not None else 0,
        count=int(step.stats is not None),
        lr_unit=rule.lr,
        decay=rule.decay,
        keep=1 - rule.decay,
        beta1=rule.beta1,
        weight1=rule.weight1,
        beta2=rule.beta2,
        weight2=rule.weight2,
        root_factor=rule.root_factor,
        eps=rule.eps,
        least=step.least,
        normalize_first=int(rule.normalize_first),
        paper_scale=cpu.pointer(paper_scale, torch.float32, 1),
        **_moment_fields(step.moments),
    )
    if weight is None:
        args.weight = cpu.pointer(parameter, torch.float32)
    unit = 1 if weight is None else _set_grid(args, step, weight)
    if lib.dqt_update(ctypes.byref(args)):
        raise ConfigError(
            f"the update kernel refuses {tuple(parameter.shape)} with {step.residual_bits} residual bits "
            f"and the moments {step.moments.first}, {step.moments.second}"
        )
    if weight is None:
        torch.autograd.graph.increment_version(parameter)
        return True
    torch.autograd.graph.increment_version((weight, weight.codes))
    if (stats := step.stats) is not None:
        stats.elements += weight.numel()
        stats.flipped += args.stats[0]
        stats.saturated += args.stats[1]
        stats.zeros += 0 if weight.format.offset else args.stats[2]
        if step.residual is not None:
            stats.residual_squares += args.stats[3] / unit**2
            stats.residual_elements += weight.numel()
    return True


def _has_kernel(step: Step) -> bool:
    """Whether the kernel knows a step's variants; those that are for comparison run on the reference."""
    if step.moments.first not in _FIRST or step.moments.second not in _SECOND:
        return False
    return not isinstance(step.parameter, QuantizedTensor) or (
        step.rounding in KERNEL_ROUNDINGS
        and step.residual_bits <= 16
        and not step.drop_smallest
        and step.error_feedback == "none"
    )


def _moment_fields(moments: Moments) -> dict[str, Any]:
    state, first, second = moments.state, _FIRST[moments.first], _SECOND[moments.second]
    row_inverse, column_inverse = moments.inverses or (None, None)
    scale = state.get("exp_avg_scale", state.get("exp_avg_sq_scale"))
    return {
        "first": first,
        "second": second,
        "exp_avg": cpu.pointer(state.get("exp_avg"), _TYPES.get(first, torch.int8)),
        "exp_avg_sq": cpu.pointer(state.get("exp_avg_sq"), _TYPES.get(second, torch.uint8)),
        "exp_avg_scale": cpu.pointer(state.get("exp_avg_scale"), torch.float32),
        "exp_avg_sq_scale": cpu.pointer(state.get("exp_avg_sq_scale"), torch.float32),
        "scale_blocks": 0 if scale is None else scale.shape[1],
        "row_inverse": cpu.pointer(row_inverse, torch.float32),
        "column_inverse": cpu.pointer(column_inverse, torch.float32),
        "rounded_moments": int(moments.rounded),
    }


def _set_grid(args: cpu.Update, step: Step, weight: QuantizedTensor) -> int:
    """Fills in what describes the weight's grid; returns positions in a grid step."""
    fmt, residual, bits = weight.format, step.residual, step.residual_bits
    unit = 2 ** (bits - 1) if bits else 1
    args.codes = cpu.pointer(weight.codes, torch.uint8)
    args.scale = cpu.pointer(weight.scale, torch.float32, weight.rows if weight.scale.ndim else 1)
    args.scale_per_row = int(weight.scale.ndim > 0)
    args.code_bytes = weight.codes.shape[-1]
    args.bits, args.qmin, args.levels = fmt.bits, fmt.qmin, fmt.levels
    args.bottom = (fmt.qmin - fmt.offset) * unit
    args.lr_unit = step.rule.lr * unit
    args.short_positions = int((fmt.levels - 1) * unit < 2**14)
    if residual is not None:
        args.residual = cpu.pointer(residual, torch.int16 if bits == 16 else torch.uint8)
        args.residual_bytes = residual.shape[-1] * residual.element_size()
        args.residual_bits = bits
        args.threshold = math.floor((0.5 + step.hysteresis) * unit)
    return unit
