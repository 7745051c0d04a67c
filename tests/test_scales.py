"""Scale rules: Gaussian constants against an integral, scales that are float16 values, rows, zeros."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from dqt.errors import ConfigError
from dqt.numerics.formats import FORMATS, GAUSSIAN_STEP, Format, parse_bits
from dqt.numerics.scales import (
    SCALE_RULES,
    compute_scale,
    default_scale_rule,
    round_to_float16,
)
from dqt.tensor import QuantizedTensor

GRID = np.linspace(-8, 8, 32_001)
DENSITY = np.exp(-(GRID**2) / 2) / math.sqrt(2 * math.pi)


def gaussian_error(fmt: Format, step: float) -> float:
    """Mean square error of rounding a unit Gaussian to the grid, by numerical integration."""
    codes = np.clip(np.floor(GRID / step + fmt.offset + 0.5), fmt.qmin, fmt.qmax)
    return float(((GRID - (codes - fmt.offset) * step) ** 2 * DENSITY).sum() * (GRID[1] - GRID[0]))


def best_step(fmt: Format) -> float:
    """Golden-section search; the error has one minimum."""
    low, high = 0.01, 3.0
    ratio = (math.sqrt(5) - 1) / 2
    while high - low > 1e-4:
        a, b = high - ratio * (high - low), low + ratio * (high - low)
        if gaussian_error(fmt, a) < gaussian_error(fmt, b):
            high = b
        else:
            low = a
    return (low + high) / 2


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=str)
def test_the_gaussian_step_is_the_optimum(fmt: Format) -> None:
    """Its error is; at 2 and 3 bits the symmetric grid's constants are 5 and 3 % short of the best step."""
    assert gaussian_error(fmt, GAUSSIAN_STEP[fmt.name]) <= 1.007 * gaussian_error(fmt, best_step(fmt))


# rule, scale of the row [3, -4, 0, 1] in 4 bits (qmax 7), before rounding to float16
RULES = [
    ("gaussian", GAUSSIAN_STEP["4"] * math.sqrt(26 / 4)),
    ("absmean", 2 / 7),
    ("absmax", 4 / 7),
    ("trained", 0.8 * 4 / 7),
    ("learned", GAUSSIAN_STEP["4"] * math.sqrt(26 / 4)),
    ("paper", 2 / 7),
]


@pytest.mark.parametrize(("rule", "expected"), RULES)
def test_rules(rule: str, expected: float) -> None:
    weight = torch.tensor([[3.0, -4.0, 0.0, 1.0], [6.0, -8.0, 0.0, 2.0]])
    rounded = expected if rule == "paper" else float(np.float16(expected))
    rows = compute_scale(weight, FORMATS["4"], rule, per_row=True)
    assert rows.shape == (2, 1)
    assert rows.dtype == torch.float32
    assert rows[0].item() == pytest.approx(rounded, rel=1e-6)
    assert rows[1].item() == pytest.approx(2 * rounded, rel=1e-6)
    assert compute_scale(weight[:1], FORMATS["4"], rule).item() == pytest.approx(rounded, rel=1e-6)
    assert compute_scale(weight, FORMATS["4"], rule).shape == ()


def test_the_rule_table_is_complete() -> None:
    assert [rule for rule, _ in RULES] == list(SCALE_RULES)
    assert list(GAUSSIAN_STEP) == list(FORMATS)


# bits, multiples of mean|w|: binary's values are half a step from zero, so its step is twice the mean.
@pytest.mark.parametrize(("bits", "factor"), [("1", 2), ("ternary", 1), ("2", 1), ("8", 1 / 127)])
@pytest.mark.parametrize("rule", ["absmean", "paper"])
def test_absmean(bits: str, factor: float, rule: str) -> None:
    weight = torch.randn(8, 16)
    expected = factor * weight.abs().mean().item()
    assert compute_scale(weight, FORMATS[bits], rule).item() == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=str)
