"""The operations in plain PyTorch: the specification of every faster kernel, bit for bit, on any device.

Symmetric absmax to [-127, 127], rounding half to even: scale = absmax / 127, q = rint(x * (127 / absmax)),
all in float32, one IEEE division a row. A row with NaN or Inf gets a NaN scale and zero codes, so that the
error reaches the loss (where it is reported) instead of a float-to-integer cast (where NaN silently becomes
0).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

INT8_MAX = 127.0
SMALLEST_ABSMAX = 1e-30
"""Below this 127 / absmax nears float32's overflow; such a row counts as zero."""


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantizes each row to int8.

    Args:
        x: Float tensor [rows, columns].

    Returns:
        `int8` codes [rows, columns] and `float32` scale [rows], so that x is about codes * scale[:, None].
    """
    return _quantize(x, dim=1)


def quantize_columns(x: Tensor, row_factor: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Quantizes each column of x * row_factor[:, None] to int8.

    Args:
        x: Float tensor [rows, columns].
        row_factor: `float32` [rows], or None for 1.

    Returns:
        `int8` codes [rows, columns] and `float32` scale [columns], so that the product is about
        codes * scale.
    """
    return _quantize(x if row_factor is None else x.float() * row_factor[:, None], dim=0)


def scale_product(
    product: Tensor, row_scale: Tensor, column_scale: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """Turns an integer product into floats.

    Args:
        product: `int32` [rows, columns].
        row_scale: `float32` [rows].
        column_scale: `float32` [columns], or None for 1.
        bias: Float tensor [columns], or None for 0.

    Returns:
        `float32` [rows, columns]: ((product * row_scale) * column_scale) + bias.
    """
    y = product.float().mul_(row_scale[:, None])
    if column_scale is not None:
        y.mul_(column_scale)
    return y if bias is None else y.add_(bias.float())


LANES = 16
COLUMN_ROWS = 64


def mean_squares(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean squares of rows and columns, summed in a fixed order, so that every backend gives the same bits.

    A row is summed in 16 interleaved lanes, whose halves are then added (8, 4, 2, 1); a column row by row in
    blocks of 64 rows, then block by block.

    Args:
        x: `float32` [rows, columns], neither zero.

    Returns:
        `float32` [rows] and [columns].
    """
    rows, columns = x.shape
    squares = x.float().square()
    return row_sums(squares) / columns, column_sums(squares) / rows


def row_squares(x: Tensor, column_factor: Tensor | None = None) -> Tensor:
    """Mean squares of rows, in the order that `mean_squares` states.

    Args:
        x: `float32` [rows, columns].
        column_factor: `float32` [columns] that multiplies x first, or None for 1.

    Returns:
        `float32` [rows].
    """
    values = x.float() if column_factor is None else x.float() * column_factor
    return row_sums(values.square()) / x.shape[1]


def row_sums(values: Tensor) -> Tensor:
    """Sums of rows in the fixed order of `mean_squares`: `float32` [rows, columns] to [rows]."""
    lanes = F.pad(values, (0, -values.shape[1] % LANES)).unflatten(1, (-1, LANES))
    total = lanes[:, 0].clone()
    for i in range(1, lanes.shape[1]):
        total += lanes[:, i]
    while total.shape[1] > 1:
        half = total.shape[1] // 2
        total = total[:, :half] + total[:, half:]
    return total[:, 0]


def column_sums(values: Tensor) -> Tensor:
    """Sums of columns in the fixed order of `mean_squares`: `float32` [rows, columns] to [columns]."""
    blocks = F.pad(values, (0, 0, 0, -values.shape[0] % COLUMN_ROWS)).unflatten(0, (-1, COLUMN_ROWS))
    partial = blocks[:, 0].clone()
    for i in range(1, COLUMN_ROWS):
        partial += blocks[:, i]
    if not partial.shape[0]:
        return values.new_zeros(values.shape[1])
    total = partial[0].clone()
    for i in range(1, partial.shape[0]):
        total += partial[i]
    return total


def exact_sqrt(x: Tensor) -> Tensor:
    """The correctly rounded root of `float32` numbers.

    torch's own is not, where it calls MKL (0.7 % of the results are one unit off); through float64 it is,
    because no float32 number has a root that close to the middle of two others.
    """
    return x.double().sqrt_().float()


# -- between the products of a decoder layer -----------------------------------------------------------------


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """RMS norm of each row: y = weight * (x / sqrt(mean(x^2) + eps)).

    Args:
        x: `float32` [rows, columns].
        weight: `float32` [columns].
        eps: Added to the mean square.

    Returns:
        y, and the reciprocal of the root, `float32` [rows], for the backward pass.
    """
    root = exact_sqrt(row_sums(x * x) / x.shape[1] + eps)
    rstd = torch.ones_like(root) / root
    return weight * (x * rstd[:, None]), rstd


def rms_norm_backward(dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of `rms_norm` with respect to x [rows, columns] and weight [columns]."""
    g, scale = dy * weight, rstd[:, None]
    k = (row_sums(g * x)[:, None] / x.shape[1] * scale) * (scale * scale)
    return g * scale - x * k, column_sums(dy * (x * scale))


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """(gate * sigmoid(gate)) * up for `float32` tensors of one shape."""
    return (gate * sigmoid(gate)) * up


def swiglu_quantized(gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """`quantize_rows` of `swiglu`, for `float32` [rows, columns]."""
    return quantize_rows(swiglu(gate, up))


def swiglu_backward(dh: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of `swiglu` with respect to gate and up."""
    s = sigmoid(gate)
    return (dh * up) * (s * (gate * (1.0 - s) + 1.0)), dh * (gate * s)


def sigmoid(x: Tensor) -> Tensor:
    """1 / (1 + e^-x) from float operations that every backend rounds alike."""
    one = torch.ones_like(x)
    return one / (exponential(-x) + 1.0)


def exponential(x: Tensor) -> Tensor:
    """e^x within 2 units in the last place, clamped to e^-64 and e^64; NaN stays NaN.

    x = n ln 2 + r, Taylor's polynomial to r^7, times 2^n.
    """
    x = x.clamp(-64.0, 64.0)
    n = (x * 1.44269504).round_()
    r = (x - n * 0.693359375) - n * -2.12194440e-4
    p = torch.full_like(r, 1 / 5040)
    for coefficient in (1 / 720, 1 / 120, 1 / 24, 1 / 6, 0.5, 1.0, 1.0):
        p = p * r + coefficient
    return p * ((n.to(torch.int32) + 127) << 23).view(torch.float32)


def rotary(x: Tensor, cos: Tensor, sin: Tensor, transposed: bool = False) -> Tensor:
    """Rotary embedding: the halves (a, b) of each head become (a cos - b sin, b cos + a sin).

    Args:
        x: `float32` [batch, positions, heads, width], width even.
        cos: `float32` [positions, width].
        sin: The same shape.
        transposed: Take the transpose of that linear map: the backward pass.

    Returns:
        `float32` of the shape of x.
    """
    half = x.shape[-1] // 2
    a, b = x[..., :half], x[..., half:]
    (c, d), (s, t) = (m[:, None].split(half, dim=-1) for m in (cos, sin))
    if transposed:
        return torch.cat((a * c + b * t, b * d - a * s), dim=-1)
    return torch.cat((a * c - b * s, b * d + a * t), dim=-1)


def causal_attention(
    query: Tensor, key: Tensor, value: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """softmax(query keyᵀ * scale) value, each position seeing itself and those before it.

    Products are `sum_of_products`. weight = exponential((score - top) * scale) * inverse, with the largest
    score `top` of a query, and `inverse` = 1 / (their `row_sums` before it is multiplied).

    Args:
        query: `float32` [batch, positions, heads, width].
        key: `float32` [batch, positions, kv_heads, width].
        value: The same shape.
        scale: Factor on the scores.

    Returns:
        Output in the shape of query; top and inverse [batch, heads, positions].
    """
    q, k, v = (_grouped(x, key.shape[2]) for x in (query, key, value))
    score = sum_of_products(q, k.mT)
    top = score.where(_seen(score), -torch.inf).amax(-1)
    weight = exponential((score - top[..., None]) * _float32(scale)).where(_seen(score), 0.0)
    total = row_sums(weight.flatten(0, -2)).view(top.shape)
    inverse = torch.ones_like(total) / total
    out = sum_of_products(weight * inverse[..., None], v)
    return _ungrouped(out), top.flatten(1, 2), inverse.flatten(1, 2)


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
    """Gradients of query, key and value; those of a key's or value's sum over heads, then over queries."""
    q, k, v, d, o = (_grouped(x, key.shape[2]) for x in (query, key, value, dout, out))
    score, dweight = sum_of_products(q, k.mT), sum_of_products(d, v.mT)
    top, inverse = (x.view(score.shape[:-1])[..., None] for x in (top, inverse))
    weight = exponential((score - top) * _float32(scale)) * inverse
    delta = row_sums((d * o).flatten(0, -2)).view(top.shape)
    dscore = ((weight * (dweight - delta)) * _float32(scale)).where(_seen(score), 0.0)
    weight = weight.where(_seen(score), 0.0)
    dquery = sum_of_products(dscore, k)
    # The heads that share keys follow each other as if they were one longer sequence of queries.
    dscore, weight, q, d = (x.flatten(2, 3) for x in (dscore, weight, q, d))
    dkey, dvalue = sum_of_products(dscore.mT, q), sum_of_products(weight.mT, d)
    return _ungrouped(dquery), _ungrouped(dkey[:, :, None]), _ungrouped(dvalue[:, :, None])


def sum_of_products(a: Tensor, b: Tensor) -> Tensor:
    """Product [..., i, n] x [..., n, j] whose elements start at zero and take `fma` for n = 0, 1, 2, ..."""
    total = torch.zeros(torch.broadcast_shapes(a[..., :1].shape, b[..., :1, :].shape), device=a.device)
    for n in range(a.shape[-1]):
        total = fma(a[..., n, None], b[..., n, None, :], total)
    return total


def fma(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """a * b + c of `float32` numbers, rounded once, as the instruction does.

    The product is exact in float64, and the sum is rounded there to odd: where it is not exact, its last bit
    is set. Then the second rounding, to float32, can't meet a tie that is none (Boldo and Melquiond, 2008).
    """
    product, addend = a.double() * b.double(), c.double()
    total = product + addend
    rest = total - product
    error = (product - (total - rest)) + (addend - rest)
    bits = total.view(torch.int64)
    even = (bits & 1 == 0) & (error != 0) & total.isfinite()
    away = torch.where((error > 0) == (total > 0), 1, -1)
    return torch.where(even, bits + away, bits).view(torch.float64).float()


def _grouped(x: Tensor, kv_heads: int) -> Tensor:
    """[batch, positions, heads, width] to [batch, kv_heads, heads / kv_heads, positions, width]."""
    return x.transpose(1, 2).unflatten(1, (kv_heads, -1))


def _ungrouped(x: Tensor) -> Tensor:
    """The way back."""
    return x.flatten(1, 2).transpose(1, 2).contiguous()


def _seen(score: Tensor) -> Tensor:
    """Which keys a query sees."""
    return torch.ones(score.shape[-2:], dtype=torch.bool, device=score.device).tril()


def _float32(x: float) -> float:
    """The nearest float32 number, which is what a kernel gets."""
    return float(torch.tensor(x, dtype=torch.float32))


def _quantize(x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    x = x.float()
    if x.numel() == 0:
        return torch.zeros_like(x, dtype=torch.int8), x.new_zeros(x.shape[1 - dim])
    # Two reductions without a temporary are as fast as abs().amax(), and a third of the memory traffic.
    absmax = torch.maximum(x.amax(dim, keepdim=True), -x.amin(dim, keepdim=True))
    finite = absmax.isfinite()
    if not finite.all():
        x = torch.where(finite, x, 0.0)
    scale = torch.where(finite, absmax / INT8_MAX, torch.nan)
    # A tensor divided by a tensor: `127.0 / absmax` would be torch's reciprocal times 127, rounded twice.
    inverse = torch.where(
        finite & (absmax > SMALLEST_ABSMAX), torch.full_like(absmax, INT8_MAX) / absmax, 0.0
    )
    return (x * inverse).round_().to(torch.int8), scale.squeeze(dim)
