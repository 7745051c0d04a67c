"""The training loop: one update after another, with reports, evaluations and checkpoints on the way.

One update is `accumulation` forward and backward passes of `batch_size` sequences, a clip of the global
gradient norm, and a step of the optimizer; with gradient release, one pass that updates as it goes.
Everything random is a function of (seed, step) or of (seed, sample index), so that a run that stops and goes
on gives the codes, the optimizer's state and the losses of one that did not, bit for bit. What is not the
same are times, and results between machines or numbers of threads, where float sums have another order.

A loss that is NaN or Inf stops the run before the backward pass, such a gradient before the update (with
gradient release before that of its own tensor); the last checkpoint stays. The price of looking at every loss
is that the processor waits for a GPU once a pass.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from dqt.data.prepare import Corpus
from dqt.data.sampler import Sampler
from dqt.data.tokenizer import load_tokenizer
from dqt.errors import NonFiniteError
from dqt.evaluate import Evaluation, evaluate
from dqt.fused import fuse_
from dqt.memory import MemoryTable, measure, peak_memory, process_memory
from dqt.models import build_config, build_with_recipe, count_parameters
from dqt.optim import GradientRelease
from dqt.recipes import autocast, build_optimizer
from dqt.sampling import continue_text
from dqt.train.checkpoint import prune, remove_later, restore, save_checkpoint
from dqt.train.compiled import compile_layers, eager
from dqt.train.config import Config, required
from dqt.train.losses import language_model_loss
from dqt.train.metrics import Console, MetricsLog, code_histograms, finite, progress_text
from dqt.train.resume import Found
from dqt.train.rundir import FAILED, FINISHED, INTERRUPTED, RUNNING, RunDirectory, run_name
from dqt.train.savedmodel import save_model
from dqt.train.schedule import lr_factor
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


class Trainer:
    """A run in memory: model, optimizer, place in the data.

    Args:
        config: Resolved, with `train.out`.
        corpus: The text.
        directory: Where results go; nothing is written before `run`.
        console: Where to show progress.
    """

    def __init__(self, config: Config, corpus: Corpus, directory: RunDirectory, console: Console) -> None:
        self.config, self.corpus, self.directory, self.console = config, corpus, directory, console
        train = config.train
        self.recipe = config.recipe()
        self.steps, self.batch_size = required(train.steps), required(train.batch_size)
        self.accumulation, self.seq_len = required(train.accumulation), required(train.seq_len)
        self.model, self.quantized = build_with_recipe(
            model_config(config, corpus), self.recipe, config.quant.rules_to_bits, train.seed
        )
        if train.fused and self.recipe.fusible:
            fuse_(self.model)
        if train.activation_checkpointing:
            with warnings.catch_warnings():  # transformers 5 has a new name for it, and both work until 6
                warnings.simplefilter("ignore", FutureWarning)
                self.model.gradient_checkpointing_enable(
                    gradient_checkpointing_kwargs={"use_reentrant": False}
                )
        if train.compile:
            compile_layers(self.model)
        self.optimizer = build_optimizer(self.model, self.recipe, self.recipe.lr, train.seed)
        self.release = GradientRelease(self.optimizer) if train.gradient_release else None
        self.sampler = Sampler(len(corpus.train), self.seq_len, train.seed)
        self.step = 0
        self.elapsed = 0.0
        self.memory = MemoryTable(())
        self._seconds_a_step = 0.0
        self._loss = math.nan
        self._evaluated: tuple[int, Evaluation] | None = None
        self._saved_step = 0
        self._count = count_parameters(self.model.config)

    @property
    def tokens(self) -> int:
        """Tokens trained on so far."""
        return self.step * self.tokens_a_step

    @property
    def tokens_a_step(self) -> int:
        """Tokens in an update."""
        return self.accumulation * self.batch_size * self.seq_len

    def restore(self, found: Found) -> None:
        """Goes on from a checkpoint."""
        restore(found.path, found.state, self.model, self.optimizer)
        self.step = self._saved_step = found.state["step"]
        self.elapsed = found.state["elapsed"]
        self.console.say(f"resumed from {found.path} at step {self.step}")

    def run(self) -> TrainResult:
        """Trains until the last step or a signal, and writes everything that the run leaves behind."""
        self._begin()
        try:
            with StopRequest() as stop, MetricsLog(self.directory.metrics) as metrics:
                while self.step < self.steps and not stop.name:
                    self._advance(metrics)
                if stop.name:
                    self.console.say(
                        f"{stop.name}: stopping after step {self.step}; once more leaves at once"
                    )
                return self._finish(metrics)
        except BaseException as error:
            self.directory.write_record(
                FAILED, {**self._facts(), "error": str(error) or type(error).__name__}
            )
            raise

    def train_step(self, telemetry: bool) -> dict[str, Any]:
        """One update.

        Args:
            telemetry: Whether the optimizer counts what happens to the codes.

        Returns:
            "loss" (mean over the update, in nats a token), "lr", and "grad_norm" before clipping.

        Raises:
            NonFiniteError: Before anything changed.
        """
        number = self.step + 1
        lr = required(self.recipe.lr) * self._lr_factor(number)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.collect_telemetry = telemetry
        try:
            losses = [self._backward(micro_batch) for micro_batch in range(self.accumulation)]
            norm = self._clip() if self.release is None else self.release.norm
            self.optimizer.step()
        except NonFiniteError as error:
            raise NonFiniteError(f"step {number}: {error}") from error
        if not self.memory.rows:
            self.memory = measure(self.model, self.optimizer)
        self.optimizer.zero_grad(set_to_none=True)
        self.step = number
        return {"loss": sum(losses) / self.accumulation, "lr": lr, "grad_norm": norm}

    def evaluate(self) -> Evaluation:
        """Loss on the fixed windows of the held-out text; not measured twice at one step."""
        if self._evaluated is None or self._evaluated[0] != self.step:
            with eager(self.config.train.compile):
                result = evaluate(
                    self.model,
                    self.corpus.val,
                    self.seq_len,
                    self.config.train.eval_windows,
                    token_bytes=self.corpus.token_bytes,
                    batch_size=self.batch_size,
                    autocast=autocast(self.recipe, self.model.device.type),
                )
            self._evaluated = (self.step, result)
        return self._evaluated[1]

    def save_checkpoint(self) -> None:
        """Writes a checkpoint of the current step, and removes the oldest beyond those that are kept."""
        if self._saved_step != self.step:
            facts = {
                "seed": self.config.train.seed,
                "samples": self.step * self.accumulation * self.batch_size,
                "elapsed": self.elapsed,
                "data_hash": self.corpus.hash,
                "config": self.config.to_dict(),
            }
            save_checkpoint(self.directory.checkpoints, self.step, self.model, self.optimizer, facts)
            prune(self.directory.checkpoints, self.config.train.keep_checkpoints)
            self._saved_step = self.step

    # -- the parts of a run ----------------------------------------------------------------------------------

    def _begin(self) -> None:
        self.directory.create()
        if self.step:
            self.directory.keep_metrics_until(self.step)
            remove_later(self.directory.checkpoints, self.step)
        else:
            self.directory.clear()
        self.directory.config.write_text(self.config.to_toml(), encoding="utf-8")
        self.directory.write_record(RUNNING, self._facts())
        self.console.say(self._headline())

    def _advance(self, metrics: MetricsLog) -> None:
        """One step and what is due after it."""
        train = self.config.train
        started = time.perf_counter()
        logged = (self.step + 1) % required(train.log_every) == 0 or self.step + 1 in (1, self.steps)
        line = self.train_step(telemetry=logged)
        self._loss = line["loss"]
        seconds = time.perf_counter() - started
        self.elapsed += seconds
        weight = 0.0 if not self._seconds_a_step else 0.5 ** (1 / _SPEED_HALF_LIFE)
        self._seconds_a_step = weight * self._seconds_a_step + (1 - weight) * seconds
        if logged:
            line = self._report(line, seconds)
            metrics.write(line)
            left = (self.steps - self.step) * self._seconds_a_step
            self.console.progress(progress_text(line, self.steps, left), last=self.step == self.steps)
        if self.step % required(train.eval_every) == 0:
            self._log_evaluation(metrics)
        if self.step % required(train.checkpoint_every) == 0:
            self.save_checkpoint()

    def _finish(self, metrics: MetricsLog) -> TrainResult:
        state = FINISHED if self.step >= self.steps else INTERRUPTED
        self.save_checkpoint()
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
        metrics.write({"step": self.step, "val_loss": result.loss, "val_bpb": result.bits_per_byte})
        if codes := code_histograms(self.model):
            metrics.write({"step": self.step, "codes": codes})
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

    def _lr_factor(self, step: int) -> float:
        optim = self.config.optim
        return lr_factor(
            step,
            self.steps,
            optim.warmup_steps or 0,
            self.recipe.schedule,
            optim.final_lr_fraction,
            optim.decay_fraction,
        )

    def _backward(self, micro_batch: int) -> float:
        """A forward and a backward pass; returns the loss."""
        first = (self.step * self.accumulation + micro_batch) * self.batch_size
        tokens = self.sampler.batch(self.corpus.train, first, self.batch_size).to(self.model.device)
        with autocast(self.recipe, self.model.device.type):
            loss = language_model_loss(self.model, tokens)
        value = loss.item()
        if not math.isfinite(value):
            raise NonFiniteError(
                f"the loss is {value} (samples {first} to {first + len(tokens) - 1}); this step changed "
                "nothing. Lower --lr, or go on from a checkpoint with a lower one"
            )
        (loss / self.accumulation).backward()
        return value

    def _clip(self) -> float:
        """Scales the gradients to the largest norm allowed; returns the norm before.

        A norm that is not finite scales nothing, so that the optimizer can name the gradient that is to
        blame.
        """
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if self.recipe.grad_clip and norm.isfinite():
            torch.nn.utils.clip_grads_with_norm_(parameters, self.recipe.grad_clip, norm)
        return norm.item()

    def _sample(self) -> tuple[str, str]:
        """The prompt, and how the model continues it."""
        tokenizer = load_tokenizer(self.corpus.tokenizer_dir)
        prompt = self.config.train.prompt
        if prompt is None:
            start = self.corpus.val.read(0, min(_PROMPT_TOKENS, len(self.corpus.val))).tolist()
            prompt = tokenizer.core.decode(start)
        if not self.config.train.sample_tokens:
            return prompt, ""
        with autocast(self.recipe, self.model.device.type), eager(self.config.train.compile):
            sample = continue_text(
                self.model, tokenizer, prompt, self.config.train.sample_tokens, seed=self.config.train.seed
            )
        return prompt, sample.text

    def _facts(self) -> dict[str, Any]:
        """What is known before the first step, for `run.json`."""
        return {
            "title": run_name(self.config),
            "step": self.step,
            "steps": self.steps,
            "parameters": self._count.total,
            "linear_parameters": self._count.linear,
            "method": self.recipe.method,
            "bits": self.recipe.bits,
            "seed": self.config.train.seed,
            "unigram_nats": self.corpus.unigram_nats,
            "data": {"source": self.corpus.manifest.get("source"), "hash": self.corpus.hash},
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


def model_config(config: Config, corpus: Corpus) -> Any:
    """The `transformers` config: the preset and its overrides, for the corpus's vocabulary."""
    tokens = {"bos_token_id": corpus.end_id, "eos_token_id": corpus.end_id}
    return build_config(
        config.model.preset,
        config.model.arch,
        corpus.vocab_size,
        config.train.seq_len,
        {**config.model.overrides, **tokens},
    )
