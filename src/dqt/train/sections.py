"""The sections of a run's config: dataclasses of plain values, checked when they are made.

Almost every field may be left out (None): the recipe of the method and bit width, or the preset, decides
then; see `dqt.train.config.resolve`. What can only be told from several sections is checked there too.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

from dqt.data.spec import DataSpec
from dqt.errors import ConfigError
from dqt.models import ARCHITECTURES, PRESETS
from dqt.numerics.formats import parse_bits
from dqt.start import name_of
from dqt.train.guard import IGNORE, ON_NONFINITE, ON_SPIKE, STOP
from dqt.train.schedule import DECAY_FRACTION, SCHEDULES
from dqt.train.section import Section

LEAVE_FLOAT = "float"
"""What a rule says to leave a weight in float."""

EMBEDDINGS = ("*embed_tokens", "lm_head")
"""Embedding and output head, as the models of `dqt.models` name them."""


@dataclass(frozen=True)
class TrainingDefaults:
    """How long a preset trains unless told otherwise, and on how much a step."""

    steps: int
    batch_size: int
    accumulation: int = 1
    activation_checkpointing: bool = False


# `tiny` takes about five minutes on two cores in ternary. Those of the paper are sized for its batches, not
# for a CPU.
TRAINING_DEFAULTS = {
    "micro": TrainingDefaults(steps=400, batch_size=8),
    "tiny": TrainingDefaults(steps=400, batch_size=8),
    "small": TrainingDefaults(steps=1000, batch_size=8),
    "130m": TrainingDefaults(steps=20_000, batch_size=8, accumulation=8),
    "320m": TrainingDefaults(steps=20_000, batch_size=4, accumulation=16),
    "1b": TrainingDefaults(steps=20_000, batch_size=1, accumulation=64, activation_checkpointing=True),
    "7b": TrainingDefaults(steps=20_000, batch_size=1, accumulation=64, activation_checkpointing=True),
    "13b": TrainingDefaults(steps=20_000, batch_size=1, accumulation=64, activation_checkpointing=True),
}


@dataclass(frozen=True)
class ModelConfig(Section):
    """The network. Fields after `arch` override the preset, under the names of `transformers`.

    Attributes:
        start_from: A trained model to go on from, see `dqt.start`; all other fields are then its own.
        preset: A key of `PRESETS`.
        arch: One of `ARCHITECTURES`, or that of the model in `start_from`.
    """

    section: ClassVar[str] = "model"

    start_from: str | None = None
    preset: str | None = None
    arch: str | None = None
    hidden_size: int | None = None
    intermediate_size: int | None = None
    num_hidden_layers: int | None = None
    num_attention_heads: int | None = None
    num_key_value_heads: int | None = None
    tie_word_embeddings: bool | None = None
    rope_theta: float | None = None
    rms_norm_eps: float | None = None
    initializer_range: float | None = None

    def _validate(self) -> None:
        self._at_least(1, "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        self._at_least(1, "num_key_value_heads")
        if self.start_from is None:
            self._one_of("preset", PRESETS)
            self._one_of("arch", ARCHITECTURES)
        elif self.preset is not None:
            raise ConfigError(
                f"model.start_from and model.preset = {self.preset!r} both say which model: give one of them"
            )

    @property
    def name(self) -> str:
        """What a person calls the model: the preset's name, or that of what it starts from."""
        return name_of(self.start_from) if self.start_from is not None else str(self.preset)

    @property
    def overrides(self) -> dict[str, Any]:
        """The fields that are set beside the preset, as `dqt.models.build_config` takes them."""
        given = {each.name: getattr(self, each.name) for each in fields(self)[3:]}
        return {name: value for name, value in given.items() if value is not None}


