"""Time of a quantized linear layer beside `nn.Linear` in FP32: three products and all that goes with them.

    python benchmarks/linear.py

A turn is forward and backward of a layer [width, width] on 1,024 tokens, with gradients of weight and input:
for ours unpacking, quantizing, integer products and scaling. The last column says where our time goes, by
operation, from torch's profiler; the rest is Python, dispatch, autograd, and torch's own operations.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

import dqt
import timing

TOKENS = 1024
BITS: dict[str, str | None] = {
    "FP32": None,
    "ternary": "ternary",
    "2 bits": "2",
    "4 bits": "4",
    "8 bits": "8",
}
TURN_WIDTHS = 4096  # a turn is 8 layers of width 512, or 2 of 2048


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

    def turn() -> float:
        once()  # the arms share the caches
        return seconds(max(1, TURN_WIDTHS // width))

    turn()

    return turn, {"breakdown": breakdown(seconds) if bits else {}}


def breakdown(seconds: Callable[[int], float], repeat: int = 20) -> dict[str, float]:
    """Seconds of each of our operations and of the integer products in a layer, and of the rest."""
    total = seconds(repeat)
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        seconds(repeat)
    parts = {
        event.key.partition("::")[2]: event.self_cpu_time_total / 1e6 / repeat
        for event in profiled.key_averages()
        if event.key.startswith("dqt::") or event.key == "aten::_int_mm"
    }
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
            names = {name: (name, width) for name in ("FP32", *arguments.bits)}
            facts, seconds = timing.run(setup, names, threads, arguments.rounds)
            for name in names:
                print(
                    f"| width {width}, threads: {threads}, {name} {row(name, facts[name], seconds)}",
                    flush=True,
                )


def row(name: str, facts: dict[str, Any], seconds: dict[str, list[float]]) -> str:
    """The cells of a layer."""
    if "error" in facts:
        return f"| {facts['error']} | | |"
    speed = timing.show(timing.ratio(seconds["FP32"], seconds[name])) if name != "FP32" else ""
    parts = ", ".join(f"{part} {spent * 1e3:.2f}" for part, spent in facts["breakdown"].items())
    return f"| {statistics.median(seconds[name]) * 1e3:.2f} | {speed} | {parts} |"


if __name__ == "__main__":
    main()
