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
    from dqt import optim
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
    "fuse_",
    "merge_lora",
    "optim",
    "quantize_",
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


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    if name == "optim":
        return importlib.import_module("dqt.optim")
    raise AttributeError(f"module 'dqt' has no attribute {name!r}")
