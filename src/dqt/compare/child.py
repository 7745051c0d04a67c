"""A run in a process of its own: what `dqt train` does, without its report.

A process a run, because one that dies (of memory, of a bug) must take no other with it, and because threads,
workspaces and autocast are settings of a process. It is forked from a server that has imported torch
already: 0.04 s instead of 5 s. It leads a process group of its own, so that Ctrl-C reaches the command alone,
which then stops its runs in good order; and it stops by itself, with a checkpoint, when the command is gone.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import sys
import threading
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from dqt.compare.runs import LEDGER, Run, holds
from dqt.errors import ConfigError, DivergedError, DqtError, ModelError
from dqt.train import storage
from dqt.train.loop import TrainResult, train
from dqt.train.rundir import FINISHED

ERROR, INTERRUPTED = 2, 130


def main(run: Run, log: Path, cache_dir: Path) -> None:
    """Trains; the exit status is 0 for a run that has come to an end, by divergence too."""
    _own_output(log)
    os.setpgrp()
    threading.Thread(target=_stop_when_orphaned, daemon=True).start()
    directory = run.directory
    ledger = directory.path / LEDGER
    try:
        ledger.unlink(missing_ok=True)
        result = _train(run, cache_dir)
    except DivergedError as error:
        step = directory.read_record().get("summary", {}).get("step", 0) + 1
        storage.write_text(
            ledger, storage.to_json({"data": run.data_hash, "step": step, "error": str(error)})
        )
        print(error)
    except DqtError as error:
        print(f"dqt: error: {str(error).replace(chr(10), ' ')}")  # a line, which is what the table shows
        sys.exit(ERROR)
    else:
        if result.state != FINISHED:
            sys.exit(INTERRUPTED)
    shutil.rmtree(directory.checkpoints, ignore_errors=True)  # of no use any more, and most of the space


def _train(run: Run, cache_dir: Path) -> TrainResult:
    """Goes on from a checkpoint if there is one of this run, else from the start."""
    if holds(run):
        try:
            return train(run.config, resume="auto", cache_dir=cache_dir, stream=sys.stdout)
        except (ConfigError, ModelError) as error:
            print(f"starts anew: {error}")
    return train(run.config, overwrite=True, cache_dir=cache_dir, stream=sys.stdout)


def _own_output(log: Path) -> None:
    log.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    os.close(descriptor)


def _stop_when_orphaned() -> None:
    parent: Any = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os.kill(os.getpid(), signal.SIGTERM)
