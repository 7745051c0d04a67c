"""`train`: from a config to a finished run.

Everything that can be refused is refused here, in the order of what it costs to find out: settings,
directory, checkpoint, text; nothing is written before. What a step does is in `dqt.train.trainer`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TextIO

import torch

from dqt.allocator import give_back_at_once
from dqt.data.prepare import Corpus, prepare_corpus
from dqt.errors import ConfigError
from dqt.memory import explain_out_of_memory
from dqt.models import build_config
from dqt.ops.bf16_guard import ensure_bf16_products
from dqt.plan import advice, foretold, plan, refuse_what_does_not_fit
from dqt.sizes import format_bytes
from dqt.start import find_start
from dqt.train import resume as resuming
from dqt.train import storage
from dqt.train.checkpoint import sweep
from dqt.train.compiled import require_compiler
from dqt.train.config import Config, required, resolve
from dqt.train.metrics import Console
from dqt.train.pretrained import load_own_tokenizer
from dqt.train.rundir import RunDirectory, default_directory
from dqt.train.signals import StopRequest
from dqt.train.trainer import Trainer, TrainResult

__all__ = ["TrainResult", "train"]


def train(
    config: Config,
    *,
    resume: str | None = None,
    overwrite: bool = False,
    cache_dir: str | Path | None = None,
    stream: TextIO | None = None,
) -> TrainResult:
    """Trains a model as a config says, in a directory of its own.

    Ctrl-C or SIGTERM ends the run after the current step, with everything written that a finished run has;
    before the first step by KeyboardInterrupt. A second one ends the process.

    Args:
        config: Resolved or not.
        resume: None to start; "auto" to go on where the run's directory allows it; or the path of a run or
            of a checkpoint to go on from.
        overwrite: Replace the run that the directory holds.
        cache_dir: Where prepared text is kept; None takes the user's cache.
        stream: Where to show progress; None shows nothing.

    Raises:
        DqtError: A setting, directory, text or checkpoint that can't be used; NaN or Inf; out of memory.
    """
    if resume and overwrite:
        raise ConfigError("--resume goes on with a run and --overwrite deletes it: choose one")
    console = Console(stream)
    grid_follows = config.quant.headroom is None
    config = resolve(config)
    directory = _choose_directory(config, resume)
    directory.require_usable(_goes_on_in(directory, resume), overwrite)
    config = config.override({"train.out": str(directory.path)})
    if config.model.start_from is None:  # refuses sizes that make no model before any text is read
        build_config(
            required(config.model.preset), required(config.model.arch), overrides=config.model.overrides
        )
    refuse_what_does_not_fit(config)
    if config.recipe().autocasts:
        ensure_bf16_products()
    if config.train.compile:
        require_compiler()
    with StopRequest() as stop, directory.claimed():
        return _train(config, directory, console, stop, resume, cache_dir, grid_follows)


def _train(
    config: Config,
    directory: RunDirectory,
    console: Console,
    stop: StopRequest,
    resume: str | None,
    cache_dir: str | Path | None,
    grid_follows: bool,
) -> TrainResult:
    """Trains in a directory that is held; `grid_follows` says that a checkpoint's headroom is the default."""
    for line in (*storage.sweep(directory.path), *sweep(directory.checkpoints)):
        console.say(line)
    found = resuming.find(resume, directory.checkpoints, console.say) if resume else None
    if config.train.give_back_memory:
        give_back_at_once()
    torch.set_num_threads(config.train.threads or torch.get_num_threads())
    tokenizer = None
    if config.model.start_from is not None:
        tokenizer = load_own_tokenizer(find_start(config.model.start_from))
    corpus = prepare_corpus(config.data, cache_dir, console.say, tokenizer)
    corpus.require_length(required(config.train.seq_len))
    if found:
        if grid_follows:  # of a run that is made longer it would be another one
            config = config.override({"quant.headroom": found.state["config"]["quant"].get("headroom")})
        for change in resuming.require_same_run(found, config, corpus.hash):
            console.say(f"changed since the checkpoint: {change}")
        if found.state["step"] >= required(config.train.steps):
            raise ConfigError(
                f"{found.path} has all of train.steps = {config.train.steps}: ask for more --steps to go on"
            )
    with explain_out_of_memory(lambda: _needs(config, corpus)):
        trainer = Trainer(config, corpus, directory, console, fresh=found is None)
        if found:
            trainer.restore(found)
            console.say(f"resumed from {found.path} at step {trainer.step}")
        stop.graceful()
        return trainer.run(stop)


def _choose_directory(config: Config, resume: str | None) -> RunDirectory:
    if config.train.out:
        return RunDirectory(Path(config.train.out))
    if resume and resume != resuming.AUTO:
        return RunDirectory(resuming.run_directory(resume))
    return RunDirectory(default_directory(config, resume is not None))


def _goes_on_in(directory: RunDirectory, resume: str | None) -> bool:
    """Whether a run that lies in the directory is the one to go on with."""
    if resume is None or resume == resuming.AUTO:
        return resume is not None
    return resuming.run_directory(resume).resolve() == directory.path.resolve()


def _needs(config: Config, corpus: Corpus) -> str:
    """What a run that has run out of memory needs, and what lowers it."""
    if not foretold(config):
        return "this run needs more than there is; lower train.batch_size or train.seq_len"
    needed = plan(config, vocab_size=corpus.vocab_size)
    return f"this run needs about {format_bytes(needed.needs.peak)}; {advice(needed)}"
