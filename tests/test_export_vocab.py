"""Text has the same tokens in llama.cpp; a tokenizer that it lacks is refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import gguf
import pytest
from tokenizers import Tokenizer

from dqt.data.tokenizer import TextTokenizer
from dqt.errors import ModelError
from dqt.export import gguf_file, gguf_vocab
from dqt.export.command import export
from dqt.export.llama_cpp import next_log_probs
from dqt.export.source import load_source
from export_helpers import VOCABULARY, saved_model

AWKWARD = [
    "don't  we'll\tHE'S\r\n\n   x=1_000  \n",
    "naïve Straße 北京 \u200b\u00a0 e\u0301 🙂👩‍👩‍👧 ½²३",
    "<|endoftext|> is text here",
    "    def f(a: int=0) -> None:  # ???!!!\n        return ...",
]


def test_llama_cpp_splits_any_text_as_the_tokenizer_does(tmp_path: Path) -> None:
    run = saved_model(tmp_path)
    source = load_source(run)
    path = export(run, "gguf").path / "m.gguf"
    for ids, text in zip(next_log_probs(path, [], AWKWARD, VOCABULARY)[1], AWKWARD, strict=True):
        source.tokenizer.core.encode_special_tokens = True
        assert ids == source.tokenizer.core.encode(text, add_special_tokens=False).ids


def test_a_damaged_gguf_file_is_one_clear_message(tmp_path: Path) -> None:
    path = export(saved_model(tmp_path), "gguf").path / "m.gguf"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ModelError, match=r"llama.cpp does not run .*m\.gguf: .{10}") as caught:
        next_log_probs(path, [[1, 2]], [], VOCABULARY)
    assert len(str(caught.value).splitlines()) == 1


def tokenizer_with(tmp_path: Path, **changes: Any) -> Any:
    source = load_source(saved_model(tmp_path))
    definition = json.loads(source.tokenizer.core.to_str())
    definition["model"] |= changes.pop("model", {})
    return TextTokenizer(Tokenizer.from_str(json.dumps(definition | changes)))


def split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
GPT2 = BYTES | {"use_regex": True}
DIGITS = {"type": "Digits", "individual_digits": True}
PRE_TOKENIZERS: list[tuple[dict[str, Any], str]] = [
    (GPT2, "gpt-2"),
    ({"type": "Sequence", "pretokenizers": [DIGITS, GPT2]}, "smollm"),
    ({"type": "Sequence", "pretokenizers": [split(gguf_vocab._LLAMA_3), BYTES]}, "llama-bpe"),
]


@pytest.mark.parametrize(("pre_tokenizer", "name"), PRE_TOKENIZERS, ids=str)
def test_llama_cpp_knows_the_pre_tokenizer(pre_tokenizer: dict[str, Any], name: str, tmp_path: Path) -> None:
    run = saved_model(tmp_path)
    model = {"ignore_merges": name == "llama-bpe"}
    tokenizer = tokenizer_with(tmp_path, pre_tokenizer=pre_tokenizer, model=model)
    source = dataclasses.replace(load_source(run), tokenizer=tokenizer)
    gguf_file.write_gguf(source, tmp_path / "m.gguf")
    field = gguf.GGUFReader(tmp_path / "m.gguf").fields["tokenizer.ggml.pre"]
    assert field.contents() == name
    source.tokenizer.core.encode_special_tokens = True
    texts = [*AWKWARD, "12345 67 x89"]
    for ids, text in zip(next_log_probs(tmp_path / "m.gguf", [], texts, VOCABULARY)[1], texts, strict=True):
        assert ids == source.tokenizer.core.encode(text, add_special_tokens=False).ids


def test_llama_cpp_begins_a_text_where_the_tokenizer_does(tmp_path: Path) -> None:
    begin = {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}
    template = {
        "type": "TemplateProcessing",
        "single": [begin, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}},
    }
    for changes, begins in (({}, False), ({"post_processor": template}, True)):
        tokenizer = tokenizer_with(tmp_path, **changes)
        source = dataclasses.replace(load_source(tmp_path), tokenizer=tokenizer)
        gguf_file.write_gguf(source, tmp_path / "m.gguf")
        field = gguf.GGUFReader(tmp_path / "m.gguf").fields["tokenizer.ggml.add_bos_token"]
        assert field.contents() is begins


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [split(r"\w+"), BYTES]}},
            "way to split text",
        ),
        ({"normalizer": {"type": "NFC"}}, "normalizer"),
        ({"model": {"ignore_merges": True}}, "ignore_merges"),
    ],
    ids=str,
)
def test_a_tokenizer_that_llama_cpp_lacks_is_refused(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match=message):
        gguf_vocab.read_vocabulary(tokenizer_with(tmp_path, **changes), VOCABULARY)
