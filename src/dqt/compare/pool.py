"""Runs many trainings, as many at a time as there are cores, and says how it goes.

One thread a run: with several, small models lose most of the time to synchronization, and results would
depend on how many there are. What is finished is not run again, what was interrupted goes on from its
checkpoint, so the same command goes on wherever the last one stopped.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from multiprocessing.connection import wait
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

from dqt.choices import FLOAT_RESIDUAL, KERNEL_ROUNDINGS
from dqt.compare.runs import DIVERGED, FAILED, MISSING, Outcome, Run, read_outcome
from dqt.data.prepare import default_cache_dir
from dqt.footprint import Needs
from dqt.train.config import Config, required
from dqt.train.metrics import Console, format_duration

PRELOADED = [
    "dqt.compare.child",
    "transformers.models.llama.modeling_llama",
    "transformers.models.bitnet.modeling_bitnet",
]

SECONDS_A_PRODUCT = 0.85e-10
"""Of a training step, for each token and weight: `micro`, strict or residual, on one of two busy cores of the
EPYC of docs/results.md, 66 s for 1.5M tokens. A guess for other sizes and machines, corrected as runs end."""

FLOAT_FACTOR = 1.5
"""How many times that time floats and the paper's recipe took: FP32 1.4, BitNet 1.5, `paper` 1.5 to 1.9."""

REFERENCE_FACTOR = 1.5
"""The same for updates that have no kernel (ECO 1.5, a float residual 1.4), and for BF16 (1.4)."""

FP8_FACTOR = 3.0
"""The same for emulated FP8 (`paper` 3.0 on top of its 1.5, strict 3.7)."""

SECONDS_A_RUN = 2.0
"""Before and after the steps: building, evaluating, saving."""


@dataclass
class _Running:
    run: Run
    process: Any
    log: Path
    started: float


