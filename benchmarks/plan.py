"""Peak memory of real steps beside what `dqt plan` says, in a fresh process for each.

    python benchmarks/plan.py                    sizes x methods x settings
    python benchmarks/plan.py --preset small     one size

What is measured is the process's peak, less what it holds after steps of the smallest model.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
from typing import Any

BATCHES = {"tiny": 8, "small": 4, "130m": 1}
METHODS = ({}, {"quant.bits": "8"}, {"quant.method": "fp32"})
SETTINGS: tuple[dict[str, Any], ...] = (
    {},
    {"train.activation_checkpointing": True},
    {"train.activation_checkpointing": True, "train.gradient_release": True},
    {"train.give_back_memory": True},
)
STEPS = 2  # the optimizer's state is there from the second on


def measure(values: dict[str, Any]) -> dict[str, int]:
    """Runs steps on random tokens in this process; bytes of its peak, of its start, and as planned."""
    import torch

    from dqt.allocator import give_back_at_once
    from dqt.build import build_optimizer
    from dqt.footprint import Needs
    from dqt.fused import fuse_
    from dqt.memory import peak_memory, process_memory
    from dqt.models import build_config, build_with_recipe
    from dqt.optim import GradientRelease
    from dqt.train.config import Config, resolve
    from dqt.train.losses import language_model_loss

    def run(config: Config) -> None:
        model_config = build_config(config.model.preset, overrides=config.model.overrides)
        recipe = config.recipe()
        model, _ = build_with_recipe(model_config, recipe, config.quant.rules_to_bits)
        if config.train.fused and recipe.fusible:
            fuse_(model)
        if config.train.activation_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        optimizer = build_optimizer(model, recipe)
        if config.train.gradient_release:
            GradientRelease(optimizer)
        shape = (config.train.batch_size, config.train.seq_len + 1)
        for _ in range(STEPS):
            language_model_loss(model, torch.randint(model_config.vocab_size, shape)).backward()
            optimizer.step()
            optimizer.zero_grad()

    config = resolve(Config().override(values))
    if config.train.give_back_memory:
        give_back_at_once()
    least = {"model.preset": "micro", "train.batch_size": 1, "train.seq_len": 16}
    run(resolve(Config().override(values | least)))  # loads libraries and starts threads
    base = process_memory()
    run(config)
    needs = Needs(config).footprint()
    return {"measured": peak_memory() - base, "planned": needs.peak - needs.process, "base": base}


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", choices=BATCHES, action="append")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(measure(json.loads(arguments.child))))
        return
    print(f"{'size':8}{'method':20}{'settings':40}{'measured':>10}{'planned':>10}{'error':>8}")
    for preset, method, setting in itertools.product(arguments.preset or BATCHES, METHODS, SETTINGS):
        batch = {"train.batch_size": BATCHES[preset], "train.accumulation": 1}
        values = {"model.preset": preset, **batch, **method, **setting}
        command = [sys.executable, __file__, "--child", json.dumps(values)]
        found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        measured, planned = found["measured"], found["planned"]
        names = [
            " ".join(str(v) for v in method.values()),
            " ".join(key.partition(".")[2] for key in setting),
        ]
        print(
            f"{preset:8}{names[0]:20}{names[1]:40}{measured / 1e6:8.0f}MB{planned / 1e6:8.0f}MB"
            f"{planned / measured - 1:+8.1%}",
            flush=True,
        )


if __name__ == "__main__":
    main()
