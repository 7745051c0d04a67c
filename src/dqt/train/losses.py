"""Cross-entropy of a language model without its logits: the output head is applied to a few tokens at a time.

The logits of a step, in float32, are the largest tensor of a small model's training: 8 x 512 tokens with
32,000 words take 0.5 GB, and as much again for their gradient. Here a chunk's logits live until the next
chunk's: the gradients of the hidden states and of the head are computed in the forward pass, chunk by chunk
(as in Liger Kernel), and the backward pass only scales them. The price is that the forward pass does the
head's backward work even if `backward` is never called, unless gradients are off.

The head is called as a module, so a plain, a tied, a quantized or a baseline's head all work, under autocast
too.

Shapes: B sequences, S tokens, D width, V words.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dqt.sizes import CHUNK_LOGITS


def chunked_cross_entropy(
    hidden: Tensor, head: nn.Module, targets: Tensor, chunk_logits: int = CHUNK_LOGITS
) -> Tensor:
    """Mean cross-entropy of `head(hidden)`, equal to the plain loss, gradients included, up to rounding.

    Args:
        hidden: Float [..., D].
        head: Maps [tokens, D] to [tokens, V].
        targets: `int64` [...], as many as there are hidden states.
        chunk_logits: Logits to hold at a time.

    Returns:
        Scalar `float32`, in nats a token.
    """
    flat, wanted = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    rows = max(1, chunk_logits // _words(head))
    if torch.is_grad_enabled():
        parameters = [parameter for parameter in head.parameters() if parameter.requires_grad]
        if hidden.requires_grad or parameters:
            return _ChunkedCrossEntropy.apply(flat, head, wanted, rows, *parameters)
    return _mean([_sum_of_losses(head, h, t) for h, t in _chunks(flat, wanted, rows)], len(wanted))


def language_model_loss(model: nn.Module, tokens: Tensor, targets: Tensor | None = None) -> Tensor:
    """Mean cross-entropy of the next token, for a `transformers` causal language model.

    Args:
        model: The model; its `base_model` gives the hidden states, its output embeddings are the head.
        tokens: `int64` [B, S + 1]: inputs, and targets one further.
        targets: `int64` [B, S] in their place, -100 where a token is not learnt: those never reach the head.

    Returns:
        Scalar `float32`, in nats a token.
    """
    base, head = model.base_model, model.get_output_embeddings()  # type: ignore[operator]
    hidden = base(input_ids=tokens[:, :-1], use_cache=False).last_hidden_state  # type: ignore[operator]
    if targets is None:
        return chunked_cross_entropy(hidden, head, tokens[:, 1:])
    learnt = targets != -100
    return chunked_cross_entropy(hidden[learnt], head, targets[learnt])


def _words(head: nn.Module) -> int:
    weight = head.weight
    assert isinstance(weight, Tensor)
    return weight.shape[0]


def _chunks(hidden: Tensor, targets: Tensor, rows: int) -> list[tuple[Tensor, Tensor]]:
    return list(zip(hidden.split(rows), targets.split(rows), strict=True))


def _sum_of_losses(head: nn.Module, hidden: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(head(hidden).float(), targets, reduction="sum")


def _mean(sums: list[Tensor], count: int) -> Tensor:
    return torch.stack(sums).sum() / count


class _ChunkedCrossEntropy(torch.autograd.Function):
    """The head's parameters are arguments so that autograd routes their gradients; the module computes."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: nn.Module, targets: Tensor, rows: int, *parameters: Tensor
    ) -> Tensor:
        sums: list[Tensor] = []
        hidden_grad = torch.empty_like(hidden)
        parameter_grads: list[Tensor] = []
        for start in range(0, len(targets), rows):
            chunk = slice(start, start + rows)
            with torch.enable_grad():
                h = hidden[chunk].detach().requires_grad_()
                total = _sum_of_losses(head, h, targets[chunk])
                grads = torch.autograd.grad(total / len(targets), [h, *parameters])
            sums.append(total.detach())
            hidden_grad[chunk] = grads[0]
            if start == 0:
                parameter_grads = list(grads[1:])
            else:
                for accumulated, grad in zip(parameter_grads, grads[1:], strict=True):
                    accumulated += grad
        ctx.save_for_backward(hidden_grad, *parameter_grads)
        return _mean(sums, len(targets))

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        # In place: the saved tensors are ours, and a second backward pass is an error as everywhere in
        # autograd.
        hidden_grad, *parameter_grads = (grad.mul_(scale) for grad in ctx.saved_tensors)
        return hidden_grad, None, None, None, *parameter_grads
