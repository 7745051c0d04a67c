"""One self-contained HTML page about a run, and its plots as PNG files.

Built from what the run wrote as it went (`metrics.jsonl`, `run.json`, `config.toml`), so it works for a
finished run, for an interrupted one, and for one that is still going. Images are embedded, nothing is loaded
from anywhere: the page can be mailed. Static images instead of a charting script: no zoom, but 300 kB, and it
prints.
"""

from __future__ import annotations

import base64
import html
import json
import math
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dqt.errors import ModelError
from dqt.plots import DARK, LIGHT, RunSeries, column, draw_all
from dqt.sizes import format_bytes
from dqt.train.metrics import format_duration

REPORT_NAME = "report.html"
PLOTS_NAME = "plots"

CAPTIONS = {
    "loss": (
        "Loss",
        "Cross-entropy in nats a token. The dashed line is what a model without context can reach.",
    ),
    "flips": (
        "Movement of the codes",
        "Left: the share of all low-bit weights whose integer changed in a step.",
    ),
    "codes": ("Codes over time", "How often each integer occurs in a weight, at every evaluation."),
    "training": ("Training", "Schedule, gradients, speed and memory."),
}

_MEMORY_COLUMNS = {
    "weights": "weights",
    "gradients": "gradients",
    "optimizer": "optimizer state",
    "total": "together",
    "fp32_adamw": "FP32 AdamW",
}


@dataclass(frozen=True)
class RunRecord:
    """What a run directory says about its run.

    Attributes:
        directory: The run directory.
        state: "running", "interrupted" or "finished".
        summary: The numbers in `run.json`, possibly few of them.
        config: The text of `config.toml`.
        training: Lines of `metrics.jsonl` with a training loss, by step.
        evaluation: Those with a validation loss.
        codes: Those with histograms of codes.
    """

    directory: Path
    state: str
    summary: dict[str, Any]
    config: str
    training: list[dict[str, Any]]
    evaluation: list[dict[str, Any]]
    codes: list[dict[str, Any]]


def read_run(directory: str | Path) -> RunRecord:
    """Reads a run directory.

    Raises:
        ModelError: If it is none, or damaged.
    """
    directory = Path(directory)
    metrics = directory / "metrics.jsonl"
    if not metrics.is_file():
        raise ModelError(
            f"{directory} is not a run directory (it has no metrics.jsonl): give one that dqt train wrote"
        )
    lines = _read_lines(metrics)
    run = _read_json(directory / "run.json")
    config = directory / "config.toml"
    return RunRecord(
        directory=directory,
        state=str(run.get("state", "unknown")),
        summary=run.get("summary") or {},
        config=config.read_text(encoding="utf-8", errors="replace") if config.is_file() else "",
        training=_by_step(lines, "loss"),
        evaluation=_by_step(lines, "val_loss"),
        codes=_by_step(lines, "codes"),
    )


def write_report(directory: str | Path) -> Path:
    """Writes `plots/*.png` and `report.html` into a run directory.

    Returns:
        The path of the page.

    Raises:
        ModelError: If it is no run directory, is damaged, or can't be written.
    """
    run = read_run(directory)
    series = RunSeries(run.training, run.evaluation, run.codes, run.summary.get("unigram_nats"))
    light, dark = (draw_all(series, theme) for theme in (LIGHT, DARK))
    page = run.directory / REPORT_NAME
    try:
        plots = run.directory / PLOTS_NAME
        plots.mkdir(exist_ok=True)
        for name, png in light.items():
            (plots / f"{name}.png").write_bytes(png)
        page.write_text(render(run, {name: (light[name], dark[name]) for name in light}), encoding="utf-8")
    except OSError as error:
        raise ModelError(f"the report can't be written to {run.directory}: {error.strerror}") from error
    return page


def render(run: RunRecord, plots: Mapping[str, tuple[bytes, bytes]]) -> str:
    """The page as text.

    Args:
        run: The run.
        plots: Name to PNG files in the light and the dark theme.
    """
    title = run.summary.get("title") or run.directory.resolve().name
    sections = [
        _headline(run),
        *(_figure(name, *plots[name]) for name in CAPTIONS if name in plots),
        _memory(run.summary),
        _samples(run.summary),
        _reproduce(run),
    ]
    body = "\n".join(section for section in sections if section)
    return _PAGE.format(title=html.escape(str(title)), style=_STYLE, state=html.escape(run.state), body=body)


# -- reading -------------------------------------------------------------------------------------------------


