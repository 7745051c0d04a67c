"""The Triton kernels for CUDA tensors, where Triton is installed; torch's wheels for CUDA bring it.

Without it, and for the operations that have no Triton kernel, CUDA tensors run on the reference.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable
from types import ModuleType

import torch


@functools.cache
def module(name: str) -> ModuleType | None:
    """The module of kernels dqt.ops.<name>, or None without Triton."""
    if importlib.util.find_spec("triton") is None:
        return None
    return importlib.import_module(f"dqt.ops.{name}")


def kernel(name: str, device: torch.device) -> Callable[..., None] | None:
    """The launcher of an operation's kernel on a device, or None."""
    kernels = module("triton_kernels")
    launch = getattr(kernels, name, None)
    if launch is None:
        return None

    def run(*arguments: object) -> None:
        with torch.cuda.device(device):
            launch(*arguments)

    return run
