"""Every CPU kernel, on every instruction set that this CPU has, equals the PyTorch reference bit for bit.

The reference runs by hiding the library. Without a compiler there is no library, and `dqt doctor` says so;
then the parametrization is empty and only the test of what a kernel refuses runs.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dqt
from dqt import ops
from dqt.errors import ConfigError
from dqt.ops import activations, attention, cpu, reference
from dqt.ops.products import MAX_INNER


def available_isas() -> list[str]:
    lib = cpu.library()
    if lib is None:
        return []
    chosen = cpu.active_isa()
    available = [isa for isa in cpu.ISAS if lib.dqt_select(isa.encode()) == 0]
    lib.dqt_select(chosen.encode())
    return available


@pytest.fixture(
    params=list(itertools.product(available_isas(), (1, 2))), ids=lambda p: f"{p[0]}-{p[1]}threads"
)
def kernels(request: pytest.FixtureRequest) -> Iterator[None]:
    """Runs a test on one instruction set and number of threads."""
    isa, threads = request.param
    before, threads_before = cpu.active_isa(), torch.get_num_threads()
    lib = cpu.library()
    assert lib is not None
    lib.dqt_select(isa.encode())
    torch.set_num_threads(threads)
    yield
    lib.dqt_select(before.encode())
    torch.set_num_threads(threads_before)


def on_reference(monkeypatch: pytest.MonkeyPatch, function: Callable[[], Any]) -> Any:
    with monkeypatch.context() as patch:
        patch.setattr(cpu, "usable", lambda *tensors: None)
        return function()


def assert_same(fast: Any, slow: Any) -> None:
    if isinstance(fast, Tensor):
        assert fast.dtype == slow.dtype
        assert (
            torch.equal(fast.nan_to_num(-7.0), slow.nan_to_num(-7.0))
            if fast.is_floating_point()
            else torch.equal(fast, slow)
        )
    elif isinstance(fast, tuple | list):
        assert len(fast) == len(slow)
        for a, b in zip(fast, slow, strict=True):
            assert_same(a, b)
    else:
        assert fast == slow


SHAPES = [(0, 5), (1, 1), (3, 5), (17, 33), (100, 512), (257, 769), (64, 2048)]


def matrix(rows: int, columns: int) -> Tensor:
    """Rows of very different size, with a zero row, a tiny row, a NaN and an Inf where there is room."""
    generator = torch.Generator().manual_seed(rows * 10_007 + columns)
    x = (
        torch.randn(rows, columns, generator=generator)
        * torch.randn(rows, 1, generator=generator).mul(3).exp()
    )
    if rows > 8:
        x[1], x[2], x[3, 0], x[4, -1] = 0.0, 1e-38, torch.nan, -torch.inf
    return x


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("shape", SHAPES)
def test_quantization_and_scaling(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    rows, columns = shape
    x = matrix(rows, columns)
    factor = torch.rand(rows, generator=torch.Generator().manual_seed(1))
    product = torch.randint(-(2**30), 2**30, shape, dtype=torch.int32)
    cases: list[Callable[[], Any]] = [
        lambda: ops.quantize_rows(x),
        lambda: ops.quantize_rows(x.T.contiguous().T),
        lambda: ops.quantize_columns(x),
        lambda: ops.quantize_columns(x, factor),
        lambda: ops.scale_product(product, factor),
        lambda: ops.scale_product(product, factor, torch.arange(columns) * 0.01),
    ]
    if rows:
        cases.append(lambda: ops.mean_squares(x.nan_to_num(1.0, 2.0, 3.0)))
    for case in cases:
        assert_same(case(), on_reference(monkeypatch, case))


def int8_matrix(rows: int, columns: int, layout: str) -> Tensor:
    """Full-range `int8` [rows, columns], stored by rows, by columns, inside of a matrix, or repeated."""
    if layout == "columns":
        return int8_matrix(columns, rows, "rows").T
    if layout == "inside":
        return int8_matrix(rows + 1, columns + 3, "rows")[1:, 3:]
    if layout == "repeated":
        return int8_matrix(1, columns, "rows").expand(rows, columns)
    generator = torch.Generator().manual_seed(rows * 1009 + columns)
    return torch.randint(-128, 128, (rows, columns), dtype=torch.int8, generator=generator)


LAYOUTS = ("rows", "columns", "inside", "repeated")
GEMMS = [
    (0, 3, 2),
    (1, 1, 1),
    (3, 5, 33),
    (16, 64, 16),
    (17, 63, 31),
    (32, 64, 32),
    (33, 65, 100),
    (96, 192, 40),
]


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("layouts", itertools.product(LAYOUTS, LAYOUTS), ids="-".join)
def test_scaled_product(layouts: tuple[str, str]) -> None:
    for rows, inner, columns in GEMMS:
        a, b = int8_matrix(rows, inner, layouts[0]), int8_matrix(inner, columns, layouts[1])
        scale, column_scale, bias = torch.rand(rows), torch.rand(columns), torch.randn(columns)
        exact = (a.long() @ b.long()).to(torch.int32)
        for extra in ((None, None), (column_scale, None), (None, bias), (column_scale, bias)):
            fast = ops.scaled_product(a, b, scale, *extra)
            assert_same(fast, reference.scale_product(exact, scale, *extra))


@pytest.mark.usefixtures("kernels")
def test_the_longest_product_of_the_smallest_numbers_does_not_wrap() -> None:
    a = torch.full((33, MAX_INNER), -128, dtype=torch.int8)
    assert (ops.scaled_product(a, a.T, torch.ones(33)) == 2.0**14 * MAX_INNER).all()
    with pytest.raises(ConfigError, match="can overflow int32"):
        ops.scaled_product(a.repeat(1, 2), a.T.repeat(2, 1), torch.ones(33))


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (65, 33), (100, 512), (70, 769)])
def test_activations(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(5)
    x, y, z = (torch.randn(shape, generator=generator) * size for size in (1.0, 20.0, 3.0))
    weight, rstd = torch.randn(shape[1], generator=generator), torch.rand(shape[0], generator=generator)
    bad = y.clone()
    bad[0, 0], bad[-1, -1] = torch.nan, torch.inf
    heads = torch.randn(2, shape[0], 3, 8, generator=generator)
    cos, sin = torch.randn(2, shape[0], 8, generator=generator)
    cases: list[Callable[[], Any]] = [
        lambda: activations.rms_norm(x, weight, 1e-6),
        lambda: activations.rms_norm_backward(x, y, weight, rstd),
        lambda: activations.swiglu(y, x),
        lambda: activations.swiglu_quantized(y, x),
        lambda: activations.swiglu_quantized(bad, x),
        lambda: activations.swiglu_backward(x, y, z),
        lambda: activations.rotary(heads, cos, sin),
        lambda: activations.rotary(heads, cos, sin, transposed=True),
    ]
    for case in cases:
        assert_same(case(), on_reference(monkeypatch, case))


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize(
    ("batch", "positions", "heads", "kv_heads", "width"),
    [(1, 1, 1, 1, 1), (2, 5, 2, 1, 3), (1, 50, 2, 2, 8), (2, 97, 4, 2, 20), (1, 130, 1, 1, 64)],
)
def test_attention(
    batch: int, positions: int, heads: int, kv_heads: int, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(positions)
    query, dout = torch.randn(2, batch, positions, heads, width, generator=generator) * 2
    key, value = torch.randn(2, batch, positions, kv_heads, width, generator=generator) * 2
    results = attention.causal_attention(query, key, value, 0.3)
    for case in (
        lambda: attention.causal_attention(query, key, value, 0.3),
        lambda: attention.causal_attention_backward(dout, query, key, value, *results, 0.3),
    ):
        assert_same(case(), on_reference(monkeypatch, case))


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("shape", SHAPES)
def test_packing(shape: tuple[int, int], bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.randint(0, 2**bits, shape, generator=torch.Generator().manual_seed(bits)).to(torch.int16)
    packed = ops.pack(values, bits)
    assert_same(packed, on_reference(monkeypatch, lambda: ops.pack(values, bits)))
    for signed in (True, False):
        unpack = functools.partial(ops.unpack, packed, bits, shape[1], signed)
        assert_same(unpack(), on_reference(monkeypatch, unpack))


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("bits", ["1", "ternary", "2", "3", "4", "5", "6", "7", "8"])
@pytest.mark.parametrize(("outputs", "columns"), [(1, 1), (3, 7), (17, 515), (600, 1030), (2, 131_071)])
@pytest.mark.parametrize("per_row", [False, True])
def test_few_tokens(
    bits: str, outputs: int, columns: int, per_row: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a packed weight they give what the layer gives that unpacks it, and the reference."""
    generator = torch.Generator().manual_seed(outputs)
    layer = nn.Linear(columns, outputs)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(outputs, columns, generator=generator))
        layer.weight[0] = -100.0  # the lowest code all along a row
    dqt.quantize_(nn.Sequential(layer), bits, per_row=per_row)
    x = torch.randn(3, columns, generator=generator)
    x[1] = 5.0
    x[2, 0] = torch.nan
    unpacked = layer(x).detach()
    with torch.no_grad():
        assert_same(layer(x), unpacked)
        assert_same(layer(x[:1].double()), unpacked[:1].double())
        assert_same(on_reference(monkeypatch, lambda: layer(x)), unpacked)


