"""Direct Quantized Training: language models whose weights are low-bit integers all through training.

    model = transformers.LlamaForCausalLM(config)
    report = dqt.quantize_(model, bits="ternary")
    optimizer = dqt.optim.AdamW(model.named_parameters(), lr=2e-3, seed=0)

Names are imported when they are first used, so that `import dqt` and the command line start at once.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from dqt import build, hf, models, optim, recipes, train
    from dqt.choices import Products
    from dqt.fused import fuse_
    from dqt.hf import DqtConfig
    from dqt.lora import merge_lora
    from dqt.quantize import quantize_
    from dqt.rules import QuantizeReport
    from dqt.tensor import QuantizedTensor

__all__ = [
    "DqtConfig",
    "Products",
    "QuantizeReport",
    "QuantizedTensor",
    "__version__",
    "build",
    "fuse_",
    "hf",
    "merge_lora",
    "models",
    "optim",
    "quantize_",
    "recipes",
    "train",
]

_HOME = {
    "DqtConfig": "dqt.hf",
    "Products": "dqt.tensor",
    "QuantizeReport": "dqt.rules",
    "QuantizedTensor": "dqt.tensor",
    "fuse_": "dqt.fused",
    "merge_lora": "dqt.lora",
    "quantize_": "dqt.quantize",
}


_MODULES = ("build", "hf", "models", "optim", "recipes", "train")
"""Those that the documentation names as `dqt.` and the module."""


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    if name in _MODULES:
        return importlib.import_module(f"dqt.{name}")
    raise AttributeError(f"module 'dqt' has no attribute {name!r}")
