"""What lies at the path that training starts from (`--from`), told without loading a weight.

    a directory    config.json, *.safetensors, tokenizer.json, as `transformers` and `dqt export` write them
    a GGUF file    or a directory with one, where `transformers` reads its architecture
    a run          of dqt, or its model/, or packed weights that `save_pretrained` wrote

Only files of this machine are read, and no code that comes with them is run. Sizes and architecture are the
model's; the config takes them from here, so that `dqt plan` and the memory check know them. Of a directory
that costs a small JSON file; for GGUF, `transformers` has to be imported.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dqt.errors import ModelError
from dqt.extras import require

DIRECTORY, GGUF, RUN = "directory", "gguf", "run"

# What the config of a run has of a model's sizes; other architectures may lack some.
SIZES = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    "tie_word_embeddings",
)


@dataclass(frozen=True)
class Start:
    """A trained model to go on from.

    Attributes:
        path: A directory, or a GGUF file.
        kind: `DIRECTORY`, `GGUF` or `RUN`.
        config: The content of its `config.json`, or what a GGUF file says in its place.
    """

    path: Path
    kind: str
    config: dict[str, Any]

    @property
    def folder(self) -> Path:
        """Where its other files lie."""
        return self.path.parent if self.kind == GGUF else self.path

    @property
    def architecture(self) -> str:
        """`transformers`' name of it, as in "llama"."""
        return str(self.config["model_type"])

    @property
    def sizes(self) -> dict[str, Any]:
        """Those of `SIZES` that the model has."""
        return {name: self.config[name] for name in SIZES if type(self.config.get(name)) in (int, bool)}

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding."""
        return int(self.config["vocab_size"])

    @property
    def longest(self) -> int | None:
        """Tokens of the longest sequence, where the model has a limit."""
        limit = self.config.get("max_position_embeddings")
        return limit if type(limit) is int and limit > 0 else None


def name_of(path: str | Path) -> str:
    """What a person calls the model at a path: a directory's name, a run's, or that of a GGUF file."""
    path = Path(path).absolute()
    if path.suffix == ".gguf":
        return path.stem
    return (path.parent.name if path.name == "model" else "") or path.name


def find_start(path: str | Path) -> Start:
    """Looks at what lies at a path.

    Raises:
        ModelError: If it is no model that training can start from, with what it is instead.
    """
    path = Path(path).absolute()
    if not path.exists():
        raise ModelError(
            f"--from {path}: there is no such file or directory; a model of a hub must be downloaded first"
        )
    if path.is_file():
        return _gguf(path)

    from dqt.train.storage import load_json

    for inside in (path, path / "model"):
        if (inside / "dqt.json").is_file():
            config = load_json(inside / "config.json")
            config.pop("quantization_config", None)  # dqt's own
            return Start(inside, RUN, _checked(inside / "config.json", config))
    if (path / "config.json").is_file():
        config = load_json(path / "config.json")
        kind = DIRECTORY
        if (
            isinstance(packed := config.get("quantization_config"), dict)
            and packed.get("quant_method") == "dqt"
        ):
            kind = RUN  # what `save_pretrained` writes of packed weights
            config.pop("quantization_config")
        return Start(path, kind, _checked(path / "config.json", config))
    files = sorted(path.glob("*.gguf"))
    if len(files) == 1:
        return _gguf(files[0])
    if files:
        raise ModelError(f"--from {path} holds {len(files)} GGUF files: name one, as in {files[0]}")
    if (path / "adapter_config.json").is_file():
        raise ModelError(f"--from {path} is a peft adapter: merge it into its model first, and give that")
    raise ModelError(f"--from {path} holds no model: give a transformers directory, a GGUF file, or a run")


def _checked(where: Path, config: dict[str, Any]) -> dict[str, Any]:
    """Refuses what can't be trained, or not without running code of strangers."""
    if not isinstance(config.get("model_type"), str) or type(config.get("vocab_size")) is not int:
        raise ModelError(f"{where} names no model_type and vocab_size of a language model: use another one")
    if "auto_map" in config:
        raise ModelError(f"{where} wants code of its own (auto_map), which dqt never runs: use another model")
    if packed := config.get("quantization_config"):
        method = packed.get("quant_method") if isinstance(packed, dict) else packed
        raise ModelError(
            f"{where}: its weights are packed by {method!r}, and training starts from floats\n"
            "give the model that it was made from, or one that was unpacked and saved again"
        )
    classes = config.get("architectures")
    if isinstance(classes, list) and not any(
        str(c).endswith(("ForCausalLM", "LMHeadModel")) for c in classes
    ):
        raise ModelError(f"{where} is a {', '.join(map(str, classes))}, not a causal language model")
    return config


def _gguf(path: Path) -> Start:
    """What a GGUF file says of its model."""
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise ModelError(f"--from {path} can't be read: {error.strerror}") from error
    if magic != b"GGUF":
        raise ModelError(f"--from {path} is no GGUF file: give one, or the directory of a transformers model")
    require("gguf", "gguf")
    require("accelerate", "gguf")
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name, local_files_only=True).to_dict()
    except Exception as error:  # whatever the readers make of bytes that they can't read
        raise ModelError(
            f"--from {path} can't be read: it is damaged, cut short, or of an architecture that transformers "
            f"does not read ({one_line(error)}); get the file again, or give a transformers directory"
        ) from error
    return Start(path, GGUF, _checked(path, config))


def one_line(error: BaseException) -> str:
    """An error of somebody else's, as part of a message."""
    return (" ".join(str(error).split()) or type(error).__name__)[:200]