@dataclass(frozen=True)
class QuantConfig(Section):
    """How weights are stored and multiplied; None is the default of the method and bit width.

    Attributes:
        method: One of `dqt.recipes.METHODS`.
        bits: "ternary", or "1" to "8".
        embeddings: Bits of the embedding and the output head, or "float".
        rules: Glob pattern on module names to bits, or to "float"; the last one that matches wins, over
            `embeddings` too.
        init_gain: Standard deviation of new linear weights times the root of their inputs.
        scale_rule: How the grid step is set.
        headroom: Factor on the rule's grid step.
        per_row: One scale a row.
        frozen_scale: Keep the grid step of the start; `paper` recomputes it at every step.
        calibrate: Sequences of the text on which the first codes of a trained model are chosen; 0 for none.
        residual_bits: Remainder bits a weight; 0 is strict, 32 a float.
        hysteresis: In grid steps.
        rounding: Of the write-back, one of `dqt.numerics.rounding.ROUNDINGS`.
        error_feedback: "none", or "eco".
        environment: "fp32", "bf16" or "fp8": activations, gradients and moments beside the low-bit weights.
        forward: Product of the forward pass, "int8" or "float"; the next two are those of the backward pass.
        compute_bits: "stored", or "ternary".
    """

    section: ClassVar[str] = "quant"

    method: str | None = None
    bits: str | None = None
    embeddings: str = LEAVE_FLOAT
    rules: dict[str, str] = field(default_factory=dict)
    init_gain: float | None = None
    scale_rule: str | None = None
    headroom: float | None = None
    per_row: bool | None = None
    frozen_scale: bool | None = None
    calibrate: int = 0
    residual_bits: int | None = None
    hysteresis: float | None = None
    rounding: str | None = None
    error_feedback: str | None = None
    environment: str | None = None
    forward: str | None = None
    grad_input: str | None = None
    grad_weight: str | None = None
    compute_bits: str | None = None

    def _validate(self) -> None:
        self._at_least(0, "calibrate")
        if self.bits is not None:
            object.__setattr__(self, "bits", parse_bits(self.bits).name)
        if self.embeddings != LEAVE_FLOAT:
            try:
                object.__setattr__(self, "embeddings", parse_bits(self.embeddings).name)
            except ConfigError as error:
                raise ConfigError(f"quant.embeddings: {error}, {LEAVE_FLOAT}") from error
        for pattern, bits in self.rules.items():
            if bits != LEAVE_FLOAT:
                try:
                    parse_bits(bits)
                except ConfigError as error:
                    raise ConfigError(f"quant.rules {pattern!r}: {error}, {LEAVE_FLOAT}") from error

    @property
    def rules_to_bits(self) -> dict[str, str | int | None]:
        """The rules as `dqt.quantize_` takes them, those of `embeddings` first."""
        rules = {} if self.embeddings == LEAVE_FLOAT else dict.fromkeys(EMBEDDINGS, self.embeddings)
        return {p: None if bits == LEAVE_FLOAT else bits for p, bits in (rules | self.rules).items()}


