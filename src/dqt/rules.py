"""Which weights become integers, and on which grid: the decisions of `quantize_`, without doing anything.

They are asked in two places: by `quantize_`, for a model that exists, and by `dqt.hf`, for a model whose
weights `transformers` is about to read from a file, one after the other.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from dqt.choices import INT8_PRODUCTS, TRAINED_PRODUCTS, Products
from dqt.errors import ConfigError
from dqt.numerics.formats import Format, parse_bits
from dqt.numerics.scales import compute_scale
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


class Rules:
    """Bits for a model's weights: a default, and glob patterns on module names that say otherwise.

    Args:
        bits: Of every `nn.Linear` but the output head.
        patterns: To bits, or None for float; the last one that matches wins.

    Raises:
        ConfigError: If there are no such bits.

    Attributes:
        unmatched: The patterns that have matched nothing so far.
    """

    def __init__(self, bits: str | int, patterns: Mapping[str, Rule] | None = None) -> None:
        self.default = parse_bits(bits)
        self.patterns = {
            pattern: None if rule is None else parse_bits(rule) for pattern, rule in (patterns or {}).items()
        }
        self.unmatched = set(self.patterns)

    def decide(
        self, weight: nn.Parameter, modules: Mapping[str, nn.Module], is_head: bool
    ) -> tuple[Format | None, str]:
        """The format of a weight, or None and the reason.

        Args:
            weight: The weight.
            modules: Those that share it, by name.
            is_head: Whether one of them is the output head.
        """
        matching = [p for p in self.patterns if any(fnmatch.fnmatchcase(name, p) for name in modules)]
        self.unmatched.difference_update(matching)
        other = [m for m in modules.values() if not isinstance(m, nn.Linear | nn.Embedding)]
        convertible = not other or weight.ndim == 1
        if isinstance(weight, QuantizedTensor):
            return None, "already quantized"
        if not weight.is_floating_point():
            return None, f"not float but {weight.dtype}"
        if matching:
            target = self.patterns[matching[-1]]
            if target is not None and not convertible:
                raise ConfigError(
                    f"rule {matching[-1]!r} asks for {target} bits on a {type(other[0]).__name__}, which "
                    "can't be converted (only nn.Linear, nn.Embedding and norm gains): exclude it with a "
                    "rule of None"
                )
            return target, f"rule {matching[-1]!r}"
        if is_head:
            return None, "output head: float by default, a rule can convert it"
        if weight.ndim == 1:
            return None, "norm gain: float by default, a rule can convert it"
        if other:
            return None, f"{type(other[0]).__name__} is neither nn.Linear nor nn.Embedding"
        if any(isinstance(module, nn.Embedding) for module in modules.values()):
            return None, "embedding: float by default, a rule can convert it"
        return self.default, ""


def shared_weights(
    model: nn.Module, ties: Mapping[str, str] | None = None
) -> list[tuple[nn.Parameter, dict[str, nn.Module]]]:
    """Every module's `weight` once, with the modules that share it by name: ties are decided together.

    Args:
        model: Any module.
        ties: Names of weights that will be another one's, which `transformers` ties after it has loaded them.
    """
    found: dict[int, tuple[nn.Parameter, dict[str, nn.Module]]] = {}
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, nn.Parameter):
            source = (ties or {}).get(f"{name}.weight")
            weight = weight if source is None else model.get_parameter(source)
            found.setdefault(id(weight), (weight, {}))[1][name] = module
    return list(found.values())


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


def settings_for(
    trained: bool, scale_rule: str | None, per_row: bool | None, products: Products | None
) -> tuple[str | None, bool, Products]:
    """What `dqt.quantize_` does where nothing else is said, for new weights or trained ones."""
    if trained:
        return (
            scale_rule or "trained",
            True if per_row is None else per_row,
            products or TRAINED_PRODUCTS,
        )
    return scale_rule, bool(per_row), products or INT8_PRODUCTS


def initial_scale(
    name: str, weight: Tensor, format: Format, rule: str, headroom: float, per_row: bool
) -> Tensor:
    """The scale that a float weight starts with, by a rule; see `dqt.quantize_`.

    Raises:
        ConfigError: If the weight holds NaN or Inf.
    """
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
