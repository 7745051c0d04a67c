"""Packages that only some commands need: imported when asked for, and named where they are missing."""

from __future__ import annotations

import importlib
from types import ModuleType

from dqt.errors import ConfigError

# What each extra of pyproject.toml is for.
PURPOSES = {
    "gguf": "reads and writes GGUF files",
    "xllamacpp": "is llama.cpp, in which --verify runs a GGUF file",
    "accelerate": "is what transformers loads BitNet weights and GGUF files with",
    "lm_eval": "is the evaluation harness that runs --tasks",
}


def require(module: str, extra: str) -> ModuleType:
    """Imports a package of an extra.

    Raises:
        ConfigError: If it is missing.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        if (missing := (error.name or "").partition(".")[0]) != module.partition(".")[0]:
            raise ConfigError(
                f"{module}, which {PURPOSES[module]}, can't be imported ({error}): pip install "
                f"{missing or module}, or 'dqt[{extra}]' again"
            ) from error
        raise ConfigError(
            f"{module} is not installed, which {PURPOSES[module]}: pip install 'dqt[{extra}]'"
        ) from None
