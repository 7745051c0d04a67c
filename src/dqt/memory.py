"""Bytes that training takes, measured on the live tensors and of the process.

`measure` adds up what the parameters, their gradients and the optimizer's state really hold, beside the 16
bytes a parameter of full-precision AdamW (weights 4, gradients 4, two moments 8). Activations are not in it:
they belong to the batch, not to the model, and show in the process's peak. What a run will take is foretold
by `dqt.footprint`.
"""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dqt.errors import DqtError
from dqt.rules import linear_modules
from dqt.sizes import format_bytes
from dqt.tensor import QuantizedTensor

FP32_ADAMW_BYTES = 16
CATEGORIES = ("linear weights", "embeddings and head", "norms and biases")


@dataclass(frozen=True)
class MemoryRow:
    """Bytes of a category of parameters.

    Attributes:
        category: One of `CATEGORIES`, or "total".
        parameters: How many; a tied one counts once.
        weights: Bytes of the weights as stored: codes and scales, or floats.
        gradients: Bytes of the gradients that live at the same time; with gradient release, of the largest.
        optimizer: Bytes of the optimizer's state.
    """

    category: str
    parameters: int
    weights: int
    gradients: int
    optimizer: int

    @property
    def total(self) -> int:
        """Weights, gradients and optimizer state."""
        return self.weights + self.gradients + self.optimizer

    @property
    def fp32_adamw(self) -> int:
        """What FP32 AdamW takes for as many parameters."""
        return FP32_ADAMW_BYTES * self.parameters


@dataclass(frozen=True)
class MemoryTable:
    """What `measure` found.

    Attributes:
        rows: One for each category that the model has.
        released: Whether gradients are freed one by one, so that only the largest of all counts.
    """

    rows: tuple[MemoryRow, ...]
    released: bool = False

    @property
    def total(self) -> MemoryRow:
        """All rows together."""
        sums = {name: sum(getattr(row, name) for row in self.rows) for name in _COUNTS}
        if self.released:
            sums["gradients"] = max((row.gradients for row in self.rows), default=0)
        return MemoryRow("total", **sums)

    def to_dict(self) -> list[dict[str, Any]]:
        """Rows and total, for JSON."""
        return [
            {**asdict(row), "total": row.total, "fp32_adamw": row.fp32_adamw}
            for row in (*self.rows, self.total)
        ]

    def __str__(self) -> str:
        lines = [f"{'':20}{'weights':>11}{'gradients':>11}{'optimizer':>11}{'total':>11}{'FP32 AdamW':>12}"]
        for row in (*self.rows, self.total):
            sizes = (row.weights, row.gradients, row.optimizer, row.total)
            cells = "".join(f"{format_bytes(size):>11}" for size in sizes)
            lines.append(f"{row.category:20}{cells}{format_bytes(row.fp32_adamw):>12}")
        return "\n".join(lines)


_COUNTS = ("parameters", "weights", "gradients", "optimizer")


def measure(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> MemoryTable:
    """Adds up the live tensors; call it between `step` and `zero_grad`, when all of them are there.

    With gradient release none is there then, and the largest one of each category counts.
    """
    released = getattr(optimizer, "release", None) is not None
    linear = {id(module.weight) for _, module in linear_modules(model)}
    embeddings = {
        id(module.weight) for module in model.modules() if isinstance(module, nn.Linear | nn.Embedding)
    }
    sums = {category: dict.fromkeys(_COUNTS, 0) for category in CATEGORIES}
    for parameter in model.parameters():
        matrix = CATEGORIES[1] if id(parameter) in embeddings else CATEGORIES[2]
        row = sums[CATEGORIES[0] if id(parameter) in linear else matrix]
        row["parameters"] += parameter.numel()
        row["weights"] += parameter_bytes(parameter)
        if released and parameter.requires_grad:
            row["gradients"] = max(row["gradients"], parameter.numel() * parameter.element_size())
        elif parameter.grad is not None:
            row["gradients"] += parameter.grad.nbytes
        row["optimizer"] += _tensor_bytes(optimizer.state.get(parameter, {})) if optimizer else 0
    rows = (MemoryRow(category, **row) for category, row in sums.items() if row["parameters"])
    return MemoryTable(tuple(rows), released)


def parameter_bytes(parameter: Tensor) -> int:
    """Bytes that a parameter's storage takes: codes and scale of a low-bit one."""
    return parameter.nbytes_stored() if isinstance(parameter, QuantizedTensor) else parameter.nbytes


def _tensor_bytes(state: Any) -> int:
    if isinstance(state, Tensor):
        return state.nbytes
    if isinstance(state, dict):
        return sum(_tensor_bytes(value) for value in state.values())
    return 0


# -- the process ---------------------------------------------------------------------------------------------


def process_memory() -> int:
    """Bytes of memory that this process holds now; where the system does not tell, its peak."""
    if torch.cuda.is_available() and torch.cuda.memory_allocated():
        return torch.cuda.memory_allocated()
    try:
        resident_pages = int(Path("/proc/self/statm").read_text().split()[1])
        return resident_pages * resource.getpagesize()
    except (OSError, ValueError, IndexError):
        return peak_memory()


def peak_memory() -> int:
    """The most bytes of memory that this process ever held."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")  # ru_maxrss would start at what the process that started this one held
    for line in status.read_text().splitlines() if status.is_file() else ():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux KiB


# -- out of memory -------------------------------------------------------------------------------------------


OUT_OF_MEMORY_SIGNS = (
    "not enough memory",
    "can't allocate memory",
    "out of memory",
    "cannot allocate memory",
)


@contextmanager
def explain_out_of_memory(needs: Callable[[], str]) -> Iterator[None]:
    """Turns an allocation that fails, on any device, into a `DqtError` that says what the run needs.

    Args:
        needs: Called after the failure; what the run needs and which settings lower it.
    """
    try:
        yield
    except (MemoryError, RuntimeError, OSError) as error:
        text = str(error).lower()
        if not isinstance(error, MemoryError) and not any(sign in text for sign in OUT_OF_MEMORY_SIGNS):
            raise
        raise DqtError(f"out of memory: {needs()}") from error
