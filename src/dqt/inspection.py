"""What a model's weights really are: bits, bytes, scale and codes of every tensor, and no float copy.

Everything is counted on the tensors themselves, never derived from the name of a format. A float copy of a
low-bit weight is looked for by value: any float tensor of as many elements, in the module tree or in a file,
that points in the weight's direction (cosine above 0.5, in either order of the dimensions; unrelated tensors
are near 0, a master copy of ternary weights is above 0.8). Size alone would accuse an embedding that happens
to be as large as a weight.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dqt.errors import ModelError
from dqt.models import build_config, build_with_recipe, count_parameters
from dqt.sizes import format_bytes
from dqt.start import find_start
from dqt.tensor import QuantizedTensor
from dqt.train import checkpoint, savedmodel, storage
from dqt.train.checkpoint import list_checkpoints
from dqt.train.config import Config
from dqt.train.metrics import code_histograms
from dqt.train.pretrained import float_config
from dqt.train.savedmodel import load_model

COPY_COSINE = 0.5
_SAMPLED = 2**16  # elements compared; a cosine of unrelated tensors is then below 0.02
_BARS = " ▁▂▃▄▅▆▇█"
_MAX_BARS = 16


@dataclass(frozen=True)
class TensorFacts:
    """One tensor of a model.

    Attributes:
        name: The parameter's name.
        format: Bits as the user writes them ("ternary", "4"), or a float dtype.
        shape: Logical shape.
        weights: How many numbers.
        bytes: What they take, scale included.
        bits_per_weight: bytes * 8 / weights.
        scale: Mean of the scale; None for floats.
        codes: How often each code occurs, lowest first; empty for floats.
        saturated: Share of codes at the ends of the range; None for floats.
        zeros: Share of zero codes; None for floats, and for binary, which has no zero.
    """

    name: str
    format: str
    shape: tuple[int, ...]
    weights: int
    bytes: int
    bits_per_weight: float
    scale: float | None = None
    codes: tuple[int, ...] = ()
    saturated: float | None = None
    zeros: float | None = None


@dataclass(frozen=True)
class Inspection:
    """What `inspect_model` found.

    Attributes:
        tensors: Every parameter once, in the model's order.
        float_tensors_searched: How many float tensors were compared with the low-bit weights.
        float_copies: Names of those that copy one; empty is as it should be.
    """

    tensors: tuple[TensorFacts, ...]
    float_tensors_searched: int
    float_copies: tuple[str, ...]

    @property
    def quantized(self) -> tuple[TensorFacts, ...]:
        """The low-bit tensors."""
        return tuple(facts for facts in self.tensors if facts.codes)

    def to_dict(self) -> dict[str, Any]:
        """All of it, and the totals, for JSON."""
        return {
            "tensors": [asdict(facts) for facts in self.tensors],
            "quantized": _totals(self.quantized),
            "all": _totals(self.tensors),
            "float_tensors_searched": self.float_tensors_searched,
            "float_copies": list(self.float_copies),
        }

    def __str__(self) -> str:
        return "\n".join(_render(self))


def inspect_model(model: nn.Module, files: Iterable[Path] = ()) -> Inspection:
    """Examines a model, and the safetensors files that it was read from.

    Args:
        model: Any module.
        files: Searched for float copies too, one tensor at a time.
    """
    parameters, codes = dict(model.named_parameters()), code_histograms(model)
    weights = {name: p for name, p in parameters.items() if isinstance(p, QuantizedTensor)}
    searched, copies = _float_copies(weights, (*_module_tensors(model), *_file_tensors(files)))
    return Inspection(
        tuple(_facts(name, p, codes.get(name, ())) for name, p in parameters.items()), searched, copies
    )


def inspect_path(path: str | Path) -> Inspection:
    """Examines the model of a run's directory, of its `model/`, or of a checkpoint.

    Of a run that was killed before it wrote a model, the newest checkpoint is taken. In a checkpoint, the
    optimizer's state is searched for float copies too.

    Raises:
        ModelError: If there is no such thing, or it is damaged.
    """
    path = Path(path)
    checkpoints = list_checkpoints(path / "checkpoints")
    if (path / checkpoint.STATE).is_file():
        return _inspect_checkpoint(path)
    if checkpoints and not (path / "model").is_dir():
        return _inspect_checkpoint(checkpoints[-1])
    model, _, _ = load_model(path)
    file = path / savedmodel.MODEL
    return inspect_model(model, [file if file.is_file() else path / "model" / savedmodel.MODEL])


def _inspect_checkpoint(path: Path) -> Inspection:
    """Rebuilds a checkpoint's model from the config in it, and reads its tensors."""
    state = checkpoint.read_state(path)
    config = Config.from_dict(state["config"], str(path / checkpoint.STATE))
    file = path / checkpoint.MODEL
    shapes = storage.tensor_shapes(file)
    embedding = ("embed_tokens.weight", "embed_tokens.weight.codes")
    vocab_size = next((shape[0] for name, shape in shapes.items() if name.endswith(embedding)), 0)
    model_config = _model_config(config, vocab_size)
    # The config's sizes are believed as far as the file goes: a weight takes a bit at least.
    layers = model_config.num_hidden_layers
    if layers > len(shapes) or count_parameters(model_config).total > 8 * file.stat().st_size:
        raise ModelError(f"{path / checkpoint.STATE} does not fit {file}: the model would be larger")
    model, _ = build_with_recipe(model_config, config.recipe(), config.quant.rules_to_bits)
    storage.load_model_tensors(model, file)
    return inspect_model(model, [file, path / checkpoint.OPTIMIZER])


