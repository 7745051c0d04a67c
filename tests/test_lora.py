"""LoRA over packed weights: gradients to adapters alone, merged onto the grid without bias, or kept apart."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import dqt
from dqt.errors import ConfigError
from dqt.models import build_config, build_model
from dqt.tensor import QuantizedTensor

peft = pytest.importorskip("peft")
TOKENS = torch.arange(2 * 24).view(2, 24) % 60


def adapted(bits: str | int = 4, fused: bool = False, **lora: Any) -> Any:
    """A small LLaMA with packed weights, and adapters whose product is not zero."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = build_model(
        build_config("micro", vocab_size=64, seq_len=64, overrides=sizes), seed=0, init_gain=1.0
    )
    dqt.quantize_(model, bits)
    if fused:
        dqt.fuse_(model)
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear", **lora))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.05)
    return model


def packed(model: nn.Module) -> dict[str, QuantizedTensor]:
    return {
        n.replace("base_layer.", ""): p for n, p in model.named_parameters() if isinstance(p, QuantizedTensor)
    }


@pytest.mark.parametrize("fused", [False, True])
def test_gradients_reach_the_adapters_alone(fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted(fused=fused)
    before = {name: weight.codes.clone() for name, weight in packed(model).items()}
    assert len(before) == 7

    def refuse(*_: Any) -> None:
        raise AssertionError("a weight gradient of a frozen weight was computed")

    monkeypatch.setattr("dqt.nn._grad_weight", refuse)
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert len(trainable) == 14
    assert all("lora_" in name for name in trainable)
    optimizer = dqt.optim.AdamW(list(trainable.items()), lr=1e-2, seed=0)
    losses = []
    for _ in range(5):
        loss = model(input_ids=TOKENS, labels=TOKENS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.05
    assert all(torch.equal(before[name], weight.codes) for name, weight in packed(model).items())


def test_fused_layers_do_not_pass_an_adapter_by() -> None:
    plain, fused = (adapted(fused=fused)(input_ids=TOKENS).logits for fused in (False, True))
    torch.testing.assert_close(plain, fused, rtol=0, atol=0.01)


def merged_values(model: Any, seed: int) -> dict[str, torch.Tensor]:
    merged = dqt.merge_lora(copy.deepcopy(model), seed)
    assert not any("lora" in name for name, _ in merged.named_parameters())
    return {name: weight.dequantize() for name, weight in packed(merged).items()}


@pytest.mark.parametrize("bits", ["ternary", 4, 8])
def test_merging_is_unbiased_and_a_function_of_the_seed(bits: str | int) -> None:
    model = adapted(bits)
    layers = {n: m for n, m in model.get_base_model().named_modules() if hasattr(m, "lora_A")}
    runs = [merged_values(model, seed) for seed in range(24)]
    again = merged_values(model, 3)
    for name, layer in layers.items():
        weight = layer.get_base_layer().weight
        top = (weight.format.qmax - weight.format.offset) * weight.scale
        bottom = (weight.format.qmin - weight.format.offset) * weight.scale
        wanted = (weight.dequantize() + layer.get_delta_weight("default")).detach()
        inside = (wanted < top) & (wanted > bottom)
        values = torch.stack([run[f"{name}.weight"] for run in runs])
        assert ((values - wanted.clamp(bottom, top)).abs() <= weight.scale * 1.001).all()
        error = (values.mean(0) - wanted)[inside] / weight.scale
        assert abs(error.mean().item()) < 0.02
        assert error.abs().mean().item() < 0.12
        assert torch.equal(values[3], again[f"{name}.weight"])
        assert not torch.equal(values[3], values[4])


def test_adapters_kept_apart_lose_nothing(tmp_path: Path) -> None:
    model = adapted()
    model.save_pretrained(tmp_path)
    base = adapted().unload()
    loaded = peft.PeftModel.from_pretrained(base, tmp_path)
    assert torch.equal(loaded(input_ids=TOKENS).logits, model.eval()(input_ids=TOKENS).logits)


def test_what_it_refuses() -> None:
    with pytest.raises(ConfigError, match="takes a model of peft, with adapters, not a Linear"):
        dqt.merge_lora(nn.Linear(2, 2))
    with pytest.raises(ConfigError, match="no LoRA adapter"):
        dqt.merge_lora(
            peft.get_peft_model(
                adapted().unload(), peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[])
            )
        )
    tokens = peft.LoraConfig(target_modules=["k_proj"], trainable_token_indices=[1, 2])
    with pytest.raises(ConfigError, match=r"embed_tokens.* holds rows that were trained apart"):
        dqt.merge_lora(peft.get_peft_model(adapted().unload(), tokens))
    with pytest.raises(TypeError, match="nothing is rounded behind your back"):
        adapted().merge_and_unload()
