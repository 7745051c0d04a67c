"""One optimizer step, write-back and packing included, beside torch's fused FP32 AdamW.

    python benchmarks/optimizer.py               about a minute; --threads 1 2 --rounds 9 --arms ...

All optimizers step in turn, in one process, on the same 8 layers of 512 x 2048. Medians; ratios within a
round with their quartiles. Telemetry is off. Gradients are the same normal numbers in every step: what a step
computes does not depend on them.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

import arms
import dqt
import timing
from dqt.optim import SGD, Adafactor, AdamW

LAYERS, ROWS, COLUMNS = 8, 512, 2048
BASE = "FP32, torch.optim.AdamW(fused)"

Make = Callable[[nn.Module], torch.optim.Optimizer]


def adamw(**settings: object) -> Make:
    """Our AdamW with some settings."""
    return lambda model: AdamW(model.named_parameters(), lr=1e-4, **settings)  # type: ignore[arg-type]


def torchao_8bit(model: nn.Module) -> torch.optim.Optimizer:
    """torchao's AdamW with 8-bit state, over float weights."""
    from torchao.optim import AdamW8bit

    return AdamW8bit(model.parameters(), lr=1e-4)  # type: ignore[no-any-return]


# name: (bits of the weights, None for float; the optimizer)
ARMS: dict[str, tuple[str | None, Make]] = {
    BASE: (None, lambda model: torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)),
    "FP32, torch.optim.AdamW(foreach)": (
        None,
        lambda model: torch.optim.AdamW(model.parameters(), lr=1e-4, foreach=True),
    ),
    "FP32 weights, our AdamW": (None, adamw()),
    "ternary + 8 bits, factored": (
        "ternary",
        adamw(betas=(0.0, 0.95), residual_bits=8, second_moment="factored"),
    ),
    "4 bits + 8 bits, factored": ("4", adamw(betas=(0.0, 0.95), residual_bits=8, second_moment="factored")),
    "8 bits strict, FP32 moments": ("8", adamw(residual_bits=0)),
    "8 bits strict": ("8", adamw(residual_bits=0, first_moment="int8", second_moment="factored")),
    "8 bits strict, int8 moments": ("8", adamw(residual_bits=0, first_moment="int8", second_moment="int8")),
    "ternary + 8 bits, SGD": ("ternary", lambda model: SGD(model.named_parameters(), lr=1e-4)),
    "ternary + 8 bits, Adafactor": ("ternary", lambda model: Adafactor(model.named_parameters())),
    "the paper's way: float container, copy, SR in eager": (
        None,
        lambda model: arms.PaperOptimizer(model.parameters(), lr=1e-4),
    ),
    "torchao AdamW8bit, eager": (None, torchao_8bit),
}


def optimizer(bits: str | None, make: Make) -> torch.optim.Optimizer:
    """An optimizer over fresh weights that have gradients."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(COLUMNS, ROWS, bias=False) for _ in range(LAYERS)))
    if bits is not None:
        dqt.quantize_(model, bits)
    made = make(model)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape) * 1e-2
    if hasattr(made, "collect_telemetry"):
        made.collect_telemetry = False
    return made


def seconds_of(step: Callable[[], object]) -> float:
    """How long one step takes."""
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def main() -> None:
    """Times all arms and prints a table for each number of threads."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS), metavar="ARM")
    arguments = parser.parse_args()
    steps: dict[str, Callable[..., object]] = {}
    for name in dict.fromkeys((BASE, *arguments.arms)):
        try:
            steps[name] = optimizer(*ARMS[name]).step
            steps[name]()
        except ImportError as error:
            print(f"{name}: not run, {error}")
            steps.pop(name, None)
    weights = LAYERS * ROWS * COLUMNS
    print(timing.machine())
    for threads in arguments.threads:
        torch.set_num_threads(threads)
        turns = {name: functools.partial(seconds_of, step) for name, step in steps.items()}
        seconds = timing.interleave(turns, arguments.rounds)
        print(f"\n| step, {threads} threads | ns a weight | time against torch's fused |\n|---|---|---|")
        for name, times in seconds.items():
            quartiles = timing.ratio(times, seconds[BASE])
            nanoseconds = statistics.median(times) / weights * 1e9
            print(f"| {name} | {nanoseconds:.2f} | {timing.show(quartiles)} |")


if __name__ == "__main__":
    main()
