"""Rows 6, 7, 16, 17 and 18: directories, disks, memory and surroundings of a run."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import resource
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from nursery import Nursery, named, wait_until
from runs import arguments

from dqt.data import prepare
from dqt.errors import ConfigError, DataError, DqtError, WriteError
from dqt.train import metrics, storage, trainer
from dqt.train.checkpoint import list_checkpoints, read_state
from dqt.train.learner import Learner
from dqt.train.metrics import MetricsLog
from dqt.train.rundir import LOCK, RunDirectory
from train_helpers import metrics_of, run_micro

NO_SPACE = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

# -- row 6: no space in a run --------------------------------------------------------------------------------


def catching_failed_writes(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(trainer.Trainer, "_write", lambda self, action: action())


def undoing_half_a_line(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(os, "ftruncate", lambda descriptor, size: None)


@pytest.mark.row(6, catching_failed_writes)
def test_a_full_disk_in_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second of three checkpoints does not fit."""
    save, saved = storage.save_tensors, [0]

    def fail_once(path: Path, tensors: Any) -> None:
        saved[0] += "step-000004" in path.parent.name
        if saved[0] == 1:
            saved[0] += 1
            raise NO_SPACE
        save(path, tensors)

    monkeypatch.setattr(storage, "save_tensors", fail_once)
    values = {"train__checkpoint_every": 2, "train__log_every": 1}
    directory = tmp_path / "run" / "checkpoints"
    message = r"step-000004 can't be written: No space left on device \(it needs \d+\.\d MB"
    with pytest.raises(WriteError, match=message):
        run_micro(tmp_path, **values)
    assert [path.name for path in directory.iterdir()] == ["step-000002"]
    read_state(directory / "step-000002")
    assert json.loads((tmp_path / "run" / "run.json").read_text())["state"] == "failed"
    saved[0] = 0
    try:
        assert run_micro(tmp_path, overwrite=True, train__on_write_error="continue", **values).steps == 6
    except WriteError as error:
        pytest.fail(str(error))
    assert [path.name for path in list_checkpoints(directory)] == ["step-000002", "step-000006"]
    for path in list_checkpoints(directory):
        read_state(path)


