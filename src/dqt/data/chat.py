"""Conversations: lines of JSON, written out by a chat template, of which a model learns the answers alone.

    {"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}, …]}
    {"prompt": "…", "completion": "…"}        the same with one question and one answer

What counts as an answer is found by writing a conversation out twice, up to an answer and with it: the text
that is added is the answer, its end token included. Prompt and answer are encoded apart, as they are when a
model is used, so that no token spans both. That takes a template which does not change what it wrote before;
others are refused. What templates write as special tokens becomes special tokens, in a message too.

Every conversation is one sample of its own, cut at the sequence length; see `dqt.data.sampler`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dqt.data.sources import Document, SourceText, read_utf8
from dqt.data.tokenizer import TextTokenizer
from dqt.errors import DataError, did_you_mean

LEARNT, BEGIN = 1, 2
"""Bits of a token's mark: it is part of an answer; it begins a conversation."""

ROLES = ("system", "user", "assistant")

DEFAULT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
"""For tokenizers that have no template: `<|user|>`, a line end, the question, and so on."""

_BATCH = 256  # conversations
Message = dict[str, str]


def read_conversations(paths: Iterable[str | Path]) -> SourceText:
    """Reads JSONL files, and those in folders; a document for each line, its text the messages as JSON.

    Raises:
        DataError: A file that is missing or holds none; a line that is no conversation, by its number.
    """
    documents: list[Document] = []
    for root in map(Path, paths):
        files = sorted(root.rglob("*.jsonl")) if root.is_dir() else [root]
        if not root.exists() or not files:
            raise DataError(f"{root} holds no conversations: give a JSONL file, or a folder with *.jsonl")
        for path in files:
            # Not splitlines: JSON may hold U+2028 and other ends of lines as they are.
            for number, line in enumerate(read_utf8(path).split("\n"), start=1):
                if line.strip():
                    messages = _messages(line, f"{path}, line {number}")
                    text = json.dumps(messages, ensure_ascii=False)
                    documents.append(Document(f"{path.name}:{number}", text))
    if not documents:
        raise DataError("the JSONL files are empty: give one conversation a line")
    return SourceText(documents, {"name": "chat", "conversations": len(documents)})


def _messages(line: str, where: str) -> list[Message]:
    """The messages of a line, checked."""
    try:
        content = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is no JSON: {str(error)[:100]}") from error
    if not isinstance(content, dict):
        raise DataError(
            f'{where} is no JSON object: write {{"messages": [...]}}, or a prompt and a completion'
        )
    if "prompt" in content and "completion" in content:
        messages: Any = [
            {"role": "user", "content": content["prompt"]},
            {"role": "assistant", "content": content["completion"]},
        ]
    elif "messages" in content:
        messages = content["messages"]
    else:
        names = ", ".join(map(repr, list(content)[:5])) or "nothing"
        raise DataError(f'{where} has {names}: it needs "messages", or "prompt" and "completion"')
    if not isinstance(messages, list):
        raise DataError(f"{where}: messages is no list")
    for message in messages:
        role = message.get("role") if isinstance(message, dict) else None
        if role not in ROLES:
            raise DataError(f"{where} has a message with the role {role!r}; {did_you_mean(str(role), ROLES)}")
        if not isinstance(message.get("content"), str):
            raise DataError(f"{where}: the content of a message of {role!r} is no text")
        if any("\ud800" <= char <= "\udfff" for char in message["content"]):
            raise DataError(
                f"{where}: the content of a message of {role!r} has half a character (a lone surrogate, "
                'as in "\\ud83d"): write it whole, or leave it out'
            )
    roles = [message["role"] for message in messages]
    if "assistant" not in roles or roles[0] == "assistant":
        raise DataError(f'{where} needs a message of "user", and then one of "assistant" to learn')
    return [{"role": message["role"], "content": message["content"]} for message in messages]


def plain_text(document: Document) -> str:
    """All that was said in a conversation, to train a tokenizer on."""
    return "\n".join(message["content"] for message in json.loads(document.text))


def segments(messages: Sequence[Message], tokenizer: TextTokenizer) -> list[tuple[str, bool]]:
    """A conversation as text, in pieces that are learnt or not.

    Raises:
        DataError: If the template can't write it, or changes what it wrote before.
    """
    whole, pieces, done = write_out(messages, tokenizer), [], 0
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = write_out(messages[:index], tokenizer, ask=True)
        answered = write_out(messages[: index + 1], tokenizer)
        if not (whole.startswith(answered) and answered.startswith(prompt) and len(prompt) >= done):
            raise DataError(
                "the chat template writes earlier messages otherwise as later ones come, so answers can't be "
                "told apart: put one question and one answer on a line, or change the template"
            )
        pieces += [(whole[done : len(prompt)], False), (whole[len(prompt) : len(answered)], True)]
        done = len(answered)
    return [*pieces, (whole[done:], False)] if whole[done:] else pieces


def write_out(messages: Sequence[Message], tokenizer: TextTokenizer, ask: bool = False) -> str:
    """A conversation as the tokenizer's template writes it, with the beginning of an answer if asked to."""
    from transformers.utils.chat_template_utils import render_jinja_template

    names: dict[str, Any] = {"bos_token": tokenizer.end_token}
    names |= {
        key: value for key in ("bos_token", "pad_token", "unk_token") if (value := _text(tokenizer, key))
    }
    names["eos_token"] = tokenizer.end_token
    try:
        found = render_jinja_template(
            [list(messages)],
            chat_template=tokenizer.chat_template or DEFAULT_TEMPLATE,
            add_generation_prompt=ask,
            **names,
        )
    except Exception as error:  # whatever a template raises
        raise DataError(f"the chat template can't write a conversation: {str(error)[:200]}") from error
    return str(found[0][0])


def _text(tokenizer: TextTokenizer, key: str) -> str | None:
    value = tokenizer.settings.get(key)
    value = value.get("content") if isinstance(value, dict) else value
    return value if isinstance(value, str) else None


def encode_conversations(
    tokenizer: TextTokenizer, documents: Iterable[Document]
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Encodes what `read_conversations` gave.

    Yields:
        Token ids, int64, and their marks, uint8, of some conversations one after the other.

    Raises:
        DataError: See `segments`; the line is named.
    """
    batch: list[tuple[str, int]] = []
    tokenizer.core.encode_special_tokens = False
    for number, document in enumerate(documents, start=1):
        try:
            pieces = segments(json.loads(document.text), tokenizer)
        except DataError as error:
            raise DataError(f"{document.name}: {error}") from error
        pieces = [piece for piece in pieces if piece[0]]  # an empty one has no token that could begin
        batch += [
            (text, LEARNT * learnt | BEGIN * (place == 0)) for place, (text, learnt) in enumerate(pieces)
        ]
        if batch and number % _BATCH == 0:
            yield _encode(tokenizer, batch)
            batch = []
    if batch:
        yield _encode(tokenizer, batch)


def _encode(tokenizer: TextTokenizer, batch: list[tuple[str, int]]) -> tuple[np.ndarray, np.ndarray]:
    encoded = tokenizer.core.encode_batch_fast([text for text, _ in batch], add_special_tokens=False)
    ids, marks = [], []
    for encoding, (_, mark) in zip(encoded, batch, strict=True):
        piece = np.full(len(encoding.ids), mark & LEARNT, dtype=np.uint8)
        piece[:1] |= mark & BEGIN
        ids.append(np.array(encoding.ids, dtype=np.int64))
        marks.append(piece)
    return np.concatenate(ids), np.concatenate(marks)
