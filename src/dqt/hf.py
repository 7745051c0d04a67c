"""dqt in `transformers`: `from_pretrained` gives packed weights, `save_pretrained` writes them.

    import dqt.hf                                            # registers the method "dqt"
    model = AutoModelForCausalLM.from_pretrained("runs/NAME/model")
    model = AutoModelForCausalLM.from_pretrained(float_model, quantization_config=dqt.DqtConfig(bits=4))

`config.json` gets a `quantization_config` that lists the low-bit weights by format, each with the SHA-256 of
its codes and scale: every bit pattern is a legal weight, so that without it no loader could tell damage. The
tensors are those of any state dict here, `weight.codes` and `weight.scale`. Models that `quantize_` has
converted know this too, so that `save_pretrained` and `Trainer` write what `from_pretrained` reads.

A weight is packed as soon as it is read, or taken as it was packed: no more than one float weight exists at a
time that does not stay float. The cost: `transformers` knows nothing of "dqt" before this module is imported.
It then warns, reads what is float, and starts the rest from random numbers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import safe_open
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from dqt.baselines import BitLinear, bitnet_
from dqt.choices import FLOAT_PRODUCTS, SCALE_RULES, Products
from dqt.errors import ConfigError, DqtError, ModelError, did_you_mean
from dqt.fused import fuse_, is_fused
from dqt.nn import keep_state_dict_plain
from dqt.numerics.scales import default_scale_rule
from dqt.packed import Packed, check, describe, read_description
from dqt.rules import Rule, Rules, initial_scale, output_heads, settings_for, shared_weights
from dqt.sizes import packed_size
from dqt.tensor import QuantizedTensor
from dqt.train import storage

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

METHOD = "dqt"
BASELINES = (None, "bitnet")
CODES, SCALE = "weight.codes", "weight.scale"


@register_quantization_config(METHOD)
class DqtConfig(QuantizationConfigMixin):
    """How `from_pretrained` converts a float model, or what a saved model's low-bit weights are.

    Args:
        bits: As of `dqt.quantize_`; so are `rules`, `scale_rule`, `headroom`, `per_row`, `trained` and
            `products`, which may be a mapping.
        rules: Glob patterns on module names, to bits or to None.
        scale_rule: How the grid step is set.
        headroom: A factor on it.
        per_row: One scale a row.
        products: Which products are integer.
        trained: Whether the weights that are read were trained: true unless you say otherwise.
        fused: Whether the model is given to `dqt.fuse_`.
        baseline: "bitnet" for BitNet b1.58, whose weights stay float, as a saved model says.
        weights: The low-bit weights of a saved model, as `describe` gives them.
        format_version: Of that.
        quant_method: "dqt".

    Raises:
        ConfigError: A setting that is unknown or out of range.
        ModelError: A saved model of a newer format.
    """

    def __init__(
        self,
        bits: str | int = "ternary",
        rules: Mapping[str, Rule] | None = None,
        *,
        scale_rule: str | None = None,
        headroom: float = 1.0,
        per_row: bool | None = None,
        products: Products | Mapping[str, Any] | None = None,
        trained: bool = True,
        fused: bool = False,
        baseline: str | None = None,
        weights: list[dict[str, Any]] | None = None,
        format_version: int = storage.FORMAT_VERSION,
        quant_method: str = METHOD,
        **unknown: Any,
    ) -> None:
        self.quant_method = quant_method  # type: ignore[assignment]  # transformers has an enum of its own
        self.bits, self.rules, self.headroom = str(bits), dict(rules or {}), headroom
        self.trained, self.fused = trained, fused
        if products is not None and not isinstance(products, Products):
            products = _products(products)
        self.scale_rule, self.per_row, self.products = settings_for(trained, scale_rule, per_row, products)
        self.baseline, self.weights, self.format_version = baseline, weights, format_version
        for name in unknown:
            raise ConfigError(f"DqtConfig takes no {name!r}; {did_you_mean(name, vars(self))}")
        storage.check_version(Path("config.json"), {"format_version": format_version})
        Rules(bits, self.rules)
        if scale_rule is not None and scale_rule not in SCALE_RULES:
            raise ConfigError(f"unknown scale_rule {scale_rule!r}; {did_you_mean(scale_rule, SCALE_RULES)}")
        if not 0 < headroom <= 1000:
            raise ConfigError(f"headroom={headroom} must be above 0, and 1000 at the most")
        if baseline not in BASELINES:
            raise ConfigError(f"unknown baseline {baseline!r}: only 'bitnet', or None")

    def to_dict(self) -> dict[str, Any]:
        """What `config.json` holds: of a model with weights what they are, else how to convert one."""
        content = {key: value for key, value in vars(self).items() if key != "products"}
        if self.weights is None:
            return content | {"products": asdict(self.products)}
        kept = ("quant_method", "format_version", "fused", "baseline", "weights")
        return {key: content[key] for key in kept}

    def describe(self, model: nn.Module, hashes: bool = False) -> None:
        """Takes down what a model's low-bit weights are.

        Args:
            model: The model.
            hashes: Whether to hash them, a pass over all codes.
        """
        self.weights = describe(model, hashes)
        self.fused = is_fused(model)
        self.baseline = "bitnet" if any(isinstance(m, BitLinear) for m in model.modules()) else None


def _products(values: Any) -> Products:
    try:
        return Products(**values)
    except TypeError:
        raise ConfigError(f"products must name Products' fields, not {str(values)[:100]}") from None


def remember(model: Any) -> None:
    """Lets `save_pretrained` of a `transformers` model with low-bit weights say so in `config.json`."""
    if getattr(model, "hf_quantizer", None) is None:
        model.hf_quantizer = DqtQuantizer(DqtConfig(), pre_quantized=True)
    if isinstance(model.hf_quantizer, DqtQuantizer):
        model.hf_quantizer.quantization_config.describe(model)
        model.config.quantization_config = model.hf_quantizer.quantization_config


@register_quantizer(METHOD)
class DqtQuantizer(HfQuantizer):
    """What `from_pretrained` and `save_pretrained` ask about low-bit weights."""

    requires_calibration = False
    quantization_config: DqtConfig

    def __init__(self, quantization_config: DqtConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.packed: dict[str, Packed] = {}
        self.error: DqtError | None = None

    @property
    def is_trainable(self) -> bool:
        """Yes, with an optimizer of `dqt.optim`."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """Yes: gradients reach low-bit weights, and `Trainer` asks here."""
        return True

    def is_serializable(self) -> bool:
        """Yes."""
        return True

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Refuses what can't be loaded."""
        config = self.quantization_config
        if self.pre_quantized and config.weights is None:
            raise ModelError(
                "config.json names no low-bit weights, though quant_method is dqt: save the model with dqt, "
                "or pass quantization_config to from_pretrained and keep it out of config.json"
            )
        if not self.pre_quantized and config.weights is not None:
            raise ConfigError("DqtConfig(weights=...) describes a saved model: leave weights out to convert")
        if isinstance(device_map, dict) and "disk" in device_map.values():
            raise ConfigError("low-bit weights are not offloaded to a disk: leave it out of device_map")

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
        return not self.pre_quantized and param_name in self.packed

    def param_element_size(self, model: PreTrainedModel, param_name: str, param: Tensor) -> float:
        packed = self.packed.get(param_name)
        return float(param.element_size()) if packed is None else packed.format.bits / 8

    def get_quantize_ops(self) -> ConversionOps:
        return _Convert(self)

    def get_weight_conversions(self) -> list[WeightConverter]:
        return [_PackedWeight([CODES, SCALE], ["weight"], [_Assemble(self)])] if self.pre_quantized else []

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[None, dict[str, str]]:
        """Nothing, because state dicts are plain; but `config.json` is to say what they hold."""
        self.quantization_config.describe(model, hashes=True)
        model.config.quantization_config = self.quantization_config
        return None, {}

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        if not self.pre_quantized:
            self._plan(model)
            return
        saved = read_description(self.quantization_config.weights)
        if self.quantization_config.baseline == "bitnet":
            bitnet_(model)
        forms = _tensor_forms(checkpoint_files)
        ours, prefix = dict(model.named_parameters()), f"{model.base_model_prefix}."
        for name, packed in saved.items():
            # A saved model may hold this one as its inner part, or the other way round.
            names = (name, name.removeprefix(prefix), prefix + name)
            own = next((candidate for candidate in names if candidate in ours), None)
            if forms is not None:
                _expect(name, packed, None if own is None else ours[own], forms)
            if own is not None:
                self.packed[own] = packed
        if forms is not None:
            for key in forms:
                if key.endswith(f".{CODES}") and key.removesuffix(".codes") not in saved:
                    raise ModelError(f"config.json does not say what {key} is: use another copy")

    def _plan(self, model: PreTrainedModel) -> None:
        """Decides for every weight before any is read."""
        config = self.quantization_config
        rules, heads = Rules(config.bits, config.rules), output_heads(model)
        for weight, modules in shared_weights(model, getattr(model, "all_tied_weights_keys", None)):
            is_head = any(module in heads for module in modules.values())
            format, _ = rules.decide(weight, modules, is_head)
            if format is not None:
                products = FLOAT_PRODUCTS if is_head else config.products
                self.packed |= {f"{name}.weight": Packed(format, products) for name in modules}
        if rules.unmatched:
            names = ", ".join(sorted(rules.unmatched))
            raise ConfigError(f"rules that match no module of {type(model).__name__}: {names}")

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        if self.error is not None:
            raise self.error
        for name, packed in self.packed.items():
            weight = model.get_parameter(name)
            if not isinstance(weight, QuantizedTensor):
                raise ModelError(f"{name}.codes is missing: use another copy")
            if self.pre_quantized:
                check(name, weight, packed)
        for module in model.modules():
            if isinstance(getattr(module, "weight", None), QuantizedTensor):
                keep_state_dict_plain(module)
        if self.quantization_config.fused:
            fuse_(model)
        self.quantization_config.describe(model)

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        for weight, modules in shared_weights(model):
            if isinstance(weight, QuantizedTensor):
                floats = nn.Parameter(weight.dequantize().to(dtype or weight.dtype))
                for module in modules.values():
                    module.weight = floats
        return model


