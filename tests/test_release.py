"""Gradient release: the steps of an ordinary optimizer, one gradient at a time, and what it can't do."""

from __future__ import annotations

import copy
import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dqt
from dqt.build import autocast, build_optimizer, prepare_model_
from dqt.errors import ConfigError, DqtError, NonFiniteError
from dqt.models import build_config, build_model
from dqt.optim import AdamW, GradientRelease
from dqt.optim.base import QuantizedOptimizer
from dqt.recipes import recipe_for
from dqt.train.losses import language_model_loss

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 60,
}
# Method, bits, rules, whether the head is the embedding.
METHODS: list[tuple[str, str | None, dict[str, Any], bool]] = [
    ("strict", "8", {}, True),
    ("strict", "1", {}, False),
    ("residual", "ternary", {}, True),
    ("residual", "4", {"lm_head": "8", "model.embed_tokens": "8"}, True),
    ("residual", "3", {"lm_head": "8"}, False),
    ("paper", "4", {}, True),
    ("fp32", None, {}, True),
    ("bf16", None, {}, False),
    ("bitnet", None, {}, True),
]


def trained(
    method: str, bits: str | None, rules: dict[str, Any], tied: bool, release: bool, steps: int = 3
) -> tuple[nn.Module, QuantizedOptimizer, list[float]]:
    """A model after a few steps without clipping, its optimizer, and the gradients' norms."""
    recipe = recipe_for(method, bits)
    config = build_config("micro", seq_len=12, overrides={**SIZES, "tie_word_embeddings": tied})
    model = build_model(config, 1, recipe.init_gain)
    prepare_model_(model, recipe, rules)
    optimizer = build_optimizer(model, recipe, 0.01, 5)
    released = GradientRelease(optimizer) if release else None
    norms = []
    for step in range(steps):
        tokens = torch.randint(60, (2, 13), generator=torch.Generator().manual_seed(step))
        with autocast(recipe, "cpu"):
            loss = language_model_loss(model, tokens)
        loss.backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        assert bool(gradients) != release
        norms.append(released.norm if released else torch.nn.utils.get_total_norm(gradients).item())
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer, norms


def assert_same(ours: Any, theirs: Any) -> None:
    """Nested dictionaries and lists with the same tensors, bit for bit."""
    if isinstance(ours, Tensor):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)
    elif isinstance(ours, dict):
        assert ours.keys() == theirs.keys()
        for key, value in ours.items():
            assert_same(value, theirs[key])
    elif isinstance(ours, list | tuple):
        for one, other in zip(ours, theirs, strict=True):
            assert_same(one, other)
    else:
        assert ours == theirs


@pytest.mark.parametrize(("method", "bits", "rules", "tied"), METHODS)
def test_steps_are_those_without_release(
    method: str, bits: str | None, rules: dict[str, Any], tied: bool
) -> None:
    (model, optimizer, norms), (other, released, other_norms) = (
        trained(method, bits, rules, tied, release) for release in (False, True)
    )
    assert_same(dict(model.state_dict()), dict(other.state_dict()))
    assert_same(optimizer.state_dict(), released.state_dict())
    assert {state["step"] for state in released.state.values()} == {3}  # a tied weight once a step
    assert optimizer.telemetry() == released.telemetry()
    assert other_norms == pytest.approx(norms, rel=1e-5)


def small() -> tuple[nn.Module, AdamW, Tensor]:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(10, 12), nn.LayerNorm(12), nn.Linear(12, 9, bias=False))
    dqt.quantize_(model, "ternary")
    return model, AdamW(model.named_parameters(), lr=0.02, seed=5), torch.randn(4, 10)


def test_one_gradient_lives_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer, x = small()
    alive = []
    update = optimizer.update_parameter

    def count(name: str, parameter: Tensor, group: dict[str, Any]) -> None:
        alive.append([other for other, p in model.named_parameters() if p.grad is not None] == [name])
        update(name, parameter, group)

    monkeypatch.setattr(optimizer, "update_parameter", count)
    GradientRelease(optimizer)
    model(x).square().sum().backward()
    assert alive == [True] * 5
    assert not list(optimizer.with_gradient())


def test_settings_of_the_groups_count_when_the_gradient_comes() -> None:
    """Schedulers, and a state that is loaded after binding, which replaces the groups."""
    results = []
    for release in (False, True):
        model, optimizer, x = small()
        if release:
            GradientRelease(optimizer)
        optimizer.load_state_dict(optimizer.state_dict())
        for lr in (0.5, 0.1):
            optimizer.param_groups[0]["lr"] = lr
            model(x).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append(model.state_dict())
    assert_same(dict(results[0]), dict(results[1]))


def test_remove_goes_back_to_ordinary_steps() -> None:
    model, optimizer, x = small()
    release = GradientRelease(optimizer)
    with pytest.raises(ConfigError, match="released already"):
        GradientRelease(optimizer)
    release.remove()
    model(x).square().sum().backward()
    assert len(list(optimizer.with_gradient())) == 5
    with pytest.raises(ConfigError, match=r"0.weight has a gradient.*zero_grad\(\) first"):
        GradientRelease(optimizer)
    optimizer.step()
    optimizer.zero_grad()
    GradientRelease(optimizer)


def test_accumulation_is_refused() -> None:
    model, optimizer, x = small()
    GradientRelease(optimizer)
    model(x).square().sum().backward()
    with pytest.raises(ConfigError, match=r"a second gradient of 2.weight before optimizer.step\(\)"):
        model(x).square().sum().backward()


