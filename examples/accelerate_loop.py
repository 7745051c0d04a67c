"""A loop of your own with `accelerate`: `prepare` takes low-bit weights and an optimizer of dqt as they are.

A float checkpoint is converted while it is read, fine-tuned in ternary on the bytes of Python's json package
for some seconds, and saved with packed weights.

Wants `pip install 'dqt[hf]'`.

    python examples/accelerate_loop.py
"""

import json
import math
import tempfile
from pathlib import Path

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, set_seed

import dqt.hf  # from_pretrained and save_pretrained know low-bit weights from here on

LENGTH, EPOCHS, ACCUMULATION = 64, 3, 2
SIZES = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}


def main(folder: Path) -> None:
    """Converts, trains, saves, reads."""
    set_seed(0)
    config = LlamaConfig(vocab_size=256, max_position_embeddings=LENGTH, initializer_range=0.1, **SIZES)
    LlamaForCausalLM(config).save_pretrained(folder / "float")  # stands for a checkpoint that you have
    model = AutoModelForCausalLM.from_pretrained(
        folder / "float", quantization_config=dqt.DqtConfig(bits="ternary", fused=True)
    )
    model.train()  # from_pretrained gives it for inference

    optimizer = dqt.optim.AdamW(model.named_parameters(), lr=4e-3, seed=0)
    text = (Path(json.__file__).parent / "decoder.py").read_bytes()
    tokens = torch.frombuffer(bytearray(text), dtype=torch.uint8).long().unfold(0, LENGTH, LENGTH)
    loader = DataLoader(tokens, batch_size=8, shuffle=True, drop_last=True)
    steps = EPOCHS * math.ceil(len(loader) / ACCUMULATION)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)

    accelerator = Accelerator(gradient_accumulation_steps=ACCUMULATION)
    model, optimizer, loader, schedule = accelerator.prepare(model, optimizer, loader, schedule)
    for epoch in range(EPOCHS):
        for batch in loader:
            with accelerator.accumulate(model):
                loss = model(input_ids=batch, labels=batch, use_cache=False).loss
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
        print(f"epoch {epoch + 1}: {loss.item():.3f} nats a byte")

    accelerator.unwrap_model(model).save_pretrained(folder / "ternary")
    read = AutoModelForCausalLM.from_pretrained(folder / "ternary")
    size = (folder / "ternary" / "model.safetensors").stat().st_size
    print(f"codes: {read.model.layers[0].mlp.up_proj.weight.unpack().unique().tolist()}, {size:,} bytes")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        main(Path(folder))
