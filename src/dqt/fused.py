"""`fuse_`: gives the decoder layers of LLaMA and BitNet models forward methods that make fewer passes.

With the products in integers, the larger half of a step was what lies between them. A fused module is the
same module, with the same parameters and name, of a subclass with another `forward`:

    RMS norm     one pass forward, two backward, instead of nine
    SwiGLU       its result goes to the down projection as int8 and never reaches memory as floats
    attention    rotary embedding in one pass a tensor; causal attention in one kernel forward and one
                 backward, where the model's config names "sdpa" (which is the default) and neither cache nor
                 padding ask for more; else the interface that the config names, as in `transformers`

The plain modules remain the specification (losses agree to float32 rounding, see the tests), and are what
runs for float methods, under autocast, in other dtypes and in other models.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.activations import ACT2FN
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.bitnet import modeling_bitnet as bitnet
from transformers.models.llama import modeling_llama as llama

from dqt.nn import quantized_swiglu_linear
from dqt.ops import activations
from dqt.ops.attention import causal_attention, causal_attention_backward, is_fast
from dqt.tensor import QuantizedTensor

SILU = ACT2FN["silu"]


def fuse_(model: nn.Module) -> list[str]:
    """Fuses what it knows in a model, in place.

    Args:
        model: Any module. Of it are changed: norms with a float gain, SwiGLU blocks and attention layers of
            `transformers`' LLaMA and BitNet.

    Returns:
        The names of the changed modules.
    """
    fused = []
    for name, module in model.named_modules():
        subclass = _FUSED.get(type(module))
        if subclass is not None and _fits(module):
            module.__class__ = subclass
            if issubclass(subclass, _FusedAttention):
                module.own_attention = is_fast()
            fused.append(name)
    return fused


def is_fused(model: nn.Module) -> bool:
    """Whether `fuse_` has changed something in a model."""
    return any(type(module) in _FUSED.values() for module in model.modules())


def _fits(module: nn.Module) -> bool:
    if isinstance(getattr(module, "weight", None), QuantizedTensor):
        return False  # a gain on a grid, as in the recipe `paper`
    activation = getattr(module, "act_fn", None)
    return (
        activation is None or isinstance(activation, nn.SiLU) or type(activation).__name__ == "SiLUActivation"
    )


def _plain_float32(*tensors: Tensor) -> bool:
    device = tensors[0].device.type
    return not torch.is_autocast_enabled(device) and all(t.dtype == torch.float32 for t in tensors)


# -- RMS norm ------------------------------------------------------------------------------------------------


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        y, rstd = activations.rms_norm(rows, weight, eps)
        ctx.save_for_backward(rows, weight, rstd)
        return y.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        rows, weight, rstd = ctx.saved_tensors
        dx, dweight = activations.rms_norm_backward(dy.reshape(rows.shape), rows, weight, rstd)
        return dx.view(dy.shape), dweight, None


class _FusedRMSNorm:
    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        if not _plain_float32(hidden_states, self.weight) or hidden_states.numel() == 0:
            return super().forward(hidden_states)  # type: ignore[misc]
        return _RMSNorm.apply(hidden_states.contiguous(), self.weight, self.variance_epsilon)


class FusedLlamaRMSNorm(_FusedRMSNorm, llama.LlamaRMSNorm):
    """`LlamaRMSNorm` in one pass."""


class FusedBitNetRMSNorm(_FusedRMSNorm, bitnet.BitNetRMSNorm):
    """`BitNetRMSNorm` in one pass."""


# -- SwiGLU --------------------------------------------------------------------------------------------------


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return activations.swiglu(gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dh: Tensor) -> tuple[Tensor, Tensor]:
        return activations.swiglu_backward(dh, *ctx.saved_tensors)


class _FusedMLP:
    def forward(self: Any, x: Tensor) -> Tensor:
        if not _plain_float32(x):
            return super().forward(x)  # type: ignore[misc]
        gate, up = self.gate_proj(x), self.up_proj(x)
        norm, weight = getattr(self, "ffn_sub_norm", None), self.down_proj.weight
        plain = isinstance(self.down_proj, nn.Linear)  # and no adapter around one, which shows its weight
        if (
            norm is None
            and plain
            and isinstance(weight, QuantizedTensor)
            and weight.products.forward == "int8"
        ):
            return quantized_swiglu_linear(gate, up, weight, self.down_proj.bias)
        h = _SwiGLU.apply(gate.flatten(0, -2), up.flatten(0, -2)).view(gate.shape)
        return self.down_proj(h if norm is None else norm(h))


class FusedLlamaMLP(_FusedMLP, llama.LlamaMLP):
    """`LlamaMLP` whose gated activations stay int8."""


class FusedBitNetMLP(_FusedMLP, bitnet.BitNetMLP):
    """`BitNetMLP` with the gating in one pass."""


# -- attention -----------------------------------------------------------------------------------------------


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return activations.rotary(x, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return activations.rotary(dy, cos, sin, transposed=True), None, None


class _CausalAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        out, top, inverse = causal_attention(query, key, value, scale)
        ctx.save_for_backward(query, key, value, out, top, inverse)
        ctx.scale = scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        query, key, value, out, top, inverse = ctx.saved_tensors
        grads = causal_attention_backward(dout, query, key, value, out, top, inverse, ctx.scale)
        return *grads, None


class _FusedAttention:
    own_attention = False

    def forward(
        self: Any,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        assert position_embeddings is not None
        cos, sin = position_embeddings  # [1 or batch, positions, width]
        if not _plain_float32(hidden_states, cos) or cos.shape[0] != 1:
            return super().forward(  # type: ignore[misc]
                hidden_states, position_embeddings, attention_mask, past_key_values, **kwargs
            )
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        cos, sin = cos[0].contiguous(), sin[0].contiguous()
        query = _Rotary.apply(self.q_proj(hidden_states).view(shape), cos, sin)
        key = _Rotary.apply(self.k_proj(hidden_states).view(shape), cos, sin)
        value = self.v_proj(hidden_states).view(shape)
        dropout = self.attention_dropout if self.training else 0.0
        implementation = self.config._attn_implementation
        plain = past_key_values is None and attention_mask is None and not dropout and query.numel() > 0
        if plain and self.own_attention and implementation == "sdpa" and query.device.type == "cpu":
            output, weights = _CausalAttention.apply(query, key, value, self.scaling), None
        else:
            query, key, value = (x.transpose(1, 2) for x in (query, key, value))
            if past_key_values is not None:
                key, value = past_key_values.update(key, value, self.layer_idx)
            attend = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, llama.eager_attention_forward)
            output, weights = attend(
                self, query, key, value, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs
            )
        output = output.reshape(*hidden_states.shape[:-1], -1).contiguous()
        norm = getattr(self, "attn_sub_norm", None)
        return self.o_proj(output if norm is None else norm(output)), weights


class FusedLlamaAttention(_FusedAttention, llama.LlamaAttention):  # type: ignore[misc]
    """`LlamaAttention` with the rotary embedding in one pass, and causal attention in one kernel."""


class FusedBitNetAttention(_FusedAttention, bitnet.BitNetAttention):
    """`BitNetAttention` with the rotary embedding in one pass, and causal attention in one kernel."""


_FUSED: dict[type, type] = {
    llama.LlamaRMSNorm: FusedLlamaRMSNorm,
    llama.LlamaMLP: FusedLlamaMLP,
    llama.LlamaAttention: FusedLlamaAttention,
    bitnet.BitNetRMSNorm: FusedBitNetRMSNorm,
    bitnet.BitNetMLP: FusedBitNetMLP,
    bitnet.BitNetAttention: FusedBitNetAttention,
}
