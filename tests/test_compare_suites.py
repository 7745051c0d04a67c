"""The named suites: what they promise, and that each of their quick forms runs."""

from __future__ import annotations

import csv
import io
import json
import re
from pathlib import Path

import pytest

from dqt.cli import main
from dqt.compare.command import duration
from dqt.compare.experiment import Experiment
from dqt.compare.runs import fingerprint
from dqt.compare.suites import BITS, SUITES
from dqt.footprint import Needs
from dqt.numerics.formats import FORMATS

DOCUMENT = (Path(__file__).parent.parent / "docs" / "compare.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", SUITES)
def test_a_suite_s_arms_differ_and_are_measured_against_arms_that_exist(name: str, tmp_path: Path) -> None:
    suite = SUITES[name]
    experiment = Experiment(suite, tmp_path)
    names = [arm.name for arm in suite.arms]
    assert len(set(names)) == len(names)
    prints = {fingerprint(result.config) for result in experiment.trained}
    assert len(prints) == len(experiment.trained), "two arms are the same run"
    for arm in suite.arms:
        assert set(suite.against_of(arm).values()) <= set(names)
    sizes = {json.dumps(result.config.to_dict()["data"]) for result in experiment.results}
    assert len(sizes) == 1, "arms of a suite read the same text"


@pytest.mark.parametrize("name", SUITES)
def test_the_documentation_has_every_suite_with_its_time(name: str) -> None:
    experiment = Experiment(SUITES[name], Path(), jobs=2)
    time = duration(experiment.expected_seconds())
    assert re.search(
        rf"^\| `{name}` \| {len(SUITES[name].arms)} \| {SUITES[name].seeds} \| {time} \|", DOCUMENT, re.M
    )


def test_no_width_is_forgotten() -> None:
    assert set(BITS) == set(FORMATS)


def test_the_main_suite_is_as_large_as_its_claim_needs() -> None:
    suite = SUITES["main"]
    assert suite.seeds == 5
    for result in Experiment(suite, Path()).results:
        train = result.config.train
        assert train.steps * train.batch_size * train.seq_len >= 2_500_000  # type: ignore[operator]
        linear = [weight.count for weight in Needs(result.config).weights if weight.kind == "linear"]
        assert sum(linear) >= 800_000


def test_the_paper_is_compared_at_its_own_schedule() -> None:
    results = Experiment(SUITES["paper"], Path()).results
    assert {result.config.optim.schedule for result in results} == {"cosine"}


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shared by all suites, so that a run that two of them have in common is run once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DQT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield tmp_path_factory.mktemp("compare")


@pytest.mark.slow
@pytest.mark.parametrize("name", SUITES)
def test_every_suite_runs_quickly(name: str, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = ["--tune"] if name == "main" else ["--seeds", "1"]  # 200 runs instead of 500
    assert main(["compare", name, "--quick", *more, "--out", str(out)]) == 0
    assert "its losses mean nothing" in capsys.readouterr().out
    folder = out / f"{name}-quick"
    content = json.loads((folder / "results.json").read_text())
    assert [arm["arm"] for arm in content["arms"]] == [arm.name for arm in SUITES[name].arms]
    for arm in content["arms"]:
        assert [run["state"] for run in arm["runs"]] == ["finished"] * len(content["seeds"]), arm["arm"]
        assert 3 < arm["loss"]["mean"] < 7
        assert arm["bytes_a_weight"] > 0
        assert len(arm["tuning"]) == (3 if name == "main" else 0)
        assert set(arm["gaps"]) <= set(content["columns"])
    rows = list(csv.DictReader(io.StringIO((folder / "arms.csv").read_text())))
    assert [float(row["loss"]) for row in rows] == [arm["loss"]["mean"] for arm in content["arms"]]
    assert all((folder / f"{plot}.png").stat().st_size > 5000 for plot in ("frontier", "curves", "flips"))
