"""Fused layers compute what the plain ones do, forward and backward, and fall back where they do not fit."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

import dqt
from dqt import fused as fused_module
from dqt import nn as nn_module
from dqt import ops
from dqt.choices import FLOAT_PRODUCTS
from dqt.errors import ConfigError
from dqt.fused import fuse_
from dqt.models import build_config, build_model
from dqt.ops import activations, attention, reference
from dqt.train.losses import language_model_loss

ARCHITECTURES = ("llama", "bitnet")


def small_model(arch: str, bits: str | None = "ternary", **quantize: Any) -> nn.Module:
    config = build_config(
        "micro", arch, vocab_size=64, seq_len=32, overrides={"hidden_size": 64, "intermediate_size": 96}
    )
    model = build_model(config, seed=0, init_gain=1.0)
    if bits is not None:
        dqt.quantize_(model, bits, **quantize)
    return model


def tokens() -> Tensor:
    return torch.randint(0, 64, (2, 17), generator=torch.Generator().manual_seed(1))


def gradients(one: nn.Module, other: nn.Module) -> Iterator[tuple[str, Tensor, Tensor]]:
    for (name, a), (_, b) in zip(one.named_parameters(), other.named_parameters(), strict=True):
        assert a.grad is not None, name
        assert b.grad is not None, name
        yield name, a.grad, b.grad


def test_exponential_is_within_two_units_in_the_last_place() -> None:
    x = torch.linspace(-64, 64, 100_001)
    exact = x.double().exp()
    assert ((reference.exponential(x).double() - exact) / exact).abs().max() < 2 * 2**-23
    outside = reference.exponential(torch.tensor([-1e9, -torch.inf, 1e9, torch.inf, torch.nan]))
    assert outside[:2].tolist() == pytest.approx([math.exp(-64)] * 2, rel=1e-6)
    assert outside[2:4].tolist() == pytest.approx([math.exp(64)] * 2, rel=1e-6)
    assert outside[4].isnan()


def plain_norm(x: Tensor, weight: Tensor) -> Tensor:
    return weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


def plain_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return apply_rotary_pos_emb(x, x, cos[None], sin[None], unsqueeze_dim=2)[0]


def test_fma_rounds_once() -> None:
    """Against exact fractions, at the places where rounding the product first gives something else."""
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 2000, generator=generator)
    product = a * b
    # Near cancellation, next to a tie of the sum, and of very different size.
    for c in (-product, product * 2.0**24, torch.randn(2000, generator=generator), product * -(2.0**-30)):
        ours = reference.fma(a, b, c)
        for x, y, z, got in zip(a.tolist(), b.tolist(), c.tolist(), ours.tolist(), strict=True):
            exact = Fraction(x) * Fraction(y) + Fraction(z)
            below, above = (
                torch.tensor(got).nextafter(torch.tensor(end)).item() for end in (-math.inf, math.inf)
            )
            error = abs(Fraction(got) - exact)
            assert error <= min(abs(Fraction(below) - exact), abs(Fraction(above) - exact))
    assert (reference.fma(a, b, -product) != 0).any()
    assert reference.fma(*torch.tensor([[torch.inf], [0.0], [1.0]])).isnan()


@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (4, 2)])
def test_attention_and_its_gradients_equal_float64_autograd(heads: int, kv_heads: int) -> None:
    generator = torch.Generator().manual_seed(0)
    query, dout = torch.randn(2, 2, 100, heads, 16, generator=generator) * 2
    key, value = torch.randn(2, 2, 100, kv_heads, 16, generator=generator) * 2
    out, top, inverse = attention.causal_attention(query, key, value, 0.25)
    grads = attention.causal_attention_backward(dout, query, key, value, out, top, inverse, 0.25)
    exact = [x.double().transpose(1, 2).requires_grad_() for x in (query, key, value)]
    attended = F.scaled_dot_product_attention(*exact, is_causal=True, scale=0.25, enable_gqa=True)
    torch.testing.assert_close(out.double(), attended.transpose(1, 2), rtol=0, atol=1e-5)
    exact_grads = torch.autograd.grad(attended, exact, dout.double().transpose(1, 2))
    for ours, theirs in zip(grads, exact_grads, strict=True):
        torch.testing.assert_close(ours.double(), theirs.transpose(1, 2), rtol=0, atol=1e-4)


def test_attention_passes_a_nan_on_and_refuses_what_does_not_fit() -> None:
    query, key = torch.ones(1, 60, 4, 8), torch.ones(1, 60, 2, 8)
    key[0, 10] = torch.nan
    out = attention.causal_attention(query, key, key.nan_to_num(), 1.0)[0]
    assert out[0, 10:].isnan().all()
    assert out[0, :10].isfinite().all()
    for wrong in (key[:, :9], key[..., :4], torch.ones(1, 60, 3, 8), key.double()):
        with pytest.raises(ConfigError, match="causal_attention"):
            attention.causal_attention(query, wrong, wrong, 1.0)
    with pytest.raises(ConfigError, match="no size may be zero"):
        attention.causal_attention(query[:, :0], key[:, :0], key[:, :0], 1.0)


def test_other_attention_than_plain_causal_is_left_to_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache, padding and another implementation; and without kernels torch's is faster."""
    called: list[bool] = []
    original = fused_module.causal_attention
    monkeypatch.setattr(
        fused_module, "causal_attention", lambda *args: (called.append(True), original(*args))[1]
    )
    ids, padding = tokens(), torch.ones(2, 17, dtype=torch.long)
    padding[0, :3] = 0
    for own, implementation, call, ours in (
        (True, "sdpa", {"use_cache": False}, True),
        (True, "sdpa", {"use_cache": True}, False),
        (True, "sdpa", {"use_cache": False, "attention_mask": padding}, False),
        (True, "eager", {"use_cache": False}, False),
        (False, "sdpa", {"use_cache": False}, False),
    ):
        monkeypatch.setattr(fused_module, "is_fast", lambda own=own: own)
        model = small_model("llama")
        model.set_attn_implementation(implementation)
        fuse_(model)
        called.clear()
        model(ids, **call)
        assert bool(called) == ours, (own, implementation, call)


