"""Models: presets that become configs of `transformers`' own classes.

A preset is a handful of sizes; the model classes are `LlamaForCausalLM` and `BitNetForCausalLM` as they are,
so that `generate`, `Trainer`, lm-eval and every export tool work on what comes out. The price is their eager
code, which no trick of ours shortens.

`arch="llama"` is LLaMA. `arch="bitnet"` is the paper's network: LLaMA with a norm before `o_proj` and one
before `down_proj`. The defaults of `BitNetConfig` describe another model (squared ReLU, 5 key-value heads,
rope theta 500,000, and begin and end tokens beyond any small vocabulary, which fail on the first lookup), so
every such field is set here, to the same value for both architectures.

The paper gives the widths of its 130M model only. `320m` and `1b` were chosen here to meet their parameter
counts with LLaMA-like proportions; `7b` and `13b` are LLaMA's. Those of the paper are untied; the small ones,
for a CPU, tie the head to the embedding (of `tiny`, 24 % would be head and embedding otherwise) and use
widths in multiples of 256 (`micro`: 128), which suit packed rows and vector units.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from dqt.allocator import give_back
from dqt.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from dqt.recipes import Recipe
    from dqt.rules import QuantizeReport, Rule


@dataclass(frozen=True)
class Preset:
    """The sizes of a model, under the names that `transformers` gives them.

    Attributes:
        hidden_size: width of the residual stream.
        intermediate_size: width of the feed-forward layer.
        num_hidden_layers: decoder layers.
        num_attention_heads: query heads; as many key-value heads.
        vocab_size: tokens asked of the tokenizer.
        seq_len: tokens per training sequence.
        tie_word_embeddings: whether the head is the embedding.
    """

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    vocab_size: int = 32_002
    seq_len: int = 512
    tie_word_embeddings: bool = False


PRESETS: dict[str, Preset] = {
    "micro": Preset(128, 384, 2, 4, vocab_size=1024, seq_len=128, tie_word_embeddings=True),
    "tiny": Preset(256, 768, 8, 4, vocab_size=4096, seq_len=256, tie_word_embeddings=True),
    "small": Preset(512, 1536, 8, 8, vocab_size=4096, seq_len=512, tie_word_embeddings=True),
    "130m": Preset(768, 2048, 12, 12),
    "320m": Preset(1024, 2816, 20, 16),
    "1b": Preset(2048, 5120, 18, 16),
    "7b": Preset(4096, 11008, 32, 32, vocab_size=32_000, seq_len=2048),
    "13b": Preset(5120, 13824, 40, 40, vocab_size=32_000, seq_len=2048),
}

ARCHITECTURES = ("llama", "bitnet")

INITIALIZER_RANGE = 0.02
"""Standard deviation of first weights, as `transformers` has it."""

# What a preset leaves open and an override may set. The tokenizers of `dqt.data` give `<|endoftext|>` id 0.
_DEFAULTS: dict[str, Any] = {
    "num_key_value_heads": None,
    "rope_theta": 10_000.0,
    "rms_norm_eps": 1e-5,
    "initializer_range": INITIALIZER_RANGE,
    "bos_token_id": 0,
    "eos_token_id": 0,
}


@dataclass(frozen=True)
class ParameterCount:
    """Parameters of a model.

    Attributes:
        total: all of them, a tied head counted once.
        linear: those in the weights of the layers' `nn.Linear` modules, which are quantized by default; no
            head.
    """

    total: int
    linear: int


def build_config(
    preset: str = "tiny",
    arch: str = "llama",
    vocab_size: int | None = None,
    seq_len: int | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> PreTrainedConfig:
    """Builds the `transformers` config of a preset.

    Args:
        preset: a name in `PRESETS`.
        arch: "llama" or "bitnet".
        vocab_size: tokens of the tokenizer in use; None takes the preset's.
        seq_len: longest sequence; None takes the preset's.
        overrides: other values for the fields of `Preset`, or for `num_key_value_heads`, `rope_theta`,
            `rms_norm_eps`, `initializer_range`, `bos_token_id`, `eos_token_id`.

    Returns:
        A `LlamaConfig` or `BitNetConfig`.

    Raises:
        ConfigError: an unknown name, or sizes that do not fit together.
    """
    if preset not in PRESETS:
        raise ConfigError(f"unknown preset {preset!r}: {did_you_mean(preset, PRESETS)}")
    if arch not in ARCHITECTURES:
        raise ConfigError(f"unknown architecture {arch!r}: {did_you_mean(arch, ARCHITECTURES)}")
    fields = asdict(PRESETS[preset]) | _DEFAULTS
    for name, value in (overrides or {}).items():
        if name not in fields:
            raise ConfigError(f"unknown model setting {name!r}: {did_you_mean(name, fields)}")
        fields[name] = value
    fields |= {k: v for k, v in (("vocab_size", vocab_size), ("seq_len", seq_len)) if v is not None}
    if fields["num_key_value_heads"] is None:
        fields["num_key_value_heads"] = fields["num_attention_heads"]
    _validate(fields)

    from transformers import BitNetConfig, LlamaConfig

    max_position_embeddings, rope_theta = fields.pop("seq_len"), fields.pop("rope_theta")
    return (LlamaConfig if arch == "llama" else BitNetConfig)(
        **fields,
        max_position_embeddings=max_position_embeddings,
        rope_parameters={"rope_type": "default", "rope_theta": float(rope_theta)},
        hidden_act="silu",
        attention_bias=False,
    )


def build_model(config: PreTrainedConfig, seed: int, init_gain: float | None = None) -> PreTrainedModel:
    """Builds a freshly initialised causal language model, in float32, with torch's fused attention.

    Args:
        config: any config that `AutoModelForCausalLM` knows.
        seed: the weights are a function of the config and of it; the global random state is left alone.
        init_gain: see `Initializer`.

    Returns:
        The model, in training mode, on the CPU.
    """
    model = empty_model(config)
    Initializer(model, seed, init_gain).finish()
    return model


def build_with_recipe(
    config: PreTrainedConfig, recipe: Recipe, rules: Mapping[str, Rule] | None = None, seed: int = 0
) -> tuple[PreTrainedModel, QuantizeReport]:
    """Builds a new model in the form that a recipe trains, one module at a time.

    The weights are those of `build_model` and `prepare_model_` one after the other, bit for bit; but no more
    than one weight is ever float that does not stay so, and of 7B parameters that is the difference between
    3 GB and 27.

    Args:
        config: see `build_model`.
        recipe: what the weights become.
        rules: see `dqt.quantize_`.
        seed: of the weights.

    Returns:
        The model, and what was converted and what was left.
    """
    from dqt.build import prepare_model_

    model = empty_model(config)
    initializer = Initializer(model, seed, recipe.init_gain)
    report = prepare_model_(model, recipe, rules, initializer)
    initializer.finish()
    return model, report


def empty_model(config: PreTrainedConfig) -> PreTrainedModel:
    """A model of any size that takes no memory, because its tensors are on the meta device.

    It is in training mode, float32, with torch's fused attention, and wants an `Initializer`.
    """
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=torch.float32)
    return model.train()


class Initializer:
    """Gives a model on the meta device its first weights, one module at a time and in any order.

    So a model that is quantized module by module never exists in float: `dqt.quantize_` calls this for a
    module just before it packs its weight. What a module gets is a function of (seed, its name), by the
    model class's own rule.

    Args:
        model: What `empty_model` gave; it is changed in place.
        seed: Of the weights; the global random state is left alone.
        init_gain: Draws the weights of the layers' `nn.Linear`s with a standard deviation of
            init_gain / sqrt(in_features); None leaves it to `transformers` (0.02 for all).
    """

    def __init__(self, model: PreTrainedModel, seed: int, init_gain: float | None = None) -> None:
        self.model, self.seed, self.init_gain = model, seed, init_gain
        self.head = model.get_output_embeddings()

    def __call__(self, name: str) -> None:
        """Makes the tensors that a module itself holds real; shared ones become real in every module."""
        import torch
        from torch import nn

        # Packed weights settle in the holes that float ones leave, so that the next float one does not fit:
        # without this a model of 1B parameters ended up at 3.6 GB instead of 1.0.
        give_back()
        module = self.model.get_submodule(name)
        own = [parameter for parameter in module.parameters(recurse=False) if parameter.is_meta]
        for parameter in own:
            torch.utils.swap_tensors(parameter, nn.Parameter(torch.empty_like(parameter, device="cpu")))
        for buffer in module.buffers(recurse=False):
            torch.utils.swap_tensors(buffer, nn.Buffer(torch.empty_like(buffer, device="cpu")))
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(_seed_of(self.seed, name))
            if len(own) == 1 and own[0] is getattr(
                module, "bias", None
            ):  # beside a weight that is packed already
                nn.init.zeros_(own[0])
            elif self.init_gain is not None and isinstance(module, nn.Linear) and module is not self.head:
                nn.init.normal_(module.weight, std=self.init_gain * module.in_features**-0.5)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            else:
                self.model._init_weights(module)

    def finish(self) -> None:
        """Does so for every module that still has a tensor on the meta device."""
        for name, module in self.model.named_modules():
            if any(t.is_meta for t in (*module.parameters(recurse=False), *module.buffers(recurse=False))):
                self(name)
        give_back()


def _seed_of(seed: int, name: str) -> int:
    """32 bits, which is all that torch's generator for the CPU takes of a seed."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=4).digest())


