"""A run that takes a second: a micro model, and text that is on every machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from dqt.train.config import Config
from dqt.train.loop import TrainResult, train

STDLIB = Path(json.__file__).parent  # five modules, 50 kB


def micro_config(tmp_path: Path, **values: Any) -> Config:
    """A tiny run; `values` are "section.key" with a double underscore for the dot."""
    defaults = {
        "model.preset": "micro",
        "model.hidden_size": 32,
        "model.intermediate_size": 64,
        "model.num_attention_heads": 2,
        "data.text": [str(path) for path in sorted(STDLIB.glob("*.py"))],
        "data.vocab_size": 300,
        "train.steps": 6,
        "train.seq_len": 16,
        "train.batch_size": 2,
        "train.eval_windows": 3,
        "train.eval_every": 3,
        "train.checkpoint_every": 3,
        "train.sample_tokens": 5,
        "train.threads": 1,
        "train.out": str(tmp_path / "run"),
    }
    return Config().override({**defaults, **{key.replace("__", "."): value for key, value in values.items()}})


def run_micro(
    tmp_path: Path,
    *,
    resume: str | None = None,
    overwrite: bool = False,
    stream: Any = None,
    **values: Any,
) -> TrainResult:
    """Trains; prepared text is shared between the runs of one test session."""
    config, cache = micro_config(tmp_path, **values), tmp_path.parent / "dqt-cache"
    return train(config, resume=resume, overwrite=overwrite, cache_dir=cache, stream=stream)


def metrics_of(result_directory: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics."""
    return [json.loads(line) for line in (result_directory / "metrics.jsonl").read_text().splitlines()]


def without_times(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Metrics as two equal runs share them."""
    times = ("elapsed", "tokens_per_second", "memory_bytes")
    return [{key: value for key, value in line.items() if key not in times} for line in lines]


def assert_same_tensors(first: Path, second: Path) -> None:
    """Two safetensors files hold the same tensors, bit for bit."""
    from safetensors.torch import load_file

    ours, theirs = load_file(first), load_file(second)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype, name
        assert torch.equal(tensor, theirs[name]), name
