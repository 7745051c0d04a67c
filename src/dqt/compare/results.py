"""What a comparison came to: a table for people, CSV and JSON for programs, plots.

    results.md     the table            arms.csv, results.json   the same, and all that it is made from
    runs.csv       a line a run         frontier.png, curves.png, flips.png

All of them are written whenever a comparison ends, by Ctrl-C too, from what has been run until then.
"""

from __future__ import annotations

import csv
import io
import math
import platform
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from dqt import __version__
from dqt.compare.experiment import ArmResult, Experiment
from dqt.compare.runs import Outcome, Run
from dqt.compare.statistics import Estimate, estimate, paired_difference
from dqt.memory import CATEGORIES
from dqt.models import build_config, count_parameters
from dqt.sizes import format_bytes
from dqt.train import storage
from dqt.train.config import Config, required
from dqt.train.metrics import finite

QUICK_WARNING = "A quick run: it shows that the suite runs; its losses mean nothing."


def collect(experiment: Experiment) -> dict[str, Any]:
    """All results as plain values, as `results.json` has them."""
    suite = experiment.suite
    by_name = {result.arm.name: result for result in experiment.results}
    columns = list(dict.fromkeys([*suite.against, *(c for arm in suite.arms for c in suite.against_of(arm))]))
    return {
        "format_version": storage.FORMAT_VERSION,
        "suite": suite.name,
        "question": suite.question,
        "quick": experiment.quick,
        "interrupted": experiment.interrupted,
        "seeds": list(experiment.seeds),
        "paired": len({tokens_a_step(each.config) for each in experiment.trained}) == 1
        and len({each.config.train.seq_len for each in experiment.trained}) == 1,
        "tuned": experiment.tuned,
        "versions": {"dqt": __version__, "python": platform.python_version(), "torch": torch.__version__},
        "data": [
            {
                "source": corpus.manifest.get("source"),
                "hash": corpus.hash,
                "unigram_nats": corpus.unigram_nats,
            }
            for corpus in experiment.corpora.values()
        ],
        "columns": columns,
        "arms": [_arm(result, by_name, suite.against_of(result.arm)) for result in experiment.results],
    }


def _arm(result: ArmResult, by_name: Mapping[str, ArmResult], against: Mapping[str, str]) -> dict[str, Any]:
    loss = estimate(result.losses.values())
    summary = next((each.summary for each in result.outcomes.values() if each.summary), {})
    memory = {row["category"]: row for row in summary.get("memory", [])}
    linear, total = memory.get(CATEGORIES[0]), memory.get("total")
    flips = [each.flip_rate for each in result.outcomes.values() if math.isfinite(each.flip_rate)]
    model, train = result.config.model, result.config.train
    count = count_parameters(
        build_config(required(model.preset), required(model.arch), overrides=model.overrides)
    )
    return {
        "arm": result.arm.name,
        "config": result.config.to_dict(),
        "linear_weights": count.linear,
        "tokens": required(train.steps) * tokens_a_step(result.config),
        "lr": result.rate,
        "loss": _numbers(loss),
        "gaps": {
            column: {"arm": other, **_numbers(paired_difference(result.losses, by_name[other].losses))}
            for column, other in against.items()
            if other in by_name
        },
        "bytes_a_weight": linear and (linear["weights"] + linear["optimizer"]) / linear["parameters"],
        "state_bytes": total and total["total"],
        "flip_rate": sum(flips) / len(flips) if flips else None,
        "notes": result.notes,
        "tuning": [
            {"lr": rate, **_outcome(result.tuning[rate], outcome)}
            for rate, outcome in sorted(result.tuning_outcomes.items())
        ],
        "runs": [_outcome(result.runs[seed], outcome) for seed, outcome in result.outcomes.items()],
    }


def tokens_a_step(config: Config) -> int:
    """How many tokens an update learns from."""
    train = config.train
    return required(train.batch_size) * required(train.accumulation) * required(train.seq_len)


def _numbers(found: Estimate) -> dict[str, Any]:
    return {"mean": finite(found.mean), "half": finite(found.half), "values": list(found.values)}


