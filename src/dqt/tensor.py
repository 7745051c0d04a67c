"""`QuantizedTensor`: a weight that is packed integers and a scale, and looks like a float tensor to autograd.

It is a wrapper subclass with a float dtype, so that autograd, parameter groups, hooks and FSDP2 see an
ordinary leaf whose gradient is an ordinary float tensor. Inside are two plain tensors and nothing else:
`codes` (packed `uint8`) and `scale` (`float32`).

Two choices and their cost:

- Nothing is ever rounded by a dispatched operation. An in-place write of floats (`weight.add_`,
  `weight.copy_`, `nn.init`) is an error; the optimizer rounds, explicitly, through `write_codes`. So
  optimizers that do not know the class fail loudly instead of training something else.
- An operation that has no integer form reads the weight through `dequantize()`: right, but a float copy for
  as long as the operation lives. `F.linear` and `F.embedding` have integer forms, in `dqt.nn`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from dqt import ops
from dqt.choices import INT8_PRODUCTS, TERNARIZED, Products, no_ternarization
from dqt.errors import ConfigError, FloatWriteError
from dqt.numerics.formats import Format
from dqt.sizes import FLOAT_BLOCK, packed_size

aten = torch.ops.aten


_functions: dict[Callable[..., Any], Callable[..., Any]] = {}


def implements(function: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers how a torch function acts when one of its arguments is a `QuantizedTensor`."""

    def register(implementation: Callable[..., Any]) -> Callable[..., Any]:
        _functions[function] = implementation
        return implementation

    return register


