"""The paper's environments and computed bits: what a linear layer multiplies, rounds and keeps in each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import dqt
from dqt.baselines import ternarize
from dqt.build import autocast, build_optimizer
from dqt.choices import Products
from dqt.errors import ConfigError
from dqt.export.source import Source, without_masters
from dqt.models import build_config, build_with_recipe
from dqt.numerics.float8 import E4M3, E5M2, quantize_float8
from dqt.ops.bf16_guard import ensure_bf16_products
from dqt.recipes import recipe_for
from dqt.tensor import QuantizedTensor
from dqt.train.losses import language_model_loss

FP8 = Products("fp8", "fp8", "fp8", gradient="fp8")
TOKENS, IN, OUT = 7, 200, 30


def make_layer(bits: str, products: Products, per_row: bool = False) -> tuple[nn.Linear, QuantizedTensor]:
    torch.manual_seed(5)
    layer = nn.Linear(IN, OUT)
    dqt.quantize_(nn.Sequential(layer), bits, per_row=per_row, products=products)
    assert isinstance(layer.weight, QuantizedTensor)
    return layer, layer.weight


def dequantized(x: Tensor, dtype: torch.dtype) -> Tensor:
    codes, scale = quantize_float8(x, dtype)
    return codes.double() * scale.double()[:, None]


@pytest.mark.parametrize("bits", ["1", "ternary", "8"])
@pytest.mark.parametrize("per_row", [False, True])
def test_fp8_products_are_those_of_float8_numbers(bits: str, per_row: bool) -> None:
    """In float64: y from x in e4m3, dx from dy in e5m2, dW from dy times the scale of x in e5m2."""
    layer, weight = make_layer(bits, FP8, per_row)
    x = torch.randn(TOKENS, IN, requires_grad=True)
    dy = torch.randn(TOKENS, OUT)
    y = layer(x)
    y.backward(dy)
    w = (weight.unpack().double() - weight.format.offset) * weight.scale.double()
    x8 = dequantized(x.detach(), E4M3)
    torch.testing.assert_close(y.double(), F.linear(x8, w, layer.bias.double()), rtol=1e-5, atol=1e-5)
    scale = weight.scale.flatten() if per_row else torch.ones(OUT)
    codes = w / scale.double()[:, None]
    assert x.grad is not None
    dx = dequantized(dy * scale, E5M2) @ codes
    torch.testing.assert_close(x.grad.double(), dx, rtol=1e-5, atol=1e-5)
    codes8, x_scale = quantize_float8(x.detach(), E4M3)
    grad = dequantized((dy * x_scale[:, None]).T, E5M2) @ codes8.double()
    blocks = F.pad(grad.float(), (0, 56)).view(-1, 128)
    rounded = dequantized(blocks, E4M3).view(OUT, -1)[:, :IN]
    assert weight.grad is not None
    assert weight.grad.dtype == torch.float32
    # Where float32 and float64 sums lie on two sides of a boundary, they are a step of e4m3 apart.
    error = (weight.grad.double() - rounded).abs()
    assert (error > 1e-5 * rounded.abs()).double().mean() < 0.01
    assert (error <= 0.13 * rounded.abs() + 1e-6).all()


@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
def test_what_is_not_finite_stays_so(bad: float) -> None:
    """torch's own cast makes 448 of Inf."""
    layer, _ = make_layer("4", FP8)
    x = torch.randn(TOKENS, IN)
    x[3, 4] = bad
    y = layer(x)
    assert y[3].isnan().all()
    assert y[[0, 1, 2, 4, 5, 6]].isfinite().all()


def test_fp8_goes_alone() -> None:
    with pytest.raises(ConfigError, match="set forward, grad_input and grad_weight all to fp8"):
        Products(forward="fp8")
    with pytest.raises(ConfigError, match="did you mean 'ternary'"):
        Products(compute_bits="ternery")


@pytest.mark.parametrize("kinds", [("int8",) * 3, ("float",) * 3, ("fp8",) * 3])
@pytest.mark.parametrize("bits", ["4", "8"])
def test_computed_ternary_is_bitnet_s_of_what_is_stored(bits: str, kinds: tuple[str, str, str]) -> None:
    layer, weight = make_layer(bits, Products(*kinds, compute_bits="ternary"))
    plain, other = make_layer(bits, Products(*kinds))
    ternary = ternarize(weight.dequantize())
    assert len(ternary.unique()) == 3
    # The same products of a layer that stores these very values.
    codes = torch.round(ternary / ternary.max()).to(torch.int64)
    other.write_codes(codes)
    other.scale.copy_(ternary.max())
    x = torch.randn(TOKENS, IN)
    results = []
    for module in (layer, plain):
        inputs = x.clone().requires_grad_()
        y = module(inputs)
        y.square().sum().backward()
        results.append((y, inputs.grad, module.weight.grad))
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-4)
    with torch.no_grad():  # a single token too, which has a path of its own
        torch.testing.assert_close(layer(x[:1]), plain(x[:1]), rtol=1e-5, atol=1e-5)


