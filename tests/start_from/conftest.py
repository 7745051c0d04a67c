"""Trained models that runs start from: a directory, a run, a GGUF file."""

from __future__ import annotations

from pathlib import Path

import pytest

from dqt.cli import main
from from_cases import run, write_directory
from train_helpers import run_micro


@pytest.fixture(scope="module")
def starts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A directory, and a run from scratch, whose weights have one scale a tensor."""
    folder = tmp_path_factory.mktemp("from")
    run_micro(folder, quant__bits="4", quant__method="residual", train__steps=1)
    return {"directory": write_directory(folder / "trained"), "run": folder / "run"}


@pytest.fixture(scope="module")
def directory(starts: dict[str, Path]) -> Path:
    return starts["directory"]


@pytest.fixture(scope="module")
def gguf(directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model as llama.cpp's format, written by our export."""
    pytest.importorskip("gguf")
    pytest.importorskip("accelerate")
    folder = tmp_path_factory.mktemp("gguf")
    run(directory, folder / "run", quant__method="fp32", optim__lr=1e-12, train__steps=1)
    assert main(["export", str(folder / "run"), "--to", "gguf", "--out", str(folder / "out")]) == 0
    (path,) = (folder / "out").glob("*.gguf")
    return path
