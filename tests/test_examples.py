"""Every example runs as its text says."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parent.parent / "examples").glob("*.py"))
SHOWS = {
    "accelerate_loop.py": ["epoch 3: ", "codes: [-1, 0, 1], "],
    "lora.py": ["with adapters: ", "codes of a layer: [-8, "],
    "finetune.py": ["in 4 bits", "after 30 steps: "],
    "llama_cpp.py": ["verified in llama.cpp", "llama.cpp goes on:\ndef "],
    "quantize_module.py": ["step 100: ", "codes of the first layer: [-8, "],
    "trainer.py": ["bits=4", "resumed at step 20: the same bits"],
}


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
def test_example(example: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(example)],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1", "DQT_CACHE": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    for text in SHOWS[example.name]:
        assert text in done.stdout
