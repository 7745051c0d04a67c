"""Checkpoints from which a run goes on bit for bit, in safetensors and JSON.

    checkpoints/step-000123/
        model.safetensors        the model's state: packed codes, scales, float parameters
        optimizer.safetensors    every tensor of the optimizer's state, in its own dtype, as "parameter/key"
        state.json               step, data position, recent losses, optimizer settings, config, versions
        manifest.json            size and SHA-256 of the others

Nothing random is saved, because nothing random has state: rounding and sampling are functions of (seed,
step), so that the step is all that a resumed run needs beside its tensors.

The optimizer's settings come from the config, never from the file, which only has to agree on the names of
the parameters and on the form of every state tensor.
"""

from __future__ import annotations

import contextlib
import math
import platform
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

import dqt
from dqt.errors import ConfigError, ModelError, did_you_mean
from dqt.train import storage

MODEL, OPTIMIZER, STATE = "model.safetensors", "optimizer.safetensors", "state.json"
_NAME = re.compile(r"step-(\d{6,15})")


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
        WriteError: If it can't be written.
    """
    target = directory / f"step-{step:06d}"
    weights = storage.without_aliases(model.state_dict())[0]
    tensors, described = _split(optimizer)
    needed = sum(tensor.nbytes for tensor in (*weights.values(), *tensors.values()))
    with storage.staged_directory(target, needed) as staging:
        storage.save_tensors(staging / MODEL, weights)
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
    storage.verify(checkpoint, (MODEL, OPTIMIZER, STATE))
    return peek(checkpoint)


def peek(checkpoint: Path) -> dict[str, Any]:
    """A checkpoint's `state.json`, without looking at its tensors.

    Raises:
        ModelError: If it is missing, damaged, or of a newer format.
    """
    path = checkpoint / STATE
    state = storage.load_json(path)
    storage.check_version(path, state)
    state = {
        "val_loss": None,
        "good": True,
        "losses": [],
        "start": None,
        **state,
    }  # format 1 has none of these
    for key, fits in _STATE.items():
        if not fits(state.get(key)):
            raise ModelError(f"{path} is damaged: {key} can't be {str(state.get(key))[:40]!r}")
    return state


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**53


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _is_config(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(section, dict) for section in value.values())


def _describes_optimizer(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and isinstance(value.get("param_groups"), list)
        and all(
            isinstance(group, dict) and isinstance(group.get("param_names"), list)
            for group in value["param_groups"]
        )
        and isinstance(value.get("scalars"), dict)
        and all(isinstance(scalars, dict) for scalars in value["scalars"].values())
    )


_STATE = {
    "step": _is_count,
    "samples": _is_count,
    "elapsed": _is_number,
    "data_hash": lambda value: isinstance(value, str),
    "config": _is_config,
    "optimizer": _describes_optimizer,
    "val_loss": lambda value: value is None or _is_number(value),
    "good": lambda value: isinstance(value, bool),
    "losses": lambda value: isinstance(value, list) and all(map(_is_number, value)),
    "start": lambda value: value is None or isinstance(value, dict),
}
"""What a state must have, and of which kind."""


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
    """The checkpoints under a run's `checkpoints`, oldest first.

    Staging and foreign directories are none, nor are links, which may lead anywhere.
    """
    if not directory.is_dir():
        return []
    found = (path for path in directory.iterdir() if step_of(path) >= 0)
    return sorted((path for path in found if path.is_dir() and not path.is_symlink()), key=step_of)


def find_checkpoint(directory: Path, step: str) -> Path:
    """The checkpoint that a user means by "123", "000123" or "step-000123".

    Raises:
        ModelError: There is none; with the steps there are.
    """
    by_step = {str(step_of(path)): path for path in list_checkpoints(directory)}
    wanted = step.removeprefix("step-").lstrip("0") or "0"
    if wanted not in by_step:
        raise ModelError(f"{directory} has no checkpoint of step {step}: {did_you_mean(wanted, by_step)}")
    return by_step[wanted]


def step_of(checkpoint: Path) -> int:
    """The step in a checkpoint's name; -1 if it is no checkpoint's."""
    match = _NAME.fullmatch(checkpoint.name)
    return int(match[1]) if match else -1


def states(directory: Path) -> dict[Path, dict[str, Any]]:
    """The checkpoints whose `state.json` can be read, oldest first; their tensors are not looked at."""
    found = {}
    for path in list_checkpoints(directory):
        with contextlib.suppress(ModelError):
            found[path] = peek(path)
    return found


def pins(found: Mapping[Path, Mapping[str, Any]]) -> dict[str, Path]:
    """Those that are kept however old they are: "best" by validation loss, and "last good".

    Good is one that was written while the loss was finite and in no spike.
    """
    losses = {path: state["val_loss"] for path, state in found.items() if state["val_loss"] is not None}
    good = [path for path, state in found.items() if state["good"]]
    pinned = {"best": min(losses, key=losses.__getitem__)} if losses else {}
    return pinned | ({"last good": good[-1]} if good else {})


def prune(directory: Path, keep: int) -> None:
    """Removes all but the newest `keep` checkpoints and the pinned ones; what is unreadable doesn't count."""
    found = states(directory)
    kept = {*list(found)[-keep:], *pins(found).values()}
    for path in list_checkpoints(directory):
        if path not in kept:
            storage.remove_directory(path)


def remove_later(directory: Path, step: int) -> None:
    """Removes checkpoints beyond a step from which the run goes on another time."""
    for path in reversed(list_checkpoints(directory)):  # so that a kill leaves no gap
        if step_of(path) > step:
            storage.remove_directory(path)


def sweep(directory: Path) -> list[str]:
    """Clears up after killed processes, and names what is no checkpoint; only while nothing else writes."""
    lines = storage.sweep(directory)
    if directory.is_dir():
        known = {path.name for path in list_checkpoints(directory)}
        others = sorted(path.name for path in directory.iterdir() if path.name not in known)
        lines += [f"ignored {directory / name}: no checkpoint" for name in others]
    return lines


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
    """What `_split` took apart, as `load_state_dict` takes it; settings are those of the optimizer."""
    names = _parameter_names(optimizer)
    state: dict[int, dict[str, Any]] = {
        names.index(name): dict(scalars) for name, scalars in described["scalars"].items() if scalars
    }
    for path, tensor in tensors.items():
        name, _, key = path.rpartition("/")
        state.setdefault(names.index(name), {})[key] = tensor
    groups = optimizer.state_dict()["param_groups"]
    saved = [list(group["param_names"]) for group in described["param_groups"]]
    if saved != [list(group["param_names"]) for group in groups]:
        raise ConfigError("its parameters have other names, or are grouped in another way")
    return {"state": state, "param_groups": groups}