class Pool:
    """Runs trainings in processes of their own.

    Args:
        folder: Where runs and logs lie.
        jobs: How many at a time.
        console: Where to tell how it goes.
        live: Whether it can rewrite a line; if not, every finished run is a line, and nothing else.
    """

    def __init__(self, folder: Path, jobs: int, console: Console, live: bool = False) -> None:
        self.folder, self.jobs, self.console, self.live = folder, jobs, console, live
        self.outcomes: dict[Path, Outcome] = {}
        self._running: list[_Running] = []
        self._context: BaseContext | None = None
        self._expected, self._took = 0.0, 0.0

    def run(self, runs: Iterable[Run], titles: Mapping[Path, str], *, later: float = 0.0) -> None:
        """Runs what has not come to an end yet; `outcomes` has all of them afterwards.

        Args:
            runs: What to run, in this order.
            titles: What to call each, by directory.
            later: Expected seconds of all that will come after these.

        Raises:
            KeyboardInterrupt: After every run in progress has written a checkpoint.
        """
        waiting = []
        for path, run in {run.directory.path: run for run in runs}.items():
            if path not in self.outcomes:
                outcome = read_outcome(run)
                if outcome.settled:
                    self.outcomes[path] = outcome
                else:
                    waiting.append(run)
        total, done = len(waiting), 0
        try:
            while waiting or self._running:
                while waiting and len(self._running) < self.jobs:
                    self._start(waiting.pop(0))
                for finished in self._finished():
                    done += 1
                    path = finished.run.directory.path
                    self.console.say(
                        f"[{done}/{total}] {titles[path]}: {self._told(finished)}"
                        f"  {self._left(waiting, later)}"
                    )
                if self.live:
                    self.console.progress(
                        f"{done}/{total} runs, {len(self._running)} running, {self._left(waiting, later)}"
                    )
        except KeyboardInterrupt:
            self._stop()
            raise

    # -- processes -------------------------------------------------------------------------------------------

    def _start(self, run: Run) -> None:
        from dqt.compare import child

        log = self.folder / "logs" / f"{run.directory.path.name}.txt"
        process = self._forkserver().Process(target=child.main, args=(run, log, default_cache_dir()))  # type: ignore[attr-defined]
        process.start()
        self._running.append(_Running(run, process, log, time.monotonic()))

    def _forkserver(self) -> BaseContext:
        if self._context is None:
            methods = multiprocessing.get_all_start_methods()
            self._context = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
            self._context.set_forkserver_preload(PRELOADED)
        return self._context

    def _finished(self) -> list[_Running]:
        """Waits up to a second; the runs whose process has ended."""
        ready = wait([running.process.sentinel for running in self._running], timeout=1.0)
        ended = [running for running in self._running if running.process.sentinel in ready]
        for running in ended:
            self._running.remove(running)
            running.process.join()
            outcome = read_outcome(running.run)
            if not outcome.settled:
                outcome = Outcome(FAILED, outcome.step, _reason(running))
            elif outcome.state != DIVERGED:
                self._expected += expected_seconds(running.run.config)
                self._took += time.monotonic() - running.started
            self.outcomes[running.run.directory.path] = outcome
        return ended

    def _stop(self) -> None:
        """Lets every run write a checkpoint; a second Ctrl-C ends them at once."""
        self.console.say(f"stopping {len(self._running)} runs; the same command goes on with them")
        for running in self._running:
            running.process.terminate()
        try:
            for running in self._running:
                running.process.join()
        except KeyboardInterrupt:
            for running in self._running:
                running.process.kill()
            raise

    # -- what is told ----------------------------------------------------------------------------------------

    def _told(self, running: _Running) -> str:
        outcome = self.outcomes[running.run.directory.path]
        seconds = format_duration(time.monotonic() - running.started)
        return f"{describe(outcome)} ({seconds})"

    def _left(self, waiting: Iterable[Run], later: float) -> str:
        """What is left of the time, by what earlier runs took."""
        speed = self._took / self._expected if self._expected else 1.0
        work = later + sum(expected_seconds(run.config) for run in waiting)
        for running in self._running:
            passed = (time.monotonic() - running.started) / speed
            work += max(0.0, expected_seconds(running.run.config) - passed)
        return f"{format_duration(work * speed / self.jobs)} left"


def describe(outcome: Outcome) -> str:
    """What came of a run, in words."""
    if outcome.state == MISSING:
        return "not run"
    if outcome.state == DIVERGED:
        return f"diverged at step {outcome.step}"
    if outcome.state == FAILED:
        return f"failed: {outcome.error}"
    return f"{outcome.loss:.4f}"


def expected_seconds(config: Config) -> float:
    """About how long a run takes on one core of the machine of docs/results.md."""
    train = config.train
    batch = required(train.batch_size) * required(train.seq_len) * required(train.accumulation)
    needs = Needs(config)
    products = needs.head.count + sum(weight.count for weight in needs.weights if weight.kind == "linear")
    recipe = needs.recipe
    reference = (
        recipe.rounding not in KERNEL_ROUNDINGS
        or recipe.residual_bits == FLOAT_RESIDUAL
        or recipe.drop_smallest
        or recipe.error_feedback != "none"
        or recipe.environment == "bf16"
    )
    factor = FLOAT_FACTOR if recipe.method not in ("strict", "residual") else 1.0
    if recipe.environment == "fp8":
        factor *= FP8_FACTOR
    elif reference:
        factor *= REFERENCE_FACTOR
    return SECONDS_A_RUN + factor * SECONDS_A_PRODUCT * required(train.steps) * batch * products


def _reason(running: _Running) -> str:
    """Why a process ended without a result."""
    status = running.process.exitcode
    if status < 0:
        return f"killed by signal {-status}{' (out of memory?)' if status == -9 else ''}"
    if status == 0:
        return "its directory holds another config or text than it was given: has the code changed meanwhile?"
    lines = running.log.read_text(errors="replace").strip().splitlines() if running.log.is_file() else []
    return lines[-1].removeprefix("dqt: error: ") if lines else f"exit status {status}"
