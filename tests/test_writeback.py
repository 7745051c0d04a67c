"""The write-back against a float64 simulation that draws the same random words.

With unit = 1 (strict) or 2**(k-1) (k bits of residual), a weight is the integer position = level * unit +
residual, and

    d         = -(w * lr * decay + lr * u / Δ) * unit         w the weight in grid steps, u Adam's direction
    position' = clip(position + sign(d) (⌊|d|⌋ + [r < 2³² frac|d|]))

The optimizer computes d in float32, so that it may decide otherwise where r / 2³² is within float32's error
of the fraction; those elements, a few in a million where moves are small, may be off by that error. All
others must agree exactly.
"""

from __future__ import annotations

import functools
import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import dqt
from dqt.choices import FLOAT_RESIDUAL, RESIDUAL_BITS
from dqt.numerics import philox
from dqt.numerics.formats import FORMATS, Format
from dqt.numerics.packing import pack
from dqt.numerics.rounding import nearest_rounding, stochastic_rounding
from dqt.optim import AdamW
from dqt.optim.writeback import (
    WriteBackStats,
    default_residual_bits,
    read_residual,
    residual_form,
    write_back,
)
from dqt.tensor import QuantizedTensor

INTEGER_BITS = [k for k in RESIDUAL_BITS if k != FLOAT_RESIDUAL]
ROWS, COLUMNS, NAME, SEED = 6, 11, "layers.0.weight", 7
Array = np.ndarray


def new_residual(weight: QuantizedTensor, bits: int) -> Tensor:
    dtype, shape = residual_form(weight, bits)
    return torch.zeros(shape, dtype=dtype)


def make_weight(fmt: Format, per_row: bool = False, rows: int = ROWS, columns: int = COLUMNS) -> nn.Parameter:
    codes = torch.randint(fmt.qmin, fmt.qmax + 1, (rows, columns))
    scale = 0.1 + 0.1 * torch.rand(rows, 1) if per_row else torch.tensor(0.125)
    return nn.Parameter(QuantizedTensor(pack(codes, fmt.bits), scale, fmt, (rows, columns)))


def read(weight: nn.Parameter, residual: torch.Tensor | None, k: int) -> tuple[Array, Array]:
    """Levels and positions of a weight, as int64."""
    assert isinstance(weight, QuantizedTensor)
    level = weight.unpack().numpy().astype(np.int64) - weight.format.qmin
    if not k:
        return level, level
    rest = np.zeros_like(level) if residual is None else read_residual(residual, k, COLUMNS).numpy()
    return level, level * 2 ** (k - 1) + rest


class AdamDirection:
    """Adam's direction in float64, with its own moments; `factored` is Adafactor's second moment."""

    def __init__(self, betas: tuple[float, float], eps: float, factored: bool) -> None:
        self.betas, self.eps, self.factored, self.step = betas, eps, factored, 0
        self.m = self.v = np.zeros((ROWS, COLUMNS))

    def __call__(self, grad: Array) -> Array:
        self.step += 1
        b1, b2 = self.betas
        self.m = b1 * self.m + (1 - b1) * grad
        self.v = b2 * self.v + (1 - b2) * grad**2
        row, column = self.v.mean(1, keepdims=True), self.v.mean(0, keepdims=True)
        v = row * column / row.mean() if self.factored else self.v
        return self.m / (1 - b1**self.step) / (np.sqrt(v / (1 - b2**self.step)) + self.eps)


# per row, decay of a step, factored, beta1, lr in grid steps: small moves, and such that reach the ends of
# the range
SETTINGS = [
    (False, 0.0, False, 0.0, 0.3),
    (True, 0.05, True, 0.9, 0.7),
    (False, 0.05, True, 0.0, 3.0),
    (True, 0.0, False, 0.9, 400.0),
]


