"""Loss of a model on text: nats a token, perplexity, and bits a byte.

Nats a token compare only runs with one tokenizer; bits a byte compare all. Text is read in windows that do
not overlap, at fixed places, so that two models see the same tokens in the same contexts; a window's first
tokens have little context, which costs the same for all.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from dqt.data.sampler import IGNORED, ConversationSampler, fixed_windows
from dqt.data.shards import TokenShards
from dqt.errors import ConfigError, ModelError
from dqt.train.losses import language_model_loss


@dataclass(frozen=True)
class Evaluation:
    """A model's loss on text.

    Attributes:
        loss: Mean cross-entropy in nats a token.
        bits_per_byte: Cross-entropy in bits a byte of text; NaN if the tokens stand for no bytes.
        tokens: How many tokens were predicted.
        bytes: How many bytes of text they stand for.
    """

    loss: float
    bits_per_byte: float
    tokens: int
    bytes: int

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return math.exp(self.loss) if self.loss < 700 else math.inf


@torch.no_grad()
def evaluate(
    model: nn.Module,
    shards: TokenShards,
    seq_len: int,
    windows: int | None = None,
    *,
    token_bytes: np.ndarray,
    batch_size: int = 8,
    autocast: contextlib.AbstractContextManager[object] | None = None,
) -> Evaluation:
    """Measures a `transformers` causal language model on tokens.

    Args:
        model: The model; its mode (training or not) is left as it was.
        shards: The tokens.
        seq_len: Tokens in a window; text shorter than that is one window.
        windows: How many windows, evenly spaced; None takes all that fit, which leaves out less than one.
        token_bytes: `int32` [vocabulary], bytes that each token stands for.
        batch_size: Windows at a time.
        autocast: A reusable context for the forward passes.

    Raises:
        ConfigError: If there are fewer than two tokens.
        ModelError: If a token is not in the model's vocabulary.
    """
    if len(shards) < 2:
        raise ConfigError("text of fewer than two tokens has nothing to predict: give more text")
    read = _conversations if shards.marks is not None else _texts
    device = next(model.parameters()).device
    vocab_size = int(model.config.vocab_size)  # type: ignore[union-attr,arg-type]
    nats, tokens, text_bytes = 0.0, 0, 0
    was_training = model.training
    model.eval()
    try:
        for rows, targets in read(shards, seq_len, windows, batch_size):
            if rows.max() >= vocab_size:
                raise ModelError(
                    f"token {int(rows.max())} is not in the model's vocabulary of {vocab_size}: "
                    "the text was tokenized for another model"
                )
            with autocast or contextlib.nullcontext():
                loss = language_model_loss(
                    model, rows.to(device), None if shards.marks is None else targets.to(device)
                )
            learnt = targets[targets != IGNORED].numpy()
            nats += float(loss) * learnt.size
            tokens += learnt.size
            text_bytes += int(token_bytes[learnt].sum())
    finally:
        model.train(was_training)
    bits_per_byte = nats / math.log(2) / text_bytes if text_bytes else math.nan
    return Evaluation(nats / tokens, bits_per_byte, tokens, text_bytes)


def _texts(
    shards: TokenShards, seq_len: int, windows: int | None, size: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Windows of text and their targets."""
    seq_len = min(seq_len, len(shards) - 1)
    for batch in _batches(fixed_windows(len(shards), seq_len, windows or len(shards) // seq_len + 1), size):
        rows = torch.from_numpy(np.stack([shards.read(start, seq_len + 1) for start in batch]))
        yield rows, rows[:, 1:]


def _conversations(
    shards: TokenShards, seq_len: int, windows: int | None, size: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Conversations and their targets, the answers."""
    assert shards.marks is not None
    sampler = ConversationSampler(shards.marks, seq_len, seed=0)
    for batch in _batches(sampler.fixed(windows or sampler.windows), size):
        yield sampler.rows(shards, batch)


def _batches(starts: Sequence[int], size: int) -> list[Sequence[int]]:
    return [starts[first : first + size] for first in range(0, len(starts), size)]
