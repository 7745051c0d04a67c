"""Presets: sizes as documented, both architectures run, and what cannot work is refused."""

import pytest
import torch
from torch import nn

from dqt.build import prepare_model_
from dqt.errors import ConfigError
from dqt.models import (
    ARCHITECTURES,
    PRESETS,
    Initializer,
    build_config,
    build_model,
    build_with_recipe,
    count_parameters,
    empty_model,
)
from dqt.recipes import recipe_for
from dqt.tensor import QuantizedTensor

# name: (least and most parameters in all, in millions), linear weights
SIZES = {
    "micro": (0.5, 0.6, 425_984),
    "tiny": (5, 10, 6_815_744),
    "small": (25, 35, 27_262_976),
    "130m": (127, 137, 84_934_656),
    "320m": (310, 330, 256_901_120),
    "1b": (980, 1020, 868_220_928),
    "7b": (6_700, 6_750, 6_476_005_376),
    "13b": (13_000, 13_050, 12_687_769_600),
}


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("preset", PRESETS)
def test_preset_has_the_documented_size(preset: str, arch: str) -> None:
    least, most, linear = SIZES[preset]
    config = build_config(preset, arch)
    count = count_parameters(config)
    assert least * 1e6 <= count.total <= most * 1e6
    assert count.linear == linear
    assert config.max_position_embeddings == PRESETS[preset].seq_len


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_count_is_that_of_the_built_model(arch: str) -> None:
    config = build_config("micro", arch)
    model = build_model(config, seed=0)
    linear = [m for m in model.model.modules() if isinstance(m, nn.Linear)]
    assert count_parameters(config).total == sum(p.numel() for p in model.parameters())
    assert count_parameters(config).linear == sum(m.weight.numel() for m in linear)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("tied", [True, False])
def test_model_learns_and_generates(arch: str, tied: bool) -> None:
    model = build_model(build_config("micro", arch, overrides={"tie_word_embeddings": tied}), seed=0)
    tokens = torch.arange(64).reshape(2, 32)
    loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    assert abs(loss.item() - 6.93) < 0.15  # ln 1024: nothing learned yet
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert model.eval().generate(tokens[:, :4], max_new_tokens=3, do_sample=False).shape[1] <= 7


def test_bitnet_is_llama_with_a_norm_before_each_output_projection() -> None:
    llama, bitnet = (build_model(build_config("micro", arch), seed=0) for arch in ("llama", "bitnet"))
    names = {name for name, _ in bitnet.named_parameters()} - {name for name, _ in llama.named_parameters()}
    assert {name.split(".", 3)[3] for name in names} == {
        "self_attn.attn_sub_norm.weight",
        "mlp.ffn_sub_norm.weight",
    }
    for field in ("hidden_act", "rms_norm_eps", "rope_parameters", "bos_token_id", "num_key_value_heads"):
        assert getattr(llama.config, field) == getattr(bitnet.config, field), field
    assert llama.config.rope_parameters["rope_theta"] == 10_000.0


def test_initialisation_depends_on_the_seed_alone() -> None:
    config = build_config("micro")
    before = torch.get_rng_state()
    first = build_model(config, seed=1)
    torch.rand(3)
    assert not torch.equal(torch.get_rng_state(), before)
    torch.set_rng_state(before)
    second, other = build_model(config, seed=1), build_model(config, seed=2)
    assert torch.equal(torch.get_rng_state(), before)
    pairs = list(zip(first.parameters(), second.parameters(), strict=True))
    assert all(torch.equal(a, b) and a.dtype == torch.float32 for a, b in pairs)
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)
    assert first.config._attn_implementation == "sdpa"
    assert first.training


