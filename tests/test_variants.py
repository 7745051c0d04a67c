"""What is there for comparison: gates, dropped updates, float residual, ECO; each against its definition."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dqt.errors import ConfigError
from dqt.numerics.formats import parse_bits
from dqt.numerics.packing import pack
from dqt.numerics.rounding import ROUNDINGS
from dqt.optim import SGD, Adafactor, AdamW, PaperAdafactor, PaperAdamW
from dqt.optim.base import QuantizedOptimizer
from dqt.optim.significance import least_direction
from dqt.tensor import QuantizedTensor

SCALE = 0.125


def make_weight(
    bits: str = "8", rows: int = 6, columns: int = 40, code: int | None = None
) -> QuantizedTensor:
    """A weight of codes away from the ends, or of one code."""
    fmt = parse_bits(bits)
    generator = torch.Generator().manual_seed(2)
    codes = torch.randint(fmt.qmin // 2, fmt.qmax // 2 + 1, (rows, columns), generator=generator)
    codes = codes if code is None else torch.full_like(codes, code)
    weight = nn.Parameter(QuantizedTensor(pack(codes, fmt.bits), torch.tensor(SCALE), fmt, (rows, columns)))
    assert isinstance(weight, QuantizedTensor)
    return weight


def step(optimizer: QuantizedOptimizer, weight: QuantizedTensor, grad: Tensor) -> Tensor:
    """One step; by how many grid steps each weight moved."""
    before = weight.unpack().int()
    weight.grad = grad
    optimizer.step()
    return weight.unpack().int() - before


def gradient(shape: torch.Size, number: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(number))


# -- gates ---------------------------------------------------------------------------------------------------


def test_gates_change_the_direction_alone() -> None:
    u, g = torch.tensor([0.5, -0.5, 2.0, 0.0]), torch.tensor([1.0, 1.0, -1.0, 1.0])
    size, agreement = ROUNDINGS["gated"].gate, ROUNDINGS["agreed"].gate
    assert size is not None
    assert agreement is not None
    assert size(u, g).tolist() == [0.25, -0.25, 4.0, 0.0]
    assert agreement(u, g).tolist() == [0.5, 0.0, 0.0, 0.0]


@pytest.mark.parametrize("rounding", ["stochastic", "gated", "agreed"])
def test_the_mean_move_is_that_of_the_gated_direction(rounding: str) -> None:
    """100,000 weights with one gradient each: the mean move, to five standard errors."""
    weight = make_weight(rows=100, columns=1000, code=0)
    lr = 0.2 * SCALE
    optimizer = AdamW([("w", weight)], lr, (0.5, 0.0), rounding=rounding, residual_bits=0)
    step(optimizer, weight, torch.full((100, 1000), 0.8))
    grad = torch.full((100, 1000), -0.2)
    grad[:50] = 0.2
    moves = step(optimizer, weight, grad).double()
    # (0.5 * 0.4 +- 0.5 * 0.2) / (1 - 0.5**2) / 0.2
    for rows, direction in ((slice(0, 50), 2.0), (slice(50, 100), 2 / 3)):
        disagrees = rounding == "agreed" and rows.start == 50
        wanted = {"gated": direction**2}.get(rounding, direction) * (not disagrees) * 0.2
        error = math.sqrt(wanted * (1 - wanted) / 50_000)
        assert abs(float(moves[rows].mean()) + wanted) <= 5 * error


def test_agreed_moves_nothing_against_its_gradient() -> None:
    weight = make_weight()
    optimizer = AdamW([("w", weight)], lr=2 * SCALE, rounding="agreed", residual_bits=0)
    for number in range(5):
        grad = gradient(weight.shape, number)
        moves = step(optimizer, weight, grad.clone())
        assert moves.any()
        assert not (moves * grad > 0).any()


# -- dropped updates -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 0.99])
@pytest.mark.parametrize("rows", [6, 4000])  # one block of the reference, and several
def test_exactly_the_smallest_share_is_dropped(share: float, rows: int) -> None:
    weight = make_weight(rows=rows, code=0)
    optimizer = SGD([("w", weight)], lr=3.0, drop_smallest=share, rounding="nearest", residual_bits=0)
    # All sizes differ, and each is a move of 3 steps or more of SCALE.
    size = 0.125 + torch.randperm(weight.numel(), generator=torch.Generator().manual_seed(0)) / weight.numel()
    grad = (size * torch.sign(gradient(weight.shape, 1)).view(-1)).view(weight.shape)
    moves = step(optimizer, weight, grad.clone())
    dropped = int(share * weight.numel())
    assert int((moves == 0).sum()) == dropped
    if dropped:
        assert grad.abs()[moves == 0].max() < grad.abs()[moves != 0].min()


def test_equal_updates_are_dropped_by_share_too() -> None:
    weight = make_weight(code=0)
    optimizer = SGD([("w", weight)], lr=SCALE, drop_smallest=0.25, rounding="nearest", residual_bits=0)
    assert int((step(optimizer, weight, torch.ones(weight.shape)) == 0).sum()) == weight.numel() // 4


# -- significance --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beta1", [0.0, 0.9])
@pytest.mark.parametrize("significance", [0.0, 1.0, 2.0, 3.0])
def test_of_pure_noise_as_much_moves_as_a_normal_distribution_says(beta1: float, significance: float) -> None:
    """40,000 weights with independent gradients: to a tenth, and five standard errors."""
    weight = make_weight(rows=40, columns=1000, code=0)
    optimizer = AdamW(
        [("w", weight)],
        lr=0.0,
        betas=(beta1, 0.999),
        significance=significance,
        rounding="nearest",
        residual_bits=0,
    )
    generator = torch.Generator().manual_seed(0)
    for _ in range(600):  # until the root of the squares is sharp
        step(optimizer, weight, torch.randn(weight.shape, generator=generator))
    optimizer.param_groups[0]["lr"] = 1e9 * SCALE  # whatever is not zero moves
    moves = step(optimizer, weight, torch.randn(weight.shape, generator=generator))
    wanted = math.erfc(significance / math.sqrt(2))
    error = 5 * math.sqrt(wanted * (1 - wanted) / weight.numel())
    assert float((moves != 0).double().mean()) == pytest.approx(wanted, rel=0.1, abs=error)


@pytest.mark.parametrize("beta1", [0.0, 0.5, 0.98])
@pytest.mark.parametrize("count", [1, 2, 30, 1000])
def test_the_threshold_is_in_standard_deviations_of_a_young_average_too(beta1: float, count: int) -> None:
    """Against the weights that independent gradients have in m / (1 - beta1^t)."""
    weights = [(1 - beta1) * beta1**age / (1 - beta1**count) for age in range(count)]
    deviation = math.sqrt(math.fsum(weight**2 for weight in weights))
    assert least_direction(2.0, beta1, count) == pytest.approx(2 * deviation, rel=1e-6)


def test_a_clipped_update_is_as_significant() -> None:
    """`clip_update` makes a step shorter, and moves the same weights."""
    moved = []
    for clip_update in (0.0, 1.0):
        weight = make_weight(rows=40, columns=50, code=0)
        settings = {"lr": 0.0, "significance": 2.0, "rounding": "nearest", "clip_update": clip_update}
        optimizer = AdamW([("w", weight)], **STRICT, **settings)
        for number in range(30):
            step(optimizer, weight, gradient(weight.shape, number))
        optimizer.param_groups[0]["lr"] = 1e9 * SCALE  # whatever is not zero moves
        moved.append(step(optimizer, weight, 3 * gradient(weight.shape, 30)) != 0)
    assert optimizer.state[weight]["clip"] > 1.5
    assert torch.equal(*moved)
    assert 0.05 < float(moved[0].float().mean()) < 0.5


def test_a_lean_is_followed_the_more_the_higher_the_threshold() -> None:
    """Of a gradient that is noise with a mean of 0.1, the share of moves that go the right way."""
    right = []
    for significance in (0.0, 1.0, 2.0):
        weight = make_weight(rows=400, columns=400, code=0)
        optimizer = AdamW(
            [("w", weight)], lr=0.3 * SCALE, betas=(0.0, 0.999), significance=significance, residual_bits=0
        )
        up = down = 0
        for number in range(10):
            moves = step(optimizer, weight, gradient(weight.shape, number) + 0.1)
            down, up = down + int((moves < 0).sum()), up + int((moves > 0).sum())
        right.append(down / up)
    # Above t, exp(2 * 0.1 * t) to 1 and a little more; without a threshold (1 + s sqrt(pi / 2)) / (1 - ...).
    assert right[0] == pytest.approx(1.28, abs=0.05)
    assert right[0] < right[1] < right[2]
    assert right[2] > math.exp(0.4)


@pytest.mark.parametrize("residual_bits", [0, 4])
@pytest.mark.parametrize("first_moment", ["fp32", "bf16", "int8", "fp8"])
def test_a_move_uses_up_its_evidence(first_moment: str, residual_bits: int) -> None:
    """The first moment is zero where the code has moved, and nowhere else but by rounding."""
    weight = make_weight(rows=20, columns=300, code=0)
    optimizer = AdamW(
        [("w", weight)],
        lr=0.4 * SCALE,
        significance=1.0,
        first_moment=first_moment,
        residual_bits=residual_bits,
    )
    moved = torch.zeros(weight.shape, dtype=torch.bool)
    for number in range(4):
        moved = step(optimizer, weight, gradient(weight.shape, number)) != 0
        forgotten = optimizer.state[weight]["exp_avg"].float() == 0
        assert forgotten[moved].all()
    assert 0.02 < float(moved.float().mean()) < 0.5
    assert float(forgotten[~moved].float().mean()) < 0.05


# -- a float residual ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", ["1", "ternary", "4", "8"])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_a_float_residual_is_a_weight_in_full(bits: str, decay: float) -> None:
    """Code and residual together follow SGD on floats, clipped to the grid; the code is within 1/2 + h."""
    weight, h, lr = make_weight(bits), 0.1, 0.05
    fmt = weight.format
    optimizer = SGD([("w", weight)], lr, weight_decay=decay, residual_bits=32, hysteresis=h)
    value = (weight.unpack().double() - fmt.offset) * SCALE
    ends = (fmt.qmin - fmt.offset) * SCALE, (fmt.qmax - fmt.offset) * SCALE
    changed = 0
    for number in range(20):
        grad = gradient(weight.shape, number)
        changed += int(step(optimizer, weight, grad.clone()).abs().sum())
        value = (value * (1 - lr * decay) - lr * grad.double()).clamp(*ends)
        rest = optimizer.state[weight]["residual"]
        assert rest.dtype == torch.float32
        assert rest.abs().max() <= 0.5 + h + 1e-6
        ours = (weight.unpack().double() - fmt.offset + rest) * SCALE
        torch.testing.assert_close(ours, value, rtol=0, atol=1e-6)
    assert changed


# -- ECO -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("second", ["full", "factored"])
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_eco_is_algorithm_3(second: str, rounding: str) -> None:
    """The published equations in float64, given the codes that rounding chose."""
    weight, lr, (beta1, beta2), eps = make_weight(), 0.07, (0.9, 0.95), 1e-6
    settings: dict[str, Any] = {"rounding": rounding, "second_moment": second, "residual_bits": 0}
    optimizer = AdamW([("w", weight)], lr, (beta1, beta2), eps, error_feedback="eco", **settings)
    m = v = torch.zeros(weight.shape, dtype=torch.float64)
    for t in range(1, 8):
        grad = gradient(weight.shape, t)
        before = weight.dequantize().double()
        moves = step(optimizer, weight, grad.clone())
        m = beta1 * m + (1 - beta1) * grad.double()
        v = beta2 * v + (1 - beta2) * grad.double() ** 2
        row = v.mean(1, keepdim=True)
        whole = row / row.mean() * v.mean(0) if second == "factored" else v
        # A factored eps is relative to its row; it is small enough not to matter.
        root = (whole / (1 - beta2**t)).sqrt() + eps
        wanted = before - lr * m / (1 - beta1**t) / root
        after = weight.dequantize().double()
        assert moves.any()
        assert ((wanted - after).abs() <= SCALE * (0.5 if rounding == "nearest" else 1) + 1e-6).all()
        m = m + (1 - beta1**t) / lr * (1 - 1 / beta1) * root * (wanted - after)
        torch.testing.assert_close(optimizer.state[weight]["exp_avg"].double(), m, rtol=1e-4, atol=1e-5)


def test_eco_recovers_what_rounding_to_nearest_loses() -> None:
    """A constant gradient too small for a step: without feedback nothing moves, with it the sum is right."""
    moved = {}
    for feedback in ("none", "eco"):
        weight = make_weight(code=0)
        optimizer = SGD(
            [("w", weight)], 0.1 * SCALE, 0.5, rounding="nearest", error_feedback=feedback, residual_bits=0
        )
        for _ in range(100):
            step(optimizer, weight, torch.ones(weight.shape))
        moved[feedback] = float(weight.unpack().double().mean())
    assert moved["none"] == 0.0
    assert moved["eco"] == pytest.approx(-20.0, abs=1.0)  # 100 steps of 0.1, twice because of the momentum


def test_a_learning_rate_of_zero_feeds_nothing_back() -> None:
    weight = make_weight()
    optimizer = AdamW([("w", weight)], 0.0, error_feedback="eco", residual_bits=0)
    assert not step(optimizer, weight, torch.ones(weight.shape)).any()
    assert optimizer.state[weight]["exp_avg"].isfinite().all()


# -- what does not go together -------------------------------------------------------------------------------

STRICT = {"residual_bits": 0}
ECO = {**STRICT, "error_feedback": "eco"}
REFUSED: list[tuple[Any, dict[str, Any], str]] = [
    (AdamW, {**ECO, "residual_bits": 8}, "eco takes a residual's place"),
    (AdamW, {**ECO, "residual_bits": "auto"}, "eco takes a residual's place"),
    (AdamW, {**ECO, "first_moment": "int8"}, "eco goes into an fp32 first moment"),
    (AdamW, {**ECO, "second_moment": "int8"}, "eco goes into an fp32 first moment"),
    (AdamW, {**ECO, "betas": (0.0, 0.95)}, "eco goes into an fp32 first moment"),
    (AdamW, {**ECO, "rounding": "biased"}, "eco is published for"),
    (AdamW, {**ECO, "learn_scale": True}, "without error feedback"),
    (SGD, ECO, "eco goes into an fp32 first moment"),
    (Adafactor, {**ECO, "beta1": 0.9}, "eco is published for AdamW and SGD"),
    (SGD, {"learn_scale": True}, "scales are trained .* with AdamW"),
    (SGD, {"significance": 1.0}, "use AdamW"),
    (AdamW, {**STRICT, "significance": 1.0, "rounding": "agreed"}, "each choose which weights move"),
    (AdamW, {**STRICT, "significance": 1.0, "drop_smallest": 0.1}, "each choose which weights move"),
    (AdamW, {**STRICT, "rounding": "gated", "drop_smallest": 0.1}, "each choose which weights move"),
    (AdamW, {**ECO, "significance": 1.0}, "set significance=0"),
    (AdamW, {"rounding": "gated", "betas": (0.0, 0.95)}, "set betas to keep one"),
    (SGD, {"rounding": "agreed"}, "set betas to keep one"),
    (SGD, {"rounding": "gated", "momentum": 0.9}, "rounding=agreed"),
    (Adafactor, {"rounding": "gated", "beta1": 0.9}, "rounding=agreed"),
    (AdamW, {"residual_bits": 32, "rounding": "nearest"}, "use residual_bits=16 or less"),
    (PaperAdamW, {"second_moment": "factored"}, "for a factored one use PaperAdafactor"),
    (PaperAdamW, {"clip_update": 1.0}, "no clip_update"),
    *(
        (kind, settings, message)
        for kind in (PaperAdamW, PaperAdafactor)
        for settings, message in (
            ({"residual_bits": 8}, "keeps no residual"),
            ({"residual_bits": "auto"}, "keeps no residual"),
            ({"error_feedback": "eco"}, "eco takes a residual's place"),
            ({"significance": 3.0}, "use AdamW"),
            ({"learn_scale": True}, "scales are trained"),
            *(({"rounding": kind}, "use nearest") for kind in ("biased", "noise", "learned", "agreed")),
        )
    ),
]


@pytest.mark.parametrize(("kind", "settings", "message"), REFUSED)
def test_refusals(kind: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        kind([("w", make_weight())], **settings)


def test_what_is_about_low_bit_weights_may_be_set_for_floats_beside_them() -> None:
    optimizer = AdamW([("w", make_weight())], rounding="agreed", residual_bits=0)
    optimizer.add_param_group({"params": [("b", nn.Parameter(torch.ones(3)))], "betas": (0.0, 0.9)})


# -- learned scales ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("per_row", [False, True])
def test_a_learned_scale_follows_its_gradient(per_row: bool) -> None:
    """Against Adam without a first moment on the logarithm's first order, in float64; codes stand still."""
    weight, lr, beta2 = make_weight(), 0.01, 0.9
    if per_row:
        weight.scale = torch.full((6, 1), SCALE)
    # No displacement reaches half a step, so that rounding to nearest moves no code.
    optimizer = AdamW(
        [("w", weight)], lr, (0.0, beta2), rounding="nearest", residual_bits=0, learn_scale=True
    )
    value, v = weight.unpack().double(), 0.0
    expected = weight.scale.double().clone()
    for t in range(1, 6):
        grad = gradient(weight.shape, t)
        assert not step(optimizer, weight, grad.clone()).any()
        g = (grad.double() * value).sum(1, keepdim=True) if per_row else (grad.double() * value).sum()
        v = beta2 * v + (1 - beta2) * g**2
        expected = expected * (1 - lr * g / (v / (1 - beta2**t)) ** 0.5)
        torch.testing.assert_close(optimizer.state[weight]["scale"].double(), expected, rtol=1e-5, atol=0)
        assert torch.equal(weight.scale, optimizer.state[weight]["scale"].half().float())
