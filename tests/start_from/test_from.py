"""`dqt train --from`: a model that was trained before goes on in low-bit weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from dqt.cli import main
from dqt.plan import plan
from dqt.recipes import recipe_for
from dqt.start import find_start
from dqt.tensor import QuantizedTensor
from dqt.train.adopt import adopt
from dqt.train.config import Config
from dqt.train.pretrained import load_float, load_own_tokenizer
from dqt.train.rundir import run_name
from dqt.train.savedmodel import load_model
from from_cases import GENERATION, SIZES, TEMPLATE, VOCABULARY, run
from train_helpers import STDLIB, assert_same_tensors, metrics_of, without_times

# -- what it can start from ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bits", "method", "within"),
    [
        ("8", "strict", 0.02),
        ("4", "residual", 0.5),
        ("ternary", "residual", 3.0),
        (None, "fp32", 0.0),
        (None, "bitnet", 3.0),
    ],
)
def test_it_learns_from_the_first_model_and_says_what_conversion_cost(
    directory: Path, tmp_path: Path, bits: str | None, method: str, within: float
) -> None:
    result = run(
        directory, tmp_path / "run", quant__bits=bits, quant__method=method, optim__lr=2e-3, train__steps=12
    )
    start = result.summary["start"]
    assert start["path"] == str(directory)
    assert abs(start["converted_val_loss"] - start["val_loss"]) <= within
    assert result.evaluation.loss < start["converted_val_loss"] - 0.02
    first = metrics_of(result.directory.path)[0]
    assert (first["step"], first["val_loss"]) == (0, start["converted_val_loss"])


def test_the_first_loss_is_that_of_the_model(directory: Path, tmp_path: Path) -> None:
    result = run(directory, tmp_path / "run", quant__method="fp32")
    model = transformers.AutoModelForCausalLM.from_pretrained(directory).eval()
    tokenizer = load_own_tokenizer(find_start(directory))
    from dqt.data.prepare import prepare_corpus
    from dqt.evaluate import evaluate

    config = Config.from_toml(result.directory.config)
    corpus = prepare_corpus(config.data, tmp_path / "cache", tokenizer=tokenizer)
    expected = evaluate(model, corpus.val, 16, 4, token_bytes=corpus.token_bytes)
    assert result.summary["start"]["val_loss"] == pytest.approx(expected.loss, abs=1e-6)


def test_what_it_writes_is_whole(directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    run(directory, out, quant__bits="8")
    model, tokenizer, _ = load_model(out)
    assert (tokenizer.sha256, tokenizer.chat_template) == (
        load_own_tokenizer(find_start(directory)).sha256,
        TEMPLATE,
    )
    assert model.config.max_position_embeddings == 64
    assert model.config.num_key_value_heads == 2
    assert model.generation_config.to_dict() | GENERATION == model.generation_config.to_dict()
    for command in ("sample", "eval", "inspect"):
        assert main([command, str(out)]) == 0
    assert main(["inspect", str(out / "checkpoints" / "step-000004")]) == 0
    assert main(["export", str(out), "--to", "hf"]) == 0
    exported = json.loads((out / "export" / "hf" / "generation_config.json").read_text())
    assert exported | GENERATION == exported
    card = (out / "export" / "hf" / "README.md").read_text(encoding="utf-8")
    assert 'base_model: "trained"\n' in card
    assert "| base model | trained, " in card
    assert str(directory.parent) not in card
    again = run(out / "export" / "hf", tmp_path / "again", quant__bits="8")
    assert again.summary["start"]["architecture"] == "llama"
    capsys.readouterr()


@pytest.mark.parametrize(
    ("kind", "values", "kept"),
    [
        ("run", {}, True),
        ("run", {"quant__per_row": False}, True),
        ("run", {"quant__scale_rule": "learned"}, True),
        ("run", {"quant__scale_rule": "absmean"}, False),
        ("run", {"quant__calibrate": 2}, False),
        ("directory", {}, True),
        ("directory", {"quant__per_row": False}, False),
    ],
    ids=str,
)
def test_a_run_goes_on_with_its_own_codes_unless_told_otherwise(
    starts: dict[str, Path], tmp_path: Path, kind: str, values: dict[str, Any], kept: bool
) -> None:
    first = starts[kind]
    if kind == "directory":  # a run with one scale a row
        first = run(first, tmp_path / "first", quant__bits="4", train__steps=1).directory.path
    run(first, tmp_path / "next", quant__bits="4", optim__lr=1e-12, train__steps=1, **values)
    before, after = (load_file(path / "model" / "model.safetensors") for path in (first, tmp_path / "next"))
    names = [name for name in before if name.endswith((".codes", ".scale"))]
    assert len(names) == 28
    assert all(bool((before[name] == after[name]).all()) for name in names) is kept
    assert {after[name].ndim > 0 for name in names if name.endswith(".scale")} == {
        values.get("quant__per_row", True)
    }


def test_a_run_goes_on_in_more_bits(starts: dict[str, Path], tmp_path: Path) -> None:
    result = run(starts["run"], tmp_path / "other", quant__bits="8", train__steps=1)
    start = result.summary["start"]
    assert start["converted_val_loss"] == pytest.approx(start["val_loss"], abs=0.02)


@pytest.mark.parametrize(("kind", "step"), [("directory", 0), ("directory", 4), ("run", 4)])
def test_resume_gives_the_same_bits(
    starts: dict[str, Path], kind: str, step: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """From step 0 too, which is there to roll back to; by then the residual is what conversion left."""
    values = {"quant__bits": "4", "train__steps": 6, "train__on_spike": "rollback"}
    whole = run(starts[kind], tmp_path / "whole", **values)
    run(starts[kind], tmp_path / "parts", train__keep_checkpoints=9, **values)
    checkpoints = tmp_path / "parts" / "checkpoints"
    for checkpoint in checkpoints.iterdir():
        if checkpoint.name > f"step-{step:06d}":
            shutil.rmtree(checkpoint)
    assert main(["inspect", str(checkpoints / f"step-{step:06d}")]) == 0
    parts = run(starts[kind], tmp_path / "parts", resume="auto", **values)
    capsys.readouterr()
    name = "model/model.safetensors"
    assert_same_tensors(whole.directory.path / name, parts.directory.path / name)
    lines = [without_times(metrics_of(result.directory.path)) for result in (whole, parts)]
    assert lines[0] == lines[1]
    assert parts.summary["start"] == whole.summary["start"]
    name = "model/generation_config.json"
    assert (parts.directory.path / name).read_text() == (whole.directory.path / name).read_text()


@pytest.mark.parametrize("kind", ["qwen2", "mistral"])
def test_other_architectures(directory: Path, tmp_path: Path, kind: str) -> None:
    shutil.copytree(directory, tmp_path / kind)
    config = transformers.AutoConfig.for_model(kind, vocab_size=VOCABULARY, num_hidden_layers=1, **SIZES)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / kind)
    result = run(tmp_path / kind, tmp_path / "run", quant__bits="8")
    model, _, _ = load_model(result.directory.path)
    assert model.config.model_type == kind
    assert sum(isinstance(p, QuantizedTensor) for p in model.parameters()) == 7


def test_codes_chosen_on_the_text_are_nearer(directory: Path, tmp_path: Path) -> None:
    start = find_start(directory)
    document = (STDLIB / "decoder.py").read_text(encoding="utf-8")
    tokens = torch.tensor(load_own_tokenizer(start).core.encode(document).ids[: 24 * 64]).view(24, 64)

    def logits(model: Any) -> torch.Tensor:
        with torch.no_grad():
            return model(input_ids=tokens[16:], use_cache=False).logits

    expected = logits(load_float(start))
    errors = []
    for sequences in (None, tokens[:16]):
        model, _ = adopt(start, recipe_for("strict", 4, trained=True), {}, sequences, lambda model: None)
        errors.append((logits(model) - expected).square().mean())
    assert errors[1] < errors[0]
    changed = {
        n: run(directory, tmp_path / str(n), quant__bits="4", quant__calibrate=n).summary["start"]
        for n in (0, 8)
    }
    assert changed[0]["val_loss"] == changed[8]["val_loss"]
    assert changed[0]["converted_val_loss"] != changed[8]["converted_val_loss"]


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/models/Llama-3.2-1B/", "Llama-3.2-1B"),
        ("/models/smol.Q4_1.gguf", "smol.Q4_1"),
        ("/runs/tiny-4-strict/model", "tiny-4-strict"),
        ("/runs/tiny-4-strict", "tiny-4-strict"),
        ("/model", "model"),
    ],
)
def test_what_a_run_is_called_after(path: str, name: str) -> None:
    config = Config().override({"model.start_from": path, "quant.bits": "8", "quant.method": "strict"})
    assert run_name(config) == f"{name}-8-strict"


@pytest.mark.parametrize(("method", "keeps"), [("residual", True), ("strict", False)])
def test_a_residual_begins_with_what_conversion_left(directory: Path, method: str, keeps: bool) -> None:
    model, _ = adopt(find_start(directory), recipe_for(method, 4, trained=True), {}, None, lambda model: None)
    kept = [w.kept_remainder is not None for w in model.parameters() if isinstance(w, QuantizedTensor)]
    assert kept == [keeps] * 14


def test_the_plan_knows_the_sizes(directory: Path) -> None:
    found = plan(Config().override({"model.start_from": str(directory), "quant.bits": "8"}))
    assert found.config.model.hidden_size == 32
    assert f"--from {directory}" in found.command()


# -- GGUF ----------------------------------------------------------------------------------------------------


def test_gguf_is_the_same_model(directory: Path, gguf: Path) -> None:
    import gguf as reader

    fields = reader.GGUFReader(gguf).fields
    assert fields["general.sampling.temp"].contents() == pytest.approx(GENERATION["temperature"])
    start = find_start(gguf.parent)  # the only one in there
    assert (start.path, start.architecture, start.vocab_size) == (gguf, "llama", VOCABULARY)
    ours, theirs = load_float(find_start(directory)), load_float(start)
    for (name, weight), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(weight, other, rtol=2e-3, atol=1e-4, msg=name)
    text = "for  x in 1234:\n   pass  # ünï\n"
    first, second = load_own_tokenizer(find_start(directory)), load_own_tokenizer(start)
    assert first.core.encode(text).ids == second.core.encode(text).ids
    assert (first.end_token, second.chat_template) == (second.end_token, TEMPLATE)


def test_train_from_gguf(gguf: Path, tmp_path: Path) -> None:
    result = run(gguf, tmp_path / "run", quant__bits="8")
    assert result.summary["start"]["converted_val_loss"] == pytest.approx(
        result.summary["start"]["val_loss"], abs=0.02
    )
