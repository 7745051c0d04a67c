"""The tokenizer: exact to the byte, deterministic, loadable by `transformers`."""

import json
import subprocess
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import AutoTokenizer

from dqt.data import tokenizer as module
from dqt.data.tokenizer import END_OF_TEXT, TextTokenizer, load_tokenizer, token_byte_lengths, train_tokenizer
from dqt.errors import ConfigError, DataError

TEXTS = [Path(json.__file__).read_text(), Path(subprocess.__file__).read_text()]


@cache
def trained() -> TextTokenizer:
    return train_tokenizer(TEXTS, 700)


def ids_of(*texts: str) -> np.ndarray:
    return np.concatenate(list(trained().encode_documents(texts)))


def test_vocabulary_holds_every_byte_and_the_end() -> None:
    tokenizer = trained()
    lengths = token_byte_lengths(tokenizer)
    assert (tokenizer.vocab_size, tokenizer.end_id) == (700, 0)
    assert (lengths.dtype, lengths[0]) == (np.int32, 0)
    assert (lengths[1:257] == 1).all()
    assert (lengths[257:] > 1).all()


@given(st.lists(st.text(), min_size=1, max_size=4))
def test_any_text_comes_back_and_its_bytes_add_up(texts: list[str]) -> None:
    ids = ids_of(*texts)
    ends = np.flatnonzero(ids == 0)
    assert len(ends) == len(texts)
    assert [trained().core.decode(part[part != 0]) for part in np.split(ids, ends + 1)[:-1]] == texts
    assert token_byte_lengths(trained())[ids].sum() == sum(len(text.encode()) for text in texts)


def test_end_of_text_written_in_a_document_is_text() -> None:
    ids = ids_of(f"a{END_OF_TEXT}b")
    assert list(np.flatnonzero(ids == 0)) == [len(ids) - 1]
    assert trained().core.decode(ids[:-1]) == f"a{END_OF_TEXT}b"


@given(st.lists(st.text(alphabet="ab \n\té"), max_size=5), st.integers(1, 9))
def test_long_documents_are_cut_without_loss(texts: list[str], chars: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_BATCH_CHARS", chars)
        batches = list(module._batches(texts))
    pieces = [piece for batch in batches for piece in batch]
    assert "".join(text + "|" for text in texts) == "".join(text + "|" * last for text, last in pieces)
    assert all(len(text) <= chars for text, _ in pieces)
    assert all(sum(len(text) for text, _ in batch) < 2 * chars for batch in batches)


def test_training_is_deterministic_across_processes() -> None:
    program = (
        "import json, subprocess\nfrom pathlib import Path\nfrom dqt.data.tokenizer import train_tokenizer\n"
        "texts = [Path(m.__file__).read_text() for m in (json, subprocess)]\n"
        "print(train_tokenizer(texts, 700).sha256)"
    )
    other = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert other.stdout.strip() == trained().sha256 == train_tokenizer(iter(TEXTS), 700).sha256


def test_saved_tokenizer_loads_here_and_in_transformers(tmp_path: Path) -> None:
    trained().save(tmp_path / "t")
    loaded, auto = load_tokenizer(tmp_path / "t"), AutoTokenizer.from_pretrained(tmp_path / "t")
    text = "def f(x):\n    return 'a . b' , \"né\" \n"
    assert loaded.sha256 == trained().sha256
    assert [*auto(text)["input_ids"], auto.eos_token_id] == ids_of(text).tolist()
    assert auto.decode(auto(text)["input_ids"]) == text
    assert len(auto) == loaded.vocab_size


def test_small_text_yields_fewer_tokens() -> None:
    assert 257 <= train_tokenizer(["abab abab"], 5000).vocab_size < 300


def test_vocabulary_too_small_for_every_byte_is_refused() -> None:
    with pytest.raises(ConfigError, match="vocab_size 256"):
        train_tokenizer(TEXTS, 256)


def test_foreign_end_token_and_added_words_are_counted(tmp_path: Path) -> None:
    core = Tokenizer.from_str(trained().core.to_str())
    core.add_special_tokens(["</s>"])
    core.add_tokens(["né"])
    TextTokenizer(core).save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "</s>"}}))
    loaded = load_tokenizer(tmp_path)
    assert (loaded.end_id, loaded.vocab_size) == (700, 702)
    assert token_byte_lengths(loaded)[-2:].tolist() == [0, 3]


def wordpiece(path: Path) -> None:
    core = Tokenizer(models.WordPiece({"[UNK]": 0}, unk_token="[UNK]"))
    core.decoder = decoders.WordPiece()
    core.save(str(path / "tokenizer.json"))


def without_end(path: Path) -> None:
    trained().save(path)
    (path / "tokenizer_config.json").write_text('{"eos_token": "<end>"}')


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda path: None, "does not exist"),
        (lambda path: (path / "tokenizer.json").write_text("{"), "cannot be read"),
        (wordpiece, "is not byte-level"),
        (without_end, "no token '<end>'"),
    ],
)
def test_unusable_tokenizer_is_a_clear_error(spoil: object, message: str, tmp_path: Path) -> None:
    spoil(tmp_path)
    with pytest.raises(DataError, match=message):
        load_tokenizer(tmp_path)
