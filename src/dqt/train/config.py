"""The configuration of a run: sections of plain values, read from TOML, checked when they are made.

Almost every field may be left out (None): the recipe of the method and bit width, or the preset, decides
then. `resolve` fills these in, and what it returns is written beside the run, so that the file alone
reproduces it. The price of two forms of one config is that code after `resolve` must not be given the other
one; `train` takes both.

    [model]  what is built        [quant]  how weights are stored and multiplied
    [data]   what it reads        [optim]  how it is updated        [train]  for how long, and what is kept
"""

from __future__ import annotations

import dataclasses
import tomllib
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import tomli_w

from dqt.data.prepare import DataSpec
from dqt.errors import ConfigError, did_you_mean
from dqt.models import ARCHITECTURES, PRESETS
from dqt.numerics.formats import parse_bits
from dqt.recipes import Recipe, recipe_for
from dqt.tensor import Products
from dqt.train.schedule import SCHEDULES
from dqt.train.section import Section

LEAVE_FLOAT = "float"
"""What a rule says to leave a weight in float."""

EMBEDDINGS = ("*embed_tokens", "lm_head")
"""Embedding and output head, as the models of `dqt.models` name them."""


RELEASED_CLIP_UPDATE = 1.0
"""`optim.clip_update` with gradient release, where the global norm can't be clipped; Adafactor's d."""


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
    """The network. Fields after `arch` override the preset, under the names of `transformers`."""

    section: ClassVar[str] = "model"

    preset: str = "tiny"
    arch: str = "llama"
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
        self._one_of("preset", PRESETS)
        self._one_of("arch", ARCHITECTURES)

    @property
    def overrides(self) -> dict[str, Any]:
        """The fields that are set beside the preset, as `dqt.models.build_config` takes them."""
        given = {each.name: getattr(self, each.name) for each in fields(self)[2:]}
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
        residual_bits: Remainder bits a weight; 0 is strict.
        hysteresis: In grid steps.
        rounding: Of the write-back.
        forward: Product of the forward pass, "int8" or "float"; the next two are those of the backward pass.
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
    residual_bits: int | None = None
    hysteresis: float | None = None
    rounding: str | None = None
    forward: str | None = None
    grad_input: str | None = None
    grad_weight: str | None = None

    def _validate(self) -> None:
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
class DataConfig(Section):
    """What the model reads; see `dqt.data.prepare.DataSpec`. `vocab_size` of None is the preset's."""

    section: ClassVar[str] = "data"

    source: str = "stdlib"
    text: tuple[str, ...] = ()
    vocab_size: int | None = None
    tokenizer: str | None = None
    val_fraction: float = 0.05
    max_bytes: int | None = None
    dataset_config: str | None = None
    dataset_split: str = "train"
    dataset_column: str = "text"

    def _validate(self) -> None:
        self.spec(vocab_size=4096)

    def spec(self, vocab_size: int | None = None) -> DataSpec:
        """The same for `prepare_corpus`; `vocab_size` stands in where none is set."""
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        return DataSpec(**{**values, "vocab_size": self.vocab_size or vocab_size})


@dataclass(frozen=True)
class OptimConfig(Section):
    """How weights are updated; None is the recipe's.

    Attributes:
        lr: Peak learning rate.
        betas: Moment decay of low-bit weights.
        float_betas: Moment decay of float parameters.
        eps: Of the optimizer.
        weight_decay: Decoupled.
        second_moment: "full", "int8" or "factored".
        first_moment: "fp32", "bf16" or "int8".
        float_first_moment: Of float matrices.
        float_second_moment: Of float matrices.
        grad_clip: Global gradient norm to clip to; 0 does not clip.
        clip_update: Clip of each tensor's step, see `dqt.optim.AdamW`; 0 does not clip.
        warmup_steps: None is the recipe's, or a tenth of the run.
        schedule: "cosine", "linear" or "wsd".
        decay_fraction: Share of the run that decays, for "wsd".
        final_lr_fraction: Fraction of the peak at the end.
    """

    section: ClassVar[str] = "optim"

    lr: float | None = None
    betas: tuple[float, float] | None = None
    float_betas: tuple[float, float] | None = None
    eps: float | None = None
    weight_decay: float | None = None
    second_moment: str | None = None
    first_moment: str | None = None
    float_first_moment: str | None = None
    float_second_moment: str | None = None
    grad_clip: float | None = None
    clip_update: float | None = None
    warmup_steps: int | None = None
    schedule: str | None = None
    decay_fraction: float = 0.2
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
        keep_checkpoints: How many of the newest are kept.
        log_every: Steps between lines of metrics.
        activation_checkpointing: Recompute activations in the backward pass: less memory, a third more time.
        gradient_release: Update each weight inside the backward pass, so that one gradient lives at a time.
        compile: Run the decoder layers through `torch.compile`, see `dqt.train.compiled`.
        fused: Norms, SwiGLU and rotary embedding in one pass each; low-bit methods only, and not `paper`.
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
        if not 0 <= self.seed < 2**32:
            raise ConfigError(f"train.seed = {self.seed} makes no sense: use 0 to {2**32 - 1}")
        if self.out is not None and not self.out.strip():
            raise ConfigError("train.out is empty: name a directory, or leave it out")


