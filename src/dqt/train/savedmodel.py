"""The finished model's directory: what `sample`, `eval` and `inspect` read.

    model/
        config.json                          transformers' own, for the architecture
        generation_config.json               transformers' own
        tokenizer.json, tokenizer_config.json
        model.safetensors                    weight.codes and weight.scale of low-bit weights, other floats
        dqt.json                             how to rebuild the low-bit weights, recipe, the run's summary
        manifest.json                        size and SHA-256 of the others

What `save_pretrained` of `transformers` writes, and so Trainer, has neither `dqt.json` nor the manifest: how
the low-bit weights are rebuilt stands in config.json, and their hashes; nobody noted how they were trained.

The weights are in the format they were trained in, so that nothing is lost or gained by saving; other
runtimes need an export. A model is rebuilt from its class and the list of its low-bit tensors, not from a
pickled object.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from dqt.baselines import bitnet_
from dqt.build import autocast
from dqt.choices import Products
from dqt.data.tokenizer import CHAT_TEMPLATE, TextTokenizer, load_tokenizer
from dqt.errors import ConfigError, DqtError, ModelError
from dqt.fused import fuse_, is_fused
from dqt.hf import METHOD, DqtConfig, remember
from dqt.models import Initializer, empty_model
from dqt.nn import set_quantized_weight
from dqt.numerics.formats import parse_bits
from dqt.ops.bf16_guard import ensure_bf16_products
from dqt.packed import Packed, check, read_description
from dqt.recipes import METHODS, Recipe, recipe_for
from dqt.rules import QuantizeReport
from dqt.sizes import packed_size
from dqt.start import one_line
from dqt.tensor import QuantizedTensor
from dqt.train import storage
from dqt.train.checkpoint import versions

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MODEL, INFO = "model.safetensors", "dqt.json"
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", CHAT_TEMPLATE)


def save_model(
    target: Path,
    model: PreTrainedModel,
    tokenizer_dir: Path,
    recipe: Recipe,
    report: QuantizeReport,
    summary: Mapping[str, Any],
) -> None:
    """Writes a model's directory, whole or not at all; an old one is replaced.

    Args:
        target: The directory.
        model: A model as it was trained.
        tokenizer_dir: Where its tokenizer lies.
        recipe: How it was trained.
        report: What `prepare_model_` returned.
        summary: JSON-able facts of the run: losses, data, seed.

    Raises:
        ModelError: If it can't be written.
    """
    info = {
        "format_version": storage.FORMAT_VERSION,
        "method": recipe.method,
        "fused": is_fused(model),
        "bits": recipe.bits,
        "recipe": asdict(recipe),
        "tensors": _describe(model, report),
        "versions": versions(),
        "summary": dict(summary),
    }
    if (quantizer := getattr(model, "hf_quantizer", None)) is not None:
        quantizer.get_state_dict_and_metadata(model)  # config.json is to say what the weights are
    with storage.staged_directory(target) as staging:
        model.config.save_pretrained(staging)
        if model.generation_config is not None:
            model.generation_config.save_pretrained(staging)
        for name in _TOKENIZER_FILES:
            if (tokenizer_dir / name).is_file():
                shutil.copyfile(tokenizer_dir / name, staging / name)
        storage.save_tensors(staging / MODEL, storage.without_aliases(model.state_dict())[0])
        (staging / INFO).write_text(storage.to_json(info), encoding="utf-8")


def load_model(directory: str | Path) -> tuple[PreTrainedModel, TextTokenizer, dict[str, Any]]:
    """Reads a directory that `save_model` or `save_pretrained` wrote, or a run that holds it as `model`.

    Returns:
        The model, in evaluation mode, its tokenizer, and the content of `dqt.json`, or what is known of it.

    Raises:
        ModelError: If it is missing, damaged, of a newer format, or its tokenizer does not fit.
    """
    path = find_model(directory)
    info, described = _read_info(path)
    try:
        tokenizer = load_tokenizer(path)
    except DqtError as error:
        raise ModelError(f"the tokenizer of {path} can't be used: {error}") from error
    model = _rebuild(path, info)
    rows = model.config.vocab_size
    if tokenizer.vocab_size > rows:
        raise ModelError(
            f"the tokenizer of {path} does not fit the model: it has {tokenizer.vocab_size} tokens, "
            f"the model {rows}; put the tokenizer that it was trained with back"
        )
    storage.load_model_tensors(model, path / MODEL)
    take_generation_config(model, path)
    for name, packed in described.items():
        weight: Any = model.get_parameter(name)
        check(name, weight, packed)
    return model.eval(), tokenizer, info


def take_generation_config(model: PreTrainedModel, directory: Path) -> None:
    """Gives a model the generation config in a directory, if there is one.

    Raises:
        ModelError: If it can't be read.
    """
    from transformers import GenerationConfig

    path = directory / "generation_config.json"
    if path.is_file():
        try:
            model.generation_config = GenerationConfig.from_pretrained(directory, local_files_only=True)
        except Exception as error:  # whatever transformers makes of what it can't read
            raise ModelError(f"{path} can't be read: {one_line(error)}") from error


def find_model(directory: str | Path) -> Path:
    """A model's directory, from its own path or that of the run that holds it as `model`.

    Raises:
        ModelError: If there is none.
    """
    path = Path(directory)
    for candidate in (path, path / "model"):
        if (candidate / INFO).is_file() or _is_pretrained(candidate):
            return candidate
    raise ModelError(f"{directory} holds no model ({INFO} is missing): give a finished run, or its model/")


def config_beside(model: Path) -> Path | None:
    """The config of the run that a model's directory lies in, if it still does.

    What `save_pretrained` wrote may lie beside anybody's config.toml, and is of no run of dqt.
    """
    path = model.resolve().parent / "config.toml"
    return path if (model / INFO).is_file() and path.is_file() else None


def _is_pretrained(directory: Path) -> bool:
    """Whether `save_pretrained` wrote low-bit weights there; with a manifest, it is ours and lacks a file."""
    config = directory / "config.json"
    if not config.is_file() or (directory / storage.MANIFEST).exists():
        return False
    settings = storage.load_json(config).get("quantization_config")
    return isinstance(settings, dict) and settings.get("quant_method") == METHOD


def _read_info(path: Path) -> tuple[dict[str, Any], dict[str, Packed]]:
    """The content of `dqt.json`, of a directory whose files are whole; or what config.json says instead, and
    how to tell whether the low-bit weights are."""
    if not (path / INFO).is_file():
        return _read_pretrained(path / "config.json")
    info = storage.load_json(path / INFO)
    storage.check_version(path / INFO, info)
    if info.get("method") not in METHODS:
        raise ModelError(f"{path / INFO} names no method that dqt knows: {str(info.get('method'))[:40]!r}")
    storage.verify(path, (INFO, MODEL, "config.json", "tokenizer.json"))
    return info, {}


def _read_pretrained(path: Path) -> tuple[dict[str, Any], dict[str, Packed]]:
    try:
        settings = DqtConfig(**storage.load_json(path)["quantization_config"])
    except (ConfigError, TypeError) as error:
        raise ModelError(f"{path} is damaged: {error}") from error
    described = read_description(settings.weights or [])
    tensors = {
        name: {"bits": packed.format.name, "products": asdict(packed.products)}
        for name, packed in described.items()
    }
    info = {"method": settings.baseline, "bits": None, "fused": settings.fused, "tensors": tensors}
    return info, described


def precision(info: Mapping[str, Any]) -> contextlib.AbstractContextManager[Any]:
    """The autocast context that a model was trained in, its products made safe."""
    if info["method"] is None:
        return contextlib.nullcontext()
    environment = info.get("recipe", {}).get("environment", "fp32")
    recipe = recipe_for(info["method"], info["bits"], environment=environment)
    if recipe.autocasts:
        ensure_bf16_products()
    return autocast(recipe, "cpu")


def _describe(model: nn.Module, report: QuantizeReport) -> dict[str, dict[str, Any]]:
    """What rebuilding needs of every low-bit tensor, by its first name."""
    rules = {entry.name: entry.scale_rule for entry in report.converted}
    return {
        name: {
            "bits": parameter.format.name,
            "shape": list(parameter.shape),
            "scale": list(parameter.scale.shape),
            "scale_rule": rules.get(name),
            "products": asdict(parameter.products),
        }
        for name, parameter in model.named_parameters()
        if isinstance(parameter, QuantizedTensor)
    }


def _rebuild(path: Path, info: Mapping[str, Any]) -> PreTrainedModel:
    """A model of the right class, shapes and formats, whose values are still arbitrary.

    Until its shapes are those of the tensors in the file, it takes no memory.
    """
    shapes = storage.tensor_shapes(path / MODEL)
    model = _empty(path / "config.json", len(shapes))
    try:
        if info["method"] == "bitnet":
            bitnet_(model)
        for name, entry in info["tensors"].items():
            _make_low_bit(model, name, entry, shapes)
        for name, parameter in model.named_parameters():
            if parameter.is_meta and shapes.get(name) != tuple(parameter.shape):
                raise ModelError(
                    f"{name} is {shapes.get(name)} in {MODEL}, the model's {tuple(parameter.shape)}"
                )
        Initializer(model, seed=0).finish()
        if info.get("fused"):  # so that it computes the same bits as the model that was trained
            fuse_(model)
        if info["method"] == "bitnet" or info["tensors"]:
            remember(model)
    except (KeyError, TypeError, AttributeError, ValueError, DqtError) as error:
        name = INFO if (path / INFO).is_file() else "config.json"
        raise ModelError(f"{path / name} does not fit the model: {error!r}") from error
    return model


def _empty(path: Path, tensors: int) -> PreTrainedModel:
    """The model of a config.json, on the meta device; only of `transformers`' own causal language models."""
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    config = storage.load_json(path)
    kind, layers = config.get("model_type"), config.get("num_hidden_layers")
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or "auto_map" in config:
        raise ModelError(f"{path} makes no model that dqt knows: transformers has no causal {kind!r}")
    if type(layers) is not int or not 0 <= layers <= tensors:
        raise ModelError(f"{path} does not fit the model: {layers!r} layers, and {tensors} tensors")
    try:
        return empty_model(AutoConfig.for_model(**config))
    except DqtError:
        raise
    except Exception as error:  # whatever transformers makes of a config that it can't read
        raise ModelError(f"{path} makes no model: {one_line(error)}") from error


