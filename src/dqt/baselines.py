"""BitNet b1.58 (arXiv 2402.17764), the baseline with a float master copy.

Weights stay float32 parameters that an ordinary optimizer trains. Each forward pass quantizes them to
ternary, scale = mean|w|, codes = clamp(round(w / scale), -1, 1), and the inputs per token to int8; the
backward pass takes both roundings for the identity (straight through). This is quantization-aware training:
16 bytes a weight with AdamW, and float products, as in the published code. FP32 and BF16 need no code of
their own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dqt import ops
from dqt.nn import set_quantized_weight
from dqt.numerics.formats import parse_bits
from dqt.rules import Left, QuantizeReport, linear_modules
from dqt.tensor import QuantizedTensor


class _StraightThrough(torch.autograd.Function):
    """The second argument forward, the identity with respect to the first one backward."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, quantized: Tensor) -> Tensor:
        return quantized

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def ternarize(weight: Tensor) -> Tensor:
    """Absmean ternary weights, as floats: mean|w| * clamp(round(w / mean|w|), -1, 1)."""
    scale = weight.abs().mean().clamp_min(1e-5)
    return (weight / scale).round().clamp_(-1, 1) * scale


class BitLinear(nn.Linear):
    """`nn.Linear` with a float master weight, ternary with int8 inputs forward, straight through backward."""

    def forward(self, input: Tensor) -> Tensor:
        with torch.no_grad():
            weight_q = ternarize(self.weight)
            codes, scale = ops.quantize_rows(input.reshape(-1, input.shape[-1]))
            input_q = (codes.float() * scale[:, None]).to(input.dtype).view(input.shape)
        weight = _StraightThrough.apply(self.weight, weight_q)
        return F.linear(_StraightThrough.apply(input, input_q), weight, self.bias)


@torch.no_grad()
def ternarize_(model: nn.Module) -> None:
    """Makes the low-bit weights of a model's linear layers ternary, in place, as BitNet would: the paper's
    ternary inference of a model that was trained in more bits. The output head and embeddings stay."""
    for _, module in linear_modules(model):
        weight = module.weight
        if isinstance(weight, QuantizedTensor):
            floats = weight.dequantize()
            scale = floats.abs().mean().clamp_min(1e-5)
            ternary = QuantizedTensor.from_float(floats, scale, parse_bits("ternary"), weight.products)
            set_quantized_weight(module, nn.Parameter(ternary))


def bitnet_(model: nn.Module) -> QuantizeReport:
    """Makes every `nn.Linear` of a model but its output head a `BitLinear`, in place.

    Returns:
        A report in which nothing is converted, because every weight keeps its float master copy.
    """
    report = QuantizeReport()
    for name, module in linear_modules(model):
        module.__class__ = BitLinear
        weight = module.weight
        assert isinstance(weight, Tensor)
        reason = "float master weight, ternary in the forward pass"
        report.left.append(Left(f"{name}.weight", tuple(weight.shape), weight.nbytes, reason))
    return report
