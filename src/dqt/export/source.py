"""What is exported: a finished model, as the tensors that other programs are given.

Every format starts from the same two kinds of tensors: a `QuantizedTensor`, whose integers are written as
they are, or floats. The baseline `bitnet` keeps float master weights and rounds them in each forward pass,
so that here they become the ternary weights that it computes with.
"""

from __future__ import annotations

import copy
import dataclasses
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dqt.baselines import BitLinear
from dqt.data.tokenizer import TextTokenizer
from dqt.errors import ModelError
from dqt.nn import computes_ternary, set_quantized_weight
from dqt.numerics.formats import parse_bits
from dqt.tensor import QuantizedTensor
from dqt.train.savedmodel import INFO, find_model, load_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)


@dataclass(frozen=True)
class Source:
    """A finished model.

    Attributes:
        directory: Its `model/`.
        model: In evaluation mode, as `dqt sample` and `dqt eval` compute it, but without their autocast.
        tokenizer: Its tokenizer.
        info: The content of `dqt.json`.
    """

    directory: Path
    model: PreTrainedModel
    tokenizer: TextTokenizer
    info: dict[str, Any]

    @property
    def name(self) -> str:
        """What a person calls it: the title of the run, as a file may be named."""
        title = self.info.get("summary", {}).get("title") or self.directory.resolve().parent.name
        return re.sub(r"[^\w.-]+", "-", str(title)).strip("-.") or "model"

    @property
    def architecture(self) -> str:
        """`transformers`' name of the architecture, as in "llama"."""
        return str(self.model.config.model_type)

    def require_architecture(self, known: tuple[str, ...], target: str) -> None:
        """Raises ModelError unless there is a mapping for this model."""
        if self.architecture not in known:
            raise ModelError(
                f"{target} has no mapping for the architecture {self.architecture!r}, only for "
                f"{' and '.join(known)}: use --to hf, which takes any"
            )


def load_source(directory: Path) -> Source:
    """Loads what is to be exported.

    Args:
        directory: A run, or its `model/`.

    Raises:
        ModelError: If it is no finished model.
    """
    if not (directory / INFO).is_file() and (directory / "state.json").is_file():
        run = directory.resolve().parent.parent
        raise ModelError(
            f"{directory} is a checkpoint: it holds a run's state in training format, not a model\n"
            f"give the run {run}, whose model/ a finished or interrupted run leaves there"
        )
    model, tokenizer, info = load_model(directory)
    return Source(find_model(directory), model, tokenizer, info)


def without_masters(source: Source) -> Source:
    """The same model with the ternary weights that it computes with, where those that it trains are others.

    These are the float master weights of `BitLinear`s, and integers with `quant.compute_bits` = "ternary".
    """
    if not any(isinstance(m, BitLinear) or computes_ternary(m) for m in source.model.modules()):
        return source
    model, ternary = copy.deepcopy(source.model), parse_bits("ternary")
    for module in model.modules():
        stored: Any = getattr(module, "weight", None)
        if isinstance(module, BitLinear):
            weight = module.weight
            scale = weight.detach().abs().mean().clamp_min(1e-5)
            module.__class__ = nn.Linear  # type: ignore[assignment]
            set_quantized_weight(module, nn.Parameter(QuantizedTensor.from_float(weight, scale, ternary)))
        elif computes_ternary(module):
            codes, scale = stored.product_codes()
            products = dataclasses.replace(stored.products, compute_bits="stored")
            computed = QuantizedTensor.from_float(codes * scale, scale, ternary, products)
            set_quantized_weight(module, nn.Parameter(computed))
        elif isinstance(stored, QuantizedTensor):
            stored.products = dataclasses.replace(stored.products, compute_bits="stored")
    return replace(source, model=model)


def exported_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every tensor once, by its first name: parameters, then the buffers that a state dict holds."""
    yield from model.named_parameters()
    kept = model.state_dict().keys()
    yield from ((name, buffer) for name, buffer in model.named_buffers() if name in kept)


def as_float(tensor: Tensor) -> Tensor:
    """The values of a tensor as `float32`; codes times scale, for a low-bit one."""
    with torch.no_grad():
        return (tensor.dequantize() if isinstance(tensor, QuantizedTensor) else tensor.detach()).float()


def copy_tokenizer(source: Source, target: Path) -> None:
    """Copies the tokenizer's files."""
    for name in TOKENIZER_FILES:
        if (source.directory / name).is_file():
            shutil.copyfile(source.directory / name, target / name)
