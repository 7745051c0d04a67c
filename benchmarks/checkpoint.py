"""What a checkpoint costs: seconds to save and to verify the 130M preset, beside hashlib's own rate.

    python benchmarks/checkpoint.py [DIRECTORY]

Saving is timed with hashing, syncing and the rename, and given as a share of a run that saves every five
minutes. Verifying is compared with `hashlib.file_digest` over the same files, in turn, both from the page
cache. The optimizer's state is that of a first step (of zero gradients).
"""

from __future__ import annotations

import hashlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from dqt.build import build_optimizer
from dqt.models import build_config, build_with_recipe
from dqt.recipes import recipe_for
from dqt.train import storage
from dqt.train.checkpoint import save_checkpoint

EVERY = 300.0
ROUNDS = 3


def main(parent: str | None = None) -> None:
    """Prints a line for each measurement."""
    recipe = recipe_for("residual", "ternary")
    model, _ = build_with_recipe(build_config("130m"), recipe)
    optimizer = build_optimizer(model, recipe, 1e-3, 0)
    for parameter in model.parameters():
        parameter.grad = torch.zeros(parameter.shape)
        optimizer.step()
        parameter.grad = None
    facts = {"samples": 0, "elapsed": 0.0, "data_hash": "", "config": {}}
    with tempfile.TemporaryDirectory(dir=parent) as name:
        saves = [
            timed(lambda step=step: save_checkpoint(Path(name), step, model, optimizer, facts))
            for step in range(1, ROUNDS + 1)
        ]
        files = sorted(Path(name, "step-000001").glob("*"))
        size = sum(path.stat().st_size for path in files)
        print(f"{size / 1e6:,.0f} MB a checkpoint")
        save = statistics.median(saves)
        print(f"save    {save:6.2f} s  {100 * save / EVERY:.2f} % of a run that saves every 5 minutes")
        verify, plain = [], []
        for _ in range(ROUNDS):
            verify.append(timed(lambda: storage.verify(Path(name, "step-000001"))))
            plain.append(timed(lambda: [digest(path) for path in files]))
        rates = [size / statistics.median(seconds) / 1e6 for seconds in (verify, plain)]
        print(f"verify  {rates[0]:6.0f} MB/s  {rates[0] / rates[1]:.2f} of hashlib's {rates[1]:.0f} MB/s")


def timed(action: Callable[[], object]) -> float:
    """Seconds that it takes."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def digest(path: Path) -> str:
    """SHA-256 as the standard library computes it."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


if __name__ == "__main__":
    main(*sys.argv[1:])
