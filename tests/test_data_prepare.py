"""Preparation: split, shards, manifest and cache; damage is found and named."""

import json
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dqt.data import prepare, shards
from dqt.data.prepare import Corpus, encode_text, prepare_corpus, split_documents
from dqt.data.shards import TokenShards, open_shard, token_dtype, write_shard
from dqt.data.sources import Document
from dqt.data.spec import DataSpec
from dqt.data.tokenizer import load_tokenizer
from dqt.errors import ConfigError, DataError

WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]


def text_of(seed: int, lines: int) -> str:
    rng = np.random.default_rng(seed)
    return "".join(" ".join(rng.choice(WORDS, 8)) + "\n" for _ in range(lines))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Forty files of text."""
    path = tmp_path / "texts"
    path.mkdir()
    for index in range(40):
        (path / f"{index}.txt").write_text(text_of(index, 20))
    return path


def spec_of(folder: Path, **settings: object) -> DataSpec:
    return DataSpec(**{"text": [str(folder)], "vocab_size": 270, "val_fraction": 0.1} | settings)


def decode(corpus: Corpus, split: TokenShards) -> list[str]:
    """The documents of a split."""
    ids = split.read(0, len(split))
    core = load_tokenizer(corpus.tokenizer_dir).core
    return [core.decode(part[:-1]) for part in np.split(ids, np.flatnonzero(ids == corpus.end_id) + 1)[:-1]]


def test_prepared_corpus_holds_all_text_once(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare, "_REPORT_EVERY", 10_000)
    lines: list[str] = []
    corpus = prepare_corpus(spec_of(folder), tmp_path / "cache", lines.append)
    train, val = decode(corpus, corpus.train), decode(corpus, corpus.val)
    assert sorted(train + val) == sorted(path.read_text() for path in folder.iterdir())
    total = sum(map(len, train + val))
    assert 0.05 * total <= sum(map(len, val)) <= 0.1 * total
    assert corpus.token_bytes[corpus.val.read(0, len(corpus.val))].sum() == sum(map(len, val))
    assert [line.split()[0] for line in lines] == ["read", "training", "encoding", "corpus"]
    manifest = json.loads((corpus.directory / "manifest.json").read_text())
    assert manifest == corpus.manifest
    assert manifest["splits"]["train"]["tokens"] == len(corpus.train)
    assert manifest["source"]["bytes"] == total
    assert corpus.vocab_size == manifest["tokenizer"]["vocab_size"] == len(corpus.token_bytes)


def test_text_with_few_words_says_how_many_tokens_it_yields(folder: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    corpus = prepare_corpus(spec_of(folder, vocab_size=5000), tmp_path / "cache", lines.append)
    assert f"the text yields only {corpus.vocab_size:,} tokens" in lines


def test_unigram_is_the_cross_entropy_of_smoothed_counts(folder: Path, tmp_path: Path) -> None:
    corpus = prepare_corpus(spec_of(folder), tmp_path / "cache")
    train = Counter(corpus.train.read(0, len(corpus.train)).tolist())
    val = corpus.val.read(0, len(corpus.val)).tolist()
    total = len(corpus.train) + corpus.vocab_size
    expected = -sum(math.log((train[token] + 1) / total) for token in val) / len(val)
    assert corpus.unigram_nats == pytest.approx(expected, rel=1e-12)


def test_second_call_reuses_and_changed_text_does_not(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DQT_CACHE", str(tmp_path / "cache"))
    first = prepare_corpus(spec_of(folder))
    assert first.directory.parent == tmp_path / "cache" / "corpora"
    train = prepare.train_tokenizer
    monkeypatch.setattr(prepare, "train_tokenizer", None)  # training again would fail
    again = prepare_corpus(spec_of(folder))
    assert (again.directory, again.hash) == (first.directory, first.hash)
    monkeypatch.setattr(prepare, "train_tokenizer", train)
    other = prepare_corpus(spec_of(folder, vocab_size=265))
    (folder / "0.txt").write_text("changed\n")
    changed = prepare_corpus(spec_of(folder))
    assert len({first.hash, other.hash, changed.hash}) == 3
    assert len(list(first.directory.parent.iterdir())) == 3  # no staging left


def test_same_text_elsewhere_gives_the_same_corpus(folder: Path, tmp_path: Path) -> None:
    first = prepare_corpus(spec_of(folder), tmp_path / "a")
    moved = folder.rename(tmp_path / "moved")
    second = prepare_corpus(spec_of(moved), tmp_path / "b")
    files = ("tokenizer/tokenizer.json", "train.bin", "val.bin", "manifest.json")
    assert all((first.directory / f).read_bytes() == (second.directory / f).read_bytes() for f in files)


def test_default_cache_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DQT_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert prepare.default_cache_dir() == Path("/xdg/dqt")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/someone")
    assert prepare.default_cache_dir() == Path("/home/someone/.cache/dqt")


def test_given_tokenizer_is_used(folder: Path, tmp_path: Path) -> None:
    first = prepare_corpus(spec_of(folder), tmp_path / "cache")
    other = tmp_path / "other.txt"
    other.write_text(text_of(99, 30))
    second = prepare_corpus(spec_of(other, tokenizer=str(first.tokenizer_dir)), tmp_path / "cache")
    assert second.manifest["tokenizer"]["sha256"] == first.manifest["tokenizer"]["sha256"]
    assert "".join(decode(second, second.train) + decode(second, second.val)) == other.read_text()
    encoded = encode_text(first.tokenizer_dir, [other])
    assert first.token_bytes[encoded.read(0, len(encoded))].sum() == other.stat().st_size


def test_built_in_and_named_sources_are_reached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(
        prepare.BUILTIN_SOURCES, "toy", lambda: prepare.SourceText([Document("a", text_of(0, 90))], {})
    )
    calls = []

    def fake(*args: object) -> prepare.SourceText:
        calls.append(args)
        return prepare.SourceText([Document("0", text_of(1, 90))], {"name": "org/x"})

    monkeypatch.setattr(prepare, "read_dataset", fake)
    toy = prepare_corpus(DataSpec("toy", vocab_size=300, max_bytes=1000), tmp_path)
    assert toy.manifest["source"]["bytes"] == 1000
    named = prepare_corpus(DataSpec("org/x", vocab_size=300, dataset_split="test"), tmp_path)
    assert named.manifest["source"]["name"] == "org/x"
    assert calls == [("org/x", None, "test", "text", None)]


@given(
    st.lists(st.text(alphabet="xyz\n", max_size=200), min_size=1, max_size=30),
    st.sampled_from([0.01, 0.05, 0.3]),
)
def test_split_loses_nothing_and_leaves_neither_part_empty(texts: list[str], fraction: float) -> None:
    documents = [Document(f"{index:02}", text) for index, text in enumerate(texts) if text]
    size = sum(len(document.text) for document in documents)
    try:
        train, val = split_documents(documents, fraction)
    except DataError:
        assert all(len(document.text) < 2 for document in documents)
        return
    joined = {document.name: "" for document in documents}
    for document in (*train, *val):
        assert document.text
        joined[document.name] += document.text
    assert joined == {document.name: document.text for document in documents}
    # At least one character of each document goes to the tail, or the whole documents fit into the share.
    assert sum(len(document.text) for document in val) <= max(fraction * size + len(documents), 1)


def test_one_text_is_cut_at_a_line() -> None:
    text = text_of(0, 200)
    (train,), (val,) = split_documents([Document("a", text)], 0.05)
    assert train.text + val.text == text
    assert train.text.endswith("\n")
    assert 0.025 <= len(val.text) / len(text) <= 0.05


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"vocab_size": 256}, "vocab_size 256"),
        ({"val_fraction": 0.0}, "val_fraction must be between 0 and 1"),
        ({"val_fraction": 1.0}, "val_fraction must be between 0 and 1"),
        ({"max_bytes": 0}, "max_bytes must be at least 1"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DataSpec(**settings)


def test_too_little_text_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("x")
    with pytest.raises(DataError, match="too little text"):
        prepare_corpus(DataSpec(text=(str(tmp_path / "x"),)), tmp_path / "cache")
    (tmp_path / "x").write_text(text_of(0, 20))
    corpus = prepare_corpus(DataSpec(text=(str(tmp_path / "x"),), vocab_size=257), tmp_path / "cache")
    corpus.require_length(len(corpus.val) - 1)
    with pytest.raises(DataError, match=r"the validation split has \d+ tokens.* needs \d+: give more text"):
        corpus.require_length(len(corpus.val))
    with pytest.raises(DataError, match="the training split"):
        corpus.require_length(len(corpus.train))


def test_binary_files_left_out_are_named(folder: Path, tmp_path: Path) -> None:
    (folder / "picture").write_bytes(b"\0\1")
    lines: list[str] = []
    prepare_corpus(spec_of(folder), tmp_path / "cache", lines.append)
    assert lines[0] == "left out files that hold NUL bytes (1): 'picture'"


def test_unwritable_cache_names_the_way_out(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"cannot be written .* DQT_CACHE"):
        prepare_corpus(spec_of(folder), tmp_path / "file")


def test_interrupted_preparation_leaves_nothing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(prepare, "write_shard", interrupt)
    with pytest.raises(KeyboardInterrupt):
        prepare_corpus(spec_of(folder), tmp_path / "cache")
    assert list((tmp_path / "cache" / "corpora").iterdir()) == []


def test_a_faster_process_wins_the_race(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = Path.rename

    def after_another(self: Path, target: Path) -> Path:
        monkeypatch.setattr(Path, "rename", rename)
        prepare_corpus(spec_of(folder), tmp_path / "cache")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", after_another)
    corpus = prepare_corpus(spec_of(folder), tmp_path / "cache")
    assert list((tmp_path / "cache" / "corpora").iterdir()) == [corpus.directory]


def flip_byte(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


def newer(path: Path) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format_version": 99}))


@pytest.mark.parametrize(
    ("file", "damage", "message"),
    [
        ("train.bin", Path.unlink, "train.bin is missing"),
        (
            "train.bin",
            lambda path: path.write_bytes(path.read_bytes()[:-1]),
            r"train.bin has \d+ bytes instead",
        ),
        ("val.bin", flip_byte, "val.bin was altered"),
        ("manifest.json", Path.unlink, "manifest.json is missing or damaged"),
        ("manifest.json", lambda path: path.write_text("{"), "manifest.json is missing or damaged"),
        ("manifest.json", lambda path: path.write_text('{"format_version": 2}'), "is missing or damaged"),
        ("manifest.json", newer, "not of the format 2"),
        ("tokenizer/tokenizer.json", Path.unlink, "tokenizer.json does not exist"),
        ("tokenizer/tokenizer_config.json", lambda path: path.write_text("{"), "cannot be read"),
        (
            "tokenizer/tokenizer_config.json",
            lambda path: path.write_text('{"eos_token": "e"}'),
            "was altered",
        ),
    ],
)
def test_damage_is_found_and_named(
    file: str, damage: object, message: str, folder: Path, tmp_path: Path
) -> None:
    corpus = prepare_corpus(spec_of(folder), tmp_path / "cache")
    damage(corpus.directory / file)
    with pytest.raises(DataError, match=message):
        prepare_corpus(spec_of(folder), tmp_path / "cache")


def test_replaced_tokenizer_is_found(folder: Path, tmp_path: Path) -> None:
    corpus = prepare_corpus(spec_of(folder), tmp_path / "cache")
    other = prepare_corpus(spec_of(folder, vocab_size=265), tmp_path / "cache")
    load_tokenizer(other.tokenizer_dir).save(corpus.tokenizer_dir)
    with pytest.raises(DataError, match="tokenizer was altered"):
        Corpus.open(corpus.directory)


@pytest.mark.parametrize(("vocab_size", "dtype"), [(257, "<u2"), (65_536, "<u2"), (65_537, "<u4")])
def test_shards_round_trip_at_the_smallest_type(vocab_size: int, dtype: str, tmp_path: Path) -> None:
    tokens = np.array([0, vocab_size - 1, 1, vocab_size - 1], dtype=np.int64)
    entry = write_shard(tmp_path / "t.bin", [tokens[:1], tokens[1:1], tokens[1:]], token_dtype(vocab_size))
    assert (tmp_path / "t.bin").read_bytes() == tokens.astype(dtype).tobytes()
    opened = open_shard(tmp_path, entry, vocab_size)
    assert (len(opened), opened.read(1, 3).tolist()) == (4, tokens[1:].tolist())
    assert opened.read(0, 4).dtype == np.int64
    assert opened.counts(vocab_size).tolist() == np.bincount(tokens, minlength=vocab_size).tolist()
    for start, count in ((-1, 1), (3, 2), (0, -1)):
        with pytest.raises(IndexError):
            opened.read(start, count)


def test_hash_of_a_large_shard_is_checked_on_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = write_shard(tmp_path / "t.bin", [np.arange(9)], token_dtype(9))
    flip_byte(tmp_path / "t.bin")
    monkeypatch.setattr(shards, "_HASHED_AT_OPEN", 4)
    assert len(open_shard(tmp_path, entry, 9)) == 9
    with pytest.raises(DataError, match="was altered"):
        open_shard(tmp_path, entry, 9, verify=True)