@pytest.mark.row(6, undoing_half_a_line)
def test_a_line_of_metrics_that_does_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write, full = os.write, [False]

    def half(descriptor: int, raw: bytes) -> int:
        if full[0]:
            write(descriptor, raw[: len(raw) // 2])
            raise NO_SPACE
        return write(descriptor, raw)

    monkeypatch.setattr(metrics.os, "write", half)
    with MetricsLog(tmp_path / "metrics.jsonl") as log:
        for step in range(4):
            full[0] = step == 2
            if full[0]:
                with pytest.raises(WriteError, match=r"metrics.jsonl can't be written: No space left"):
                    log.write({"step": step})
            else:
                log.write({"step": step})
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 0}\n{"step": 1}\n{"step": 3}\n'


def removing_a_half_corpus(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(prepare.shutil, "rmtree", lambda path, ignore_errors=False: None)


@pytest.mark.row(6, removing_a_half_corpus)
def test_shards_that_do_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path, arrays: Any, dtype: Any) -> None:
        path.write_bytes(b"half")
        raise NO_SPACE

    monkeypatch.setattr(prepare, "write_shard", fail)
    (tmp_path / "text.txt").write_text("some words and more\n" * 500)
    spec = prepare.DataSpec(text=(str(tmp_path / "text.txt"),), vocab_size=260)
    with pytest.raises(DataError, match=r"No space left on device; set DQT_CACHE .* with 0.0 MB free"):
        prepare.prepare_corpus(spec, tmp_path / "cache")
    assert list((tmp_path / "cache" / "corpora").iterdir()) == []


# -- row 7: no directory to write to -------------------------------------------------------------------------


def looking_before_the_first_step(patch: pytest.MonkeyPatch) -> None:
    import contextlib

    patch.setattr(RunDirectory, "require_usable", lambda self, resume, overwrite: None)
    patch.setattr(RunDirectory, "claimed", lambda self: contextlib.nullcontext())
    patch.setattr(trainer.Trainer, "_begin", lambda self: None)


def a_file(path: Path) -> Path:
    path.write_text("mine")
    return path


def below_a_file(path: Path) -> Path:
    return a_file(path) / "run"


def where_nothing_can_be_made(path: Path) -> Path:
    return Path("/proc/self/run")


def a_closed_directory(path: Path) -> Path:
    path.mkdir()
    path.chmod(0o555)
    os.access(path, os.W_OK)
    return path


@pytest.mark.row(7, looking_before_the_first_step)
@pytest.mark.parametrize("make", [a_file, below_a_file, where_nothing_can_be_made, a_closed_directory])
def test_refused_before_the_first_step(
    make: Callable[[Path], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = make(tmp_path / "there")
    if make is a_closed_directory:  # root may write everywhere
        access = os.access
        monkeypatch.setattr(os, "access", lambda path, mode: path != out and access(path, mode))

    def step(self: Learner, telemetry: bool) -> None:
        raise AssertionError("a step was taken")

    monkeypatch.setattr(Learner, "train_step", step)
    with pytest.raises(DqtError, match=r"--out"):
        run_micro(tmp_path, train__out=str(out))


# -- row 16: two runs ----------------------------------------------------------------------------------------


def locking(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(fcntl, "flock", lambda descriptor, how: None)


def wait_in_step(release: str) -> None:
    """Has this process stand still in its second step until a file is there."""
    original = Learner.train_step

    def waiting(self: Learner, telemetry: bool) -> dict[str, Any]:
        if self.step == 1:
            wait_until(Path(release).exists)
        return original(self, telemetry)

    Learner.train_step = waiting  # type: ignore[method-assign]


@pytest.mark.row(16, locking)
def test_the_second_run_is_refused(tmp_path: Path, nursery: Nursery, mutation: Any) -> None:
    env = {"DQT_CACHE": str(tmp_path / "cache")}
    out = tmp_path / "run"
    child = nursery.start(arguments(out), [(named(wait_in_step), [str(tmp_path / "go")])], env=env)
    wait_until(lambda: "writing to" in child.output)
    try:
        for options in ({"resume": "auto"}, {"overwrite": True}):
            with pytest.raises(ConfigError, match=rf"in use by process {child.pid} on .*, started 20"):
                run_micro(tmp_path, **options)
        with pytest.raises(ConfigError, match="holds a run that is running"):
            run_micro(tmp_path)
    finally:
        (tmp_path / "go").touch()
        status = child.wait()
    assert status == 0, child.output
    assert not (out / LOCK).exists()
    assert len([line for line in metrics_of(out) if "loss" in line]) == 6


def test_a_lock_ends_with_its_process(tmp_path: Path, nursery: Nursery) -> None:
    env = {"DQT_CACHE": str(tmp_path / "cache")}
    child = nursery.start(arguments(tmp_path / "run"), [(named(wait_in_step), ["/nowhere"])], env=env)
    wait_until(lambda: "writing to" in child.output)
    child.kill(signal.SIGKILL)
    child.wait()
    assert (tmp_path / "run" / LOCK).exists()
    assert run_micro(tmp_path, resume="auto").steps == 6
    assert not (tmp_path / "run" / LOCK).exists()


# -- row 17: no memory ---------------------------------------------------------------------------------------


def limit_memory_at(step: int, room: int) -> None:
    """Sets what `ulimit -v` sets, a little above what this process has, before a step that takes more."""
    original = Learner._backward

    def greedy(self: Learner, *batch: Any) -> float:
        import torch

        if self.step == step:
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            limit = pages * resource.getpagesize() + room
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
            self.activations = torch.empty(4 * room, dtype=torch.uint8)  # type: ignore[attr-defined]
        return original(self, *batch)

    Learner._backward = greedy  # type: ignore[method-assign]


def without_explanation() -> None:
    import contextlib

    import dqt.train.loop as loop

    loop.explain_out_of_memory = lambda needs: contextlib.nullcontext()


def explaining(patch: pytest.MonkeyPatch) -> None:
    """Only for its name: the child process is changed, see `without_explanation`."""


@pytest.mark.row(17, explaining)
def test_an_allocation_that_fails(tmp_path: Path, nursery: Nursery, mutation: Any) -> None:
    first = [(named(limit_memory_at), [4, 64 << 20])]
    if mutation:
        first.append((named(without_explanation), []))
    env = {"DQT_CACHE": str(tmp_path / "cache")}
    status, output = nursery.run(arguments(tmp_path / "run"), *first, env=env)
    assert status == 2, output
    assert "Traceback" not in output
    assert re.search(r"dqt: error: out of memory: this run needs about \d+ MB; .* train\.", output), output
    (newest,) = list_checkpoints(tmp_path / "run" / "checkpoints")
    assert read_state(newest)["step"] == 3
    status, output = nursery.run(arguments(tmp_path / "run", "--resume", "auto"), env=env)
    assert status == 0, output


# -- row 18: odd surroundings --------------------------------------------------------------------------------


def utf_8_everywhere() -> None:
    """Text files are written in the locale's encoding, as Python does unless told otherwise."""
    write = Path.write_text

    def in_ascii(self: Path, text: str, encoding: str | None = None, **options: Any) -> int:
        return write(self, text, encoding="ascii", **options)

    Path.write_text = in_ascii  # type: ignore[method-assign,assignment]


def naming_the_encoding(patch: pytest.MonkeyPatch) -> None:
    """Only for its name: the child process is changed, see `utf_8_everywhere`."""


@pytest.mark.row(18, naming_the_encoding)
def test_non_ascii_paths_odd_locale_and_no_home(tmp_path: Path, nursery: Nursery, mutation: Any) -> None:
    folder = tmp_path / "größe 模型 ü"
    folder.mkdir()
    text = folder / "текст.txt"
    text.write_text("Ein Text über Größe, 模型 и слова.\n" * 400, encoding="utf-8")
    env = {
        "HOME": "/dev/null",
        "XDG_CACHE_HOME": "",
        "DQT_CACHE": "",
        "TMPDIR": str(tmp_path),
        "LC_ALL": "C",
        "LANG": "C",
        "PYTHONUTF8": "0",
        "PYTHONIOENCODING": "ascii:replace",
    }
    first = [(named(utf_8_everywhere), [])] if mutation else []
    out = folder / "lauf"
    status, output = nursery.run(arguments(out, data__text=[str(text)]), *first, env=env)
    assert status == 0, output
    for command in (["eval", str(out)], ["sample", str(out), "--tokens", "3"], ["inspect", str(out)]):
        status, output = nursery.run(command, env=env)
        assert status == 0, output
    assert json.loads((out / "run.json").read_text(encoding="utf-8"))["state"] == "finished"
    again = arguments(out, "--resume", "auto", data__text=[str(text)], train__steps=8)
    status, output = nursery.run(again, env=env)
    assert status == 0, output
