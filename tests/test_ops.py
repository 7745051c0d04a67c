"""The operations are proper `torch.library` operations, and refuse what does not fit together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from dqt import ops
from dqt.errors import ConfigError
from dqt.ops import cpu, reference

ROWS, COLUMNS = 6, 40


def floats(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))


def integers(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randint(-100, 100, shape, generator=torch.Generator().manual_seed(1)).to(dtype)


x, row, column = floats(ROWS, COLUMNS), floats(ROWS), floats(COLUMNS)
codes = integers(torch.int8, ROWS, COLUMNS)
product = integers(torch.int32, ROWS, COLUMNS)
packed = codes.view(torch.uint8)[:, :10]
scale = torch.tensor(0.5)
query, key = floats(2, 5, 4, 3), floats(2, 5, 2, 3)
per_query = floats(2, 4, 5)

# operation, arguments: one call of each kind that its schema allows
CALLS: list[tuple[str, tuple[Any, ...]]] = [
    ("quantize_rows", (x,)),
    ("quantize_rows", (x.T,)),
    ("quantize_rows", (x.bfloat16(),)),
    ("quantize_columns", (x,)),
    ("quantize_columns", (x, row)),
    ("scale_product", (product, row)),
    ("scale_product", (product, row, column, column.half())),
    ("scale_product", (product.T, column, None, row)),
    ("packed_linear", (x, packed, scale, ROWS, 2, True, False)),
    ("packed_linear", (x.half(), packed[:, :5], row, ROWS, 1, False, True, row)),
    ("mean_squares", (x,)),
    ("causal_attention", (query, key, key, 0.5)),
    ("causal_attention_backward", (query, query, key, key, query, per_query, per_query, 0.5)),
    ("int_mm", (codes, codes.T)),
    ("pack", (codes, 3)),
    ("unpack", (packed.contiguous(), 2, COLUMNS, True)),
    ("unpack", (codes.view(torch.uint8), 8, COLUMNS, False)),
]


@pytest.mark.parametrize(
    ("name", "arguments"), CALLS, ids=lambda value: value if isinstance(value, str) else ""
)
def test_opcheck(name: str, arguments: tuple[Any, ...]) -> None:
    """Schema, fake implementation and tracing agree with what the operation does."""
    torch.library.opcheck(getattr(torch.ops.dqt, name).default, arguments)


@pytest.mark.parametrize(
    ("name", "arguments"), CALLS, ids=lambda value: value if isinstance(value, str) else ""
)
def test_strides_of_the_arguments_do_not_matter(name: str, arguments: tuple[Any, ...]) -> None:
    def spread(value: Any) -> Any:
        if not isinstance(value, Tensor) or value.ndim == 0:
            return value
        wide = value.new_zeros((*value.shape[:-1], 2 * value.shape[-1]))
        wide[..., ::2] = value
        return wide[..., ::2]

    operation = getattr(torch.ops.dqt, name)
    torch.testing.assert_close(
        operation(*map(spread, arguments)), operation(*arguments), rtol=0, atol=0, equal_nan=True
    )


def test_the_reference_of_no_rows() -> None:
    empty, weight = floats(0, COLUMNS), torch.ones(COLUMNS)
    grad, grad_weight = reference.rms_norm_backward(empty, empty, weight, torch.ones(0))
    assert grad.shape == empty.shape
    assert torch.equal(grad_weight, torch.zeros(COLUMNS))


def test_fake_tensors_need_no_memory() -> None:
    with FakeTensorMode():
        huge = torch.empty(2**20, 2**20)
        q, scale = ops.quantize_rows(huge)
        y = ops.scale_product(ops.int_mm(q[:, :1000], q.T[:1000]), scale)
    assert q.shape == y.shape == huge.shape
    assert (q.dtype, scale.dtype, y.dtype) == (torch.int8, torch.float32, torch.float32)


MISFITS: list[tuple[Callable[[], Any], str]] = [
    (
        lambda: ops.quantize_rows(codes),
        r"quantize_rows: x must be a float tensor \[any, any\], not torch.int8",
    ),
    (lambda: ops.quantize_rows(row), r"not torch\.float32 \[6\]"),
    (lambda: ops.quantize_columns(x, column), r"row_factor must be torch\.float32 \[6\], not .* \[40\]"),
    (lambda: ops.quantize_columns(x, row.double()), r"row_factor must be torch\.float32 .* torch\.float64"),
    (lambda: ops.scale_product(x, row), r"product must be torch\.int32"),
    (lambda: ops.scale_product(product, column), r"row_scale must be torch\.float32 \[6\]"),
    (lambda: ops.scale_product(product, row[:1]), r"row_scale must be torch\.float32 \[6\], not .* \[1\]"),
    (lambda: ops.scale_product(product, row, row), r"column_scale must be torch\.float32 \[40\]"),
    (lambda: ops.scale_product(product, row, column, row), r"bias must be a float tensor \[40\]"),
    (lambda: ops.scale_product(product, row, None, codes[0]), r"bias must be a float tensor .* torch\.int8"),
    (lambda: ops.packed_linear(x, packed, scale, 5, 2, True, False), r"codes must be torch\.uint8 \[5, 10\]"),
    (lambda: ops.packed_linear(x, packed, scale, ROWS, 2, False, False), "no unsigned codes of 2 bits"),
    (lambda: ops.packed_linear(x, packed, row, ROWS, 2, True, False), "scale must be 1 float32, not"),
    (lambda: ops.packed_linear(x, packed, scale, ROWS, 2, True, True), "scale must be 6 float32, not"),
    (lambda: ops.packed_linear(x, packed, scale, ROWS, 2, True, False, column), r"bias must be a float"),
    (
        lambda: ops.packed_linear(torch.ones(1, 2**17), packed, scale, ROWS, 2, True, False),
        "131072 terms can overflow int32",
    ),
    (lambda: ops.mean_squares(x[:0]), "an empty matrix"),
    (lambda: ops.int_mm(codes, codes), r"int_mm: b must be torch\.int8 \[40, any\]"),
    (lambda: ops.int_mm(codes.int(), codes.T), r"a must be torch\.int8"),
    (lambda: ops.pack(codes, 9), "bits must be 1 to 8, not 9"),
    (lambda: ops.unpack(packed, 0, 4, True), "bits must be 1 to 8, not 0"),
    (lambda: ops.unpack(packed, 2, 41, True), "41 values of 2 bits do not fill 10 bytes"),
    (lambda: ops.unpack(packed, 8, 11, True), "11 values of 8 bits"),
    (lambda: ops.unpack(codes, 2, 160, True), r"rows of torch\.uint8, not torch\.int8"),
    (lambda: ops.unpack(packed[0, 0], 1, 8, True), "0 dimensions"),
]


@pytest.mark.parametrize("backend", ["kernels", "reference"])
@pytest.mark.parametrize(
    ("call", "message"), MISFITS, ids=lambda value: value if isinstance(value, str) else ""
)
def test_what_does_not_fit_is_refused_by_every_backend(
    call: Callable[[], Any], message: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if backend == "reference":
        monkeypatch.setattr(cpu, "usable", lambda *tensors: None)
    with pytest.raises(ConfigError, match=message):
        call()
