"""Training steps to compare: ours, and the peers through their own public interfaces, at their best.

An arm is a model, an optimizer and a loss; `setup` builds it and gives one timed step: forward, backward,
clip to a global norm of 1, optimizer, gradients freed. All arms train the same network on the same tokens.
Choices that favour a peer were tried, and the faster one is here: fused AdamW wherever the parameters are
plain tensors, the chunked loss where nothing is compiled, torchao's own optimizers where its integer
weights need them.

The paper's way is written from its text: weights on the grid in float containers, a copy of the old weights
for the scale, AdamW (fused here), stochastic rounding in eager PyTorch, activations rounded to 8 bits
straight through.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dqt.build import autocast, build_optimizer, prepare_model_
from dqt.fused import fuse_
from dqt.models import build_config, build_model
from dqt.ops.bf16_guard import ensure_bf16_products
from dqt.recipes import Recipe, recipe_for
from dqt.rules import linear_modules
from dqt.train.losses import language_model_loss

VOCABULARY, BATCH, SEQUENCE = 4096, 2, 512
WARM_UP = 4
LR, BETAS = 1e-3, (0.9, 0.95)

Loss = Callable[[nn.Module, Tensor], Tensor]


@dataclass
class Arm:
    """What a step needs."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    loss: Loss = language_model_loss


def network(width: int, layers: int, init_gain: float | None = None) -> nn.Module:
    """A LLaMA of 8 heads, output head tied; its feed-forward is 8/3 of the width, rounded to 128."""
    sizes = {
        "hidden_size": width,
        "intermediate_size": 128 * round(width * 8 / 3 / 128),
        "num_hidden_layers": layers,
        "num_attention_heads": 8,
    }
    return build_model(build_config("small", "llama", VOCABULARY, SEQUENCE, sizes), 0, init_gain)


def plain_loss(model: nn.Module, tokens: Tensor) -> Tensor:
    """Cross-entropy of whole logits, for `torch.compile`; eager, our chunked loss is 4 % of a step faster."""
    logits = model(input_ids=tokens[:, :-1], use_cache=False).logits
    return F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())


def fused_adamw(model: nn.Module) -> torch.optim.Optimizer:
    """torch's fastest AdamW."""
    return torch.optim.AdamW(model.parameters(), LR, BETAS, weight_decay=0.0, fused=True)


# -- ours ----------------------------------------------------------------------------------------------------


def ours(recipe: Recipe, width: int, layers: int) -> Arm:
    """A recipe as `dqt train` runs it between two reports."""
    model = network(width, layers, recipe.init_gain)
    prepare_model_(model, recipe)
    fuse_(model)
    optimizer = build_optimizer(model, recipe)
    optimizer.collect_telemetry = False
    return Arm(model, optimizer)


# -- float, and BitNet ---------------------------------------------------------------------------------------


def full_precision(width: int, layers: int) -> Arm:
    """FP32."""
    model = network(width, layers)
    return Arm(model, fused_adamw(model))


def bf16(width: int, layers: int) -> Arm:
    """bfloat16 autocast over float32 weights."""
    ensure_bf16_products()
    recipe, model = recipe_for("bf16"), network(width, layers)

    def loss(model: nn.Module, tokens: Tensor) -> Tensor:
        with autocast(recipe, "cpu"):
            return language_model_loss(model, tokens)

    return Arm(model, fused_adamw(model), loss)


def bitnet(width: int, layers: int) -> Arm:
    """BitNet b1.58, `dqt.baselines`, under torch's fused AdamW."""
    model = network(width, layers)
    prepare_model_(model, recipe_for("bitnet"))
    return Arm(model, fused_adamw(model))


# -- the paper's way -----------------------------------------------------------------------------------------


class PaperLinear(nn.Linear):
    """A float layer whose input is rounded to 8 bits a token, straight through."""

    def forward(self, input: Tensor) -> Tensor:
        scale = 127 / input.detach().abs().amax(-1, keepdim=True).clamp_min(1e-5)
        rounded = (input * scale).round().clamp(-128, 127) / scale
        return F.linear(input + (rounded - input).detach(), self.weight, self.bias)


class PaperOptimizer(torch.optim.AdamW):
    """AdamW on float containers, then every weight back onto the grid whose scale its old values give."""

    qmin, qmax = -1, 1

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        parameters = [p for group in self.param_groups for p in group["params"]]
        old = [p.clone() for p in parameters]
        super().step()
        for parameter, before in zip(parameters, old, strict=True):
            scale = before.max() / self.qmax
            y = parameter / scale
            low = y.floor()
            up = torch.rand_like(y) < y - low
            parameter.copy_((low + up).clamp_(self.qmin, self.qmax).mul_(scale))


