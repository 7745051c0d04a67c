"""Files from elsewhere: one of each that `dqt` opens, signed anew, and loaded with little memory."""

from __future__ import annotations

import resource
import shutil
from pathlib import Path

import small

from dqt.train import storage
from dqt.train.checkpoint import read_state, restore
from train_helpers import run_micro

OLD_FORMAT = Path(__file__).parent / "format-1"
CHECKPOINT, MODEL = OLD_FORMAT / "step-000004", OLD_FORMAT / "model"
ROOM = 512 << 20
"""Bytes beyond what the process has that loading a file may take."""


def one_of_each(base: Path) -> Path:
    """A directory with a checkpoint, a model, a corpus and a run."""
    result = run_micro(base, train__steps=1)
    corpus = next((base.parent / "dqt-cache" / "corpora").iterdir())
    for source, name in ((CHECKPOINT, "step-000004"), (MODEL, "model"), (corpus, "corpus")):
        shutil.copytree(source, base / "all" / name)
    shutil.copytree(result.directory.path, base / "all" / "run")
    return base / "all"


def load_checkpoint(path: Path) -> None:
    """Loads a checkpoint into the model that it is of."""
    model, optimizer = small.model_and_optimizer()
    restore(path, read_state(path), model, optimizer)


def without_manifest(directory: Path) -> None:
    """Signs a directory anew, as a stranger would."""
    if (directory / storage.MANIFEST).is_file() and "files" in storage.load_json(
        directory / storage.MANIFEST
    ):
        (directory / storage.MANIFEST).unlink()
        storage._write_manifest(directory)


def limit_memory() -> None:
    """Leaves this process `ROOM` more than it has."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + ROOM
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
