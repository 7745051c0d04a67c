"""The report of every kind of run directory: complete, self-contained, and honest about damage."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dqt.errors import ModelError
from dqt.plots import code_values, column, short_name, smooth
from dqt.report import read_run, write_report

PNG = b"\x89PNG\r\n\x1a\n"
LEVELS = {"1": 2, "ternary": 3, "4": 16, "8": 256, "fp32": 0}
MEMORY = [
    {
        "category": name,
        "parameters": n,
        "weights": n,
        "gradients": 4 * n,
        "optimizer": n,
        "total": 6 * n,
        "fp32_adamw": 16 * n,
    }
    for name, n in (("linear weights", 1_500_000), ("total", 2_000_000))
]
SUMMARY = {
    "unigram_nats": 6.25,
    "parameters": 2_000_000,
    "linear_parameters": 1_500_000,
    "bits": "ternary",
    "memory": MEMORY,
    "samples": [{"prompt": "def <main>(", "text": "self):\n    return 'a' & \"b\""}],
}


def make_run(
    directory: Path, bits: str = "ternary", steps: int = 30, state: str = "finished", **summary: Any
) -> Path:
    directory.mkdir(parents=True)
    lines: list[dict[str, Any]] = []
    for step in range(steps + 1):
        if step:
            line = {"step": step, "tokens": 100 * step, "loss": 8 - step / 10, "lr": 1e-3, "grad_norm": 1.0}
            line |= {"tokens_per_second": 5000.0, "memory_bytes": 10**9, "elapsed": 2.5 * step}
            quantized = {"flip_rate": 0.01, "saturated": 0.6, "zeros": 0.3, "residual_spread": None}
            lines.append(line | (quantized if LEVELS[bits] else dict.fromkeys(quantized)))
        if step % 10 == 0:
            lines.append({"step": step, "val_loss": 8.1 - step / 10, "val_bpb": 3.0})
            if LEVELS[bits]:
                names = [f"model.layers.{i}.mlp.up_proj.weight" for i in range(9)]
                lines.append({"step": step, "codes": {name: [7] * LEVELS[bits] for name in names}})
    (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (directory / "config.toml").write_text('[model]\npreset = "tiny"\n')
    (directory / "run.json").write_text(json.dumps({"state": state, "summary": SUMMARY | summary}))
    return directory


class Page(HTMLParser):
    """Collects what a page shows and what it would load."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.text, self.links, self.tags = "", [], []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attributes if name in ("src", "srcset", "href", "data")]

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.mark.parametrize(
    ("bits", "plots"),
    [
        ("1", {"loss", "flips", "codes", "training"}),
        ("ternary", {"loss", "flips", "codes", "training"}),
        ("8", {"loss", "flips", "codes", "training"}),
        ("fp32", {"loss", "training"}),
    ],
)
def test_report_is_complete_and_loads_nothing(bits: str, plots: set[str], tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", bits)
    path = write_report(run)
    assert path == run / "report.html"
    files = {file.stem: file.read_bytes() for file in (run / "plots").iterdir()}
    assert set(files) == plots
    assert all(png.startswith(PNG) and len(png) > 5000 for png in files.values())

    page = Page(path)
    assert len(page.links) == 2 * len(plots)  # a light and a dark image each
    assert all(link.startswith("data:image/png;base64,") for link in page.links)
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    assert not re.search(r"url\(|@import", path.read_text())
    for shown in (
        "5.100",
        "3.000",
        "2M",
        "finished",
        "1.15",
        'preset = "tiny"',
        "dqt train",
        "FP32 AdamW",
        "37.5 %",
        "38%of the",
        "1.5M of them ternary",
    ):
        assert shown in page.text
    assert "def <main>(self):\n    return 'a' & \"b\"" in page.text  # escaped, and shown as it is


@pytest.mark.parametrize("steps", [0, 1, 2])
def test_report_of_a_run_that_was_stopped_early(steps: int, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", steps=steps, state="interrupted")
    (run / "run.json").write_text('{"state": "interrupted"}')
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "loss": 7.')  # torn by the kill
    page = Page(write_report(run))
    assert "interrupted" in page.text
    assert "8.100" in page.text or "validation loss" in page.text


def test_report_without_any_metrics_yet(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    (run / "metrics.jsonl").write_text("")
    (run / "run.json").unlink()
    (run / "config.toml").unlink()
    assert "unknown" in Page(write_report(run)).text


def test_report_is_the_same_when_written_again(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    first = write_report(run).read_bytes()
    assert write_report(run).read_bytes() == first


def test_a_resumed_run_repeats_steps_and_the_later_line_counts(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", steps=3)
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 2, "loss": 1.0}) + "\n")
    record = read_run(run)
    assert [line["step"] for line in record.training] == [1, 2, 3]
    assert record.training[1]["loss"] == 1.0


def test_nan_in_the_metrics_is_left_out(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 31, "loss": NaN, "lr": Infinity, "grad_norm": null}\n')
    page = Page(write_report(run)).text.replace(str(tmp_path), "")
    assert not re.search(r"\b(nan|inf)\b", page, re.IGNORECASE)


BROKEN = {
    "not a run": (lambda run: (run / "metrics.jsonl").unlink(), "is not a run directory"),
    "damaged metrics": (lambda run: (run / "metrics.jsonl").write_text("{\n{}\n"), "damaged at line 1"),
    "damaged run.json": (lambda run: (run / "run.json").write_text("[1]"), "run.json is damaged"),
    "plots in the way": (lambda run: (run / "plots").write_text(""), "can't be written"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_damage_is_said(case: str, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    damage, message = BROKEN[case]
    damage(run)
    with pytest.raises(ModelError, match=message):
        write_report(run)
    assert not (run / "report.html").exists()


# -- parts of the plots --------------------------------------------------------------------------------------


def test_column_takes_finite_numbers_only() -> None:
    lines = [
        {"step": 1, "x": 2},
        {"step": 2, "x": None},
        {"step": 3},
        {"step": 4, "x": math.nan},
        {"step": 5, "x": 3.0},
    ]
    steps, values = column(lines, "x")
    assert steps.tolist() == [1, 5]
    assert values.tolist() == [2, 3]
    assert column([], "x")[0].size == 0


@pytest.mark.parametrize("span", [0, 1, 2, 5, 100])
def test_smoothing_keeps_lines_straight(span: int) -> None:
    line = np.arange(20.0)
    np.testing.assert_allclose(smooth(line, span), line)  # no lag anywhere
    assert smooth(np.array([]), span).size == 0


def test_smoothing_averages_and_ends_in_no_single_batch() -> None:
    np.testing.assert_allclose(smooth(np.array([0.0, 3.0, 0.0, 3.0, 0.0]), 3), [0, 1, 2, 1, 1])


def test_smoothing_invents_no_value() -> None:
    falling = np.array([9.0, 8.0, 1.0, 1.0, 0.5, 0.0, 0.0])  # the line through the last five ends below zero
    assert smooth(falling, 5).min() == 0.0


@pytest.mark.parametrize(
    ("levels", "values"),
    [(2, ["-½", "+½"]), (3, ["-1", "0", "+1"]), (4, ["-2", "-1", "0", "+1"])],
)
def test_code_values(levels: int, values: list[str]) -> None:
    assert code_values(levels) == values


def test_short_names() -> None:
    assert short_name("model.layers.3.mlp.up_proj.weight") == "3.mlp.up_proj"