def test_overrides_reach_the_config() -> None:
    overrides = {"num_key_value_heads": 2, "rope_theta": 500, "eos_token_id": 5, "intermediate_size": 100}
    config = build_config("micro", "llama", vocab_size=300, seq_len=64, overrides=overrides)
    assert (config.vocab_size, config.max_position_embeddings) == (300, 64)
    assert (config.num_key_value_heads, config.intermediate_size, config.eos_token_id) == (2, 100, 5)
    assert config.rope_parameters["rope_theta"] == 500.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"preset": "tinny"}, "did you mean 'tiny'"),
        ({"arch": "lama"}, "did you mean 'llama'"),
        ({"overrides": {"hidden": 64}}, "did you mean 'hidden_size'"),
        ({"vocab_size": 0}, "vocab_size must be a positive integer"),
        ({"seq_len": -1}, "seq_len must be a positive integer"),
        ({"overrides": {"num_hidden_layers": 2.0}}, "num_hidden_layers must be a positive integer"),
        ({"overrides": {"num_hidden_layers": True}}, "num_hidden_layers must be a positive integer"),
        ({"overrides": {"num_attention_heads": 3}}, "hidden_size 256 must be an even multiple"),
        ({"overrides": {"num_attention_heads": 256}}, "hidden_size 256 must be an even multiple"),
        ({"overrides": {"num_key_value_heads": 3}}, "num_attention_heads 4 must be a multiple"),
        ({"overrides": {"rope_theta": 0}}, "rope_theta must be a positive number"),
        ({"overrides": {"rms_norm_eps": float("nan")}}, "rms_norm_eps must be a positive number"),
        ({"overrides": {"initializer_range": 2}}, "initializer_range must be at most 1"),
        ({"overrides": {"tie_word_embeddings": 1}}, "tie_word_embeddings must be true or false"),
        ({"overrides": {"eos_token_id": 4096}}, "eos_token_id 4096 is not in the vocabulary"),
    ],
)
def test_what_cannot_work_is_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_config(**arguments)


def test_init_gain_redraws_the_linear_layers_only() -> None:
    config = build_config("micro", overrides={"num_hidden_layers": 1})
    plain, scaled = build_model(config, seed=3), build_model(config, seed=3, init_gain=1.5)
    for (name, before), after in zip(plain.named_parameters(), scaled.parameters(), strict=True):
        if "proj" in name:
            assert after.std().item() == pytest.approx(1.5 * before.shape[1] ** -0.5, rel=0.05)
        else:
            assert torch.equal(before, after), name


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize(
    ("method", "bits", "rules", "tied"),
    [
        ("residual", "ternary", {"model.layers.0.*": 8, "*.up_proj": None}, True),
        ("strict", "8", {"*embed*": 8, "lm_head": 8}, False),
        ("strict", "8", {"lm_head": 8}, True),
        ("paper", "4", None, True),
        ("bitnet", None, None, False),
        ("fp32", None, None, True),
    ],
)
def test_module_by_module_gives_the_weights_of_the_whole_at_once(
    arch: str, method: str, bits: str | None, rules: dict | None, tied: bool
) -> None:
    config = build_config("micro", arch, overrides={"tie_word_embeddings": tied})
    recipe = recipe_for(method, bits)
    whole = build_model(config, 3, recipe.init_gain)
    report = prepare_model_(whole, recipe, rules)
    model, its_report = build_with_recipe(config, recipe, rules, 3)
    assert (its_report.converted, its_report.left) == (report.converted, report.left)
    expected = whole.state_dict() | dict(whole.named_buffers())
    found = model.state_dict() | dict(model.named_buffers())
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert model.training
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    tokens = torch.arange(64).reshape(2, 32)
    assert torch.equal(model(tokens).logits, whole(tokens).logits)


def test_one_float_weight_exists_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    most = 0
    draw = Initializer.__call__

    def watch(self: Initializer, name: str) -> None:
        nonlocal most
        draw(self, name)
        linear = [m.weight for m in self.model.modules() if isinstance(m, nn.Linear) and m is not self.head]
        floats = [w for w in linear if not w.is_meta and not isinstance(w, QuantizedTensor)]
        most = max(most, len(floats))

    monkeypatch.setattr(Initializer, "__call__", watch)
    model, report = build_with_recipe(build_config("micro"), recipe_for())
    assert most == 1
    assert len(report.converted) == 14
    assert not any(p.is_meta for p in model.parameters())


def test_a_module_s_weights_depend_on_its_name_and_not_on_the_order() -> None:
    config = build_config("micro")
    model, other = empty_model(config), empty_model(config)
    Initializer(model, seed=1).finish()
    backwards = Initializer(other, seed=1)
    for name, _ in reversed(list(other.named_modules())):
        backwards(name)
    for (name, first), second in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(first, second), name
    first, second = (layer.mlp.up_proj.weight for layer in model.model.layers)
    assert not torch.equal(first, second)
