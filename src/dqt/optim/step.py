"""One parameter's update: what the reference and the kernel need to know, and where they write."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from dqt.numerics import philox
from dqt.numerics.rounding import ROUNDINGS
from dqt.optim.moments import Moments
from dqt.optim.rule import Rule
from dqt.optim.writeback import WriteBackStats

BLOCK_ELEMENTS = 2**16
"""Elements the reference handles at a time: its int64 temporaries of half a MB stay in a core's L2 cache."""


@dataclass(frozen=True)
class Step:
    """One parameter's update.

    Attributes:
        parameter: What is updated, a `QuantizedTensor` or a float tensor.
        grad: Its gradient as a matrix [rows, columns].
        moments: Its moments.
        rule: How they become a direction.
        seed: Of the random words.
        stream: Hash of the parameter's name.
        rounding: Of the write-back.
        residual_bits: 0 is strict.
        hysteresis: h, in grid steps.
        drop_smallest: Share of the directions, the smallest ones, that is set to zero.
        least: Directions of a low-bit weight below this in magnitude are set to zero.
        error_feedback: One of `ERROR_FEEDBACKS`.
        stats: Counts to add to, or None.
    """

    parameter: Tensor
    grad: Tensor
    moments: Moments
    rule: Rule
    seed: int
    stream: int
    rounding: str
    residual_bits: int
    hysteresis: float
    drop_smallest: float
    least: float
    error_feedback: str
    stats: WriteBackStats | None

    @property
    def number(self) -> int:
        """The optimizer's step, from 1."""
        return int(self.moments.state["step"])

    @property
    def residual(self) -> Tensor | None:
        """Packed residual of the whole weight."""
        residual: Tensor | None = self.moments.state.get("residual")
        return residual

    def direction(self, rows: slice) -> Tensor:
        """Update direction of some rows, `float32`; brings their moments up to date."""
        random = self._words(philox.Purpose.MOMENT, rows) if self.moments.rounded else None
        return self.rule.direction(self.grad[rows].float(), self.moments, rows, random)

    def directions(self) -> Iterator[tuple[slice, Tensor]]:
        """Rows, block by block, and what a low-bit weight is moved by: gated, without the smallest ones."""
        gate = ROUNDINGS[self.rounding].gate
        blocks = list(row_blocks(*self.grad.shape))

        def gated(rows: slice) -> Tensor:
            direction = self.direction(rows)
            if gate is not None:
                direction = gate(direction, self.grad[rows].float())
            return torch.where(direction.abs() < self.least, 0.0, direction) if self.least else direction

        if not self.drop_smallest:
            yield from ((rows, gated(rows)) for rows in blocks)
            return
        # The smallest of the whole tensor are known when all are: a float copy of one tensor.
        every = torch.cat([gated(rows) for rows in blocks])
        count = int(self.drop_smallest * every.numel())
        every.view(-1)[every.abs().view(-1).argsort(stable=True)[:count]] = 0.0
        yield from ((rows, every[rows]) for rows in blocks)

    def random(self, rows: slice) -> Tensor | None:
        """Random words of some rows for the write-back, or None if its rounding needs none."""
        rounding = ROUNDINGS[self.rounding]
        if rounding.sequence is None:
            return self._words(philox.Purpose.UPDATE, rows) if rounding.draws else None
        return rounding.sequence(self._words(philox.Purpose.UPDATE, rows, step=0), self.number)

    def _words(self, purpose: philox.Purpose, rows: slice, step: int | None = None) -> Tensor:
        columns = self.grad.shape[1]
        start, count = rows.start * columns, (rows.stop - rows.start) * columns
        words = philox.random_uint32(
            self.seed,
            purpose,
            self.stream,
            self.number if step is None else step,
            start,
            count,
            self.grad.device,
        )
        return words.view(-1, columns)


def row_blocks(rows: int, columns: int) -> Iterator[slice]:
    """Slices of about `BLOCK_ELEMENTS` elements that cover the rows of a matrix."""
    height = max(1, BLOCK_ELEMENTS // max(1, columns))
    for start in range(0, rows, height):
        yield slice(start, min(start + height, rows))


def gradient_matrix(parameter: Tensor) -> Tensor:
    """The gradient of a parameter as a matrix; a vector's is one row."""
    grad = parameter.grad
    assert grad is not None
    return grad.reshape(matrix_shape(grad))


def matrix_shape(tensor: Tensor) -> tuple[int, int]:
    """The rows and columns that a tensor has as a matrix; a vector is one row."""
    columns = tensor.shape[-1] if tensor.ndim else 1
    return tensor.numel() // max(1, columns) if tensor.ndim > 1 else 1, columns


@torch.no_grad()
def write_float(step: Step) -> None:
    """Moves a float parameter by its direction, as every optimizer does.

    Products and difference are rounded one by one, so that the kernel gives the same bits.
    """
    parameter, rule = step.parameter, step.rule
    matrix = parameter.reshape(step.grad.shape)
    for rows in row_blocks(*step.grad.shape):
        kept = matrix[rows].float() * (1 - rule.decay)
        matrix[rows] = (kept - step.direction(rows) * rule.lr).to(matrix.dtype)
    if not parameter.is_contiguous():
        parameter.copy_(matrix.view(parameter.shape))
