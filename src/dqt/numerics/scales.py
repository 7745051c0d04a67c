"""Scale rules: how long a grid step is for given float weights.

The scale is set once and stays frozen through training: recomputing an absmax each step pushes every weight
off its grid and adds up to scale**2 / 4 of noise a step. It is rounded to a float16 value, because the export
formats store float16 scales, so that an exported weight is exactly the trained one.

    gaussian   the mean-square-optimal step for normally distributed weights (default for 2 to 8 bits)
    absmean    mean|w| for ternary as in BitNet b1.58, 2*mean|w| for binary (default for both);
               mean|w| / qmax for other widths
    absmax     max|w| reaches the end of the grid: nothing is clipped
    trained    for weights that were trained before, as floats, and have outliers: absmax; at 4 bits 0.8 and
               at 3 bits 0.6 of it; gaussian below, where reaching the largest would make most others zero
    learned    begins as the default of the width, and is trained: see `dqt.optim.learned_scale`
    paper      mean|w| / qmax, the initial scale of the published code (arXiv 2412.04787); not rounded
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from dqt.errors import ConfigError, did_you_mean
from dqt.numerics.formats import GAUSSIAN_STEP, Format


def _gaussian(weight: Tensor, fmt: Format) -> Tensor:
    return GAUSSIAN_STEP[fmt.name] * weight.square().mean(dim=1).sqrt()


def _absmean(weight: Tensor, fmt: Format) -> Tensor:
    return weight.abs().mean(dim=1) / fmt.half_range


def _absmax(weight: Tensor, fmt: Format) -> Tensor:
    return weight.abs().amax(dim=1) / fmt.half_range


# Loss after conversion of SmolLM2-135M, one scale a row, float activations (2.944 as floats), at 1.0, 0.8 and
# 0.6 of absmax and with gaussian: 4 bits 3.58, 3.47, 4.50, 10.6; 3 bits 10.1, 7.10, 5.82, 13.2; 2 bits 18.9,
# 17.5, 16.2, 17.7; ternary 18.9, 17.5, 16.4, 16.5; 1 bit 18.3, 18.8, 19.8, 14.9.
_REACH = {"3": 0.6, "4": 0.8}


def _trained(weight: Tensor, fmt: Format) -> Tensor:
    if fmt.bits < 3:
        return _gaussian(weight, fmt)
    return _REACH.get(fmt.name, 1.0) * _absmax(weight, fmt)


def _learned(weight: Tensor, fmt: Format) -> Tensor:
    return SCALE_RULES[default_scale_rule(fmt)](weight, fmt)


SCALE_RULES: dict[str, Callable[[Tensor, Format], Tensor]] = {
    "gaussian": _gaussian,
    "absmean": _absmean,
    "absmax": _absmax,
    "trained": _trained,
    "learned": _learned,
    "paper": _absmean,
}


def default_scale_rule(fmt: Format) -> str:
    """`absmean` for ternary and binary, `gaussian` for 2 to 8 bits."""
    return "absmean" if fmt.name in ("ternary", "1") else "gaussian"


def compute_scale(
    weight: Tensor, fmt: Format, rule: str, per_row: bool = False, headroom: float = 1.0
) -> Tensor:
    """Scale for a float weight.

    Args:
        weight: Float tensor with at least one dimension; its rows are all dimensions but the last.
        fmt: The format of its codes.
        rule: A name in `SCALE_RULES`.
        per_row: One scale a row, instead of one for the tensor.
        headroom: Factor on the rule's scale: a coarser grid that reaches further, for weights that will grow.

    Returns:
        `float32` tensor: [] or [rows, 1], values of float16 (except for `paper`). Zero where all weights are
        zero.

    Raises:
        ConfigError: If the rule is unknown.
    """
    if rule not in SCALE_RULES:
        raise ConfigError(f"unknown scale rule {rule!r}; {did_you_mean(rule, SCALE_RULES)}")
    rows = weight.detach().float().reshape(math.prod(weight.shape[:-1]) if per_row else 1, -1)
    scale = SCALE_RULES[rule](rows, fmt) * headroom
    if rule != "paper":
        scale = round_to_float16(scale)
    return scale[:, None] if per_row else scale[0]


def round_to_float16(scale: Tensor) -> Tensor:
    """The nearest positive float16 value, as float32; a zero stays zero."""
    smallest = 2.0**-24  # float16's least number; weights of standard deviation 1e-5 need scales this small
    rounded = scale.clamp(smallest, torch.finfo(torch.float16).max).half().float()
    return torch.where(scale > 0, rounded, 0.0)
