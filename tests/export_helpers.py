"""Finished models without a training: random weights that say something definite about the next token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from dqt.data.tokenizer import train_tokenizer
from dqt.models import build_config, build_with_recipe
from dqt.recipes import recipe_for
from dqt.tensor import QuantizedTensor
from dqt.train.savedmodel import save_model
from train_helpers import STDLIB

SIZES = {
    "seq_len": 32,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
}
VOCABULARY = 300


def saved_model(
    directory: Path,
    bits: str | int | None = "ternary",
    method: str | None = None,
    arch: str = "llama",
    rules: dict[str, Any] | None = None,
    sizes: dict[str, Any] | None = None,
    biases: bool = False,
    **recipe: Any,
) -> Path:
    """Writes a run's `model/` and returns the run's directory."""
    tokenizer = train_tokenizer([(STDLIB / "decoder.py").read_text(encoding="utf-8")], VOCABULARY)
    tokenizer.save(directory / "tokenizer")
    config = build_config("micro", arch, VOCABULARY, overrides={**SIZES, **(sizes or {})})
    if biases:
        config.attention_bias = config.mlp_bias = True
    recipe_used = recipe_for(method, bits, **recipe)
    model, report = build_with_recipe(config, recipe_used, rules, seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if isinstance(parameter, QuantizedTensor):
                continue
            if parameter.ndim == 1:  # gains that are no ones
                parameter += torch.rand(parameter.shape, generator=generator) - 0.5
            elif "embed" in name or "lm_head" in name:
                parameter *= 3  # logits of a standard deviation of about 1
    save_model(
        directory / "model", model.eval(), directory / "tokenizer", recipe_used, report, {"title": "m"}
    )
    return directory
