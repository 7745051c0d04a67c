"""`dqt compare` on arms of one's own: what is run again and what is not, divergence, Ctrl-C, bad input."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from dqt.cli import main
from dqt.compare.command import suite_of_files
from dqt.compare.experiment import Experiment, select
from dqt.compare.results import collect, to_markdown
from dqt.compare.runs import LEDGER
from dqt.compare.suites import SUITES
from dqt.errors import ConfigError
from dqt.train.config import Config
from dqt.train.schedule import root_of_squares
from train_helpers import micro_config


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DQT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def arm(folder: Path, name: str, **values: Any) -> str:
    """A config file; keys have a double underscore for the dot."""
    content = micro_config(folder, **values).to_dict()
    (folder / f"{name}.toml").write_text(tomli_w.dumps(content))
    return str(folder / f"{name}.toml")


def compare(folder: Path, *files: str, **options: Any) -> list[dict[str, Any]]:
    """What the command does without printing and plots; the arms of `results.json`."""
    experiment = Experiment(suite_of_files([Path(file) for file in files]), folder / "out", jobs=2, **options)
    experiment.run()
    arms: list[dict[str, Any]] = collect(experiment)["arms"]
    return arms


def times(folder: Path) -> dict[str, int]:
    """When each run's record was written."""
    return {
        path.parent.name: path.stat().st_mtime_ns for path in (folder / "out" / "runs").glob("*/run.json")
    }


def test_arms_of_files_are_measured_against_the_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = arm(tmp_path, "plain", quant__method="fp32"), arm(tmp_path, "low", quant__bits="4")
    arguments = ["--out", str(tmp_path), "--jobs", "2", "--seeds", "3", "--set", "train.steps=4"]
    assert main(["compare", *files, *arguments]) == 0
    (results,) = tmp_path.glob("files-*/results.json")
    plain, low = json.loads(results.read_text())["arms"]
    assert (plain["arm"], plain["gaps"], low["gaps"]["plain"]["arm"]) == ("plain", {}, "plain")
    losses = [[run["val_loss"] for run in each["runs"]] for each in (plain, low)]
    differences = [b - a for a, b in zip(*losses, strict=True)]
    assert low["gaps"]["plain"]["values"] == pytest.approx(differences)
    assert low["gaps"]["plain"]["mean"] == pytest.approx(sum(differences) / 3)
    assert len(set(losses[0])) == 3, "seeds differ"
    assert plain["bytes_a_weight"] == 12
    assert low["bytes_a_weight"] == pytest.approx(1.8, abs=0.2)  # small rows: scales and factors show
    out = capsys.readouterr().out
    assert "| low | " in out
    assert "[6/6]" in out
    assert "left" in out


def test_only_what_changed_is_run_again(tmp_path: Path) -> None:
    files = arm(tmp_path, "a", quant__method="fp32"), arm(tmp_path, "b", quant__bits="4")
    compare(tmp_path, *files, seeds=1)
    before = times(tmp_path)
    compare(tmp_path, *files, seeds=2)
    more = times(tmp_path)
    assert {name: more[name] for name in before} == before
    assert len(more) == 4
    arm(tmp_path, "b", quant__bits="4", quant__hysteresis=0.2)
    compare(tmp_path, *files, seeds=2)
    after = times(tmp_path)
    assert {name: after[name] for name in more} == more
    assert len(after) == 6


