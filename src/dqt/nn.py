"""Linear layers on integer products, and `quantize_`, which puts low-bit weights into any model.

The three products of a linear layer, with per-token int8 activations as in the paper (x: [tokens, in]):

    y  = s_x s_w (x_q W_qᵀ) + b          x quantized per token
    dx = s_g s_w (g_q W_q)               g = dy, times a per-row s_w if there is one, quantized per token
    dW = s_n (n_qᵀ x_q)                  n = dy * s_x, quantized per output column

Only the int8 x_q and s_x are kept for the backward pass, a quarter of what a float layer keeps; folding s_x
into dy saves quantizing x a second time. Integer gradients cost no loss (1.917 against 1.918 nats at 8 bits).
Each product can be float instead, see `Products`; the float layer is the reference in the tests. The float8
form of all three has x in e4m3, dy and n in e5m2, scaled in the same places, and is emulated by float32
products of these numbers; codes enter exactly, where hardware would round those of 6 to 8 bits.

Gradients are of first order: a backward pass through a backward pass is an error.

A converted module stays the `nn.Linear` or `nn.Embedding` that it was; only its weight changes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from dqt import ops
from dqt.choices import Products
from dqt.numerics.float8 import E4M3, E5M2, nearest_in_blocks, quantize_float8
from dqt.ops import activations, reference
from dqt.tensor import QuantizedTensor, implements

FEW_TOKENS = 4
"""Up to as many tokens, without gradients, are multiplied with the packed weight as it is stored."""


class _QuantizedLinear(torch.autograd.Function):
    """y = x Wᵀ + b for a `QuantizedTensor` W [out, in]; each product integer or float.

    x is a float tensor [tokens, in]; x_q and x_scale are its int8 form, or None if no product reads it.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        x_q: Tensor | None,
        x_scale: Tensor | None,
        weight: QuantizedTensor,
        bias: Tensor | None,
    ) -> Tensor:
        # Saving the codes themselves lets autograd notice when they change before the backward pass.
        ctx.save_for_backward(x if x_q is None else x_q, x_scale, weight.codes, weight.scale)
        ctx.weight, ctx.x_dtype = weight, x.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        if weight.products.forward == "float":
            b = None if bias is None else bias.to(x.dtype)
            parts = [
                F.linear(x, block.to(x.dtype), None if b is None else b[rows])
                for rows, block in weight.float_blocks()
            ]
            return parts[0] if len(parts) == 1 else torch.cat(parts, 1)
        assert x_q is not None
        assert x_scale is not None
        return _product_with_codes(x_q, x_scale, weight, bias).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, x_scale, *_ = ctx.saved_tensors
        weight: QuantizedTensor = ctx.weight
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = _grad_input(dy, weight).to(ctx.x_dtype)
        if ctx.needs_input_grad[3]:
            grad_weight = _grad_weight(dy, x, x_scale, weight.products).to(weight.dtype)
        if ctx.needs_input_grad[4]:
            grad_bias = dy.sum(0).to(ctx.bias_dtype)
        return grad_x, None, None, grad_weight, grad_bias


