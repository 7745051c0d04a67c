"""A training run gives the same integers whichever kernels it runs on, and on the reference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from dqt.ops import cpu
from train_helpers import assert_same_tensors, metrics_of, run_micro, without_times

SIZES = {"model__hidden_size": 96, "model__intermediate_size": 160}  # whole vectors, and a tail
CASES: dict[str, dict[str, Any]] = {
    "ternary": {},
    "4 bits": {"quant__bits": "4"},
    "strict 8": {"quant__method": "strict", "quant__bits": "8"},
    "strict 3, a scale a row": {"quant__method": "strict", "quant__bits": "3", "quant__per_row": True},
}


@pytest.mark.parametrize("case", CASES)
def test_reference_and_kernels_train_the_same_codes(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = {}
    try:
        for name, isa in (("kernels", None), ("reference", "reference")):
            with monkeypatch.context() as patch:
                patch.setenv("DQT_ISA", isa) if isa else patch.delenv("DQT_ISA", raising=False)
                cpu.library.cache_clear()
                folder = tmp_path / name
                folder.mkdir()
                result = run_micro(folder, **SIZES, **CASES[case])
                assert result.state == "finished"
                runs[name] = folder / "run"
    finally:
        cpu.library.cache_clear()
    tensors = load_file(runs["kernels"] / "model" / "model.safetensors")
    assert any(name.endswith(".codes") for name in tensors)
    assert_same_tensors(*(run / "model" / "model.safetensors" for run in runs.values()))
    assert without_times(metrics_of(runs["kernels"])) == without_times(metrics_of(runs["reference"]))