@dataclass(frozen=True)
class Config:
    """Everything that defines a run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    quant: QuantConfig = field(default_factory=QuantConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        steps, warmup = self.train.steps, self.optim.warmup_steps
        if steps is not None and warmup is not None and warmup >= steps and self.quant.method != "paper":
            raise ConfigError(f"optim.warmup_steps = {warmup} leaves none of train.steps = {steps}: lower it")
        if self.train.gradient_release and self.optim.grad_clip:
            raise ConfigError(
                f"optim.grad_clip = {self.optim.grad_clip} needs all gradients at once, and "
                "train.gradient_release frees each one: set optim.clip_update instead, or leave both out"
            )
        if self.train.gradient_release and (self.train.accumulation or 1) > 1:
            raise ConfigError(
                f"train.accumulation = {self.train.accumulation} adds gradients up, and "
                "train.gradient_release frees each one: set train.accumulation = 1, or no gradient_release"
            )

    @classmethod
    def from_dict(cls, content: Mapping[str, Any], where: str = "the config") -> Config:
        """Builds a config from nested dictionaries.

        Raises:
            ConfigError: An unknown section or key (with the nearest valid one), a wrong type, or a value
                that makes no sense.
        """
        sections = {}
        for name, values in content.items():
            if name not in SECTIONS:
                raise ConfigError(f"unknown section [{name}] in {where}; {did_you_mean(name, SECTIONS)}")
            if not isinstance(values, Mapping):
                raise ConfigError(f"{name} in {where} is a section: write [{name}], and its keys below")
            for key in values:
                if key not in _keys(SECTIONS[name]):
                    raise ConfigError(f"unknown key {name}.{key} in {where}; {_nearest(name, key)}")
            try:
                sections[name] = SECTIONS[name](**values)
            except ConfigError as error:
                raise ConfigError(f"{where}: {error}") from error
        try:
            return cls(**sections)
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from error

    @classmethod
    def from_toml(cls, path: str | Path) -> Config:
        """Reads a TOML file.

        Raises:
            ConfigError: It can't be read, is no TOML, or see `from_dict`.
        """
        try:
            content = tomllib.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"the config {path} can't be read: {error.strerror}") from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"the config {path} is no valid TOML: {error}") from error
        return cls.from_dict(content, str(path))

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """Nested dictionaries without what is None or empty, as TOML and JSON take them."""
        return {
            name: {
                key: list(value) if isinstance(value, tuple) else value
                for key, value in dataclasses.asdict(getattr(self, name)).items()
                if value is not None and value not in ((), {})
            }
            for name in SECTIONS
        }

    def to_toml(self) -> str:
        """The text of a TOML file from which `from_toml` gives the same config."""
        return tomli_w.dumps(self.to_dict())

    def override(self, values: Mapping[str, Any]) -> Config:
        """Returns a copy with other values, by "section.key"; None leaves a value as it is.

        Raises:
            ConfigError: An unknown key, or a value that makes no sense.
        """
        changes: dict[str, dict[str, Any]] = {}
        for path, value in values.items():
            section, _, key = path.partition(".")
            if section not in SECTIONS or key not in _keys(SECTIONS[section]):
                raise ConfigError(f"unknown key {path}; {_nearest(section, key)}")
            if value is not None:
                changes.setdefault(section, {})[key] = value
        return replace(self, **{name: replace(getattr(self, name), **new) for name, new in changes.items()})

    def recipe(self) -> Recipe:
        """The recipe of the method and bit width, with everything that this config sets."""
        quant, optim = self.quant, self.optim
        own = {name: getattr(quant, name) for name in _QUANT_TO_RECIPE}
        own |= {name: getattr(optim, name) for name in _OPTIM_TO_RECIPE}
        products = {name: getattr(quant, name) for name in _PRODUCTS if getattr(quant, name) is not None}
        if products:
            default = recipe_for(quant.method, quant.bits).products
            own["products"] = replace(default, **products)
        return recipe_for(quant.method, quant.bits, **{k: v for k, v in own.items() if v is not None})


SECTIONS: dict[str, type[Any]] = {
    "model": ModelConfig,
    "quant": QuantConfig,
    "data": DataConfig,
    "optim": OptimConfig,
    "train": TrainConfig,
}
_PRODUCTS = tuple(each.name for each in fields(Products))
_QUANT_TO_RECIPE = (
    "init_gain",
    "scale_rule",
    "headroom",
    "per_row",
    "residual_bits",
    "hysteresis",
    "rounding",
)
_OPTIM_TO_RECIPE = (
    *("lr", "betas", "float_betas", "eps", "weight_decay", "second_moment"),
    *("first_moment", "float_first_moment", "float_second_moment"),
    *("grad_clip", "clip_update", "warmup_steps", "schedule"),
)

_SectionT = TypeVar("_SectionT", bound=Section)


def resolve(config: Config) -> Config:
    """Fills in what the recipe and the preset decide; what it returns reproduces the run, and resolves to
    itself.

    Raises:
        ConfigError: Settings that do not go together.
    """
    import torch

    recipe, preset = config.recipe(), PRESETS[config.model.preset]
    defaults = TRAINING_DEFAULTS[config.model.preset]
    steps = config.train.steps or defaults.steps
    model = _fill(
        config.model, {each.name: getattr(preset, each.name, None) for each in fields(config.model)}
    )
    quant = {name: getattr(recipe, name) for name in ("method", "bits", *_QUANT_TO_RECIPE)}
    optim = {name: getattr(recipe, name) for name in _OPTIM_TO_RECIPE}
    if optim["warmup_steps"] is None:
        optim["warmup_steps"] = steps // 10
    if config.train.gradient_release:  # there is no global norm to clip
        optim |= {"grad_clip": 0.0, "clip_update": 0.0 if recipe.method == "paper" else RELEASED_CLIP_UPDATE}
    train = {
        "steps": steps,
        "seq_len": preset.seq_len,
        "batch_size": defaults.batch_size,
        "accumulation": 1 if config.train.gradient_release else defaults.accumulation,
        "eval_every": max(1, steps // 10),
        "checkpoint_every": max(1, min(1000, steps // 5)),
        "log_every": max(1, steps // 500),
        "activation_checkpointing": defaults.activation_checkpointing,
        "threads": torch.get_num_threads(),
    }
    data = replace(config.data, text=tuple(str(Path(path).absolute()) for path in config.data.text))
    return Config(
        model=model,
        quant=_fill(config.quant, quant | {name: getattr(recipe.products, name) for name in _PRODUCTS}),
        data=_fill(data, {"vocab_size": preset.vocab_size}),
        optim=_fill(config.optim, optim),
        train=_fill(config.train, train),
    )


def required(value: int | None) -> int:
    """A value that `resolve` has filled in."""
    assert value is not None
    return value


def _fill(section: _SectionT, defaults: Mapping[str, Any]) -> _SectionT:
    missing = {name: value for name, value in defaults.items() if getattr(section, name) is None}
    return replace(typing.cast(Any, section), **missing)


def _keys(section: type[Any]) -> list[str]:
    return [each.name for each in fields(section)]


def _nearest(section: str, key: str) -> str:
    """The tail of a message about an unknown key: the section that has it, or the nearest key of this one."""
    if section not in SECTIONS:
        return did_you_mean(section, SECTIONS)
    homes = [name for name in SECTIONS if key in _keys(SECTIONS[name])]
    return f"it belongs in [{homes[0]}]" if homes else did_you_mean(key, _keys(SECTIONS[section]))
