"""Evaluation against the definition: mean cross-entropy, and bits by bytes of text."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from dqt.data.sampler import fixed_windows
from dqt.data.shards import TokenShards
from dqt.errors import ConfigError, ModelError
from dqt.evaluate import evaluate
from dqt.models import build_config, build_model

WORDS = 50
MODEL = build_model(
    build_config(
        "micro",
        vocab_size=WORDS,
        seq_len=8,
        overrides={"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2},
    ),
    seed=0,
)
TOKENS = np.random.default_rng(0).integers(0, WORDS, 100)
TOKEN_BYTES = np.arange(WORDS, dtype=np.int32) % 4


@pytest.mark.parametrize("windows", [1, 5, None])
@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_equals_the_definition(windows: int | None, batch_size: int) -> None:
    result = evaluate(MODEL, TokenShards(TOKENS), 8, windows, token_bytes=TOKEN_BYTES, batch_size=batch_size)
    starts = fixed_windows(100, 8, windows or 100)
    rows = torch.from_numpy(np.stack([TOKENS[start : start + 9] for start in starts]))
    with torch.no_grad():
        logits = MODEL(input_ids=rows[:, :-1]).logits
    nats = F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten(), reduction="sum").item()
    text_bytes = int(TOKEN_BYTES[rows[:, 1:].numpy()].sum())
    assert (result.tokens, result.bytes) == (8 * len(starts), text_bytes)
    assert result.loss == pytest.approx(nats / result.tokens, rel=1e-5)
    assert result.bits_per_byte == pytest.approx(nats / math.log(2) / text_bytes, rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp(result.loss))


def test_short_text_is_one_window_and_too_short_text_is_refused() -> None:
    result = evaluate(MODEL, TokenShards(TOKENS[:4]), 8, token_bytes=TOKEN_BYTES)
    assert result.tokens == 3
    with pytest.raises(ConfigError, match="fewer than two tokens"):
        evaluate(MODEL, TokenShards(TOKENS[:1]), 8, token_bytes=TOKEN_BYTES)


def test_tokens_of_another_model_are_refused() -> None:
    with pytest.raises(ModelError, match="token 50 is not in the model's vocabulary of 50"):
        evaluate(MODEL, TokenShards(np.full(20, WORDS)), 8, token_bytes=np.ones(WORDS + 1, dtype=np.int32))


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_is_left_as_it_was_and_nothing_is_recorded(training: bool) -> None:
    MODEL.train(training)
    evaluate(MODEL, TokenShards(TOKENS), 8, 2, token_bytes=TOKEN_BYTES)
    assert MODEL.training is training
    assert all(parameter.grad is None for parameter in MODEL.parameters())


def test_text_without_bytes_has_no_bits_a_byte() -> None:
    result = evaluate(MODEL, TokenShards(TOKENS), 8, 2, token_bytes=np.zeros(WORDS, dtype=np.int32))
    assert math.isnan(result.bits_per_byte)
