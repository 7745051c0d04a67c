"""`from_pretrained` and `save_pretrained` keep every bit of a low-bit model, and refuse what is none."""

from __future__ import annotations

import json
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from transformers.trainer_utils import validate_quantization_for_training

import dqt
import dqt.hf
from dqt.baselines import BitLinear
from dqt.errors import ConfigError, DqtError, ModelError
from dqt.fused import is_fused
from dqt.models import build_config, build_model
from dqt.packed import read_description
from dqt.start import find_start
from dqt.tensor import QuantizedTensor
from dqt.train.pretrained import load_float
from dqt.train.savedmodel import load_model
from export_helpers import VOCABULARY, saved_model
from train_helpers import run_micro

TOKENS = torch.arange(5, 29).view(2, 12)
UNTIED = {"tie_word_embeddings": False}
SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2}


def logits(model: torch.nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS).logits


def assert_same_model(first: PreTrainedModel, second: PreTrainedModel) -> None:
    """Equal tensors, formats and outputs, to the bit."""
    ours, theirs = first.state_dict(), second.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype, name
        assert torch.equal(tensor, theirs[name]), name
    parameters = dict(second.named_parameters())
    for name, parameter in first.named_parameters():
        if isinstance(parameter, QuantizedTensor):
            assert parameter.format == parameters[name].format
            assert parameter.products == parameters[name].products
            assert parameters[name].requires_grad
    assert torch.equal(logits(first), logits(second))


CASES: list[dict[str, Any]] = [
    {},
    {"bits": 1, "per_row": True, "arch": "bitnet"},
    {"bits": 3, "rules": {"*.mlp.*": 8, "*embed_tokens": 5, "*o_proj": None}},
    {"bits": 8, "rules": {"lm_head": 8}, "sizes": {**SMALL, **UNTIED}},
    {"bits": 4, "method": "paper"},
    {"bits": None, "method": "bitnet"},
    {"bits": None, "method": "fp32"},
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_model_directory_is_read_and_written(case: dict[str, Any], tmp_path: Path) -> None:
    saved_model(tmp_path, **{"sizes": SMALL, **case})
    expected, _, _ = load_model(tmp_path / "model")
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert_same_model(expected, read)
    assert [type(m) for m in expected.modules()] == [type(m) for m in read.modules()]
    for model in (read, expected):
        model.save_pretrained(tmp_path / "again")
        assert_same_model(expected, AutoModelForCausalLM.from_pretrained(tmp_path / "again"))
    assert not any(module.weight.is_meta for module in read.modules() if hasattr(module, "weight"))


def test_what_dqt_train_leaves_is_what_transformers_reads(tmp_path: Path) -> None:
    run_micro(tmp_path, train__steps=3)
    expected, _, info = load_model(tmp_path / "run")
    assert info["fused"]
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    assert is_fused(read)
    assert_same_model(expected, read)


CONVERSIONS: list[dict[str, Any]] = [
    {},
    {"bits": 8, "per_row": True, "scale_rule": "absmax", "headroom": 2.0},
    {"bits": 4, "rules": {"*embed_tokens": 8, "*.0.mlp.*": "ternary", "*.1.self_attn.*": None}},
    {"bits": 2, "products": dqt.Products("float", "float", "float")},
]


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("settings", CONVERSIONS, ids=str)
def test_converts_while_it_reads_as_quantize_does_afterwards(
    settings: dict[str, Any], tied: bool, tmp_path: Path
) -> None:
    sizes = {**SMALL, "tie_word_embeddings": tied}
    build_model(build_config("micro", vocab_size=VOCABULARY, overrides=sizes), 0).save_pretrained(
        tmp_path / "f"
    )
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "f")
    dqt.quantize_(expected, **{"bits": "ternary", "trained": True, **settings})
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "f", quantization_config=dqt.DqtConfig(**settings))
    assert_same_model(expected, read)
    assert (read.lm_head.weight is read.model.embed_tokens.weight) == tied
    # The same as plain values, as in a command line or a YAML file.
    plain = json.loads(json.dumps(dqt.DqtConfig(**settings).to_dict()))
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "f", quantization_config=plain)
    assert_same_model(expected, again)


def test_one_float_weight_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build_model(build_config("micro", vocab_size=VOCABULARY), 0).save_pretrained(tmp_path)
    alive: list[Any] = []
    most = 0

    def watched(name: str, weight: Tensor, *rest: Any) -> Tensor:
        nonlocal most
        alive.append(weakref.ref(weight))
        most = max(most, sum(reference() is not None for reference in alive))
        return original(name, weight, *rest)

    original = dqt.hf.initial_scale
    monkeypatch.setattr(dqt.hf, "initial_scale", watched)
    AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=dqt.DqtConfig())
    assert len(alive) == 14
    assert most == 1