class _QuantizedSwiGLULinear(torch.autograd.Function):
    """y = (silu(gate) up) Wᵀ + b, where the activations exist as int8 only; gate and up are [tokens, in]."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, weight: QuantizedTensor, bias: Tensor | None) -> Tensor:
        h_q, h_scale = activations.swiglu_quantized(gate, up)
        ctx.save_for_backward(gate, up, h_q, h_scale, weight.codes, weight.scale)
        ctx.weight = weight
        return _product_with_codes(h_q, h_scale, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        gate, up, h_q, h_scale, *_ = ctx.saved_tensors
        weight: QuantizedTensor = ctx.weight
        grad_gate = grad_up = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0] or ctx.needs_input_grad[1]:
            grad_gate, grad_up = activations.swiglu_backward(_grad_input(dy, weight), gate, up)
        if ctx.needs_input_grad[2]:
            grad_weight = _grad_weight(dy, h_q, h_scale, weight.products).to(weight.dtype)
        if ctx.needs_input_grad[3]:
            grad_bias = dy.sum(0)
        return grad_gate, grad_up, grad_weight, grad_bias


def _product_with_codes(x_q: Tensor, x_scale: Tensor, weight: QuantizedTensor, bias: Tensor | None) -> Tensor:
    codes, scale = weight.product_codes()
    if scale.ndim == 0:
        return _scaled_product(x_q, codes.T, x_scale * scale, None, bias)
    return _scaled_product(x_q, codes.T, x_scale, scale.flatten(), bias)


def _scaled_product(
    a: Tensor, b: Tensor, row_scale: Tensor, column_scale: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """`ops.scaled_product`, or the emulation of a float8 product."""
    if a.dtype == torch.int8:
        return ops.scaled_product(a, b, row_scale, column_scale, bias)
    return reference.scale_product(a.float() @ b.float(), row_scale, column_scale, bias)


def _quantized_form(x: Tensor, kind: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Codes and scales of the rows of x [..., in] in a dtype, int8 or float8 by `kind`; remembered on x.

    Query, key and value projections read one tensor, and so do gate and up: the first quantizes it for all.
    Only what an operation made for the backward pass is remembered on: other tensors may share memory with
    numpy or with `x.data`, which change without a word, and are saved and copied with what they carry.
    """
    # A compiler finds the common expression itself.
    remembers = not torch.compiler.is_compiling() and x.grad_fn is not None
    if remembers:
        remembered = getattr(x, "_dqt_form", None)
        if remembered is not None and remembered[0] == (x._version, kind, dtype):
            return remembered[1], remembered[2]
    rows = x.detach().reshape(x.shape[:-1].numel(), x.shape[-1]).to(dtype)
    x_q, x_scale = quantize_float8(rows, E4M3) if kind == "fp8" else ops.quantize_rows(rows)
    if remembers:
        x._dqt_form = ((x._version, kind, dtype), x_q, x_scale)  # type: ignore[attr-defined]
    return x_q, x_scale


def _grad_input(dy: Tensor, weight: QuantizedTensor) -> Tensor:
    if weight.products.grad_input == "float":
        parts = [dy[:, rows] @ block.to(dy.dtype) for rows, block in weight.float_blocks()]
        return parts[0] if len(parts) == 1 else torch.stack(parts).sum(0)
    codes, scale = weight.product_codes()
    per_row = scale.ndim > 0
    g = dy.float() * scale.T if per_row else dy
    is_float8 = weight.products.grad_input == "fp8"
    g_q, g_scale = quantize_float8(g, E5M2) if is_float8 else ops.quantize_rows(g)
    return _scaled_product(g_q, codes, g_scale if per_row else g_scale * scale)


def _grad_weight(dy: Tensor, x_q: Tensor, x_scale: Tensor | None, products: Products) -> Tensor:
    if x_scale is None:  # the forward pass was float and kept x itself
        grad = dy.T @ x_q
    elif products.grad_weight == "float":
        grad = (dy.float() * x_scale[:, None]).T @ x_q.float()
    elif products.grad_weight == "fp8":
        n_q, n_scale = quantize_float8((dy.float() * x_scale[:, None]).T, E5M2)
        grad = _scaled_product(n_q, x_q, n_scale)
    else:
        n_q, n_scale = ops.quantize_columns(dy, x_scale)
        grad = ops.scaled_product(n_q.T, x_q, n_scale)
    match products.gradient:
        case "bf16":
            return grad.bfloat16()
        case "fp8":
            return nearest_in_blocks(grad)
    return grad


