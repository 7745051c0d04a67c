"""The finished model's directory gives the trained model back, and notices what does not fit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from dqt.errors import ModelError
from dqt.tensor import QuantizedTensor
from dqt.train import storage
from dqt.train.savedmodel import load_model, precision
from dqt.train.trainer import Trainer
from train_helpers import run_micro

CASES: list[dict[str, Any]] = [
    {"quant__bits": "ternary"},
    {"quant__bits": "1", "quant__per_row": True, "model__arch": "bitnet"},
    {
        "quant__bits": "8",
        "quant__rules": {"*.mlp.*": "3", "lm_head": 8, "*embed_tokens": 8, "*o_proj": "float"},
    },
    {"quant__bits": "4", "quant__method": "paper", "model__tie_word_embeddings": False},
    {"quant__method": "bitnet"},
    {"quant__method": "fp32"},
]


@pytest.mark.parametrize("values", CASES, ids=lambda values: "-".join(map(str, values.values())))
def test_comes_back_as_it_was_trained(
    values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = []
    original = Trainer.run.__globals__["save_model"]

    def keep(target: Path, model: torch.nn.Module, *rest: Any) -> None:
        kept.append(model)
        original(target, model, *rest)

    monkeypatch.setitem(Trainer.run.__globals__, "save_model", keep)
    result = run_micro(tmp_path, **values)
    model, tokenizer, info = load_model(tmp_path / "run")
    tokens = torch.tensor([tokenizer.core.encode("def main():\n    return").ids])
    with torch.no_grad():
        trained = kept[0].eval()(input_ids=tokens).logits
        assert torch.equal(model(input_ids=tokens).logits, trained)
    assert not model.training
    assert info["summary"]["val_loss"] == result.evaluation.loss
    parameters, before = dict(model.named_parameters()), dict(kept[0].named_parameters())
    assert parameters.keys() == before.keys()
    for name, parameter in before.items():
        assert isinstance(parameters[name], QuantizedTensor) == isinstance(parameter, QuantizedTensor)
        if isinstance(parameter, QuantizedTensor):
            assert parameters[name].format == parameter.format
            assert parameters[name].products == parameter.products
            assert info["tensors"][name]["bits"] == parameter.format.name


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tmp_path = tmp_path_factory.mktemp("saved")
    run_micro(tmp_path, train__steps=1)
    return tmp_path / "run" / "model"


@pytest.fixture
def model_dir(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "model"))


def rewrite(directory: Path, name: str, **changes: Any) -> None:
    """Changes a JSON file, and the manifest with it, as somebody would who means it."""
    path = directory / name
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    (directory / storage.MANIFEST).unlink()
    storage._write_manifest(directory)


def test_files_are_those_that_transformers_reads(finished: Path) -> None:
    from transformers import AutoConfig, AutoTokenizer

    assert {path.name for path in finished.iterdir()} == {
        *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"),
        *("model.safetensors", "dqt.json", "manifest.json"),
    }
    assert AutoConfig.from_pretrained(finished).hidden_size == 32
    tokenizer = AutoTokenizer.from_pretrained(finished)
    assert tokenizer.decode(tokenizer("x = 1")["input_ids"]) == "x = 1"


def test_no_directory_and_no_model(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(ModelError, match="holds no model"):
            load_model(path)


FILES = ("config.json", "tokenizer.json", "model.safetensors", "dqt.json")


@pytest.mark.parametrize("name", FILES)
def test_one_flipped_bit_is_noticed(name: str, model_dir: Path) -> None:
    content = bytearray((model_dir / name).read_bytes())
    content[len(content) // 2] ^= 4
    (model_dir / name).write_bytes(content)
    with pytest.raises(ModelError, match=name):
        load_model(model_dir)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(name: str, model_dir: Path) -> None:
    (model_dir / name).unlink()
    with pytest.raises(ModelError, match=name):
        load_model(model_dir)


def test_a_newer_format(model_dir: Path) -> None:
    rewrite(model_dir, "dqt.json", format_version=7)
    with pytest.raises(ModelError, match=r"dqt.json has format 7, this dqt reads up to 2: update dqt"):
        load_model(model_dir)


def test_a_tokenizer_of_another_model(model_dir: Path) -> None:
    rewrite(model_dir, "config.json", vocab_size=290)
    with pytest.raises(ModelError, match=r"embed_tokens.weight is \(300, 32\) .* the model's \(290, 32\)"):
        load_model(model_dir)


@pytest.mark.parametrize(
    ("name", "changes", "part"),
    [
        ("config.json", {"hidden_size": 64}, "does not fit"),
        ("config.json", {"model_type": "nonsense"}, "makes no model"),
        ("dqt.json", {"tensors": {}}, "does not fit"),
        ("dqt.json", {"tensors": {"no.such.weight": {}}}, "does not fit"),
        ("dqt.json", {"tensors": {"model.norm.weight": {"bits": "9", "shape": [32]}}}, "does not fit"),
    ],
)
def test_parts_that_do_not_fit(name: str, changes: dict[str, Any], part: str, model_dir: Path) -> None:
    rewrite(model_dir, name, **changes)
    with pytest.raises(ModelError, match=part):
        load_model(model_dir)


def test_a_manifest_cannot_point_elsewhere(model_dir: Path) -> None:
    manifest = json.loads((model_dir / "manifest.json").read_text())
    manifest["files"]["../secret"] = {"bytes": 1, "sha256": ""}
    (model_dir / "manifest.json").write_text(storage._manifest_text(manifest["files"]))
    with pytest.raises(ModelError, match="not a plain file"):
        load_model(model_dir)


# -- what save_pretrained wrote ------------------------------------------------------------------------------


@pytest.fixture
def pretrained(model_dir: Path, tmp_path: Path) -> Path:
    """The same model as transformers saves it, with the tokenizer beside it."""
    model, _, _ = load_model(model_dir)
    model.save_pretrained(tmp_path / "pretrained")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(model_dir / name, tmp_path / "pretrained" / name)
    return tmp_path / "pretrained"


def test_what_transformers_saved_is_read(model_dir: Path, pretrained: Path) -> None:
    ours, _, _ = load_model(model_dir)
    theirs, _, info = load_model(pretrained)
    assert [type(module) for module in ours.modules()] == [type(module) for module in theirs.modules()]
    assert all(torch.equal(t, theirs.state_dict()[name]) for name, t in ours.state_dict().items())
    tokens = torch.arange(12)[None]
    with torch.no_grad(), precision(info):
        assert torch.equal(ours(input_ids=tokens).logits, theirs(input_ids=tokens).logits)


def test_a_model_that_was_read_and_changed_saves_what_it_is(model_dir: Path, pretrained: Path) -> None:
    model, _, _ = load_model(pretrained)
    weight = model.model.layers[0].mlp.up_proj.weight
    codes = weight.unpack()
    weight.write_codes(-codes)
    model.save_pretrained(pretrained)
    again, _, _ = load_model(pretrained)
    assert torch.equal(again.model.layers[0].mlp.up_proj.weight.unpack(), -codes)


def test_damage_in_what_transformers_saved(pretrained: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(pretrained / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight.codes"][2, 3] ^= 1
    save_file(tensors, pretrained / "model.safetensors")
    with pytest.raises(ModelError, match=r"layers.1.mlp.up_proj.weight is damaged: codes or scale differ"):
        load_model(pretrained)


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"bitz": 4}, "takes no 'bitz'"),
        ({"format_version": 7}, "has format 7, this dqt reads up to 2: update dqt"),
        ({"weights": [{"bits": "9"}]}, "quantization_config in config.json is damaged"),
        ({"baseline": "nothing"}, "unknown baseline 'nothing'"),
        ({"weights": [{"bits": "4", "products": {}, "sha256": {"no.such.weight": None}}]}, "does not fit"),
        ({"weights": []}, "does not fit"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_config_of_transformers_that_makes_no_model(
    changes: dict[str, Any], part: str, pretrained: Path
) -> None:
    path = pretrained / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] |= changes
    path.write_text(json.dumps(config))
    with pytest.raises(ModelError, match=part):
        load_model(pretrained)