@dataclass(frozen=True)
class OptimConfig(Section):
    """How weights are updated; None is the recipe's.

    Attributes:
        name: One of `dqt.recipe.OPTIMIZERS`.
        lr: Peak learning rate.
        betas: Moment decay of low-bit weights; of the layers' linear weights where the method is a float one.
        float_betas: Moment decay of all other parameters.
        eps: Of AdamW.
        weight_decay: Decoupled.
        second_moment: One of `dqt.optim.moments.SECOND_MOMENTS`.
        first_moment: One of `dqt.optim.moments.FIRST_MOMENTS`.
        float_first_moment: Of float matrices.
        float_second_moment: Of float matrices.
        drop_smallest: Share of the smallest updates of low-bit weights that is dropped.
        significance: How many times what noise makes of it a direction must be at the end of the run.
        grad_clip: Global gradient norm to clip to; 0 does not clip.
        clip_update: Clip of each tensor's step, see `dqt.optim.AdamW`; 0 does not clip.
        warmup_steps: None is the recipe's, or a tenth of the run.
        schedule: "cosine", "linear" or "wsd".
        decay_fraction: Share of the run that decays, for "wsd".
        final_lr_fraction: Fraction of the peak at the end.
    """

    section: ClassVar[str] = "optim"

    name: str | None = None
    lr: float | None = None
    betas: tuple[float, float] | None = None
    float_betas: tuple[float, float] | None = None
    eps: float | None = None
    weight_decay: float | None = None
    second_moment: str | None = None
    first_moment: str | None = None
    float_first_moment: str | None = None
    float_second_moment: str | None = None
    drop_smallest: float | None = None
    significance: float | None = None
    grad_clip: float | None = None
    clip_update: float | None = None
    warmup_steps: int | None = None
    schedule: str | None = None
    decay_fraction: float = DECAY_FRACTION
    final_lr_fraction: float = 0.0

    def _validate(self) -> None:
        self._at_least(0, "weight_decay", "grad_clip", "clip_update", "warmup_steps")
        for name in ("lr", "eps"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise ConfigError(f"optim.{name} = {value} makes no sense: use a number above 0")
        for name in ("betas", "float_betas"):
            if any(not 0 <= beta < 1 for beta in getattr(self, name) or ()):
                raise ConfigError(
                    f"optim.{name} = {list(getattr(self, name))} makes no sense: use 0 up to below 1"
                )
        self._share("decay_fraction", "final_lr_fraction")
        self._one_of("schedule", SCHEDULES)


@dataclass(frozen=True)
class TrainConfig(Section):
    """How long, on how much a step, and what is kept; None is the preset's, or follows from `steps`.

    Attributes:
        steps: Updates.
        seq_len: Tokens in a sequence.
        batch_size: Sequences in a forward pass.
        accumulation: Forward passes in an update.
        eval_every: Steps between evaluations.
        eval_windows: Sequences in an evaluation.
        checkpoint_every: Steps between checkpoints.
        keep_checkpoints: How many of the newest are kept; the best and the last good one are beside them.
        log_every: Steps between lines of metrics.
        activation_checkpointing: Recompute activations in the backward pass: less memory, a third more time.
        gradient_release: Update each weight inside the backward pass, so that one gradient lives at a time.
        compile: Run the decoder layers through `torch.compile`, see `dqt.train.compiled`.
        fused: Norms, SwiGLU, rotary embedding, attention in one pass each; low-bit methods, but not `paper`.
        on_nonfinite: What to do about NaN and Inf: one of `dqt.train.guard.ON_NONFINITE`.
        on_spike: What to do about a spike of the loss: one of `dqt.train.guard.ON_SPIKE`.
        spike_threshold: Deviations above the median of the last losses from which a loss is a spike.
        on_write_error: "stop", or "continue" without a checkpoint or line that can't be written.
        give_back_memory: Return freed memory to the system at once: less memory, more time; see `allocator`.
        memory_limit: Size that the run must fit into, as in "16GB"; None is what the system has available.
        seed: Of weights, order of data, and rounding.
        threads: CPU threads; results may differ in the last bits between numbers of threads.
        out: The run's directory; None makes one under `runs/`.
        prompt: Beginning of the sample text; None takes the first words of the held-out text.
        sample_tokens: Length of the sample text; 0 writes none.
    """

    section: ClassVar[str] = "train"

    steps: int | None = None
    seq_len: int | None = None
    batch_size: int | None = None
    accumulation: int | None = None
    eval_every: int | None = None
    eval_windows: int = 64
    checkpoint_every: int | None = None
    keep_checkpoints: int = 2
    log_every: int | None = None
    activation_checkpointing: bool | None = None
    gradient_release: bool = False
    compile: bool = False
    fused: bool = True
    on_nonfinite: str = STOP
    on_spike: str = IGNORE
    spike_threshold: float = 10.0
    on_write_error: str = STOP
    give_back_memory: bool = False
    memory_limit: str | None = None
    seed: int = 0
    threads: int | None = None
    out: str | None = None
    prompt: str | None = None
    sample_tokens: int = 100

    def _validate(self) -> None:
        self._at_least(
            1,
            *("steps", "seq_len", "batch_size", "accumulation", "eval_every", "eval_windows"),
            *("checkpoint_every", "keep_checkpoints", "log_every", "threads"),
        )
        self._at_least(0, "sample_tokens")
        self._one_of("on_nonfinite", ON_NONFINITE)
        self._one_of("on_spike", ON_SPIKE)
        self._one_of("on_write_error", ("stop", "continue"))
        if not 1 <= self.spike_threshold < float("inf"):
            raise ConfigError(f"train.spike_threshold = {self.spike_threshold} makes no sense: use 1 or more")
        if not 0 <= self.seed < 2**32:
            raise ConfigError(f"train.seed = {self.seed} makes no sense: use 0 to {2**32 - 1}")
        if self.out is not None and not self.out.strip():
            raise ConfigError("train.out is empty: name a directory, or leave it out")


SECTIONS: dict[str, type[Any]] = {
    "model": ModelConfig,
    "quant": QuantConfig,
    "data": DataSpec,
    "optim": OptimConfig,
    "train": TrainConfig,
}
