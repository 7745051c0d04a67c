"""Causal attention in float32 for training: forward and backward in one kernel each, scores never in memory.

`torch.ops.dqt.causal_attention` and `causal_attention_backward` follow `dqt.ops.reference` bit for bit, for
any number of threads and instruction set, which torch's own attention does not promise. The reference takes
every fused multiply-add apart and is slow; where dqt has no kernels, models keep torch's attention.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dqt.errors import ConfigError
from dqt.ops import cpu, reference
from dqt.ops.registry import fits, operation

__all__ = ["causal_attention", "causal_attention_backward", "is_fast"]


def is_fast() -> bool:
    """Whether `causal_attention` is for use: there are kernels, or the reference is asked for by DQT_ISA.

    Portable kernels, without vectors of fused multiply-adds, are hundreds of times slower than torch.
    """
    return cpu.library_path() is not None and cpu.active_isa() != "portable"


def causal_attention(
    query: Tensor, key: Tensor, value: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention of every position to itself and those before it.

    Args:
        query: `float32` [batch, positions, heads, width].
        key: `float32` [batch, positions, kv_heads, width]; heads are a multiple of kv_heads.
        value: The same shape.
        scale: Factor on the scores.

    Returns:
        The output in the shape of `query`, and for the backward pass the largest score and the reciprocal of
        the sum of weights of every query, [batch, heads, positions].
    """
    fits("causal_attention", "query", query, torch.float32, None, None, None, None)
    fits("causal_attention", "key", key, torch.float32, None, None, None, None)
    return _causal_attention(query, key, value, query.shape[1], query.shape[2], key.shape[2], scale)


def causal_attention_backward(
    dout: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    top: Tensor,
    inverse: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value, from what `causal_attention` took and returned."""
    fits("causal_attention_backward", "dout", dout, torch.float32, None, None, None, None)
    fits("causal_attention_backward", "key", key, torch.float32, None, None, None, None)
    sizes = (dout.shape[1], dout.shape[2], key.shape[2])
    return _causal_attention_backward(dout, query, key, value, out, top, inverse, *sizes, scale)


@operation(
    "(Tensor query, Tensor key, Tensor value, int positions, int heads, int kv_heads, float scale)"
    " -> (Tensor, Tensor, Tensor)",
    lambda query, key, value, positions, heads, kv_heads, scale: reference.causal_attention(
        query, key, value, scale
    ),
)
def _causal_attention(
    query: Tensor, key: Tensor, value: Tensor, positions: int, heads: int, kv_heads: int, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    _fits_heads("causal_attention", query, key, value, positions, heads, kv_heads)
    per_query = query.new_empty(query.shape[0], heads, positions)
    return query.new_empty(query.shape), per_query, torch.empty_like(per_query)


@operation(
    "(Tensor dout, Tensor query, Tensor key, Tensor value, Tensor out, Tensor top, Tensor inverse,"
    " int positions, int heads, int kv_heads, float scale) -> (Tensor, Tensor, Tensor)",
    lambda dout, query, key, value, out, top, inverse, positions, heads, kv_heads, scale: (
        reference.causal_attention_backward(dout, query, key, value, out, top, inverse, scale)
    ),
)
def _causal_attention_backward(
    dout: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    top: Tensor,
    inverse: Tensor,
    positions: int,
    heads: int,
    kv_heads: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    name = "causal_attention_backward"
    _fits_heads(name, query, key, value, positions, heads, kv_heads)
    for each, tensor in (("dout", dout), ("out", out)):
        fits(name, each, tensor, torch.float32, *query.shape)
    for each, tensor in (("top", top), ("inverse", inverse)):
        fits(name, each, tensor, torch.float32, query.shape[0], heads, positions)
    return query.new_empty(query.shape), key.new_empty(key.shape), key.new_empty(key.shape)


def _fits_heads(
    operation: str, query: Tensor, key: Tensor, value: Tensor, positions: int, heads: int, kv_heads: int
) -> None:
    fits(operation, "query", query, torch.float32, None, positions, heads, None)
    for name, tensor in (("key", key), ("value", value)):
        fits(operation, name, tensor, torch.float32, query.shape[0], positions, kv_heads, query.shape[3])
    if query.numel() == 0 or heads % kv_heads:
        raise ConfigError(
            f"{operation}: query {list(query.shape)} and {kv_heads} heads of keys do not fit: no size may be "
            "zero, and heads are a multiple of the heads of keys"
        )