@pytest.mark.parametrize("k", INTEGER_BITS)
@pytest.mark.parametrize("fmt", FORMATS.values(), ids=str)
def test_steps_equal_the_simulation(fmt: Format, k: int) -> None:
    hysteresis = 0.056
    for per_row, decay, factored, beta1, steps_per_lr in SETTINGS:
        weight = make_weight(fmt, per_row)
        assert isinstance(weight, QuantizedTensor)
        scale = weight.scale.double().numpy()
        lr = steps_per_lr * 0.125
        optimizer = AdamW(
            [(NAME, weight)],
            lr,
            (beta1, 0.95),
            weight_decay=decay / lr,
            seed=SEED,
            residual_bits=k,
            hysteresis=hysteresis,
            second_moment="factored" if factored else "full",
        )
        direction_of = AdamDirection((beta1, 0.95), 1e-8, factored)
        unit = 2 ** (k - 1) if k else 1
        top = (fmt.levels - 1) * unit
        for step in range(1, 4):
            level, position = read(weight, optimizer.state[weight].get("residual"), k)
            weight.grad = torch.randn(ROWS, COLUMNS) * torch.rand(ROWS, 1)
            direction = direction_of(weight.grad.double().numpy())
            optimizer.step()

            value = position / unit + (fmt.qmin - fmt.offset)
            d = -(value * decay + lr * direction / scale) * unit
            fraction = np.abs(d) - np.floor(np.abs(d))
            words = philox.random_uint32(
                SEED, philox.Purpose.UPDATE, philox.stream_of(NAME), step, 0, ROWS * COLUMNS
            ).view(ROWS, COLUMNS)
            uniform = words.double().numpy() / 2**32
            move = np.sign(d) * (np.floor(np.abs(d)) + (uniform < fraction))
            expected = np.clip(position + move, 0, top).astype(np.int64)

            new_level, new_position = read(weight, optimizer.state[weight].get("residual"), k)
            distance = np.minimum(np.abs(fraction - uniform), 1 - np.abs(fraction - uniform))
            float32_error = 6e-7 * np.maximum(np.abs(d), 1)
            allowed = np.where(distance < float32_error, np.ceil(float32_error), 0)
            assert (np.abs(new_position - expected) <= allowed).all()
            # The code follows from the position alone: it stays in its widened cell, or takes the nearest.
            stays = np.abs(new_position - level * unit) <= (0.5 + hysteresis) * unit
            nearest = np.floor(new_position / unit + 0.5)
            assert (new_level == np.where(stays & (k > 0), level, nearest)).all()
            assert (np.abs(new_position - new_level * unit) <= max(0.5 + hysteresis, 0.5) * unit).all()
            assert ((new_position >= 0) & (new_position <= top)).all()
        assert new_level.min() >= 0
        assert new_level.max() <= fmt.levels - 1


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("k", [0, 2, 3, 8])
@pytest.mark.parametrize("fmt", FORMATS.values(), ids=str)
def test_the_expected_position_is_the_displacement(fmt: Format, k: int, sign: int) -> None:
    """Exhaustive: row i wants to move by i/64 of a position; its 64 columns draw each of 64 words once."""
    words = 64
    unit = 2 ** (k - 1) if k else 1
    start = fmt.qmin if sign > 0 else fmt.qmax
    codes = torch.full((words, words), start)
    weight = QuantizedTensor(pack(codes, fmt.bits), torch.tensor(0.5), fmt, (words, words))
    residual = new_residual(weight, k) if k else None
    displacement = sign * torch.arange(words)[:, None].expand(words, words) / words
    write_back(
        weight,
        -displacement * 0.5 / unit,
        slice(0, words),
        lr=1.0,
        decay=0.0,
        rounding=functools.partial(stochastic_rounding, word_bits=6),
        random=torch.arange(words).expand(words, words),
        residual=residual,
        residual_bits=k,
    )
    rest = read_residual(residual, k, words).long() if residual is not None else torch.zeros(words, words)
    moves = (weight.unpack().long() - start) * unit + rest
    assert torch.equal(moves.double().mean(dim=1), displacement[:, 0].double())


