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


@operation(
    "(Tensor query, Tensor key, Tensor value, float scale) -> (Tensor, Tensor, Tensor)",
    reference.causal_attention,
    sizes=lambda query, key, *_: (query.shape[1], query.shape[2], key.shape[2]),
)
def causal_attention(
    query: Tensor, key: Tensor, value: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention of every position to itself and those before it; see `reference.causal_attention`.

    Heads of queries are a multiple of those of keys.
    """
    _fits_heads("causal_attention", query, key, value)
    per_query = query.new_empty(query.shape[0], query.shape[2], query.shape[1])
    return query.new_empty(query.shape), per_query, torch.empty_like(per_query)


@operation(
    "(Tensor dout, Tensor query, Tensor key, Tensor value, Tensor out, Tensor top, Tensor inverse,"
    " float scale) -> (Tensor, Tensor, Tensor)",
    reference.causal_attention_backward,
    sizes=lambda dout, query, key, *_: (query.shape[1], query.shape[2], key.shape[2]),
)
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
    name = "causal_attention_backward"
    _fits_heads(name, query, key, value)
    for each, tensor in (("dout", dout), ("out", out)):
        fits(name, each, tensor, torch.float32, *query.shape)
    for each, tensor in (("top", top), ("inverse", inverse)):
        fits(name, each, tensor, torch.float32, query.shape[0], query.shape[2], query.shape[1])
    return query.new_empty(query.shape), key.new_empty(key.shape), key.new_empty(key.shape)


def _fits_heads(operation: str, query: Tensor, key: Tensor, value: Tensor) -> None:
    fits(operation, "query", query, torch.float32, None, None, None, None)
    batch, positions, heads, width = query.shape
    fits(operation, "key", key, torch.float32, batch, positions, None, width)
    fits(operation, "value", value, torch.float32, *key.shape)
    if query.numel() == 0 or key.numel() == 0 or heads % key.shape[2]:
        raise ConfigError(
            f"{operation}: query {list(query.shape)} and {key.shape[2]} heads of keys do not fit: no size "
            "may be zero, and heads are a multiple of the heads of keys"
        )
