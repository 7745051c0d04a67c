"""The weights and the tokenizer of a model that training starts from: `float32`, and byte-level BPE.

`transformers` reads directories and GGUF files; a run's packed weights become codes times scale. What would
be filled in or left out in silence is refused: a tensor that is missing, of another shape, not finite, or
one that the architecture has no place for.
The whole model is float once, 4 bytes a parameter, before it is converted.
"""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tokenizers import pre_tokenizers

from dqt.baselines import BitLinear
from dqt.data.tokenizer import TextTokenizer, load_tokenizer, require_byte_level
from dqt.errors import DataError, DqtError, ModelError
from dqt.models import Initializer, empty_model
from dqt.nn import computes_ternary
from dqt.start import GGUF, RUN, Start, one_line
from dqt.tensor import QuantizedTensor
from dqt.train.savedmodel import load_model

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

# Rules to split text by, under the names of GGUF files, for which `transformers` puts GPT-2's.
_SPLITS: dict[str, Callable[[], Any]] = {
    "gpt-2": lambda: pre_tokenizers.ByteLevel(add_prefix_space=False),
    "smollm": lambda: pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    ),
}


_DROPOUT = re.compile("dropout|pdrop")


def float_config(start: Start) -> PreTrainedConfig:
    """The model's config, as `transformers` takes it, without dropout: its random numbers have no seed.

    Raises:
        ModelError: If there is no such model in `transformers`.
    """
    from transformers import AutoConfig

    given = {key: value for key, value in start.config.items() if key not in ("_name_or_path", "dtype")}
    given |= {
        key: 0.0 for key, value in given.items() if _DROPOUT.search(key) and type(value) in (int, float)
    }
    try:
        return AutoConfig.for_model(**given, dtype="float32")
    except Exception as error:  # whatever transformers makes of a config that it can't read
        raise ModelError(f"--from {start.path} makes no model: {one_line(error)}") from error


def load_float(start: Start) -> PreTrainedModel:
    """Loads the weights, as `float32`, on the CPU.

    Returns:
        The model, in training mode.

    Raises:
        ModelError: If they can't be read, or are not those of the model.
    """
    model = _of_run(start) if start.kind == RUN else _of_transformers(start)
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise ModelError(f"--from {start.path} holds NaN or Inf in {name}: use another copy")
    return model.train()


def load_own_tokenizer(start: Start) -> TextTokenizer:
    """Loads the tokenizer that a model was trained with.

    Raises:
        DataError: If there is none, it is not byte-level, or has more tokens than the model.
    """
    tokenizer = _gguf_tokenizer(start.path) if start.kind == GGUF else load_tokenizer(start.path)
    if tokenizer.vocab_size > start.vocab_size:
        raise DataError(
            f"the tokenizer of {start.path} has {tokenizer.vocab_size} tokens, its model {start.vocab_size}: "
            "they don't belong together"
        )
    return tokenizer


# -- weights -------------------------------------------------------------------------------------------------


def _of_transformers(start: Start) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM, GgufConfig

    gguf: dict[str, Any] = {}
    if start.kind == GGUF:
        gguf = {"gguf_file": start.path.name, "quantization_config": GgufConfig(dequantize=True)}
    try:
        with _quiet():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                start.folder,
                config=float_config(start),
                dtype=torch.float32,
                attn_implementation="sdpa",
                local_files_only=True,
                use_safetensors=True,
                output_loading_info=True,
                **gguf,
            )
            model, found = loaded
    except DqtError:
        raise
    except Exception as error:  # whatever the readers make of files that they can't read
        raise ModelError(f"--from {start.path} can't be loaded: {one_line(error)}") from error
    for what in ("missing", "mismatched", "unexpected"):  # of these transformers leaves out what it knows
        if names := sorted(str(name) for name in found[f"{what}_keys"]):
            more = f" and {len(names) - 3} others" if names[3:] else ""
            raise ModelError(
                f"--from {start.path} does not fit its config: {what} {', '.join(names[:3])}{more}"
            )
    return model


def _of_run(start: Start) -> PreTrainedModel:
    """A run's model in plain layers, its low-bit weights as floats."""
    packed, _, _ = load_model(start.path)
    if any(isinstance(module, BitLinear) or computes_ternary(module) for module in packed.modules()):
        raise ModelError(
            f"--from {start.path}: its layers round their weights again as they compute\n"
            f"write what they compute with: dqt export {start.path} --to hf"
        )
    if hasattr(packed.config, "quantization_config"):  # what the weights were
        del packed.config.quantization_config
    model = empty_model(packed.config)
    Initializer(model, seed=0).finish()
    weights = dict(packed.named_parameters())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            weight = weights[name]
            parameter.copy_(weight.dequantize() if isinstance(weight, QuantizedTensor) else weight)
    model.generation_config = packed.generation_config
    return model


# -- the tokenizer of a GGUF file ----------------------------------------------------------------------------


def _gguf_tokenizer(path: Path) -> TextTokenizer:
    """What `transformers` rebuilds from the file, with the split that the file names."""
    from transformers.integrations.gguf import convert_gguf_tokenizer, get_gguf_tokenizer
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    try:
        with _quiet():
            architecture, content, settings = get_gguf_tokenizer(str(path))
            core, _ = convert_gguf_tokenizer(architecture, content)
    except Exception as error:
        raise DataError(f"the tokenizer of {path} can't be read: {one_line(error)}") from error
    require_byte_level(core, path)
    split = content.get("pre_tokenizer_type", "gpt-2")
    if split in _SPLITS:
        core.pre_tokenizer = _SPLITS[split]()
    elif split not in GGUF_PRE_TOKENIZER_SPLITS:
        raise DataError(
            f"{path} splits text as {split!r}, which transformers does not rebuild from GGUF: give the "
            "directory of the same model, with its tokenizer.json"
        )
    end_token = settings.get("eos_token")
    if not isinstance(end_token, str) or core.token_to_id(end_token) is None:
        raise DataError(f"{path} names no token that ends a text: give the directory of the same model")
    template = settings.pop("chat_template", None)
    return TextTokenizer(core, end_token, settings, template)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps `transformers`' bars and warnings off the terminal: what matters here is an error, or said."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    bars = logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # one bar asks nobody
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