def count_parameters(config: PreTrainedConfig) -> ParameterCount:
    """Counts the parameters of a config's model, of any size, without allocating them."""
    import torch
    from torch import nn
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    head = model.get_output_embeddings()
    return ParameterCount(
        total=sum(p.numel() for p in model.parameters()),
        linear=sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear) and m is not head),
    )


def _validate(fields: Mapping[str, Any]) -> None:
    """Refuses sizes with which no model can be built, before `transformers` fails on them."""
    for name in (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "vocab_size",
        "seq_len",
    ):
        if type(fields[name]) is not int or fields[name] < 1:
            raise ConfigError(f"{name} must be a positive integer, not {fields[name]!r}")
    for name in ("rope_theta", "rms_norm_eps", "initializer_range"):
        if type(fields[name]) not in (int, float) or not 0 < fields[name] < float("inf"):
            raise ConfigError(f"{name} must be a positive number, not {fields[name]!r}")
    if fields["initializer_range"] > 1:
        raise ConfigError(f"initializer_range must be at most 1, not {fields['initializer_range']!r}")
    if type(fields["tie_word_embeddings"]) is not bool:
        raise ConfigError(f"tie_word_embeddings must be true or false, not {fields['tie_word_embeddings']!r}")

    hidden, heads, kv_heads = (
        fields[k] for k in ("hidden_size", "num_attention_heads", "num_key_value_heads")
    )
    if hidden % heads or hidden // heads % 2:
        raise ConfigError(
            f"hidden_size {hidden} must be an even multiple of num_attention_heads {heads}: "
            "rotary embeddings turn pairs within a head"
        )
    if heads % kv_heads:
        raise ConfigError(f"num_attention_heads {heads} must be a multiple of num_key_value_heads {kv_heads}")
    for name in ("bos_token_id", "eos_token_id"):
        token = fields[name]
        if token is not None and (type(token) is not int or not 0 <= token < fields["vocab_size"]):
            raise ConfigError(
                f"{name} {token!r} is not in the vocabulary of {fields['vocab_size']} tokens (0 and up)"
            )
