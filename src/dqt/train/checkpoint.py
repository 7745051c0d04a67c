"""Checkpoints from which a run goes on bit for bit, in safetensors and JSON.

    checkpoints/step-000123/
        model.safetensors        the model's state: packed codes, scales, float parameters
        optimizer.safetensors    every tensor of the optimizer's state, in its own dtype, as "parameter/key"
        state.json               step, data position, optimizer settings, config, versions
        manifest.json            size and SHA-256 of the others

Nothing random is saved, because nothing random has state: rounding and sampling are functions of (seed,
step), so that the step is all that a resumed run needs beside its tensors.
"""

from __future__ import annotations

import contextlib
import platform
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

import dqt
from dqt.errors import ConfigError, ModelError
from dqt.train import storage

MODEL, OPTIMIZER, STATE = "model.safetensors", "optimizer.safetensors", "state.json"
_NAME = re.compile(r"step-(\d{6,})")


def save_checkpoint(
    directory: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, facts: Mapping[str, Any]
) -> Path:
    """Writes `directory/step-…`, whole or not at all.

    Args:
        directory: The run's `checkpoints`.
        step: Updates done.
        model: The model.
        optimizer: Its optimizer, made from named parameters.
        facts: JSON-able; what else the run wants back.

    Raises:
        ModelError: If it can't be written.
    """
    target = directory / f"step-{step:06d}"
    tensors, described = _split(optimizer)
    with storage.staged_directory(target) as staging:
        storage.save_tensors(staging / MODEL, storage.without_aliases(model.state_dict())[0])
        storage.save_tensors(staging / OPTIMIZER, tensors)
        state = {
            "format_version": storage.FORMAT_VERSION,
            "step": step,
            **facts,
            "optimizer": described,
            "versions": versions(),
        }
        (staging / STATE).write_text(storage.to_json(state), encoding="utf-8")
    return target


def read_state(checkpoint: Path) -> dict[str, Any]:
    """Verifies a checkpoint's files and returns its `state.json`.

    Raises:
        ModelError: If there is none, it is damaged, or of a newer format.
    """
    if not checkpoint.is_dir():
        raise ModelError(f"{checkpoint} is no checkpoint: there is no such directory")
    storage.verify(checkpoint)
    state = storage.load_json(checkpoint / STATE)
    storage.check_version(checkpoint / STATE, state)
    return state


def restore(
    checkpoint: Path, state: Mapping[str, Any], model: nn.Module, optimizer: torch.optim.Optimizer
) -> None:
    """Puts the tensors of a checkpoint into a model and an optimizer built from the same config.

    Args:
        checkpoint: The directory.
        state: What `read_state` returned for it.
        model: Changed in place.
        optimizer: Changed in place.

    Raises:
        ModelError: If the tensors are of another model or optimizer.
    """
    storage.load_model_tensors(model, checkpoint / MODEL)
    tensors = storage.load_tensors(checkpoint / OPTIMIZER)
    try:
        optimizer.load_state_dict(_join(optimizer, tensors, state["optimizer"]))
    except (ConfigError, KeyError, TypeError, ValueError) as error:
        raise ModelError(f"{checkpoint / OPTIMIZER} does not fit the optimizer: {error}") from error


def list_checkpoints(directory: Path) -> list[Path]:
    """The checkpoints under a run's `checkpoints`, oldest first; staging and foreign directories are none."""
    if not directory.is_dir():
        return []
    return sorted((path for path in directory.iterdir() if step_of(path) >= 0 and path.is_dir()), key=step_of)


def step_of(checkpoint: Path) -> int:
    """The step in a checkpoint's name; -1 if it is no checkpoint's."""
    match = _NAME.fullmatch(checkpoint.name)
    return int(match[1]) if match else -1


def prune(directory: Path, keep: int) -> None:
    """Removes all but the newest `keep` checkpoints, and what a killed process left half-written."""
    stale = [
        path for path in directory.iterdir() if path.name.startswith((storage.STAGING_PREFIX, ".replaced-"))
    ]
    for path in [*list_checkpoints(directory)[:-keep], *stale]:
        with contextlib.suppress(OSError):
            shutil.rmtree(path)


def remove_later(directory: Path, step: int) -> None:
    """Removes checkpoints beyond a step from which the run goes on another time."""
    for path in list_checkpoints(directory):
        if step_of(path) > step:
            shutil.rmtree(path)


def versions() -> dict[str, str]:
    """Of everything that a result depends on."""
    return {
        "dqt": dqt.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _parameter_names(optimizer: torch.optim.Optimizer) -> list[str]:
    return [name for group in optimizer.param_groups for name in group["param_names"]]


def _split(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The optimizer's state as tensors, and as JSON what is not a tensor."""
    content = optimizer.state_dict()
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, dict[str, Any]] = {}
    for index, name in enumerate(_parameter_names(optimizer)):
        scalars[name] = {}
        for key, value in content["state"].get(index, {}).items():
            if isinstance(value, Tensor):
                tensors[f"{name}/{key}"] = value
            else:
                scalars[name][key] = value
    groups = [
        {key: value for key, value in group.items() if key != "params"} for group in content["param_groups"]
    ]
    return tensors, {"param_groups": groups, "scalars": scalars}


def _join(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], described: Mapping[str, Any]
) -> dict[str, Any]:
    """What `_split` took apart, as `load_state_dict` takes it."""
    names = _parameter_names(optimizer)
    state: dict[int, dict[str, Any]] = {
        names.index(name): dict(scalars) for name, scalars in described["scalars"].items() if scalars
    }
    for path, tensor in tensors.items():
        name, _, key = path.rpartition("/")
        state.setdefault(names.index(name), {})[key] = tensor
    groups = []
    first = 0
    for group in described["param_groups"]:
        count = len(group["param_names"])
        restored = {key: tuple(value) if key == "betas" else value for key, value in group.items()}
        groups.append({**restored, "params": list(range(first, first + count))})
        first += count
    return {"state": state, "param_groups": groups}