@pytest.mark.parametrize("rounding", ["stochastic", "nearest"])
@pytest.mark.parametrize("k", [0, 8, 16])
def test_a_step_of_zero_changes_nothing(k: int, rounding: str) -> None:
    weight = make_weight(FORMATS["8"])
    assert isinstance(weight, QuantizedTensor)
    optimizer = AdamW([(NAME, weight)], lr=0.01, residual_bits=k, rounding=rounding)
    weight.grad = torch.randn(ROWS, COLUMNS)
    optimizer.step()
    before = [t.clone() for t in (weight.codes, optimizer.state[weight].get("residual")) if t is not None]
    optimizer.param_groups[0]["lr"] = 0.0
    for _ in range(20):
        optimizer.step()
    after = [t for t in (weight.codes, optimizer.state[weight].get("residual")) if t is not None]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=str)
def test_nearest_strict_moves_nothing_below_half_a_step_and_all_above(fmt: Format) -> None:
    codes = torch.full((ROWS, COLUMNS), fmt.qmin)
    for fraction, moves in ((0.49, 0), (0.51, 1)):
        weight = QuantizedTensor(pack(codes, fmt.bits), torch.tensor(1.0), fmt, (ROWS, COLUMNS))
        for _ in range(10 if not moves else 1):
            write_back(
                weight,
                torch.full((ROWS, COLUMNS), -fraction),
                slice(0, ROWS),
                lr=1.0,
                decay=0.0,
                rounding=nearest_rounding,
                random=None,
            )
        assert (weight.unpack().long() == codes + moves).all()


def test_nearest_with_a_residual_adds_small_steps_up() -> None:
    weight = QuantizedTensor(pack(torch.zeros(1, 8), 4), torch.tensor(1.0), FORMATS["4"], (1, 8))
    residual = new_residual(weight, 8)
    for _ in range(4):
        write_back(
            weight,
            torch.full((1, 8), -0.25),
            slice(0, 1),
            lr=1.0,
            decay=0.0,
            rounding=nearest_rounding,
            random=None,
            residual=residual,
            residual_bits=8,
        )
    assert (weight.unpack() == 1).all()
    assert not read_residual(residual, 8, 8).any()


@pytest.mark.parametrize(("hysteresis", "flips"), [(0.0, True), (0.056, False)])
def test_hysteresis_stops_flicker_at_a_boundary(hysteresis: float, flips: bool) -> None:
    """A weight between 0.47 and 0.53 of a step: without hysteresis its code changes each time."""
    weight = QuantizedTensor(pack(torch.zeros(1, 8), 4), torch.tensor(1.0), FORMATS["4"], (1, 8))
    residual = new_residual(weight, 8)
    stats = WriteBackStats()
    for move in (0.47, 0.0625, -0.0625, 0.0625, -0.0625):
        write_back(
            weight,
            torch.full((1, 8), -move),
            slice(0, 1),
            lr=1.0,
            decay=0.0,
            rounding=nearest_rounding,
            random=None,
            residual=residual,
            residual_bits=8,
            hysteresis=hysteresis,
            stats=stats,
        )
    assert (stats.flipped > 0) is flips


def test_rows_outside_of_the_slice_are_left_alone() -> None:
    weight = make_weight(FORMATS["5"], per_row=True)
    assert isinstance(weight, QuantizedTensor)
    residual = new_residual(weight, 3)
    before = weight.unpack()
    write_back(
        weight,
        torch.full((2, COLUMNS), -1e9),
        slice(2, 4),
        lr=1.0,
        decay=0.0,
        rounding=nearest_rounding,
        random=None,
        residual=residual,
        residual_bits=3,
    )
    after = weight.unpack()
    assert (after[2:4] == 15).all()
    assert torch.equal(after[[0, 1, 4, 5]], before[[0, 1, 4, 5]])
    assert not residual.any()