def test_a_quantized_model_of_ones_own(tmp_path: Path) -> None:
    config = build_config("micro", vocab_size=VOCABULARY, overrides=UNTIED)
    model = build_model(config, 0)
    dqt.quantize_(model, 4)
    dqt.fuse_(model)
    model.save_pretrained(tmp_path)
    read = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert is_fused(read)
    assert_same_model(model.eval(), read)
    dqt.quantize_(read, 8, {"lm_head": 8})  # what was float until then
    read.save_pretrained(tmp_path)
    assert_same_model(read, AutoModelForCausalLM.from_pretrained(tmp_path))


def test_parts_and_sums_of_a_model(tmp_path: Path) -> None:
    saved_model(tmp_path, sizes={**SMALL, **UNTIED}, rules={"lm_head": 8})
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    inner = AutoModel.from_pretrained(tmp_path / "model")
    inner.save_pretrained(tmp_path / "inner")
    outer = AutoModelForCausalLM.from_pretrained(tmp_path / "inner")
    for model in (inner, outer.model):
        with torch.no_grad():
            hidden = model(input_ids=TOKENS).last_hidden_state
            assert torch.equal(hidden, whole.model(input_ids=TOKENS).last_hidden_state)


def test_dequantize_gives_the_same_values_as_floats(tmp_path: Path) -> None:
    saved_model(tmp_path, sizes=SMALL, rules={"*embed_tokens": 8})
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    values = {name: p.dequantize() for name, p in model.named_parameters() if isinstance(p, QuantizedTensor)}
    model.dequantize()
    model.save_pretrained(tmp_path / "floats")
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "floats")
    assert not any(isinstance(p, QuantizedTensor) for p in read.parameters())
    assert len(values) == 8
    for name, value in values.items():
        assert torch.equal(read.get_parameter(name), value)


def test_a_run_s_model_as_floats_says_nothing_of_codes(tmp_path: Path) -> None:
    """`dqt train --from RUN` starts from it, with method fp32 too."""
    model = load_float(find_start(saved_model(tmp_path, sizes=SMALL)))
    model.save_pretrained(tmp_path / "floats")
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "floats")
    assert not any(isinstance(p, QuantizedTensor) for p in read.parameters())
    assert_same_model(model.eval(), read)


def test_trainer_accepts_it(tmp_path: Path) -> None:
    saved_model(tmp_path, sizes=SMALL)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert model.is_quantized
    validate_quantization_for_training(model)


def test_the_use_of_the_config_registers_the_method() -> None:
    """That `import dqt` alone imports nothing heavy is held by test_layering."""
    assert dqt.DqtConfig is dqt.hf.DqtConfig
    assert AUTO_QUANTIZER_MAPPING["dqt"] is dqt.hf.DqtQuantizer


# -- bad input -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("saved")
    return saved_model(directory, sizes=SMALL) / "model"


NAME = "model.layers.0.mlp.up_proj.weight"
Tensors = dict[str, Tensor]


def without_codes(tensors: Tensors, settings: dict[str, Any]) -> None:
    del tensors[f"{NAME}.codes"]


def without_scale(tensors: Tensors, settings: dict[str, Any]) -> None:
    del tensors[f"{NAME}.scale"]


def one_bit_flipped(tensors: Tensors, settings: dict[str, Any]) -> None:
    tensors[f"{NAME}.codes"][3, 5] ^= 1


def another_scale(tensors: Tensors, settings: dict[str, Any]) -> None:
    tensors[f"{NAME}.scale"] *= 2


def no_code_of_the_format(tensors: Tensors, settings: dict[str, Any]) -> None:
    tensors[f"{NAME}.codes"].fill_(0b10101010)
    settings["weights"][0]["sha256"][NAME] = None


def no_scale_at_all(tensors: Tensors, settings: dict[str, Any]) -> None:
    tensors[f"{NAME}.scale"].fill_(torch.nan)
    settings["weights"][0]["sha256"][NAME] = None


def other_sizes(tensors: Tensors, settings: dict[str, Any]) -> None:
    tensors[f"{NAME}.codes"] = tensors[f"{NAME}.codes"][:, 1:].contiguous()


def float_codes(tensors: Tensors, settings: dict[str, Any]) -> None:
    tensors[f"{NAME}.codes"] = tensors[f"{NAME}.codes"].float()


def other_bits(tensors: Tensors, settings: dict[str, Any]) -> None:
    settings["weights"][0]["bits"] = "4"


def unknown_bits(tensors: Tensors, settings: dict[str, Any]) -> None:
    settings["weights"][0]["bits"] = "9"


def unknown_products(tensors: Tensors, settings: dict[str, Any]) -> None:
    settings["weights"][0]["products"]["forward"] = "int3"


def damaged_description(tensors: Tensors, settings: dict[str, Any]) -> None:
    settings["weights"] = {"bits": "4"}


def no_description(tensors: Tensors, settings: dict[str, Any]) -> None:
    del settings["weights"]


def an_undescribed_weight(tensors: Tensors, settings: dict[str, Any]) -> None:
    del settings["weights"][0]["sha256"][NAME]


def a_weight_of_no_module(tensors: Tensors, settings: dict[str, Any]) -> None:
    settings["weights"][0]["sha256"]["model.layers.9.mlp.up_proj.weight"] = None


