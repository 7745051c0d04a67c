"""Codes chosen for a layer's outputs: less error there than rounding to nearest, on the same grid."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import dqt
from dqt.calibrate import round_for_output
from dqt.choices import FLOAT_PRODUCTS
from dqt.errors import ConfigError
from dqt.models import build_config, build_model
from dqt.numerics.formats import parse_bits
from dqt.numerics.scales import compute_scale, default_scale_rule
from dqt.tensor import QuantizedTensor

OUT, IN, TOKENS = 24, 40, 400


def correlated(generator: torch.Generator) -> Tensor:
    """Inputs of a few directions and very different sizes, as activations are."""
    few = torch.randn(TOKENS, 8, generator=generator) @ torch.randn(8, IN, generator=generator)
    sizes = torch.logspace(-1, 1, IN)[torch.randperm(IN, generator=generator)]
    return (few + 0.3 * torch.randn(TOKENS, IN, generator=generator)) * sizes


@pytest.mark.parametrize("bits", ["1", "ternary", "2", "4", "8"])
@pytest.mark.parametrize("per_row", [False, True])
def test_less_error_at_the_output_than_rounding_to_nearest(bits: str, per_row: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    fmt = parse_bits(bits)
    weight, x = torch.randn(OUT, IN, generator=generator), correlated(generator)
    scale = compute_scale(weight, fmt, default_scale_rule(fmt), per_row)
    ours = round_for_output(weight, scale, fmt, x.T @ x)
    nearest = QuantizedTensor.from_float(weight, scale, fmt).dequantize()
    codes = ours / scale + fmt.offset
    assert torch.equal(codes, codes.round().clamp(fmt.qmin, fmt.qmax))  # on the grid, exactly
    errors = [((rounded - weight) @ x.T).square().sum() for rounded in (ours, nearest)]
    assert errors[0] < 0.5 * errors[1]


def test_inputs_without_correlation_leave_rounding_to_nearest() -> None:
    weight, fmt = torch.randn(OUT, IN, generator=torch.Generator().manual_seed(1)), parse_bits("4")
    scale = compute_scale(weight, fmt, "gaussian")
    nearest = QuantizedTensor.from_float(weight, scale, fmt).dequantize()
    assert torch.equal(round_for_output(weight, scale, fmt, torch.eye(IN)), nearest)


def test_a_model_keeps_its_outputs_better() -> None:
    torch.manual_seed(0)
    model = build_model(build_config("micro", seq_len=32, vocab_size=100), 1, 1.0)
    tokens = torch.randint(100, (8, 32), generator=torch.Generator().manual_seed(0))
    held_out = torch.randint(100, (8, 32), generator=torch.Generator().manual_seed(1))
    errors = {}
    with torch.no_grad():  # inputs of a few directions, as a trained model has
        few = torch.randn(100, 6) @ torch.randn(6, model.config.hidden_size)
        model.model.embed_tokens.weight.copy_(0.1 * few)
        expected = model.eval()(held_out).logits
        for calibrate in (None, tokens, {"input_ids": tokens}):
            other = copy.deepcopy(model).train()
            other.model.norm.eval()  # as people freeze a part of a model
            dqt.quantize_(other, 4, calibrate=calibrate, products=FLOAT_PRODUCTS)
            assert [name for name, m in other.named_modules() if not m.training] == ["model.norm"]
            errors[type(calibrate)] = float((other.eval()(held_out).logits - expected).square().mean())
    assert errors[dict] == errors[Tensor]
    assert errors[Tensor] < 0.9 * errors[type(None)]


def test_a_tied_weight_and_inputs_that_never_occur() -> None:
    embedding, head = nn.Embedding(30, IN), nn.Linear(IN, 30, bias=False)
    head.weight = embedding.weight
    model = nn.Sequential(embedding, nn.Linear(IN, IN), nn.ReLU(), head)
    with torch.no_grad():
        model[1].bias.fill_(-100.0)  # nothing reaches the head
    dqt.quantize_(model, 4, {"*": 4, "1": None}, calibrate=torch.arange(30))
    assert isinstance(head.weight, QuantizedTensor)
    assert head.weight is embedding.weight
    assert head.weight.dequantize().isfinite().all()


def test_refusals() -> None:
    with pytest.raises(ConfigError, match="inputs of 0 hold NaN or Inf"):
        dqt.quantize_(nn.Sequential(nn.Linear(3, 3)), 4, calibrate=torch.tensor([[1.0, torch.nan, 0.0]]))
    with pytest.raises(ConfigError, match="reaches no"):
        dqt.quantize_(nn.Sequential(nn.Embedding(3, 3)), 4, {"0": 4}, calibrate=torch.arange(3))
    with pytest.raises(ConfigError, match="leave materialize out"):
        dqt.quantize_(
            nn.Sequential(nn.Linear(3, 3)), 4, calibrate=torch.ones(1, 3), materialize=lambda name: None
        )
