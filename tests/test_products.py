"""Integer products are exact in every layout, and the row quantizer is what its docstring says."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dqt.errors import ConfigError
from dqt.ops import products
from dqt.ops.products import MAX_INNER, int_mm, int_mm_by_float
from dqt.ops.reference import INT8_MAX, SMALLEST_ABSMAX, quantize_columns, quantize_rows

sizes = st.sampled_from([0, 1, 2, 3, 7, 8, 16, 17, 33])


def random_int8(rows: int, columns: int, layout: str) -> torch.Tensor:
    """A full-range int8 matrix [rows, columns] in a layout that the layers produce, or an odder one."""
    if layout == "transposed":
        return random_int8(columns, rows, "contiguous").T
    if layout == "strided":
        return random_int8(rows, 2 * columns, "contiguous")[:, ::2]
    if layout == "offset":
        return random_int8(rows + 1, columns + 3, "contiguous")[1:, 3:]
    if layout == "one row expanded":
        return random_int8(1, columns, "contiguous").expand(rows, columns)
    if layout == "one column expanded":
        return random_int8(rows, 1, "contiguous").expand(rows, columns)
    return torch.randint(-128, 128, (rows, columns), dtype=torch.int8)


layouts = st.sampled_from(
    ["contiguous", "transposed", "strided", "offset", "one row expanded", "one column expanded"]
)


@given(sizes, sizes, sizes, layouts, layouts)
def test_both_products_equal_int64(rows: int, inner: int, columns: int, layout_a: str, layout_b: str) -> None:
    a, b = random_int8(rows, inner, layout_a), random_int8(inner, columns, layout_b)
    exact = a.long() @ b.long()
    for product in (int_mm, int_mm_by_float):
        result = product(a, b)
        assert result.dtype == torch.int32
        assert torch.equal(result.long(), exact)


@pytest.mark.parametrize(("left", "right"), [(-128, -128), (-128, 127), (127, 127)])
@pytest.mark.parametrize("inner", [1023, 1024, 1025, 5000, MAX_INNER])
def test_extremes_over_long_inner_dimensions(left: int, right: int, inner: int) -> None:
    a = torch.full((2, inner), left, dtype=torch.int8)
    b = torch.full((inner, 3), right, dtype=torch.int8)
    for product in (int_mm, int_mm_by_float):
        assert (product(a, b) == left * right * inner).all()


def test_autocast_does_not_round_codes() -> None:
    a, b = random_int8(16, 64, "contiguous"), random_int8(64, 24, "contiguous")
    with torch.autocast("cpu", torch.bfloat16):
        for product in (int_mm, int_mm_by_float):
            assert torch.equal(product(a, b).long(), a.long() @ b.long())


def test_an_inner_dimension_that_could_overflow_is_refused() -> None:
    a, b = torch.ones(1, MAX_INNER + 1, dtype=torch.int8), torch.ones(MAX_INNER + 1, 1, dtype=torch.int8)
    with pytest.raises(ConfigError, match=r"overflow int32 \(limit 131071\).*float product"):
        int_mm(a, b)
    assert 128 * 128 * MAX_INNER < 2**31 <= 128 * 128 * (MAX_INNER + 1)


def test_a_size_one_dimension_of_stride_zero() -> None:
    """`torch._int_mm` alone may return wrong numbers here, without a word."""
    column = torch.randint(-128, 128, (40, 1), dtype=torch.int8)
    row = torch.as_strided(torch.randint(-128, 128, (24,), dtype=torch.int8), (1, 24), (0, 1))
    assert torch.equal(int_mm(column, row).long(), column.long() @ row.long())
    assert torch.equal(int_mm(row, row.T).long(), row.long() @ row.T.long())


def test_a_cpu_without_vnni_takes_float_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "has_fast_int8", lambda: False)
    monkeypatch.setattr(torch, "_int_mm", None)
    a, b = random_int8(5, 3000, "contiguous"), random_int8(3000, 4, "transposed")
    assert torch.equal(int_mm(a, b).long(), a.long() @ b.long())


def test_the_padding_for_cuda_is_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its `_int_mm` wants more than 16 rows and multiples of 8; one that asks for both stands in for it."""

    def demanding(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        assert a.shape[0] > 16
        assert all(size % 8 == 0 for size in (*a.shape, *b.shape))
        return (a.long() @ b.long()).int()

    monkeypatch.setattr(torch, "_int_mm", demanding)
    for rows, inner, columns in [(1, 1, 1), (16, 8, 8), (17, 9, 15), (24, 8, 16), (25, 31, 7)]:
        a, b = random_int8(rows, inner, "contiguous"), random_int8(inner, columns, "transposed")
        assert torch.equal(products._int_mm_padded(a, b).long(), a.long() @ b.long())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(7, 5), (1, 9), (9, 1)])
def test_rows_and_columns_are_quantized_to_the_nearest(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    x = torch.randn(shape).to(dtype)
    for quantized, (codes, scale) in ((x, quantize_rows(x)), (x.T, quantize_columns(x))):
        assert codes.dtype == torch.int8
        assert scale.dtype == torch.float32
        rows = codes if quantized is x else codes.T
        absmax = quantized.double().abs().amax(dim=1)
        assert (rows.abs().amax(dim=1) == INT8_MAX).all()
        torch.testing.assert_close(scale.double(), absmax / 127, rtol=1e-7, atol=0)
        error = (rows.double() * scale.double()[:, None] - quantized.double()).abs()
        assert (error <= absmax[:, None] / 254 * (1 + 1e-4)).all()


def test_zero_and_tiny_rows_count_as_zero() -> None:
    codes, scale = quantize_rows(torch.tensor([[0.0, 0.0], [SMALLEST_ABSMAX / 2, 0.0], [1e-20, -1e-20]]))
    assert codes.tolist() == [[0, 0], [0, 0], [127, -127]]
    assert scale[0] == 0
    assert scale.isfinite().all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_row_that_is_not_finite_has_a_nan_scale_and_leaves_the_others_alone(bad: float, place: int) -> None:
    x = torch.randn(3, 3)
    clean_codes, clean_scale = quantize_rows(x)
    x[1, place] = bad
    codes, scale = quantize_rows(x)
    assert scale[1].isnan()
    assert codes[1].tolist() == [0, 0, 0]
    assert torch.equal(codes[::2], clean_codes[::2])
    assert torch.equal(scale[::2], clean_scale[::2])


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (0, 0)])
def test_empty_matrices(shape: tuple[int, int]) -> None:
    x = torch.zeros(shape)
    assert quantize_rows(x)[0].shape == quantize_columns(x)[0].shape == shape
    assert quantize_rows(x)[1].shape == shape[:1]
    assert quantize_columns(x)[1].shape == shape[1:]
