"""Validation loss of every method and bit width, on the same text in the same order.

    python benchmarks/quality.py formats     every method and bit width once: does each one learn?
    python benchmarks/quality.py tuned       the main methods, three learning rates each: which is best?
    python benchmarks/quality.py exact       do the savings in time and memory cost loss? five paired seeds

Runs are `dqt train` processes of one thread each, as many at a time as there are cores; a finished one is not
run again, so an interrupted table goes on where it was. Nothing is fetched: the text is the standard
library's source.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w

T_QUANTILE = 2.776  # of Student's t with four degrees of freedom, for 95 % from five seeds
BITS = ("1", "ternary", "2", "3", "4", "5", "6", "7", "8")


@dataclass(frozen=True)
class Run:
    """One training run: an arm of a table at one learning rate (None: the recipe's)."""

    method: str
    bits: str | None
    lr: float | None = None
    model: tuple[tuple[str, Any], ...] = ()
    optim: tuple[tuple[str, Any], ...] = ()
    quant: tuple[tuple[str, Any], ...] = ()
    label: str | None = None
    seed: int | None = None

    @property
    def arm(self) -> str:
        """Name of the row it belongs to."""
        return " ".join(part for part in (self.method, self.bits, self.label) if part)

    @property
    def name(self) -> str:
        """Name of its directory."""
        lr, seed = f"{self.lr:g}" if self.lr else None, None if self.seed is None else f"seed{self.seed}"
        return "-".join(part.replace(" ", "-") for part in (*self.arm.split(), lr, seed) if part)

    def config(self, model: dict[str, Any], train: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
        """The config of the run, without what is not set."""
        quant = {"method": self.method} | ({"bits": self.bits} if self.bits else {}) | dict(self.quant)
        optim = dict(self.optim) | ({"lr": self.lr} if self.lr else {})
        return {
            "model": model | dict(self.model),
            "quant": quant,
            "data": data,
            "optim": optim,
            "train": train | ({} if self.seed is None else {"seed": self.seed}),
        }


# `paper` as published is made for 768 inputs and more and for 2,000 steps of warm-up. In these short runs it
# warms up for a tenth of the run; and where a model is narrow, its weights start at 1/sqrt(width) instead of
# 0.02, because otherwise a head on the grid, whose scale never grows, has logits too small to say anything
# (micro, ternary, 1.5M tokens, best of three rates: 4.90 nats at 0.02).


def formats_suite() -> tuple[list[Run], dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Every method and bit width once, at the recipe's learning rate."""
    short_warmup = (("warmup_steps", 22),)
    runs = [Run(method, bits) for method in ("strict", "residual") for bits in BITS]
    wider = (("initializer_range", 256**-0.5),)
    runs += [Run(method, None) for method in ("fp32", "bf16", "bitnet")]
    runs += [Run("paper", bits, 2e-3, wider, short_warmup) for bits in BITS[1:]]
    train = {"steps": 220, "seq_len": 128, "batch_size": 8, "eval_every": 220}
    return runs, {"preset": "tiny"}, train, {"vocab_size": 512}


def tuned_suite() -> tuple[list[Run], dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Seven arms at three learning rates each, around the best of earlier runs."""
    grids: dict[tuple[str, str | None], tuple[float, float, float]] = {
        ("fp32", None): (1.25e-3, 2.5e-3, 5e-3),
        ("bitnet", None): (1.5e-3, 3e-3, 6e-3),
        ("strict", "8"): (1.25e-3, 2.5e-3, 5e-3),
        ("strict", "4"): (2.5e-3, 5e-3, 1e-2),
        ("residual", "ternary"): (2.5e-3, 4e-3, 6e-3),
        ("paper", "ternary"): (1e-3, 3e-3, 9e-3),
        ("paper", "8"): (1e-3, 3e-3, 9e-3),
    }
    warmup = (("warmup_steps", 150),)
    wider = (("initializer_range", 128**-0.5),)
    runs = [
        Run(method, bits, lr, wider if method == "paper" else (), warmup)
        for (method, bits), rates in grids.items()
        for lr in rates
    ]
    model = {"preset": "micro"}
    train = {"steps": 1500, "batch_size": 8, "eval_every": 1500, "eval_windows": 400}
    return runs, model, train, {"vocab_size": 512}


COUNTERPARTS = {
    # what is tested: quant and optim settings without it, and the arm that has it ("" is the recipe itself)
    "float gradients": ({"grad_input": "float", "grad_weight": "float"}, {}, ""),
    "float activations": (
        {"forward": "float", "grad_input": "float", "grad_weight": "float"},
        {},
        "float gradients",
    ),
    "full second moment": ({}, {"second_moment": "full"}, ""),
}
SEEDS = range(5)


def exact_suite() -> tuple[list[Run], dict[str, Any], dict[str, Any], dict[str, Any]]:
    """`tiny`, ternary, and each of its savings taken back, on five seeds of weights, data and rounding."""
    arms = {"": ({}, {})} | {label: (quant, optim) for label, (quant, optim, _) in COUNTERPARTS.items()}
    runs = [
        Run("residual", "ternary", None, (), tuple(optim.items()), tuple(quant.items()), label or None, seed)
        for seed in SEEDS
        for label, (quant, optim) in arms.items()
    ]
    train = {"steps": 800, "eval_every": 800, "eval_windows": 400}
    return runs, {"preset": "tiny"}, train, {}


def paired_table(runs: list[Run], summaries: list[dict[str, Any]]) -> str:
    """A Markdown table of what each saving costs: mean over the seeds, and its 95 % interval."""
    loss = {
        (run.label or "", run.seed): summary["val_loss"]
        for run, summary in zip(runs, summaries, strict=True)
        if "val_loss" in summary
    }
    lines = ["| the recipe against | nats more than without the saving | each seed |", "|---|---|---|"]
    for label, (_, _, arm) in COUNTERPARTS.items():
        costs = [
            loss[arm, seed] - loss[label, seed]
            for seed in SEEDS
            if (arm, seed) in loss and (label, seed) in loss
        ]
        mean = statistics.fmean(costs) if costs else math.nan
        half = T_QUANTILE * statistics.stdev(costs) / math.sqrt(len(costs)) if len(costs) > 1 else math.nan
        title = f"{label}{', with float gradients on both sides' if arm else ''}"
        lines.append(
            f"| {title} | {mean:+.4f} ± {half:.4f} | {', '.join(f'{cost:+.4f}' for cost in costs)} |"
        )
    return "\n".join(lines)


def execute(run: Run, folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    """Runs it unless it is finished; returns the summary of its `run.json`."""
    out = folder / run.name
    record = out / "run.json"
    if not (record.is_file() and json.loads(record.read_text())["state"] == "finished"):
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / f"{run.name}.toml"
        file.write_text(tomli_w.dumps(config))
        command = [sys.executable, "-m", "dqt", "train", str(file), "--out", str(out), "--overwrite"]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            print(f"{run.name}: exit status {done.returncode}: {done.stderr.strip()[-300:]}", flush=True)
            return {"error": done.stderr.strip().splitlines()[-1] if done.stderr.strip() else "failed"}
    summary: dict[str, Any] = json.loads(record.read_text())["summary"]
    print(f"{run.name}: {summary['val_loss']:.4f} ({summary['seconds']:.0f} s)", flush=True)
    return summary


def stored_bits(out: Path) -> str:
    """Bits a linear weight takes in the finished model, as `dqt inspect` reports them."""
    command = [sys.executable, "-m", "dqt", "inspect", str(out), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    tensors = [t for t in json.loads(done.stdout)["tensors"] if t["name"].endswith("proj.weight")]
    weights, size = sum(t["weights"] for t in tensors), sum(t["bytes"] for t in tensors)
    return f"{8 * size / weights:.3f}"


def table(runs: list[Run], summaries: list[dict[str, Any]], folder: Path) -> str:
    """A Markdown table of the arms, each at its best learning rate."""
    best: dict[str, tuple[Run, dict[str, Any]]] = {}
    losses: dict[str, list[str]] = {}
    for run, summary in zip(runs, summaries, strict=True):
        loss = summary.get("val_loss")
        losses.setdefault(run.arm, []).append(
            f"{run.lr:g}: {loss:.4f}" if run.lr and loss else str(loss or "failed")
        )
        if loss is not None and (run.arm not in best or loss < best[run.arm][1]["val_loss"]):
            best[run.arm] = (run, summary)
    lines = ["| arm | val loss | below unigram | bits a weight | all losses |", "|---|---|---|---|---|"]
    for arm, (run, summary) in best.items():
        gain = summary["unigram_nats"] - summary["val_loss"]
        bits = stored_bits(folder / run.name)
        detail = ", ".join(losses[arm]) if run.lr else ""
        lines.append(f"| {arm} | {summary['val_loss']:.4f} | {gain:.2f} | {bits} | {detail} |")
    return "\n".join(lines)


def main() -> None:
    """Runs a suite and prints its table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("suite", choices=("formats", "tuned", "exact"))
    parser.add_argument("--out", type=Path, default=Path("runs/quality"))
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--steps", type=int, help="shorter runs, to see that a suite works")
    arguments = parser.parse_args()
    suites = {"formats": formats_suite, "tuned": tuned_suite, "exact": exact_suite}
    runs, model, train, data = suites[arguments.suite]()
    if arguments.steps:
        train |= {"steps": arguments.steps, "eval_every": arguments.steps}
    folder = arguments.out / arguments.suite
    train = {"threads": 1, "sample_tokens": 0, **train}
    started = time.perf_counter()
    with ThreadPoolExecutor(arguments.jobs) as pool:
        summaries = list(pool.map(lambda run: execute(run, folder, run.config(model, train, data)), runs))
    print(f"\n{len(runs)} runs, {time.perf_counter() - started:.0f} s\n")
    exact = arguments.suite == "exact"
    print(paired_table(runs, summaries) if exact else table(runs, summaries, folder))


if __name__ == "__main__":
    main()
