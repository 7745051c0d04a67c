"""LoRA adapters of `peft` over frozen low-bit weights, merged back onto the grid.

    model = peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear"))
    ...
    model = dqt.merge_lora(model, seed=0)

`peft` takes a converted `nn.Linear` for the linear layer that it is. The packed weights are frozen then, and
no gradient of theirs is computed. Its own `merge_and_unload` would put floats in a packed weight's place,
which refuses them. Here W + scaling · B A is rounded stochastically, in place and as every update is rounded:
unbiased, so that what adapters learned below half a grid step is not lost on average. The price is noise of
up to a step a weight, as of one update; kept apart (`model.save_pretrained`), adapters lose nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dqt.errors import ConfigError
from dqt.numerics.philox import Purpose, random_uint32, stream_of
from dqt.numerics.rounding import stochastic_rounding
from dqt.optim.writeback import write_back
from dqt.tensor import QuantizedTensor


@torch.no_grad()
def merge_lora(model: nn.Module, seed: int = 0) -> nn.Module:
    """Adds the active LoRA adapters to the weights below them, and takes them off.

    Args:
        model: What `peft.get_peft_model` or `PeftModel.from_pretrained` gave; it is used up.
        seed: Of the rounding, which is a function of it, a weight's name, and an element's place.

    Returns:
        The model below, without adapters. Float weights have the adapters' product added.

    Raises:
        ConfigError: If there is no LoRA adapter, or one of another form (DoRA, with biases), or tokens that
            were trained beside it.
    """
    if not hasattr(model, "get_base_model"):
        raise ConfigError(f"merge_lora takes a model of peft, with adapters, not a {type(model).__name__}")
    peft_model: Any = model
    layers = [(n, m) for n, m in peft_model.get_base_model().named_modules() if hasattr(m, "lora_A")]
    if not layers:
        raise ConfigError("merge_lora: the model has no LoRA adapter")
    for name, module in peft_model.named_modules():
        if hasattr(module, "trainable_tokens_delta"):
            raise ConfigError(
                f"merge_lora: {name} holds rows that were trained apart, which have no plain LoRA adapter: "
                "leave trainable_token_indices out, or keep the adapters apart"
            )
    for name, layer in layers:  # all are looked at before one is changed
        base = layer.get_base_layer()
        plain = isinstance(base, nn.Linear) and not getattr(layer, "lora_variant", None)
        if not plain or any(getattr(layer, "lora_bias", {}).values()):
            raise ConfigError(
                f"merge_lora: {name} has no plain LoRA adapter of a linear layer: merge it by peft"
            )
    for name, layer in layers:
        deltas = [
            layer.get_delta_weight(adapter).float()
            for adapter in layer.active_adapters
            if adapter in layer.lora_A
        ]
        weight = layer.get_base_layer().weight
        if not deltas:
            continue
        if isinstance(weight, QuantizedTensor):
            _round_onto(weight, sum(deltas[1:], deltas[0]), f"{name}.weight", seed)
        else:
            weight += sum(deltas[1:], deltas[0]).to(weight.dtype)
    below: nn.Module = peft_model.unload()
    return below


def _round_onto(weight: QuantizedTensor, delta: Tensor, name: str, seed: int) -> None:
    random = random_uint32(seed, Purpose.MERGE, stream_of(name), 0, 0, weight.numel(), weight.device)
    write_back(
        weight,
        -delta,
        slice(None),
        lr=1.0,
        decay=0.0,
        rounding=stochastic_rounding,
        random=random.view(weight.rows, -1),
    )