def _make_low_bit(
    model: nn.Module, name: str, entry: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]
) -> None:
    """Gives every module that holds this parameter a low-bit weight of the format it was saved in."""
    module_name, _, attribute = name.rpartition(".")
    old = model.get_submodule(module_name).weight
    wanted = entry.get("shape", old.shape)
    if attribute != "weight" or not isinstance(old, nn.Parameter) or list(old.shape) != list(wanted):
        raise ModelError(f"{name} has no weight of shape {wanted}")
    format = parse_bits(entry["bits"])
    packed = (*old.shape[:-1], packed_size(old.shape[-1], format.bits))
    scales = entry.get("scale") or shapes.get(f"{name}.scale", ())
    for key, shape in (("codes", packed), ("scale", tuple(scales))):
        if shapes.get(f"{name}.{key}") != shape:
            raise ModelError(f"{name}.{key} is {shapes.get(f'{name}.{key}')} in {MODEL}, not {shape}")
    codes, scale = torch.zeros(packed, dtype=torch.uint8), torch.ones(scales, dtype=torch.float32)
    products = Products(**entry["products"])
    weight = nn.Parameter(QuantizedTensor(codes, scale, format, old.shape, old.dtype, products))
    for module in model.modules():
        if getattr(module, "weight", None) is old:
            set_quantized_weight(module, weight)
