"""A model, its optimizer and its place in the data: what learns, apart from the directory it writes to.

One update is `accumulation` forward and backward passes of `batch_size` sequences, a clip of the global
gradient norm, and a step of the optimizer; with gradient release, one pass that updates as it goes.
Everything random is a function of (seed, step) or of (seed, sample index), so that a run that stops and goes
on gives the codes, the optimizer's state and the losses of one that did not, bit for bit. What is not the
same are times, and results between machines or numbers of threads, where float sums have another order.

A loss that is NaN or Inf, or a spike, ends the step before the backward pass; a gradient, a moment or a scale
that is not finite before the update (with gradient release before that of its own tensor). The price of
looking at every loss is that the processor waits for a GPU once a pass.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dqt.build import autocast, build_optimizer
from dqt.data.prepare import Corpus
from dqt.data.sampler import IGNORED, ConversationSampler, Sampler
from dqt.errors import LossSpikeError, NonFiniteError
from dqt.evaluate import Evaluation, evaluate
from dqt.fused import fuse_
from dqt.memory import MemoryTable, measure
from dqt.models import build_config, build_with_recipe, count_parameters
from dqt.optim import GradientRelease
from dqt.quantize import QuantizeReport
from dqt.start import find_start
from dqt.train.adopt import adopt
from dqt.train.checkpoint import restore
from dqt.train.compiled import compile_layers, eager
from dqt.train.config import Config, required
from dqt.train.guard import IGNORE, LossWatch
from dqt.train.losses import language_model_loss
from dqt.train.metrics import finite
from dqt.train.pretrained import float_config
from dqt.train.resume import Found
from dqt.train.savedmodel import take_generation_config
from dqt.train.schedule import lr_factor

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Learner:
    """A run in memory.

    Args:
        config: Resolved.
        corpus: The text.
        fresh: Whether the model starts here; where a checkpoint is restored next, no weights need be loaded.

    Attributes:
        step: Updates done.
        samples: Sequences used up, those of skipped steps included: the place in the data.
        watch: The recent losses.
        start: Of a model that was trained before: where it came from, its loss as floats and as converted.
    """

    def __init__(self, config: Config, corpus: Corpus, fresh: bool = True) -> None:
        self.config, self.corpus = config, corpus
        train = config.train
        self.recipe = config.recipe()
        self.steps, self.batch_size = required(train.steps), required(train.batch_size)
        self.accumulation, self.seq_len = required(train.accumulation), required(train.seq_len)
        self.sampler = _sampler(corpus, self.seq_len, train.seed)
        self.start: dict[str, Any] | None = None
        self.model, self.quantized = self._adopt() if self._adopts(fresh) else self._build()
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
        self.optimizer = build_optimizer(self.model, self.recipe, required(self.recipe.lr), train.seed)
        self.optimizer.check_state = True
        self.release = GradientRelease(self.optimizer) if train.gradient_release else None
        self.step = self.samples = 0
        self.elapsed = 0.0
        self.watch = LossWatch(train.spike_threshold)
        self.memory = MemoryTable(())
        self.parameters = count_parameters(self.model.config)
        self.evaluated: tuple[int, Evaluation] | None = None
        if self.start:
            self.start["converted_val_loss"] = finite(self.evaluate().loss)

    def _build(self) -> tuple[PreTrainedModel, QuantizeReport]:
        """A new model; or one like that which training started from, for a checkpoint's tensors."""
        model, report = build_with_recipe(
            model_config(self.config, self.corpus),
            self.recipe,
            self.config.quant.rules_to_bits,
            self.config.train.seed,
        )
        if (start := self.config.model.start_from) is not None:
            take_generation_config(model, find_start(start).folder)
        return model, report

    def _adopts(self, fresh: bool) -> bool:
        return fresh and self.config.model.start_from is not None

    def _adopt(self) -> tuple[PreTrainedModel, QuantizeReport]:
        """The model that training starts from, converted."""
        found = find_start(required(self.config.model.start_from))

        def before(model: PreTrainedModel) -> None:
            loss = self._measure(model).loss
            self.start = {
                "path": str(found.path),
                "architecture": found.architecture,
                "val_loss": finite(loss),
            }

        count, sequences = self.config.quant.calibrate, None
        if count:
            found_rows = self.sampler.batch(self.corpus.train, 0, count)
            sequences = (found_rows if isinstance(found_rows, Tensor) else found_rows[0])[:, :-1]
        return adopt(found, self.recipe, self.config.quant.rules_to_bits, sequences, before)

    @property
    def samples_a_step(self) -> int:
        """Sequences in an update."""
        return self.accumulation * self.batch_size

    @property
    def tokens(self) -> int:
        """Tokens trained on so far."""
        return self.step * self.tokens_a_step

    @property
    def tokens_a_step(self) -> int:
        """Tokens in an update."""
        return self.samples_a_step * self.seq_len

    def restore(self, found: Found) -> None:
        """Goes on from a checkpoint."""
        restore(found.path, found.state, self.model, self.optimizer)
        self.step, self.samples = found.state["step"], found.state["samples"]
        self.elapsed = found.state["elapsed"]
        self.watch = LossWatch(self.config.train.spike_threshold, found.state["losses"])
        self.start = found.state["start"]

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds beside tensors."""
        return {
            "seed": self.config.train.seed,
            "samples": self.samples,
            "elapsed": self.elapsed,
            "losses": self.watch.losses,
            "good": self.watch.good,
            "data_hash": self.corpus.hash,
            "config": self.config.to_dict(),
            "start": self.start,
        }

    def train_step(self, telemetry: bool) -> dict[str, Any]:
        """One update.

        Args:
            telemetry: Whether the optimizer counts what happens to the codes.

        Returns:
            "loss" (mean over the update, in nats a token), "lr", and "grad_norm" before clipping.

        Raises:
            NonFiniteError: NaN or Inf; nothing was changed, or with gradient release not the tensor it names.
            LossSpikeError: A spike, unless `on_spike` ignores it; nothing was changed.
            DataError: A sequence can't be read; nothing was changed.
        """
        number = self.step + 1
        lr = required(self.recipe.lr) * self._lr_factor(number)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
            group["significance"] = self.recipe.significance * number / required(self.config.train.steps)
        self.optimizer.collect_telemetry = telemetry
        try:
            loss = 0.0
            batches = [self._batch(micro_batch) for micro_batch in range(self.accumulation)]
            learnt = [
                tokens.numel() if targets is None else int((targets != IGNORED).sum())
                for tokens, targets in batches
            ]
            for micro_batch, (tokens, targets) in enumerate(batches):
                loss = self._backward(micro_batch, loss, tokens, targets, sum(learnt) / learnt[micro_batch])
            norm = self._clip() if self.release is None else self.release.norm
            self.optimizer.step()
        except (NonFiniteError, LossSpikeError) as error:
            self._abandon()
            last = self.samples + self.samples_a_step - 1
            raise type(error)(f"step {number} (samples {self.samples} to {last}): {error}") from error
        except BaseException:
            self._abandon()
            raise
        if not self.memory.rows:
            self.memory = measure(self.model, self.optimizer)
        self.optimizer.zero_grad(set_to_none=True)
        self.step = number
        self.samples += self.samples_a_step
        self.watch.add(loss)
        return {"loss": loss, "lr": lr, "grad_norm": norm}

    def skip_step(self) -> None:
        """Goes on to the next batch and the next learning rate, without an update."""
        self.step += 1
        self.samples += self.samples_a_step

    def evaluate(self) -> Evaluation:
        """Loss on the fixed windows of the held-out text; not measured twice at one step."""
        if self.evaluated is None or self.evaluated[0] != self.step:
            self.evaluated = (
                self.step,
                self._measure(self.model, autocast(self.recipe, self.model.device.type)),
            )
        return self.evaluated[1]

    def _measure(
        self, model: nn.Module, context: contextlib.AbstractContextManager[Any] | None = None
    ) -> Evaluation:
        with eager(self.config.train.compile):
            return evaluate(
                model,
                self.corpus.val,
                self.seq_len,
                self.config.train.eval_windows,
                token_bytes=self.corpus.token_bytes,
                batch_size=self.batch_size,
                autocast=context,
            )

    # -- the parts of a step ---------------------------------------------------------------------------------

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

    def _batch(self, micro_batch: int) -> tuple[Tensor, Tensor | None]:
        """Tokens of a forward pass, and of conversations the targets."""
        first = self.samples + micro_batch * self.batch_size
        if isinstance(self.sampler, ConversationSampler):
            return self.sampler.batch(self.corpus.train, first, self.batch_size)
        return self.sampler.batch(self.corpus.train, first, self.batch_size), None

    def _backward(
        self, micro_batch: int, before: float, tokens: Tensor, targets: Tensor | None, parts: float
    ) -> float:
        """A forward and a backward pass.

        Args:
            micro_batch: Its number in the update.
            before: Share of the update's loss that earlier ones gave.
            tokens: See `language_model_loss`, as is the next one.
            targets: Of conversations.
            parts: The update's tokens to learn, over those of this pass.

        Returns:
            `before`, and the share of this one.
        """
        device = self.model.device
        with autocast(self.recipe, device.type):
            loss = language_model_loss(
                self.model, tokens.to(device), None if targets is None else targets.to(device)
            )
        total = before + loss.item() / parts
        if not math.isfinite(total):
            raise NonFiniteError(
                f"the loss is {loss.item()}; this step changed nothing. Lower --lr, or set "
                "train.on_nonfinite to skip or rollback"
            )
        judged = micro_batch == self.accumulation - 1 and self.config.train.on_spike != IGNORE
        if judged and total > (limit := self.watch.limit()):
            raise LossSpikeError(
                f"the loss is {total:.3f}, a spike: above {limit:.3f}, {self.watch.threshold:g} deviations "
                "over the last ones; this step changed nothing"
            )
        (loss / parts).backward()
        return total

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

    def _abandon(self) -> None:
        """Forgets the gradients of a step that can't be done."""
        self.optimizer.zero_grad(set_to_none=True)
        if self.release is not None:
            self.release.forget()


def _sampler(corpus: Corpus, seq_len: int, seed: int) -> Sampler | ConversationSampler:
    if corpus.train.marks is not None:
        return ConversationSampler(corpus.train.marks, seq_len, seed)
    return Sampler(len(corpus.train), seq_len, seed)


def model_config(config: Config, corpus: Corpus) -> Any:
    """The `transformers` config: the preset and its overrides, or that of `model.start_from`."""
    if config.model.start_from is not None:
        return float_config(find_start(config.model.start_from))
    tokens = {"bos_token_id": corpus.end_id, "eos_token_id": corpus.end_id}
    return build_config(
        required(config.model.preset),
        required(config.model.arch),
        corpus.vocab_size,
        config.train.seq_len,
        {**config.model.overrides, **tokens},
    )