def test_time_left_does_not_count_what_is_finished(tmp_path: Path) -> None:
    file = arm(tmp_path, "a", quant__method="fp32")
    compare(tmp_path, file, seeds=1)

    def final_seconds(seeds: int) -> float:
        again = Experiment(suite_of_files([Path(file)]), tmp_path / "out", seeds=seeds)
        again.prepare()
        return again.final_seconds()

    assert final_seconds(1) == 0
    assert 0 < final_seconds(2) == final_seconds(3) / 2


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("config.toml", 'bits = "4"', 'bits = "3"'),
        ("run.json", '"hash": "', '"hash": "x'),
        ("config.toml", "[", "("),
    ],
)
def test_a_run_of_another_config_or_text_does_not_count(
    file: str, old: str, new: str, tmp_path: Path
) -> None:
    file_b = arm(tmp_path, "b", quant__bits="4")
    loss = compare(tmp_path, file_b, seeds=1)[0]["loss"]
    (run,) = (tmp_path / "out" / "runs").iterdir()
    text = (run / file).read_text()
    assert old in text
    (run / file).write_text(text.replace(old, new, 1))
    before = times(tmp_path)
    assert compare(tmp_path, file_b, seeds=1)[0]["loss"] == loss
    assert times(tmp_path) != before
    assert (run / file).read_text().count(old) == text.count(old)


def test_divergence_and_failure_stop_nothing(tmp_path: Path) -> None:
    good, bad = arm(tmp_path, "good"), arm(tmp_path, "bad", quant__method="fp32", optim__lr=1e30)
    wrong = arm(tmp_path, "wrong", quant__bits="8", train__memory_limit="1MB")
    by_name = {each["arm"]: each for each in compare(tmp_path, good, bad, wrong, seeds=2)}
    assert by_name["good"]["loss"]["mean"] < 7
    assert [run["state"] for run in by_name["bad"]["runs"]] == ["diverged"] * 2
    assert all(1 <= run["step"] <= 6 for run in by_name["bad"]["runs"])
    assert by_name["bad"]["loss"]["mean"] is None
    assert [run["state"] for run in by_name["wrong"]["runs"]] == ["failed"] * 2
    assert "train.memory_limit is 1MB" in by_name["wrong"]["runs"][0]["error"]
    assert by_name["bad"]["notes"] == ["seed 0, 1 diverged at step 2"]
    before = times(tmp_path)
    compare(tmp_path, good, bad, wrong, seeds=2)
    assert times(tmp_path) == before, "a diverged run would only diverge again"
    (ledger, _) = sorted((tmp_path / "out" / "runs").glob(f"*/{LEDGER}"))
    ledger.write_text(ledger.read_text().replace('"data": "', '"data": "of another text '))
    compare(tmp_path, bad, seeds=2)
    assert {name for name, time in times(tmp_path).items() if time != before[name]} == {ledger.parent.name}


def test_a_rate_that_was_not_judged_is_named(tmp_path: Path) -> None:
    wrong = arm(tmp_path, "wrong", quant__bits="8", train__memory_limit="1MB")
    (found,) = compare(tmp_path, wrong, seeds=1, tuned=True)
    assert found["lr"] is None
    assert len([note for note in found["notes"] if "train.memory_limit is 1MB" in note]) >= 3


def test_models_measured_with_ternary_weights(tmp_path: Path) -> None:
    """A damaged one is a failed run, and what the user sets wins over what a quick run sets."""
    suite = select(SUITES["paper"], ["*inference"])

    def rows() -> list[dict[str, Any]]:
        experiment = Experiment(suite, tmp_path, quick=True, settings={"train.steps": 3}, jobs=2)
        experiment.run()
        return collect(experiment)["arms"]

    own, ternary = rows()
    assert [run["step"] for run in own["runs"]] == [3, 3]
    for stored, computed in zip(own["runs"], ternary["runs"], strict=True):
        assert computed["val_loss"] != stored["val_loss"]
        per_byte = stored["val_bpb"] / stored["val_loss"]
        assert computed["val_bpb"] == pytest.approx(computed["val_loss"] * per_byte)
    model = Path(own["runs"][0]["directory"]) / "model" / "model.safetensors"
    model.write_bytes(model.read_bytes()[:-1] + b"?")
    (model.parent.parent / "ternary.json").unlink()
    states = [run["state"] for run in rows()[1]["runs"]]
    assert states == ["failed", "finished"]


