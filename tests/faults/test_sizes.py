"""Row 12: files larger than any of ours are refused by their size, before a byte of them costs memory."""

from __future__ import annotations

import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from nursery import Nursery, named
from strangers import limit_memory, without_manifest

from dqt.data import tokenizer
from dqt.data.tokenizer import load_tokenizer
from dqt.errors import DqtError
from dqt.train import config, storage
from dqt.train.config import Config
from dqt.train.rundir import RunDirectory
from dqt.train.savedmodel import load_model

HUGE = 2 << 30
"""Bytes of a file with nothing in it, which take no room on the disk."""

NAMES = 1_300_000
"""Tensors in a safetensors header of 90 MB. The library believes headers up to 100 MB, and takes the process
with it where there is no memory for one: with 512 MB of room, this one."""


def _config(path: Path) -> Any:
    return Config.from_toml(path / "config.toml")


def _record(path: Path) -> Any:
    return RunDirectory(path).read_record()


CASES: list[tuple[str, str, Callable[[Path], Any]]] = [
    ("model", "dqt.json", load_model),
    ("model", "manifest.json", load_model),
    ("model", "tokenizer.json", load_tokenizer),
    ("run", "run.json", _record),
    ("run", "config.toml", _config),
]


def load_all(whole: str, scratch: str, without: str) -> None:
    """Runs in a process of its own with little memory; prints what was not refused for its size."""
    if without:
        globals()[without](pytest.MonkeyPatch())
    limit_memory()
    for name, file, load in CASES:
        directory = Path(shutil.copytree(Path(whole) / name, Path(scratch) / f"{name}-{file}"))
        with (directory / file).open("wb") as content:
            content.truncate(HUGE)
        _report(f"{name}/{file}", load, directory, str(HUGE))
    directory = Path(shutil.copytree(Path(whole) / "model", Path(scratch) / "header"))
    size = _many_tensors(directory / "model.safetensors")
    without_manifest(directory)
    _report("a header", load_model, directory, str(size))
    print("tried all")


def _many_tensors(path: Path) -> int:
    """Writes a valid file of very many very small tensors; the size of its header."""
    entry = b'"%07d":{"dtype":"F32","shape":[],"data_offsets":[%d,%d]}'
    with path.open("wb") as file:
        file.write(bytes(8))
        for i in range(NAMES):
            file.write((b"," if i else b"{") + entry % (i, 4 * i, 4 * i + 4))
        file.write(b"}")
        size = file.tell() - 8
        file.truncate(8 + size + 4 * NAMES)
        file.seek(0)
        file.write(struct.pack("<Q", size))
    return size


def _report(name: str, load: Callable[[Path], Any], directory: Path, size: str) -> None:
    try:
        load(directory)
    except DqtError as error:
        if size not in str(error):
            print(f"{name}: {str(error)[:300]}")
    except BaseException as error:
        print(f"{name}: {type(error).__name__}: {str(error)[:300]}")
    else:
        print(f"{name}: was loaded")


def bounded_json(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(storage, "_MOST_JSON", 1 << 60)


def bounded_headers(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(storage, "_MOST_HEADER", 1 << 60)


def bounded_tokenizers(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(tokenizer, "_MOST_BYTES", 1 << 60)


def bounded_configs(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(config, "_MOST_BYTES", 1 << 60)


@pytest.mark.row(12, bounded_json, bounded_headers, bounded_tokenizers, bounded_configs)
def test_files_larger_than_any_of_ours(whole: Path, tmp_path: Path, nursery: Nursery, mutation: Any) -> None:
    taken = mutation.__name__ if mutation else ""
    status, output = nursery.run([], (named(load_all), [str(whole), str(tmp_path / "scratch"), taken]))
    assert status == 0, output[-2000:]
    assert output.splitlines() == ["tried all"]
