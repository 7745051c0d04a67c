"""Seconds from starting `dqt train` to the end of its first step, tokens prepared before.

    python benchmarks/startup.py [--rounds 5]

By turns in one run: a Python that only imports torch, one that only imports torch and what `transformers`
has for LLaMA, and `dqt train` with the `tiny` preset, each a new process. The two imports are what nobody
who trains a `transformers` model with torch gets around; the rest is ours. The first step is seen in
`metrics.jsonl`, which has its line as soon as the step is done.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import timing

REACH = 6.0
IMPORTS = {
    "import torch": "import torch",
    "import torch and transformers": "import torch; from transformers import LlamaForCausalLM",
}


def import_seconds(statement: str) -> float:
    """Seconds of a new Python that runs one statement."""
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", statement], check=True)
    return time.perf_counter() - started


def first_step_seconds(folder: Path, bits: str) -> float:
    """Seconds until a new `dqt train` has written the metrics of its first step; it is stopped then."""
    out = folder / bits
    metrics = out / "metrics.jsonl"
    metrics.unlink(missing_ok=True)
    command = [sys.executable, "-m", "dqt", "train", "--bits", bits, "--out", str(out), "--overwrite"]
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    while not (metrics.is_file() and metrics.stat().st_size):
        if process.poll() is not None:
            assert process.stderr is not None
            raise SystemExit(process.stderr.read().decode())
        time.sleep(0.005)
    took = time.perf_counter() - started
    process.kill()
    process.communicate()
    return took


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as work:
        turns = {name: lambda code=code: import_seconds(code) for name, code in IMPORTS.items()}
        turns |= {
            f"dqt train --bits {bits}": lambda bits=bits: first_step_seconds(Path(work), bits)
            for bits in ("ternary", "8")
        }
        seconds = timing.interleave(turns, rounds)  # its first round, which is dropped, prepares the tokens
    print(timing.machine())
    print("\n| a new process | seconds, median (quartiles) | reach |\n|---|---|---|")
    for name, each in seconds.items():
        reach = f"{REACH:g}" if name.startswith("dqt") else ""
        print(f"| `{name}` | {timing.show(timing.ratio(each, [1.0] * len(each)))} | {reach} |")


if __name__ == "__main__":
    main()
