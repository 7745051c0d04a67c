"""Which documents are held out: a function of their names and sizes alone.

Whole documents are taken in the order of a hash of their names while they fit into the share. Where that
leaves most of it empty (one document, or a few large ones), the tail of every document is held out instead,
cut at a line; conversations are never cut.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from dqt.data.sources import Document
from dqt.errors import DataError


def split_documents(
    documents: Sequence[Document], val_fraction: float
) -> tuple[list[Document], list[Document]]:
    """Splits documents into training and validation, in their order, as the module's text says.

    Raises:
        DataError: too little text for two parts.
    """
    train, val, enough = _split_whole(documents, val_fraction)
    if not enough:
        train, val = [], []
        for document in documents:
            at = _tail_start(document.text, val_fraction)
            train.append(Document(document.name, document.text[:at]))
            val.append(Document(document.name, document.text[at:]))
        train, val = [d for d in train if d.text], [d for d in val if d.text]
    if not train or not val:
        size = sum(len(document.text) for document in documents)
        raise DataError(f"too little text: {size} characters cannot be split in two; give more text")
    return train, val


def split_conversations(
    documents: Sequence[Document], val_fraction: float
) -> tuple[list[Document], list[Document]]:
    """Splits conversations, which are never cut: where none fits the share, the first by hash is held out."""
    train, val, _ = _split_whole(documents, val_fraction)
    if not val:
        first = min(documents, key=lambda document: _name_hash(document.name))
        train, val = [document for document in documents if document is not first], [first]
    if not train:
        raise DataError("one conversation cannot be split in training and validation: give more")
    return train, val


def _split_whole(
    documents: Sequence[Document], val_fraction: float
) -> tuple[list[Document], list[Document], bool]:
    """Both parts in whole documents, and whether the second is at least half as large as it should be."""
    sizes = [len(document.text) for document in documents]
    budget = val_fraction * sum(sizes)
    left = budget
    held_out: set[int] = set()
    for index in sorted(range(len(documents)), key=lambda i: _name_hash(documents[i].name)):
        if sizes[index] <= left:
            held_out.add(index)
            left -= sizes[index]
    train = [document for index, document in enumerate(documents) if index not in held_out]
    val = [document for index, document in enumerate(documents) if index in held_out]
    return train, val, left <= budget / 2


def _tail_start(text: str, fraction: float) -> int:
    """Where a text's tail begins: at a line that starts in the first half of that share, or anywhere."""
    at = max(1, round(len(text) * (1 - fraction)))
    return text.find("\n", at, (at + len(text)) // 2) + 1 or min(at, len(text) - 1)


def _name_hash(name: str) -> bytes:
    return hashlib.sha256(name.encode("utf-8", "surrogatepass")).digest()
