"""`quantize_`: swaps weights of a model for `QuantizedTensor`s, in place, by rules on the modules' names.

Without rules every `nn.Linear` is converted except the output head; embeddings, head and norms stay float,
because quantizing them costs 0.25 nats at ternary. A rule names modules by a glob pattern and decides for all
that it matches, embeddings and norm gains included; the last rule that matches wins. What was left, and why,
is in the report; a rule that matched nothing is a warning.
"""

from __future__ import annotations

import fnmatch
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dqt.calibrate import input_products, round_for_output
from dqt.choices import FLOAT_PRODUCTS, INT8_PRODUCTS, Products
from dqt.errors import ConfigError
from dqt.nn import set_quantized_weight
from dqt.numerics.formats import Format, parse_bits
from dqt.numerics.scales import compute_scale, default_scale_rule
from dqt.tensor import QuantizedTensor

Rule = str | int | None
HEAD_NAMES = ("lm_head", "embed_out", "output_head")


@dataclass(frozen=True)
class Converted:
    """A weight that is now integers."""

    name: str
    format: Format
    shape: tuple[int, ...]
    scale_rule: str
    bytes: int


@dataclass(frozen=True)
class Left:
    """A weight that stayed float, and why."""

    name: str
    shape: tuple[int, ...]
    bytes: int
    reason: str


@dataclass
class QuantizeReport:
    """What `quantize_` did."""

    converted: list[Converted] = field(default_factory=list)
    left: list[Left] = field(default_factory=list)
    unmatched_rules: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = []
        for title, entries in (("converted", self.converted), ("left in float", self.left)):
            lines.append(f"{title}: {len(entries)} tensors, {sum(entry.bytes for entry in entries):,} bytes")
        lines += [f"  {left.name} {left.shape}: {left.reason}" for left in self.left if len(left.shape) > 1]
        lines += [f"  rule {pattern!r} matched nothing" for pattern in self.unmatched_rules]
        return "\n".join(lines)


def quantize_(
    model: nn.Module,
    bits: str | int = "ternary",
    rules: Mapping[str, Rule] | None = None,
    *,
    scale_rule: str | None = None,
    headroom: float = 1.0,
    per_row: bool = False,
    products: Products = INT8_PRODUCTS,
    materialize: Callable[[str], None] | None = None,
    calibrate: Tensor | Mapping[str, Any] | None = None,
) -> QuantizeReport:
    """Replaces float weights by packed low-bit integers, in place.

    Args:
        model: Any module; it is changed, its modules keep their classes.
        bits: "ternary", or 1 to 8, for every `nn.Linear` but the output head.
        rules: Glob pattern on module names ("*.mlp.*", "lm_head") to bits, or to None to leave float. The
            last matching rule wins, over the defaults too, and applies to embeddings and norm gains as well.
        scale_rule: "gaussian", "absmean", "absmax"; by default the one of the format.
        headroom: Factor on the rule's scale. The scale is frozen, so a model that starts from small random
            weights needs a grid that reaches further than they do.
        per_row: One scale a row instead of one a tensor.
        products: Which products are integer. An output head that a rule converts gets float products, because
            its input is not quantized in the paper either.
        materialize: For a model on the meta device: called with the name of a module that holds a weight,
            just before it is converted, to make its tensors real. One float weight at a time exists then;
            what stays float stays on the meta device.
        calibrate: A batch that the model can be called with, a tensor or keyword arguments. Linear weights
            are then rounded for the least error of their outputs on it, see `dqt.calibrate`: for a model
            that comes from a float checkpoint. Without it every weight is rounded to nearest.

    Returns:
        What was converted, what was left and why, and which rules matched nothing (also a warning).

    Raises:
        ConfigError: If bits or scale rule are unknown, or a rule asks for a module that can't be converted.
        DqtError: If a weight holds NaN or Inf.
    """
    default = parse_bits(bits)
    if not 0 < headroom <= 1000:
        raise ConfigError(f"headroom={headroom} must be above 0, and 1000 at the most")
    patterns = {
        pattern: None if rule is None else parse_bits(rule) for pattern, rule in (rules or {}).items()
    }
    report = QuantizeReport()
    head_weights = {id(head.weight) for head in output_heads(model)}
    unmatched = set(patterns)
    if calibrate is not None and materialize is not None:
        raise ConfigError(
            "calibrate runs the float model, which is on the meta device: leave materialize out"
        )
    inputs = {} if calibrate is None else input_products(model, calibrate)

    weights = _weights(model)
    while weights:
        weight, sharing = weights.pop(0)  # not kept in the list, so that a float weight is freed when packed
        matching = [p for p in patterns if any(fnmatch.fnmatchcase(name, p) for name in sharing)]
        unmatched.difference_update(matching)
        is_head = id(weight) in head_weights
        target, reason = _decide(weight, list(sharing.values()), default, is_head, matching, patterns)
        full_name = f"{next(iter(sharing))}.weight".removeprefix(".")
        shape = tuple(weight.shape)
        if target is None:
            report.left.append(Left(full_name, shape, weight.nbytes, reason))
            continue
        if materialize is not None:
            materialize(next(iter(sharing)))
        rule = scale_rule or default_scale_rule(target)
        scale = _scale(full_name, weight, target, rule, headroom, per_row)
        seen = inputs.pop(id(weight), None)
        values = weight if seen is None else round_for_output(weight, scale, target, seen).to(weight.dtype)
        quantized = QuantizedTensor.from_float(values, scale, target, FLOAT_PRODUCTS if is_head else products)
        parameter = nn.Parameter(quantized, requires_grad=weight.requires_grad)
        for module in sharing.values():
            set_quantized_weight(module, parameter)
        report.converted.append(Converted(full_name, target, shape, rule, quantized.nbytes_stored()))

    known = {entry.name for entry in report.converted} | {entry.name for entry in report.left}
    report.left += _unreachable(model, known)
    report.unmatched_rules = sorted(unmatched)
    if unmatched:
        warnings.warn(
            f"quantize_: rules that matched no module: {', '.join(sorted(unmatched))}", stacklevel=2
        )
    return report


