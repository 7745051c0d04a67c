"""`quantize_`: swaps weights of a model for `QuantizedTensor`s, in place, by rules on the modules' names.

Without rules every `nn.Linear` is converted except the output head; embeddings, head and norms stay float,
because quantizing them costs 0.25 nats at ternary. A rule names modules by a glob pattern and decides for all
that it matches, embeddings and norm gains included; the last rule that matches wins. What was left, and why,
is in the report; a rule that matched nothing is a warning.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dqt.calibrate import input_products, round_for_output
from dqt.choices import FLOAT_PRODUCTS, Products
from dqt.errors import ConfigError
from dqt.nn import set_quantized_weight
from dqt.numerics.scales import default_scale_rule
from dqt.rules import (
    Converted,
    Left,
    QuantizeReport,
    Rule,
    Rules,
    initial_scale,
    output_heads,
    settings_for,
    shared_weights,
)
from dqt.tensor import QuantizedTensor


def quantize_(
    model: nn.Module,
    bits: str | int = "ternary",
    rules: Mapping[str, Rule] | None = None,
    *,
    scale_rule: str | None = None,
    headroom: float = 1.0,
    per_row: bool | None = None,
    products: Products | None = None,
    trained: bool = False,
    materialize: Callable[[str], None] | None = None,
    calibrate: Tensor | Mapping[str, Any] | None = None,
    keep_remainder: bool = False,
) -> QuantizeReport:
    """Replaces float weights by packed low-bit integers, in place.

    Args:
        model: Any module; it is changed, its modules keep their classes.
        bits: "ternary", or 1 to 8, for every `nn.Linear` but the output head.
        rules: Glob pattern on module names ("*.mlp.*", "lm_head") to bits, or to None to leave float. The
            last matching rule wins, over the defaults too, and applies to embeddings and norm gains as well.
        scale_rule: "gaussian", "absmean", "absmax", "trained"; by default the one of the format.
        headroom: Factor on the rule's scale. The scale is frozen, so a model that starts from small random
            weights needs a grid that reaches further than they do.
        per_row: One scale a row instead of one a tensor.
        products: Which products are integer; by default all. An output head that a rule converts gets float
            products, because its input is not quantized in the paper either.
        trained: Whether the weights were trained before, as floats: what is not given of the three above is
            then scale_rule "trained", one scale a row, and a float product in the forward pass.
        materialize: For a model on the meta device: called with the name of a module that holds a weight,
            just before it is converted, to make its tensors real. One float weight at a time exists then;
            what stays float stays on the meta device.
        calibrate: A batch that the model can be called with, a tensor or keyword arguments. Linear weights
            are then rounded for the least error of their outputs on it, see `dqt.calibrate`: for a model
            that comes from a float checkpoint. Without it every weight is rounded to nearest.
        keep_remainder: Keep what rounding leaves of each weight, a byte, until the first step of an
            optimizer, whose residual begins with it.

    Returns:
        What was converted, what was left and why, and which rules matched nothing (also a warning).

    Raises:
        ConfigError: If bits or scale rule are unknown, or a rule asks for a module that can't be converted.
        DqtError: If a weight holds NaN or Inf.
    """
    decisions = Rules(bits, rules)
    if not 0 < headroom <= 1000:
        raise ConfigError(f"headroom={headroom} must be above 0, and 1000 at the most")
    scale_rule, per_row, products = settings_for(trained, scale_rule, per_row, products)
    report = QuantizeReport()
    heads = output_heads(model)
    if calibrate is not None and materialize is not None:
        raise ConfigError(
            "calibrate runs the float model, which is on the meta device: leave materialize out"
        )
    inputs = {} if calibrate is None else input_products(model, calibrate)

    weights = shared_weights(model)
    while weights:
        weight, sharing = weights.pop(0)  # not kept in the list, so that a float weight is freed when packed
        is_head = any(module in heads for module in sharing.values())
        target, reason = decisions.decide(weight, sharing, is_head)
        full_name = f"{next(iter(sharing))}.weight".removeprefix(".")
        shape = tuple(weight.shape)
        if target is None:
            report.left.append(Left(full_name, shape, weight.nbytes, reason))
            continue
        if materialize is not None:
            materialize(next(iter(sharing)))
        rule = scale_rule or default_scale_rule(target)
        scale = initial_scale(full_name, weight, target, rule, headroom, per_row)
        seen = inputs.pop(id(weight), None)
        values = weight if seen is None else round_for_output(weight, scale, target, seen).to(weight.dtype)
        quantized = QuantizedTensor.from_float(values, scale, target, FLOAT_PRODUCTS if is_head else products)
        parameter = nn.Parameter(quantized, requires_grad=weight.requires_grad)
        if keep_remainder:
            quantized_parameter: Any = parameter
            quantized_parameter.kept_remainder = _remainder(weight, quantized)
        for module in sharing.values():
            set_quantized_weight(module, parameter)
        report.converted.append(Converted(full_name, target, shape, rule, quantized.nbytes_stored()))

    known = {entry.name for entry in report.converted} | {entry.name for entry in report.left}
    report.left += _unreachable(model, known)
    report.unmatched_rules = sorted(decisions.unmatched)
    if decisions.unmatched:
        names = ", ".join(report.unmatched_rules)
        warnings.warn(f"quantize_: rules that matched no module: {names}", stacklevel=2)
    if hasattr(model, "save_pretrained"):  # so that it writes what `from_pretrained` reads
        from dqt.hf import remember

        remember(model)
    return report


def _remainder(weight: Tensor, quantized: QuantizedTensor) -> Tensor:
    """See `QuantizedTensor.kept_remainder`: the nearest weight that code and remainder reach together."""
    fmt, codes = quantized.format, quantized.unpack_rows().float()
    rest = weight.detach().float().reshape(codes.shape) / quantized.scale + fmt.offset - codes
    lowest, highest = (codes > fmt.qmin) * -0.5, (codes < fmt.qmax) * 0.5
    return (rest.clamp(lowest, highest) * 128).round_().to(torch.int8)


def _unreachable(model: nn.Module, known: set[str]) -> list[Left]:
    """Matrices that are no module's `weight`, such as 3-D expert weights: named, not skipped in silence."""
    return [
        Left(name, tuple(parameter.shape), parameter.nbytes, "not the weight of an nn.Linear")
        for name, parameter in model.named_parameters()
        if parameter.ndim >= 2 and name not in known and not isinstance(parameter, QuantizedTensor)
    ]
