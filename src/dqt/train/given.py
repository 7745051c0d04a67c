"""What a config need not say, because the preset or the model that training starts from says it.

Sizes of a model that is gone on from are written into the config that is kept beside the run, so that memory
can be foretold from it; a config that names others is refused, not followed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from dqt.data.spec import DataSpec
from dqt.errors import ConfigError
from dqt.models import PRESETS
from dqt.start import Start, find_start
from dqt.train.sections import TRAINING_DEFAULTS, ModelConfig, TrainConfig, TrainingDefaults

DEFAULT_PRESET, DEFAULT_ARCH = "tiny", "llama"

START_DEFAULTS, START_SEQ_LEN = TrainingDefaults(steps=200, batch_size=4), 512
"""How long a trained model goes on, and on what sequences at the most, unless told otherwise."""


@dataclass(frozen=True)
class Given:
    """What follows for a config.

    Attributes:
        model: Its section, filled in.
        vocab_size: Tokens to ask for, or those of the model.
        seq_len: Tokens in a sequence.
        training: How long, and on how much a step.
    """

    model: ModelConfig
    vocab_size: int
    seq_len: int
    training: TrainingDefaults


def given(model: ModelConfig, data: DataSpec, train: TrainConfig) -> Given:
    """What follows from these sections.

    Raises:
        ConfigError: If they contradict the model that training starts from.
        ModelError: If that is none.
    """
    if model.start_from is not None:
        return _by_start(model, data, train, find_start(model.start_from))
    name = model.preset or DEFAULT_PRESET
    preset = PRESETS[name]
    values = {key: getattr(preset, key) for key in vars(model) if hasattr(preset, key)}
    values |= {"preset": name, "arch": DEFAULT_ARCH}
    return Given(_fill(model, values), preset.vocab_size, preset.seq_len, TRAINING_DEFAULTS[name])


def _by_start(model: ModelConfig, data: DataSpec, train: TrainConfig, start: Start) -> Given:
    own = {"arch": start.architecture, **start.sizes}
    asked = {"arch": model.arch, **model.overrides}
    for key, value in asked.items():
        if value is not None and value != own.get(key):
            known = f"has {own[key]}" if key in own else "says that itself"
            raise ConfigError(f"model.{key} = {value}, and the model in {start.path} {known}: leave it out")
    if data.vocab_size not in (None, start.vocab_size):
        raise ConfigError(
            f"data.vocab_size = {data.vocab_size}, and the model in {start.path} has "
            f"{start.vocab_size}: leave it out"
        )
    if data.tokenizer is not None:
        raise ConfigError(f"data.tokenizer is for new models, that in {start.path} has its own: leave it out")
    longest = start.longest or START_SEQ_LEN
    if train.seq_len is not None and start.longest is not None and train.seq_len > longest:
        raise ConfigError(
            f"train.seq_len = {train.seq_len}, and the model in {start.path} knows {longest} "
            "positions: lower it"
        )
    filled = replace(_fill(model, own), start_from=str(start.path))
    return Given(filled, start.vocab_size, min(START_SEQ_LEN, longest), START_DEFAULTS)


def _fill(model: ModelConfig, values: dict[str, Any]) -> ModelConfig:
    return replace(model, **{key: value for key, value in values.items() if getattr(model, key) is None})