def test_copies_and_changes_that_have_no_hooks_say_so() -> None:
    model, optimizer, x = small()
    GradientRelease(optimizer)
    copied = copy.deepcopy(model)
    copied(x).square().sum().backward()
    with pytest.raises(DqtError, match="no parameter of this optimizer had a gradient"):
        optimizer.step()

    _, both = copy.deepcopy((model, optimizer))
    with pytest.raises(DqtError, match="a copy has no hooks: make a GradientRelease for it"):
        both.step()
    GradientRelease(both)

    model[2].weight = nn.Parameter(torch.ones(9, 12))
    optimizer.add_param_group({"params": [("new", model[2].weight)]})
    model(x).square().sum().backward()
    with pytest.raises(DqtError, match="no hook on new, which has a gradient"):
        optimizer.step()


def test_a_copied_optimizer_works() -> None:
    """With telemetry, and without a release."""
    model, optimizer, x = small()
    optimizer.collect_telemetry = False
    copied_model, copied = copy.deepcopy((model, optimizer))
    for m, o in ((model, optimizer), (copied_model, copied)):
        m(x).square().sum().backward()
        o.step()
    assert_same(dict(model.state_dict()), dict(copied_model.state_dict()))
    assert copied.telemetry()["flip_rate"] == 0.0


def test_frozen_parameters_have_no_hook_and_thawed_ones_say_so() -> None:
    model, optimizer, x = small()
    model[0].requires_grad_(False)
    GradientRelease(optimizer)
    before = model[0].weight.codes.clone()
    model(x).square().sum().backward()
    optimizer.step()
    assert torch.equal(model[0].weight.codes, before)
    model[0].requires_grad_(True)
    model(x).square().sum().backward()
    with pytest.raises(DqtError, match=r"no hook on 0\.weight, which has a gradient"):
        optimizer.step()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
def test_a_bad_gradient_stops_before_its_own_tensor_changes(bad: float) -> None:
    model, optimizer, x = small()
    GradientRelease(optimizer)
    model[0].weight.register_hook(lambda grad: grad.index_fill(0, torch.tensor([3]), bad))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(
        NonFiniteError, match=r"the gradient of 0\.weight holds .*; it was not changed, param"
    ):
        model(x).square().sum().backward()
    after = model.state_dict()
    assert torch.equal(before["0.weight.codes"], after["0.weight.codes"])
    assert model[0].weight not in optimizer.state
    assert optimizer.state[model[2].weight]["residual"].any()  # came earlier


# -- the clip that needs no norm of all gradients ------------------------------------------------------------

CLIPPED = [
    {"second_moment": second, "betas": (beta1, 0.95), "residual_bits": k, "weight_decay": 0.1}
    for second, beta1, k in itertools.product(("full", "factored"), (0.0, 0.9), (0, 8))
]


def set_gradients(model: nn.Module, step: int, size: float) -> None:
    generator = torch.Generator().manual_seed(step)
    for parameter in model.parameters():
        parameter.grad = size * torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize("settings", CLIPPED)
def test_clipping_is_the_same_in_the_kernel(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    results = []
    for fused in (True, False):
        if not fused:
            monkeypatch.setattr("dqt.optim.fused.update", lambda *args: False)
        model, _, _ = small()
        optimizer = AdamW(model.named_parameters(), lr=0.02, clip_update=1.0, **settings)
        for step, size in enumerate((1.0, 1.0, 20.0, 1.0)):
            set_gradients(model, step, size)
            optimizer.step()
        results.append((dict(model.state_dict()), optimizer.state_dict()["state"]))
    assert_same(*results)


def test_the_clip_divides_the_direction_by_what_is_above_the_limit() -> None:
    """The ratio of root mean squares by its definition, on a float parameter without a first moment."""
    beta2, limit, mean_squares = 0.9, 1.5, []
    parameters = [nn.Parameter(torch.zeros(30, 20)) for _ in range(2)]
    plain, clipped = (
        AdamW([("w", p)], lr=1.0, betas=(0.0, beta2), clip_update=d)
        for p, d in zip(parameters, (0.0, limit), strict=True)
    )
    for step, size in enumerate((1.0, 0.5, 8.0, 1.0), 1):
        gradient = size * torch.randn(30, 20, generator=torch.Generator().manual_seed(step))
        moves = []
        for parameter, optimizer in zip(parameters, (plain, clipped), strict=True):
            with torch.no_grad():
                parameter.zero_()
            parameter.grad = gradient.clone()
            optimizer.step()
            moves.append(parameter.detach().clone())
        mean_squares.append(float(gradient.double().square().mean()))
        running = sum((1 - beta2) * beta2 ** (step - 1 - t) * s for t, s in enumerate(mean_squares))
        ratio = math.sqrt(mean_squares[-1] * (1 - beta2**step) / running)
        assert (ratio > limit) == (step == 3)
        torch.testing.assert_close(moves[1], moves[0] / max(1.0, ratio / limit), rtol=1e-5, atol=1e-7)


def test_the_clip_can_start_in_mid_run_and_takes_a_gradient_of_zeros() -> None:
    model, optimizer, _ = small()
    for step, size in enumerate((1.0, 1.0)):
        set_gradients(model, step, size)
        optimizer.step()
    optimizer.param_groups[0]["clip_update"] = 1.0
    set_gradients(model, 2, 1.0)
    optimizer.step()
    assert all(state["clip"] == pytest.approx(1.0) for state in optimizer.state.values())
    model, optimizer, _ = small()
    optimizer.param_groups[0]["clip_update"] = 1.0
    set_gradients(model, 3, 0.0)
    optimizer.step()
    assert all(state["clip"] == 1.0 for state in optimizer.state.values())


@pytest.mark.parametrize("limit", [-1.0, float("nan"), float("inf")])
def test_a_limit_that_makes_no_sense(limit: float) -> None:
    with pytest.raises(ConfigError, match="clip_update"):
        AdamW([("w", nn.Parameter(torch.ones(1)))], clip_update=limit)