def _outcome(run: Run, outcome: Outcome) -> dict[str, Any]:
    return {
        "seed": run.seed,
        "state": outcome.state,
        "val_loss": finite(outcome.loss),
        "val_bpb": outcome.summary.get("val_bpb"),
        "step": outcome.step,
        "seconds": outcome.summary.get("seconds"),
        "error": outcome.error,
        "directory": str(run.directory.path),
    }


# -- the table -----------------------------------------------------------------------------------------------


def to_markdown(content: Mapping[str, Any]) -> str:
    """The table, with what a reader must know above it."""
    seeds = len(content["seeds"])
    head = [f"{content['suite']}: {content['question']}", ""]
    if content["quick"]:
        head += [QUICK_WARNING, ""]
    if content["interrupted"]:
        head += ["Interrupted: not all runs are there.", ""]
    rates = (
        "each at its best learning rate of shorter runs" if content["tuned"] else "learning rates not tuned"
    )
    plural = "s (paired: equal text, order and random words)" if content["paired"] else "s"
    plural = plural if seeds > 1 else ""
    head += [f"Validation loss in nats a token; {seeds} seed{plural}, ± 95 %; {rates}.", ""]
    columns = content["columns"]
    titles = ["arm", "lr", "loss", *(f"against {name}" for name in columns)]
    titles += ["bytes a weight", "training state", "flips a step", "notes"]
    lines = [_line(titles), _line("---" for _ in titles)]
    for arm in content["arms"]:
        gaps = [_estimate(arm["gaps"][name], "+.4f") if name in arm["gaps"] else "" for name in columns]
        cells = [
            arm["arm"],
            "" if arm["lr"] is None else f"{arm['lr']:.3g}",
            _estimate(arm["loss"], ".4f"),
            *gaps,
            "" if arm["bytes_a_weight"] is None else f"{arm['bytes_a_weight']:.2f}",
            "" if arm["state_bytes"] is None else format_bytes(arm["state_bytes"]),
            "" if arm["flip_rate"] is None else f"{arm['flip_rate']:.3%}",
            "; ".join(arm["notes"]),
        ]
        lines.append(_line(cells))
    return "\n".join([*head, *lines]) + "\n"


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _estimate(found: Mapping[str, Any], form: str) -> str:
    if found["mean"] is None:
        return ""
    mean = f"{found['mean']:{form}}"
    return mean if found["half"] is None else f"{mean} ± {found['half']:.4f}"


# -- files ---------------------------------------------------------------------------------------------------


def write(experiment: Experiment, folder: Path) -> dict[str, Any]:
    """Writes every file, and returns the content of `results.json`."""
    from dqt.compare.figures import draw_all

    content = collect(experiment)
    folder.mkdir(parents=True, exist_ok=True)
    storage.write_text(folder / "results.json", storage.to_json(content))
    storage.write_text(folder / "results.md", to_markdown(content))
    storage.write_text(folder / "arms.csv", _csv(_arm_rows(content)))
    storage.write_text(folder / "runs.csv", _csv(_run_rows(content)))
    for name, png in draw_all(content).items():
        (folder / f"{name}.png").write_bytes(png)
    return content


def _arm_rows(content: Mapping[str, Any]) -> list[dict[str, Any]]:
    rows = []
    for arm in content["arms"]:
        row = {key: arm[key] for key in ("arm", "linear_weights", "tokens", "lr")}
        row |= {
            "loss": arm["loss"]["mean"],
            "loss_half": arm["loss"]["half"],
            "seeds": len(arm["loss"]["values"]),
        }
        for column in content["columns"]:
            gap = arm["gaps"].get(column, {})
            row |= {f"against {column}": gap.get("mean"), f"against {column}, half": gap.get("half")}
        row |= {key: arm[key] for key in ("bytes_a_weight", "state_bytes", "flip_rate")}
        rows.append({**row, "notes": "; ".join(arm["notes"])})
    return rows


def _run_rows(content: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [
        {"arm": arm["arm"], "stage": stage, "lr": run.get("lr", arm["lr"]), **run}
        for arm in content["arms"]
        for stage in ("tuning", "runs")
        for run in arm[stage]
    ]


def _csv(rows: list[dict[str, Any]]) -> str:
    text = io.StringIO()
    if rows:
        writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return text.getvalue()
