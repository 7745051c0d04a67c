"""A byte-level BPE tokenizer, trained on the corpus and exact to the byte.

Byte-level (as in GPT-2): all 256 bytes are tokens from the start, so that no text is unknown and decoding
gives back every byte. No normalizer runs, so losses convert to bits a byte exactly: each token stands for a
known number of bytes. The vocabulary is learned from the training split alone; the price is that losses in
nats a token compare only between runs with the same tokenizer.

`<|endoftext|>` (id 0) follows every document. The same characters inside a document are ordinary text.

Saved as `tokenizer.json` with `tokenizer_config.json`, which `transformers.AutoTokenizer` loads. Other
byte-level tokenizers (GPT-2's, LLaMA 3's, Qwen's) can be used in its place; others have no byte count per
token and are refused.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from dqt.data.spec import MIN_VOCAB_SIZE
from dqt.errors import ConfigError, DataError
from dqt.train.storage import load_json

END_OF_TEXT = "<|endoftext|>"

# Encoding is fed in batches of about this many characters, and longer documents are cut at a line's end: an
# encoded token takes some 200 bytes until its id is copied out (batches of 4 million characters took 290 MB).
_BATCH_CHARS = 1 << 20

SETTINGS = (
    *("bos_token", "pad_token", "unk_token", "additional_special_tokens", "extra_special_tokens"),
    *("model_max_length", "padding_side"),
)
"""Of a tokenizer from elsewhere, what is kept of its `tokenizer_config.json`; it can't name code to run."""

CHAT_TEMPLATE = "chat_template.jinja"

_MOST_BYTES = 128 << 20  # of tokenizer.json; 256,000 tokens take 35 MB


@dataclass(frozen=True)
class TextTokenizer:
    """A byte-level tokenizer and its end-of-text token.

    Attributes:
        core: the `tokenizers` object.
        end_token: the token that follows every document.
        settings: what its `tokenizer_config.json` says beside that; of it the keys in `SETTINGS` are saved.
        chat_template: how it writes conversations, in Jinja; None if it says nothing.
    """

    core: Tokenizer
    end_token: str = END_OF_TEXT
    settings: Mapping[str, Any] = field(default_factory=dict)
    chat_template: str | None = None

    @property
    def end_id(self) -> int:
        """The id of the end-of-text token."""
        index = self.core.token_to_id(self.end_token)
        if index is None:
            raise DataError(f"the tokenizer has no token {self.end_token!r} to end a document")
        return index

    @property
    def vocab_size(self) -> int:
        """The number of rows that an embedding needs: the highest id and one."""
        return max(self.core.get_vocab(with_added_tokens=True).values()) + 1

    @property
    def sha256(self) -> str:
        """The hash of the tokenizer's definition and end token, whatever the layout of its files."""
        return hashlib.sha256((self.core.to_str() + self.end_token).encode("utf-8")).hexdigest()

    def encode_documents(self, texts: Iterable[str]) -> Iterator[np.ndarray]:
        """Encodes texts in parallel batches, bounded in memory.

        Yields:
            int64 arrays of token ids that concatenate to all texts, each followed by `end_id`.
        """
        # Without this, "<|endoftext|>" written in a document would end it, and its bytes would be lost.
        self.core.encode_special_tokens = True
        end = np.array([self.end_id], dtype=np.int64)
        for batch in _batches(texts):
            encoded = self.core.encode_batch_fast([piece for piece, _ in batch], add_special_tokens=False)
            for encoding, (_, last) in zip(encoded, batch, strict=True):
                ids = np.array(encoding.ids, dtype=np.int64)
                yield np.concatenate([ids, end]) if last else ids

    @property
    def files(self) -> dict[str, str]:
        """The files from which `transformers.AutoTokenizer` loads the tokenizer, name to content."""
        kept = {key: self.settings[key] for key in SETTINGS if self.settings.get(key) is not None}
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",  # reads tokenizer.json as it is
            "bos_token": self.end_token,
            **kept,
            "eos_token": self.end_token,
            "clean_up_tokenization_spaces": False,  # "a ." must not decode to "a."
        }
        template = {} if self.chat_template is None else {CHAT_TEMPLATE: self.chat_template}
        return {
            "tokenizer.json": self.core.to_str(pretty=True),
            "tokenizer_config.json": json.dumps(config, indent=2) + "\n",
            **template,
        }

    def save(self, directory: Path) -> None:
        """Writes its files."""
        directory.mkdir(parents=True, exist_ok=True)
        for name, content in self.files.items():
            (directory / name).write_text(content, encoding="utf-8")


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> TextTokenizer:
    """Trains a byte-level BPE; the same texts in the same order give the same tokenizer, byte for byte.

    Args:
        texts: the training documents.
        vocab_size: tokens wanted, the 256 bytes and `<|endoftext|>` included; a small text yields fewer.

    Raises:
        ConfigError: a vocabulary that cannot hold every byte.
    """
    if vocab_size < MIN_VOCAB_SIZE:
        raise ConfigError(
            f"vocab_size {vocab_size} cannot hold every byte and {END_OF_TEXT}: use {MIN_VOCAB_SIZE} or more"
        )
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    return TextTokenizer(core)


