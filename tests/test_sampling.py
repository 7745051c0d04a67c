"""Sampling: a function of model, prompt and seed, in the model's own context, whatever the text's length."""

from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedModel

from dqt.data.tokenizer import TextTokenizer, train_tokenizer
from dqt.errors import ConfigError
from dqt.models import build_config, build_model
from dqt.sampling import continue_text, draw

LONGEST = 16


@pytest.fixture(scope="module")
def tokenizer() -> TextTokenizer:
    return train_tokenizer(["some text to learn a few tokens from, some text"], 270)


@pytest.fixture
def model(tokenizer: TextTokenizer) -> PreTrainedModel:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "initializer_range": 0.5}
    return build_model(build_config("micro", "llama", tokenizer.vocab_size, LONGEST, sizes), seed=0)


def greedy_by_recomputing(model: PreTrainedModel, tokenizer: TextTokenizer, prompt: str, tokens: int) -> str:
    """The likeliest continuation without any cache; only right while the text fits the longest sequence."""
    text = [tokenizer.end_id, *tokenizer.core.encode(prompt).ids]
    start = len(text)
    for _ in range(tokens):
        token = int(model(input_ids=torch.tensor([text])).logits[0, -1].argmax())
        if token == tokenizer.end_id:
            break
        text.append(token)
    return tokenizer.core.decode(text[start:])


def test_the_cache_changes_nothing(model: PreTrainedModel, tokenizer: TextTokenizer) -> None:
    expected = greedy_by_recomputing(model, tokenizer, "a", 10)
    result = continue_text(model, tokenizer, "a", 10, temperature=0)
    assert (result.text, result.tokens) == (expected, 10)
    assert result.speed().startswith("10 tokens in ")


@pytest.mark.parametrize("prompt", ["", "a", "some text " * 20])
def test_any_length_of_prompt_and_text(prompt: str, model: PreTrainedModel, tokenizer: TextTokenizer) -> None:
    lengths: list[int] = []
    model.register_forward_hook(
        lambda module, args, kwargs, output: lengths.append(output.past_key_values.get_seq_length()),
        with_kwargs=True,
    )
    assert continue_text(model, tokenizer, prompt, tokens=5 * LONGEST, seed=1).text
    assert max(lengths) <= LONGEST


def test_seed_and_state(model: PreTrainedModel, tokenizer: TextTokenizer) -> None:
    model.train()
    before = torch.get_rng_state()
    texts = [continue_text(model, tokenizer, "some", 10, 1.0, seed).text for seed in (3, 3, 4)]
    assert texts[0] == texts[1] != texts[2]
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training


@pytest.mark.parametrize("arguments", [{"tokens": 0}, {"temperature": -0.1}, {"temperature": float("nan")}])
def test_values_that_make_no_sense(
    arguments: dict[str, float], model: PreTrainedModel, tokenizer: TextTokenizer
) -> None:
    with pytest.raises(ConfigError, match="must be"):
        continue_text(model, tokenizer, **arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("temperature", [1e-30, 0.5, 1.0, 100.0])
def test_draws_follow_the_distribution(temperature: float) -> None:
    logits = torch.tensor([0.0, 1.0, 2.0, -torch.inf])
    generator = torch.Generator().manual_seed(0)
    drawn = [draw(logits, temperature, generator) for _ in range(2000)]
    expected = torch.softmax((logits - 2.0) / temperature, -1)
    shares = torch.bincount(torch.tensor(drawn), minlength=4) / len(drawn)
    torch.testing.assert_close(shares, expected, atol=0.04, rtol=0)
    assert draw(logits, 0, generator) == 2
