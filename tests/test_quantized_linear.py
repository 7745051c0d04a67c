"""The quantized linear layer against a float64 simulation, with the bounds of int8 rounding.

With x̂ the int8 grid point next to x (per token) and c the codes, so that Ŵ = s c, the simulation is

    y = x̂ Ŵᵀ + b        dx = dy Ŵ        dW = dyᵀ x̂        (x in place of x̂ where the product is float)

Integer sums are exact, so that only float32 scales and, for the two gradients, the rounding of dy remain:

    |Δdx[t, i]| <= max_o |dy[t, o] s_o| / 254 * Σ_o |c[o, i]|         dy s_w is rounded per token, to absmax /
    127
    |ΔdW[o, i]| <= max_t |dy[t, o] s_x[t]| / 254 * Σ_t |x_q[t, i]|    dy s_x is rounded per output column
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import dqt
from dqt.choices import FLOAT_PRODUCTS, Products
from dqt.numerics.formats import FORMATS
from dqt.tensor import QuantizedTensor

IN, OUT = 13, 9
SHAPES = [(4, 5), (), (0,), (1,), (3, 0, 2), (2, 3, 1)]
ALL_PRODUCTS = [Products(*kinds) for kinds in itertools.product(("int8", "float"), repeat=3)]
FLOAT_ERROR = 1e-5  # of float32 sums of a few terms and scales, relative to the largest result


def make_layer(bits: str, per_row: bool, products: Products, bias: bool = True) -> tuple[nn.Linear, Tensor]:
    """A layer with a random weight, and its value in float64."""
    layer = nn.Linear(IN, OUT, bias=bias)
    dqt.quantize_(layer, bits, per_row=per_row, products=products)
    weight = layer.weight
    assert isinstance(weight, QuantizedTensor)
    scale = weight.scale.double()
    return layer, (weight.unpack().double() - weight.format.offset) * scale


def int8_of_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and scale [rows, 1] of rows, in float64."""
    absmax = x.double().abs().amax(dim=1, keepdim=True) if x.numel() else x.double()[:, :1]
    scale = absmax / 127
    return torch.round(x.double() / scale.clamp_min(1e-300)), scale


def assert_within(actual: Tensor, expected: Tensor, bound: Tensor | float) -> None:
    if expected.numel():
        slack = FLOAT_ERROR * expected.abs().max() + 1e-12
        assert ((actual.double() - expected).abs() <= bound + slack).all()


@pytest.mark.parametrize(
    "products", ALL_PRODUCTS, ids=lambda p: f"{p.forward}-{p.grad_input}-{p.grad_weight}"
)
@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("bits", list(FORMATS))
def test_forward_and_gradients(bits: str, per_row: bool, products: Products) -> None:
    for leading, bias in itertools.product(SHAPES, (True, False)):
        layer, weight = make_layer(bits, per_row, products, bias)
        x = torch.randn(*leading, IN, requires_grad=True)
        y = layer(x)
        assert y.shape == (*leading, OUT)
        dy = torch.randn_like(y)
        y.backward(dy)

        tokens, grad = x.detach().view(-1, IN).double(), dy.view(-1, OUT).double()
        x_q, x_scale = int8_of_rows(tokens)
        expected = (x_q * x_scale if products.forward == "int8" else tokens) @ weight.T
        if bias:
            expected = expected + layer.bias.detach().double()
            assert layer.bias.grad is not None
            assert_within(layer.bias.grad, grad.sum(0), 0.0)
        assert_within(y.detach().view(-1, OUT), expected, 0.0)

        assert x.grad is not None
        bound: Tensor | float = 0.0
        if products.grad_input == "int8" and tokens.shape[0]:
            scale = layer.weight.scale.double().expand(OUT, 1)
            largest = (grad * scale.T).abs().amax(1, keepdim=True)
            bound = largest / 254 * (weight / scale).abs().sum(0)
        assert_within(x.grad.view(-1, IN), grad @ weight, bound)

        assert type(layer.weight.grad) is Tensor
        assert layer.weight.grad.shape == (OUT, IN)
        # A float forward pass with float gradients keeps x itself; every other combination keeps int8 x.
        keeps_float = products.forward == products.grad_weight == "float"
        bound = 0.0
        if products.grad_weight == "int8" and tokens.shape[0]:
            bound = (grad * x_scale).abs().amax(0)[:, None] / 254 * x_q.abs().sum(0)
        assert_within(layer.weight.grad, grad.T @ (tokens if keeps_float else x_q * x_scale), bound)


