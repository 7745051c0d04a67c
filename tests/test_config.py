"""Configs: defaults that depend on each other, TOML round trips, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dqt.errors import ConfigError
from dqt.models import PRESETS
from dqt.recipe import METHODS, OPTIMIZERS
from dqt.train.config import Config, resolve
from dqt.train.sections import TRAINING_DEFAULTS

REFUSED = [  # TOML, parts of the message
    ("[modle]\npreset = 'tiny'", ["unknown section [modle]", "did you mean 'model'"]),
    ("[train]\nstepps = 3", ["unknown key train.stepps", "did you mean 'steps'"]),
    ("[train]\nlr = 0.1", ["unknown key train.lr", "belongs in [optim]"]),
    ("train = 3", ["train", "is a section"]),
    ("[train]\nsteps = '3'", ["train.steps must be a whole number, not '3'"]),
    ("[train]\nsteps = 3.0", ["train.steps must be a whole number"]),
    ("[train]\nsteps = true", ["train.steps must be a whole number"]),
    ("[train]\nsteps = 0", ["train.steps = 0", "1 or more"]),
    ("[train]\nseed = -1", ["train.seed = -1"]),
    ("[train]\nout = ''", ["train.out is empty"]),
    ("[train]\nactivation_checkpointing = 1", ["true or false"]),
    ("[optim]\nlr = 0", ["optim.lr = 0"]),
    ("[optim]\nlr = nan", ["optim.lr = nan"]),
    ("[optim]\nlr = 'fast'", ["optim.lr must be a number"]),
    ("[optim]\nbetas = [0.9]", ["optim.betas must be a list of 2"]),
    ("[optim]\nbetas = [0.9, 1.0]", ["optim.betas"]),
    ("[optim]\nschedule = 'cosin'", ["optim.schedule", "did you mean 'cosine'"]),
    ("[optim]\nwarmup_steps = 10\n[train]\nsteps = 10", ["optim.warmup_steps = 10", "train.steps = 10"]),
    ("[optim]\ngrad_clip = 1\n[train]\ngradient_release = true", ["optim.grad_clip = 1", "clip_update"]),
    ("[train]\naccumulation = 2\ngradient_release = true", ["train.accumulation = 2", "gradient_release"]),
    ("[optim]\nclip_update = -1", ["optim.clip_update"]),
    ("[optim]\nfinal_lr_fraction = 2.0", ["0 to 1"]),
    ("[model]\npreset = 'tine'", ["unknown model.preset 'tine'", "did you mean 'tiny'"]),
    ("[model]\narch = 'gpt'", ["unknown model.arch 'gpt'"]),
    ("[quant]\nbits = 9", ["unknown bits '9'"]),
    ("[quant.rules]\n'*.mlp.*' = 'ternery'", ["quant.rules '*.mlp.*'", "did you mean 'ternary'"]),
    ("[quant]\nembeddings = 'flot'", ["quant.embeddings", "unknown bits 'flot'", "float"]),
    ("[data]\nvocab_size = 5", ["vocab_size 5"]),
    ("[data]\ntext = 'a.txt'", ["data.text must be a list"]),
    ("[data\n", ["no valid TOML", "line 1"]),
]


@pytest.mark.parametrize(("text", "parts"), REFUSED)
def test_refused_with_place_and_advice(text: str, parts: list[str], tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_text(text)
    with pytest.raises(ConfigError) as error:
        Config.from_toml(path)
    message = str(error.value)
    assert all(part in message for part in [*parts, str(path)]), message
    assert message.count("\n") <= 1


def test_a_config_that_is_not_there_or_not_text(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"can't be read"):
        Config.from_toml(tmp_path / "none.toml")
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="no valid TOML"):
        Config.from_toml(tmp_path / "binary.toml")


REFUSED_TOGETHER = [
    ({"quant.method": "strikt"}, "did you mean 'strict'"),
    ({"quant.method": "fp32", "quant.bits": "4"}, "fp32"),
    ({"quant.method": "paper", "quant.bits": "1"}, "1-bit"),
    ({"quant.method": "strict", "quant.residual_bits": 8}, "residual"),
    ({"quant.method": "paper", "optim.clip_update": 1.0}, "clip_update"),
    ({"quant.scale_rule": "gausian"}, "gaussian"),
    ({"quant.forward": "int4"}, "int4"),
    ({"optim.second_moment": "half"}, "second_moment"),
    ({"optim.name": "adam"}, "did you mean 'adamw'"),
    ({"optim.name": "sgd", "optim.second_moment": "full"}, "SGD has no second moment"),
    ({"quant.method": "fp32", "quant.rules": {"*.mlp.*": "8"}}, "takes no rules"),
    ({"quant.method": "fp32", "quant.embeddings": "8"}, "takes no rules or bits of embeddings"),
    ({"quant.method": "paper", "quant.rules": {"lm_head": "1"}}, "no 1-bit format"),
    (
        {"quant.bits": "8", "quant.compute_bits": "ternary", "quant.rules": {"*.mlp.*": "2"}},
        r"rule '\*.mlp.\*': .* not 2",
    ),
    ({"quant.method": "bitnet", "quant.forward": "float"}, "reads no products"),
    ({"quant.headroom": -1.0}, "headroom"),
]


@pytest.mark.parametrize(("values", "part"), REFUSED_TOGETHER)
def test_settings_that_do_not_go_together(values: dict[str, Any], part: str) -> None:
    with pytest.raises(ConfigError, match=part):
        Config().override(values)


@pytest.mark.parametrize("method", [None, *METHODS])
@pytest.mark.parametrize("preset", PRESETS)
def test_resolving_fills_everything_and_survives_toml(preset: str, method: str | None) -> None:
    given = Config().override(
        {"model.preset": preset, "quant.method": method, "train.prompt": 'a "quoted"\nline'}
    )
    config = resolve(given)
    assert Config.from_dict(config.to_dict()) == config
    assert resolve(config) == config
    assert config.recipe() == given.recipe().__class__(
        **{**vars(given.recipe()), "warmup_steps": config.optim.warmup_steps, "lr": config.optim.lr}
    )
    left_open = {
        f"{name}.{key}"
        for name in ("model", "quant", "data", "optim", "train")
        for key, value in vars(getattr(config, name)).items()
        if value is None
    }
    # What stays open has no default: it belongs to the run's directory, or is nothing by nature.
    by_nature = {"data.tokenizer", "data.max_bytes", "data.dataset_config", "train.out", "train.memory_limit"}
    by_nature |= {"quant.scale_rule", "quant.init_gain", "model.start_from"}
    by_nature |= {
        f"model.{key}" for key in ("num_key_value_heads", "rope_theta", "rms_norm_eps", "initializer_range")
    }
    if method in ("fp32", "bf16", "bitnet"):
        by_nature.add("quant.bits")
    assert left_open <= by_nature
    assert config.train.steps == TRAINING_DEFAULTS[preset].steps


def test_toml_file_round_trip(tmp_path: Path) -> None:
    config = Config().override(
        {"quant.rules": {"*.mlp.*": 4, "lm_head": "float"}, "data.text": ["a.txt"], "optim.betas": [0, 0.9]}
    )
    assert config.quant.rules_to_bits == {"*.mlp.*": "4", "lm_head": None}
    assert config.optim.betas == (0.0, 0.9)
    path = tmp_path / "config.toml"
    path.write_text(config.to_toml())
    assert Config.from_toml(path) == config


def test_embeddings_are_rules_that_rules_override() -> None:
    given = Config().override({"quant.embeddings": 8, "quant.rules": {"lm_head": "float"}})
    assert given.quant.rules_to_bits == {"*embed_tokens": "8", "lm_head": None}
    assert Config().quant.rules_to_bits == {}


def test_override_wins_and_none_leaves_alone() -> None:
    config = (
        Config()
        .override({"train.steps": 7, "quant.bits": 4})
        .override({"train.steps": 9, "quant.bits": None})
    )
    assert (config.train.steps, config.quant.bits) == (9, "4")
    with pytest.raises(ConfigError, match="did you mean 'steps'"):
        config.override({"train.step": 1})


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_resolves_with_and_without_release(name: str) -> None:
    for release in (False, True):
        config = resolve(Config().override({"optim.name": name, "train.gradient_release": release}))
        assert resolve(config) == config
        assert config.recipe().optimizer == name
        assert config.recipe().clip_update == (name != "sgd" and (release or name == "adafactor"))


def test_settings_reach_the_recipe() -> None:
    config = Config().override(
        {
            "quant.bits": 4,
            "quant.method": "residual",
            "quant.residual_bits": 4,
            "quant.grad_weight": "float",
            "optim.lr": 0.5,
            "optim.betas": [0.5, 0.6],
        }
    )
    recipe = resolve(config).recipe()
    assert (recipe.bits, recipe.residual_bits, recipe.lr, recipe.betas) == ("4", 4, 0.5, (0.5, 0.6))
    assert recipe.products.grad_weight == "float"
    assert recipe.products.forward == "int8"