def test_operations_and_their_gradients_equal_float64_autograd() -> None:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    x, weight, gate, up = normal(37, 50), normal(50), normal(37, 50) * 4, normal(37, 50)
    heads, cos, sin = normal(2, 5, 3, 8), normal(5, 8), normal(5, 8)
    dy, dheads = normal(37, 50), normal(2, 5, 3, 8)
    y, rstd = reference.rms_norm(x, weight, 1e-6)
    cases: list[tuple[Callable[..., Tensor], tuple[Tensor, ...], Tensor, Tensor, tuple[Tensor, ...]]] = [
        (plain_norm, (x, weight), dy, y, reference.rms_norm_backward(dy, x, weight, rstd)),
        (
            lambda g, u: F.silu(g) * u,
            (gate, up),
            dy,
            reference.swiglu(gate, up),
            reference.swiglu_backward(dy, gate, up),
        ),
        (
            lambda h: plain_rotary(h, cos.double(), sin.double()),
            (heads,),
            dheads,
            reference.rotary(heads, cos, sin),
            (reference.rotary(dheads, cos, sin, transposed=True),),
        ),
    ]
    for function, inputs, grad, output, grads in cases:
        exact_inputs = [t.double().requires_grad_() for t in inputs]
        exact = function(*exact_inputs)
        torch.testing.assert_close(output.double(), exact, rtol=2e-6, atol=2e-6)
        for ours, theirs in zip(grads, torch.autograd.grad(exact, exact_inputs, grad.double()), strict=True):
            torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_fused_model_with_float_products_is_the_plain_one(arch: str) -> None:
    plain = small_model(arch, products=FLOAT_PRODUCTS)
    fused = copy.deepcopy(plain)
    assert len(fuse_(fused)) == (9 if arch == "llama" else 13)
    losses = [language_model_loss(model, tokens()) for model in (plain, fused)]
    torch.testing.assert_close(*losses, rtol=1e-6, atol=0)
    for loss in losses:
        loss.backward()
    for name, one, other in gradients(plain, fused):
        torch.testing.assert_close(other, one, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("bits", ["ternary", "8"])
def test_a_fused_integer_model_differs_by_rounding_only(arch: str, bits: str) -> None:
    """Activations near the middle of two int8 values may fall to either side."""
    plain = small_model(arch, bits)
    fused = copy.deepcopy(plain)
    fuse_(fused)
    losses = [language_model_loss(model, tokens()) for model in (plain, fused)]
    torch.testing.assert_close(*losses, rtol=1e-4, atol=0)
    for loss in losses:
        loss.backward()
    for name, one, other in gradients(plain, fused):
        assert torch.linalg.vector_norm(other - one) < 0.02 * torch.linalg.vector_norm(one), name


@pytest.mark.parametrize("bits", ["1", "ternary", "4"])
def test_a_few_tokens_of_a_fused_block_stay_packed_and_give_the_same(
    bits: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    block = small_model("llama", bits).model.layers[0].mlp
    fuse_(block)
    x = torch.randn(1, 2, 64, generator=torch.Generator().manual_seed(3))
    unpacked = block(x).detach()
    monkeypatch.setattr(nn_module.ops, "unpack", lambda *args: pytest.fail("unpacked a weight"))
    with torch.no_grad():
        assert torch.equal(block(x), unpacked)


def test_a_fused_model_is_saved_copied_and_generates_as_the_plain_one() -> None:
    plain = small_model("llama").eval()
    fused = copy.deepcopy(plain)
    fuse_(fused)
    fused = copy.deepcopy(fused)
    assert fused.state_dict().keys() == plain.state_dict().keys()
    with torch.no_grad():
        outputs = [
            model.generate(tokens()[:, :5], max_new_tokens=8, do_sample=False) for model in (plain, fused)
        ]
    assert torch.equal(*outputs)


def test_what_does_not_fit_runs_as_before() -> None:
    on_the_grid = small_model("llama", rules={"*norm": 8})
    assert not [name for name in fuse_(on_the_grid) if "norm" in name]
    assert fuse_(nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3))) == []
    plain = small_model("llama", None)
    fused = copy.deepcopy(plain)
    fuse_(fused)
    for model in (plain, fused):
        model.double()
    losses = [language_model_loss(model, tokens()).item() for model in (plain, fused)]
    assert losses[0] == losses[1], "in float64 the plain forward runs"


