"""The command `dqt compare`: its arguments, and what it prints."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dqt.compare.suites import SUITES, Arm, Suite
from dqt.errors import ConfigError, DqtError, did_you_mean

if TYPE_CHECKING:
    from dqt.compare.experiment import Experiment

INTERRUPTED = 130


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `dqt compare`."""
    parser.add_argument(
        "arms",
        nargs="*",
        metavar="SUITE|FILE",
        help=f"{', '.join(SUITES)}; or TOML configs, each an arm, measured against the first",
    )
    parser.add_argument("--list", action="store_true", help="say what the suites, or a suite's arms, are")
    parser.add_argument("--quick", action="store_true", help="a minute, to see that everything runs")
    parser.add_argument("--only", nargs="+", metavar="ARM", help="these arms only; * and ? are wildcards")
    parser.add_argument("--seeds", type=int, metavar="N", help="runs of each arm (default: the suite's)")
    parser.add_argument(
        "--tune",
        action=argparse.BooleanOptionalAction,
        help="find each arm's best learning rate first (default: as the suite says; not for files, --quick)",
    )
    parser.add_argument("--jobs", type=int, metavar="N", help="runs at a time (default: one a core)")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs/compare"),
        metavar="DIR",
        help="runs and results; what lies there is not run again (default: runs/compare)",
    )


def run(arguments: argparse.Namespace, settings: Mapping[str, Any]) -> int:
    """Runs the command; `settings` are those of `--set`."""
    for name in ("seeds", "jobs"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name} must be at least 1, not {value}")
    if not arguments.arms:
        print(overview())
        return 0
    suite = find_suite(arguments.arms)

    from dqt.compare.experiment import Experiment, select
    from dqt.compare.results import to_markdown, write

    if arguments.only:
        suite = select(suite, arguments.only)
    experiment = Experiment(
        suite,
        arguments.out,
        seeds=arguments.seeds,
        tuned=arguments.tune,
        quick=arguments.quick,
        jobs=arguments.jobs or cores(),
        settings=settings,
        stream=sys.stdout,
    )
    if arguments.list:
        print(details(experiment))
        return 0
    _require_folder(arguments.out)
    print(headline(experiment), flush=True)
    experiment.run()
    folder = arguments.out / experiment.name
    content = write(experiment, folder)
    print(f"\n{to_markdown(content)}\nresults: {folder}")
    if experiment.interrupted:
        return INTERRUPTED
    if not any(arm["loss"]["values"] for arm in content["arms"]):
        raise DqtError(f"no run of {suite.name} has a loss: see {arguments.out / 'logs'}")
    return 0


def _require_folder(out: Path) -> None:
    existing = next(each for each in (out.absolute(), *out.absolute().parents) if each.exists())
    if not existing.is_dir():
        raise ConfigError(f"{existing} is a file, not a directory: choose another --out")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ConfigError(f"{existing} can't be written: choose another --out, or change its permissions")


def find_suite(names: list[str]) -> Suite:
    """The suite of a name, or one made of config files.

    Raises:
        ConfigError: If there is neither.
    """
    if len(names) == 1 and names[0] in SUITES:
        return SUITES[names[0]]
    for name in names:
        if not Path(name).is_file():
            if name in SUITES:
                raise ConfigError(f"{name} is a suite: give one suite, or config files only")
            raise ConfigError(f"unknown suite {name!r}, and no config file; {did_you_mean(name, SUITES)}")
    return suite_of_files([Path(name) for name in names])


def suite_of_files(paths: list[Path]) -> Suite:
    """An arm for each TOML config, named as the file; the first is what the others are measured against.

    Raises:
        ConfigError: A file that is no config, or two of one name.
    """
    from dqt.train.config import Config

    arms: list[Arm] = []
    for path in paths:
        content = Config.from_toml(path).to_dict()
        flat = {f"{section}.{key}": v for section, values in content.items() for key, v in values.items()}
        if any(arm.name == path.stem for arm in arms):
            raise ConfigError(f"two arms are called {path.stem!r}: rename one of the files")
        arms.append(Arm(path.stem, flat))
    first = arms[0].name
    question = (
        f"{' against '.join([', '.join(arm.name for arm in arms[1:]), first] if arms[1:] else [first])}"
    )
    return Suite("files", question, {}, tuple(arms), {first: first}, tuned=False)


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# -- what is printed -----------------------------------------------------------------------------------------


def overview() -> str:
    """The suites and their times."""
    from dqt.compare.experiment import Experiment

    rows = [("suite", "arms", "seeds", "on 2 cores", "question")]
    for suite in SUITES.values():
        experiment = Experiment(suite, Path(), jobs=2)
        time = duration(experiment.expected_seconds())
        rows.append((suite.name, str(len(suite.arms)), str(suite.seeds), time, suite.question))
    return (
        f"{columns(rows)}\n\ndqt compare SUITE runs one; --quick takes a minute; --list SUITE shows its arms"
    )


def details(experiment: Experiment) -> str:
    """The arms of a suite."""
    rows = [("arm", "settings")]
    for result in experiment.results:
        arm = result.arm
        settings = ", ".join(f"{key} = {value}" for key, value in arm.settings.items())
        rows.append(
            (arm.name, settings or f"{arm.ternary_inference_of}, ternary weights when it is measured")
        )
    return f"{headline(experiment)}\n\n{columns(rows)}"


def headline(experiment: Experiment) -> str:
    """What will be done, and for about how long."""
    suite, seeds = experiment.suite, len(experiment.seeds)
    tuned = ", learning rates tuned before" if experiment.tuned else ""
    time = duration(experiment.expected_seconds())
    return (
        f"{suite.name}: {suite.question} {len(suite.arms)} arms, {seeds} seed{'s'[: seeds > 1]}{tuned}; "
        f"about {time} with {experiment.pool.jobs} at a time, from the start"
    )


def duration(seconds: float) -> str:
    """A rough time: "1 min", "2.5 h"."""
    return f"{seconds / 3600:.1f} h" if seconds >= 3600 else f"{max(1, round(seconds / 60))} min"


def columns(rows: Iterable[tuple[str, ...]]) -> str:
    """Rows of text in columns; the last one is not padded."""
    table = list(rows)
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return "\n".join(
        "  ".join([*(cell.ljust(width) for cell, width in zip(row[:-1], widths, strict=False)), row[-1]])
        for row in table
    )
