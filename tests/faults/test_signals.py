"""Row 8: the first signal ends a run in good order, the second one at once; nothing is corrupted."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from nursery import Nursery, named
from runs import arguments

from dqt.train import storage
from dqt.train.checkpoint import list_checkpoints, read_state, sweep

PLACES = {
    "data preparation": "dqt.data.prepare:train_tokenizer",
    "building the model": "dqt.train.learner:build_with_recipe",
    "warm-up": "dqt.train.learner:language_model_loss",
    "a step": "dqt.optim.base:QuantizedOptimizer.begin_step",
    "evaluation": "dqt.train.learner:evaluate",
    "a save": "dqt.train.storage:_write_manifest",
}
BEFORE_THE_FIRST_STEP = ("data preparation", "building the model")


def signal_in(place: str, number: int, times: int) -> None:
    """Has this process send signals to itself when it comes to a place, the third time in a step."""
    import importlib

    module_name, _, path = PLACES[place].partition(":")
    *parents, name = path.split(".")
    holder: Any = importlib.import_module(module_name)
    for parent in parents:
        holder = getattr(holder, parent)
    original: Callable[..., Any] = getattr(holder, name)
    left = [3 if place == "a step" else 1]

    def interrupted(*arguments: Any, **options: Any) -> Any:
        left[0] -= 1
        if not left[0]:
            if times == 1:
                os.kill(os.getpid(), number)
            else:
                for _ in range(times):
                    with contextlib.suppress(KeyboardInterrupt):
                        os.kill(os.getpid(), number)
                time.sleep(20)  # the second one leaves at once, wherever this is
        return original(*arguments, **options)

    setattr(holder, name, interrupted)


def handlers(patch: pytest.MonkeyPatch) -> None:
    """Signals do what they do to any Python program."""


def without_handlers() -> None:
    from dqt.train.signals import StopRequest

    StopRequest.__enter__ = lambda self: self  # type: ignore[method-assign]


@pytest.mark.row(8, handlers)
@pytest.mark.parametrize(
    ("number", "times"),
    [(signal.SIGINT, 1), (signal.SIGTERM, 1), (signal.SIGTERM, 2)],
    ids=["ctrl-c", "sigterm", "twice"],
)
def test_signals(number: signal.Signals, times: int, tmp_path: Path, nursery: Nursery, mutation: Any) -> None:
    broken = [(named(without_handlers), [])] if mutation else []
    for place in PLACES:
        out = tmp_path / place
        first = [*broken, (named(signal_in), [place, int(number), times])]
        cache = "cache" if place in BEFORE_THE_FIRST_STEP[:1] else "other cache"
        env = {"DQT_CACHE": str(tmp_path / cache)}
        status, output = nursery.run(arguments(out), *first, env=env)
        assert "Traceback" not in output, output
        checkpoints = list_checkpoints(out / "checkpoints")
        for path in checkpoints:
            read_state(path)
        if times == 2:
            assert status == 128 + number, (place, output)
        else:
            assert status == 130, (place, output)
            assert not list((tmp_path / cache).rglob(".staging-*"))
        if place in BEFORE_THE_FIRST_STEP:
            assert not (out / "run.json").exists()
            assert times == 2 or not out.exists()
        elif times == 1:
            record = json.loads((out / "run.json").read_text())
            expected = {"warm-up": 1, "a step": 3, "evaluation": 3, "a save": 3}[place]
            assert (record["state"], record["summary"]["step"]) == ("interrupted", expected), (place, output)
            assert read_state(checkpoints[-1])["step"] == expected
            assert (out / "model" / "dqt.json").is_file()
            assert f"{number.name}: stopping after step {expected}" in output
        else:
            assert json.loads((out / "run.json").read_text())["state"] == "running"
            sweep(out / "checkpoints")
            assert all(not path.name.startswith(storage.LEFTOVERS) for path in out.rglob("*"))
