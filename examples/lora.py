"""LoRA over frozen 4-bit weights: train adapters with `peft`, keep them apart, or merge them onto the grid.

A small LLaMA first learns the source of Python's json package in 4 bits; then adapters learn another text
while the packed weights stand still. Merging rounds stochastically, so that no float weight appears.

Wants `pip install 'dqt[lora]'`.

    python examples/lora.py [DIRECTORY]
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

import peft
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import dqt

LENGTH = 64
SIZES = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}


def windows(path: Path) -> torch.Tensor:
    """The bytes of a text, in pieces."""
    text = torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8).long()
    return text.unfold(0, LENGTH, LENGTH)


def train(model: nn.Module, parameters: Iterable, text: torch.Tensor, steps: int, lr: float) -> None:
    """Some steps on random pieces."""
    optimizer = dqt.optim.AdamW(parameters, lr=lr, seed=0)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        batch = text[torch.randint(len(text), (8,), generator=generator)]
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def loss(model: nn.Module, text: torch.Tensor) -> float:
    """Nats a byte."""
    return model(input_ids=text[:16], labels=text[:16]).loss.item()


def main(directory: Path) -> None:
    """Trains, and prints the loss on the second text after each step."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=256, max_position_embeddings=LENGTH, **SIZES))
    dqt.quantize_(model, bits=4)
    train(model, model.named_parameters(), windows(Path(json.__file__).with_name("decoder.py")), 40, 4e-3)

    text = windows(Path(argparse.__file__))
    print(f"packed weights: {loss(model, text):.3f} nats a byte")
    model = peft.get_peft_model(model, peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    print(f"adapters: {sum(p.numel() for _, p in trainable):,} floats over frozen packed weights")
    train(model, trainable, text, 40, 5e-3)
    print(f"with adapters: {loss(model, text):.3f}")
    model.save_pretrained(directory)  # kept apart: peft's own files, a few hundred kilobytes
    merged = dqt.merge_lora(model, seed=0)
    print(f"merged onto the grid: {loss(merged, text):.3f}")
    print(f"codes of a layer: {merged.model.layers[0].mlp.up_proj.weight.unpack().unique().tolist()}")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        main(Path(sys.argv[1]) if sys.argv[1:] else Path(folder))
