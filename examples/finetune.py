"""Fine-tune a trained model on conversations, in 4 bits: what `dqt train --from MODEL --chat FILE` does.

Give it a transformers directory or a GGUF file of your own. Without one it first trains a small float model
on Python's json package, for some seconds, exports it, and goes on from that.

    python examples/finetune.py [MODEL]
"""

import json
import sys
import tempfile
from pathlib import Path

from dqt.export.command import export
from dqt.train.config import Config
from dqt.train.loop import train

TEXT = [str(path) for path in sorted(Path(json.__file__).parent.glob("*.py"))]
SHORT = {"train.steps": 30, "train.seq_len": 64, "train.batch_size": 4, "train.sample_tokens": 20}


def small_model(folder: Path) -> Path:
    """A float model as `transformers` has it."""
    settings = {"model.preset": "micro", "quant.method": "fp32", "data.text": TEXT, "data.vocab_size": 400}
    run = train(Config().override({**settings, **SHORT, "train.out": str(folder / "base")}))
    return export(run.directory.path, "hf").path


def conversations(path: Path) -> Path:
    """Questions and answers about numbers, one a line."""
    lines = (
        {"prompt": f"def add({a}, {b})", "completion": f"return {a + b}"}
        for a in range(20)
        for b in range(10)
    )
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def main() -> None:
    """Trains, and prints what became of the loss."""
    with tempfile.TemporaryDirectory() as folder:
        model = Path(sys.argv[1]) if sys.argv[1:] else small_model(Path(folder))
        settings = {
            "model.start_from": str(model),
            "quant.bits": "4",
            "data.chat": [str(conversations(Path(folder) / "talks.jsonl"))],
            "optim.lr": 2e-3,
            "train.out": str(Path(folder) / "tuned"),
        }
        result = train(Config().override({**settings, **SHORT}))
        start = result.summary["start"]
        before, converted = start["val_loss"], start["converted_val_loss"]
        print(f"loss of the answers: {before:.3f} as floats, {converted:.3f} in 4 bits")
        print(f"after {result.steps} steps: {result.evaluation.loss:.3f}")
        print(f"{result.prompt}{result.sample}")


if __name__ == "__main__":
    main()
