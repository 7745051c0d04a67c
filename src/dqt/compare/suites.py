"""The named suites: tables of arms, each a handful of settings over those of its suite.

An arm says what it changes, not how it is run: the learning rate is tuned, seeds are added, and the table
gives the gaps to the arms that it is measured against. A suite is as small as it can be and still answer its
question on two cores in hours; its model is much smaller than those that people use, and nothing here says
what becomes of a gap there (`scale` asks that, over a factor of nine in weights).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dqt.choices import ROUNDINGS

Settings = Mapping[str, Any]


@dataclass(frozen=True)
class Arm:
    """A row of the table.

    Attributes:
        name: Unique in its suite.
        settings: "section.key" to value, over the suite's.
        against: Column of the table to the arm that this one is measured against there; None is the suite's.
        ternary_inference_of: The arm whose finished models this one measures with ternary weights, instead of
            training any.
        tuning_steps: Length of the runs that find the learning rate; None is half the arm's.
    """

    name: str
    settings: Settings = field(default_factory=dict)
    against: Mapping[str, str] | None = None
    ternary_inference_of: str | None = None
    tuning_steps: int | None = None


@dataclass(frozen=True)
class Suite:
    """A table of arms.

    Attributes:
        name: What the user writes.
        question: What it answers.
        settings: Of all arms.
        arms: The rows, in order.
        against: Column to arm, for the arms that say nothing else.
        seeds: How many, unless told otherwise.
        tuned: Whether each arm's learning rate is tuned; if not, it is the arm's own, or the recipe's.
    """

    name: str
    question: str
    settings: Settings
    arms: tuple[Arm, ...]
    against: Mapping[str, str]
    seeds: int = 3
    tuned: bool = True

    def against_of(self, arm: Arm) -> Mapping[str, str]:
        """Column to arm of the arms that `arm` is measured against; not itself."""
        against = self.against if arm.against is None else arm.against
        return {column: other for column, other in against.items() if other != arm.name}


QUICK: Settings = {
    "model.num_hidden_layers": 1,
    "data.vocab_size": 300,
    "data.max_bytes": 200_000,
    "train.steps": 8,
    "optim.warmup_steps": 1,
    "train.seq_len": 32,
    "train.batch_size": 2,
    "train.eval_windows": 4,
    "train.checkpoint_every": 8,
}
"""What `--quick` puts over everything: it shows that a suite runs, and its losses mean nothing."""

MICRO: Settings = {
    "model.preset": "micro",
    "data.vocab_size": 512,
    "train.steps": 1500,
    "train.batch_size": 8,
    "train.eval_windows": 400,
}
"""Width 128, 2 layers, 0.43M linear weights, 1.5M tokens: one to two minutes a run on one core."""

TINY: Settings = {
    "model.preset": "tiny",
    "data.vocab_size": 512,
    "train.steps": 220,
    "train.seq_len": 128,
    "train.batch_size": 8,
}
"""Width 256, 8 layers, 6.8M linear weights, 0.23M tokens."""

BITS = ("1", "ternary", "2", "3", "4", "5", "6", "7", "8")
NO_FIRST_MOMENT: Settings = {"optim.betas": [0.0, 0.95]}
FIRST_MOMENT: Settings = {"optim.betas": [0.9, 0.95]}
BASELINES = {"FP32": "FP32", "BitNet": "BitNet"}

FP32 = Arm("FP32", {"quant.method": "fp32"})
BITNET = Arm("BitNet", {"quant.method": "bitnet"})


NOT_COOLED: Settings = {"optim.significance": 0.0, **FIRST_MOMENT}
"""Strict training in few bits without what its recipe has against the noise of rounding."""


def strict(bits: str, **settings: Any) -> Settings:
    """Settings of method strict; a double underscore in a key stands for the dot."""
    return _method("strict", bits, settings)


def residual(bits: str, **settings: Any) -> Settings:
    """Settings of method residual."""
    return _method("residual", bits, settings)


def paper(bits: str, width: int = 128, **settings: Any) -> Settings:
    """Settings of the paper's recipe, as far as a narrow model allows.

    It is made for 768 inputs and more: at the published 0.02 a head on the grid, whose scale never grows, has
    logits too small to say anything (micro, ternary, 1.5M tokens, best of three rates: 4.90 nats), so weights
    start at 1/sqrt(width). Its 2,000 steps of warm-up become a tenth of the run. 3e-3 was the best rate at 8
    bits, 9e-3 (the highest tried) at ternary.
    """
    start = {"model__initializer_range": width**-0.5, "optim__lr": 3e-3}
    return _method("paper", bits, start | settings)


def _method(method: str, bits: str, settings: Mapping[str, Any]) -> Settings:
    more = {key.replace("__", "."): value for key, value in settings.items()}
    return {"quant.method": method, "quant.bits": bits, **more}


# -- the suites ----------------------------------------------------------------------------------------------


def _main() -> Suite:
    def against(beta: str) -> Mapping[str, str]:
        equal = {"FP32, equal β₁": f"FP32, β₁ {beta}", "BitNet, equal β₁": f"BitNet, β₁ {beta}"}
        return equal | {"BitNet, β₁ 0.9": "BitNet, β₁ 0.9"}

    def arm(name: str, beta: str, settings: Settings) -> Arm:
        return Arm(name, settings, against(beta))

    return Suite(
        "main",
        "what does it cost to throw the master weights away?",
        {**MICRO, "model.num_hidden_layers": 4, "train.steps": 2442},  # 0.85M linear weights, 2.5M tokens
        (
            arm("FP32, β₁ 0.9", "0.9", {**FP32.settings, **FIRST_MOMENT}),
            arm("FP32, β₁ 0", "0", {**FP32.settings, **NO_FIRST_MOMENT}),
            arm("BitNet, β₁ 0.9", "0.9", {**BITNET.settings, **FIRST_MOMENT}),
            arm("BitNet, β₁ 0", "0", {**BITNET.settings, **NO_FIRST_MOMENT}),
            arm("8-bit strict", "0.9", strict("8")),
            arm("8-bit strict, BF16", "0.9", strict("8", quant__environment="bf16")),
            arm("8-bit strict, FP8 (emulated)", "0.9", strict("8", quant__environment="fp8")),
            arm("4-bit + 8-bit residual", "0", residual("4")),
            arm("ternary + 8-bit residual", "0", residual("ternary")),
            arm("ternary + 6-bit residual", "0", residual("ternary", quant__residual_bits=6)),
            arm("ternary strict", "0.9", strict("ternary")),
        ),
        against("0.9"),
        seeds=5,
    )


def _paper() -> Suite:
    experiments: dict[str, Settings] = {
        "Adafactor": {"optim__name": "adafactor"},
        "BF16": {"quant__environment": "bf16"},
        "FP8 (emulated)": {"quant__environment": "fp8"},
        "to nearest": {"quant__rounding": "nearest"},
        "smallest 20 % dropped": {"optim__drop_smallest": 0.2},
    }
    return Suite(
        "paper",
        "the experiments of the paper in small",
        {**MICRO, "model.arch": "bitnet", "optim.schedule": "cosine"},  # the paper's recipe has it
        (
            FP32,
            BITNET,
            Arm("paper 8 bits", paper("8")),
            Arm("paper ternary", paper("ternary")),
            Arm("paper 8 bits, ternary inference", ternary_inference_of="paper 8 bits"),
            *(
                Arm(f"paper {title}, {what}", paper(bits, **settings))
                for what, settings in experiments.items()
                for title, bits in (("8 bits", "8"), ("ternary", "ternary"))
            ),
        ),
        BASELINES,
    )


def _why() -> Suite:
    norms = {"*norm*": "float"}
    ends = {**norms, "*embed_tokens": "float", "lm_head": "float"}
    arms = [FP32, BITNET]
    for bits in ("ternary", "8"):
        narrow = bits == "ternary"
        # Our grid and first weights: those of the recipes of the two widths, and embeddings of transformers.
        rule, gain = ("absmean", 1.5) if narrow else ("gaussian", 1.0)
        start: Settings = {
            "quant__scale_rule": rule,
            "quant__init_gain": gain,
            "model__initializer_range": 0.02,
        }
        # At ternary the largest code is 1, so the paper's scale stays as it was.
        frozen: Settings = {} if narrow else {"quant__frozen_scale": True}
        steps: dict[str, Settings] = {
            "paper": paper(bits),
            "+ float norms": paper(bits, quant__rules=norms),
            "+ float embeddings and head": paper(bits, quant__rules=ends),
            "+ our grid and start": paper(bits, quant__rules=ends, **start),
            "+ frozen scale": paper(bits, quant__rules=ends, **start, **frozen),
            "+ our schedule": paper(bits, quant__rules=ends, **start, **frozen, optim__schedule="wsd"),
            "+ our update: strict": {**strict(bits), **NOT_COOLED},
            "+ 8-bit residual": residual(bits, optim__betas=[0.9, 0.95], optim__second_moment="full"),
        }
        if narrow:
            del steps["+ frozen scale"]
            steps["- first moment, factored second"] = residual(bits)
        before = None
        for title, settings in steps.items():
            name = f"{bits if narrow else '8 bits'}: {title}"
            against = {**BASELINES, "the row above": before} if before else BASELINES
            arms.append(Arm(name, settings, against))
            before = name
    return Suite(
        "why", "what is each change from the paper's recipe to ours worth?", MICRO, tuple(arms), BASELINES
    )


def _bits() -> Suite:
    widths = [bits for bits in BITS if bits != "7"]
    arms = [
        Arm(f"{bits} {method.__name__}", method(bits)) for method in (strict, residual) for bits in widths
    ]
    return Suite("bits", "every width, strict and residual", MICRO, (FP32, BITNET, *arms), BASELINES)


def _residual() -> Suite:
    k0 = {**strict("ternary"), **NOT_COOLED, **NO_FIRST_MOMENT}
    arms = [
        Arm("k = 0 (strict)", k0),
        *(Arm(f"k = {k}", residual("ternary", quant__residual_bits=k)) for k in (2, 4, 6, 16)),
        Arm("float residual", residual("ternary", quant__residual_bits=32)),
        *(Arm(f"h = {h:g}", residual("ternary", quant__hysteresis=h)) for h in (0.0, 0.12, 0.25)),
        Arm("first moment, β₁ 0.9", residual("ternary", optim__betas=[0.9, 0.95])),
        Arm("full second moment", residual("ternary", optim__second_moment="full")),
        Arm("int8 second moment", residual("ternary", optim__second_moment="int8")),
        Arm("ECO as published, β₁ 0.9", {**strict("ternary", quant__error_feedback="eco"), **NOT_COOLED}),
        *(
            Arm(f"{bits} bits stored, ternary computed", strict(bits, quant__compute_bits="ternary"))
            for bits in ("8", "4")
        ),
    ]
    recipe = "k = 8 (the recipe)"
    return Suite(
        "residual",
        "what of the remainder matters, at ternary?",
        MICRO,
        (
            Arm("FP32", {**FP32.settings, **NO_FIRST_MOMENT}),
            Arm("BitNet", {**BITNET.settings, **NO_FIRST_MOMENT}),
            Arm(recipe, residual("ternary")),
            *arms,
        ),
        {**BASELINES, "the recipe": recipe},
    )


def _rounding() -> Suite:
    arms = [
        Arm(f"{bits} {rounding}", {**strict(bits, quant__rounding=rounding), **NOT_COOLED})
        for bits in ("ternary", "4")
        for rounding in ROUNDINGS
    ]
    arms += [
        Arm(f"{bits} significance 2", strict(bits, optim__significance=2.0)) for bits in ("ternary", "4")
    ]
    return Suite("rounding", "how should strict training round?", MICRO, (FP32, BITNET, *arms), BASELINES)


def _scale() -> Suite:
    """Three widths and three lengths of run: 2, 4 and 8 tokens for each linear weight."""
    methods = {
        "FP32": FP32.settings,
        "BitNet": BITNET.settings,
        "strict 8 bits": strict("8"),
        "residual ternary": residual("ternary"),
        "strict ternary": strict("ternary"),
    }
    tokens_a_step = 8 * 128
    arms = []
    for width in (64, 128, 192):
        weights = 2 * (4 * width**2 + 3 * width * 3 * width)
        for tokens in (2, 4, 8):
            where = f"width {width}, {tokens} tokens a weight"
            size = {"model.hidden_size": width, "model.intermediate_size": 3 * width}
            against = {name: f"{name}, {where}" for name in BASELINES}
            shortest = 2 * weights // tokens_a_step
            length = {"train.steps": tokens * weights // tokens_a_step, "optim.warmup_steps": shortest // 5}
            arms += [
                Arm(f"{name}, {where}", {**settings, **size, **length}, against, tuning_steps=shortest)
                for name, settings in methods.items()
            ]
    return Suite("scale", "do gaps grow with the width, or with the run?", MICRO, tuple(arms), BASELINES)


def _formats() -> Suite:
    arms = [Arm(f"{method.__name__} {bits}", method(bits)) for method in (strict, residual) for bits in BITS]
    arms += [Arm(name, {"quant.method": name}) for name in ("fp32", "bf16", "bitnet")]
    arms += [Arm(f"paper {bits}", paper(bits, 256, optim__lr=2e-3)) for bits in BITS[1:]]
    against = {"FP32": "fp32", "BitNet": "bitnet"}
    question = "does every method and width learn, at the recipe's learning rate?"
    return Suite("formats", question, TINY, tuple(arms), against, seeds=1, tuned=False)


def _exact() -> Suite:
    recipe = "the recipe"
    gradients = {"quant.grad_input": "float", "quant.grad_weight": "float"}
    return Suite(
        "exact",
        "do the savings in time and memory cost loss?",
        {**TINY, **residual("ternary"), "train.eval_windows": 400},
        (
            Arm(recipe),
            Arm("float gradients", gradients),
            Arm("float gradients and activations", {**gradients, "quant.forward": "float"}),
            Arm("full second moment", {"optim.second_moment": "full"}),
        ),
        {recipe: recipe, "float gradients": "float gradients"},
        seeds=5,
        tuned=False,
    )


SUITES: dict[str, Suite] = {
    suite.name: suite
    for suite in (
        _main(),
        _paper(),
        _why(),
        _bits(),
        _residual(),
        _rounding(),
        _scale(),
        _formats(),
        _exact(),
    )
}
