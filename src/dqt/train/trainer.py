"""A run: one update after another, with reports, evaluations and checkpoints on the way.

What a step does is in `dqt.train.learner`. Here is what a run writes, when it ends, and what it does about
steps that went wrong and files that can't be written. A checkpoint is written before everything else that a
stopped run leaves behind, because whoever stops it may lose patience.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from dqt.build import autocast
from dqt.data.chat import LEARNT
from dqt.data.prepare import Corpus
from dqt.data.sampler import ConversationSampler
from dqt.data.tokenizer import TextTokenizer, load_tokenizer
from dqt.errors import DqtError, LossSpikeError, NonFiniteError, WriteError
from dqt.evaluate import Evaluation
from dqt.memory import MemoryTable, measure, peak_memory, process_memory
from dqt.sampling import continue_text
from dqt.train import storage
from dqt.train.checkpoint import prune, remove_later, save_checkpoint
from dqt.train.compiled import eager
from dqt.train.config import Config, required
from dqt.train.guard import MOST_IN_A_ROW, ROLLBACK, SKIP, STOP
from dqt.train.learner import Learner
from dqt.train.metrics import Console, MetricsLog, code_histograms, finite, progress_text
from dqt.train.resume import Found, last_good
from dqt.train.rundir import FAILED, FINISHED, INTERRUPTED, RUNNING, RunDirectory, run_name
from dqt.train.savedmodel import save_model
from dqt.train.signals import StopRequest

_PROMPT_TOKENS = 12
_SPEED_HALF_LIFE = 20  # steps over which the speed that the live line shows is averaged


@dataclass(frozen=True)
class TrainResult:
    """What a run came to.

    Attributes:
        state: "finished" or "interrupted".
        directory: The run's directory.
        steps: Updates done.
        evaluation: Loss on the held-out text at the end.
        unigram_nats: Loss of a model without context on the same text.
        memory: Bytes of weights, gradients and optimizer state.
        prompt: Beginning of the sample text.
        sample: How the model continues it.
        summary: All of it, as in `run.json`.
    """

    state: str
    directory: RunDirectory
    steps: int
    evaluation: Evaluation
    unigram_nats: float
    memory: MemoryTable
    prompt: str
    sample: str
    summary: dict[str, Any]


class Trainer(Learner):
    """A run and its directory.

    Args:
        config: Resolved, with `train.out`.
        corpus: The text.
        directory: Where results go; nothing is written before `run`.
        console: Where to show progress.
        fresh: See `Learner`.
    """

    def __init__(
        self, config: Config, corpus: Corpus, directory: RunDirectory, console: Console, fresh: bool = True
    ) -> None:
        super().__init__(config, corpus, fresh)
        self.directory, self.console = directory, console
        self._seconds_a_step = 0.0
        self._loss = math.nan
        self._saved_step = -1
        self._mishaps, self._worst_step = 0, 0

    def restore(self, found: Found) -> None:
        """Goes on from a checkpoint."""
        super().restore(found)
        self._saved_step = self.step if found.path.parent == self.directory.checkpoints else -1

    def run(self, stop: StopRequest | None = None) -> TrainResult:
        """Trains until the last step or a signal, and writes everything that the run leaves behind."""
        stop = stop or StopRequest()
        self._begin()
        try:
            with MetricsLog(self.directory.metrics) as metrics:
                while self.step < self.steps and not stop.name:
                    self._advance(metrics)
                if stop.name:
                    self.console.say(
                        f"{stop.name}: stopping after step {self.step}; once more leaves at once"
                    )
                return self._finish(metrics)
        except BaseException as error:
            with contextlib.suppress(DqtError):  # a full disk may be why it failed
                self.directory.write_record(
                    FAILED, {**self._facts(), "error": str(error) or type(error).__name__}
                )
            raise

    def save_checkpoint(self) -> None:
        """Writes a checkpoint of the current step, and removes the oldest beyond those that are kept."""
        if self._saved_step != self.step:
            measured = self.evaluated and finite(self.evaluated[1].loss)
            facts = {**self.state(), "val_loss": measured}
            save_checkpoint(self.directory.checkpoints, self.step, self.model, self.optimizer, facts)
            self._saved_step = self.step
            prune(self.directory.checkpoints, self.config.train.keep_checkpoints)

    # -- the parts of a run ----------------------------------------------------------------------------------

    def _begin(self) -> None:
        train = self.config.train
        self.directory.create()
        if self.step:
            remove_later(self.directory.checkpoints, self.step)
        else:
            self.directory.clear()
        with MetricsLog(self.directory.metrics) as metrics:
            metrics.keep_until(self.step)
        storage.write_text(self.directory.config, self.config.to_toml())
        self.directory.write_record(RUNNING, self._facts())
        self.console.say(self._headline())
        if isinstance(self.sampler, ConversationSampler) and (self.sampler.cut or self.sampler.left_out):
            self.console.say(
                f"train.seq_len = {self.seq_len} cuts {self.sampler.cut} conversations, and leaves out "
                f"{self.sampler.left_out} that have no answer by then"
            )
        if self.start and not self.step:
            self._say_start()
        if not self.step and ROLLBACK in (train.on_nonfinite, train.on_spike):
            self._write(self.save_checkpoint)  # something to go back to

    def _say_start(self) -> None:
        """What conversion cost, said and kept."""
        assert self.start is not None
        now = self.evaluate()
        self.console.say(
            f"{self.start['path']}: validation loss {_loss_text(self.start['val_loss'])} nats a token as "
            f"floats, {now.loss:.4f} as converted"
        )
        with MetricsLog(self.directory.metrics) as metrics:
            line = {"step": 0, "val_loss": now.loss, "val_bpb": now.bits_per_byte}
            self._write(lambda: metrics.write(line))

    def _advance(self, metrics: MetricsLog) -> None:
        """One step and what is due after it."""
        train = self.config.train
        started = time.perf_counter()
        number = self.step + 1
        logged = number % required(train.log_every) == 0 or number in (1, self.steps)
        try:
            line = self.train_step(telemetry=logged)
        except (NonFiniteError, LossSpikeError) as error:
            self._go_wrong(error, metrics)
            if self.step == number:  # skipped
                self._do_what_is_due(metrics)
            return
        self._loss = line["loss"]
        seconds = time.perf_counter() - started
        self.elapsed += seconds
        weight = 0.0 if not self._seconds_a_step else 0.5 ** (1 / _SPEED_HALF_LIFE)
        self._seconds_a_step = weight * self._seconds_a_step + (1 - weight) * seconds
        if logged:
            line = self._report(line, seconds)
            self._write(lambda: metrics.write(line))
            left = (self.steps - self.step) * self._seconds_a_step
            self.console.progress(progress_text(line, self.steps, left), last=self.step == self.steps)
        self._do_what_is_due(metrics)

    def _do_what_is_due(self, metrics: MetricsLog) -> None:
        if self.step % required(self.config.train.eval_every) == 0:
            self._log_evaluation(metrics)
        if self.step % required(self.config.train.checkpoint_every) == 0:
            self._write(self.save_checkpoint)

    def _go_wrong(self, error: NonFiniteError | LossSpikeError, metrics: MetricsLog) -> None:
        """Does about a step that changed nothing (or is about to be undone) what the config says."""
        train, bad = self.config.train, self.step + 1
        policy = train.on_spike if isinstance(error, LossSpikeError) else train.on_nonfinite
        if policy == STOP:
            raise error
        self._mishaps = self._mishaps + 1 if bad <= self._worst_step + 1 else 1
        self._worst_step = max(self._worst_step, bad)
        if self._mishaps > MOST_IN_A_ROW:
            raise type(error)(f"{error}; so it went {MOST_IN_A_ROW} times in a row, and the run gave up")
        if policy == SKIP:
            event = "skipped"
            self.skip_step()
        else:
            found = last_good(self.directory.checkpoints, self.console.say)
            if found is None:
                raise type(error)(f"{error}; there is no good checkpoint to go back to") from error
            samples, elapsed = self.samples + self.samples_a_step, self.elapsed
            self.restore(found)
            self.samples, self.elapsed = samples, elapsed
            event = f"went back to step {self.step}"
            self.evaluated = None
            remove_later(self.directory.checkpoints, self.step)
            metrics.keep_until(self.step)
        self.console.say(f"{event}: {error}")
        line = {"step": self.step, "event": event, "reason": str(error)}
        self._write(lambda: metrics.write(line))

    def _write(self, action: Callable[[], None]) -> None:
        """Writes something; where that fails, goes on without it if the config says so."""
        try:
            action()
        except WriteError as error:
            if self.config.train.on_write_error == STOP:
                raise
            self.console.say(f"going on without: {error}")

    def _finish(self, metrics: MetricsLog) -> TrainResult:
        state = FINISHED if self.step >= self.steps else INTERRUPTED
        self._write(self.save_checkpoint)
        if self.step % required(self.config.train.eval_every):
            self._log_evaluation(metrics)
        evaluation = self.evaluate()
        self.memory = self.memory if self.memory.rows else measure(self.model, self.optimizer)
        prompt, sample = self._sample()
        summary = {
            **self._facts(),
            "step": self.step,
            "tokens": self.tokens,
            "train_loss": finite(self._loss),
            "val_loss": finite(evaluation.loss),
            "val_bpb": finite(evaluation.bits_per_byte),
            "memory": self.memory.to_dict(),
            "peak_memory": peak_memory(),
            "seconds": self.elapsed,
            "samples": [{"prompt": prompt, "text": sample}],
        }
        tokenizer_dir = self.corpus.tokenizer_dir
        save_model(self.directory.model, self.model, tokenizer_dir, self.recipe, self.quantized, summary)
        self.directory.write_record(state, summary)
        return TrainResult(
            state,
            self.directory,
            self.step,
            evaluation,
            self.corpus.unigram_nats,
            self.memory,
            prompt,
            sample,
            summary,
        )

    def _log_evaluation(self, metrics: MetricsLog) -> None:
        result = self.evaluate()
        line = {"step": self.step, "val_loss": result.loss, "val_bpb": result.bits_per_byte}
        self._write(lambda: metrics.write(line))
        if codes := code_histograms(self.model):
            self._write(lambda: metrics.write({"step": self.step, "codes": codes}))
        self.console.say(
            f"step {self.step}: validation loss {result.loss:.4f} nats a token, "
            f"{result.bits_per_byte:.3f} bits a byte"
        )

    def _report(self, line: Mapping[str, Any], seconds: float) -> dict[str, Any]:
        """The line of metrics for a step."""
        codes = self.optimizer.telemetry() if self.quantized.converted else {}
        names = ("flip_rate", "saturated", "zeros", "residual_spread")
        return {
            "step": self.step,
            "tokens": self.tokens,
            "loss": line["loss"],
            "lr": line["lr"],
            "grad_norm": line["grad_norm"],
            "tokens_per_second": self.tokens_a_step / seconds,
            "memory_bytes": process_memory(),
            **{name: codes.get(name) for name in names},
            "elapsed": self.elapsed,
        }

    def _sample(self) -> tuple[str, str]:
        """The prompt, and how the model continues it."""
        tokenizer = load_tokenizer(self.corpus.tokenizer_dir)
        prompt = self.config.train.prompt
        if prompt is None:
            prompt = self._first_words(tokenizer)
        if not self.config.train.sample_tokens:
            return prompt, ""
        with autocast(self.recipe, self.model.device.type), eager(self.config.train.compile):
            sample = continue_text(
                self.model, tokenizer, prompt, self.config.train.sample_tokens, seed=self.config.train.seed
            )
        return prompt, sample.text

    def _first_words(self, tokenizer: TextTokenizer) -> str:
        """The beginning of the held-out text; of conversations all up to the first answer."""
        val = self.corpus.val
        if val.marks is None:
            return tokenizer.core.decode(val.read(0, min(_PROMPT_TOKENS, len(val))).tolist())
        learnt = val.marks.read(0, len(val)) & LEARNT
        return tokenizer.core.decode(val.read(0, int(learnt.argmax())).tolist(), skip_special_tokens=False)

    def _facts(self) -> dict[str, Any]:
        """What is known before the first step, for `run.json`."""
        return {
            "title": run_name(self.config),
            "step": self.step,
            "steps": self.steps,
            "parameters": self.parameters.total,
            "linear_parameters": self.parameters.linear,
            "method": self.recipe.method,
            "bits": self.recipe.bits,
            "environment": self.recipe.environment,
            "seed": self.config.train.seed,
            "unigram_nats": self.corpus.unigram_nats,
            "data": {"source": self.corpus.manifest.get("source"), "hash": self.corpus.hash},
            **({"start": self.start} if self.start else {}),
        }

    def _headline(self) -> str:
        facts = self._facts()
        low_bit = sum(math.prod(entry.shape) for entry in self.quantized.converted)
        formats = ", ".join(sorted({str(entry.format) for entry in self.quantized.converted}))
        stored = f"{low_bit / 1e6:.2f}M of them {formats}" if low_bit else "all of them float"
        return (
            f"{facts['title']}: {facts['parameters'] / 1e6:.2f}M parameters, {stored}; "
            f"{self.steps} steps of {self.tokens_a_step:,} tokens; writing to {self.directory.path}"
        )


def _loss_text(loss: float | None) -> str:
    return "no finite" if loss is None else f"{loss:.4f}"
