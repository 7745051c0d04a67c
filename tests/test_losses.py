"""The chunked loss equals the plain one, gradients included, for every kind of head."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dqt.models import build_config, build_model
from dqt.quantize import quantize_
from dqt.train.losses import chunked_cross_entropy, language_model_loss

MICRO = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}


def micro_model(tied: bool, bits: str | None, head_bits: str | None) -> nn.Module:
    overrides = {**MICRO, "tie_word_embeddings": tied}
    model = build_model(build_config("micro", vocab_size=101, seq_len=16, overrides=overrides), seed=0)
    if bits:
        quantize_(model, bits, {"lm_head": head_bits} if head_bits else None)
    return model


def plain_loss(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    logits = model(input_ids=tokens[:, :-1], use_cache=False).logits
    return F.cross_entropy(logits.float().reshape(-1, logits.shape[-1]), tokens[:, 1:].reshape(-1))


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(
    ("tied", "bits", "head_bits"),
    [(False, None, None), (True, None, None), (True, "ternary", None), (False, "8", "8")],
)
def test_loss_and_gradients_equal_the_plain_ones(
    tied: bool, bits: str | None, head_bits: str | None, autocast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dqt.train.losses.chunked_cross_entropy.__defaults__", (7 * 101,))  # 7 tokens a chunk
    model = micro_model(tied, bits, head_bits)
    tokens = torch.randint(101, (3, 17), generator=torch.Generator().manual_seed(1))
    results = []
    for loss_of in (plain_loss, language_model_loss):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            loss = loss_of(model, tokens)
        (loss / 2).backward()  # as under accumulation: the incoming gradient is not 1
        results.append((loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}))
        model.zero_grad()
    (plain, plain_grads), (chunked, chunked_grads) = results
    tolerance = 3e-2 if autocast else 2e-5
    torch.testing.assert_close(chunked, plain, rtol=tolerance, atol=0)
    for name, grad in plain_grads.items():
        error = (chunked_grads[name] - grad).norm() / grad.norm()
        assert error < (3e-2 if autocast or bits else tolerance), (name, error)


def test_gradient_accumulates_over_backward_passes() -> None:
    head = nn.Linear(4, 5, bias=True)
    hidden = torch.randn(6, 4, generator=torch.Generator().manual_seed(0), requires_grad=True)
    targets = torch.tensor([0, 1, 2, 3, 4, 0])
    for _ in range(2):
        chunked_cross_entropy(hidden, head, targets, chunk_logits=10).backward()
    expected = torch.autograd.grad(
        2 * F.cross_entropy(head(hidden), targets), [hidden, head.weight, head.bias]
    )
    for actual, wanted in zip((hidden.grad, head.weight.grad, head.bias.grad), expected, strict=True):
        torch.testing.assert_close(actual, wanted)


def test_without_gradients_nothing_is_kept() -> None:
    head = nn.Linear(4, 5)
    with torch.no_grad():
        loss = chunked_cross_entropy(
            torch.randn(6, 4), head, torch.zeros(6, dtype=torch.int64), chunk_logits=5
        )
    assert not loss.requires_grad
    frozen = nn.Linear(4, 5).requires_grad_(False)
    assert not chunked_cross_entropy(
        torch.randn(6, 4), frozen, torch.zeros(6, dtype=torch.int64)
    ).requires_grad


def test_the_logits_are_never_whole() -> None:
    """The largest tensor that the head makes is a chunk's."""
    seen: list[int] = []
    head = nn.Linear(4, 50)
    head.register_forward_hook(lambda module, inputs, output: seen.append(output.numel()))
    chunked_cross_entropy(
        torch.randn(64, 4, requires_grad=True), head, torch.zeros(64, dtype=torch.int64), 500
    )
    assert sum(seen) == 64 * 50
    assert max(seen) <= 500


def test_a_second_backward_pass_is_refused() -> None:
    head = nn.Linear(4, 5)
    loss = chunked_cross_entropy(torch.randn(6, 4), head, torch.zeros(6, dtype=torch.int64))
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()
