"""The optimizers as torch optimizers: the published rules on float parameters, groups, closures."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.optimization import Adafactor as HuggingFaceAdafactor

from dqt.optim import SGD, Adafactor, AdamW
from optim_cases import assert_equal_state, make_model, run

# -- float parameters ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("beta1", [0.0, 0.9])
def test_float_parameters_follow_torch(beta1: float, weight_decay: float) -> None:
    ours = nn.ParameterDict(
        {"a": torch.randn(5, 7), "b": torch.randn(4), "c": torch.randn(2, 3, 4), "d": torch.randn(())}
    )
    theirs = copy.deepcopy(ours)
    settings = {"lr": 0.03, "betas": (beta1, 0.95), "eps": 1e-6, "weight_decay": weight_decay}
    pair = (AdamW(ours.named_parameters(), **settings), torch.optim.AdamW(theirs.parameters(), **settings))  # type: ignore[arg-type]
    for step in range(10):
        for model, optimizer in zip((ours, theirs), pair, strict=True):
            run(model, optimizer, range(step, step + 1))
        for name in ours:
            torch.testing.assert_close(ours[name], theirs[name], rtol=2e-6, atol=2e-7)


# Ours, the published implementation, and how far float parameters may be apart after ten steps: of narrow
# moments twice what was measured.
PUBLISHED: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any], float]] = {
    "Adafactor, relative step": (Adafactor, HuggingFaceAdafactor, 1e-6),
    "Adafactor, momentum": (
        functools.partial(Adafactor, lr=0.05, beta1=0.9, weight_decay=0.1, scale_parameter=False),
        functools.partial(
            HuggingFaceAdafactor,
            lr=0.05,
            beta1=0.9,
            weight_decay=0.1,
            scale_parameter=False,
            relative_step=False,
        ),
        1e-6,
    ),
    "SGD, momentum": (
        functools.partial(SGD, lr=0.05, momentum=0.9),
        functools.partial(torch.optim.SGD, lr=0.05, momentum=0.9),
        1e-6,
    ),
    "SGD, decay": (
        functools.partial(SGD, lr=0.05, weight_decay=0.1),
        functools.partial(torch.optim.SGD, lr=0.05, weight_decay=0.1),
        1e-6,
    ),
    **{
        f"AdamW, {first} and {second}": (
            functools.partial(AdamW, lr=0.05, first_moment=first, second_moment=second),
            functools.partial(torch.optim.AdamW, lr=0.05, betas=(0.9, 0.95), weight_decay=0.0),
            bound,
        )
        for first, second, bound in (
            ("fp32", "full", 1e-6),
            ("bf16", "bf16", 2e-3),
            ("bf16", "int8", 1.1e-3),
            ("int8", "int8", 3e-3),
            ("fp8", "fp8", 2.5e-2),
        )
    },
    "AdamW without a first moment": (
        functools.partial(AdamW, lr=0.05, first_moment="none"),
        functools.partial(torch.optim.AdamW, lr=0.05, betas=(0.0, 0.95), weight_decay=0.0),
        1e-6,
    ),
    "Adafactor without clipping": (
        functools.partial(Adafactor, lr=0.05, clip_threshold=0.0),
        functools.partial(HuggingFaceAdafactor, lr=0.05, clip_threshold=1e9, relative_step=False),
        1e-6,
    ),
}


@pytest.mark.parametrize("case", PUBLISHED)
def test_float_parameters_follow_the_published_optimizers(case: str) -> None:
    make_ours, make_theirs, bound = PUBLISHED[case]
    torch.manual_seed(0)
    ours = nn.ParameterDict({"a": torch.randn(5, 7), "b": torch.randn(4), "c": torch.randn(4, 6)})
    theirs = copy.deepcopy(ours)
    pair = (make_ours(ours.named_parameters()), make_theirs(theirs.parameters()))
    for model, optimizer in zip((ours, theirs), pair, strict=True):
        run(model, optimizer, range(10))
    for name in ours:
        assert (ours[name] - theirs[name]).abs().max() <= bound * theirs[name].abs().max(), name


def test_a_factored_second_moment_is_adamw_where_squares_have_rank_one() -> None:
    torch.manual_seed(0)
    ours = nn.Parameter(torch.randn(5, 7))
    theirs = copy.deepcopy(ours)
    squares = torch.rand(5, 1) @ torch.rand(1, 7)
    pair = (
        AdamW([("w", ours)], lr=0.05, second_moment="factored"),
        torch.optim.AdamW([theirs], lr=0.05, betas=(0.9, 0.95), weight_decay=0.0),
    )
    for _ in range(10):
        gradient = squares.sqrt() * torch.randn(()) * torch.randint(0, 2, (5, 7)).sub(0.5).sign()
        for parameter, optimizer in zip((ours, theirs), pair, strict=True):
            parameter.grad = gradient.clone()
            optimizer.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_groups_have_their_own_settings_and_schedulers_work() -> None:
    model = make_model()
    named = list(model.named_parameters())
    optimizer = AdamW(
        [{"params": named[:2]}, {"params": named[2:], "lr": 0.5, "betas": (0.5, 0.5), "weight_decay": 0.1}],
        lr=0.1,
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    run(model, optimizer, range(1))
    scheduler.step()
    assert [group["lr"] for group in optimizer.param_groups] == [0.05, 0.25]
    assert "exp_avg" in optimizer.state[model[2].weight]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.0, 0.1]


def test_a_closure_is_called_with_gradients() -> None:
    model = make_model()
    optimizer = AdamW(model.named_parameters())

    def closure() -> Tensor:
        loss: Tensor = model(torch.ones(2, 10)).square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) > 0


def test_parameters_without_a_gradient_are_left_alone() -> None:
    model = make_model()
    before = copy.deepcopy(model)
    optimizer = AdamW(model.named_parameters(), lr=1.0)
    optimizer.step()
    assert_equal_state(model, before)
    assert not optimizer.state


@pytest.mark.parametrize("second_moment", ["full", "factored"])
def test_a_weight_without_elements_is_no_error(second_moment: str) -> None:
    for shape in ((0, 4), (4, 0)):
        weight = nn.Parameter(torch.ones(shape))
        weight.grad = torch.ones(shape)
        AdamW([("w", weight)], second_moment=second_moment).step()


def test_a_step_between_forward_and_backward_is_an_error() -> None:
    model = make_model()
    optimizer = AdamW(model.named_parameters(), lr=0.1)
    loss = model(torch.randn(3, 10)).sum()
    run(model, optimizer, range(1))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