def paper(width: int, layers: int) -> Arm:
    """The paper's ternary training, started as long as a narrow model needs (see `dqt.compare.suites`)."""
    model = network(width, layers, init_gain=1.0)
    for _, module in linear_modules(model):
        module.__class__ = PaperLinear
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                scale = parameter.abs().mean()
                parameter.copy_((parameter / scale).round().clamp_(-1, 1).mul_(scale))
    return Arm(model, PaperOptimizer(model.parameters(), LR, BETAS, fused=True))


# -- torchao -------------------------------------------------------------------------------------------------


def torchao(config: str, optimizer: str, width: int, layers: int) -> Arm:
    """A config of torchao.prototype.quantized_training under torch's fused AdamW or one of torchao's."""
    from torchao import optim
    from torchao.prototype import quantized_training
    from torchao.quantization import quantize_

    model = network(width, layers)
    body = {module for _, module in linear_modules(model)}
    arguments = {"module_swap": True} if config == "int8_mixed_precision_training" else {}
    settings = getattr(quantized_training, config)(**arguments)
    quantize_(model, settings, filter_fn=lambda module, name: module in body)
    if optimizer == "fused":
        return Arm(model, fused_adamw(model))
    build = getattr(optim, optimizer)
    return Arm(model, build(model.parameters(), LR, BETAS, weight_decay=0.0))


# -- the table -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Entry:
    """A row: what it is, how it is built from width and layers, and whether its loss is compiled."""

    title: str
    build: Callable[[int, int], Arm]
    compiled: bool = False


def _recipe(title: str, method: str, bits: str) -> Entry:
    return Entry(title, lambda *size: ours(recipe_for(method, bits), *size))


def _torchao(title: str, config: str, optimizer: str = "fused", compiled: bool = False) -> Entry:
    return Entry(title, lambda *size: torchao(f"{config}_training", optimizer, *size), compiled)


ARMS = {
    "fp32": Entry("FP32, fused AdamW", full_precision),
    "fp32-compiled": Entry("FP32, fused AdamW, compiled", full_precision, compiled=True),
    "bf16": Entry("BF16 autocast, fused AdamW", bf16),
    "ternary": _recipe("ours: ternary, residual", "residual", "ternary"),
    "strict8": _recipe("ours: 8 bits, strict", "strict", "8"),
    "paper": Entry("the paper's way, ternary", paper),
    "bitnet": Entry("BitNet b1.58 (dqt.baselines), fused AdamW", bitnet),
    "ao-int8": _torchao("torchao int8 weight-only, its AdamW", "int8_weight_only_quantized", "_AdamW"),
    "ao-int8-compiled": _torchao(
        "torchao int8 weight-only, compiled", "int8_weight_only_quantized", "_AdamW", True
    ),
    "ao-int8-8bit": _torchao(
        "torchao int8 weight-only, compiled, AdamW8bit", "int8_weight_only_quantized", "AdamW8bit", True
    ),
    "ao-mixed": _torchao("torchao int8 mixed precision, fused AdamW", "int8_mixed_precision"),
    "ao-mixed-compiled": _torchao(
        "torchao int8 mixed precision, compiled", "int8_mixed_precision", compiled=True
    ),
    "ao-bitnet": _torchao("torchao BitNet, fused AdamW", "bitnet"),
    "ao-bitnet-compiled": _torchao("torchao BitNet, compiled", "bitnet", compiled=True),
}


def setup(key: str, width: int, layers: int) -> tuple[Callable[[], float], dict[str, Any]]:
    """Builds an arm and trains it for a few steps on one batch, compiling where the arm does.

    Returns:
        A timed step, and {"loss": first and last, "setup_seconds": ...}.

    Raises:
        RuntimeError: If the loss is not finite, or did not fall.
    """
    started = time.perf_counter()
    entry = ARMS[key]
    torch.manual_seed(0)
    arm = entry.build(width, layers)
    loss_of = torch.compile(plain_loss) if entry.compiled else arm.loss
    tokens = torch.randint(0, VOCABULARY, (BATCH, SEQUENCE + 1), generator=torch.Generator().manual_seed(0))

    def step() -> float:
        loss = loss_of(arm.model, tokens)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(arm.model.parameters(), 1.0)
        arm.optimizer.step()
        arm.optimizer.zero_grad(set_to_none=True)
        return loss.item()

    def turn() -> float:
        before = time.perf_counter()
        step()
        return time.perf_counter() - before

    losses = [step() for _ in range(WARM_UP)]
    if not all(map(math.isfinite, losses)) or losses[-1] >= losses[0]:
        raise RuntimeError(f"does not train: losses {', '.join(f'{loss:.3f}' for loss in losses)}")
    return turn, {"loss": [losses[0], losses[-1]], "setup_seconds": time.perf_counter() - started}
