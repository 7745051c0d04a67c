"""Trained models that runs start from, for the tests of `dqt train --from`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from dqt.data.tokenizer import train_tokenizer
from dqt.models import build_config, build_model
from dqt.train.config import Config
from dqt.train.loop import TrainResult, train
from train_helpers import STDLIB

VOCABULARY = 300
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
GENERATION = {"do_sample": True, "temperature": 0.6, "eos_token_id": [0, 5]}
TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"


def write_directory(path: Path) -> Path:
    """A transformers directory of a model with outliers, like those of trained ones, and its tokenizer."""
    tokenizer = train_tokenizer([(STDLIB / "decoder.py").read_text(encoding="utf-8")], VOCABULARY)
    tokenizer.save(path)
    (path / "chat_template.jinja").write_text(TEMPLATE)
    model = build_model(build_config("micro", "llama", VOCABULARY, 64, SIZES), seed=3, init_gain=1.0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "proj" in name:
                parameter[::7, 3] *= 8
            elif "embed" in name:
                parameter *= 10
    model.generation_config.update(**GENERATION)
    model.save_pretrained(path)
    return path


def run(start: Path, out: Path, resume: str | None = None, **values: Any) -> TrainResult:
    """A run of some steps."""
    settings = {
        "model.start_from": str(start),
        "data.text": [str(STDLIB / "encoder.py"), str(STDLIB / "scanner.py")],
        "train.steps": 4,
        "train.seq_len": 16,
        "train.batch_size": 2,
        "train.eval_windows": 4,
        "train.checkpoint_every": 2,
        "train.sample_tokens": 3,
        "train.threads": 1,
        "train.out": str(out),
        **{key.replace("__", "."): value for key, value in values.items()},
    }
    return train(Config().override(settings), resume=resume, cache_dir=out.parent / "cache")
