"""A run's directory: what lies in it, and whether a new run may use it.

    config.toml     the effective config        metrics.jsonl   a line per report, as it happens
    run.json        state and summary           checkpoints/    to go on from
    model/          the finished model          report.html, plots/

`run.json` says "running", "interrupted", "failed" or "finished"; a killed run still says "running". While a
process is at work here, `.lock` names it.
Everything is refused before the first step and before anything is written, and overwriting removes only what
a run wrote.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import socket
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dqt.errors import ConfigError, ModelError
from dqt.train import storage
from dqt.train.config import Config

RUNS = "runs"
LOCK = ".lock"
RUNNING, INTERRUPTED, FAILED, FINISHED = "running", "interrupted", "failed", "finished"


@dataclass(frozen=True)
class RunDirectory:
    """The paths in a run's directory."""

    path: Path

    @property
    def config(self) -> Path:
        """The effective config."""
        return self.path / "config.toml"

    @property
    def metrics(self) -> Path:
        """A JSON object a line."""
        return self.path / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        """Holds `step-000123` and so on."""
        return self.path / "checkpoints"

    @property
    def model(self) -> Path:
        """The finished model's directory."""
        return self.path / "model"

    @property
    def record(self) -> Path:
        """State and summary."""
        return self.path / "run.json"

    def read_record(self) -> dict[str, Any]:
        """The content of `run.json`; empty if there is none.

        Raises:
            ModelError: It is damaged, or of a newer format.
        """
        if not self.record.is_file():
            return {}
        content = storage.load_json(self.record)
        storage.check_version(self.record, content)
        return content

    def write_record(self, state: str, summary: Mapping[str, Any], **facts: Any) -> None:
        """Replaces `run.json`."""
        content = {
            "format_version": storage.FORMAT_VERSION,
            "state": state,
            **facts,
            "summary": dict(summary),
        }
        storage.write_text(self.record, storage.to_json(content))

    def require_usable(self, resume: bool, overwrite: bool) -> None:
        """Checks, without writing anything, that a run may begin (or go on) here.

        Raises:
            ConfigError: It is a file, can't be written, holds something else, or a run that would be lost.
        """
        existing = next(
            each for each in (self.path.absolute(), *self.path.absolute().parents) if each.exists()
        )
        if not existing.is_dir():
            raise ConfigError(f"{existing} is a file, not a directory: choose another --out")
        if not os.access(existing, os.W_OK | os.X_OK):
            raise ConfigError(f"{existing} can't be written: choose another --out, or change its permissions")
        if not self.path.is_dir() or not {path.name for path in self.path.iterdir()} - {LOCK}:
            return
        if not self.record.is_file():
            raise ConfigError(f"{self.path} holds other files and no run: choose another --out")
        if resume or overwrite:
            return
        state = self.read_record().get("state")
        if state == FINISHED:
            raise ConfigError(
                f"{self.path} holds a finished run: choose another --out, or replace it by --overwrite"
            )
        raise ConfigError(
            f"{self.path} holds a run that is {state}: "
            "go on with --resume auto, or start anew with --overwrite"
        )

    def clear(self) -> None:
        """Removes what a run wrote, and nothing else."""
        for name in ("checkpoints", "model", "plots"):
            shutil.rmtree(self.path / name, ignore_errors=True)
        for name in ("metrics.jsonl", "run.json", "config.toml", "report.html"):
            (self.path / name).unlink(missing_ok=True)

    def create(self) -> None:
        """Makes the directory.

        Raises:
            ModelError: The system refuses.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ModelError(f"{self.path} can't be made: {error.strerror}; choose another --out") from error

    @contextlib.contextmanager
    def claimed(self) -> Iterator[None]:
        """Holds the directory against other runs, and makes it; it goes again if nothing was written.

        The lock is the system's, on a file that says whose it is: it ends with the process, however that
        ends. On a file system without locks nothing is held.

        Raises:
            ConfigError: Another run holds it.
            ModelError: It can't be made.
        """
        made = [each for each in (self.path, *self.path.parents) if not each.exists()]
        self.create()
        lock = self.path / LOCK
        descriptor = _lock(lock)
        try:
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, _who().encode(), 0)
            yield
        finally:
            lock.unlink(missing_ok=True)
            os.close(descriptor)
            with contextlib.suppress(OSError):
                for each in made:
                    each.rmdir()


def _who() -> str:
    return f"process {os.getpid()} on {socket.gethostname()}, started {time.strftime('%Y-%m-%d %H:%M:%S')}"


def _lock(path: Path) -> int:
    """An open file that this process alone has locked."""
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise ConfigError(
                f"{path.parent} can't be written: {error.strerror}; choose another --out"
            ) from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(descriptor, 300, 0).decode(errors="replace").strip() or "another process"
            os.close(descriptor)
            raise ConfigError(
                f"{path.parent} is in use by {holder}: wait for it, stop it, or choose another --out"
            ) from None
        except OSError:
            return descriptor
        with contextlib.suppress(OSError):
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                return descriptor
        os.close(descriptor)  # its holder has removed it in the meantime


def run_name(config: Config) -> str:
    """A short name for what a resolved config trains: "tiny-ternary-residual"."""
    model = config.model
    other = model.arch if model.start_from is None and model.arch != "llama" else None
    parts = [model.name, *([other] if other else [])]
    parts += [config.quant.bits] if config.quant.bits else []
    return "-".join([*parts, str(config.quant.method)])


def default_directory(config: Config, resume: bool) -> Path:
    """`runs/NAME`, or `runs/NAME-2` and so on where it is taken; to resume, the newest if not finished."""
    base = Path(RUNS) / run_name(config)
    newest, candidate, number = None, base, 1
    while candidate.exists():
        number += 1
        newest, candidate = candidate, base.with_name(f"{base.name}-{number}")
    if resume and newest and RunDirectory(newest).read_record().get("state") != FINISHED:
        return newest
    return candidate