def load_tokenizer(directory: str | Path) -> TextTokenizer:
    """Loads a byte-level tokenizer from `tokenizer.json`, its end token from `tokenizer_config.json` beside
    it.

    Raises:
        DataError: no such file, damaged, not byte-level, or without an end-of-text token.
    """
    path = Path(directory) / "tokenizer.json"
    if not path.is_file():
        raise DataError(f"{path} does not exist: give a directory that holds a tokenizer")
    if path.stat().st_size > _MOST_BYTES:
        raise DataError(
            f"{path} has {path.stat().st_size} bytes, more than a tokenizer's definition can have"
        )
    try:
        core = Tokenizer.from_file(str(path))
        core.no_truncation()  # a file may say to cut texts
        core.no_padding()
        config_path = path.with_name("tokenizer_config.json")
        config = load_json(config_path) if config_path.is_file() else {}
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # `tokenizers` raises bare Exception, and its panics are not even that
        raise DataError(f"the tokenizer in {directory} cannot be read: {str(error)[:200]}") from error
    ids = core.get_vocab(with_added_tokens=True).values()
    if not ids or max(ids) > 2 * len(ids) + 1024:  # an embedding would have as many rows
        raise DataError(f"{path} is damaged: {len(ids)} tokens, and ids up to {max(ids, default=0)}")
    require_byte_level(core, path)
    end_token = config.get("eos_token") or END_OF_TEXT
    if isinstance(end_token, dict):  # written so by older `transformers`
        end_token = end_token.get("content")
    if not isinstance(end_token, str) or core.token_to_id(end_token) is None:
        raise DataError(f"{path} has no token {end_token!r} to end a document: set eos_token beside it")
    return TextTokenizer(core, end_token, config, _chat_template(path.parent, config))


def require_byte_level(core: Tokenizer, where: Path) -> None:
    """Raises DataError unless every token of a tokenizer stands for a known number of bytes."""
    if not _has_byte_level(json.loads(core.to_str()).get("decoder")):
        raise DataError(
            f"{where}: its tokenizer is not byte-level, so bits a byte cannot be told: use a byte-level BPE"
        )


def _chat_template(directory: Path, config: Mapping[str, Any]) -> str | None:
    """The template beside a tokenizer, or in its config: there, the one named "default" of several."""
    path = directory / CHAT_TEMPLATE
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise DataError(f"{path} can't be read: {error}") from error
    found = config.get("chat_template")
    if isinstance(found, list):
        named = {each.get("name"): each.get("template") for each in found if isinstance(each, dict)}
        found = named.get("default")
    return found if isinstance(found, str) else None


def token_byte_lengths(tokenizer: TextTokenizer) -> np.ndarray:
    """How many bytes of text each token stands for.

    Returns:
        int32 array [vocab_size]; 0 for special tokens and unused ids. Summed over the tokens of a text it is
        the text's length in UTF-8.
    """
    lengths = np.zeros(tokenizer.vocab_size, dtype=np.int32)
    for token, index in tokenizer.core.get_vocab(with_added_tokens=False).items():
        lengths[index] = len(token)  # byte-level vocabularies write every byte as one character
    for index, added in tokenizer.core.get_added_tokens_decoder().items():
        lengths[index] = 0 if added.special else len(added.content.encode("utf-8"))
    return lengths


def _has_byte_level(decoder: dict[str, Any] | None) -> bool:
    parts: Sequence[dict[str, Any]] = (decoder or {}).get("decoders") or [decoder or {}]
    return any(part.get("type") == "ByteLevel" for part in parts)


def _batches(texts: Iterable[str]) -> Iterator[list[tuple[str, bool]]]:
    """Groups (piece, whether it ends its document) into lists of about `_BATCH_CHARS` characters."""
    batch: list[tuple[str, bool]] = []
    size = 0
    for text in texts:
        start = 0
        while True:
            stop = min(start + _BATCH_CHARS, len(text))
            if stop < len(text):
                stop = text.rfind("\n", start, stop) + 1 or stop
            batch.append((text[start:stop], stop == len(text)))
            size += stop - start
            if size >= _BATCH_CHARS:
                yield batch
                batch, size = [], 0
            if stop == len(text):
                break
            start = stop
    if batch:
        yield batch
