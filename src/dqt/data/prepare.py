"""From text to tokens that are ready to train on, prepared once and reused.

What is held out depends neither on where the files lie nor on the order in which they are given, see
`dqt.data.split`. Near-duplicates across documents are not looked for.

A prepared corpus is a directory under the cache, named by the hash of the settings and of the text itself, so
that changed files or another Python are noticed; the price is that the text is read (not tokenized) again on
every start, 0.1 s for 12 MB. It is written under another name and renamed when complete.

    manifest.json   tokenizer/   train.bin   train.sums   val.bin   val.sums
    train-marks.bin and so on, of conversations: what every token is, see `dqt.data.chat`
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from dqt.data.chat import (
    BEGIN,
    DEFAULT_TEMPLATE,
    LEARNT,
    encode_conversations,
    plain_text,
    read_conversations,
)
from dqt.data.sampler import ConversationSampler
from dqt.data.shards import TokenShards, open_shard, token_dtype, write_shard
from dqt.data.sources import (
    BUILTIN_SOURCES,
    SourceText,
    limit_bytes,
    read_dataset,
    read_paths,
)
from dqt.data.spec import DEFAULT_VOCAB_SIZE, DataSpec
from dqt.data.split import split_conversations, split_documents
from dqt.data.tokenizer import TextTokenizer, load_tokenizer, token_byte_lengths, train_tokenizer
from dqt.errors import DataError, ModelError
from dqt.train.storage import load_json

FORMAT_VERSION = 2

_REPORT_EVERY = 1_000_000  # tokens
_STAGING = ".staging-"
_OLD = 60  # seconds; a younger leftover may be one that is about to be locked
Progress = Callable[[str], None]


@dataclass(frozen=True)
class Corpus:
    """A prepared corpus.

    Attributes:
        directory: where it lies.
        train: the training tokens.
        val: the held-out tokens.
        tokenizer_dir: loads with `load_tokenizer` and with `transformers.AutoTokenizer`.
        vocab_size: rows that an embedding needs.
        end_id: the token that follows every document.
        token_bytes: int32 [vocab_size], bytes of text that each token stands for.
        unigram_nats: cross-entropy in nats a token of `val` under the token frequencies of `train`, each
            count raised by one: what a model without context can reach.
        manifest: counts, hashes, source and settings, as in `manifest.json`.
        hash: one hash of tokenizer and tokens, equal where the data are equal.
    """

    directory: Path
    train: TokenShards
    val: TokenShards
    tokenizer_dir: Path
    vocab_size: int
    end_id: int
    token_bytes: np.ndarray
    unigram_nats: float
    manifest: dict[str, Any]
    hash: str

    @classmethod
    def open(cls, directory: Path, verify: bool | None = None) -> Corpus:
        """Opens a prepared corpus; `verify` as in `open_shard`.

        Raises:
            DataError: a file is missing, damaged, or of a newer format.
        """
        path = directory / "manifest.json"
        advice = f"delete {directory} to have it prepared again"
        try:
            manifest = load_json(path)
            if manifest["format_version"] != FORMAT_VERSION:
                raise DataError(f"{path} is not of the format {FORMAT_VERSION} that this dqt reads: {advice}")
            tokenizer_dir = directory / "tokenizer"
            tokenizer = load_tokenizer(tokenizer_dir)
            if tokenizer.sha256 != manifest["tokenizer"]["sha256"]:
                raise DataError(f"{tokenizer_dir} was altered: {advice}")
            return cls(
                directory=directory,
                train=_open_split(directory, manifest["splits"]["train"], tokenizer.vocab_size, verify),
                val=_open_split(directory, manifest["splits"]["val"], tokenizer.vocab_size, verify),
                tokenizer_dir=tokenizer_dir,
                vocab_size=tokenizer.vocab_size,
                end_id=tokenizer.end_id,
                token_bytes=token_byte_lengths(tokenizer),
                unigram_nats=float(manifest["unigram_nats"]),
                manifest=manifest,
                hash=str(manifest["hash"]),
            )
        except (ModelError, OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path} is missing or damaged: {advice}") from error

    def require_length(self, seq_len: int) -> None:
        """Raises DataError unless both splits hold a sequence of this length, or a conversation."""
        for name, split in (("training", self.train), ("validation", self.val)):
            if split.marks is not None:
                ConversationSampler(split.marks, seq_len, 0)
            elif len(split) <= seq_len:
                raise DataError(
                    f"too little text: the {name} split has {len(split)} tokens, and a sequence of length "
                    f"{seq_len} needs {seq_len + 1}: give more text or a lower --seq-len"
                )


def _open_split(directory: Path, entry: dict[str, Any], vocab_size: int, verify: bool | None) -> TokenShards:
    """The tokens of a split, with their marks if they are conversations."""
    shard = open_shard(directory, entry, vocab_size, verify)
    if "marks" in entry:
        shard.marks = open_shard(directory, entry["marks"], (LEARNT | BEGIN) + 1, verify)
        if len(shard.marks) != len(shard):
            raise DataError(f"{directory} is damaged: delete it to have it prepared again")
    return shard


def default_cache_dir() -> Path:
    """`$DQT_CACHE`, else `dqt` in the user's cache directory, else a directory of the user's among temporary
    files.
    """
    if chosen := os.environ.get("DQT_CACHE"):
        return Path(chosen)
    usual = Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()) / "dqt"
    there = next((each for each in (usual, *usual.parents) if each.exists()), usual)
    if there.is_dir() and os.access(there, os.W_OK | os.X_OK):
        return usual
    return Path(tempfile.gettempdir(), f"dqt-{os.getuid()}")


def prepare_corpus(
    spec: DataSpec,
    cache_dir: str | Path | None = None,
    progress: Progress | None = None,
    tokenizer: TextTokenizer | None = None,
) -> Corpus:
    """Reads, splits and tokenizes text, or opens the result of an earlier call.

    Args:
        spec: what to read and how.
        cache_dir: where prepared corpora are kept; None takes `default_cache_dir()`.
        progress: called with a line of text at each step.
        tokenizer: that of a model which was trained before; None takes what the spec says.

    Raises:
        DataError: text, tokenizer or cache that cannot be used.
    """
    say: Progress = progress or (lambda line: None)
    source = load_source(spec)
    if left_out := source.description.get("binary_files_left_out"):
        names = ", ".join(map(repr, left_out[:5])) + (", ..." if len(left_out) > 5 else "")
        say(f"left out files that hold NUL bytes ({len(left_out)}): {names}")
    given = tokenizer or (load_tokenizer(spec.tokenizer) if spec.tokenizer else None)
    settings = {
        "format_version": FORMAT_VERSION,
        "text": source.sha256(),
        "val_fraction": spec.val_fraction,
        "tokenizer": hashlib.sha256(json.dumps(given.files).encode()).hexdigest()
        if given
        else spec.vocab_size or DEFAULT_VOCAB_SIZE,
    }
    if spec.chat:
        settings["chat"] = DEFAULT_TEMPLATE
    key = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:20]
    directory = Path(cache_dir or default_cache_dir()) / "corpora" / key
    if not directory.exists():
        try:
            _prepare(directory, spec, source, given, say)
        except OSError as error:
            size = sum(len(document.text) for document in source.documents)
            raise DataError(
                f"the corpus cannot be written to {directory}: {error.strerror or error}; set DQT_CACHE to a "
                f"folder that can be written, with {size * 4 / 1e6:,.1f} MB free at most"
            ) from error
    corpus = Corpus.open(directory)
    say(f"corpus ready: {len(corpus.train):,} training and {len(corpus.val):,} validation tokens")
    return corpus


def load_source(spec: DataSpec) -> SourceText:
    """Reads the documents that a spec names."""
    if spec.text:
        source = read_paths(spec.text)
    elif spec.chat:
        source = read_conversations(spec.chat)
    elif spec.source in BUILTIN_SOURCES:
        source = BUILTIN_SOURCES[spec.source]()
    else:
        source = read_dataset(
            spec.source, spec.dataset_config, spec.dataset_split, spec.dataset_column, spec.max_bytes
        )
    if spec.max_bytes is None:
        return source
    if spec.chat:  # half a conversation is none
        sizes = np.cumsum([len(document.text.encode()) for document in source.documents])
        whole = max(1, int(np.searchsorted(sizes, spec.max_bytes, side="right")))
        return SourceText(source.documents[:whole], source.description)
    return SourceText(limit_bytes(source.documents, spec.max_bytes), source.description)


def encode_text(tokenizer_dir: str | Path, paths: Iterable[str | Path]) -> TokenShards:
    """Tokenizes files and folders in memory, without split or cache; the end token follows each document.

    Raises:
        DataError: see `read_paths` and `load_tokenizer`.
    """
    tokenizer = load_tokenizer(tokenizer_dir)
    texts = (document.text for document in read_paths(paths).documents)
    return TokenShards(np.concatenate(list(tokenizer.encode_documents(texts))))


def _prepare(
    directory: Path, spec: DataSpec, source: SourceText, given: TextTokenizer | None, say: Progress
) -> None:
    """Writes a corpus to a staging directory and renames it to `directory`."""
    split = split_conversations if spec.chat else split_documents
    train, val = split(source.documents, spec.val_fraction)
    size = sum(len(document.text.encode("utf-8")) for document in source.documents)
    say(f"read {len(source.documents):,} documents, {size / 1e6:.1f} MB of text")
    vocab_size = spec.vocab_size or DEFAULT_VOCAB_SIZE
    if given is None:
        say(f"training a byte-level BPE tokenizer of {vocab_size:,} tokens")
    texts = map(plain_text, train) if spec.chat else (document.text for document in train)
    tokenizer = given or train_tokenizer(texts, vocab_size)
    if spec.chat and tokenizer.chat_template is None:
        tokenizer = replace(tokenizer, chat_template=DEFAULT_TEMPLATE)
    if given is None and tokenizer.vocab_size < vocab_size:
        say(f"the text yields only {tokenizer.vocab_size:,} tokens")

    directory.parent.mkdir(parents=True, exist_ok=True)
    _require_own(directory.parent)
    _sweep(directory.parent)
    staging = Path(tempfile.mkdtemp(prefix=_STAGING, dir=directory.parent))
    held = os.open(staging, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(held, fcntl.LOCK_EX)
        tokenizer.save(staging / "tokenizer")
        dtype = token_dtype(tokenizer.vocab_size)
        splits: dict[str, dict[str, Any]] = {}
        for name, documents in (("train", train), ("val", val)):
            marks: list[np.ndarray] = []
            if spec.chat:
                arrays = _keep_marks(encode_conversations(tokenizer, documents), marks)
            else:
                arrays = tokenizer.encode_documents(document.text for document in documents)
            splits[name] = write_shard(staging / f"{name}.bin", _report(arrays, name, say), dtype)
            splits[name]["documents"] = len(documents)
            if spec.chat:
                splits[name]["marks"] = write_shard(staging / f"{name}-marks.bin", marks, np.dtype("uint8"))
        words = tokenizer.vocab_size
        tokens = {name: _open_split(staging, entry, words, verify=False) for name, entry in splits.items()}
        hashes = [tokenizer.sha256, splits["train"]["sha256"], splits["val"]["sha256"]]
        hashes += [splits[name]["marks"]["sha256"] for name in splits if spec.chat]
        manifest = {
            "format_version": FORMAT_VERSION,
            "source": {**source.description, "bytes": size, "sha256": source.sha256()},
            "val_fraction": spec.val_fraction,
            "tokenizer": {
                "sha256": tokenizer.sha256,
                "vocab_size": tokenizer.vocab_size,
                "end_id": tokenizer.end_id,
                "library": f"tokenizers {tokenizers.__version__}",
            },
            "splits": splits,
            "unigram_nats": _unigram_nats(tokens["train"], tokens["val"], tokenizer.vocab_size),
            "hash": hashlib.sha256("".join(hashes).encode()).hexdigest(),
        }
        (staging / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        staging.chmod(0o755)  # mkdtemp makes it private, and a cache may be shared
        try:
            staging.rename(directory)
        except OSError:
            if not (directory / "manifest.json").is_file():  # otherwise another process was first
                raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        os.close(held)


def _sweep(directory: Path) -> None:
    """Removes what killed processes left half-done: a living one holds a lock on its own."""
    for path in directory.glob(f"{_STAGING}*"):
        with contextlib.suppress(OSError):
            descriptor = os.open(path, os.O_RDONLY)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if time.time() - path.stat().st_mtime > _OLD:
                    shutil.rmtree(path)
            finally:
                os.close(descriptor)


def _require_own(directory: Path) -> None:
    """Refuses a cache among temporary files that somebody else has put there."""
    base = Path(tempfile.gettempdir(), f"dqt-{os.getuid()}")
    if base in directory.parents and (base.is_symlink() or base.stat().st_uid != os.getuid()):
        raise DataError(f"{base} belongs to somebody else: set DQT_CACHE to a folder of your own")


def _keep_marks(
    pairs: Iterable[tuple[np.ndarray, np.ndarray]], marks: list[np.ndarray]
) -> Iterator[np.ndarray]:
    """Passes token ids on, and puts the marks beside them into a list."""
    for ids, mark in pairs:
        marks.append(mark)
        yield ids


def _report(arrays: Iterable[np.ndarray], name: str, say: Progress) -> Iterator[np.ndarray]:
    """Passes arrays on and says after every `_REPORT_EVERY` tokens how far it is."""
    tokens = 0
    for array in arrays:
        before, tokens = tokens, tokens + len(array)
        if tokens // _REPORT_EVERY > before // _REPORT_EVERY:
            say(f"encoding the {name} split: {tokens:,} tokens")
        yield array


def _unigram_nats(train: TokenShards, val: TokenShards, vocab_size: int) -> float:
    """Cross-entropy of `val` under the add-one smoothed frequencies of `train`, in nats a token."""
    train_counts, val_counts = (_learnt_counts(tokens, vocab_size) for tokens in (train, val))
    log_total = math.log(train_counts.sum() + vocab_size)
    return float(val_counts @ (log_total - np.log(train_counts + 1.0)) / max(1, val_counts.sum()))


def _learnt_counts(tokens: TokenShards, vocab_size: int) -> np.ndarray:
    """How often each token is to be learnt."""
    if tokens.marks is None:
        return tokens.counts(vocab_size)
    learnt = tokens.marks.read(0, len(tokens)) & LEARNT > 0
    return np.bincount(tokens.read(0, len(tokens))[learnt], minlength=vocab_size)