@implements(F.linear)
def quantized_linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear` for a `QuantizedTensor` weight.

    Args:
        input: Float tensor [..., in], with any leading shape, of 0 tokens too.
        weight: `QuantizedTensor` [out, in].
        bias: Float tensor [out] or None.

    Returns:
        Float tensor [..., out] in the input's dtype, or in autocast's where autocast is on.
    """
    if not isinstance(weight, QuantizedTensor) or isinstance(input, QuantizedTensor):
        with torch._C.DisableTorchFunctionSubclass():
            return F.linear(input, weight, bias)  # reads float copies
    device = input.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else input.dtype
    if _is_few(input, weight):
        return _few_tokens(input.to(dtype), weight, bias)
    # Products are explicit about their dtypes; autocast must not change them inside.
    with torch.autocast(device, enabled=False):
        products = weight.products
        kinds = (products.forward, products.grad_weight)
        kind = next((kind for kind in kinds if kind != "float"), None)
        x_q, x_scale = _quantized_form(input, kind, dtype) if kind else (None, None)
        tokens = input.to(dtype).reshape(input.shape[:-1].numel(), input.shape[-1])
        y = _QuantizedLinear.apply(tokens, x_q, x_scale, weight, bias)
        return y.view(*input.shape[:-1], weight.shape[0])


def quantized_swiglu_linear(
    gate: Tensor, up: Tensor, weight: QuantizedTensor, bias: Tensor | None = None
) -> Tensor:
    """`F.linear(silu(gate) * up, weight, bias)` without the float activations between them.

    Args:
        gate: `float32` [..., in].
        up: `float32` of the same shape.
        weight: `QuantizedTensor` [out, in] whose forward product is integer.
        bias: Float tensor [out] or None.

    Returns:
        `float32` [..., out].
    """
    flat = (gate.shape[:-1].numel(), gate.shape[-1])
    gate_rows, up_rows = gate.reshape(flat).contiguous(), up.reshape(flat).contiguous()
    if _is_few(gate, weight):
        return _few_tokens(activations.swiglu(gate_rows, up_rows).view(gate.shape), weight, bias)
    y = _QuantizedSwiGLULinear.apply(gate_rows, up_rows, weight, bias)
    return y.view(*gate.shape[:-1], weight.shape[0])


def _is_few(input: Tensor, weight: QuantizedTensor) -> bool:
    """Whether this is a step of generation, where unpacking the weight would take longer than the product."""
    products = weight.products
    as_stored = products.forward == "int8" and products.compute_bits == "stored"
    return as_stored and input.numel() <= FEW_TOKENS * input.shape[-1] and not torch.is_grad_enabled()


def _few_tokens(input: Tensor, weight: QuantizedTensor, bias: Tensor | None) -> Tensor:
    """The forward pass of generation: bitwise that of `_QuantizedLinear`, without ever unpacking the weight.

    Shapes are read from the codes: a subclass's own go through torch's dispatcher, 3 µs each.
    """
    fmt, scale, outputs = weight.format, weight.scale, weight.codes.shape[0]
    tokens = input.reshape(input.shape[:-1].numel(), input.shape[-1])
    y = ops.packed_linear(tokens, weight.codes, scale, outputs, fmt.bits, fmt.signed, scale.ndim > 0, bias)
    return y.to(input.dtype).view(*input.shape[:-1], outputs)


def computes_ternary(module: nn.Module) -> bool:
    """Whether a layer ternarizes the codes that it stores as it computes; embeddings never do."""
    weight = module.weight if isinstance(module, nn.Linear) else None
    return isinstance(weight, QuantizedTensor) and weight.products.compute_bits == "ternary"


class _QuantizedEmbedding(torch.autograd.Function):
    """Rows of a `QuantizedTensor` by index: only the rows that are used are unpacked."""

    @staticmethod
    def forward(ctx: Any, index: Tensor, weight: QuantizedTensor, padding_idx: int) -> Tensor:
        ctx.save_for_backward(index)
        ctx.shape, ctx.padding_idx = weight.shape, padding_idx
        used, position = index.flatten().unique(return_inverse=True)  # `used` is sorted
        if used.numel() and not 0 <= used[0] <= used[-1] < weight.shape[0]:
            raise IndexError(
                f"rows {int(used[0])} to {int(used[-1])} of an embedding of {weight.shape[0]} rows"
            )
        scale = weight.scale[used] if weight.scale.ndim else weight.scale
        rows = (weight.unpack_rows(used).float() - weight.format.offset) * scale
        return rows[position].view(*index.shape, weight.shape[1]).to(weight.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[None, Tensor, None]:
        (index,) = ctx.saved_tensors
        rows, columns = ctx.shape
        grad = torch.ops.aten.embedding_dense_backward(
            dy.reshape(-1, columns), index.flatten(), rows, ctx.padding_idx, False
        )
        return None, grad, None


@implements(F.embedding)
def quantized_embedding(
    input: Tensor,
    weight: QuantizedTensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    """`F.embedding` for a `QuantizedTensor` weight [vocabulary, width]; its gradient is dense."""
    if max_norm is not None or scale_grad_by_freq or sparse:
        raise NotImplementedError(
            "a quantized embedding has no max_norm, scale_grad_by_freq or sparse gradient"
        )
    return _QuantizedEmbedding.apply(input, weight, -1 if padding_idx is None else padding_idx)


# -- state dicts: plain tensors, never the subclass ----------------------------------------------------------


def _save_plain_tensors(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    weight = state.pop(prefix + "weight", None)
    if isinstance(weight, QuantizedTensor):
        state[prefix + "weight.codes"] = weight.codes
        state[prefix + "weight.scale"] = weight.scale
    elif weight is not None:
        state[prefix + "weight"] = weight


def _load_plain_tensors(
    module: nn.Module,
    state: dict[str, Any],
    prefix: str,
    metadata: Any,
    strict: bool,
    missing: list[str],
    unexpected: list[str],
    errors: list[str],
) -> None:
    """Copies codes and scale into the weight, in place; problems go to `errors`, as torch's do."""
    weight = module.weight
    if not isinstance(weight, QuantizedTensor):
        return
    name = prefix + "weight"
    if name in state and not isinstance(state[name], QuantizedTensor):
        errors.append(
            f"{name} is a float tensor, but the model's is {weight.format} codes: quantize after loading."
        )
        state[name] = weight
        return
    codes, scale = state.pop(name + ".codes", None), state.pop(name + ".scale", None)
    state[name] = weight  # what Module._load_from_state_dict finds and copies onto itself
    if codes is None or scale is None:
        missing += [
            key for key, value in ((name + ".codes", codes), (name + ".scale", scale)) if value is None
        ]
        return
    for key, new, old in ((".codes", codes, weight.codes), (".scale", scale, weight.scale)):
        if new.shape != old.shape or new.dtype != old.dtype:
            errors.append(
                f"{name}{key} is {new.dtype} {tuple(new.shape)}, "
                f"the model's is {old.dtype} {tuple(old.shape)}."
            )
            return
    if weight.codes.is_meta:
        errors.append(
            f"{name} is on the meta device, which has no memory for codes: make and quantize the model "
            "elsewhere, then load."
        )
        return
    loaded = QuantizedTensor(codes, scale, weight.format, weight.shape)
    try:
        loaded.check_codes()
    except ValueError as error:
        errors.append(f"{name}.codes: {error}.")
        return
    if not (scale.isfinite() & (scale > 0)).all():
        errors.append(f"{name}.scale must be finite and positive.")
        return
    with torch.no_grad():
        weight.codes.copy_(codes)
        weight.scale.copy_(scale)
    weight.kept_remainder = None
    torch.autograd.graph.increment_version(weight)


def set_quantized_weight(module: nn.Module, weight: nn.Parameter) -> None:
    """Gives a module a `QuantizedTensor` as its `weight`, and the hooks that keep its state dict plain."""
    if not isinstance(module.weight, QuantizedTensor):
        keep_state_dict_plain(module)
    module.weight = weight


def keep_state_dict_plain(module: nn.Module) -> None:
    """Has a module show codes and scale of a low-bit `weight` in its state dict, as plain tensors."""
    module.register_state_dict_post_hook(_save_plain_tensors)
    module.register_load_state_dict_pre_hook(_load_plain_tensors)
