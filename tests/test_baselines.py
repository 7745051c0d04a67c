"""BitNet b1.58 equals its rule written out; FP32 and BF16 change nothing in a model."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dqt.baselines import BitLinear, bitnet_, ternarize
from dqt.build import autocast, build_optimizer, prepare_model_
from dqt.recipes import recipe_for


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(13, 8)
        self.up = nn.Linear(8, 12)
        self.down = nn.Linear(12, 8, bias=False)
        self.norm = nn.LayerNorm(8)
        self.lm_head = nn.Linear(8, 13, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        return self.lm_head(self.norm(x + self.down(self.up(x).relu())))


def written_out(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """BitNet's rounded input and weight, in float64."""
    x, weight = x.detach().double(), weight.detach().double()
    absmax = x.abs().amax(-1, keepdim=True)
    scale = weight.abs().mean()
    return (x * 127 / absmax).round() * absmax / 127, (weight / scale).round().clamp(-1, 1) * scale


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("leading", [(), (5,), (2, 3)])
def test_forward_and_straight_through_gradients(leading: tuple[int, ...], bias: bool) -> None:
    layer = nn.Linear(9, 6, bias=bias)
    layer.__class__ = BitLinear
    x = torch.randn(*leading, 9, requires_grad=True)
    y = layer(x)
    dy = torch.randn_like(y)
    y.backward(dy)
    x_q, weight_q = written_out(x, layer.weight)
    expected = F.linear(x_q, weight_q, layer.bias.double() if bias else None)
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-6)
    assert x.grad is not None
    assert layer.weight.grad is not None
    # The gradients are those of y = x̂ Ŵᵀ, passed on to x and W as if nothing had been rounded.
    torch.testing.assert_close(x.grad.double(), dy.double() @ weight_q, rtol=1e-5, atol=1e-6)
    rows = dy.reshape(-1, 6).double(), x_q.reshape(-1, 9)
    torch.testing.assert_close(layer.weight.grad.double(), rows[0].T @ rows[1], rtol=1e-5, atol=1e-6)


def test_ternarize() -> None:
    weight = torch.tensor([[0.1, -0.2, 1.0], [-1.1, 0.6, 0.0]])
    assert torch.equal(ternarize(weight).sign(), torch.tensor([[0.0, 0, 1], [-1, 1, 0]]))
    assert ternarize(weight).abs().max() == weight.abs().mean()
    assert torch.equal(ternarize(torch.zeros(2, 2)), torch.zeros(2, 2))
    assert torch.equal(ternarize(ternarize(weight)).sign(), ternarize(weight).sign())


def test_the_master_weight_is_float_and_the_head_is_left_alone() -> None:
    model = Toy()
    before = copy.deepcopy(model.state_dict())
    report = bitnet_(model)
    assert [type(m) for m in (model.up, model.down)] == [BitLinear, BitLinear]
    assert type(model.lm_head) is nn.Linear
    assert report.converted == []
    assert [entry.name for entry in report.left] == ["up.weight", "down.weight"]
    assert all("float master weight" in entry.reason for entry in report.left)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], value) for name, value in before.items())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_an_input_that_is_not_finite_reaches_the_output(bad: float) -> None:
    layer = nn.Linear(4, 3)
    layer.__class__ = BitLinear
    x = torch.randn(2, 4)
    x[0, 1] = bad
    y = layer(x)
    assert not y[0].isfinite().any()
    assert y[1].isfinite().all()


@pytest.mark.parametrize("method", ["fp32", "bf16", "bitnet"])
def test_the_baselines_learn(method: str) -> None:
    recipe = recipe_for(method)
    model = Toy()
    prepare_model_(model, recipe)
    optimizer = build_optimizer(model, recipe, lr=0.01)
    tokens = torch.arange(13)
    losses = []
    for _ in range(30):
        with autocast(recipe, "cpu"):
            logits = model(tokens)
        assert logits.dtype == (torch.bfloat16 if method == "bf16" else torch.float32)
        loss = F.cross_entropy(logits.float(), tokens.roll(1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]
    assert all(p.dtype == torch.float32 for p in model.parameters())


def test_fp32_trains_as_torch_does() -> None:
    recipe = recipe_for("fp32")
    model = Toy()
    other = copy.deepcopy(model)
    assert prepare_model_(model, recipe).converted == []
    pair = (
        (model, build_optimizer(model, recipe, lr=0.01)),
        (other, torch.optim.AdamW(other.parameters(), 0.01, recipe.betas, recipe.eps, weight_decay=0.0)),
    )
    tokens = torch.arange(13)
    for _ in range(5):
        for each, optimizer in pair:
            optimizer.zero_grad()
            F.cross_entropy(each(tokens), tokens.roll(1)).backward()
            optimizer.step()
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
