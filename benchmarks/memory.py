"""Memory of training: what is stored, which gradients live, and the process's peak, beside FP32 AdamW.

    python benchmarks/memory.py                       tiny, small (29M parameters) and 130m
    python benchmarks/memory.py --sizes small --arms fp32 ternary ternary-release

Every arm takes three steps on the same 2 x 512 tokens in a fresh process, with the chunked loss of `dqt
train`, which spares the peers their logits. State is weights, optimizer and gradients; it is measured on the
live tensors, and the gradients as the most that lived at once, looked at whenever one was complete. The
peak is what the process ever held, less what it held after its imports.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from typing import Any

BATCH, SEQUENCE, STEPS = 2, 512, 3
BASE = "fp32"
SIZES = ("tiny", "small", "130m")


@dataclass(frozen=True)
class Arm:
    """A row: a recipe with its settings; torch's own fused AdamW for the float methods."""

    title: str
    method: str
    bits: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    embeddings: str | None = None
    release: bool = False
    give_back: bool = False


_NO_STATE = {"betas": (0.0, 0.95), "second_moment": "factored"}
ARMS = {
    "fp32": Arm("FP32, fused AdamW", "fp32"),
    "bitnet": Arm("BitNet b1.58, fused AdamW", "bitnet"),
    "ternary": Arm("ternary + residual", "residual", "ternary"),
    "ternary-release": Arm("ternary + residual, release", "residual", "ternary", release=True),
    "ternary-least": Arm(
        "the same, freed memory given back at once", "residual", "ternary", release=True, give_back=True
    ),
    "ternary-8": Arm(
        "ternary + residual, release, embeddings and head in 8 bits", "residual", "ternary", {}, "8", True
    ),
    "residual8-release": Arm("8 bits + residual, release", "residual", "8", {"residual_bits": 8}, None, True),
    "ternary-floats": Arm(
        "ternary + residual, release, float moments small",
        "residual",
        "ternary",
        {"float_first_moment": "int8", "float_second_moment": "factored"},
        None,
        True,
    ),
    "strict8": Arm("8 bits strict", "strict", "8"),
    "strict8-release": Arm("8 bits strict, no momentum, release", "strict", "8", _NO_STATE, None, True),
}


def measure(arm: Arm, preset: str) -> dict[str, Any]:
    """Bytes of an arm, in this process."""
    import torch
    import transformers.models.llama.modeling_llama  # noqa: F401  part of the base, not of the peak

    from dqt.allocator import give_back_at_once
    from dqt.build import build_optimizer
    from dqt.fused import fuse_
    from dqt.memory import measure, peak_memory, process_memory
    from dqt.models import build_config, build_with_recipe
    from dqt.optim import GradientRelease
    from dqt.recipes import recipe_for
    from dqt.train.losses import language_model_loss

    base = process_memory()
    if arm.give_back:
        give_back_at_once()
    recipe = recipe_for(arm.method, arm.bits, **arm.settings)
    rules = {"*embed_tokens": arm.embeddings, "lm_head": arm.embeddings} if arm.embeddings else {}
    model, _ = build_with_recipe(build_config(preset, seq_len=SEQUENCE), recipe, rules)
    if recipe.fusible:
        fuse_(model)  # as `dqt train` does
    parameters = list(model.parameters())
    optimizer: torch.optim.Optimizer
    if recipe.quantized:
        optimizer = build_optimizer(model, recipe)
    else:
        optimizer = torch.optim.AdamW(parameters, fused=True)
    live = 0

    def look(_: torch.Tensor) -> None:
        nonlocal live
        live = max(live, sum(p.grad.nbytes for p in parameters if p.grad is not None))

    for parameter in parameters:
        parameter.register_post_accumulate_grad_hook(look)
    if arm.release:
        GradientRelease(optimizer)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(0)
    for step in range(STEPS):
        shape = (BATCH, SEQUENCE + 1)
        tokens = torch.randint(model.config.vocab_size, shape, generator=generator)
        language_model_loss(model, tokens).backward()
        optimizer.step()
        if step + 1 < STEPS:
            optimizer.zero_grad()
    table = measure(model, optimizer)
    linear, total = table.rows[0], table.total
    return {
        "parameters": total.parameters,
        "linear": linear.total / linear.parameters,
        "state": total.weights + total.optimizer + live,
        "live": live,
        "peak": peak_memory() - base,
    }


def in_a_process(key: str, preset: str) -> dict[str, Any]:
    """The same in a fresh process."""
    command = [sys.executable, __file__, "--measure", key, preset]
    threads = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "2")}
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **threads})
    if done.returncode:
        return {"error": done.stderr.strip().splitlines()[-1]}
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def table(preset: str, results: dict[str, dict[str, Any]]) -> str:
    """A Markdown table of one size."""
    count = next((r["parameters"] for r in results.values() if "parameters" in r), 0)
    lines = [
        f"\n{preset}: {count / 1e6:.1f}M parameters, {BATCH} x {SEQUENCE} tokens\n",
        "| training | bytes a linear weight | state | against FP32 | live gradients | peak | against FP32 |",
        "|---|---|---|---|---|---|---|",
    ]
    base = results.get(BASE, {})
    for key, result in results.items():
        if "error" in result:
            lines.append(f"| {ARMS[key].title} | {result['error']} | | | | | |")
            continue
        cells = [ARMS[key].title, f"{result['linear']:.2f}"]
        for name in ("state", "live", "peak"):
            cells.append(f"{result[name] / 1e6:,.1f} MB")
            if name != "live":
                cells.append(f"{result[name] / base[name]:.3f}" if name in base else "")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=SIZES, metavar="PRESET")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS)
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        key, preset = arguments.measure
        print(json.dumps(measure(ARMS[key], preset)))
        return
    for preset in arguments.sizes:
        print(table(preset, {key: in_a_process(key, preset) for key in arguments.arms}), flush=True)


if __name__ == "__main__":
    main()
