"""Your own module in 4 bits: quantize it, train it, look at what it holds.

A network that guesses the next byte from the eight before it, trained on the source of Python's json package.
Every `nn.Linear` becomes 4-bit integers but the last, which gets 8; the embedding stays float. No float copy
of a low-bit weight exists at any time.

    python examples/quantize_module.py
"""

import json
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

import dqt

CONTEXT, WIDTH, STEPS = 8, 128, 100


class NextByte(nn.Module):
    """Embeds eight bytes, and guesses the ninth."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(256, 16)
        self.hidden = nn.ModuleList([nn.Linear(CONTEXT * 16, WIDTH), nn.Linear(WIDTH, WIDTH)])
        self.head = nn.Linear(WIDTH, 256)

    def forward(self, context: torch.Tensor) -> torch.Tensor:
        """Bytes [batch, CONTEXT] to logits [batch, 256]."""
        x = self.embed(context).flatten(1)
        for layer in self.hidden:
            x = F.gelu(layer(x))
        return self.head(x)


def main() -> None:
    """Trains and prints."""
    torch.manual_seed(0)
    folder = Path(json.__file__).parent
    text = torch.frombuffer(bytearray((folder / "decoder.py").read_bytes()), dtype=torch.uint8).long()
    windows = text.unfold(0, CONTEXT + 1, 1)

    model = NextByte()
    print(dqt.quantize_(model, bits=4, rules={"head": 8}))
    optimizer = dqt.optim.AdamW(model.named_parameters(), lr=3e-3, seed=0)
    for step in range(STEPS):
        batch = windows[torch.randint(len(windows), (128,))]
        loss = F.cross_entropy(model(batch[:, :-1]), batch[:, -1])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step in (0, STEPS - 1):
            print(f"step {step + 1}: {loss.item():.3f} nats a byte")
    codes = model.hidden[0].weight.unpack()
    print(f"codes of the first layer: {codes.unique().tolist()}")


if __name__ == "__main__":
    main()