class _PackedWeight(WeightConverter):
    """Codes and scale to one weight. Saving reverts the converters that were used; state dicts are plain."""

    def was_used(self) -> bool:
        return False


class _Operation(ConversionOps):
    """Part of a quantizer; `transformers` copies operations for every weight, and leaves dtypes to those that
    have an `hf_quantizer`."""

    def __init__(self, quantizer: DqtQuantizer) -> None:
        self.hf_quantizer = quantizer

    def __deepcopy__(self, memo: dict[int, Any]) -> _Operation:
        return self


class _Assemble(_Operation):
    """A low-bit weight from its codes and scale; both were compared with the model before."""

    def convert(self, input_dict: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
        name, model = kwargs["full_layer_name"], kwargs["model"]
        old, packed = model.get_parameter(name), self.hf_quantizer.packed[name]
        codes, scale = (_only(input_dict[key]) for key in (CODES, SCALE))
        weight = QuantizedTensor(codes, scale, packed.format, old.shape, old.dtype, packed.products)
        return {name: nn.Parameter(weight)}


class _Convert(_Operation):
    """A low-bit weight from a float one."""

    def convert(self, input_dict: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
        name, quantizer = kwargs["full_layer_name"], self.hf_quantizer
        config, packed = quantizer.quantization_config, quantizer.packed[name]
        values = _only(input_dict[name])
        rule = config.scale_rule or default_scale_rule(packed.format)
        try:
            scale = initial_scale(name, values, packed.format, rule, config.headroom, config.per_row)
        except DqtError as error:  # `transformers` would log it with its traceback and go on
            quantizer.error = quantizer.error or error
            return {name: values}
        return {name: nn.Parameter(QuantizedTensor.from_float(values, scale, packed.format, packed.products))}


def _only(tensors: Any) -> Tensor:
    return tensors[0] if isinstance(tensors, list) else tensors


def _tensor_forms(files: Iterable[str] | None) -> dict[str, tuple[str, tuple[int, ...]]] | None:
    """Type and shape of every tensor in the files; None if the tensors came without."""
    if files is None:
        return None
    return dict(_forms(Path(file) for file in files))


def _forms(files: Iterable[Path]) -> Iterator[tuple[str, tuple[str, tuple[int, ...]]]]:
    for file in files:
        shapes = storage.tensor_shapes(file)
        with safe_open(file, framework="pt") as tensors:
            for name, shape in shapes.items():
                yield name, (tensors.get_slice(name).get_dtype(), shape)


def _expect(
    name: str, packed: Packed, weight: Tensor | None, forms: Mapping[str, tuple[str, tuple[int, ...]]]
) -> None:
    """Raises ModelError unless the files hold codes and scale of a weight's size."""
    for part in ("codes", "scale"):
        if f"{name}.{part}" not in forms:
            raise ModelError(f"{name}.{part} is missing from the files: use another copy")
    if weight is None:
        return
    codes, scale = forms[f"{name}.codes"], forms[f"{name}.scale"]
    rows, columns = weight.shape[:-1].numel(), weight.shape[-1]
    wanted = (*weight.shape[:-1], packed_size(columns, packed.format.bits))
    if codes != ("U8", wanted) or scale not in (("F32", ()), ("F32", (rows, 1))):
        raise ModelError(
            f"{name} does not fit the model: codes {codes} and scale {scale}, for a {packed.format} weight "
            f"of shape {tuple(weight.shape)}"
        )
