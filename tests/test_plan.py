"""`dqt plan`: sizes and devices, what is proposed fits, and what can't fit is refused."""

from __future__ import annotations

import json
import tomllib
from typing import Any

import pytest

from dqt.cli import main
from dqt.errors import ConfigError, DqtError
from dqt.footprint import Needs
from dqt.plan import DEVICES, GIB, available_memory, device_memory, parse_size, plan, refuse_what_does_not_fit
from dqt.train.config import Config, resolve
from dqt.train.loop import train

SHORT = {"train.batch_size": 1, "train.seq_len": 512}


def config(**values: Any) -> Config:
    return Config().override({key.replace("__", "."): value for key, value in values.items()})


@pytest.mark.parametrize(
    ("text", "size"),
    [("16GB", 16e9), ("24 GiB", 24 * GIB), ("24", 24e9), ("1.5tb", 1.5e12), ("512 MiB", 2**29), ("7B", 7)],
)
def test_sizes(text: str, size: float) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "0GB", "1.2.3GB", "16 gold", "inf", "1e9"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="is no size: write one like 16GB"):
        parse_size(text)


def test_devices() -> None:
    assert device_memory("rtx4090") == 24 * GIB == DEVICES["rtx4090"]
    assert device_memory("24GB") == 24e9
    assert 1e8 < device_memory("cpu") < 1e14
    assert device_memory("cpu") == pytest.approx(available_memory(), rel=0.5)
    with pytest.raises(ConfigError, match="did you mean 'rtx4090'"):
        device_memory("rtx409")


# preset, method, more settings, budget in GB, keys that make it fit
BUDGETS = [
    ("tiny", "residual", {}, 100, []),
    ("tiny", "strict", {}, 0.72, ["train.activation_checkpointing"]),
    ("7b", "residual", SHORT, 16, ["train.gradient_release", "train.accumulation"]),
    ("13b", "residual", SHORT, 24 * 1.0737, ["train.gradient_release", "train.accumulation"]),
    ("1b", "strict", SHORT, 6, ["train.gradient_release", "train.accumulation"]),
    ("1b", "strict", SHORT | {"optim.second_moment": "full"}, 10, ["optim.second_moment"]),
]


@pytest.mark.parametrize(("preset", "method", "more", "budget", "keys"), BUDGETS)
def test_what_is_proposed_fits(
    preset: str, method: str, more: dict[str, Any], budget: float, keys: list[str]
) -> None:
    bits = "8" if method == "strict" else "ternary"
    asked = Config().override({"model.preset": preset, "quant.method": method, "quant.bits": bits, **more})
    found = plan(asked, budget=f"{budget}GB")
    assert found.fits
    assert list(found.settings) == keys
    fitting = resolve(asked.override(found.settings))
    assert Needs(fitting).footprint().peak <= found.budget
    assert plan(fitting, budget=f"{budget}GB").changes == ()
    assert ("fits" in str(found)) == (not keys)


def test_what_an_optimizer_has_not_is_not_proposed() -> None:
    found = plan(config(optim__name="sgd"), budget="1MB")
    assert not found.fits
    assert not [key for key in found.settings if "moment" in key]


def test_changes_are_cheapest_first_and_none_is_idle() -> None:
    asked = config(model__preset="130m", train__batch_size=8)
    found = plan(asked, budget="1.2GB")
    peaks = [change.peak for change in found.changes]
    assert found.fits
    assert peaks == sorted(peaks, reverse=True)
    assert peaks[-1] <= found.budget < peaks[-2]
    for change in found.changes:
        rest = {key: value for key, value in found.settings.items() if key not in change.settings}
        assert Needs(resolve(asked.override(rest))).footprint().peak > found.budget


def test_what_can_never_fit_says_so() -> None:
    found = plan(config(model__preset="13b"), budget="2GB")
    assert not found.fits
    assert "not even with" in str(found)
    with pytest.raises(DqtError, match=r"take a smaller preset or train.seq_len"):
        refuse_what_does_not_fit(resolve(config(model__preset="13b", train__memory_limit="2GB")))


def test_baselines_are_the_same_model_in_full_precision() -> None:
    found = plan(
        config(model__preset="1b", **{key.replace(".", "__"): value for key, value in SHORT.items()})
    )
    fp32 = found.baselines["fp32"]
    parameters = sum(weight.count for weight in Needs(found.config).weights)
    assert (fp32.weights, fp32.gradients, fp32.optimizer) == (4 * parameters, 4 * parameters, 8 * parameters)
    assert found.baselines["bitnet"].peak > fp32.peak > found.needs.peak > found.released


def test_a_run_that_can_t_fit_is_refused_before_anything_is_written(tmp_path: Any) -> None:
    out = tmp_path / "run"
    asked = config(model__preset="tiny", train__memory_limit="500MB", train__out=str(out))
    with pytest.raises(DqtError, match=r"needs about .*B, and train.memory_limit is 500MB") as refused:
        train(asked)
    assert not out.exists()
    message = str(refused.value)
    flags = message.partition("add ")[2].partition(", which takes")[0].split("--set ")[1:]
    values = {
        key: tomllib.loads(f"v = {value}")["v"] for key, _, value in (f.strip().partition("=") for f in flags)
    }
    refuse_what_does_not_fit(resolve(asked.override(values)))  # as the message says


def test_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--preset", "7b", "--bits", "ternary", "--batch-size", "1", "--seq-len", "512"]
    assert main(["plan", *flags, "--device", "rtx3090"]) == 0
    text = capsys.readouterr().out
    for word in (
        "weights",
        "optimizer",
        "gradients",
        "activations",
        "logits",
        "workspace",
        "peak",
        "FP32 AdamW",
    ):
        assert word in text
    assert "dqt train --preset 7b" in text
    assert "--set train.gradient_release=true" in text
    assert main(["plan", *flags, "--budget", "16GB", "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["budget"] == 16e9
    assert content["fits"]
    assert content["needs"]["peak"] > content["budget"] > content["changes"][-1]["peak"]
    assert main(["plan", "--device", "rtx3091"]) == 2
    assert "did you mean 'rtx3090'" in capsys.readouterr().err
