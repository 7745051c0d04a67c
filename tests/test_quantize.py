"""`quantize_`: which weights rules convert, what the report says of the others, and what is refused."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BitNetConfig, BitNetForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

import dqt
from dqt.choices import FLOAT_PRODUCTS, INT8_PRODUCTS, Products
from dqt.errors import ConfigError, DqtError
from dqt.numerics.formats import FORMATS
from dqt.numerics.scales import SCALE_RULES
from dqt.rules import linear_modules, output_heads
from dqt.tensor import QuantizedTensor


class Toy(nn.Module):
    """An embedding, a block with a norm and two linears, and a head."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(17, 8)
        self.block = nn.ModuleDict(
            {"norm": nn.LayerNorm(8), "up": nn.Linear(8, 12), "down": nn.Linear(12, 8)}
        )
        self.lm_head = nn.Linear(8, 17, bias=False)
        if tied:
            self.lm_head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        x = x + self.block["down"](self.block["up"](self.block["norm"](x)).relu())
        return self.lm_head(x)


def bits_of(model: nn.Module) -> dict[str, str]:
    return {n: str(p.format) for n, p in model.named_parameters() if isinstance(p, QuantizedTensor)}


UP, DOWN, NORM, EMBED, HEAD = (
    "block.up.weight",
    "block.down.weight",
    "block.norm.weight",
    "embed.weight",
    "lm_head.weight",
)

# bits, rules -> formats by name
RULES: list[tuple[str | int, dict[str, str | int | None], dict[str, str]]] = [
    ("ternary", {}, {UP: "ternary", DOWN: "ternary"}),
    (4, {}, {UP: "4", DOWN: "4"}),
    (4, {"*.down": 8}, {UP: "4", DOWN: "8"}),
    (4, {"*.down": None}, {UP: "4"}),
    (4, {"*": None}, {}),
    (4, {"*": None, "block.up": "ternary"}, {UP: "ternary"}),
    (4, {"block.up": "ternary", "*": None}, {}),  # the last one wins, not the most specific
    (4, {"block.*": 2, "*.down": "1"}, {UP: "2", DOWN: "1", NORM: "2"}),
    (4, {"lm_head": 8}, {UP: "4", DOWN: "4", HEAD: "8"}),
    (4, {"embed": 8, "*norm": 6}, {UP: "4", DOWN: "4", EMBED: "8", NORM: "6"}),
    (2, {"*": 3}, {UP: "3", DOWN: "3", NORM: "3", EMBED: "3", HEAD: "3"}),
]


@pytest.mark.parametrize(("bits", "rules", "expected"), RULES)
def test_rules(bits: str | int, rules: dict[str, str | int | None], expected: dict[str, str]) -> None:
    model = Toy()
    report = dqt.quantize_(model, bits, rules)
    assert bits_of(model) == expected
    assert {entry.name: entry.format.name for entry in report.converted} == expected
    # Every weight is in the report, once.
    names = [entry.name for entry in (*report.converted, *report.left)]
    assert sorted(names) == sorted([UP, DOWN, NORM, EMBED, HEAD])
    assert not report.unmatched_rules
    for entry in report.converted:
        weight = model.get_parameter(entry.name)
        assert isinstance(weight, QuantizedTensor)
        assert entry.bytes == weight.nbytes_stored()
        assert entry.shape == tuple(weight.shape)
    assert all(entry.bytes == model.get_parameter(entry.name).nbytes for entry in report.left)
    assert model(torch.arange(5)).isfinite().all()


TIED_RULES: list[tuple[dict[str, str | int | None], dict[str, str]]] = [
    ({}, {}),
    ({"lm_head": 8}, {EMBED: "8"}),
    ({"embed": 8}, {EMBED: "8"}),
    ({"embed": 8, "lm_head": 4}, {EMBED: "4"}),
    ({"embed": 8, "lm_head": None}, {}),
]


@pytest.mark.parametrize(("rules", "expected"), TIED_RULES)
def test_tied_weights_are_decided_once_and_stay_tied(
    rules: dict[str, str | int | None], expected: dict[str, str]
) -> None:
    model = Toy(tied=True)
    report = dqt.quantize_(model, 3, rules)
    assert model.lm_head.weight is model.embed.weight
    assert bits_of(model) == {UP: "3", DOWN: "3", **expected}
    assert [entry.name for entry in (*report.converted, *report.left)].count(EMBED) == 1
    assert HEAD not in str(report)
    if expected:
        assert model.lm_head.weight.products == FLOAT_PRODUCTS
    model(torch.arange(5)).square().sum().backward()
    assert model.embed.weight.grad is not None


