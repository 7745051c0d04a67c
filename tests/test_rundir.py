"""A run's directory: which are refused, what `--overwrite` removes, and what a resumed run goes on in."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from dqt.errors import ConfigError, DataError, DqtError
from dqt.train.config import Config, resolve
from dqt.train.rundir import default_directory
from train_helpers import metrics_of, run_micro


def a_file(path: Path) -> None:
    path.write_text("mine")


def other_files(path: Path) -> None:
    path.mkdir()
    (path / "thesis.txt").write_text("mine")


def a_run(state: str) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        path.mkdir()
        (path / "run.json").write_text(json.dumps({"format_version": 1, "state": state}))

    return make


def a_newer_run(path: Path) -> None:
    path.mkdir()
    (path / "run.json").write_text(json.dumps({"format_version": 99}))


REFUSED = [
    (a_file, "is a file"),
    (other_files, "holds other files and no run"),
    (a_run("finished"), "holds a finished run: .*--overwrite"),
    (a_run("interrupted"), "--resume auto, or start anew with --overwrite"),
    (a_run("running"), "run that is running"),
    (a_newer_run, "update dqt"),
]


@pytest.mark.parametrize(("make", "part"), REFUSED)
def test_directories_that_are_refused(make: Callable[[Path], None], part: str, tmp_path: Path) -> None:
    make(tmp_path / "run")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(DqtError, match=part):
        run_micro(tmp_path)
    assert sorted(tmp_path.rglob("*")) == before


def test_overwrite_is_for_runs_alone(tmp_path: Path) -> None:
    """Of somebody's project it would take `model`, `plots` and `config.toml`."""
    kept = tmp_path / "run" / "model" / "weights.txt"
    kept.parent.mkdir(parents=True)
    kept.write_text("mine")
    with pytest.raises(ConfigError, match="holds other files and no run"):
        run_micro(tmp_path, overwrite=True)
    assert kept.read_text() == "mine"


def test_a_directory_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.access", lambda path, mode: False)  # root may write anywhere
    with pytest.raises(ConfigError, match="can't be written"):
        run_micro(tmp_path)


def test_overwrite_removes_what_a_run_wrote_and_nothing_else(tmp_path: Path) -> None:
    run_micro(tmp_path)
    (tmp_path / "run" / "thesis.txt").write_text("mine")
    result = run_micro(tmp_path, overwrite=True, train__steps=3)
    assert result.steps == 3
    assert (tmp_path / "run" / "thesis.txt").read_text() == "mine"
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-000003"]
    assert {line["step"] for line in metrics_of(tmp_path / "run")} == {1, 2, 3}


def test_a_run_elsewhere_is_not_resumed_into_a_run(tmp_path: Path) -> None:
    run_micro(tmp_path)
    run_micro(tmp_path, train__out=str(tmp_path / "other"))
    with pytest.raises(ConfigError, match="holds a finished run"):
        run_micro(tmp_path, train__out=str(tmp_path / "other"), resume=str(tmp_path / "run"), train__steps=9)
    with pytest.raises(ConfigError, match="choose one"):
        run_micro(tmp_path, resume="auto", overwrite=True)


def test_going_back_drops_what_came_later(tmp_path: Path) -> None:
    whole = run_micro(tmp_path)
    back = run_micro(tmp_path, resume=str(tmp_path / "run" / "checkpoints" / "step-000003"), train__steps=5)
    assert back.steps == 5
    names = [path.name for path in sorted((tmp_path / "run" / "checkpoints").iterdir())]
    assert names == ["step-000003", "step-000005"]
    assert max(line["step"] for line in metrics_of(tmp_path / "run")) == 5
    assert back.evaluation != whole.evaluation


def test_names_of_default_directories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = resolve(Config())
    first = Path("runs") / "tiny-ternary-residual"
    second = first.with_name("tiny-ternary-residual-2")
    assert default_directory(config, resume=False) == first
    first.parent.mkdir()
    a_run("finished")(first)
    assert default_directory(config, resume=False) == second
    assert default_directory(config, resume=True) == second
    a_run("interrupted")(second)
    assert default_directory(config, resume=True) == second
    assert default_directory(config, resume=False).name.endswith("-3")


def test_too_little_text(tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("a few words\n" * 20)
    with pytest.raises(DataError, match="too little text"):
        run_micro(tmp_path, data__text=[str(tmp_path / "short.txt")], train__seq_len=512)
    assert not (tmp_path / "run").exists()
