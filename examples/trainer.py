"""The Hugging Face `Trainer` on low-bit weights: quantize the model, pass an optimizer of dqt; that is all.

A small LLaMA learns the bytes of Python's json package in 4 bits, for some seconds. Accumulation, clipping of
the gradient norm, evaluation, schedules and checkpoints are Trainer's own. In the end it resumes from the
first checkpoint, and arrives at the same bits.

Wants `pip install 'dqt[hf]'`.

    python examples/trainer.py [DIRECTORY]
"""

import json
import sys
import tempfile
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
    set_seed,
)

import dqt.hf  # from_pretrained and save_pretrained know low-bit weights from here on

LENGTH = 64
SIZES = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}


def windows() -> list[dict[str, torch.Tensor]]:
    """Pieces of the text, as Trainer's collator wants them."""
    text = b"".join(path.read_bytes() for path in sorted(Path(json.__file__).parent.glob("*.py")))
    pieces = torch.frombuffer(bytearray(text), dtype=torch.uint8).long().unfold(0, LENGTH, LENGTH)
    return [{"input_ids": piece, "labels": piece} for piece in pieces]


def new_trainer(directory: Path) -> Trainer:
    """The same start each time."""
    set_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=256, max_position_embeddings=LENGTH, **SIZES))
    dqt.quantize_(model, bits=4)
    dqt.fuse_(model)
    optimizer = dqt.optim.AdamW(model.named_parameters(), lr=4e-3, seed=0)
    arguments = TrainingArguments(
        output_dir=str(directory),
        max_steps=40,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        max_grad_norm=1.0,
        lr_scheduler_type="cosine",
        warmup_steps=5,
        eval_strategy="steps",
        eval_steps=20,
        save_steps=20,
        logging_steps=20,
        report_to="none",
        disable_tqdm=True,
    )
    data = windows()
    held_out = data[::20]
    rest = [piece for number, piece in enumerate(data) if number % 20]
    return Trainer(model, arguments, train_dataset=rest, eval_dataset=held_out, optimizers=(optimizer, None))


def main(directory: Path) -> None:
    """Trains, saves, reads, resumes."""
    trainer = new_trainer(directory)
    trainer.train()
    trainer.save_model(str(directory / "model"))
    model = AutoModelForCausalLM.from_pretrained(directory / "model")
    print(f"evaluation: {trainer.evaluate()['eval_loss']:.3f} nats a byte")
    print(model.model.layers[0].mlp.up_proj.weight)

    resumed = new_trainer(directory)
    resumed.train(resume_from_checkpoint=str(directory / "checkpoint-20"))
    pairs = zip(model.state_dict().values(), resumed.model.state_dict().values(), strict=True)
    print(f"resumed at step 20: {'the same bits' if all(torch.equal(*pair) for pair in pairs) else 'others'}")


if __name__ == "__main__":
    if sys.argv[1:]:
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as folder:
            main(Path(folder))
