"""`hf` and `hf-bitnet`: directories that stock `transformers` loads, without `dqt`.

`hf` is the architecture as it is, in `float32`: every weight is codes times scale, so that no bit of it is
lost, at 4 bytes a weight. Its linear layers multiply floats; what a model trained with int8 activations makes
of that is small, and `--verify` reports it.

`hf-bitnet` is for ternary weights: `transformers`' own packing for BitNet, 2 bits a weight, activations int8
per token as in training. Its layout is not ours: byte [i, j] holds the codes + 1 of the rows i, i + n/4,
i + n/2 and i + 3n/4, lowest bits first. `weight_scale` is the *inverse* of our scale for the layer class
`bitlinear`, which divides by it; for `autobitlinear` it would be the scale itself.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dqt.errors import ModelError
from dqt.export.source import Source, as_float, copy_tokenizer, exported_tensors
from dqt.tensor import QuantizedTensor
from dqt.train.storage import save_tensors

SHARD_BYTES = 4 << 30
BITNET_ARCHITECTURES = ("llama", "bitnet")


def write_hf(source: Source, target: Path) -> None:
    """Writes a directory of float weights for `AutoModelForCausalLM.from_pretrained`."""
    _write(source, target, ((name, as_float(tensor)) for name, tensor in exported_tensors(source.model)))


def write_hf_bitnet(source: Source, target: Path) -> None:
    """Writes a directory of packed ternary weights for `AutoModelForCausalLM.from_pretrained`.

    Raises:
        ModelError: If a weight is in another format, or of a shape that this packing has no place for.
    """
    source.require_architecture(BITNET_ARCHITECTURES, "hf-bitnet")
    head = source.model.get_output_embeddings()
    packed, floats = [], []
    for name, module in source.model.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        if module is head or not isinstance(module.weight, QuantizedTensor):
            floats.append(name)
        else:
            _check(f"{name}.weight", module.weight)
            packed.append(f"{name}.weight")
    if not packed:
        raise ModelError(
            f"{source.directory} has no ternary weights: hf-bitnet is for models trained with --bits ternary "
            "or --method bitnet; use --to hf"
        )
    quantization: dict[str, Any] = {
        "quant_method": "bitnet",
        "linear_class": "bitlinear",
        "quantization_mode": "offline",
        "modules_to_not_convert": floats,
    }
    _write(source, target, _packed_tensors(source.model, set(packed)), quantization)


def _check(name: str, weight: QuantizedTensor) -> None:
    advice = "use --to hf or --to gguf"
    if str(weight.format) != "ternary":
        raise ModelError(f"hf-bitnet holds ternary weights, {name} has {weight.format} bits: {advice}")
    if not bool((weight.scale == weight.scale.flatten()[0]).all()):
        raise ModelError(f"hf-bitnet holds one scale a tensor, {name} has one a row: {advice}")
    if weight.shape[0] % 4:
        raise ModelError(f"hf-bitnet packs 4 rows together, {name} has {weight.shape[0]} rows: {advice}")


def _packed_tensors(model: nn.Module, packed: set[str]) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in exported_tensors(model):
        if name in packed:
            assert isinstance(tensor, QuantizedTensor)
            yield name, pack_ternary(tensor.unpack())
            yield f"{name}_scale", tensor.scale.flatten()[:1].reciprocal()
        else:
            yield name, as_float(tensor)


def pack_ternary(codes: Tensor) -> Tensor:
    """Packs ternary codes as `transformers` does for BitNet.

    Args:
        codes: `int8` [rows, columns], rows a multiple of 4.

    Returns:
        `uint8` [rows / 4, columns].
    """
    quarters = (codes + 1).to(torch.uint8).unflatten(0, (4, -1))
    return quarters[0] | quarters[1] << 2 | quarters[2] << 4 | quarters[3] << 6


def _write(
    source: Source,
    target: Path,
    tensors: Iterable[tuple[str, Tensor]],
    quantization: dict[str, Any] | None = None,
) -> None:
    model = source.model
    config = copy.deepcopy(model.config)
    config.architectures = [_stock_class(model)]
    config.dtype = torch.float32
    if quantization is not None:
        config.quantization_config = quantization
    elif hasattr(config, "quantization_config"):  # what these weights were
        del config.quantization_config
    config.save_pretrained(target)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(target)
    copy_tokenizer(source, target)
    _save_in_shards(target, tensors)


def _stock_class(model: nn.Module) -> str:
    """The name of the model's class in `transformers`."""
    return next(c.__name__ for c in type(model).__mro__ if c.__module__.startswith("transformers."))


def _save_in_shards(target: Path, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Writes tensors as they come, so that a model of any size takes one shard's memory and no more."""
    shard: dict[str, Tensor] = {}
    names: list[list[str]] = []
    total = size = 0

    def flush() -> None:
        save_tensors(target / f"shard-{len(names)}", shard)
        names.append(list(shard))
        shard.clear()

    for name, tensor in tensors:
        if shard and size + tensor.nbytes > SHARD_BYTES:
            flush()
            size = 0
        shard[name] = tensor
        size += tensor.nbytes
        total += tensor.nbytes
    flush()
    if len(names) == 1:
        (target / "shard-0").rename(target / "model.safetensors")
        return
    files = [f"model-{i + 1:05}-of-{len(names):05}.safetensors" for i in range(len(names))]
    for i, file in enumerate(files):
        (target / f"shard-{i}").rename(target / file)
    index = {
        "metadata": {"total_size": total},
        "weight_map": {name: file for file, part in zip(files, names, strict=True) for name in part},
    }
    (target / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