def test_the_bounds_are_tight_enough_to_notice_a_wrong_product() -> None:
    """The int8 bound on gradients is a few per cent of the gradients, not larger than they are."""
    layer, weight = make_layer("8", False, Products())
    x, dy = torch.randn(64, IN, requires_grad=True), torch.randn(64, OUT)
    layer(x).backward(dy)
    assert x.grad is not None
    assert layer.weight.grad is not None
    for actual, expected in ((x.grad, dy.double() @ weight), (layer.weight.grad, dy.double().T @ x.double())):
        assert (actual.double() - expected).norm() < 0.02 * expected.norm()


def test_a_large_token_costs_its_neighbours_nothing() -> None:
    """Activations have a scale per token."""
    layer, _ = make_layer("4", False, Products())
    x = torch.randn(8, IN)
    alone = layer(x[:4])
    x[4:] *= 1000
    assert torch.equal(layer(x)[:4], alone)


@pytest.mark.parametrize("bits", ["1", "8"])
@pytest.mark.parametrize("per_row", [False, True])
def test_float_products_in_blocks_are_the_same(
    bits: str, per_row: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The head of a large vocabulary is never copied as a whole."""
    results = []
    for block in (2**22, 3 * 20):
        monkeypatch.setattr("dqt.tensor.FLOAT_BLOCK", block)
        torch.manual_seed(0)
        layer = nn.Linear(20, 31)
        dqt.quantize_(nn.Sequential(layer), bits, per_row=per_row, products=FLOAT_PRODUCTS)
        assert len(list(layer.weight.float_blocks())) == (1 if block > 1000 else 11)
        x = torch.randn(5, 20, requires_grad=True)
        y = layer(x)
        y.square().sum().backward()
        results.append((y, x.grad, layer.weight.grad, layer.bias.grad))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_gradcheck_of_float_products() -> None:
    layer, _ = make_layer("3", True, FLOAT_PRODUCTS)
    x = torch.randn(3, IN, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(OUT, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, b: F.linear(x, layer.weight, b), (x, bias))


@pytest.mark.parametrize("products", [Products(), FLOAT_PRODUCTS])
def test_a_second_derivative_is_an_error(products: Products) -> None:
    """Through integers it would be zero, without a word."""
    layer, _ = make_layer("8", False, products)
    x = torch.randn(3, IN, requires_grad=True)
    (dx,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        dx.square().sum().backward()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("products", [Products(), FLOAT_PRODUCTS])
def test_an_input_that_is_not_finite_reaches_the_output_and_the_gradients(
    bad: float, products: Products
) -> None:
    layer, _ = make_layer("8", False, products)
    x = torch.randn(3, IN)
    x[1, 4] = bad
    y = layer(x)
    assert not y[1].isfinite().any()
    assert y[::2].isfinite().all()
    y.sum().backward()
    assert layer.weight.grad is not None
    assert not layer.weight.grad.isfinite().all()


def test_an_output_gradient_that_is_not_finite_reaches_the_gradients() -> None:
    layer, _ = make_layer("8", False, Products())
    x = torch.randn(3, IN, requires_grad=True)
    dy = torch.ones(3, OUT)
    dy[1, 2] = float("nan")
    layer(x).backward(dy)
    assert x.grad is not None
    assert layer.weight.grad is not None
    assert x.grad[1].isnan().all()
    assert x.grad[::2].isfinite().all()
    assert layer.weight.grad[2].isnan().all()
    assert layer.weight.grad[:2].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("products", [Products(), FLOAT_PRODUCTS])
def test_other_float_dtypes(dtype: torch.dtype, products: Products) -> None:
    layer, weight = make_layer("8", False, products, bias=False)
    x = torch.randn(6, IN).to(dtype).requires_grad_()
    y = layer(x)
    y.sum().backward()
    assert x.grad is not None
    assert y.dtype == x.grad.dtype == dtype
    assert layer.weight.grad is not None
    assert layer.weight.grad.dtype == torch.float32
    torch.testing.assert_close(y.double(), x.detach().double() @ weight.T, rtol=0.03, atol=0.03)


@pytest.mark.parametrize(("inputs", "outputs"), [(0, 3), (3, 0), (1, 1), (1, 7), (7, 1)])
@pytest.mark.parametrize("products", [Products(), FLOAT_PRODUCTS])
@pytest.mark.filterwarnings("ignore:Initializing zero-element")
def test_degenerate_sizes(inputs: int, outputs: int, products: Products) -> None:
    layer = nn.Linear(inputs, outputs)
    dqt.quantize_(layer, 4, products=products)
    x = torch.randn(5, inputs, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert x.grad is not None
    assert layer.weight.grad is not None
    assert y.shape == (5, outputs)
    assert layer.weight.grad.shape == (outputs, inputs)
    assert y.isfinite().all()
    torch.testing.assert_close(y, F.linear(x, layer.weight.dequantize(), layer.bias), rtol=0.02, atol=0.02)


def test_frozen_inputs_and_weights_need_no_gradient() -> None:
    layer, _ = make_layer("4", False, Products())
    layer(torch.randn(2, IN)).sum().backward()
    assert layer.weight.grad is not None
    layer.requires_grad_(False)
    layer.zero_grad()
    x = torch.randn(2, IN, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad is not None
    assert layer.weight.grad is None
    with torch.no_grad():
        assert not layer(x).requires_grad


def test_int8_products_keep_only_int8_activations_for_the_backward_pass() -> None:
    layer, _ = make_layer("8", False, Products())
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, keep):
        layer(torch.randn(50, IN, requires_grad=True))
    activations = [t for t in saved if t.shape == (50, IN)]
    assert [t.dtype for t in activations] == [torch.int8]


@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("padding_idx", [None, 2])
@pytest.mark.parametrize("bits", list(FORMATS))
def test_embedding_equals_the_dense_one(bits: str, padding_idx: int | None, per_row: bool) -> None:
    for shape in ((), (0,), (7,), (2, 0), (3, 5)):
        embedding = nn.Embedding(11, 6, padding_idx=padding_idx)
        dqt.quantize_(embedding, rules={"": bits}, per_row=per_row)
        index = torch.randint(11, shape)
        dense = embedding.weight.dequantize().requires_grad_()  # type: ignore[operator]
        outputs = [embedding(index), F.embedding(index, dense, padding_idx)]
        dy = torch.randn(*shape, 6)
        for output in outputs:
            output.backward(dy)
        assert torch.equal(*outputs)
        assert embedding.weight.grad is not None
        assert dense.grad is not None
        assert torch.equal(embedding.weight.grad, dense.grad)


def test_embedding_refuses_what_it_lacks() -> None:
    for setting in ({"max_norm": 1.0}, {"scale_grad_by_freq": True}, {"sparse": True}):
        embedding = nn.Embedding(4, 3, **setting)  # type: ignore[arg-type]
        dqt.quantize_(embedding, rules={"": 4})
        with pytest.raises(NotImplementedError, match="a quantized embedding has no max_norm"):
            embedding(torch.tensor([1]))


@pytest.mark.parametrize("index", [[-1, -3], [0, -1], [3, 4]])
def test_a_row_that_is_not_there_is_an_error_as_in_torch(index: list[int]) -> None:
    embedding = nn.Embedding(4, 3)
    for bits in (None, 4):
        dqt.quantize_(embedding, rules={"": bits})
        with pytest.raises(IndexError):
            embedding(torch.tensor(index))


def test_the_scale_of_int8_activations_is_per_token_and_symmetric() -> None:
    layer = nn.Linear(4, 1, bias=False)
    dqt.quantize_(layer, 8)
    layer.weight.write_codes(torch.tensor([[1, 0, 0, 0]]))  # type: ignore[operator]
    layer.weight.scale.fill_(1.0)  # type: ignore[operator, union-attr]
    x = torch.tensor([[0.3, 127.0, 0, 0], [0.6, 127.0, 0, 0], [0.3, 12.7, 0, 0], [-0.6, -127.0, 0, 0]])
    y = layer(x).squeeze(1)
    for actual, expected in zip(y.tolist(), [0.0, 1.0, 0.3, -1.0], strict=True):
        assert math.isclose(actual, expected, rel_tol=1e-6)
