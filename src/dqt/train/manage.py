"""`dqt checkpoint`: what checkpoints a run has, whether they are whole, and removing some.

dqt checkpoint ls RUN               steps, sizes, losses, and which are pinned
dqt checkpoint verify RUN           compares every file with its SHA-256; a checkpoint or model/ will do too
dqt checkpoint rm RUN STEP...       refused while a run is at work there
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from dqt.errors import ModelError

ACTIONS = {
    "ls": "steps, sizes, losses, and which are pinned",
    "verify": "compare every file with its SHA-256",
    "rm": "remove some, by step",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command line of `dqt checkpoint`."""
    about = "; ".join(f"{name}: {text}" for name, text in ACTIONS.items())
    parser.add_argument("action", choices=ACTIONS, metavar="ACTION", help=about)
    parser.add_argument(
        "directory", type=Path, metavar="RUN", help="a run; to verify also a checkpoint, or model/"
    )
    parser.add_argument("steps", nargs="*", metavar="STEP", help="which ones (default: all, but none to rm)")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(arguments: argparse.Namespace) -> int:
    """Does what `dqt checkpoint` was asked to.

    Raises:
        ModelError: There is no such run or step, a file is damaged, or the run is at work.
    """
    from dqt.train.checkpoint import find_checkpoint, list_checkpoints
    from dqt.train.rundir import RunDirectory
    from dqt.train.storage import MANIFEST, remove_directory

    path: Path = arguments.directory
    if not path.is_dir():
        raise ModelError(f"there is no directory {str(path)!r}: give a run that dqt train wrote")
    if (path / MANIFEST).is_file():
        if arguments.action != "verify":
            raise ModelError(f"{path} is a checkpoint or a model, not a run: give the directory above it")
        return _verify([path], arguments.json)
    directory = path / "checkpoints"
    found = [find_checkpoint(directory, step) for step in arguments.steps] or list_checkpoints(directory)
    if not found:
        raise ModelError(f"{path} has no checkpoints")
    if arguments.action == "ls":
        return _list(directory, found, arguments.json)
    if arguments.action == "verify":
        return _verify([*found, *((path / "model",) if (path / "model").is_dir() else ())], arguments.json)
    if not arguments.steps:
        raise ModelError(f"dqt checkpoint rm {path}: say which steps")
    with RunDirectory(path).claimed():
        for each in found:
            remove_directory(each)
            print(f"removed {each}")
    return 0


def _list(directory: Path, found: list[Path], as_json: bool) -> int:
    from dqt.train.checkpoint import pins, states, step_of

    known = states(directory)
    pinned = pins(known)
    rows: list[dict[str, Any]] = [
        {
            "step": step_of(path),
            "bytes": sum(file.stat().st_size for file in path.iterdir() if file.is_file()),
            "written": time.strftime("%Y-%m-%d %H:%M", time.localtime(path.stat().st_mtime)),
            "val_loss": known[path]["val_loss"] if path in known else None,
            "pinned": [name for name, each in pinned.items() if each == path],
            "readable": path in known,
        }
        for path in found
    ]
    if as_json:
        print(json.dumps(rows, indent=2))
        return 0
    print(f"{'step':>9}  {'size':>10}  {'written':16}  {'val loss':>8}  kept as")
    for row in rows:
        loss = "" if row["val_loss"] is None else f"{row['val_loss']:.4f}"
        kept = ", ".join(row["pinned"]) if row["readable"] else "damaged"
        line = f"{row['step']:>9}  {row['bytes'] / 1e6:>7,.1f} MB  {row['written']}  {loss:>8}  {kept}"
        print(line.rstrip())
    return 0


def _verify(paths: list[Path], as_json: bool) -> int:
    from dqt.train.storage import verify

    errors: dict[str, str | None] = {}
    for path in paths:
        try:
            verify(path)
            errors[str(path)] = None
        except ModelError as error:
            errors[str(path)] = str(error)
        if not as_json:
            print(f"{path}: {errors[str(path)] or 'whole'}")
    if as_json:
        print(json.dumps(errors, indent=2, ensure_ascii=False))
    damaged = sum(error is not None for error in errors.values())
    if damaged:
        raise ModelError(f"{damaged} of {len(paths)} are damaged: use --resume auto, which passes them over")
    return 0
