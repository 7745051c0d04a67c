"""`quantize_`: swaps the weights of a model's modules for `QuantizedTensor`s, in place, by rules on their names.

Without rules every `nn.Linear` is converted except the output head; embeddings, head and norms stay float, because
quantizing them costs 0.25 nats at ternary. A rule names modules by a glob pattern and decides for all that it
matches, embeddings and norm gains included; the last rule that matches wins. What was left, and why, is in the
report; a rule that matched nothing is a warning.
"""

from __future__ import annotations

import fnmatch
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from dqt.errors import ConfigError
from dqt.nn import set_quantized_weight
from dqt.numerics.formats import Format, parse_bits
from dqt.numerics.scales import compute_scale, default_scale_rule
from dqt.tensor import FLOAT_PRODUCTS, Products, QuantizedTensor

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
    per_row: bool = False,
    products: Products = Products(),  # noqa: B008  frozen
) -> QuantizeReport:
    """Replaces float weights by packed low-bit integers, in place.

    Args:
        model: Any module; it is changed, its modules keep their classes.
        bits: "ternary", or 1 to 8, for every `nn.Linear` but the output head.
        rules: Glob pattern on module names ("*.mlp.*", "lm_head") to bits, or to None to leave float. The last
            matching rule wins, over the defaults too, and applies to embeddings and norm gains as well.
        scale_rule: "gaussian", "absmean", "absmax"; by default the one of the format.
        per_row: One scale a row instead of one a tensor.
        products: Which products are integer. An output head that a rule converts gets float products, because its
            input is not quantized in the paper either.

    Returns:
        What was converted, what was left and why, and which rules matched nothing (also a warning).

    Raises:
        ConfigError: If bits or scale rule are unknown, or a rule asks for a module that can't be converted.
        DqtError: If a weight holds NaN or Inf.
    """
    default = parse_bits(bits)
    patterns = {pattern: None if rule is None else parse_bits(rule) for pattern, rule in (rules or {}).items()}
    report = QuantizeReport()
    heads = output_heads(model)
    head_weights = {id(head.weight) for head in heads}
    unmatched = set(patterns)
    replaced: dict[int, nn.Parameter] = {}  # tied weights stay tied

    for name, module in list(_modules_with_weight(model)):
        matching = [pattern for pattern in patterns if fnmatch.fnmatchcase(name, pattern)]
        unmatched.difference_update(matching)
        target, reason = _decide(module, default, module in heads, matching, patterns)
        weight = module.weight
        full_name = f"{name}.weight" if name else "weight"
        if id(weight) in replaced:
            set_quantized_weight(module, replaced[id(weight)])
        elif target is None:
            shape = tuple(weight.shape)
            report.left.append(Left(full_name, shape, weight.nbytes, reason))
        else:
            rule = scale_rule or default_scale_rule(target)
            used = FLOAT_PRODUCTS if id(weight) in head_weights else products
            parameter = _quantized_parameter(full_name, weight, target, rule, per_row, used)
            replaced[id(weight)] = parameter
            set_quantized_weight(module, parameter)
            size = parameter.nbytes_stored()  # type: ignore[attr-defined]
            report.converted.append(Converted(full_name, target, tuple(weight.shape), rule, size))

    report.left += _unreachable(model, {entry.name for entry in (*report.converted, *report.left)})
    report.unmatched_rules = sorted(unmatched)
    if unmatched:
        warnings.warn(f"quantize_: rules that matched no module: {', '.join(sorted(unmatched))}", stacklevel=2)
    return report


def _modules_with_weight(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_modules():
        if isinstance(getattr(module, "weight", None), nn.Parameter):
            yield name, module


def _decide(
    module: nn.Module, default: Format, is_head: bool, matching: list[str], patterns: Mapping[str, Format | None]
) -> tuple[Format | None, str]:
    """The format of a module's weight, or None and the reason."""
    weight = module.weight
    assert isinstance(weight, nn.Parameter)
    convertible = isinstance(module, nn.Linear | nn.Embedding) or weight.ndim == 1
    if isinstance(weight, QuantizedTensor):
        return None, "already quantized"
    if not weight.is_floating_point():
        return None, f"not float but {weight.dtype}"
    if matching:
        target = patterns[matching[-1]]
        if target is not None and not convertible:
            raise ConfigError(
                f"rule {matching[-1]!r} asks for {target} bits on a {type(module).__name__}, which can't be "
                "converted (only nn.Linear, nn.Embedding and norm gains): exclude it with a later rule of None"
            )
        return target, f"rule {matching[-1]!r}"
    if is_head:
        return None, "output head: float by default, a rule can convert it"
    if isinstance(module, nn.Linear):
        return default, ""
    if isinstance(module, nn.Embedding):
        return None, "embedding: float by default, a rule can convert it"
    if weight.ndim == 1:
        return None, "norm gain: float by default, a rule can convert it"
    return None, f"{type(module).__name__} is neither nn.Linear nor nn.Embedding"


def output_heads(model: nn.Module) -> set[nn.Module]:
    """Linear modules that are the model's output head: transformers' own, a known name, or tied to an embedding."""
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


def _quantized_parameter(
    name: str, weight: Tensor, format: Format, scale_rule: str, per_row: bool, products: Products
) -> nn.Parameter:
    if not weight.detach().isfinite().all():
        raise ConfigError(f"{name} holds NaN or Inf and can't be quantized: load or initialize the model again")
    scale = compute_scale(weight, format, scale_rule, per_row)
    if not (scale > 0).all():
        # A layer initialized with zeros has no spread to take a scale from: use nn.Linear's usual 1/sqrt(3 * in).
        spread = torch.full_like(weight[:1], (3 * weight.shape[-1]) ** -0.5)
        scale = torch.where(scale > 0, scale, compute_scale(spread, format, scale_rule))
    quantized = QuantizedTensor.from_float(weight, scale, format, products)
    return nn.Parameter(quantized, requires_grad=weight.requires_grad)


def _unreachable(model: nn.Module, known: set[str]) -> list[Left]:
    """Matrices that are not the `weight` of a module, such as 3-D expert weights: named, not skipped in silence."""
    return [
        Left(name, tuple(parameter.shape), parameter.nbytes, "not the weight of an nn.Linear")
        for name, parameter in model.named_parameters()
        if parameter.ndim >= 2 and name not in known and not isinstance(parameter, QuantizedTensor)
    ]
