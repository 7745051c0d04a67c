"""Real `dqt` processes in 0.05 s: children of one process that has imported everything and computed nothing.

The child is a process of its own from the fork on, with its own signals, limits and files; it runs the
command line, can be killed with SIGKILL like any other, and leaves no trace in its parent. The parent takes
no training step itself, because autograd does not survive a fork.

A child may first call functions by name ("module:function"), which change it: limits, mutations, a signal
to itself at a certain place.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any


class Child:
    """A process that the nursery started."""

    def __init__(self, nursery: Nursery, pid: int, output: Path) -> None:
        self.pid, self._nursery, self._output = pid, nursery, output

    def kill(self, number: int) -> None:
        """Sends a signal."""
        os.kill(self.pid, number)

    def wait(self) -> int:
        """The exit status, negative for the signal that killed it."""
        return self._nursery.ask({"wait": self.pid})

    @property
    def output(self) -> str:
        """What it has printed so far, errors too."""
        return self._output.read_text(errors="replace")


class Nursery:
    """The parent, seen from the tests."""

    def __init__(self, directory: Path) -> None:
        self._directory, self._count = directory, 0

    def __enter__(self) -> Nursery:
        path = os.pathsep.join((str(Path(__file__).parent), str(Path(__file__).parent.parent)))
        environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def ask(self, request: dict[str, Any]) -> int:
        """The answer of the parent, a number."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def start(
        self,
        argv: list[str],
        first: Sequence[tuple[str, list[Any]]] = (),
        env: dict[str, str] | None = None,
    ) -> Child:
        """Starts `dqt ARGV`.

        Args:
            argv: Of the command line; empty runs only `first`.
            first: Functions to call before, "module:function" and arguments.
            env: Changes of the environment.
        """
        self._count += 1
        output = self._directory / f"{self._count}.txt"
        output.touch()
        pid = self.ask({"argv": argv, "first": first, "env": env or {}, "output": str(output)})
        return Child(self, pid, output)

    def run(self, argv: list[str], *first: tuple[str, list[Any]], **rest: Any) -> tuple[int, str]:
        """The exit status and the output of `dqt ARGV`, after `first`."""
        child = self.start(argv, first, **rest)
        return child.wait(), child.output


def named(function: Any) -> str:
    """The name by which a child finds a function."""
    return f"{function.__module__}:{function.__qualname__}"


def _serve() -> None:
    import pytest  # noqa: F401
    import torch
    import transformers.models.bitnet.modeling_bitnet
    import transformers.models.llama.modeling_llama  # noqa: F401

    import dqt.inspection
    import dqt.report
    import dqt.train.loop

    dqt.report.write_report = Path  # 3 s of plots at the end of every run, tested elsewhere
    torch.set_num_threads(1)
    alive: set[int] = set()
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            _, status = os.waitpid(request["wait"], 0)
            alive.remove(request["wait"])
            answer = os.waitstatus_to_exitcode(status)
        else:
            answer = os.fork()
            if not answer:
                _become(**request)
            alive.add(answer)
        print(answer, flush=True)
    for child in alive:  # of tests that failed
        os.kill(child, signal.SIGKILL)


def _become(argv: list[str], first: list[tuple[str, list[Any]]], env: dict[str, str], output: str) -> None:
    status = 1
    try:
        target = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for descriptor, source in ((0, os.open(os.devnull, os.O_RDONLY)), (1, target), (2, target)):
            os.dup2(source, descriptor)
        os.environ.update(env)
        for name, arguments in first:
            module, _, function = name.partition(":")
            getattr(importlib.import_module(module), function)(*arguments)
        from dqt.cli import main

        status = main(argv) if argv else 0
    except SystemExit as error:
        status = int(error.code or 0)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def wait_until(condition: Any, seconds: float = 120.0) -> None:
    """Waits for something that another process does."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


if __name__ == "__main__":
    _serve()