@pytest.mark.parametrize("per_row", [False, True])
def test_absmax_clips_nothing_above(fmt: Format, per_row: bool) -> None:
    weight = torch.randn(8, 16)
    reach = compute_scale(weight, fmt, "absmax", per_row) * fmt.half_range
    largest = weight.abs().amax(1, keepdim=True) if per_row else weight.abs().max()
    torch.testing.assert_close(reach, largest, rtol=1e-3, atol=0)


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=str)
def test_the_rule_of_trained_weights_reaches_outliers_where_there_are_codes_for_it(fmt: Format) -> None:
    weight = torch.randn(8, 16)
    weight[:, 0] = 20.0
    rule, share = {"3": ("absmax", 0.6), "4": ("absmax", 0.8)}.get(fmt.name, ("absmax", 1.0))
    if fmt.bits < 3:
        rule, share = "gaussian", 1.0
    expected = compute_scale(weight, fmt, rule, per_row=True) * share
    torch.testing.assert_close(
        compute_scale(weight, fmt, "trained", per_row=True), expected, rtol=1e-3, atol=0
    )


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=str)
def test_default_rules(fmt: Format) -> None:
    assert default_scale_rule(fmt) == ("absmean" if fmt.name in ("1", "ternary") else "gaussian")


@pytest.mark.parametrize("rule", ["gaussian", "absmean", "absmax"])
@pytest.mark.parametrize("size", [1e-9, 1e-3, 1.0, 1e3, 1e9])
def test_scales_are_positive_float16_values(rule: str, size: float) -> None:
    scale = compute_scale(size * torch.randn(16, 8), FORMATS["4"], rule, per_row=True)
    assert torch.equal(scale, scale.half().float())
    assert (scale > 0).all()
    assert scale.isfinite().all()


@pytest.mark.parametrize("size", [1e-2, 1e-4, 1e-5])
def test_small_rows_of_a_trained_weight_are_not_lost(size: float) -> None:
    """float16 has numbers below 6.1e-5, its least normal one, and 8 bits of a row of 1e-5 need them."""
    weight = size * torch.randn(4, 256)
    scale = compute_scale(weight, FORMATS["8"], "absmax", per_row=True)
    rounded = QuantizedTensor.from_float(weight, scale, FORMATS["8"]).dequantize()
    assert float((rounded - weight).norm() / weight.norm()) < 0.2 * (1 if size < 1e-4 else 0.1)


def test_the_paper_scale_is_not_rounded() -> None:
    weight = torch.randn(16, 8)
    assert compute_scale(weight, FORMATS["8"], "paper").item() == pytest.approx(
        weight.abs().mean().item() / 127, rel=1e-7
    )


@pytest.mark.parametrize("rule", list(SCALE_RULES))
def test_zeros_have_scale_zero(rule: str) -> None:
    weight = torch.stack([torch.zeros(8), torch.ones(8)])
    scale = compute_scale(weight, FORMATS["ternary"], rule, per_row=True)
    assert scale[0].item() == 0
    assert scale[1].item() > 0
    assert round_to_float16(torch.zeros(())).item() == 0


@pytest.mark.parametrize(("shape", "rows"), [((6,), 1), ((4, 6), 4), ((2, 4, 6), 8)])
def test_a_scale_per_row_of_any_shape(shape: tuple[int, ...], rows: int) -> None:
    """Rows are those of `QuantizedTensor`: all dimensions but the last."""
    assert compute_scale(torch.randn(shape), FORMATS["4"], "absmax", per_row=True).shape == (rows, 1)


def test_an_unknown_rule_is_refused() -> None:
    with pytest.raises(ConfigError, match="did you mean 'gaussian'"):
        compute_scale(torch.ones(1, 1), FORMATS["4"], "gausian")


@pytest.mark.parametrize("bits", ["1", "ternary", "4", "8"])
def test_headroom_multiplies_the_scale(bits: str) -> None:
    weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
    fmt = parse_bits(bits)
    rule = default_scale_rule(fmt)
    plain, wider = compute_scale(weight, fmt, rule), compute_scale(weight, fmt, rule, headroom=3.0)
    assert wider.item() == pytest.approx(3 * plain.item(), rel=2**-9)
    assert wider.half().float() == wider
