"""A quantized model goes through `torch.compile` without a graph break, and trains to the same codes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

import dqt
from dqt.errors import ConfigError
from dqt.optim import AdamW
from dqt.tensor import QuantizedTensor
from dqt.train import compiled
from train_helpers import metrics_of, run_micro

LINEARS = 7
TOKENS = torch.arange(2 * 16).view(2, 16) * 7 % 64


def micro_llama(bits: str) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, num_hidden_layers=1, use_cache=False, **sizes))
    dqt.quantize_(model, bits)
    return model


def train(model: nn.Module, parameters: nn.Module, steps: int = 3) -> list[Tensor]:
    """Losses, codes and scales after some steps; the optimizer's step is outside of the compiled region."""
    optimizer = AdamW(parameters.named_parameters(), lr=0.02, residual_bits=8, second_moment="factored")
    losses = []
    for _ in range(steps):
        loss = model(input_ids=TOKENS, labels=TOKENS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    weights = [p for p in parameters.parameters() if isinstance(p, QuantizedTensor)]
    return [*losses, *(w.codes for w in weights), *(w.scale for w in weights)]


@pytest.fixture(autouse=True)
def _forget_graphs() -> None:
    torch.compiler.reset()


def test_layers_that_stand_elsewhere_are_refused() -> None:
    sizes = {"hidden_size": 8, "ffn_dim": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = OPTForCausalLM(OPTConfig(vocab_size=8, word_embed_proj_dim=8, **sizes))
    with pytest.raises(ConfigError, match="no decoder layers in OPTForCausalLM"):
        compiled.compile_layers(model)


@pytest.mark.parametrize("bits", ["ternary", "8"])
def test_whole_model_without_graph_breaks(bits: str) -> None:
    """Forward and backward are traced and run as they are, so that the bits are the same."""
    plain, traced, graphs = micro_llama(bits), micro_llama(bits), []

    def keep(graph: torch.fx.GraphModule, _: list[Tensor]) -> Any:
        graphs.append(graph.print_readable(print_output=False))
        return make_boxed_func(graph.forward)

    compiled_model = torch.compile(traced, backend=aot_autograd(fw_compiler=keep), fullgraph=True)
    for ours, theirs in zip(train(compiled_model, traced), train(plain, plain), strict=True):
        assert torch.equal(ours, theirs)
    forward, backward = graphs  # new codes did not compile again
    assert forward.count("torch.ops.dqt.scaled_product.default") == LINEARS
    assert backward.count("torch.ops.dqt.scaled_product.default") == 2 * LINEARS
    assert backward.count("torch.ops.dqt.quantize_columns.default") == LINEARS


@pytest.mark.parametrize(
    "option", [{"train__gradient_release": True}, {"train__activation_checkpointing": True}]
)
def test_a_run_with_compiled_layers_is_the_same_run(
    option: dict[str, bool], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiled.compile_layers, "__defaults__", ("aot_eager",))
    results = [
        run_micro(tmp_path / name, train__compile=name == "compiled", train__steps=2, **option)
        for name in ("plain", "compiled")
    ]
    plain, ours = (
        [line["loss"] for line in metrics_of(result.directory.path) if "loss" in line] for result in results
    )
    assert ours == pytest.approx(plain, abs=1e-5)
    assert results[0].evaluation.loss == pytest.approx(results[1].evaluation.loss, abs=1e-4)


def test_without_a_compiler_the_option_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ConfigError, match=r"train\.compile needs a C\+\+ compiler \(no-such-compiler\)"):
        run_micro(tmp_path, train__compile=True)