def test_computed_ternary_survives_zeros() -> None:
    layer, weight = make_layer("8", Products(compute_bits="ternary"))
    weight.write_codes(torch.zeros(OUT, IN, dtype=torch.int64))
    assert torch.equal(layer(torch.randn(2, IN)), layer.bias.expand(2, OUT))


# Settings, and the state of linear weights and of embeddings: first moment, second moment.
RECIPES: list[tuple[dict[str, Any], tuple[Any, Any], tuple[Any, Any]]] = [
    ({"environment": "bf16"}, (torch.bfloat16, None), (torch.bfloat16, torch.bfloat16)),
    (
        {"environment": "bf16", "second_moment": "full"},
        (torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.bfloat16),
    ),
    ({"environment": "fp8"}, (E4M3, None), (E4M3, E4M3)),
    ({"environment": "fp8", "second_moment": "int8"}, (E4M3, torch.uint8), (E4M3, E4M3)),
    ({"environment": "bf16", "method": "residual"}, (None, None), (torch.bfloat16, torch.bfloat16)),
    ({"environment": "bf16", "optimizer": "sgd"}, (torch.bfloat16, None), (torch.bfloat16, None)),
    ({"environment": "fp8", "optimizer": "adafactor"}, (None, None), (None, None)),
]


@pytest.mark.parametrize(("settings", "low_bit", "plain"), RECIPES)
def test_a_step_in_each_environment(
    settings: dict[str, Any], low_bit: tuple[Any, Any], plain: tuple[Any, Any]
) -> None:
    ensure_bf16_products()
    recipe = recipe_for(**{"method": "strict", "bits": 4, **settings})
    model, _ = build_with_recipe(build_config("micro", seq_len=12, vocab_size=60), recipe)
    optimizer = build_optimizer(model, recipe)
    tokens = torch.arange(26).view(2, 13)
    losses = []
    for _ in range(3):
        with autocast(recipe, "cpu"):
            loss = language_model_loss(model, tokens)
        loss.backward()
        losses.append(loss.item())
        for name, parameter in model.named_parameters():
            if isinstance(parameter, QuantizedTensor) and recipe.environment == "bf16":
                assert parameter.grad is not None
                assert torch.equal(parameter.grad, parameter.grad.bfloat16().float()), name
        optimizer.step()
        optimizer.zero_grad()
    assert losses[2] < losses[0]
    layer = model.model.layers[0].mlp.up_proj
    for parameter, expected in ((layer.weight, low_bit), (model.model.embed_tokens.weight, plain)):
        state = optimizer.state[parameter]
        found = tuple(state[key].dtype if key in state else None for key in ("exp_avg", "exp_avg_sq"))
        assert found == expected


def test_environments_end_close_to_float32() -> None:
    """A few steps of one model: low precision must not change what is learned."""
    ensure_bf16_products()
    tokens = torch.randint(60, (4, 25), generator=torch.Generator().manual_seed(0))
    losses = {}
    for environment in ("fp32", "bf16", "fp8"):
        recipe = recipe_for("strict", 8, environment=environment)
        model, _ = build_with_recipe(build_config("micro", seq_len=24, vocab_size=60), recipe, seed=1)
        optimizer = build_optimizer(model, recipe, lr=3e-3)
        for _ in range(10):
            with autocast(recipe, "cpu"):
                loss = language_model_loss(model, tokens)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        losses[environment] = loss.item()
    assert losses["fp32"] < 3.7  # from ln 60 = 4.09
    assert losses["bf16"] == pytest.approx(losses["fp32"], abs=0.05)
    assert losses["fp8"] == pytest.approx(losses["fp32"], abs=0.05)


def test_a_model_is_exported_with_the_ternary_weights_that_it_computes_with() -> None:
    recipe = recipe_for("strict", 8, products=Products(compute_bits="ternary"))
    model, _ = build_with_recipe(build_config("micro", seq_len=12, vocab_size=60), recipe)
    source = Source(Path(), model.eval(), None, {})  # type: ignore[arg-type]
    exported = without_masters(source).model
    weight = exported.model.layers[0].mlp.up_proj.weight
    assert isinstance(weight, QuantizedTensor)
    assert (str(weight.format), weight.products) == ("ternary", Products())
    tokens = torch.arange(12)[None]
    with torch.no_grad():
        torch.testing.assert_close(exported(tokens).logits, model(tokens).logits, rtol=1e-5, atol=1e-5)
    assert model.model.layers[0].mlp.up_proj.weight.format.bits == 8