def test_query_key_and_value_share_one_quantization(monkeypatch: pytest.MonkeyPatch) -> None:
    quantized: list[tuple[int, ...]] = []

    def counted(x: Tensor) -> tuple[Tensor, Tensor]:
        quantized.append(tuple(x.shape))
        return reference.quantize_rows(x)

    monkeypatch.setattr(ops, "quantize_rows", counted)
    model = small_model("llama")
    fuse_(model)
    model(tokens())
    # In each of two layers: once for q, k and v, once for o, once for gate and up; down's is part of SwiGLU.
    assert len(quantized) == 2 * 3


def test_a_changed_input_is_quantized_again() -> None:
    linear = nn.Linear(8, 4, bias=False)
    dqt.quantize_(nn.Sequential(linear), "ternary")
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    before = linear(x)
    x.mul_(2.0)
    torch.testing.assert_close(linear(x), before * 2)
    x.data.mul_(2.0)  # of which no version counter hears
    torch.testing.assert_close(linear(x), before * 4)
    assert not vars(x)


def test_inference_mode_runs() -> None:
    model = small_model("llama").eval()
    fuse_(model)
    with torch.no_grad():
        expected = model(tokens()).logits
    with torch.inference_mode():
        assert torch.equal(model(tokens()).logits, expected)


def test_a_nan_reaches_the_result() -> None:
    bad = torch.ones(3, 8)
    bad[1, 2] = torch.nan
    assert activations.swiglu(bad, torch.ones(3, 8))[1, 2].isnan()
    assert activations.swiglu_quantized(bad, torch.ones(3, 8))[1].isnan().tolist() == [False, True, False]
    assert activations.rms_norm(bad, torch.ones(8), 1e-6)[0][1].isnan().all()