def _model_config(config: Config, vocab_size: int) -> Any:
    """The `transformers` config of a run, given its effective config."""
    if config.model.start_from is not None:
        return float_config(find_start(config.model.start_from))
    preset, arch = str(config.model.preset), str(config.model.arch)
    return build_config(preset, arch, vocab_size, config.train.seq_len, config.model.overrides)


def bars(counts: Iterable[int]) -> str:
    """A histogram as a word of at most 16 block characters; whatever occurs at all is seen."""
    values = list(counts)
    group = max(1, -(-len(values) // _MAX_BARS))
    grouped = [sum(values[start : start + group]) for start in range(0, len(values), group)]
    top = max(grouped, default=0) or 1
    return "".join(_BARS[-(-value * (len(_BARS) - 1) // top)] for value in grouped)


def _facts(name: str, parameter: Tensor, codes: Sequence[int]) -> TensorFacts:
    shape, count = tuple(parameter.shape), parameter.numel()
    if not isinstance(parameter, QuantizedTensor):
        dtype = str(parameter.dtype).removeprefix("torch.")
        return TensorFacts(name, dtype, shape, count, parameter.nbytes, 8 * parameter.nbytes / max(count, 1))
    size, format = parameter.nbytes_stored(), parameter.format
    return TensorFacts(
        name,
        format.name,
        shape,
        count,
        size,
        8 * size / max(count, 1),
        float(parameter.scale.mean()),
        tuple(codes),
        (codes[0] + codes[-1]) / max(count, 1),
        None if format.offset else codes[-format.qmin] / max(count, 1),
    )


# -- float copies --------------------------------------------------------------------------------------------


def _module_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every tensor that a module holds: parameters, gradients, buffers, attributes, also in containers."""
    seen: set[int] = set()
    for prefix, module in model.named_modules():
        for key, value in _leaves(vars(module)):
            if id(value) not in seen and not key.startswith("_modules"):
                seen.add(id(value))
                yield f"module {prefix}.{key}", value
                if value.is_leaf and value.grad is not None:
                    yield f"module {prefix}.{key}.grad", value.grad


def _leaves(container: Any, prefix: str = "", depth: int = 3) -> Iterator[tuple[str, Tensor]]:
    if isinstance(container, Tensor):
        yield prefix, container
    elif depth and isinstance(container, Mapping | list | tuple):
        items = container.items() if isinstance(container, Mapping) else enumerate(container)
        for key, value in items:
            yield from _leaves(value, f"{prefix}.{key}" if prefix else str(key), depth - 1)


def _file_tensors(files: Iterable[Path]) -> Iterator[tuple[str, Tensor]]:
    from safetensors import safe_open

    for path in files:
        storage.tensor_shapes(path)
        with safe_open(path, framework="pt") as file:
            for key in sorted(file.keys()):
                yield f"{path.name} {key}", file.get_tensor(key)


def _float_copies(
    weights: Mapping[str, QuantizedTensor], tensors: Iterable[tuple[str, Tensor]]
) -> tuple[int, tuple[str, ...]]:
    """How many float tensors there are, and the names of those that copy a weight."""
    sizes = {weight.numel() for weight in weights.values() if weight.ndim > 1}
    directions: dict[int, list[tuple[str, Tensor]]] | None = None
    searched, copies = 0, []
    for name, tensor in tensors:
        if isinstance(tensor, QuantizedTensor) or not tensor.is_floating_point():
            continue
        searched += 1
        if tensor.numel() not in sizes:
            continue
        directions = _directions(weights) if directions is None else directions
        candidate = _direction(tensor)
        for weight_name, direction in directions[tensor.numel()]:
            if abs(float(candidate @ direction)) > COPY_COSINE:
                copies.append(f"{name} copies {weight_name}")
                break
    return searched, tuple(copies)


def _directions(weights: Mapping[str, QuantizedTensor]) -> dict[int, list[tuple[str, Tensor]]]:
    """Unit vectors of every weight, in both orders of its dimensions, by number of elements."""
    found: dict[int, list[tuple[str, Tensor]]] = {}
    for name, weight in weights.items():
        values = weight.dequantize().reshape(-1, weight.shape[-1])
        pair = [(name, _direction(values)), (name, _direction(values.T))]
        found.setdefault(weight.numel(), []).extend(pair)
    return found


def _direction(tensor: Tensor) -> Tensor:
    """Evenly spaced elements of a tensor, as a unit vector; zero if it is zero or not finite."""
    flat = tensor.detach().reshape(-1)
    sampled = flat[:: max(1, flat.numel() // _SAMPLED)].to("cpu", torch.float64)
    return torch.nan_to_num(sampled / sampled.norm(), nan=0.0, posinf=0.0, neginf=0.0)


# -- text ----------------------------------------------------------------------------------------------------


def _totals(tensors: Iterable[TensorFacts]) -> dict[str, float]:
    tensors = list(tensors)
    weights, size = sum(facts.weights for facts in tensors), sum(facts.bytes for facts in tensors)
    return {
        "tensors": len(tensors),
        "weights": weights,
        "bytes": size,
        "bits_per_weight": 8 * size / weights if weights else 0.0,
    }


def _render(inspection: Inspection) -> Iterator[str]:
    shown = [facts for facts in inspection.tensors if facts.codes or len(facts.shape) > 1]
    width = max((len(facts.name) for facts in shown), default=6)
    yield (
        f"{'tensor':{width}} {'bits':>8} {'shape':>12} {'bits/w':>7} {'bytes':>9} {'scale':>9} {'sat.':>6} "
        f"{'zero':>6}  codes"
    )
    for facts in shown:
        scale = "" if facts.scale is None else f"{facts.scale:.3g}"
        shares = [
            f"{100 * share:.1f}%" if share is not None else "" for share in (facts.saturated, facts.zeros)
        ]
        line = (
            f"{facts.name:{width}} {facts.format:>8} {'x'.join(map(str, facts.shape)):>12} "
            f"{facts.bits_per_weight:7.3f} {format_bytes(facts.bytes):>9} {scale:>9} {shares[0]:>6} "
            f"{shares[1]:>6}  {bars(facts.codes)}"
        )
        yield line.rstrip()
    vectors = _totals(facts for facts in inspection.tensors if facts not in shown)
    if vectors["tensors"]:
        yield f"and {vectors['tensors']} float vectors (gains and biases), {format_bytes(vectors['bytes'])}"
    yield ""
    for title, group in (("low-bit weights", inspection.quantized), ("all weights", inspection.tensors)):
        total = _totals(group)
        float32 = format_bytes(4 * total["weights"])
        yield (
            f"{title}: {total['weights']:,} in {format_bytes(total['bytes'])}, "
            f"{total['bits_per_weight']:.3f} bits a weight (float32 takes {float32})"
        )
    yield _verdict(inspection)


def _verdict(inspection: Inspection) -> str:
    searched = f"{inspection.float_tensors_searched} float tensors searched, in the model and its files"
    if not inspection.quantized:
        return "no low-bit weights: this method keeps its weights in float"
    if inspection.float_copies:
        return "\n".join([f"FLOAT COPIES of low-bit weights ({searched}):", *inspection.float_copies])
    return f"no float copy of a low-bit weight exists ({searched})"
