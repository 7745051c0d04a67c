"""Exports compute what `dqt` computes, in the real other programs; what can't be exported is refused."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from dqt.choices import Products
from dqt.cli import main
from dqt.errors import ConfigError, ModelError
from dqt.export import gguf_file, hf
from dqt.export.command import export
from dqt.export.llama_cpp import LIKELIEST, next_log_probs
from dqt.export.source import copy_tokenizer, load_source, without_masters
from dqt.export.verify import Agreement, sample
from dqt.tensor import QuantizedTensor
from dqt.train import storage
from export_helpers import VOCABULARY, saved_model

SPECIAL = "<|endoftext|>"
TEXT = [os.__file__, __file__]
"""What exports are verified on; this file holds a special token, which is text there."""
GROUPED = {"num_key_value_heads": 2}

BITS = {"Q1_0": 1.125, "TQ2_0": 2.0625, "Q4_0": 4.5, "Q8_0": 8.5, "F16": 16, "F32": 32}
"""Bits a weight that docs/export.md promises."""

# What is exported, where to, and what the GGUF file holds most of.
CASES: list[tuple[dict[str, Any], str, str | None]] = [
    ({}, "hf", None),
    ({"bits": 8}, "hf", None),
    ({"bits": 3, "arch": "bitnet", "sizes": {"tie_word_embeddings": False}}, "hf", None),
    ({"bits": None, "method": "bitnet"}, "hf", None),
    ({"bits": None, "method": "fp32"}, "hf", None),
    ({"bits": 4, "method": "paper"}, "hf", None),
    ({}, "hf-bitnet", None),
    ({"arch": "bitnet", "sizes": {"tie_word_embeddings": False}}, "hf-bitnet", None),
    ({"rules": {"*.o_proj": None}, "biases": True}, "hf-bitnet", None),
    ({"bits": None, "method": "bitnet"}, "hf-bitnet", None),
    ({"sizes": GROUPED}, "gguf", "TQ2_0"),
    ({"arch": "bitnet"}, "gguf", "TQ2_0"),
    ({"sizes": GROUPED, "biases": True}, "gguf", "TQ2_0"),
    ({"bits": 1}, "gguf", "Q1_0"),
    ({"bits": 2, "sizes": GROUPED, "per_row": True}, "gguf", "TQ2_0"),
    ({"bits": 3}, "gguf", "Q4_0"),
    ({"bits": 4, "rules": {"*embed_tokens": 8}}, "gguf", "Q4_0"),
    ({"bits": 8, "sizes": {"tie_word_embeddings": False}}, "gguf", "Q8_0"),
    (
        {
            "bits": 8,
            "products": Products(compute_bits="ternary"),
            "rules": {"*embed_tokens": 8},
            "sizes": {"tie_word_embeddings": False},
        },
        "gguf",
        "TQ2_0",
    ),
    ({"bits": 4, "method": "paper"}, "gguf", "Q4_0"),
    ({"bits": None, "method": "fp32"}, "gguf", "F16"),
]


@pytest.mark.parametrize(("model", "target", "kind"), CASES, ids=str)
def test_computes_the_same(model: dict[str, Any], target: str, kind: str | None, tmp_path: Path) -> None:
    run = saved_model(tmp_path, **model)
    result = export(run, target, verify_tokens=60, text=TEXT)
    assert result.agreement is not None
    assert result.agreement.holds
    assert result.agreement.tokens >= 60
    card = (result.path / "README.md").read_text(encoding="utf-8")
    assert "# m\n\nTrained with dqt" in card
    assert f"```\n{result.agreement}\n```" in card
    if target == "gguf":
        reader = gguf.GGUFReader(result.path / "m.gguf")
        kinds = [tensor.tensor_type.name for tensor in reader.tensors if len(tensor.shape) > 1]
        assert max(set(kinds), key=kinds.count) == kind
        bits = sum(int(np.prod(t.shape)) * BITS[t.tensor_type.name] for t in reader.tensors)
        assert bits / 8 < result.files["m.gguf"] < bits / 8 + 20_000  # the tokenizer
    else:
        weights = list(without_masters(load_source(run)).model.parameters())
        packed = [w.numel() for w in weights if isinstance(w, QuantizedTensor) and target == "hf-bitnet"]
        size = 4 * sum(w.numel() for w in weights) - 15 / 4 * sum(packed)
        assert size < result.files["model.safetensors"] < size + 5_000  # its header
        assert {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"} <= set(
            result.files
        )


GOOD = Agreement("gguf", "a program", 2000, 0.1, 0.05, 0, 0.01, 0.2, 3, 0.02)


@pytest.mark.parametrize(
    ("changes", "holds"),
    [
        ({}, True),
        ({"largest": 0.11, "beyond": 1}, False),
        ({"margin": 0.11}, False),
        ({"target": "hf", "disagreements": 0, "anywhere": 0.1}, True),
        ({"target": "hf", "disagreements": 1, "anywhere": 0.1}, False),
        ({"target": "hf", "disagreements": 0, "anywhere": 0.11}, False),
    ],
    ids=str,
)
def test_what_is_near_enough(changes: dict[str, Any], holds: bool) -> None:
    assert dataclasses.replace(GOOD, **changes).holds is holds


def test_llama_cpp_tells_of_the_token_that_follows_and_of_the_likeliest(tmp_path: Path) -> None:
    """Whatever follows: a half letter, an end, the likeliest token or one far from it."""
    run = saved_model(tmp_path)
    path = export(run, "gguf").path / "m.gguf"
    window = [5, 0, *range(90, VOCABULARY, 10), 0]
    (found,), _ = next_log_probs(path, [window], [], VOCABULARY)
    logits = load_source(run).model(input_ids=torch.tensor([window[:-1]])).logits[0]
    own = logits.log_softmax(-1).detach().numpy()
    listed = np.isfinite(found)
    assert listed[np.arange(len(window) - 1), window[1:]].all()
    assert set(listed.sum(1)) == {LIKELIEST, LIKELIEST + 1, VOCABULARY}
    np.testing.assert_allclose(
        found[listed], own[listed], rtol=0, atol=0.2
    )  # activations are rounded elsewhere
    assert found[listed.all(1)].size, "no half letter among them"


def test_rows_in_the_wrong_order_do_not_verify(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = saved_model(tmp_path)
    monkeypatch.setattr(gguf_file, "_row_order", lambda *arguments: None)
    with pytest.raises(ModelError, match="does not compute what dqt does, nothing was written") as caught:
        export(run, "gguf", verify_tokens=60, text=TEXT)
    assert len(str(caught.value).splitlines()) == 2
    assert not (run / "export").exists() or not any((run / "export").iterdir())


def test_the_other_meaning_of_the_scale_does_not_verify(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = saved_model(tmp_path)
    monkeypatch.setattr(torch.Tensor, "reciprocal", lambda scale: scale)
    with pytest.raises(ModelError, match="does not compute what dqt does"):
        export(run, "hf-bitnet", verify_tokens=60, text=TEXT)


@pytest.mark.parametrize(
    ("bits", "width", "kinds"),
    [("ternary", 128, {"Q4_0"}), ("1", 96, {"Q4_0"}), (8, 48, {"F32"}), ("ternary", 48, {"F16"})],
    ids=str,
)
def test_rows_that_fit_no_block_go_into_a_larger_type_when_asked(
    bits: str | int, width: int, kinds: set[str], tmp_path: Path
) -> None:
    sizes = {"hidden_size": width, "intermediate_size": width, "num_attention_heads": 2}
    run = saved_model(tmp_path, bits=bits, sizes=sizes)
    with pytest.raises(ModelError, match=rf"rows of {width}.*\n.*--lossless"):
        export(run, "gguf")
    assert not (run / "export" / "gguf").exists()
    result = export(run, "gguf", lossless=True)
    assert any(f"rows of {width}" in note for note in result.notes)
    found = {tensor.name: tensor for tensor in gguf.GGUFReader(result.path / "m.gguf").tensors}
    assert {t.tensor_type.name for name, t in found.items() if "ffn_up" in name} == kinds
    tensor = found["blk.0.ffn_up.weight"]
    values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    weight = load_source(run).model.get_parameter("model.layers.0.mlp.up_proj.weight")
    assert np.array_equal(values, weight.dequantize().numpy())


REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"arch": "bitnet", "sizes": {"tie_word_embeddings": False}}, "gguf", "has a head of its own"),
    ({"bits": 4}, "hf-bitnet", "has 4 bits: use --to hf"),
    ({"per_row": True}, "hf-bitnet", "one scale a tensor"),
    ({"bits": None, "method": "fp32"}, "hf-bitnet", "has no ternary weights"),
    ({"sizes": {"intermediate_size": 254}}, "hf-bitnet", "254 rows"),
]


@pytest.mark.parametrize(("model", "target", "message"), REFUSED, ids=str)
def test_what_a_format_cannot_hold_is_refused(
    model: dict[str, Any], target: str, message: str, tmp_path: Path
) -> None:
    run = saved_model(tmp_path, **model)
    with pytest.raises(ModelError, match=message):
        export(run, target)
    assert not (run / "export" / target).exists()


def test_scales_of_rows_that_are_the_same_are_one_scale_a_tensor(tmp_path: Path) -> None:
    source = load_source(saved_model(tmp_path, per_row=True))
    for parameter in source.model.parameters():
        if isinstance(parameter, QuantizedTensor):
            parameter.scale.fill_(0.25)
    hf.write_hf_bitnet(source, tmp_path)
    written = load_file(tmp_path / "model.safetensors")
    scales = [tensor.tolist() for name, tensor in written.items() if name.endswith("weight_scale")]
    assert scales == [[4.0]] * 7


LLAMA = {
    "model_type": "llama",
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "rope_parameters": {"rope_type": "default"},
}


@pytest.mark.parametrize(
    ("changes", "write", "message"),
    [
        (
            {"model_type": "qwen2"},
            gguf_file.write_gguf,
            "gguf has no mapping for the architecture 'qwen2', only",
        ),
        (
            {"model_type": "qwen2"},
            hf.write_hf_bitnet,
            "hf-bitnet has no mapping for the architecture 'qwen2'",
        ),
        ({"hidden_act": "relu2"}, gguf_file.write_gguf, "llama computes SiLU, this model 'relu2'"),
        ({"rope_parameters": {"rope_type": "yarn"}}, gguf_file.write_gguf, "no mapping for rope_type 'yarn'"),
    ],
)
def test_models_without_a_mapping(
    changes: dict[str, Any], write: Callable[..., Any], message: str, run: Path, tmp_path: Path
) -> None:
    model = SimpleNamespace(config=SimpleNamespace(**LLAMA | changes))
    with pytest.raises(ModelError, match=message):
        write(dataclasses.replace(load_source(run), model=model), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("context", "tokens"), [(32, 5000), (8192, 8000), (8192, 60)])
def test_as_much_is_compared_as_was_asked_for(run: Path, context: int, tokens: int, tmp_path: Path) -> None:
    source = load_source(run)
    source.model.config.max_position_embeddings = context
    sizes = [len(window) - 1 for window in sample(source, tokens, TEXT).windows]
    assert tokens <= sum(sizes) < tokens + context
    assert max(sizes) < context
    (tmp_path / "some.txt").write_text("Some words of text.\n" * tokens)
    with pytest.raises(ConfigError, match=f"too few to verify {99 * tokens}"):
        sample(source, 99 * tokens, [str(tmp_path)])


# -- the command ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_model(tmp_path_factory.mktemp("export"))


BAD_INPUT = {
    "{run} --to ggfu": "did you mean 'gguf'?",
    "{run}": "required: --to",
    "{run}/none --to hf": "there is no directory",
    "{run}/tokenizer --to hf": "holds no model",
    "{checkpoint} --to hf": "is a checkpoint",
    "{run} --to hf --verify 0": "at least 1 token, not 0",
    "{run} --to hf --text {run}": "add --verify",
    "{run} --to hf --verify --text {run}/none": "none does not exist",
    "{run} --to hf --out {run}": "exists already: give another --out",
    "{run} --to hf --out {run} --overwrite": "exists already: give another --out",
    "{run} --to hf --out {run}/model --overwrite": "exists already: give another --out",
    "{run} --to hf --out {checkpoint} --overwrite": "exists already: give another --out",
    "{run} --to hf --verify 60 --text {short}": "too few to verify 60 in windows of 31",
    "{run} --to hf --lossless": "--lossless is about the blocks of gguf",
}


@pytest.mark.parametrize("arguments", BAD_INPUT)
def test_bad_input(arguments: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "short.txt").write_text("Short.")
    checkpoint = tmp_path / "checkpoints" / "step-000001"
    checkpoint.mkdir(parents=True)
    (checkpoint / "state.json").write_text("{}")
    storage._write_manifest(checkpoint)
    before = sorted(run.rglob("*"))
    places = {"run": run, "checkpoint": checkpoint, "short": tmp_path / "short.txt"}
    assert main(["export", *arguments.format(**places).split()]) == 2
    message = capsys.readouterr().err
    assert message.startswith("dqt: error: ")
    assert BAD_INPUT[arguments] in message
    assert len(message.strip().splitlines()) <= 2
    assert sorted(run.rglob("*")) == before


@pytest.mark.parametrize(
    ("module", "arguments", "extra"),
    [
        ("gguf", ["--to", "gguf"], "gguf"),
        ("xllamacpp", ["--to", "gguf", "--verify"], "gguf"),
        ("accelerate", ["--to", "hf-bitnet", "--verify"], "hf"),
    ],
)
def test_a_missing_package_is_named_with_the_command_that_installs_it(
    module: str,
    arguments: list[str],
    extra: str,
    run: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    assert main(["export", str(run), *arguments]) == 2
    assert f"{module} is not installed" in (message := capsys.readouterr().err)
    assert f"pip install 'dqt[{extra}]'" in message
    assert not (run / "export" / arguments[1]).exists()


def test_an_export_is_replaced_only_when_asked(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = run / "out"
    assert main(["export", str(run), "--to", "hf", "--out", str(out), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["files"]["model.safetensors"] == (out / "model.safetensors").stat().st_size
    assert facts["verified"] is None
    assert main(["export", str(run / "model"), "--to", "hf", "--out", str(out)]) == 2
    assert "add --overwrite" in capsys.readouterr().err
    assert main(["export", str(run), "--to", "hf", "--out", str(out), "--overwrite"]) == 0


@pytest.mark.parametrize(
    ("saved_by", "config", "told"),
    [
        ("dqt", "[train]\nsteps = 3\n", True),
        ("dqt", "[tool.other]\nsteps = 3\n", False),
        ("transformers", "[train]\nsteps = 3\n", False),
    ],
)
def test_only_a_runs_own_config_says_how_a_model_was_trained(
    saved_by: str, config: str, told: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = saved_model(tmp_path) / "model"
    (tmp_path / "config.toml").write_text(config)
    if saved_by == "transformers":
        source = load_source(path)
        path = tmp_path / "saved"
        source.model.save_pretrained(path)
        copy_tokenizer(source, path)
        assert main(["eval", str(path)]) == 2
        assert "no config.toml beside it" in capsys.readouterr().err
    result = export(path, "hf")
    assert ("train.toml" in result.files) is told
    assert ("## Training" in (result.path / "README.md").read_text(encoding="utf-8")) is told


def test_large_models_are_written_in_shards(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hf, "SHARD_BYTES", 500_000)
    result = export(run, "hf", tmp_path / "out", verify_tokens=60, text=TEXT)
    assert "model.safetensors.index.json" in result.files
    assert sum(name.endswith(".safetensors") for name in result.files) > 2
    assert result.agreement is not None
    assert result.agreement.holds