class QuantizedTensor(torch.Tensor):
    """A low-bit weight: value = (code - format.offset) * scale.

    Attributes:
        codes: Packed `uint8` [*shape[:-1], packed_size(shape[-1], bits)].
        scale: `float32`, [] or [rows, 1], where rows is the product of shape[:-1].
        format: The format of the codes.
        products: How linear layers multiply with it.
        kept_remainder: What rounding left of a trained weight, `int8` [rows, columns] in 1/128 grid steps,
            until an optimizer's residual begins with it; None otherwise. Copies share it, new codes drop it.
    """

    codes: Tensor
    scale: Tensor
    format: Format
    products: Products
    kept_remainder: Tensor | None = None

    @staticmethod
    def __new__(
        cls,
        codes: Tensor,
        scale: Tensor,
        format: Format,
        shape: torch.Size | tuple[int, ...],
        dtype: torch.dtype = torch.float32,
        products: Products = INT8_PRODUCTS,
    ) -> QuantizedTensor:
        expected = (*shape[:-1], packed_size(shape[-1], format.bits))
        if codes.dtype != torch.uint8 or tuple(codes.shape) != expected:
            raise ConfigError(
                f"codes of a {format} weight of shape {tuple(shape)} must be uint8 {expected}, "
                f"not {codes.dtype} {tuple(codes.shape)}"
            )
        rows = math.prod(shape[:-1])
        if scale.dtype != torch.float32 or tuple(scale.shape) not in ((), (rows, 1)):
            raise ConfigError(
                f"the scale of a weight of shape {tuple(shape)} must be torch.float32 () or {(rows, 1)}, "
                f"not {scale.dtype} {tuple(scale.shape)}"
            )
        if products.compute_bits == "ternary" and format.name not in TERNARIZED:
            raise ConfigError(no_ternarization(format.name))
        self = torch.Tensor._make_wrapper_subclass(cls, tuple(shape), dtype=dtype, device=codes.device)
        self.codes, self.scale, self.format, self.products = codes, scale, format, products
        return self

    @classmethod
    def from_float(
        cls, weight: Tensor, scale: Tensor, format: Format, products: Products | None = None
    ) -> QuantizedTensor:
        """Rounds float weights to the nearest values of the grid.

        Args:
            weight: Finite float tensor with at least one dimension.
            scale: Positive `float32`, [] or [rows, 1].
            format: The format of the codes.
            products: How linear layers multiply with it.
        """
        *leading, columns = weight.shape
        rows = weight.detach().float().reshape(math.prod(leading), columns)
        codes = (rows / scale + (format.offset + 0.5)).floor_().clamp_(format.qmin, format.qmax)
        packed = ops.pack(codes.to(torch.int16), format.bits)
        packed = packed.view(*leading, packed_size(columns, format.bits))
        return cls(packed, scale, format, weight.shape, weight.dtype, products or Products())

    # -- reading ---------------------------------------------------------------------------------------------

    @property
    def rows(self) -> int:
        """Number of packed rows: the product of all dimensions but the last."""
        return math.prod(self.shape[:-1])

    def unpack_rows(self, rows: slice = slice(None)) -> Tensor:
        """Codes of some rows, `int8` [rows, shape[-1]]."""
        packed = self.codes.view(self.rows, self.codes.shape[-1])[rows]
        return ops.unpack(packed, self.format.bits, self.shape[-1], self.format.signed)

    def unpack(self) -> Tensor:
        """All codes, `int8` of the logical shape."""
        return self.unpack_rows().view(self.shape)

    def product_codes(self) -> tuple[Tensor, Tensor]:
        """What integer products take: `int8` codes without an offset [rows, columns], and their scale."""
        codes = self.unpack_rows()
        if self.products.compute_bits == "ternary":
            mean = _mean_magnitude(codes)
            return _ternarized(codes, mean), self.scale * mean
        if self.format.offset:
            codes = codes * 2 - 1  # binary: {0, 1} -> {-1, 1}, half a scale apart from zero
        return codes, self.scale / self.format.product_factor

    def dequantize(self, rows: slice | None = None) -> Tensor:
        """A float copy of the weight in its dtype and logical shape, or of some rows; not differentiable."""
        with torch.no_grad():
            scale = self.scale[rows] if rows is not None and self.scale.ndim else self.scale
            values = self.unpack_rows(slice(None) if rows is None else rows).float()
            if self.format.offset:
                values -= self.format.offset
            copy = (values * scale).to(self.dtype)
            return copy.view(self.shape) if rows is None else copy

    def float_blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """A float copy, a few rows at a time, for products that should not copy a whole vocabulary.

        A weight of up to 2**22 elements is one block; the head of the 130M preset has six of 17 MB.
        """
        if self.products.compute_bits == "ternary":
            codes, scale = self.product_codes()
            yield slice(0, self.rows), (codes.float() * scale).to(self.dtype)
            return
        height = max(1, FLOAT_BLOCK // max(1, self.shape[-1]))
        for start in range(0, max(1, self.rows), height):
            rows = slice(start, min(start + height, self.rows))
            yield rows, self.dequantize(rows)

    def nbytes_stored(self) -> int:
        """Bytes that codes and scale really take."""
        return self.codes.nbytes + self.scale.nbytes

    # -- writing ---------------------------------------------------------------------------------------------

    @torch.no_grad()
    def write_codes(self, codes: Tensor, rows: slice = slice(None)) -> None:
        """Replaces the codes of some rows, in place.

        A backward pass whose forward pass used the old codes fails afterwards, as for any in-place change.

        Args:
            codes: Integer tensor [rows, shape[-1]] with values in [qmin, qmax].
            rows: Which rows.
        """
        self.codes.view(self.rows, self.codes.shape[-1])[rows] = ops.pack(codes, self.format.bits)
        self.kept_remainder = None
        torch.autograd.graph.increment_version(self)

    def check_codes(self) -> None:
        """Raises `ValueError` if a code is none of the format's (ternary leaves one pattern unused)."""
        if self.format.levels < 2**self.format.bits and self.numel():
            codes = self.unpack_rows()
            if codes.amin() < self.format.qmin or codes.amax() > self.format.qmax:
                raise ValueError(f"codes outside of the {self.format} format")

    # -- torch protocols -------------------------------------------------------------------------------------

    def _with(self, codes: Tensor, scale: Tensor, dtype: torch.dtype | None = None) -> QuantizedTensor:
        copy = QuantizedTensor(codes, scale, self.format, self.shape, dtype or self.dtype, self.products)
        if self.kept_remainder is not None:
            copy.kept_remainder = self.kept_remainder.to(codes.device)
        return copy

    def __tensor_flatten__(self) -> tuple[list[str], tuple[Format, torch.dtype, Products]]:
        return ["codes", "scale"], (self.format, self.dtype, self.products)

    @staticmethod
    def __tensor_unflatten__(
        inner: dict[str, Tensor], context: tuple[Format, torch.dtype, Products], size: Any, stride: Any
    ) -> QuantizedTensor:
        format, dtype, products = context
        return QuantizedTensor(inner["codes"], inner["scale"], format, size, dtype, products)

    def _stable_hash_for_caching(self) -> str:
        """What a graph that `torch.compile` keeps on disk may depend on."""
        inner = [(part.shape, part.stride(), part.dtype, part.device) for part in (self.codes, self.scale)]
        return repr((self.format, self.dtype, self.products, self.shape, self.requires_grad, inner))

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return (
            f"QuantizedTensor(shape={tuple(self.shape)}, bits={self.format}, "
            f"scale={tuple(self.scale.shape)}, dtype={self.dtype}, device={self.device}, "
            f"requires_grad={self.requires_grad})"
        )

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError(
            "a QuantizedTensor is not pickled: save model.state_dict(), which holds plain tensors "
            "(weight.codes, weight.scale)"
        )

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        implementation = _functions.get(func)
        if implementation is not None:
            return implementation(*args, **(kwargs or {}))
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        self: Any = args[0] if args else None
        if func is aten.detach.default:  # nn.Parameter(...), .data, autograd
            return self._with(self.codes, self.scale)
        if func is aten.clone.default:  # copy.deepcopy
            return self._with(self.codes.clone(), self.scale.clone())
        if func is aten._to_copy.default:  # module.to(device), .half(): a dtype is the wrapper's alone
            device = kwargs.get("device")
            moved = (self.codes.to(device, copy=True), self.scale.to(device, copy=True))
            return self._with(*moved, dtype=kwargs.get("dtype"))
        if func is aten.copy_.default and isinstance(self, cls):  # torch.utils.swap_tensors, weight averaging
            source = args[1]
            if isinstance(source, cls) and source.format == self.format and source.shape == self.shape:
                if source.scale.shape != self.scale.shape:
                    raise ConfigError(
                        f"a weight with a scale of {tuple(self.scale.shape)} can't take one of "
                        f"{tuple(source.scale.shape)}: quantize both with the same per_row"
                    )
                self.codes.copy_(source.codes)
                self.scale.copy_(source.scale)
                self.kept_remainder = source.kept_remainder
                return self
        for written in _written_arguments(func, args, kwargs):
            if isinstance(written, cls):
                raise FloatWriteError(_refusal(func, written))
        # Every other operation (norm gains, weight.t(), zeros_like, norms) reads a float copy.
        plain = pytree.tree_map_only(cls, cls.dequantize, (args, kwargs))
        return func(*plain[0], **plain[1])


def _mean_magnitude(codes: Tensor) -> Tensor:
    """mean|codes|, from an integer sum; a small number where all are zero."""
    return (codes.to(torch.int16).abs().sum(dtype=torch.int64).float() / max(1, codes.numel())).clamp_min(
        1e-5
    )


def _ternarized(codes: Tensor, mean: Tensor) -> Tensor:
    return (codes.float() / mean).round_().clamp_(-1, 1).to(torch.int8)


def _written_arguments(func: Any, args: Any, kwargs: Any) -> Iterator[Any]:
    """What an operation writes to: `self` of add_, `out=`, every tensor in the lists of _foreach_add_."""
    if func._schema.is_mutable:
        for i, argument in enumerate(func._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                yield from pytree.tree_leaves(args[i] if i < len(args) else kwargs.get(argument.name))


def _refusal(func: Any, weight: QuantizedTensor) -> str:
    return (
        f"{func} would write floats into a {weight.format} weight; nothing is rounded behind your back: "
        "train it with dqt.optim (Trainer's optimizers=(...) takes one), or write integers with "
        "weight.write_codes"
    )


@implements(torch.Tensor.__setitem__)
def _refuse_item_assignment(weight: Tensor, index: Any, value: Any) -> None:
    """Indexing reads a float copy, so that an assignment through it would be lost without a word."""
    if isinstance(weight, QuantizedTensor):
        raise FloatWriteError(_refusal("weight[...] = value", weight))
    with torch._C.DisableTorchFunctionSubclass():
        weight[index] = value.dequantize() if isinstance(value, QuantizedTensor) else value


@implements(torch.Tensor.data.__set__)  # type: ignore[attr-defined]
def _refuse_float_data(weight: Tensor, value: Any) -> None:
    """`weight.data = floats` would leave the codes as they are, without a word: peft merges adapters so."""
    if isinstance(weight, QuantizedTensor) and not isinstance(value, QuantizedTensor):
        raise FloatWriteError(_refusal("weight.data = value", weight))
    with torch._C.DisableTorchFunctionSubclass():
        weight.data = value
