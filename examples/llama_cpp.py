"""From `dqt train` to llama.cpp: export a run as GGUF, check it there, and let llama.cpp go on with a text.

Wants `pip install 'dqt[gguf]'`. Without a run it trains a small ternary one first, for some seconds; that
writes something that looks a little like code, and no more.

    python examples/llama_cpp.py [RUN]
"""

import json
import sys
import tempfile
from pathlib import Path

import xllamacpp

from dqt.export.command import export
from dqt.train.config import Config
from dqt.train.loop import train

PROMPT = "def "


def small_run(folder: Path) -> Path:
    """A run of a few seconds, with rows of 256 as llama.cpp's ternary blocks want them."""
    settings = {
        "model.preset": "micro",
        "model.hidden_size": 256,
        "model.intermediate_size": 512,
        "data.text": [str(path) for path in sorted(Path(json.__file__).parent.glob("*.py"))],
        "data.vocab_size": 400,
        "train.steps": 40,
        "train.seq_len": 64,
        "train.batch_size": 8,
        "train.out": str(folder / "run"),
    }
    return train(Config().override(settings)).directory.path


def main() -> None:
    """Exports, verifies, generates."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(sys.argv[1]) if sys.argv[1:] else small_run(Path(folder))
        result = export(run, "gguf", Path(folder) / "gguf", verify_tokens=100)
        print(result)

        parameters = xllamacpp.CommonParams()
        parameters.model.path = str(next(result.path.glob("*.gguf")))
        parameters.n_parallel = 1
        parameters.verbosity = 1  # errors only
        server = xllamacpp.Server(parameters)
        answer = server.handle_completions({"prompt": PROMPT, "max_tokens": 40, "temperature": 0.0})
        print(f"\nllama.cpp goes on:\n{PROMPT}{answer['choices'][0]['text']}")


if __name__ == "__main__":
    main()