@pytest.mark.parametrize(("k", "bytes_per_row"), [(2, 3), (3, 5), (4, 6), (8, 11), (16, 22)])
def test_a_residual_takes_k_bits_a_weight(k: int, bytes_per_row: int) -> None:
    weight = make_weight(FORMATS["ternary"])
    assert isinstance(weight, QuantizedTensor)
    residual = new_residual(weight, k)
    assert residual.nbytes == ROWS * bytes_per_row
    assert not residual.is_floating_point()


def test_the_default_residual() -> None:
    defaults = {
        bits: default_residual_bits(make_weight(fmt))
        for bits, fmt in FORMATS.items()  # type: ignore[arg-type]
    }
    assert defaults == {**dict.fromkeys(("1", "ternary", "2", "3", "4"), 8), **dict.fromkeys("5678", 0)}


def test_a_wild_run_stays_in_range() -> None:
    """Steps of every size: the (n + k)-bit number never leaves its range."""
    rng = np.random.default_rng(0)
    for bits, k in itertools.product(("1", "ternary", "8"), (2, 8, 16)):
        fmt = FORMATS[bits]
        weight = make_weight(fmt)
        assert isinstance(weight, QuantizedTensor)
        optimizer = AdamW([(NAME, weight)], 1.0, (0.0, 0.9), residual_bits=k, hysteresis=0.45)
        unit = 2 ** (k - 1)
        for _ in range(60):
            optimizer.param_groups[0]["lr"] = float(10 ** rng.uniform(-4, 1))
            weight.grad = torch.randn(ROWS, COLUMNS)
            optimizer.step()
            level, position = read(weight, optimizer.state[weight]["residual"], k)
            assert position.min() >= 0
            assert position.max() <= (fmt.levels - 1) * unit
            assert np.abs(position - level * unit).max() <= math.floor(0.95 * unit)


@pytest.mark.parametrize("k", RESIDUAL_BITS)
@pytest.mark.parametrize("fmt", FORMATS.values(), ids=str)
def test_a_residual_begins_with_what_rounding_left(fmt: Format, k: int) -> None:
    """Code and residual together are the weight that was converted, as far as the grid and k bits reach."""
    layer = nn.Linear(64, 5, bias=False)
    nn.init.normal_(layer.weight, std=2.0)
    floats = layer.weight.detach().double()
    dqt.quantize_(layer, fmt.name, per_row=True, keep_remainder=True)
    layer.to(torch.bfloat16).to(torch.float32)  # as .to(device) does, makes new tensors
    weight: Any = layer.weight
    codes = weight.unpack()
    optimizer = AdamW([(NAME, weight)], lr=0.0, betas=(0.0, 0.9), residual_bits=k)
    assert weight.kept_remainder is None
    saved = optimizer.state_dict()  # before the first step
    optimizer = AdamW([(NAME, weight)], lr=0.0, betas=(0.0, 0.9), residual_bits=k)
    optimizer.load_state_dict(saved)
    weight.grad = torch.zeros(5, 64)
    optimizer.step()
    assert torch.equal(weight.unpack(), codes)
    if not k:
        return
    unit = 1 if k == FLOAT_RESIDUAL else 2 ** (k - 1)
    rest = read_residual(optimizer.state[weight]["residual"], k, 64).double() / unit
    wanted = (floats / weight.scale + fmt.offset).clamp(fmt.qmin, fmt.qmax)
    error = (codes + rest - wanted).abs()
    assert error.max() <= 1 / 256 + (0.5 / unit if k < 8 else 1e-5)


def test_other_codes_have_no_remainder() -> None:
    def converted() -> nn.Linear:
        layer = nn.Linear(64, 5, bias=False)
        dqt.quantize_(layer, 4, keep_remainder=True)
        return layer

    def kept(layer: nn.Linear) -> bool:
        weight: Any = layer.weight
        return weight.kept_remainder is not None

    loaded, written = converted(), converted()
    assert kept(loaded)
    loaded.load_state_dict(converted().state_dict())
    assert not kept(loaded)
    weight: Any = written.weight
    weight.write_codes(weight.unpack())
    assert not kept(written)