def test_a_tied_state_dict_loads() -> None:
    model, other = Toy(tied=True), Toy(tied=True)
    for each in (model, other):
        dqt.quantize_(each, 3, {"lm_head": 8})
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.embed.weight.codes, model.embed.weight.codes)
    assert other.lm_head.weight is other.embed.weight


@pytest.mark.parametrize("tied", [False, True])
def test_heads_get_float_products_and_others_the_given_ones(tied: bool) -> None:
    model = Toy(tied)
    products = Products(grad_weight="float")
    dqt.quantize_(model, 4, {"lm_head": 8}, products=products)
    assert model.lm_head.weight.products == FLOAT_PRODUCTS
    assert model.block["up"].weight.products == products
    assert output_heads(model) == {model.lm_head}
    assert [name for name, _ in linear_modules(model)] == ["block.up", "block.down"]


def test_reasons_and_text_of_the_report() -> None:
    model = Toy()
    report = dqt.quantize_(model, 4, {"*.down": None})
    reasons = {entry.name: entry.reason for entry in report.left}
    assert reasons[DOWN] == "rule '*.down'"
    assert "output head" in reasons[HEAD]
    assert "embedding" in reasons[EMBED]
    assert "norm gain" in reasons[NORM]
    text = str(report)
    assert "converted: 1 tensors, 52 bytes" in text  # 12 * 8 / 2 and a float32 scale
    assert f"left in float: 4 tensors, {4 * (12 * 8 + 17 * 8 * 2 + 8):,} bytes" in text
    assert "lm_head.weight (17, 8): output head" in text
    again = dqt.quantize_(model, 4)
    assert {e.name: e.reason for e in again.left}[UP] == "already quantized"
    assert [entry.name for entry in again.converted] == [DOWN]


def test_a_rule_that_matched_nothing_is_a_warning() -> None:
    with pytest.warns(UserWarning, match=r"rules that matched no module: \*\.mpl\.\*, head"):
        report = dqt.quantize_(Toy(), 4, {"*.mpl.*": 2, "*.up": 2, "head": None})
    assert report.unmatched_rules == ["*.mpl.*", "head"]
    assert "rule '*.mpl.*' matched nothing" in str(report)