def test_tuning_finds_the_best_rate_of_its_grid(tmp_path: Path) -> None:
    file = arm(tmp_path, "a", quant__method="fp32", optim__lr=1e-3, train__steps=16)
    (found,) = compare(tmp_path, file, seeds=1, tuned=True)
    tuning = {run["lr"]: run["val_loss"] for run in found["tuning"]}
    assert {5e-4, 1e-3, 2e-3} <= tuning.keys()
    assert found["lr"] == min(tuning, key=tuning.__getitem__)
    assert all(run["seed"] == 1000 and run["step"] == 8 for run in found["tuning"])
    assert [(run["seed"], run["step"]) for run in found["runs"]] == [(0, 16)]
    directories = [Path(run["directory"]) for run in (*found["tuning"], *found["runs"])]
    warm_ups = {Config.from_toml(path / "config.toml").optim.warmup_steps for path in directories}
    assert warm_ups == {1}, "the final run's, however short a run is"


def listen_to_ctrl_c() -> None:
    """A shell starts what runs in the background with Ctrl-C ignored, pytest and all its children with it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@contextlib.contextmanager
def started(folder: Path, *files: str) -> Iterator[subprocess.Popen[str]]:
    """`dqt compare` in a process of its own, which ends with the test, however that ends."""
    command = [sys.executable, "-m", "dqt", "compare", *files, "--seeds", "1", "--out", str(folder / "out")]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=listen_to_ctrl_c,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate(timeout=60)


def wait_for_steps(process: subprocess.Popen[str], folder: Path) -> None:
    """Waits until both runs have trained a little."""
    deadline = time.monotonic() + 120
    while sum(path.stat().st_size > 2000 for path in (folder / "out" / "runs").glob("*/metrics.jsonl")) < 2:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_ctrl_c_stops_in_good_order_and_the_same_command_goes_on(tmp_path: Path) -> None:
    # More steps than the test lets them take, and no more than minutes, should pytest itself be killed.
    files = [
        arm(tmp_path, name, quant__bits=bits, train__steps=5000) for name, bits in (("a", "4"), ("b", "8"))
    ]
    with started(tmp_path, *files) as process:
        wait_for_steps(process, tmp_path)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        out, err = process.communicate(timeout=120)
        assert (process.returncode, err) == (130, "")
    assert "the same command goes on" in out
    assert "Interrupted: not all runs are there." in out
    records = [json.loads(path.read_text()) for path in (tmp_path / "out" / "runs").glob("*/run.json")]
    assert [record["state"] for record in records] == ["interrupted"] * 2
    stopped_at = min(record["summary"]["step"] for record in records)

    deadline = time.monotonic() + 120
    with started(tmp_path, *files) as process:
        logs = tmp_path / "out" / "logs"
        while sum("resumed from" in path.read_text() for path in logs.iterdir()) < 2:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
    # The command was killed; its runs notice, and stop with a checkpoint.
    states: list[str] = []
    while states != ["interrupted"] * 2:
        assert time.monotonic() < deadline
        time.sleep(0.05)
        records = [json.loads(path.read_text()) for path in (tmp_path / "out" / "runs").glob("*/run.json")]
        states = [record["state"] for record in records]
    assert min(record["summary"]["step"] for record in records) >= stopped_at


def test_arms_are_selected_by_pattern(tmp_path: Path) -> None:
    suite = select(SUITES["bits"], ["FP32", "ternary*"])
    assert [each.name for each in suite.arms] == ["FP32", "ternary strict", "ternary residual"]
    content = Experiment(suite, tmp_path)
    assert [each.arm.name for each in content.results] == ["FP32", "ternary strict", "ternary residual"]
    inference = select(SUITES["paper"], ["*inference"])
    assert [each.name for each in inference.arms] == ["paper 8 bits", "paper 8 bits, ternary inference"]
    with pytest.raises(ConfigError, match="no arm of bits is 'FP23'; did you mean 'FP32'"):
        select(SUITES["bits"], ["FP23"])


def test_results_of_other_arms_and_settings_lie_apart(tmp_path: Path) -> None:
    whole = SUITES["main"]
    part = select(whole, ["FP32*"])
    wide = {"model.hidden_size": 256}
    names = [
        Experiment(suite, tmp_path, settings=settings, quick=quick).name
        for suite, settings, quick in (
            (whole, {}, False),
            (whole, {}, True),
            (whole, wide, False),
            (part, {}, False),
            (part, wide, False),
        )
    ]
    assert names[:2] == ["main", "main-quick"]
    assert len(set(names)) == len(names)


def test_losses_of_other_tokens_are_not_compared(tmp_path: Path) -> None:
    files = arm(tmp_path, "a"), arm(tmp_path, "b", data__vocab_size=290)
    with pytest.raises(ConfigError, match="arms 'a' and 'b' have other tokens"):
        compare(tmp_path, *files, seeds=1)


def test_what_follows_from_the_rate_and_the_length_follows(tmp_path: Path) -> None:
    """The grid of strict 8 bits reaches as far as weights grow in that run."""
    file = arm(tmp_path, "a", quant__bits="8", train__steps=64, optim__lr=0.3)
    (found,) = compare(tmp_path, file, seeds=1, tuned=True)
    runs = [Config.from_toml(Path(run["directory"]) / "config.toml") for run in found["tuning"]]
    headrooms = {config.optim.lr: config.quant.headroom for config in runs}
    assert headrooms[0.6] == pytest.approx(2 * headrooms[0.3], rel=1e-3)
    (final,) = [Config.from_toml(Path(run["directory"]) / "config.toml") for run in found["runs"]]
    walks = [root_of_squares(steps, 6, "wsd") for steps in (32, 64)]
    assert final.quant.headroom == pytest.approx(walks[1] / walks[0] * headrooms[final.optim.lr], rel=1e-3)


def test_what_is_paired_says_so(tmp_path: Path) -> None:
    first = arm(tmp_path, "a", train__accumulation=2)
    for other, paired in (
        (arm(tmp_path, "b", quant__bits="8", train__accumulation=2), True),
        (arm(tmp_path, "c", train__accumulation=1), False),
    ):
        experiment = Experiment(suite_of_files([Path(first), Path(other)]), tmp_path, seeds=2)
        content = collect(experiment)
        assert ("paired" in to_markdown(content)) == paired
        train = experiment.results[0].config.train
        assert content["arms"][0]["tokens"] == train.steps * train.batch_size * train.seq_len * 2
        assert content["arms"][1]["config"]["train"]["threads"] == 1


def test_lists_and_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in SUITES)
    assert main(["compare", "main", "--list"]) == 0
    out = capsys.readouterr().out
    assert all(each.name in out for each in SUITES["main"].arms)
    assert "quant.residual_bits = 6" in out
    (tmp_path / "file").write_text("")
    a, other = arm(tmp_path, "a"), tmp_path / "other"
    start = str(tmp_path / "start.toml")
    Path(start).write_text('[model]\nstart_from = "somewhere"\n')
    other.mkdir()
    for arguments, message in {
        ("mian",): "unknown suite 'mian', and no config file; did you mean 'main'",
        ("main", "bits"): "main is a suite: give one suite",
        (a, arm(other, "a")): "two arms are called 'a'",
        ("main", "--seeds", "0"): "--seeds must be at least 1",
        ("main", "--only", "nothing*"): "no arm of main is 'nothing*'",
        (
            "main",
            "--set",
            "train.stesp=3",
        ): "arm 'FP32, β₁ 0.9': unknown key train.stesp; did you mean 'steps'",
        ("main", "--set", "model.hidden_size=130"): "arm 'FP32, β₁ 0.9'",
        ("main", "--set", "train.seed=3"): "train.seed is what a comparison sets itself",
        (start,): "comparisons train new models",
        ("main", "--quick", "--out", str(tmp_path / "file")): "is a file, not a directory",
    }.items():
        assert main(["compare", *arguments]) == 2
        assert message in capsys.readouterr().err
