"""Real steps of a model that full precision could not train on this machine: peak memory, seconds, codes.

    python benchmarks/big.py --preset 1b
    python benchmarks/big.py --preset 7b --set quant.residual_bits=6

Gradient release and activation checkpointing are on, freed memory is given back at once, the batch is 1 x 512
and the tokens are random. The peak is the system's count of resident memory, Python and torch included.
"""

from __future__ import annotations

import argparse
import hashlib
import time
import tomllib

SETTINGS = {
    "train.batch_size": 1,
    "train.seq_len": 512,
    "train.accumulation": 1,
    "train.activation_checkpointing": True,
    "train.gradient_release": True,
    "train.give_back_memory": True,
    "optim.lr": 1e-3,
}


def main() -> None:
    """Prints what each part of the run took."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", default="1b")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="as of dqt train")
    arguments = parser.parse_args()

    import torch

    from dqt.allocator import give_back_at_once
    from dqt.build import build_optimizer
    from dqt.fused import fuse_
    from dqt.memory import peak_memory, process_memory
    from dqt.models import build_config, build_with_recipe
    from dqt.optim import GradientRelease
    from dqt.sizes import format_bytes
    from dqt.tensor import QuantizedTensor
    from dqt.train.config import Config, resolve
    from dqt.train.losses import language_model_loss

    values = {"model.preset": arguments.preset, **SETTINGS}
    for setting in arguments.set:
        key, _, value = setting.partition("=")
        values[key] = tomllib.loads(f"value = {value}")["value"]
    config = resolve(Config().override(values))
    recipe = config.recipe()
    clock = time.perf_counter()

    def say(what: str) -> None:
        seconds = time.perf_counter() - clock
        sizes = f"now {format_bytes(process_memory()):>8}, peak {format_bytes(peak_memory()):>8}"
        print(f"{seconds:7.1f} s  {what:24} {sizes}", flush=True)

    say("imports")
    if config.train.give_back_memory:
        give_back_at_once()
    model_config = build_config(config.model.preset, seq_len=config.train.seq_len)
    model, _ = build_with_recipe(model_config, recipe, config.quant.rules_to_bits)
    if config.train.fused and recipe.fusible:
        fuse_(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    optimizer = build_optimizer(model, recipe)
    if config.train.gradient_release:
        GradientRelease(optimizer)
    say("model built")

    def codes() -> list[str]:
        low_bit = (p for p in model.parameters() if isinstance(p, QuantizedTensor))
        return [hashlib.sha256(weight.codes.numpy()).hexdigest() for weight in low_bit]

    for step in range(1, arguments.steps + 1):
        before = codes()
        tokens = torch.randint(
            model_config.vocab_size,
            (config.train.batch_size, config.train.seq_len + 1),
            generator=torch.Generator().manual_seed(step),
        )
        loss = language_model_loss(model, tokens)
        say(f"forward, loss {loss.item():.4f}")
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        changed = sum(old != new for old, new in zip(before, codes(), strict=True))
        say(f"step {step}: {changed} of {len(before)} changed")


if __name__ == "__main__":
    main()