def test_matrices_that_are_no_linear_are_named() -> None:
    model = Toy()
    model.block["conv1d"] = Conv1D(6, 8)
    model.block["conv"] = nn.Conv2d(1, 1, 3)
    model.block.register_parameter("experts", nn.Parameter(torch.randn(3, 4, 5)))
    left = {entry.name: entry for entry in dqt.quantize_(model, 4).left}
    assert left["block.conv1d.weight"].reason == "Conv1D is neither nn.Linear nor nn.Embedding"
    assert left["block.conv.weight"].reason == "Conv2d is neither nn.Linear nor nn.Embedding"
    assert left["block.experts"].reason == "not the weight of an nn.Linear"
    assert left["block.experts"].shape == (3, 4, 5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bits": 9}, "unknown bits 9"),
        ({"rules": {"*": "ternery"}}, "did you mean 'ternary'"),
        ({"scale_rule": "gauss"}, "did you mean 'gaussian'"),
        (
            {"rules": {"*.conv1d": 4}},
            r"rule '\*.conv1d' asks for 4 bits on a Conv1D.*exclude it with a rule of None",
        ),
    ],
)
def test_refusals(arguments: dict[str, object], message: str) -> None:
    model = Toy()
    model.block["conv1d"] = Conv1D(6, 8)
    with pytest.raises(ConfigError, match=message):
        dqt.quantize_(model, **arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(bad: float) -> None:
    model = Toy()
    with torch.no_grad():
        model.block["up"].weight[3, 3] = bad
    with pytest.raises(DqtError, match=r"block.up.weight holds NaN or Inf"):
        dqt.quantize_(model, 4)


@pytest.mark.parametrize("bits", list(FORMATS))
@pytest.mark.parametrize("rule", list(SCALE_RULES))
@pytest.mark.parametrize("per_row", [False, True])
def test_layers_of_zeros_get_a_scale_to_train_with(bits: str, rule: str, per_row: bool) -> None:
    model = nn.Linear(12, 5)
    with torch.no_grad():
        model.weight.zero_()
        if per_row:
            model.weight[2] = 1.0
    dqt.quantize_(model, bits, scale_rule=rule, per_row=per_row)
    weight = model.weight
    assert isinstance(weight, QuantizedTensor)
    assert (weight.scale > 0).all()
    assert weight.scale.isfinite().all()
    if bits != "1":
        assert not weight.unpack()[:2].any()


@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("bits", list(FORMATS))
def test_every_kind_of_weight_takes_every_format(bits: str, per_row: bool) -> None:
    model = Toy()
    floats = copy.deepcopy(model)
    dqt.quantize_(model, bits, {"*": bits}, per_row=per_row, scale_rule="absmax")
    for name, parameter in model.named_parameters():
        if isinstance(parameter, QuantizedTensor):
            assert parameter.scale.shape == ((parameter.rows, 1) if per_row else ())
            # absmax clips nothing, so half a step is the error (and what float16 takes from the scale).
            error = (parameter.dequantize() - floats.get_parameter(name)).abs().view(parameter.rows, -1)
            assert (error <= parameter.scale * 0.5 * 1.01).all()
    model(torch.arange(5)).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


# what is said -> rule, one scale a row, product of the forward pass
TRAINED: list[tuple[dict[str, Any], str, bool, str]] = [
    ({}, "gaussian", False, "int8"),
    ({"trained": True}, "trained", True, "float"),
    ({"trained": True, "scale_rule": "absmean"}, "absmean", True, "float"),
    ({"trained": True, "per_row": False}, "trained", False, "float"),
    ({"trained": True, "products": INT8_PRODUCTS}, "trained", True, "int8"),
]


@pytest.mark.parametrize(("settings", "rule", "per_row", "forward"), TRAINED, ids=str)
def test_trained_weights_have_settings_of_their_own(
    settings: dict[str, Any], rule: str, per_row: bool, forward: str
) -> None:
    model = Toy()
    report = dqt.quantize_(model, 4, **settings)
    weight = model.block["up"].weight
    assert isinstance(weight, QuantizedTensor)
    assert {entry.scale_rule for entry in report.converted} == {rule}
    assert (weight.scale.ndim == 2) == per_row
    assert weight.products == dataclasses.replace(INT8_PRODUCTS, forward=forward)


def test_frozen_weights_stay_frozen() -> None:
    model = Toy()
    model.block["up"].requires_grad_(False)
    dqt.quantize_(model, 4)
    assert not model.block["up"].weight.requires_grad
    assert model.block["down"].weight.requires_grad


def test_modules_keep_their_classes_and_the_call_its_random_state() -> None:
    model = Toy()
    classes = [type(module) for module in model.modules()]
    state = torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dqt.quantize_(model)
    assert [type(module) for module in model.modules()] == classes
    assert torch.equal(torch.get_rng_state(), state)


def micro(arch: str, tied: bool) -> nn.Module:
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "vocab_size": 31,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": None,
        "tie_word_embeddings": tied,
    }
    if arch == "llama":
        return LlamaForCausalLM(LlamaConfig(**sizes))
    return BitNetForCausalLM(BitNetConfig(**sizes, hidden_act="silu"))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("arch", ["llama", "bitnet"])
@pytest.mark.parametrize("bits", ["1", "ternary", "8"])
def test_transformers_models(arch: str, tied: bool, bits: str) -> None:
    model = micro(arch, tied)
    report = dqt.quantize_(model, bits)
    kinds = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    assert {entry.name.split(".")[-2] for entry in report.converted} == set(kinds)
    assert len(report.converted) == 2 * len(kinds)
    assert isinstance(model.lm_head.weight, nn.Parameter)
    assert not isinstance(model.lm_head.weight, QuantizedTensor)
    tokens = torch.randint(31, (2, 9))
    loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert model.generate(tokens[:, :4], max_new_tokens=3, do_sample=False).shape == (2, 7)
    clone = copy.deepcopy(model)
    assert torch.equal(clone(input_ids=tokens).logits, model(input_ids=tokens).logits)
