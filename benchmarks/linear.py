"""Time of a quantized linear layer beside `nn.Linear` in FP32: three products and all that goes with them.

    python benchmarks/linear.py

A turn is forward and backward of a layer [width, width] on 1,024 tokens, with gradients of weight and input:
for ours unpacking, quantizing, integer products and scaling. The last column says where our time goes, kernel
by kernel; what none of them takes ("rest") is Python, dispatch, and torch's own operations.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import dqt
import timing
from dqt.ops import cpu

TOKENS = 1024
BITS: dict[str, str | None] = {
    "FP32": None,
    "ternary": "ternary",
    "2 bits": "2",
    "4 bits": "4",
    "8 bits": "8",
}
TURN_SECONDS = 0.05


class Clock:
    """The kernel library and `torch._int_mm` with a stopwatch on every call."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._library = cpu.library()

    def __enter__(self) -> Clock:
        self._saved = cpu.library, torch._int_mm
        cpu.library = lambda: None if self._library is None else self
        torch._int_mm = self._timed("int_mm", torch._int_mm)
        return self

    def __exit__(self, *_: Any) -> None:
        cpu.library, torch._int_mm = self._saved

    def __getattr__(self, name: str) -> Callable[..., Any]:
        function = self._timed(name.removeprefix("dqt_"), getattr(self._library, name))
        setattr(self, name, function)
        return function

    def _timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds[name] += time.perf_counter() - started

        return call


def setup(name: str, width: int) -> tuple[Callable[[], float], dict[str, Any]]:
    """A turn of one layer, and {"seconds": {kernel: a call of the layer}} for ours."""
    torch.manual_seed(0)
    layer = nn.Linear(width, width, bias=False)
    if (bits := BITS[name]) is not None:
        dqt.quantize_(nn.Sequential(layer), bits)
    x = torch.randn(TOKENS, width, requires_grad=True)
    dy = torch.randn(TOKENS, width)

    def once() -> None:
        layer.weight.grad = x.grad = None
        layer(x).backward(dy)

    def seconds(repeat: int) -> float:
        started = time.perf_counter()
        for _ in range(repeat):
            once()
        return (time.perf_counter() - started) / repeat

    seconds(5)
    repeat = max(1, round(TURN_SECONDS / seconds(5)))

    def turn() -> float:
        once()  # the arms share the caches
        return seconds(repeat)

    return turn, {"breakdown": breakdown(seconds) if bits else {}}


def breakdown(seconds: Callable[[int], float], repeat: int = 20) -> dict[str, float]:
    """Seconds of each kernel in a layer's forward and backward, and of the rest."""
    with Clock() as clock:
        total = seconds(repeat)
    parts = {name: spent / repeat for name, spent in clock.seconds.items()}
    return dict(sorted(parts.items(), key=lambda part: -part[1])) | {"rest": total - sum(parts.values())}


def main() -> None:
    """Times the layers and prints both tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--widths", type=int, nargs="+", default=[512, 2048])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--bits", nargs="+", choices=tuple(BITS)[1:], default=list(BITS)[1:], metavar="BITS")
    parser.add_argument("--rounds", type=int, default=30)
    arguments = parser.parse_args()
    print(timing.machine())
    print(f"\n| {TOKENS} tokens | ms | against FP32 | breakdown in ms |\n|---|---|---|---|")
    for width in arguments.widths:
        for threads in arguments.threads:
            names = ["FP32", *arguments.bits]
            workers = {name: timing.Worker(setup, (name, width), threads) for name in names}
            facts = {name: worker.ready() for name, worker in workers.items()}
            seconds = timing.interleave(
                {name: worker.turn for name, worker in workers.items()}, arguments.rounds
            )
            for name, worker in workers.items():
                worker.stop()
                ratio = timing.show(timing.ratio(seconds["FP32"], seconds[name])) if name != "FP32" else ""
                parts = ", ".join(
                    f"{part} {spent * 1e3:.2f}" for part, spent in facts[name]["breakdown"].items()
                )
                title = f"width {width}, threads: {threads}, {name}"
                print(
                    f"| {title} | {statistics.median(seconds[name]) * 1e3:.2f} | {ratio} | {parts} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