def a_newer_format(tensors: Tensors, settings: dict[str, Any]) -> None:
    settings["format_version"] = 99


def an_unknown_setting(tensors: Tensors, settings: dict[str, Any]) -> None:
    settings["bitz"] = 4


def an_unknown_baseline(tensors: Tensors, settings: dict[str, Any]) -> None:
    settings["baseline"] = "bitnet2"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without_codes, f"{NAME}.codes is missing from the files"),
        (without_scale, f"{NAME}.scale is missing from the files"),
        (one_bit_flipped, f"{NAME} is damaged: codes or scale differ from the SHA-256"),
        (another_scale, f"{NAME} is damaged: codes or scale differ from the SHA-256"),
        (no_code_of_the_format, f"{NAME} is damaged: codes outside of the ternary format"),
        (no_scale_at_all, f"{NAME} is damaged: its scale is not finite and positive"),
        (other_sizes, f"{NAME} does not fit the model"),
        (float_codes, f"{NAME} does not fit the model"),
        (other_bits, "does not fit the model"),
        (unknown_bits, "quantization_config in config.json is damaged.*unknown bits '9'"),
        (unknown_products, "quantization_config in config.json is damaged.*int3"),
        (damaged_description, "quantization_config in config.json is damaged"),
        (no_description, "config.json names no low-bit weights"),
        (an_undescribed_weight, f"config.json does not say what {NAME}.codes is"),
        (a_weight_of_no_module, "layers.9.mlp.up_proj.weight.codes is missing from the files"),
        (a_newer_format, "config.json has format 99, this dqt reads up to 2: update dqt"),
        (an_unknown_setting, "takes no 'bitz'; did you mean 'bits'"),
        (an_unknown_baseline, "unknown baseline 'bitnet2'"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_a_saved_model_that_is_not_whole(
    damage: Callable[[Tensors, dict[str, Any]], None], message: str, saved: Path, tmp_path: Path
) -> None:
    model = Path(shutil.copytree(saved, tmp_path / "model"))
    tensors, config = load_file(model / "model.safetensors"), json.loads((model / "config.json").read_text())
    damage(tensors, config["quantization_config"])
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    (model / "config.json").write_text(json.dumps(config))
    with pytest.raises(DqtError, match=message) as caught:
        AutoModelForCausalLM.from_pretrained(model)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bits": 9}, "unknown bits 9; valid: 1, ternary"),
        ({"rules": {"*": "tenary"}}, "unknown bits 'tenary'; did you mean 'ternary'"),
        ({"scale_rule": "absmx"}, "unknown scale_rule 'absmx'; did you mean 'absmax'"),
        ({"headroom": 0}, "headroom=0 must be above 0"),
        ({"products": {"forward": "int7"}}, "unknown product forward='int7'"),
        ({"products": {"backward": "int8"}}, "products must name Products' fields"),
        ({"method": "residual"}, "takes no 'method'"),
    ],
    ids=str,
)
def test_settings_that_make_no_sense(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        dqt.DqtConfig(**settings)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            {"quantization_config": dqt.DqtConfig(rules={"*.mpl.*": 4})},
            ConfigError,
            r"match no module .*\*.mpl.\*",
        ),
        ({"quantization_config": dqt.DqtConfig(weights=[])}, ConfigError, "leave weights out"),
        ({"quantization_config": dqt.DqtConfig(), "device_map": {"": "disk"}}, ConfigError, "not offloaded"),
    ],
    ids=["rule", "weights", "disk"],
)
def test_conversions_that_are_refused(
    arguments: dict[str, Any], error: type[Exception], message: str, tmp_path: Path
) -> None:
    build_model(build_config("micro", vocab_size=VOCABULARY, overrides=SMALL), 0).save_pretrained(tmp_path)
    with pytest.raises(error, match=message):
        AutoModelForCausalLM.from_pretrained(tmp_path, **arguments)


def test_weights_that_are_no_numbers(tmp_path: Path) -> None:
    model = build_model(build_config("micro", vocab_size=VOCABULARY, overrides=SMALL), 0)
    with torch.no_grad():
        model.get_parameter(NAME)[2, 3] = torch.inf
    model.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=f"{NAME} holds NaN or Inf and can't be quantized"):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=dqt.DqtConfig())


def test_another_library_s_config_is_refused(saved: Path) -> None:
    with pytest.raises(ValueError, match="DqtConfig but you are passing a BitsAndBytesConfig"):
        AutoModelForCausalLM.from_pretrained(saved, quantization_config=BitsAndBytesConfig(load_in_8bit=True))


def test_a_description_names_a_weight_once() -> None:
    group = {"bits": "4", "products": {}, "sha256": {NAME: None}}
    assert list(read_description([group])) == [NAME]
    with pytest.raises(ModelError, match="named twice"):
        read_description([group, group])


def test_bitnet_b158_stays_what_it_was(tmp_path: Path) -> None:
    saved_model(tmp_path, bits=None, method="bitnet", sizes=SMALL)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert sum(isinstance(module, BitLinear) for module in model.modules()) == 7