def _read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON lines file; a torn last line, as a killed process leaves it, does not count."""
    raw = path.read_text(encoding="utf-8", errors="replace").splitlines()
    lines = []
    for number, line in enumerate(raw, start=1):
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number < len(raw):
                raise ModelError(
                    f"{path} is damaged at line {number}: {error.msg}; delete that line"
                ) from error
    return [line for line in lines if isinstance(line, dict) and "step" in line]


def _by_step(lines: Iterable[dict[str, Any]], key: str) -> list[dict[str, Any]]:
    """The lines with a key, one a step in order: a resumed run repeats steps, the later line is true."""
    return [line for _, line in sorted({line["step"]: line for line in lines if key in line}.items())]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}
    except (ValueError, TypeError, RecursionError) as error:
        raise ModelError(f"{path} is damaged: {error}; delete it, or train again") from error


# -- sections ------------------------------------------------------------------------------------------------


def _headline(run: RunRecord) -> str:
    summary, last = run.summary, run.training[-1] if run.training else {}
    evaluated = run.evaluation[-1] if run.evaluation else {}
    val_loss, unigram = evaluated.get("val_loss"), summary.get("unigram_nats")
    below = unigram - val_loss if unigram is not None and val_loss is not None else None
    tokens, elapsed = last.get("tokens") or 0, last.get("elapsed") or 0.0
    flips = column(run.training, "flip_rate")[1]
    memory = (summary.get("memory") or [{}])[-1]
    share = memory["total"] / memory["fp32_adamw"] if memory.get("fp32_adamw") else math.nan
    cards = [
        ("validation loss", _number(val_loss, ".3f"), "nats a token"),
        ("below unigram", _number(below, ".2f"), "nats a token"),
        ("bits a byte", _number(evaluated.get("val_bpb"), ".3f"), "of held-out text"),
        ("parameters", _count(summary.get("parameters")), _stored(summary)),
        ("steps", _number(last.get("step"), ",d"), f"{_count(tokens)} tokens"),
        ("time", format_duration(elapsed) if elapsed else "", _speed(tokens, elapsed)),
        ("flip rate", _number(flips.mean() if len(flips) else None, ".2%"), "of codes a step, mean"),
        ("training state", _number(share, ".0%"), "of the bytes of FP32 AdamW"),
    ]
    shown = "".join(
        f'<div class="card"><h3>{name}</h3><b>{value}</b><small>{html.escape(note)}</small></div>'
        for name, value, note in cards
        if value
    )
    return f'<section class="cards">{shown}</section>'


def _figure(name: str, light: bytes, dark: bytes) -> str:
    title, caption = CAPTIONS[name]
    sources = [f"data:image/png;base64,{base64.b64encode(png).decode()}" for png in (light, dark)]
    return (
        f"<section><h2>{title}</h2><figure><picture>"
        f'<source media="(prefers-color-scheme: dark)" srcset="{sources[1]}">'
        f'<img src="{sources[0]}" alt="{title}: {html.escape(caption)}"></picture>'
        f"<figcaption>{html.escape(caption)}</figcaption></figure></section>"
    )


def _memory(summary: Mapping[str, Any]) -> str:
    rows = summary.get("memory") or []
    if not rows:
        return ""
    largest = max(row["fp32_adamw"] for row in rows) or 1
    head = "".join(f"<th>{name}</th>" for name in ("", "parameters", *_MEMORY_COLUMNS.values(), "share"))
    return (
        "<section><h2>Memory</h2><p>Bytes of the training state, as measured; bars: this run, FP32 AdamW.</p>"
        f'<div class="scroll"><table><thead><tr>{head}<th class="bars"></th></tr></thead>'
        f"<tbody>{''.join(_memory_row(row, largest) for row in rows)}</tbody></table></div></section>"
    )


def _memory_row(row: Mapping[str, Any], largest: int) -> str:
    ours, theirs = row["total"], row["fp32_adamw"]
    cells = [_count(row["parameters"]), *(format_bytes(row[key]) for key in _MEMORY_COLUMNS)]
    cells.append(f"{100 * ours / theirs:.1f} %" if theirs else "")
    bars = (
        f'<i style="width:{100 * ours / largest:.1f}%"></i>'
        f'<i class="other" style="width:{100 * theirs / largest:.1f}%"></i>'
    )
    values = "".join(f"<td>{cell}</td>" for cell in cells)
    return f'<tr><th>{html.escape(row["category"])}</th>{values}<td class="bars">{bars}</td></tr>'


def _samples(summary: Mapping[str, Any]) -> str:
    samples = summary.get("samples") or []
    if not samples:
        return ""
    pairs = [(html.escape(str(s.get("prompt", ""))), html.escape(str(s.get("text", "")))) for s in samples]
    texts = "".join(f"<pre><span>{prompt}</span>{text}</pre>" for prompt, text in pairs)
    return f"<section><h2>Samples</h2><p>The prompt is highlighted.</p>{texts}</section>"


def _reproduce(run: RunRecord) -> str:
    paths = [shlex.quote(str(path)) for path in (run.directory / "config.toml", f"{run.directory}-again")]
    again = f"dqt train {paths[0]} --out {paths[1]}"
    config = f"<details open><summary>config.toml</summary><pre>{html.escape(run.config)}</pre></details>"
    return (
        "<section><h2>Run it again</h2><p>The same codes and losses, bit for bit, on the same machine:</p>"
        f"<pre>{html.escape(again)}</pre>{config if run.config else ''}</section>"
    )


# -- numbers -------------------------------------------------------------------------------------------------


def _number(value: Any, spec: str) -> str:
    return format(value, spec) if isinstance(value, int | float) and math.isfinite(value) else ""


def _stored(summary: Mapping[str, Any]) -> str:
    bits, linear = summary.get("bits"), summary.get("linear_parameters")
    if not bits or not linear:
        return str(summary.get("method") or "")
    environment = {"bf16": ", BF16 around them", "fp8": ", emulated FP8 around them"}
    around = environment.get(str(summary.get("environment")), "")
    return f"{_count(linear)} of them {bits}{' bits' if bits != 'ternary' else ''}{around}"


def _speed(tokens: float, seconds: float) -> str:
    return f"{_count(tokens / seconds)} tokens a second" if seconds else ""


def _count(value: Any) -> str:
    """A number of things in three digits: 6.29M."""
    if not isinstance(value, int | float) or not math.isfinite(value):
        return ""
    for unit, suffix in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= unit:
            return f"{value / unit:.3g}{suffix}"
    return f"{value:.0f}"


_STYLE = """
:root { color-scheme: light dark; --paper: #ffffff; --ink: #1f2328; --soft: #59636e; --line: #d0d7de;
  --box: #f6f8fa; --accent: #0969da; --other: #b6bec8; }
@media (prefers-color-scheme: dark) { :root { --paper: #0d1117; --ink: #e6edf3; --soft: #9198a1;
  --line: #3d444d; --box: #161b22; --accent: #58a6ff; --other: #57606a; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 60rem; padding: 1.5rem 1rem 3rem; background: var(--paper);
  color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
header { display: flex; flex-wrap: wrap; align-items: baseline; gap: .75rem;
  border-bottom: 1px solid var(--line); }
h1 { font-size: 1.6rem; margin: 0 0 .5rem; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; }
p, figcaption { color: var(--soft); margin: .25rem 0 .5rem; font-size: .9rem; }
.state { border: 1px solid var(--line); border-radius: 1rem; padding: 0 .7rem; font-size: .85rem; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(12.5rem, 45%), 1fr));
  gap: .75rem; margin-top: 1rem; }
.card { background: var(--box); border: 1px solid var(--line); border-radius: .5rem; padding: .7rem .9rem; }
.card h3 { font-size: .8rem; font-weight: 500; color: var(--soft); margin: 0; }
.card b { display: block; font-size: 1.35rem; white-space: nowrap; font-variant-numeric: tabular-nums; }
.card small { color: var(--soft); }
figure { margin: 0; }
figure img { width: 100%; height: auto; border: 1px solid var(--line); border-radius: .5rem; display: block; }
pre { background: var(--box); border: 1px solid var(--line); border-radius: .5rem; padding: .8rem;
  margin: .5rem 0; overflow-x: auto; font: 13px/1.5 ui-monospace, monospace; white-space: pre-wrap;
  overflow-wrap: anywhere; }
pre span { color: var(--accent); font-weight: 600; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .88rem; font-variant-numeric: tabular-nums; }
th, td { padding: .4rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
tbody th { text-align: left; font-weight: 500; }
tbody tr:last-child { font-weight: 650; }
.bars { width: 18%; min-width: 4rem; }
.bars i { display: block; height: .45rem; margin: .12rem 0; background: var(--accent); border-radius: .2rem; }
.bars .other { background: var(--other); }
@media (max-width: 40rem) { .bars { display: none; } }
summary { cursor: pointer; color: var(--soft); }
"""

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title} - dqt</title>
<style>{style}</style>
</head>
<body>
<header><h1>{title}</h1><span class="state">{state}</span></header>
{body}
</body>
</html>
"""
