"""`dqt train --from`: what is no model, or damaged, or does not go with the settings, is named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from dqt.cli import main
from dqt.errors import ConfigError, DqtError, ModelError
from dqt.start import find_start
from dqt.train.pretrained import load_float
from from_cases import SIZES, VOCABULARY, run
from train_helpers import STDLIB


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def set_config(**changes: Any) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        config = json.loads((path / "config.json").read_text()) | changes
        (path / "config.json").write_text(json.dumps(config))

    return change


def set_tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        tensors = load_file(path / "model.safetensors")
        change(tensors)
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})

    return write


NORM, BIAS = "model.norm.weight", "model.layers.0.self_attn.q_proj.bias"
BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no tokenizer": (lambda path: (path / "tokenizer.json").unlink(), "tokenizer.json does not exist"),
    "no weights": (lambda path: (path / "model.safetensors").unlink(), "can't be loaded"),
    "half a file": (lambda path: cut(path / "model.safetensors"), "can't be loaded"),
    "a tensor missing": (set_tensors(lambda t: t.pop(NORM)), f"does not fit its config: missing {NORM}"),
    "another shape": (set_tensors(lambda t: t.update({NORM: torch.ones(31)})), "can't be loaded|mismatched"),
    "NaN": (set_tensors(lambda t: t[NORM].fill_(torch.nan)), f"NaN or Inf in {NORM}"),
    "code of its own": (set_config(auto_map={"AutoModel": "x.Y"}), "which dqt never runs"),
    "packed": (set_config(quantization_config={"quant_method": "gptq"}), "packed by 'gptq'"),
    "an encoder": (set_config(architectures=["BertModel"], model_type="bert"), "not a causal language model"),
    "no such model": (set_config(model_type="nonsense"), "makes no model"),
    "a small vocabulary": (set_config(vocab_size=299), "300 tokens, its model 299"),
    "damaged config": (lambda path: (path / "config.json").write_text("{"), "is damaged"),
    "an adapter": (
        lambda path: [(path / "config.json").unlink(), (path / "adapter_config.json").write_text("{}")],
        "peft adapter",
    ),
    "a tensor too many": (
        set_tensors(lambda t: t.update({BIAS: torch.full((32,), 5.0)})),
        f"does not fit its config: unexpected {BIAS}",
    ),
    "logits that are scaled": (
        lambda path: transformers.CohereForCausalLM(
            transformers.CohereConfig(vocab_size=VOCABULARY, num_hidden_layers=1, **SIZES)
        ).save_pretrained(path),
        "cohere changes its logits after the head",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_broken_is_named(directory: Path, tmp_path: Path, case: str) -> None:
    shutil.copytree(directory, tmp_path / "model")
    break_it, message = BROKEN[case]
    break_it(tmp_path / "model")
    with pytest.raises(DqtError, match=message) as caught:
        run(tmp_path / "model", tmp_path / "run", quant__bits="8")
    assert str(caught.value).count("\n") <= 1
    assert not (tmp_path / "run").exists()


def test_buffers_and_tied_heads_of_older_files_are_no_tensors_too_many(
    directory: Path, tmp_path: Path
) -> None:
    shutil.copytree(directory, tmp_path / "model")
    embedding = load_float(find_start(directory)).get_input_embeddings().weight.detach().clone()
    older = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4), "lm_head.weight": embedding}
    set_tensors(lambda tensors: tensors.update(older))(tmp_path / "model")
    assert torch.equal(load_float(find_start(tmp_path / "model")).get_output_embeddings().weight, embedding)


@pytest.mark.parametrize("share", [0.02, 0.5, 0.95])
def test_a_damaged_gguf_is_refused(gguf: Path, tmp_path: Path, share: float) -> None:
    raw = gguf.read_bytes()
    (tmp_path / "cut.gguf").write_bytes(raw[: int(len(raw) * share)])
    with pytest.raises(ModelError, match=r"cut\.gguf can't be read: it is damaged, cut short"):
        run(tmp_path / "cut.gguf", tmp_path / "run", quant__bits="8")
    assert not (tmp_path / "run").exists()


def test_weights_that_are_no_linear_layers(directory: Path, tmp_path: Path) -> None:
    shutil.copytree(directory, tmp_path / "gpt2")
    config = transformers.GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=1, n_head=2)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    with pytest.raises(ModelError, match=r"gpt2 has no weights .*Conv1D"):
        run(tmp_path / "gpt2", tmp_path / "run", quant__bits="8")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model__preset": "micro"}, "both say which model"),
        ({"model__arch": "bitnet"}, "model.arch = bitnet, and the model in .* has llama"),
        ({"model__hidden_size": 64}, "hidden_size = 64, and the model in .* has 32"),
        ({"model__rope_theta": 5.0}, "rope_theta = 5.0, and the model in .* says that itself"),
        ({"data__vocab_size": 512}, "vocab_size = 512, and the model in .* has 300"),
        ({"data__tokenizer": "."}, "data.tokenizer is for new models"),
        ({"quant__init_gain": 1.0}, "init_gain = 1.0 is for new weights"),
        ({"train__seq_len": 65}, "knows 64 positions"),
        ({"quant__calibrate": -1}, "quant.calibrate = -1 makes no sense"),
    ],
)
def test_contradictions(directory: Path, tmp_path: Path, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run(directory, tmp_path / "run", **values)


def test_resume_with_another_model(directory: Path, tmp_path: Path) -> None:
    run(directory, tmp_path / "run", quant__bits="8")
    shutil.copytree(directory, tmp_path / "other")
    with pytest.raises(ConfigError, match=r"another run \(model.start_from"):
        run(tmp_path / "other", tmp_path / "run", resume="auto", quant__bits="8", train__steps=9)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--from", "x", "--preset", "tiny"], "--from brings a model, and --preset describes a new one"),
        (["--from", "x", "--arch", "llama"], "--from brings a model, and --arch describes a new one"),
        (["--from", "no/such"], "there is no such file or directory"),
        (["--from", str(STDLIB)], "holds no model"),
        (["--from", str(STDLIB / "decoder.py")], "is no GGUF file"),
    ],
)
def test_slips_on_the_command_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", *arguments]) == 2
    assert message in capsys.readouterr().err
