"""`dqt checkpoint`: what it lists, what it calls damaged, what it removes and refuses to."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dqt.cli import main
from dqt.train.rundir import RunDirectory
from train_helpers import run_micro


@pytest.fixture
def run(tmp_path: Path) -> Path:
    run_micro(tmp_path)
    return tmp_path / "run"


def steps_of(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def test_ls(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoint", "ls", str(run), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [f"step-{row['step']:06d}" for row in rows] == steps_of(run)
    sizes = [
        sum(f.stat().st_size for f in path.iterdir()) for path in sorted((run / "checkpoints").iterdir())
    ]
    assert [row["bytes"] for row in rows] == sizes
    assert {name for row in rows for name in row["pinned"]} == {"best", "last good"}
    assert all(row["readable"] for row in rows)
    (run / "checkpoints" / steps_of(run)[-1] / "state.json").unlink()
    assert main(["checkpoint", "ls", str(run)]) == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith("damaged")


def test_verify(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoint", "verify", str(run)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(steps_of(run)) + 1  # and model/
    assert all(line.endswith(": whole") for line in lines)
    bad = run / "checkpoints" / steps_of(run)[0]
    content = bytearray((bad / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (bad / "model.safetensors").write_bytes(content)
    for target, damaged in ((run, f"1 of {len(lines)}"), (bad, "1 of 1")):
        assert main(["checkpoint", "verify", str(target), "--json"]) == 2
        out, err = capsys.readouterr()
        assert [path for path, error in json.loads(out).items() if error] == [str(bad)]
        assert f"{damaged} are damaged" in err
    assert main(["checkpoint", "verify", str(run / "model")]) == 0


def test_rm(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = steps_of(run)
    with RunDirectory(run).claimed():
        assert main(["checkpoint", "rm", str(run), before[0]]) == 2
        assert steps_of(run) == before
    assert main(["checkpoint", "rm", str(run), before[0]]) == 0
    assert steps_of(run) == before[1:]
    assert f"removed {run / 'checkpoints' / before[0]}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["rm", "RUN"], "say which steps"),
        (["rm", "RUN", "77"], "has no checkpoint of step 77"),
        (["rm", "RUN/model", "1"], "is a checkpoint or a model, not a run"),
        (["ls", "RUN/none"], "there is no directory"),
        (["list", "RUN"], "invalid choice: 'list'"),
    ],
)
def test_bad_input(arguments: list[str], message: str, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = steps_of(run)
    assert main(["checkpoint", *(each.replace("RUN", str(run)) for each in arguments)]) == 2
    assert message in capsys.readouterr().err
    assert steps_of(run) == before
