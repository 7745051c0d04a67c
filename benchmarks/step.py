"""Tokens a second of a whole training step, ours beside FP32 and the known low-bit trainers.

    python benchmarks/step.py                                     all arms, 8 layers of width 512
    python benchmarks/step.py --width 1024 --threads 1 --arms fp32 ternary strict8

A step is forward, backward, clip, optimizer on 2 x 512 tokens; the network is a LLaMA with 8 heads, feed-
forward 8/3 of the width rounded to 128, and a vocabulary of 4,096 tied to the head. Arms run in turn, each
in a process of its own; every round gives each arm one step, and a speed is compared within its round.
Before, each arm trains for a few steps on the batch and must lower its loss; compiling falls into these. A
row that can't run says why.

With --json FILE the times are added to what the file holds, and the table is of all of it; --rounds 0 only
prints. Each run needs `fp32` among its arms, because that is what it is compared with.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

import timing
from arms import ARMS, BATCH, SEQUENCE, setup

BASE, OURS = "fp32", ("ternary", "strict8")


def measure(keys: list[str], width: int, layers: int, threads: int, rounds: int) -> dict[str, Any]:
    """Times every arm that can run."""
    arguments = {key: (key, width, layers) for key in keys}
    facts, seconds = timing.run(setup, arguments, threads, rounds)
    return {
        "machine": timing.machine(),
        "width": width,
        "layers": layers,
        "threads": threads,
        "facts": facts,
        "seconds": seconds,
    }


def table(records: list[dict[str, Any]]) -> str:
    """One Markdown table for each width and number of threads."""
    groups: dict[tuple[int, int, int], list[dict[str, Any]]] = {}
    for record in records:
        groups.setdefault((record["width"], record["layers"], record["threads"]), []).append(record)
    parts = []
    for (width, layers, threads), group in groups.items():
        parts.append(f"\n{layers} layers of width {width}, {BATCH} x {SEQUENCE} tokens, threads: {threads}\n")
        parts.append("| step | tokens/s | against FP32 | ours ternary against it | 8 bits | loss |")
        parts.append("|---|---|---|---|---|---|")
        parts += [row(key, group) for key in ARMS if any(key in record["facts"] for record in group)]
    return "\n".join(parts)


def row(key: str, group: list[dict[str, Any]]) -> str:
    """An arm over all runs of a group; ratios only where both sides were in the same run."""
    facts = [record["facts"][key] for record in group if key in record["facts"]]
    times = [s for record in group for s in record["seconds"].get(key, [])]
    if not times:
        return f"| {ARMS[key].title} | {facts[-1].get('error', 'no rounds')} | | | | |"
    cells = [
        ARMS[key].title,
        f"{BATCH * SEQUENCE / statistics.median(times):,.0f}",
        against(BASE, key, group),
    ]
    cells += [against(key, ours, group) for ours in OURS]
    first, last = next(fact["loss"] for fact in reversed(facts) if "loss" in fact)
    return f"| {' | '.join(cells)} | {first:.2f} to {last:.2f} |"


def against(slow: str, fast: str, group: list[dict[str, Any]]) -> str:
    """How many times as fast the second arm is, with quartiles."""
    pairs = [
        (a, b)
        for record in group
        if slow in record["seconds"] and fast in record["seconds"]
        for a, b in zip(record["seconds"][slow], record["seconds"][fast], strict=True)
    ]
    if not pairs or slow == fast:
        return ""
    return timing.show(timing.ratio(*zip(*pairs, strict=True)))


def main() -> None:
    """Runs the arms and prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arms", nargs="+", choices=tuple(ARMS), default=list(ARMS), metavar="ARM")
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    records = [
        measure(arguments.arms, arguments.width, arguments.layers, threads, arguments.rounds)
        for threads in arguments.threads
        if arguments.rounds
    ]
    print(timing.machine())
    print(table(timing.save(arguments.json, records)))


if __name__ == "__main__":
    main()
