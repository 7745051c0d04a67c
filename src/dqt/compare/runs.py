"""One run of a comparison: where it lies, whether it is done, and what came of it.

A run's directory is named by a hash of its resolved config, so that a changed arm is another run, and two
suites that have a run in common share it. What lies there counts only if the config that is stored beside it
is the same, key by key, and so is the hash of the text. What no config knows is the code: after a change of
the library's numerics, measure in another `--out`.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dqt.errors import DqtError
from dqt.report import read_run
from dqt.train import storage
from dqt.train.config import Config
from dqt.train.rundir import FINISHED, RunDirectory

DIVERGED, FAILED, MISSING = "diverged", "failed", "missing"
LEDGER = "diverged.json"
_IRRELEVANT = {
    *("train.eval_every", "train.checkpoint_every", "train.keep_checkpoints", "train.log_every", "train.out"),
    *("train.prompt", "train.sample_tokens", "train.memory_limit", "train.give_back_memory"),
}
"""What changes neither a run nor what is measured of it."""


@dataclass(frozen=True)
class Run:
    """A training run that a comparison needs.

    Attributes:
        config: Resolved; `train.out` is its directory.
        data_hash: Of its text.
    """

    config: Config
    data_hash: str

    @property
    def directory(self) -> RunDirectory:
        """Where it lies."""
        return RunDirectory(Path(str(self.config.train.out)))

    @property
    def seed(self) -> int:
        """Of weights, order of data, and rounding."""
        return self.config.train.seed

    @property
    def rate(self) -> float:
        """Its peak learning rate."""
        assert self.config.optim.lr is not None
        return self.config.optim.lr


@dataclass(frozen=True)
class Outcome:
    """What came of a run.

    Attributes:
        state: "finished", "diverged", "failed", or "missing" if it has not come to an end.
        step: The last step that was done, or the one at which it diverged.
        error: Why there is no loss; empty if there is.
        summary: That of `run.json`; empty without one.
        flip_rate: Mean share of codes that changed in a step; NaN where there are no codes.
    """

    state: str
    step: int = 0
    error: str = ""
    summary: Mapping[str, Any] = field(default_factory=dict)
    flip_rate: float = math.nan

    @property
    def loss(self) -> float:
        """Validation loss in nats a token; infinite if there is none."""
        loss = self.summary.get("val_loss") if self.state == FINISHED else None
        return math.inf if loss is None else float(loss)

    @property
    def settled(self) -> bool:
        """Whether the same run would end in the same way."""
        return self.state in (FINISHED, DIVERGED)


def place(config: Config, folder: Path, data_hash: str) -> Run:
    """The run of a resolved config, in a directory of its own below `folder`."""
    quant = config.quant
    kind = "-".join(part for part in (config.model.name, quant.bits, quant.method) if part)
    name = f"{kind}-lr{config.optim.lr:.3g}-seed{config.train.seed}-{fingerprint(config)[:10]}"
    return Run(config.override({"train.out": str((folder / name).absolute())}), data_hash)


def fingerprint(config: Config) -> str:
    """A hash of all that a resolved config says about what is trained."""
    content = config.to_dict()
    relevant = {
        f"{section}.{key}": value
        for section, values in content.items()
        for key, value in values.items()
        if f"{section}.{key}" not in _IRRELEVANT
    }
    return hashlib.sha256(json.dumps(relevant, sort_keys=True).encode()).hexdigest()


def read_outcome(run: Run) -> Outcome:
    """What lies in a run's directory, if it is of this run."""
    directory = run.directory
    if not holds(run):
        return Outcome(MISSING)
    try:
        ledger = directory.path / LEDGER
        if ledger.is_file():
            content = storage.load_json(ledger)
            if content.pop("data", None) != run.data_hash:
                return Outcome(MISSING)
            return Outcome(DIVERGED, **content)
        record = directory.read_record()
        summary = record.get("summary", {})
        if record.get("state") != FINISHED or summary.get("data", {}).get("hash") != run.data_hash:
            return Outcome(MISSING, step=summary.get("step", 0))
        if summary.get("val_loss") is None:  # JSON has no NaN
            return Outcome(DIVERGED, summary["step"], "the validation loss is not finite")
        flips = [
            line["flip_rate"]
            for line in read_run(directory.path).training
            if line.get("flip_rate") is not None
        ]
    except (DqtError, KeyError, TypeError) as error:
        return Outcome(MISSING, error=str(error))
    mean = math.fsum(flips) / len(flips) if flips else math.nan
    return Outcome(FINISHED, summary["step"], summary=summary, flip_rate=mean)


def holds(run: Run) -> bool:
    """Whether the directory's own config is that of the run."""
    try:
        stored = Config.from_toml(run.directory.config)
    except DqtError:
        return False
    return fingerprint(stored) == fingerprint(run.config)