def _weights(model: nn.Module) -> list[tuple[nn.Parameter, dict[str, nn.Module]]]:
    """Every module's `weight` once, with the modules that share it by name: ties are decided together."""
    found: dict[int, tuple[nn.Parameter, dict[str, nn.Module]]] = {}
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, nn.Parameter):
            found.setdefault(id(weight), (weight, {}))[1][name] = module
    return list(found.values())


def _decide(
    weight: nn.Parameter,
    modules: list[nn.Module],
    default: Format,
    is_head: bool,
    matching: list[str],
    patterns: Mapping[str, Format | None],
) -> tuple[Format | None, str]:
    """The format of a weight that `modules` share, or None and the reason."""
    other = [m for m in modules if not isinstance(m, nn.Linear | nn.Embedding)]
    convertible = not other or weight.ndim == 1
    if isinstance(weight, QuantizedTensor):
        return None, "already quantized"
    if not weight.is_floating_point():
        return None, f"not float but {weight.dtype}"
    if matching:
        target = patterns[matching[-1]]
        if target is not None and not convertible:
            raise ConfigError(
                f"rule {matching[-1]!r} asks for {target} bits on a {type(other[0]).__name__}, which can't "
                "be converted (only nn.Linear, nn.Embedding and norm gains): exclude it with a rule of None"
            )
        return target, f"rule {matching[-1]!r}"
    if is_head:
        return None, "output head: float by default, a rule can convert it"
    if weight.ndim == 1:
        return None, "norm gain: float by default, a rule can convert it"
    if other:
        return None, f"{type(other[0]).__name__} is neither nn.Linear nor nn.Embedding"
    if any(isinstance(module, nn.Embedding) for module in modules):
        return None, "embedding: float by default, a rule can convert it"
    return default, ""


def output_heads(model: nn.Module) -> set[nn.Module]:
    """The model's output head: transformers' own, a linear of a known name, or one tied to an embedding."""
    heads = set()
    if callable(getattr(model, "get_output_embeddings", None)):
        head = model.get_output_embeddings()  # type: ignore[operator]
        heads |= {head} if isinstance(head, nn.Module) else set()
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            tied = id(module.weight) in embeddings
            if tied or name.rpartition(".")[2] in HEAD_NAMES:
                heads.add(module)
    return heads


def linear_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The modules that `quantize_` converts without rules: every `nn.Linear` but the output head."""
    heads = output_heads(model)
    return [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear) and m not in heads]


def _scale(name: str, weight: Tensor, format: Format, rule: str, headroom: float, per_row: bool) -> Tensor:
    if not weight.detach().isfinite().all():
        raise ConfigError(
            f"{name} holds NaN or Inf and can't be quantized: load or initialize the model again"
        )
    scale = compute_scale(weight, format, rule, per_row, headroom)
    if not (scale > 0).all():
        # A layer initialized with zeros has no spread to take a scale from: use nn.Linear's usual
        # 1/sqrt(3 * in).
        spread = torch.full((1, 1), (3 * max(1, weight.shape[-1])) ** -0.5, device=weight.device)
        scale = torch.where(scale > 0, scale, compute_scale(spread, format, rule, headroom=headroom))
    return scale


def _unreachable(model: nn.Module, known: set[str]) -> list[Left]:
    """Matrices that are no module's `weight`, such as 3-D expert weights: named, not skipped in silence."""
    return [
        Left(name, tuple(parameter.shape), parameter.nbytes, "not the weight of an nn.Linear")
        for name, parameter in model.named_parameters()
        if parameter.ndim >= 2 and name not in known and not isinstance(parameter, QuantizedTensor)
    ]
