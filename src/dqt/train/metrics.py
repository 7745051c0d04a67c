"""What a run tells while it goes: `metrics.jsonl` for programs, one live line for people.

Every line goes to the system as it is written, so that a killed run keeps all its reports; there is no fsync,
which would cost milliseconds a step and only help when the machine dies.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

import torch
from torch import nn

from dqt.errors import WriteError
from dqt.sizes import format_bytes
from dqt.tensor import QuantizedTensor
from dqt.train.storage import write_text

QUIET_SECONDS = 10.0
"""Seconds between lines where the output is no terminal."""


class MetricsLog:
    """Appends JSON objects to a file, a line each, floats that are not finite as null."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor = self._open()

    def write(self, line: Mapping[str, Any]) -> None:
        """Appends one object.

        Raises:
            WriteError: If there is no room for it; the file is as it was.
        """
        raw = (json.dumps({key: finite(value) for key, value in line.items()}) + "\n").encode()
        size = os.fstat(self._descriptor).st_size
        try:
            while raw:
                raw = raw[os.write(self._descriptor, raw) :]
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(self._descriptor, size)  # half a line would spoil the next one
            raise WriteError(f"{self._path} can't be written: {error.strerror}; free some space") from error

    def keep_until(self, step: int) -> None:
        """Drops the lines of later steps, which a run that goes on from `step` will write again."""
        kept = []
        for line in self._path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line + "\n")
            except (ValueError, KeyError, TypeError):
                break  # a line that a killed process did not finish
        write_text(self._path, "".join(kept))
        os.close(self._descriptor)
        self._descriptor = self._open()

    def _open(self) -> int:
        try:
            return os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        except OSError as error:
            raise WriteError(f"{self._path} can't be written: {error.strerror}") from error

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        os.close(self._descriptor)


def finite(value: Any) -> Any:
    """The value, or None in place of NaN and Inf, which JSON has not."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Console:
    """Lines of text, and one that is rewritten in place on a terminal.

    Args:
        stream: Where to write; None is silent.
    """

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream
        self._live = stream is not None and stream.isatty()
        self._width = 0
        self._last = -math.inf

    def say(self, text: str) -> None:
        """Writes a line that stays."""
        if self._stream is not None:
            self._clear()
            print(text, file=self._stream, flush=True)

    def progress(self, text: str, last: bool = False) -> None:
        """Rewrites the live line; where there is no terminal, a line every few seconds, and the last one."""
        if self._stream is None:
            return
        if self._live:
            self._clear()
            self._stream.write(text)
            self._stream.flush()
            self._width = len(text)
            if last:
                self.say(text)
        elif last or time.monotonic() - self._last >= QUIET_SECONDS:
            self._last = time.monotonic()
            self.say(text)

    def _clear(self) -> None:
        if self._stream is not None and self._width:
            self._stream.write("\r" + " " * self._width + "\r")
            self._width = 0


def progress_text(line: Mapping[str, Any], steps: int, seconds_left: float) -> str:
    """The live line of a training report."""
    parts = [
        f"step {line['step']:>{len(str(steps))}}/{steps}",
        f"loss {line['loss']:.3f}",
        f"lr {line['lr']:.2e}",
        f"{line['tokens_per_second']:,.0f} tokens/s",
        format_bytes(line["memory_bytes"]),
    ]
    if line.get("flip_rate") is not None:
        parts.append(f"flips {100 * line['flip_rate']:.2f}%")
    return "  ".join([*parts, f"{format_duration(seconds_left)} left"])


def format_duration(seconds: float) -> str:
    """Hours, minutes and seconds, as in "4:05" or "2:04:05"."""
    minutes, rest = divmod(round(max(0.0, seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def code_histograms(model: nn.Module) -> dict[str, list[int]]:
    """How often each code occurs in every low-bit weight, lowest code first."""
    return {
        name: _histogram(parameter)
        for name, parameter in model.named_parameters()
        if isinstance(parameter, QuantizedTensor)
    }


def _histogram(weight: QuantizedTensor) -> list[int]:
    counts = torch.zeros(weight.format.levels, dtype=torch.int64)
    height = max(1, 2**20 // max(1, weight.shape[-1]))  # int64 copies of a million codes at a time
    for start in range(0, weight.rows, height):
        levels = (
            weight.unpack_rows(slice(start, start + height)).flatten().to(torch.int64) - weight.format.qmin
        )
        counts += torch.bincount(levels, minlength=weight.format.levels).cpu()
    return counts.tolist()
