"""Bytes as measured on live tensors and of the process, and what running out of memory says."""

from __future__ import annotations

import pytest
import torch

from dqt.build import build_optimizer, prepare_model_
from dqt.errors import DqtError
from dqt.memory import explain_out_of_memory, measure, peak_memory, process_memory
from dqt.models import build_config, build_model
from dqt.optim import GradientRelease
from dqt.optim.base import QuantizedOptimizer
from dqt.recipes import recipe_for
from dqt.sizes import format_bytes
from dqt.train.losses import language_model_loss

SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
VOCABULARY = 100
# Four square projections and three of the feed-forward layer, twice; tied embedding; five norm gains of 64.
LINEAR = 2 * (4 * 64 * 64 + 3 * 64 * 128)
EMBEDDING = VOCABULARY * 64
NORMS = 5 * 64
MATRICES = 14


def step(method: str | None, bits: str | None) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """A model and its optimizer as they are between `step` and `zero_grad`."""
    model = build_model(build_config("micro", vocab_size=VOCABULARY, seq_len=16, overrides=SIZES), seed=0)
    recipe = recipe_for(method, bits)
    prepare_model_(model, recipe)
    optimizer = build_optimizer(model, recipe)
    language_model_loss(model, torch.zeros(2, 9, dtype=torch.int64)).backward()
    optimizer.step()
    return model, optimizer


CASES = [  # method, bits, bytes of linear weights and of their optimizer state
    ("fp32", None, 4 * LINEAR, 8 * LINEAR),
    ("bitnet", None, 4 * LINEAR, 8 * LINEAR),
    ("strict", "8", LINEAR + 4 * MATRICES, None),
    ("strict", "1", LINEAR // 8 + 4 * MATRICES, None),
    ("residual", "ternary", LINEAR // 4 + 4 * MATRICES, LINEAR + 2 * 4 * (4 * (64 + 64) + 3 * (64 + 128))),
]


@pytest.mark.parametrize(("method", "bits", "weights", "state"), CASES)
def test_measured_bytes(method: str, bits: str | None, weights: int, state: int | None) -> None:
    model, optimizer = step(method, bits)
    table = measure(model, optimizer)
    linear, embedding, norms = table.rows
    assert (linear.parameters, embedding.parameters, norms.parameters) == (LINEAR, EMBEDDING, NORMS)
    assert (linear.weights, linear.gradients) == (weights, 4 * LINEAR)
    if state is not None:
        assert linear.optimizer == state
    assert (embedding.total, embedding.fp32_adamw) == (16 * EMBEDDING, 16 * EMBEDDING)
    assert table.total.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert table.total.total == sum(row.total for row in table.rows)
    assert str(table).count("\n") == 4


def test_with_gradient_release_the_largest_gradient_counts() -> None:
    model, optimizer = step("residual", "ternary")
    optimizer.zero_grad()
    assert isinstance(optimizer, QuantizedOptimizer)
    GradientRelease(optimizer)
    table = measure(model, optimizer)
    assert [row.gradients for row in table.rows] == [4 * 64 * 128, 4 * EMBEDDING, 4 * 64]
    assert table.total.gradients == 4 * max(64 * 128, EMBEDDING)
    assert table.to_dict()[-1]["gradients"] == table.total.gradients


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory: you"
        ),
        OSError(12, "Cannot allocate memory"),
    ],
)
def test_out_of_memory_is_explained(error: Exception) -> None:
    with (
        pytest.raises(DqtError, match="out of memory: lower this"),
        explain_out_of_memory(lambda: "lower this"),
    ):
        raise error


def test_a_real_allocation_that_fails_is_explained() -> None:
    with pytest.raises(DqtError, match="out of memory"), explain_out_of_memory(lambda: "lower this"):
        torch.empty(2**60, dtype=torch.uint8)


def test_other_errors_pass() -> None:
    with pytest.raises(RuntimeError, match="shapes"), explain_out_of_memory(lambda: "lower this"):
        raise RuntimeError("shapes differ")


def test_the_process_takes_memory() -> None:
    assert 10e6 < process_memory() <= peak_memory() * 1.01


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (999, "999 B"), (1500, "1.5 kB"), (79_400_000, "79.4 MB"), (2.5e12, "2.5 TB")],
)
def test_sizes_for_people(size: float, text: str) -> None:
    assert format_bytes(size) == text
