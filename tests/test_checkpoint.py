"""A run that stops and goes on equals one that did not, bit for bit; damage and other runs are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dqt.errors import ConfigError, ModelError
from dqt.train import storage
from dqt.train.checkpoint import list_checkpoints, prune
from dqt.train.loop import train
from dqt.train.resume import saved_config
from train_helpers import assert_same_tensors, metrics_of, run_micro, without_times

METHODS: list[dict[str, Any]] = [
    {"quant__bits": "ternary"},
    {"quant__bits": "8", "train__accumulation": 2},
    {"quant__bits": "ternary", "train__gradient_release": True},
    {"quant__bits": "1", "quant__method": "strict", "model__tie_word_embeddings": False},
    {
        "quant__bits": "4",
        "quant__residual_bits": 16,
        "optim__betas": [0.9, 0.95],
        "optim__second_moment": "full",
    },
    {"quant__bits": "ternary", "quant__rules": {"*.mlp.*": "3"}, "quant__embeddings": 8},
    {"quant__bits": "3", "quant__per_row": True, "model__arch": "bitnet"},
    {"quant__bits": "4", "quant__method": "paper", "optim__warmup_steps": 2},
    {"quant__bits": "8", "optim__first_moment": "fp8", "optim__second_moment": "fp8"},
    {"quant__bits": "8", "optim__name": "adafactor", "optim__betas": [0.9, 0.95]},
    {"quant__bits": "4", "optim__name": "sgd", "optim__first_moment": "bf16"},
    {"quant__bits": "4", "quant__residual_bits": 32},
    {"quant__bits": "8", "quant__environment": "bf16"},
    {"quant__bits": "8", "quant__scale_rule": "learned"},
    {"quant__bits": "8", "quant__environment": "fp8", "quant__compute_bits": "ternary"},
    {"quant__bits": "8", "quant__rounding": "learned", "optim__drop_smallest": 0.2},
    {"quant__bits": "8", "quant__error_feedback": "eco"},
    {"quant__method": "fp32", "train__activation_checkpointing": True},
    {"quant__method": "bitnet"},
]


def name_of(values: dict[str, Any]) -> str:
    return "-".join(str(value) for value in values.values())


@pytest.mark.parametrize("values", METHODS, ids=name_of)
def test_two_pieces_equal_one(values: dict[str, Any], tmp_path: Path) -> None:
    """Stopped at step 3 of 6 and resumed, against the same run at once."""
    whole = run_micro(tmp_path, train__out=str(tmp_path / "whole"), **values)
    again = tmp_path / "again"
    run_micro(tmp_path, train__out=str(again), **values)
    later = list_checkpoints(again / "checkpoints")[-1]
    assert later.name == "step-000006"
    for path in (later, again / "model"):  # as if it had been killed after step 3
        for file in path.iterdir():
            file.unlink()
        path.rmdir()
    record = json.loads((again / "run.json").read_text())
    (again / "run.json").write_text(json.dumps(record | {"state": "running"}))

    resumed = run_micro(tmp_path, train__out=str(again), resume="auto", **values)

    assert resumed.evaluation == whole.evaluation
    assert resumed.sample == whole.sample
    assert without_times(metrics_of(again)) == without_times(metrics_of(tmp_path / "whole"))
    last = Path("checkpoints") / "step-000006"
    for file in (
        last / "model.safetensors",
        last / "optimizer.safetensors",
        Path("model") / "model.safetensors",
    ):
        assert_same_tensors(tmp_path / "whole" / file, again / file)


def test_files_are_plain_and_integers_stay_integers(tmp_path: Path) -> None:
    run_micro(tmp_path, quant__bits="ternary")
    checkpoint = tmp_path / "run" / "checkpoints" / "step-000006"
    assert {path.name for path in checkpoint.iterdir()} == {
        *("model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"),
    }
    model, optimizer = (
        load_file(checkpoint / name) for name in ("model.safetensors", "optimizer.safetensors")
    )
    name = "model.layers.0.self_attn.q_proj.weight"
    assert model[f"{name}.codes"].dtype == torch.uint8
    assert model[f"{name}.codes"].shape == (32, 8)
    assert model[f"{name}.scale"].dtype == torch.float32
    assert optimizer[f"{name}/residual"].dtype == torch.uint8
    assert "lm_head.weight" not in model  # tied
    state = json.loads((checkpoint / "state.json").read_text())
    assert (state["step"], state["samples"], state["seed"]) == (6, 12, 0)


def test_old_checkpoints_and_leftovers_are_removed(tmp_path: Path) -> None:
    run_micro(tmp_path, train__steps=8, train__checkpoint_every=2, train__keep_checkpoints=2)
    checkpoints = tmp_path / "run" / "checkpoints"
    assert [path.name for path in list_checkpoints(checkpoints)] == ["step-000006", "step-000008"]
    (checkpoints / "step-000010.txt").write_text("mine")
    (checkpoints / "step-12").mkdir()
    prune(checkpoints, 1)
    assert {path.name for path in checkpoints.iterdir()} >= {"step-000008", "step-000010.txt", "step-12"}


def test_auto_starts_anew_where_there_is_nothing(tmp_path: Path) -> None:
    result = run_micro(tmp_path, resume="auto")
    assert (result.state, result.steps) == ("finished", 6)


def test_more_steps_after_the_end(tmp_path: Path) -> None:
    run_micro(tmp_path)
    with pytest.raises(ConfigError, match=r"has all of train.steps = 6"):
        run_micro(tmp_path, resume="auto")
    longer = run_micro(tmp_path, resume="auto", train__steps=8)
    assert (longer.state, longer.steps) == ("finished", 8)
    assert [line["step"] for line in metrics_of(tmp_path / "run") if "loss" in line] == list(range(1, 9))


def test_a_path_may_name_a_run_or_a_checkpoint(tmp_path: Path) -> None:
    whole = run_micro(tmp_path)
    for number, path in enumerate(("run/checkpoints/step-000003", "run"), start=1):
        steps = 6 if number == 1 else 8
        branch = run_micro(
            tmp_path,
            resume=str(tmp_path / path),
            train__out=str(tmp_path / f"branch{number}"),
            train__steps=steps,
        )
        assert branch.steps == steps
        if number == 1:
            assert branch.evaluation == whole.evaluation
            file = Path("checkpoints") / "step-000006" / "optimizer.safetensors"
            assert_same_tensors(tmp_path / "run" / file, tmp_path / "branch1" / file)
    with pytest.raises(ModelError, match="there is no such directory"):
        run_micro(tmp_path, resume=str(tmp_path / "none"))
    with pytest.raises(ModelError, match="neither a checkpoint nor a run"):
        run_micro(tmp_path, resume=str(tmp_path))


def test_the_config_of_a_run_to_resume(tmp_path: Path) -> None:
    """What a command line takes where only --resume PATH is given."""
    run_micro(tmp_path, quant__bits="4")
    config = saved_config(tmp_path / "run" / "checkpoints" / "step-000003")
    assert (config.quant.bits, config.train.out) == ("4", str(tmp_path / "run"))
    longer = config.override({"train.steps": 7})
    assert train(longer, resume=str(tmp_path / "run"), cache_dir=tmp_path.parent / "dqt-cache").steps == 7


@pytest.mark.parametrize(
    "name", ["model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"]
)
@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_damage_is_noticed_and_auto_falls_back(name: str, damage: str, tmp_path: Path) -> None:
    run_micro(tmp_path)
    newest = tmp_path / "run" / "checkpoints" / "step-000006"
    content = bytearray((newest / name).read_bytes())
    if damage == "remove":
        (newest / name).unlink()
    elif damage == "truncate":
        (newest / name).write_bytes(content[: len(content) // 2])
    else:
        content[len(content) // 2] ^= 1
        (newest / name).write_bytes(content)
    with pytest.raises(ModelError):
        run_micro(tmp_path, resume=str(newest), train__steps=8)
    resumed = run_micro(tmp_path, resume="auto", train__steps=8)
    assert resumed.steps == 8


def test_a_newer_format_is_refused(tmp_path: Path) -> None:
    run_micro(tmp_path)
    newest = tmp_path / "run" / "checkpoints" / "step-000006"
    manifest = json.loads((newest / "manifest.json").read_text())
    (newest / "manifest.json").write_text(json.dumps(manifest | {"format_version": 99}))
    with pytest.raises(ModelError, match=r"format 99.*update dqt"):
        run_micro(tmp_path, resume=str(newest), train__steps=8)


def test_a_directory_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "target"
    with storage.staged_directory(target) as staging:
        (staging / "file").write_text("old")
    with pytest.raises(RuntimeError), storage.staged_directory(target) as staging:  # noqa: PT012
        (staging / "file").write_text("new")
        raise RuntimeError
    assert (target / "file").read_text() == "old"
    storage.verify(target)
    with storage.staged_directory(target) as staging:
        (staging / "file").write_text("new")
    assert (target / "file").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["target"]