FACTORED = {"second_moment": "factored", "betas": (0.0, 0.95)}
INT8 = {"first_moment": "int8", "second_moment": "int8"}
# bits or None for float, shape, optimizer, per row, its settings; by default residual_bits 0 and decay 0.1
UPDATES: list[tuple[str | None, tuple[int, int], str, bool, dict[str, Any]]] = [
    ("1", (33, 70), "AdamW", False, {}),
    ("1", (33, 70), "AdamW", True, {"residual_bits": 16, **FACTORED, "rounding": "nearest"}),
    ("ternary", (5, 1301), "AdamW", False, {**FACTORED, "weight_decay": 0.0}),
    ("ternary", (130, 520), "AdamW", False, {"residual_bits": 8, **FACTORED}),
    ("ternary", (5, 1301), "AdamW", True, {"residual_bits": 6, "weight_decay": 0.0}),
    (
        "ternary",
        (33, 301),
        "AdamW",
        False,
        {"significance": 1.5, "first_moment": "int8", "second_moment": "factored"},
    ),
    ("4", (7, 131), "AdamW", True, {"significance": 1.0, "residual_bits": 8}),
    ("2", (9, 300), "AdamW", False, {"significance": 1.0, "first_moment": "bf16"}),
    ("8", (9, 300), "AdamW", False, {"significance": 1.0}),
    ("ternary", (33, 256), "AdamW", False, {"residual_bits": 8, "betas": (0.9, 0.95), **INT8}),
    ("2", (33, 70), "AdamW", False, {"residual_bits": 2, "betas": (0.0, 0.95), "rounding": "nearest"}),
    (
        "3",
        (9, 1030),
        "AdamW",
        True,
        {"residual_bits": 5, "second_moment": "factored", "first_moment": "bf16"},
    ),
    ("4", (64, 512), "AdamW", False, {"residual_bits": 8, **FACTORED, "weight_decay": 0.0}),
    ("5", (7, 13), "AdamW", False, {"residual_bits": 3, **INT8}),
    ("6", (33, 70), "AdamW", True, {"residual_bits": 16, "first_moment": "bf16"}),
    ("7", (33, 71), "AdamW", False, {"residual_bits": 4, "second_moment": "factored", "rounding": "nearest"}),
    ("8", (130, 520), "AdamW", False, {}),
    ("8", (5, 1301), "AdamW", True, {"rounding": "low_discrepancy", **INT8}),
    ("ternary", (33, 70), "AdamW", False, {"rounding": "low_discrepancy", "residual_bits": 6, **FACTORED}),
    ("3", (9, 1030), "SGD", False, {"rounding": "low_discrepancy", "residual_bits": 16}),
    ("8", (130, 520), "AdamW", False, INT8),
    ("8", (1, 4099), "AdamW", True, {"residual_bits": 8, "betas": (0.0, 0.95), "second_moment": "int8"}),
    ("ternary", (33, 301), "Adafactor", False, {"lr": 0.5, "residual_bits": 8}),
    ("ternary", (33, 301), "Adafactor", True, {"lr": None, "beta1": 0.9, "first_moment": "int8"}),
    ("8", (130, 520), "Adafactor", False, {"lr": 0.02, "beta1": 0.9, "scale_parameter": False}),
    ("ternary", (33, 301), "SGD", False, {"residual_bits": 8}),
    ("4", (33, 301), "SGD", False, {"momentum": 0.9, "first_moment": "bf16"}),
    ("3", (33, 301), "PaperAdamW", False, {"lr": 0.002}),
    ("8", (64, 512), "PaperAdamW", False, {"lr": 0.002}),
    ("4", (33, 301), "PaperAdamW", False, {"lr": 0.002, **INT8, "frozen_scale": True}),
    ("ternary", (33, 301), "PaperAdafactor", False, {"lr": 0.05}),
    ("4", (33, 301), "PaperAdafactor", False, {"lr": 0.02, "beta1": 0.9, "first_moment": "bf16"}),
    (None, (33, 301), "AdamW", False, {}),
    (None, (130, 512), "AdamW", False, INT8),
    (None, (130, 512), "AdamW", False, {"second_moment": "factored", "first_moment": "bf16"}),
    (None, (33, 301), "Adafactor", False, {"beta1": 0.9}),
    (None, (33, 301), "SGD", False, {"momentum": 0.9, "first_moment": "int8"}),
]


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("case", UPDATES, ids=str)
def test_fused_update(case: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    bits, shape, kind, per_row, settings = case
    paper = kind.startswith("Paper")
    if not paper:
        settings = {"residual_bits": 0, **settings}

    def train() -> list[Any]:
        generator = torch.Generator().manual_seed(4)
        layer = nn.Linear(shape[1], shape[0], bias=False)
        with torch.no_grad():
            layer.weight.copy_(torch.randn(shape, generator=generator) * 0.05)
        if bits is not None:
            scale_rule = "paper" if paper else None
            dqt.quantize_(nn.Sequential(layer), bits, per_row=per_row, scale_rule=scale_rule)
        optimizer = getattr(dqt.optim, kind)(
            layer.named_parameters(), **{"lr": 0.02, "weight_decay": 0.1, "seed": 3, **settings}
        )
        seen: list[Any] = []
        for _ in range(3):
            # Rows of very different size, and one without any gradient, as in an embedding.
            grad = torch.randn(shape, generator=generator) * torch.logspace(-4, 2, shape[0])[:, None]
            grad[shape[0] // 2] *= shape[0] == 1
            layer.weight.grad = grad
            optimizer.step()
            weight = layer.weight
            seen += [(weight if bits is None else weight.codes).detach().clone(), optimizer.telemetry()]
        return seen + [value for value in optimizer.state[layer.weight].values() if isinstance(value, Tensor)]

    fast = train()
    assert not torch.equal(fast[0], fast[4]), "the case must change codes"
    assert_same(fast, on_reference(monkeypatch, train))


def test_a_kernel_refuses_what_it_cannot_read() -> None:
    for tensor in (torch.zeros(4, 4).T[1:, 1:], torch.zeros(2, dtype=torch.float64)):
        with pytest.raises(ConfigError, match=r"contiguous torch\.float32 CPU tensor"):
            cpu.pointer(tensor, torch.float32)
    with pytest.raises(ConfigError, match=r"a tensor of 12 elements, not \[3, 3\]"):
        cpu.pointer(torch.zeros(3, 3), torch.float32, 12)


# What an update reads, by how it keeps its moments: `DqtMoment` of the first and the second.
READ = {
    (1, 1): ("grad", "weight", "exp_avg", "exp_avg_sq"),
    (3, 3): ("grad", "weight", "exp_avg", "exp_avg_sq", "exp_avg_scale", "exp_avg_sq_scale"),
    (0, 4): ("grad", "weight", "row_inverse", "column_inverse"),
}


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize(
    ("kinds", "missing"), [(kinds, name) for kinds, names in READ.items() for name in names]
)
def test_an_update_without_a_tensor_is_refused(kinds: tuple[int, int], missing: str) -> None:
    tensors = {name: torch.zeros(4) for name in READ[kinds]}
    for absent, status in ((None, 0), (missing, 1)):
        pointers = {name: tensor.data_ptr() for name, tensor in tensors.items() if name != absent}
        args = cpu.Update(rows=2, columns=2, scale_blocks=1, first=kinds[0], second=kinds[1], **pointers)
        args.rounded_moments = 3 in kinds
        lib = cpu.library()
        assert lib is not None
        assert lib.dqt_update(ctypes.byref(args)) == status
