"""Command lines of `dqt train` for runs of a second."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from train_helpers import micro_config


def arguments(out: Path, *more: str, **values: Any) -> list[str]:
    """`dqt train` as `run_micro` trains, with 6 steps; `values` as there."""
    config = micro_config(out.parent, train__out=str(out), **values).to_dict()
    text = config["data"].pop("text")
    given = ["train", "--text", *text]
    for section, settings in config.items():
        for key, value in settings.items():
            given += ["--set", f"{section}.{key}={_toml(value)}"]
    return [*given, *more]


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f'"{value}"' if isinstance(value, str) else str(value)
