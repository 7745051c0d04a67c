"""A byte-level BPE tokenizer as llama.cpp keeps it: tokens, merges, and the name of a pre-tokenizer.

llama.cpp splits text by rules of its own that a file names but does not define, so that a tokenizer whose
split is not known here is refused: with another one the ids would differ on some text, without a word.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from dqt.data.tokenizer import TextTokenizer
from dqt.errors import ModelError

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5

# What a `tokenizer.json` splits by, and the name that llama.cpp knows it by. GPT-2's pattern is the one that
# `tokenizers` has built in, and what `dqt train` makes.
_LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
_PRE_TOKENIZERS: dict[tuple[str, ...], str] = {
    ("gpt2",): "gpt-2",
    ("digits", "gpt2"): "smollm",
    (_LLAMA_3,): "llama-bpe",
}


@dataclass(frozen=True)
class Vocabulary:
    """What GGUF's `tokenizer.ggml` keys hold.

    Attributes:
        pre: The pre-tokenizer's name.
        tokens: By id, as many as the embedding has rows.
        types: NORMAL, CONTROL and so on, by id.
        merges: "left right", best first.
    """

    pre: str
    tokens: list[str]
    types: list[int]
    merges: list[str]


def read_vocabulary(tokenizer: TextTokenizer, rows: int) -> Vocabulary:
    """Reads a tokenizer.

    Args:
        tokenizer: A byte-level BPE.
        rows: Rows of the embedding; ids beyond the tokenizer's are unused.

    Raises:
        ModelError: If llama.cpp has no such tokenizer.
    """
    definition = json.loads(tokenizer.core.to_str())
    model = definition["model"]
    if model.get("type") != "BPE" or definition.get("normalizer"):
        raise ModelError(
            f"gguf has no mapping for a {model.get('type')} tokenizer with the normalizer "
            f"{definition.get('normalizer')}, only for byte-level BPE without one: use --to hf"
        )
    pre = _pre_tokenizer(definition.get("pre_tokenizer"))
    if bool(model.get("ignore_merges")) != (pre == "llama-bpe"):  # which llama.cpp decides by this name
        raise ModelError(f"llama.cpp's pre-tokenizer {pre!r} disagrees on ignore_merges: use --to hf")
    tokens = [f"[PAD{i}]" for i in range(rows)]
    types = [UNUSED] * rows
    for token, index in model["vocab"].items():
        tokens[index], types[index] = token, NORMAL
    for added in definition.get("added_tokens", []):
        index = added["id"]
        tokens[index], types[index] = added["content"], CONTROL if added["special"] else USER_DEFINED
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    return Vocabulary(pre, tokens, types, merges)


def _pre_tokenizer(definition: dict[str, Any] | None) -> str:
    parts = [definition or {}]
    if parts[0].get("type") == "Sequence":
        parts = parts[0]["pretokenizers"]
    key = tuple(name for part in parts if (name := _split_of(part)))
    if key not in _PRE_TOKENIZERS:
        raise ModelError(
            "gguf has no mapping for the tokenizer's way to split text, only for those of GPT-2 "
            "(and dqt train), SmolLM and Llama 3: use --to hf"
        )
    return _PRE_TOKENIZERS[key]


def _split_of(part: dict[str, Any]) -> str:
    """What a pre-tokenizer splits by; empty if it splits nothing."""
    kind = part.get("type")
    if kind == "ByteLevel" and not part.get("add_prefix_space"):
        return "gpt2" if part.get("use_regex", True) else ""
    if kind == "Digits" and part.get("individual_digits"):
        return "digits"
    if kind == "Split" and part.get("behavior") == "Isolated" and not part.get("invert"):
        return str(part["pattern"].get("Regex", "other"))
    return str(kind or "nothing")
