"""Continues a prompt, one token at a time.

A loop of our own instead of `model.generate`: a dozen lines that draw from a generator of their own, so that
a text is a function of (model, prompt, seed) and nothing else's random numbers move. Keys and values are kept
between tokens; where the text outgrows the model's longest sequence, its second half is read again, which
costs one forward pass each half sequence. A single token is multiplied with the packed weights as they are
(`dqt.nn`), so that generation reads a quarter of a byte for a ternary weight.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dqt.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from dqt.data.tokenizer import TextTokenizer


@dataclass(frozen=True)
class Continuation:
    """What followed a prompt.

    Attributes:
        text: Without the prompt.
        tokens: How many were drawn.
        seconds: What it took, reading the prompt included.
    """

    text: str
    tokens: int
    seconds: float

    def speed(self) -> str:
        """One line for people."""
        return f"{self.tokens} tokens in {self.seconds:.1f} s: {self.tokens / self.seconds:.0f} tokens/s"


@torch.no_grad()
def continue_text(
    model: PreTrainedModel,
    tokenizer: TextTokenizer,
    prompt: str = "",
    tokens: int = 100,
    temperature: float = 0.8,
    seed: int = 0,
) -> Continuation:
    """Continues a prompt; the text may end before `tokens`, where the document does.

    Args:
        model: A causal language model on any device; its mode (training or not) is left as it was.
        tokenizer: The tokenizer that it was trained with.
        prompt: Any text; an empty one asks for the beginning of a document.
        tokens: At most as many new tokens.
        temperature: 0 always takes the likeliest token, 1 draws from the model's distribution.
        seed: Of the draws.

    Raises:
        ConfigError: If tokens or temperature make no sense.
    """
    if tokens < 1:
        raise ConfigError(f"the number of tokens must be at least 1, not {tokens}")
    if not 0 <= temperature <= 100:
        raise ConfigError(f"the temperature must be between 0 (greedy) and 100, not {temperature}")
    text = [tokenizer.end_id, *tokenizer.core.encode(prompt, add_special_tokens=False).ids]
    prompt_length = len(text)
    longest = model.config.max_position_embeddings
    generator = torch.Generator().manual_seed(seed)
    was_training = model.training
    drawn, started = 0, time.perf_counter()
    model.eval()
    try:
        unread, cache, cached = text[-longest:], None, 0
        for _ in range(tokens):
            if cached + len(unread) > longest:
                unread, cache, cached = text[-max(1, longest // 2) :], None, 0
            ids = torch.tensor([unread], device=model.device)
            output = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache, cached = output.past_key_values, cached + len(unread)
            token = draw(output.logits[0, -1].float().cpu(), temperature, generator)
            drawn += 1
            if token == tokenizer.end_id:
                break
            text.append(token)
            unread = [token]
    finally:
        model.train(was_training)
    seconds = time.perf_counter() - started
    return Continuation(tokenizer.core.decode(text[prompt_length:]), drawn, seconds)


def draw(logits: Tensor, temperature: float, generator: torch.Generator) -> int:
    """Draws a token from logits [vocabulary]; the likeliest at temperature 0."""
    if temperature == 0:
        return int(logits.argmax())
    probabilities = torch.softmax((logits - logits.max()) / temperature, dim=-1)
    return int(torch.multinomial(probabilities, 1, generator=generator))
