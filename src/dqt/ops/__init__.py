"""The operations that training spends its time in, each by the fastest backend that can take its tensors.

`reference` is the specification, in plain PyTorch, and runs anywhere. `cpu` has kernels that equal it bit for
bit. `products` has the exact integer matrix products. Callers use the functions here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dqt.numerics import packing
from dqt.ops import cpu, reference
from dqt.ops.products import int_mm

__all__ = ["int_mm", "mean_squares", "pack", "quantize_columns", "quantize_rows", "scale_product", "unpack"]


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Int8 codes and scale of each row; see `reference.quantize_rows`."""
    lib = cpu.usable(x)
    if lib is None:
        return reference.quantize_rows(x)
    x = x.float().contiguous()
    rows, columns = x.shape
    q = torch.empty(rows, columns, dtype=torch.int8)
    scale = torch.empty(rows)
    lib.dqt_quantize_rows(
        cpu.pointer(x, torch.float32),
        cpu.size(rows),
        cpu.size(columns),
        cpu.pointer(q, torch.int8),
        cpu.pointer(scale, torch.float32),
    )
    return q, scale


def quantize_columns(x: Tensor, row_factor: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Int8 codes and scale of each column of x * row_factor; see `reference.quantize_columns`."""
    lib = cpu.usable(x, row_factor)
    if lib is None:
        return reference.quantize_columns(x, row_factor)
    x = x.float().contiguous()
    rows, columns = x.shape
    q = torch.empty(rows, columns, dtype=torch.int8)
    scale = torch.empty(columns)
    scratch = torch.empty(2, columns)
    lib.dqt_quantize_columns(
        cpu.pointer(x, torch.float32),
        cpu.pointer(row_factor, torch.float32),
        cpu.size(rows),
        cpu.size(columns),
        cpu.pointer(scratch, torch.float32),
        cpu.pointer(q, torch.int8),
        cpu.pointer(scale, torch.float32),
    )
    return q, scale


def scale_product(product: Tensor, row_scale: Tensor, column_scale: Tensor | None = None) -> Tensor:
    """Floats of an integer product; see `reference.scale_product`."""
    lib = cpu.usable(product, row_scale, column_scale)
    if lib is None:
        return reference.scale_product(product, row_scale, column_scale)
    rows, columns = product.shape
    y = torch.empty(rows, columns)
    lib.dqt_scale_product(
        cpu.pointer(product, torch.int32),
        cpu.size(rows),
        cpu.size(columns),
        cpu.pointer(row_scale, torch.float32),
        cpu.pointer(column_scale, torch.float32),
        cpu.pointer(y, torch.float32),
    )
    return y


def mean_squares(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean squares of rows and columns in a fixed order; see `reference.mean_squares`."""
    lib = cpu.usable(x)
    if lib is None:
        return reference.mean_squares(x)
    rows, columns = x.shape
    row_mean, column_mean = torch.empty(rows), torch.empty(columns)
    lib.dqt_mean_squares(
        cpu.pointer(x, torch.float32),
        cpu.size(rows),
        cpu.size(columns),
        cpu.pointer(row_mean, torch.float32),
        cpu.pointer(column_mean, torch.float32),
    )
    return row_mean, column_mean


def unpack(packed: Tensor, bits: int, count: int, signed: bool) -> Tensor:
    """Values of packed rows [rows, bytes] as `int8` [rows, count]; see `numerics.packing.unpack`."""
    lib = cpu.usable(packed)
    if lib is None or packed.ndim != 2 or (bits == 8 and not signed):
        return packing.unpack(packed, bits, count, signed)
    values = torch.empty(packed.shape[0], count, dtype=torch.int8)
    packed = packed.contiguous()
    lib.dqt_unpack(
        cpu.pointer(packed, torch.uint8),
        cpu.size(packed.shape[0]),
        cpu.size(count),
        cpu.size(packed.shape[1]),
        bits,
        int(signed),
        cpu.pointer(values, torch.int8),
    )
    return values


def pack(values: Tensor, bits: int) -> Tensor:
    """Packed rows `uint8` [rows, bytes] of integers [rows, count]; see `numerics.packing.pack`."""
    lib = cpu.usable(values)
    if lib is None or values.ndim != 2:
        return packing.pack(values, bits)
    narrow = values.to(torch.int8).contiguous()
    rows, count = values.shape
    packed = torch.empty(rows, packing.packed_size(count, bits), dtype=torch.uint8)
    lib.dqt_pack(
        cpu.pointer(narrow, torch.int8),
        cpu.size(rows),
        cpu.size(count),
        cpu.size(packed.shape[1]),
        bits,
        cpu.pointer(packed, torch.uint8),
    )
    return packed
