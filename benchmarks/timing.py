"""Interleaved timing: what is compared runs by turns, so that a change of the machine hits all alike.

Every arm of a table lives in a process of its own, as it would in use: no arm sees another's allocator,
compiled code or patches, and one that dies takes nothing with it. The parent lets one arm at a time do one
turn, in a new random order in each round, and compares the times of the same round: the ratio is the median
over rounds, its spread the quartiles.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

Turn = Callable[[], float]
"""Does one turn of an arm and returns its seconds."""


class Worker:
    """An arm in a process of its own.

    Args:
        setup: Called in the process with `arguments`; returns a turn, and facts about the arm.
        arguments: Must pickle.
        threads: Of torch in the process.
    """

    def __init__(
        self, setup: Callable[..., tuple[Turn, dict[str, Any]]], arguments: tuple[Any, ...], threads: int
    ):
        os.environ["OMP_NUM_THREADS"] = str(threads)  # read when the process starts
        context = get_context("spawn")
        self._here, there = context.Pipe()
        self._process = context.Process(target=_serve, args=(there, setup, arguments, threads), daemon=True)
        self._process.start()
        there.close()

    def ready(self) -> dict[str, Any]:
        """Waits for the setup; the facts, or why the arm can't run as {"error": ...}."""
        return self._receive()

    def turn(self) -> float:
        """One turn, in seconds."""
        self._here.send("turn")
        answer = self._receive()
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return float(answer["seconds"])

    def stop(self) -> None:
        """Ends the process."""
        self._process.terminate()
        self._process.join()

    def _receive(self) -> dict[str, Any]:
        try:
            answer: dict[str, Any] = self._here.recv()
        except EOFError:
            self._process.join()
            return {"error": f"the process ended with status {self._process.exitcode}"}
        return answer


def _serve(pipe: Connection, setup: Callable[..., Any], arguments: tuple[Any, ...], threads: int) -> None:
    import torch

    torch.set_num_threads(threads)
    try:
        turn, facts = setup(*arguments)
        pipe.send(facts)
        while pipe.recv() == "turn":
            pipe.send({"seconds": turn()})
    except (EOFError, KeyboardInterrupt):
        return
    except Exception as error:  # the table says why
        message = " ".join(str(error).split())
        pipe.send({"error": f"{type(error).__name__}: {message[:300]}"})


def run(
    setup: Callable[..., tuple[Turn, dict[str, Any]]],
    arguments: Mapping[str, tuple[Any, ...]],
    threads: int,
    rounds: int,
) -> tuple[dict[str, dict[str, Any]], dict[str, list[float]]]:
    """Facts of every arm by name, and seconds of those that can run; `arguments` are what `setup` takes."""
    workers = {name: Worker(setup, each, threads) for name, each in arguments.items()}
    facts = {name: worker.ready() for name, worker in workers.items()}
    able = {name: worker.turn for name, worker in workers.items() if "error" not in facts[name]}
    seconds = interleave(able, rounds)
    for worker in workers.values():
        worker.stop()
    return facts, seconds


def interleave(turns: Mapping[str, Turn], rounds: int) -> dict[str, list[float]]:
    """Seconds of each arm in each round; those of the first, up to twice as slow, are dropped."""
    order, shuffle = list(turns), random.Random(0).shuffle
    seconds: dict[str, list[float]] = {name: [] for name in turns}
    for number in range(rounds + 1):
        shuffle(order)
        for name in order:
            took = turns[name]()
            if number:
                seconds[name].append(took)
    return seconds


def ratio(numerator: Sequence[float], denominator: Sequence[float]) -> tuple[float, float, float]:
    """Median and quartiles of the rounds' ratios."""
    ratios = [a / b for a, b in zip(numerator, denominator, strict=True)]
    if len(ratios) < 2:
        return (ratios[0],) * 3
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return middle, low, high


def show(quartiles: tuple[float, float, float]) -> str:
    """A ratio and its spread, as tables have them."""
    middle, low, high = quartiles
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


def machine() -> dict[str, Any]:
    """What a number depends on besides the code."""
    from dqt.ops.cpu import active_isa

    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [
            line.partition(":")[2].strip() for line in info.read_text().splitlines() if "model name" in line
        ]
        cpu = names[0] if names else cpu
    versions = {}
    for package in ("torch", "transformers", "torchao"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "date": datetime.date.today().isoformat(),
        "cpu": cpu,
        "cores": os.cpu_count(),
        "kernels": active_isa(),
        "python": platform.python_version(),
        **versions,
    }


def save(path: Path | None, records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Adds records to a JSON file, so that a table can grow over several runs; returns all it holds."""
    if path is None:
        return records
    held = json.loads(path.read_text()) if path.is_file() else []
    path.write_text(json.dumps(held + records, indent=1) + "\n")
    return held + records
