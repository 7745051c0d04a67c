"""Which checkpoint a run goes on from, and whether it fits the config.

A checkpoint that is of another model, method, seed or text is refused with the fields that differ, side by
side. Settings that only say how long and how fast to go on may change: the run is then no longer the one that
would have been, and says so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dqt.errors import ConfigError, ModelError
from dqt.train.checkpoint import list_checkpoints, read_state
from dqt.train.config import Config, resolve

AUTO = "auto"

# These change how a run goes on, not what it is. [data] is compared by the hash of its tokens instead.
MAY_CHANGE = {
    *("optim.lr", "optim.warmup_steps", "optim.schedule", "optim.decay_fraction", "optim.final_lr_fraction"),
    *(
        "optim.grad_clip",
        "optim.clip_update",
        "train.gradient_release",
        "train.on_nonfinite",
        "train.on_spike",
        "train.spike_threshold",
        "train.on_write_error",
        "train.compile",
        "train.steps",
        "train.eval_every",
        "train.eval_windows",
        "train.checkpoint_every",
    ),
    *("train.keep_checkpoints", "train.log_every", "train.activation_checkpointing", "train.threads"),
    *("train.out", "train.prompt", "train.sample_tokens", "train.memory_limit", "train.give_back_memory"),
}
# Of those, a change of these changes nothing that is trained.
_HARMLESS = {
    *("train.eval_every", "train.eval_windows", "train.checkpoint_every", "train.keep_checkpoints"),
    *("train.log_every", "train.out", "train.prompt", "train.sample_tokens", "train.memory_limit"),
    *("train.give_back_memory", "train.on_write_error"),
}


_BEFORE_THE_KEY = {"significance": 0.0}
"""What runs of [optim] did before there was a key, where today's default is another."""


@dataclass(frozen=True)
class Found:
    """A checkpoint to go on from.

    Attributes:
        path: Its directory.
        state: Its verified `state.json`.
    """

    path: Path
    state: dict[str, Any]


def find(resume: str, checkpoints: Path, say: Callable[[str], None]) -> Found | None:
    """Finds the checkpoint that `resume` names.

    Args:
        resume: "auto" for the newest valid one of the run, or the path of a checkpoint or of a run's
            directory.
        checkpoints: Of the run's directory.
        say: Told about damaged checkpoints that "auto" passes over.

    Returns:
        None if there is nothing to resume, under "auto" only.

    Raises:
        ModelError: If the path holds no valid checkpoint, or the run has some and none is valid.
    """
    if resume != AUTO:
        path = newest(resume)
        return Found(path, read_state(path))
    candidates = list_checkpoints(checkpoints)
    for path in reversed(candidates):
        try:
            return Found(path, read_state(path))
        except ModelError as error:
            say(f"passed over {path.name}: {error}")
    if candidates:
        raise ModelError(f"no checkpoint in {checkpoints} is usable: start anew with --overwrite")
    return None


def last_good(checkpoints: Path, say: Callable[[str], None]) -> Found | None:
    """The newest valid checkpoint that was written while the loss was as it should be."""
    for path in reversed(list_checkpoints(checkpoints)):
        try:
            found = Found(path, read_state(path))
        except ModelError as error:
            say(f"passed over {path.name}: {error}")
            continue
        if found.state["good"]:
            return found
        say(f"passed over {path.name}: it was written in a spike of the loss")
    return None


def newest(path: str | Path) -> Path:
    """The checkpoint that a path names: itself, or the newest one of a run's directory.

    Raises:
        ModelError: If there is none.
    """
    given = Path(path)
    if not given.is_dir():
        raise ModelError(f"--resume {path}: there is no such directory")
    if (given / "state.json").is_file():
        return given
    inside = list_checkpoints(given / "checkpoints") or list_checkpoints(given)
    if not inside:
        raise ModelError(f"--resume {path}: neither a checkpoint nor a run with checkpoints")
    return inside[-1]


def run_directory(path: str | Path) -> Path:
    """The run's directory that a path to resume belongs to."""
    return newest(path).parent.parent


def saved_config(path: str | Path) -> Config:
    """The effective config of the run that a path to resume belongs to; its `train.out` is that run."""
    directory = run_directory(path)
    return Config.from_toml(directory / "config.toml").override({"train.out": str(directory)})


def require_same_run(found: Found, config: Config, data_hash: str) -> list[str]:
    """Compares a checkpoint with a resolved config.

    Returns:
        What has changed and may: "train.steps: 400, now 800".

    Raises:
        ConfigError: If it is of another run, with the fields that differ.
    """
    then, now = _flat(_as_of_now(found.state["config"])), _flat(config.to_dict())
    then["data.hash"], now["data.hash"] = found.state["data_hash"], data_hash
    changed = {
        key: f"{key}: {_short(then.get(key))}, now {_short(now.get(key))}"
        for key in sorted({*then, *now})
        if then.get(key) != now.get(key)
    }
    compared = {key for key in changed if not key.startswith("data.") or key == "data.hash"}
    if refused := sorted(compared - MAY_CHANGE):
        raise ConfigError(
            f"{found.path} is of another run ({'; '.join(changed[key] for key in refused)}): "
            "use the same settings, or another --out without --resume"
        )
    return [changed[key] for key in sorted(compared - _HARMLESS)]


def _as_of_now(saved: Mapping[str, Mapping[str, Any]]) -> Mapping[str, Mapping[str, Any]]:
    """A saved config with the keys that have come since, which leaves no key out that has gone."""
    optim = {**_BEFORE_THE_KEY, **saved.get("optim", {})}
    try:
        return resolve(Config.from_dict({**saved, "optim": optim})).to_dict()
    except ConfigError:
        return saved


def _flat(config: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    return {f"{section}.{key}": value for section, values in config.items() for key, value in values.items()}


def _short(value: Any) -> str:
    """A value as a message shows it; the end of a hash tells no one anything."""
    text = "not set" if value is None else str(value)
    return text if len(text) <= 24 else f"{text[:12]}…"
