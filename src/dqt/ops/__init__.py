"""The operations that training spends its time in, each by the fastest backend that can take its tensors.

`reference` is the specification, in plain PyTorch, and runs anywhere. `cpu` has kernels that equal it bit for
bit. `products` has the exact integer matrix products. Callers use the functions here, which are the
`torch.library` operations `torch.ops.dqt.*`; the bodies below are their shape rules, see `registry`.

Tensors may have any strides (they are copied where a kernel needs them contiguous). A tensor of a dtype or
size that does not fit the others raises a `ConfigError`. None of the operations is differentiable.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dqt.errors import ConfigError
from dqt.numerics import packing
from dqt.ops import gemm, products, reference
from dqt.ops.registry import fits, operation

__all__ = [
    "int_mm",
    "mean_squares",
    "pack",
    "packed_linear",
    "quantize_columns",
    "quantize_rows",
    "row_squares",
    "scale_product",
    "scaled_product",
    "unpack",
]


@operation("(Tensor x) -> (Tensor, Tensor)", reference.quantize_rows)
def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Int8 codes and scale of each row; see `reference.quantize_rows`."""
    fits("quantize_rows", "x", x, None, None, None)
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty(x.shape[:1], dtype=torch.float32)


@operation("(Tensor x, Tensor? row_factor=None) -> (Tensor, Tensor)", reference.quantize_columns)
def quantize_columns(x: Tensor, row_factor: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Int8 codes and scale of each column of x * row_factor; see `reference.quantize_columns`."""
    fits("quantize_columns", "x", x, None, None, None)
    if row_factor is not None:
        fits("quantize_columns", "row_factor", row_factor, torch.float32, x.shape[0])
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty(x.shape[1:], dtype=torch.float32)


@operation(
    "(Tensor product, Tensor row_scale, Tensor? column_scale=None, Tensor? bias=None) -> Tensor",
    reference.scale_product,
)
def scale_product(
    product: Tensor, row_scale: Tensor, column_scale: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """Floats of an integer product; see `reference.scale_product`."""
    fits("scale_product", "product", product, torch.int32, None, None)
    rows, columns = product.shape
    fits("scale_product", "row_scale", row_scale, torch.float32, rows)
    if column_scale is not None:
        fits("scale_product", "column_scale", column_scale, torch.float32, columns)
    if bias is not None:
        fits("scale_product", "bias", bias, None, columns)
    return product.new_empty((rows, columns), dtype=torch.float32)


@operation("(Tensor x) -> (Tensor, Tensor)", reference.mean_squares)
def mean_squares(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean squares of rows and columns in a fixed order; see `reference.mean_squares`."""
    fits("mean_squares", "x", x, None, None, None)
    if 0 in x.shape:
        raise ConfigError(f"mean_squares: an empty matrix {list(x.shape)} has no mean")
    return x.new_empty(x.shape[:1], dtype=torch.float32), x.new_empty(x.shape[1:], dtype=torch.float32)


@operation("(Tensor x, Tensor? column_factor=None) -> Tensor", reference.row_squares)
def row_squares(x: Tensor, column_factor: Tensor | None = None) -> Tensor:
    """Mean squares of the rows of x * column_factor in a fixed order; see `reference.row_squares`."""
    fits("row_squares", "x", x, None, None, None)
    if column_factor is not None:
        fits("row_squares", "column_factor", column_factor, torch.float32, x.shape[1])
    if 0 in x.shape:
        raise ConfigError(f"row_squares: an empty matrix {list(x.shape)} has no mean")
    return x.new_empty(x.shape[:1], dtype=torch.float32)


@operation("(Tensor a, Tensor b) -> Tensor", products.int_mm, kernel=False)
def int_mm(a: Tensor, b: Tensor) -> Tensor:
    """Exact int8 x int8 -> int32 matrix product; see `products.int_mm`."""
    fits("int_mm", "a", a, torch.int8, None, None)
    fits("int_mm", "b", b, torch.int8, a.shape[1], None)
    return a.new_empty((a.shape[0], b.shape[1]), dtype=torch.int32)


@operation(
    "(Tensor x, Tensor codes, Tensor scale, int outputs, int bits, bool signed, bool per_row, "
    "Tensor? bias=None) -> Tensor",
    products.packed_linear,
)
def packed_linear(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    outputs: int,
    bits: int,
    signed: bool,
    per_row: bool,
    bias: Tensor | None = None,
) -> Tensor:
    """A linear layer on packed codes, for a few tokens; see `products.packed_linear`."""
    fits("packed_linear", "x", x, None, None, None)
    if not 1 <= bits <= 8 or not (signed or bits == 1):
        raise ConfigError(f"packed_linear: there are no {'' if signed else 'unsigned '}codes of {bits} bits")
    products.require_no_overflow(x.shape[1])
    fits("packed_linear", "codes", codes, torch.uint8, outputs, packing.packed_size(x.shape[1], bits))
    if scale.dtype != torch.float32 or scale.numel() != (outputs if per_row else 1):
        raise ConfigError(
            f"packed_linear: scale must be {outputs if per_row else 1} float32, not {scale.dtype} "
            f"{list(scale.shape)}"
        )
    if bias is not None:
        fits("packed_linear", "bias", bias, None, outputs)
    return x.new_empty((x.shape[0], outputs), dtype=torch.float32)


@operation(
    "(Tensor a, Tensor b, Tensor row_scale, Tensor? column_scale=None, Tensor? bias=None) -> Tensor",
    gemm.scaled_product,
    kernel=False,
)
def scaled_product(
    a: Tensor, b: Tensor, row_scale: Tensor, column_scale: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """Floats of an int8 matrix product, `scale_product(int_mm(a, b), ...)`; see `gemm.scaled_product`."""
    fits("scaled_product", "a", a, torch.int8, None, None)
    fits("scaled_product", "b", b, torch.int8, a.shape[1], None)
    fits("scaled_product", "row_scale", row_scale, torch.float32, a.shape[0])
    for name, vector in (("column_scale", column_scale), ("bias", bias)):
        if vector is not None:
            fits("scaled_product", name, vector, None, b.shape[1])
    return a.new_empty((a.shape[0], b.shape[1]), dtype=torch.float32)


def pack(values: Tensor, bits: int) -> Tensor:
    """Packed rows `uint8` [..., bytes] of integers [..., count]; see `numerics.packing.pack`."""
    return _pack(values.to(torch.int8), bits)


def unpack(packed: Tensor, bits: int, count: int, signed: bool) -> Tensor:
    """Integers [..., count] of packed rows `uint8` [..., bytes]; see `numerics.packing.unpack`.

    At 8 bits the result is a view of the packed rows: not for writing.
    """
    if bits == 8 and packed.shape[-1:] == (count,):
        return packing.unpack(packed, bits, count, signed)
    return _unpack(packed, bits, count, signed)


@operation("(Tensor values, int bits) -> Tensor", packing.pack)
def _pack(values: Tensor, bits: int) -> Tensor:
    _check_packing("pack", values, torch.int8, bits)
    return values.new_empty(
        (*values.shape[:-1], packing.packed_size(values.shape[-1], bits)), dtype=torch.uint8
    )


@operation("(Tensor packed, int bits, int count, bool signed) -> Tensor", packing.unpack)
def _unpack(packed: Tensor, bits: int, count: int, signed: bool) -> Tensor:
    _check_packing("unpack", packed, torch.uint8, bits)
    if packed.shape[-1] != packing.packed_size(count, bits):
        raise ConfigError(f"unpack: {count} values of {bits} bits do not fill {packed.shape[-1]} bytes a row")
    dtype = torch.uint8 if bits == 8 and not signed else torch.int8
    return packed.new_empty((*packed.shape[:-1], count), dtype=dtype)


def _check_packing(operation: str, tensor: Tensor, dtype: torch.dtype, bits: int) -> None:
    if not 1 <= bits <= 8:
        raise ConfigError(f"{operation}: bits must be 1 to 8, not {bits}")
    if tensor.dtype != dtype or tensor.ndim == 0:
        raise ConfigError(
            f"{operation}: wants rows of {dtype}, not {tensor.dtype} with {tensor.ndim} dimensions"
        )
