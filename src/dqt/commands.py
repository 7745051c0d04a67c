"""What the commands do: call the library, and print. Those with much to say have modules of their own.

Nothing heavy is imported before a command needs it; the price is imports inside of functions.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dqt import flags, harness
from dqt.compare import command as compare_command
from dqt.errors import ConfigError, DataError, ModelError

if TYPE_CHECKING:
    from dqt.train.config import Config
    from dqt.train.loop import TrainResult

INTERRUPTED = 130


def run_train(arguments: argparse.Namespace) -> int:
    """Trains, and writes the report."""
    values = flags.overrides(arguments)
    flags.check_early(arguments.config, values)

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


def run_plan(arguments: argparse.Namespace) -> int:
    """Says what a run needs."""
    values = flags.overrides(arguments)
    flags.check_early(arguments.config, values)

    from dqt.plan import plan
    from dqt.train.config import Config

    config = Config.from_toml(arguments.config) if arguments.config else Config()
    found = plan(config.override(values), arguments.device, arguments.budget)
    _show(found, arguments.json)
    return 0


def run_compare(arguments: argparse.Namespace) -> int:
    """See `dqt.compare.command`."""
    return compare_command.run(arguments, flags.set_values(arguments))


def _result_text(result: TrainResult) -> str:
    evaluation = result.evaluation
    return (
        f"\n{result.state} after {result.steps:,} steps in {result.directory.path}\n"
        f"validation loss {evaluation.loss:.4f} nats a token (unigram {result.unigram_nats:.4f}), "
        f"{evaluation.bits_per_byte:.4f} bits a byte\n\n{result.memory}\n\n"
        f"sample, after {result.prompt!r}:\n{result.sample}"
    )


def run_eval(arguments: argparse.Namespace) -> int:
    """Measures a model on text, or by tasks."""
    _require_directory(arguments.directory)
    if arguments.tasks is not None:
        return harness.run(arguments)
    if arguments.limit is not None:
        raise ConfigError("--limit is about the examples of --tasks: add these, or give --windows instead")
    flags.require_paths(arguments.text or ())
    if arguments.windows is not None and arguments.windows < 1:
        raise ConfigError(f"--windows must be at least 1, not {arguments.windows}")

    from dqt.data.prepare import encode_text
    from dqt.data.tokenizer import token_byte_lengths
    from dqt.evaluate import evaluate
    from dqt.memory import explain_out_of_memory
    from dqt.train.savedmodel import find_model, load_model, precision

    with explain_out_of_memory(lambda: "evaluation needs more than there is; close other programs"):
        model, tokenizer, info = load_model(arguments.directory)
        seq_len, windows = model.config.max_position_embeddings, arguments.windows
        if arguments.text:
            shards = encode_text(find_model(arguments.directory), arguments.text)
        else:
            config = _run_config(arguments.directory)
            shards = _held_out(config, find_model(arguments.directory), info)
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


def run_sample(arguments: argparse.Namespace) -> int:
    """Continues a prompt."""
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


def run_inspect(arguments: argparse.Namespace) -> int:
    """Says what every weight is stored as."""
    _require_directory(arguments.directory)

    from dqt.inspection import inspect_path
    from dqt.memory import explain_out_of_memory

    with explain_out_of_memory(lambda: "the model needs more than there is; close other programs"):
        inspection = inspect_path(arguments.directory)
    _show(inspection, arguments.json)
    return 0


def run_report(arguments: argparse.Namespace) -> int:
    """Writes a run's report again."""
    _require_directory(arguments.directory)

    from dqt.report import write_report

    print(write_report(arguments.directory))
    return 0


def run_doctor(arguments: argparse.Namespace) -> int:
    """Says what the machine offers."""
    from dqt import doctor

    findings = doctor.examine()
    if arguments.json:
        _print_json(doctor.to_json(findings))
    else:
        print(doctor.to_text(findings))
    return 0


def _require_directory(path: Path) -> None:
    if not path.is_dir():
        raise ModelError(f"there is no directory {str(path)!r}: give a run that dqt train wrote")


def _run_config(directory: Path) -> Config:
    """The config of a run, given its directory or its model's."""
    from dqt.train.config import Config
    from dqt.train.savedmodel import config_beside, find_model

    if (path := config_beside(find_model(directory))) is not None:
        return Config.from_toml(path)
    raise ModelError(f"{directory} has no config.toml beside it that names its held-out text: give --text")


def _held_out(config: Config, model: Path, info: dict[str, Any]) -> Any:
    """The tokens that a run held out, if its text is still the same."""
    from dqt.data.prepare import prepare_corpus
    from dqt.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(model) if config.model.start_from else None
    corpus = prepare_corpus(config.data, tokenizer=tokenizer)
    if corpus.hash != info.get("summary", {}).get("data", {}).get("hash"):
        raise DataError(
            "the text has changed since this model was trained, so its held-out part has too: give --text"
        )
    return corpus.val


def _print_json(content: Any) -> None:
    print(json.dumps(content, indent=2, ensure_ascii=False))


def _show(found: Any, as_json: bool) -> None:
    """Prints what has a text and a dictionary."""
    if as_json:
        _print_json(found.to_dict())
    else:
        print(found)
