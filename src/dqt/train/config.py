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
from typing import Any, TypeVar

import tomli_w

from dqt.choices import PRODUCTS
from dqt.data.spec import DataSpec
from dqt.errors import ConfigError, did_you_mean
from dqt.models import INITIALIZER_RANGE
from dqt.recipe import refuse_rules
from dqt.recipes import Recipe, headroom_rule, lr_rule, recipe_for
from dqt.train.given import given
from dqt.train.guard import SKIP
from dqt.train.schedule import root_of_squares
from dqt.train.section import Section
from dqt.train.sections import (
    SECTIONS,
    ModelConfig,
    OptimConfig,
    QuantConfig,
    TrainConfig,
)

_MOST_BYTES = 1 << 20

RELEASED_CLIP_UPDATE = 1.0
"""`optim.clip_update` with gradient release, where the global norm can't be clipped; Adafactor's d."""


@dataclass(frozen=True)
class Config:
    """Everything that defines a run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    quant: QuantConfig = field(default_factory=QuantConfig)
    data: DataSpec = field(default_factory=DataSpec)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        steps, warmup = self.train.steps, self.optim.warmup_steps
        if steps is not None and warmup is not None and warmup >= steps and self.quant.method != "paper":
            raise ConfigError(f"optim.warmup_steps = {warmup} leaves none of train.steps = {steps}: lower it")
        if self.model.start_from is not None and self.quant.init_gain is not None:
            raise ConfigError(
                f"quant.init_gain = {self.quant.init_gain} is for new weights: leave it out, or "
                "model.start_from"
            )
        if self.model.start_from is None and self.quant.calibrate:
            raise ConfigError(
                f"quant.calibrate = {self.quant.calibrate} is for trained weights: leave it out, or "
                "set model.start_from"
            )
        refuse_rules(self.recipe(), self.quant.rules_to_bits)
        if self.train.gradient_release and self.optim.grad_clip:
            raise ConfigError(
                f"optim.grad_clip = {self.optim.grad_clip} needs all gradients at once, and "
                "train.gradient_release frees each one: set optim.clip_update instead, or leave both out"
            )
        if self.train.gradient_release and self.train.on_nonfinite == SKIP:
            raise ConfigError(
                "train.on_nonfinite = skip drops a step whole, and train.gradient_release may have done half "
                "of it when it finds NaN: use rollback or stop"
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
            if (size := Path(path).stat().st_size) > _MOST_BYTES:
                raise ConfigError(f"the config {path} has {size} bytes, more than any config can have")
            content = tomllib.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"the config {path} can't be read: {error.strerror}") from error
        except (ValueError, RecursionError) as error:  # TOML, UTF-8, or a number of 5,000 digits
            raise ConfigError(f"the config {path} is no valid TOML: {str(error)[:200]}") from error
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
        trained = self.model.start_from is not None
        own = {name: getattr(quant, name) for name in _QUANT_TO_RECIPE}
        own |= {name: getattr(optim, name) for name in _OPTIM_TO_RECIPE}
        own["optimizer"] = optim.name
        asked = {name: value for name, value in own.items() if value is not None}
        products = {name: getattr(quant, name) for name in _PRODUCTS if getattr(quant, name) is not None}
        if products:
            environment: dict[str, Any] = {"environment": quant.environment} if quant.environment else {}
            default = recipe_for(quant.method, quant.bits, trained=trained, **environment).products
            asked["products"] = replace(default, **products)
        return recipe_for(quant.method, quant.bits, trained=trained, **asked)


_PRODUCTS = (*PRODUCTS, "compute_bits")
_QUANT_TO_RECIPE = (
    "init_gain",
    "scale_rule",
    "headroom",
    "per_row",
    "frozen_scale",
    "residual_bits",
    "hysteresis",
    "rounding",
    "error_feedback",
    "environment",
)
_OPTIM_TO_RECIPE = (
    *("lr", "betas", "float_betas", "eps", "weight_decay", "second_moment"),
    *("first_moment", "float_first_moment", "float_second_moment"),
    *("drop_smallest", "significance", "grad_clip", "clip_update", "warmup_steps", "schedule"),
)

_SectionT = TypeVar("_SectionT", bound=Section)
_ValueT = TypeVar("_ValueT")


def resolve(config: Config) -> Config:
    """Fills in what the recipe and the preset decide; what it returns reproduces the run, and resolves to
    itself.

    Raises:
        ConfigError: Settings that do not go together.
    """
    recipe, known = config.recipe(), given(config.model, config.data, config.train)
    steps = config.train.steps or known.training.steps
    quant = {name: getattr(recipe, name) for name in ("method", "bits", *_QUANT_TO_RECIPE)}
    optim = {name: getattr(recipe, name) for name in _OPTIM_TO_RECIPE}
    lr = recipe.lr or lr_rule(recipe, required(known.model.hidden_size))
    optim |= {"name": recipe.optimizer, "lr": lr}
    if optim["warmup_steps"] is None:
        optim["warmup_steps"] = steps // 10
    ends = config.optim.final_lr_fraction, config.optim.decay_fraction
    walk = lr * root_of_squares(steps, optim["warmup_steps"], recipe.schedule, *ends)
    spread = known.model.initializer_range or INITIALIZER_RANGE
    if recipe.init_gain is not None:
        spread = recipe.init_gain / required(known.model.hidden_size) ** 0.5
    quant["headroom"] = headroom_rule(recipe, walk, spread)
    if config.train.gradient_release:  # there is no global norm to clip
        clips = recipe.method != "paper" and recipe.optimizer != "sgd"
        optim |= {"grad_clip": 0.0, "clip_update": RELEASED_CLIP_UPDATE if clips else recipe.clip_update}
    train = {
        "steps": steps,
        "seq_len": known.seq_len,
        "batch_size": known.training.batch_size,
        "accumulation": 1 if config.train.gradient_release else known.training.accumulation,
        "eval_every": max(1, steps // 10),
        "checkpoint_every": max(1, min(1000, steps // 5)),
        "log_every": max(1, steps // 500),
        "activation_checkpointing": known.training.activation_checkpointing,
        "threads": config.train.threads or _threads(),
    }
    data = replace(config.data, text=_absolute(config.data.text), chat=_absolute(config.data.chat))
    return Config(
        model=known.model,
        quant=_fill(config.quant, quant | {name: getattr(recipe.products, name) for name in _PRODUCTS}),
        data=_fill(data, {"vocab_size": known.vocab_size}),
        optim=_fill(config.optim, optim),
        train=_fill(config.train, train),
    )


def _absolute(paths: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(str(Path(path).absolute()) for path in paths)


def _threads() -> int:
    """As many as torch takes."""
    import torch

    return torch.get_num_threads()


def required(value: _ValueT | None) -> _ValueT:
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
