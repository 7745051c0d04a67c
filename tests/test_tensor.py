"""`QuantizedTensor` behaves as an ordinary parameter everywhere but in writing, where it refuses floats."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import dqt
from dqt.choices import FLOAT_PRODUCTS, Products
from dqt.errors import ConfigError
from dqt.numerics.formats import FORMATS, Format
from dqt.numerics.packing import pack
from dqt.sizes import packed_size
from dqt.tensor import QuantizedTensor


def make(bits: str = "4", shape: tuple[int, ...] = (5, 7), per_row: bool = False) -> QuantizedTensor:
    fmt = FORMATS[bits]
    codes = torch.randint(fmt.qmin, fmt.qmax + 1, shape)
    rows = codes.numel() // shape[-1]
    scale = torch.rand(rows, 1) + 0.5 if per_row else torch.tensor(0.25)
    return QuantizedTensor(pack(codes, fmt.bits), scale, fmt, shape)


def make_model(bits: str = "ternary", per_row: bool = False) -> nn.Sequential:
    model = nn.Sequential(nn.Linear(6, 9), nn.LayerNorm(9), nn.Linear(9, 3, bias=False))
    dqt.quantize_(model, bits, per_row=per_row)
    return model


def weights_of(model: nn.Module) -> list[QuantizedTensor]:
    return [p for p in model.parameters() if isinstance(p, QuantizedTensor)]


def assert_same(a: QuantizedTensor, b: QuantizedTensor) -> None:
    assert isinstance(b, QuantizedTensor)
    assert (a.format, a.products, a.shape, a.dtype) == (b.format, b.products, b.shape, b.dtype)
    assert torch.equal(a.codes, b.codes)
    assert torch.equal(a.scale, b.scale)


# -- values --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=str)
@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("shape", [(7,), (5, 7), (2, 3, 9)])
def test_values(fmt: Format, per_row: bool, shape: tuple[int, ...]) -> None:
    weight = make(str(fmt), shape, per_row)
    codes = weight.unpack()
    assert codes.shape == weight.shape == shape
    scale = weight.scale.view(*shape[:-1], 1) if per_row else weight.scale
    assert torch.equal(weight.dequantize(), (codes.float() - fmt.offset) * scale)
    product_codes, product_scale = weight.product_codes()
    assert torch.equal((product_codes.float() * product_scale).view(shape), weight.dequantize())
    stored = codes.numel() // shape[-1] * packed_size(shape[-1], fmt.bits)
    assert weight.nbytes_stored() == stored + 4 * weight.scale.numel()


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=str)
@pytest.mark.parametrize("per_row", [False, True])
def test_from_float_takes_the_nearest_value_and_keeps_values_of_the_grid(fmt: Format, per_row: bool) -> None:
    weight = make(str(fmt), (5, 7), per_row)
    again = QuantizedTensor.from_float(weight.dequantize(), weight.scale, fmt)
    assert_same(weight, again)
    floats = 3 * torch.randn(5, 7)
    grid = (torch.arange(fmt.qmin, fmt.qmax + 1) - fmt.offset) * weight.scale[..., None]
    nearest = (floats[..., None] - grid).abs().amin(-1)
    error = (QuantizedTensor.from_float(floats, weight.scale, fmt).dequantize() - floats).abs()
    torch.testing.assert_close(error, nearest, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (0,)])
def test_empty_weights(shape: tuple[int, ...]) -> None:
    for fmt in FORMATS.values():
        weight = QuantizedTensor.from_float(torch.zeros(shape), torch.tensor(1.0), fmt)
        assert weight.unpack().shape == weight.dequantize().shape == shape
        assert weight.product_codes()[0].shape == ((1, 0) if shape == (0,) else shape)
        weight.check_codes()


@pytest.mark.parametrize(
    ("codes", "shape"),
    [
        (torch.zeros(5, 4, dtype=torch.int8), (5, 7)),
        (torch.zeros(5, 3, dtype=torch.uint8), (5, 7)),
        (torch.zeros(4, 4, dtype=torch.uint8), (5, 7)),
    ],
)
def test_codes_that_do_not_fit_are_refused(codes: Tensor, shape: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match=r"codes of a 4 weight of shape \(5, 7\) must be uint8 \(5, 4\)"):
        QuantizedTensor(codes, torch.tensor(1.0), FORMATS["4"], shape)


@pytest.mark.parametrize(
    "scale", [torch.ones(1), torch.ones(3, 1), torch.ones(1, 5), torch.ones(5, 1).double()]
)
def test_a_scale_that_does_not_fit_is_refused(scale: Tensor) -> None:
    """A kernel reads one number, or one a row."""
    with pytest.raises(ConfigError, match=r"scale of a weight of shape \(5, 7\) must be torch.float32 \(\)"):
        QuantizedTensor(make("4").codes, scale, FORMATS["4"], (5, 7))


@pytest.mark.parametrize("bits", ["1", "ternary", "2", "3"])
def test_few_bits_are_not_computed_in_ternary(bits: str) -> None:
    for refused in (
        lambda: dqt.quantize_(nn.Linear(4, 4), bits, {"": bits}, products=Products(compute_bits="ternary")),
        lambda: dqt.quantize_(nn.Linear(4, 4), 8, {"": bits}, products=Products(compute_bits="ternary")),
    ):
        with pytest.raises(ConfigError, match=f"stored integers of 4 to 8 bits, not {bits}"):
            refused()


def test_products_are_checked() -> None:
    assert Products() == Products("int8", "int8", "int8")
    for name, kind in itertools.product(("forward", "grad_input", "grad_weight"), ("int4", "")):
        with pytest.raises(ConfigError, match=f"unknown product {name}='{kind}'.*valid: int8, float"):
            Products(**{name: kind})


def test_write_codes_changes_the_given_rows_only() -> None:
    weight = make("3")
    before = weight.unpack()
    new = torch.randint(-4, 4, (2, 7))
    weight.write_codes(new, slice(1, 3))
    after = weight.unpack()
    assert torch.equal(after[1:3].long(), new)
    assert torch.equal(after[[0, 3, 4]], before[[0, 3, 4]])


# -- copies, devices, dtypes ---------------------------------------------------------------------------------


@pytest.mark.parametrize("per_row", [False, True])
def test_deepcopy_is_equal_and_independent(per_row: bool) -> None:
    model = make_model(per_row=per_row)
    clone = copy.deepcopy(model)
    assert isinstance(clone[0].weight, nn.Parameter)
    for a, b in zip(weights_of(model), weights_of(clone), strict=True):
        assert_same(a, b)
        b.write_codes(torch.zeros(b.shape, dtype=torch.int8))
        b.scale.fill_(9)
    assert any(weight.unpack().any() for weight in weights_of(model))
    assert all((weight.scale != 9).all() for weight in weights_of(model))
    clone.load_state_dict(model.state_dict())
    assert_same(model[0].weight, clone[0].weight)


def test_deepcopy_keeps_ties() -> None:
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
    model["b"].weight = model["a"].weight
    dqt.quantize_(model, 4)
    clone = copy.deepcopy(model)
    assert clone["a"].weight is clone["b"].weight


CONVERSIONS: dict[str, tuple[Callable[[nn.Module], nn.Module], torch.dtype, str]] = {
    "meta": (lambda m: m.to("meta"), torch.float32, "meta"),
    "cpu": (lambda m: m.cpu(), torch.float32, "cpu"),
    "bfloat16": (lambda m: m.bfloat16(), torch.bfloat16, "cpu"),
    "half": (lambda m: m.half(), torch.float16, "cpu"),
    "float64": (lambda m: m.to(torch.float64), torch.float64, "cpu"),
    "both": (lambda m: m.to("meta", torch.bfloat16), torch.bfloat16, "meta"),
}


@pytest.mark.parametrize("name", list(CONVERSIONS))
def test_module_conversions(name: str) -> None:
    convert, dtype, device = CONVERSIONS[name]
    model = make_model()
    before = [weight.unpack() for weight in weights_of(model)]
    convert(model)
    weights = weights_of(model)
    assert len(weights) == 2
    for weight, codes in zip(weights, before, strict=True):
        assert isinstance(weight, nn.Parameter)
        assert weight.requires_grad
        assert (weight.dtype, weight.device.type) == (dtype, device)
        # Only the wrapper has a dtype: what is stored stays what it was.
        assert (weight.codes.dtype, weight.scale.dtype) == (torch.uint8, torch.float32)
        assert weight.codes.device.type == weight.scale.device.type == device
        if device == "cpu":
            assert torch.equal(weight.unpack(), codes)
            assert weight.dequantize().dtype == dtype
    if device == "cpu":
        output = model(torch.randn(2, 6, dtype=dtype))
        output.sum().backward()
        assert output.dtype == weights[0].grad.dtype == dtype


def test_tensor_flatten_round_trip() -> None:
    weight = make("3", per_row=True)
    names, context = weight.__tensor_flatten__()
    inner = {name: getattr(weight, name) for name in names}
    again = QuantizedTensor.__tensor_unflatten__(inner, context, weight.shape, weight.stride())
    assert_same(weight, again)
    assert torch.utils._python_dispatch.is_traceable_wrapper_subclass(weight)


# -- autograd ------------------------------------------------------------------------------------------------


def test_a_weight_changed_between_forward_and_backward_is_an_error() -> None:
    changes: list[Callable[[nn.Sequential], object]] = [
        lambda m: m[0].weight.write_codes(torch.zeros(9, 6, dtype=torch.int8)),
        lambda m: m.load_state_dict(make_model().state_dict()),
        lambda m: m[0].weight.scale.mul_(2),
    ]
    for change in changes:
        model = make_model()
        loss = model(torch.randn(2, 6, requires_grad=True)).sum()
        change(model)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_gradients_accumulate_are_hooked_clipped_and_switched_off() -> None:
    model = make_model()
    x = torch.randn(4, 6)
    seen: list[Tensor] = []
    handle = model[0].weight.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))
    model(x).square().sum().backward()
    weight = model[0].weight
    assert type(weight.grad) is Tensor
    assert torch.equal(seen[0], weight.grad)
    handle.remove()
    model(x).square().sum().backward()
    assert torch.equal(weight.grad, 2 * seen[0])
    norm = nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    assert norm > 1e-3
    total = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
    assert total.item() == pytest.approx(1e-3, rel=1e-3)
    model.zero_grad()
    assert weight.grad is None
    weight.requires_grad_(False)
    model(x).square().sum().backward()
    assert weight.grad is None
    assert model[2].weight.grad is not None


def test_a_tied_weight_gets_both_gradients() -> None:
    model = nn.ModuleDict({"a": nn.Linear(5, 5, bias=False), "b": nn.Linear(5, 5, bias=False)})
    model["b"].weight = model["a"].weight
    dqt.quantize_(model, 4)
    x, y = torch.randn(3, 5), torch.randn(3, 5)
    grads = []
    for use_a, use_b in ((1, 0), (0, 1), (1, 1)):
        model.zero_grad()
        (use_a * model["a"](x).sum() + use_b * model["b"](y).square().sum()).backward()
        grads.append(model["a"].weight.grad.clone())
    torch.testing.assert_close(grads[2], grads[0] + grads[1])


def test_autocast_changes_the_dtype_of_activations_only() -> None:
    model = make_model()
    x = torch.randn(4, 6)
    with torch.autocast("cpu", torch.bfloat16):
        y = model[0](x)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert model[0].weight.grad.dtype == torch.float32
    torch.testing.assert_close(y.float(), model[0](x), rtol=2e-2, atol=2e-2)


OPERATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "t": lambda w: w.t() @ torch.linspace(-1, 1, 5)[:, None],
    "mul": lambda w: w * 2,
    "norm": lambda w: w.norm(),
    "rmul": lambda w: torch.linspace(-1, 1, 7) * w,
    "matmul": lambda w: torch.linspace(-1, 1, 15).view(3, 5) @ w,
    "linear with a computed weight": lambda w: torch.nn.functional.linear(torch.ones(2, 7), w * 3),
    "linear with the weight as input": lambda w: torch.nn.functional.linear(
        w, torch.linspace(-1, 1, 14).view(2, 7)
    ),
    "index": lambda w: w[1:3, ::2].exp(),
    "view": lambda w: w.view(-1).square(),
    "layer_norm": lambda w: torch.nn.functional.layer_norm(torch.linspace(0, 1, 35).view(5, 7), (5, 7), w),
    "cat": lambda w: torch.cat([w, w]).cumsum(0),
    "float64": lambda w: w.double().sum(),
}


@pytest.mark.parametrize("name", list(OPERATIONS))
def test_operations_without_an_integer_form_equal_the_dequantized_ones(name: str) -> None:
    weight = nn.Parameter(make("4"))
    plain = weight.dequantize().requires_grad_()
    results = []
    for leaf in (weight, plain):
        output = OPERATIONS[name](leaf)
        (output * torch.linspace(1, 2, output.numel()).view(output.shape)).sum().backward()
        results.append((output.detach(), leaf.grad))
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)


def test_like_constructors_and_casts_give_plain_tensors() -> None:
    weight = nn.Parameter(make("4"))
    assert type(torch.zeros_like(weight).detach()) is Tensor
    for dtype in (torch.int32, torch.bool):
        cast = weight.detach().to(dtype)
        assert cast.dtype == dtype
        assert torch.equal(torch.as_tensor(cast), weight.dequantize().to(dtype))


# -- writing floats is refused -------------------------------------------------------------------------------

WRITES: dict[str, Callable[[nn.Parameter], object]] = {
    "add_": lambda w: w.add_(1),
    "data.mul_": lambda w: w.data.mul_(2),
    "zero_": lambda w: w.zero_(),
    "copy_": lambda w: w.copy_(torch.ones(5, 7)),
    "copy_ of other bits": lambda w: w.copy_(make("3")),
    "init": lambda w: nn.init.normal_(w),
    "clamp_": lambda w: w.clamp_(-1, 1),
    "addcdiv_": lambda w: w.addcdiv_(torch.ones(5, 7), torch.ones(5, 7)),
    "foreach": lambda w: torch._foreach_add_([w], 1.0),
    "out": lambda w: torch.add(torch.ones(5, 7), 1, out=w.data),
    "item": lambda w: w.__setitem__(0, 1.0),
}


@pytest.mark.parametrize("name", list(WRITES))
def test_writes_of_floats_are_refused(name: str) -> None:
    weight = nn.Parameter(make("4"))
    before = weight.unpack()
    with torch.no_grad(), pytest.raises(TypeError, match=r"would write floats into a 4 weight.*dqt.optim"):
        WRITES[name](weight)
    assert torch.equal(weight.unpack(), before)


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_optimizers_that_do_not_know_the_class_fail_loudly(
    optimizer: type[torch.optim.Optimizer], foreach: bool
) -> None:
    model = make_model()
    model(torch.randn(2, 6)).sum().backward()
    with pytest.raises(TypeError, match=r"train it with dqt.optim"):
        optimizer(weights_of(model), lr=0.1, foreach=foreach).step()


def test_a_weight_of_the_same_kind_is_copied() -> None:
    a, b = make("4"), make("4")
    a.copy_(b)
    assert_same(a, b)
    assert a.codes.data_ptr() != b.codes.data_ptr()
    before = a.unpack()
    with pytest.raises(ConfigError, match="quantize both with the same per_row"):
        a.copy_(make("4", per_row=True))
    assert torch.equal(a.unpack(), before)


def test_float_products_are_kept_by_copies_and_moves() -> None:
    weight = make("4")
    weight.products = FLOAT_PRODUCTS
    for other in (weight.detach(), weight.clone(), weight.to(torch.bfloat16), copy.deepcopy(weight)):
        assert other.products == FLOAT_PRODUCTS
    assert "bits=4" in repr(weight)
