"""The command line: which commands and arguments there are, and how errors become an exit status.

Nothing heavy is imported before a command needs it, so that `--help`, a mistyped name and a missing file are
answered at once.

Exit status: 0 done, 2 for what the user can mend (two lines at most, no traceback), 130 interrupted; all of
them in docs/promises.md.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from dqt import __version__, commands, flags, harness
from dqt.compare import command as compare_command
from dqt.errors import ConfigError, DqtError, did_you_mean
from dqt.export import command as export_command
from dqt.train import manage

ERROR = 2


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        argv: Arguments without the program's name; None takes those of the process.

    Returns:
        The exit status.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A terminal without UTF-8 shows "?" for a bar or a sampled letter.
        sys.stdout.reconfigure(errors="replace")
    try:
        return _run(sys.argv[1:] if argv is None else list(argv))
    except DqtError as error:
        print(f"dqt: error: {error}", file=sys.stderr)
        return ERROR
    except KeyboardInterrupt:
        print("dqt: interrupted", file=sys.stderr)
        return commands.INTERRUPTED
    except BrokenPipeError:
        # The reader has gone, as in `dqt inspect | head`. At exit Python would flush, and complain once more.
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _run(argv: list[str]) -> int:
    parser, known = _parser()
    if not argv:
        parser.print_help()
        return 0
    if not argv[0].startswith("-") and argv[0] not in known:
        raise ConfigError(f"unknown command {argv[0]!r}; {did_you_mean(argv[0], known)}")
    try:
        arguments, unknown = parser.parse_known_args(argv)
    except SystemExit as finished:  # --help and --version
        return int(finished.code or 0)
    if unknown:
        options = known.get(argv[0], parser).options()
        raise ConfigError(f"unknown argument {unknown[0]!r}; {did_you_mean(unknown[0], options)}")
    status: int = arguments.run(arguments)
    sys.stdout.flush()
    return status


# -- arguments -----------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    """Reports errors as everything else does, without the usage."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see {self.prog} --help")

    def options(self) -> list[str]:
        """Every option's long name."""
        return [name for action in self._actions for name in action.option_strings if name.startswith("--")]


def _parser() -> tuple[_Parser, dict[str, _Parser]]:
    parser = _Parser(
        prog="dqt",
        description="Direct Quantized Training: language models in low-bit integers throughout.",
        epilog="dqt COMMAND --help tells more about a command.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"dqt {__version__}")
    group = parser.add_subparsers(title="commands", metavar="COMMAND", parser_class=_Parser)

    train = _add(
        group, "train", commands.run_train, "train a model, on the built-in text unless told otherwise"
    )
    flags.add_settings(train)
    train.add_argument(
        "--resume",
        metavar="auto|PATH",
        help="go on from the newest checkpoint of --out, or from a run or checkpoint",
    )
    train.add_argument("--overwrite", action="store_true", help="replace the run that --out holds")

    plan = _add(group, "plan", commands.run_plan, "the memory that a run needs, and what makes it fit")
    flags.add_settings(plan)
    plan.add_argument(
        "--device",
        default="cpu",
        metavar="NAME",
        help="cpu, a GPU as in rtx4090, or a size as in 24GB (default: cpu, what is free now)",
    )
    plan.add_argument("--budget", metavar="SIZE", help="what it must fit into, instead of all of the device")
    _add_json(plan)

    arms = _add(group, "compare", commands.run_compare, "methods and settings, with seeds and intervals")
    compare_command.add_arguments(arms)
    flags.add_set(arms)

    evaluate = _add(
        group, "eval", commands.run_eval, "loss, perplexity and bits a byte on held-out or any text"
    )
    _add_run(evaluate)
    evaluate.add_argument(
        "--text", nargs="+", metavar="PATH", help="files and folders (default: the run's held-out text)"
    )
    evaluate.add_argument(
        "--windows", type=int, metavar="N", help="how many sequences (default: as in training; all of --text)"
    )
    harness.add_arguments(evaluate)
    _add_json(evaluate)

    sample = _add(group, "sample", commands.run_sample, "continue a prompt")
    _add_run(sample)
    sample.add_argument(
        "--prompt", default="", metavar="TEXT", help="its beginning (default: that of a document)"
    )
    sample.add_argument("--tokens", type=int, default=100, metavar="N", help="how many (default: 100)")
    sample.add_argument(
        "--temperature", type=float, default=0.8, metavar="T", help="0 takes the likeliest (default: 0.8)"
    )
    sample.add_argument("--seed", type=int, default=0, metavar="N", help="of the draws (default: 0)")

    export = _add(group, "export", export_command.run, "write a model for transformers or llama.cpp")
    _add_run(export)
    export_command.add_arguments(export)
    _add_json(export)

    inspect = _add(
        group,
        "inspect",
        commands.run_inspect,
        "what every weight is stored as, and that no float copy exists",
    )
    _add_run(inspect, "a run, its model/, or a checkpoint")
    _add_json(inspect)

    manage.add_arguments(
        _add(group, "checkpoint", manage.run, "list, verify and remove the checkpoints of a run")
    )
    _add_run(_add(group, "report", commands.run_report, "write report.html and the plots of a run"), "a run")
    _add_json(_add(group, "doctor", commands.run_doctor, "what this machine offers, and what is missing"))
    return parser, dict(group.choices)


def _add(group: Any, name: str, run: Any, text: str) -> _Parser:
    parser: _Parser = group.add_parser(
        name, help=text, description=f"{text[0].upper()}{text[1:]}.", allow_abbrev=False
    )
    parser.set_defaults(run=run)
    return parser


def _add_run(parser: _Parser, text: str = "a run, or its model/") -> None:
    parser.add_argument("directory", type=Path, metavar="RUN", help=text)


def _add_json(parser: _Parser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")
