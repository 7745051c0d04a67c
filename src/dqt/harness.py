"""`dqt eval --tasks`: lm-eval's tasks on a model as it is, in packed weights and with integer products.

lm-eval (an extra) brings the tasks, the prompts and the scores; this hands it the model. Most of its tasks
fetch their data from a hub. Three come with `dqt` and need no network: they are small, made to notice that
something is broken and to run in CI, not to rank models. The group `paper` is for those with a hub: see
`PAPER`.

A result carries the SHA-256 of what was scored, so that two results can't be taken for the same model's.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import logging
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dqt.errors import ConfigError, DataError, did_you_mean
from dqt.extras import require

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DATA = Path(__file__).parent / "tasks"

_CHOICE = {
    "output_type": "multiple_choice",
    "doc_to_text": "{{context}}",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "{{answer}}",
    "target_delimiter": "",
    "metric_list": [
        {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
        {"metric": "acc_norm", "aggregation": "mean", "higher_is_better": True},
    ],
}
_TEXT = {
    "output_type": "loglikelihood_rolling",
    "doc_to_text": "",
    "doc_to_target": "{{text}}",
    "should_decontaminate": False,
    "metric_list": [
        {"metric": "word_perplexity"},
        {"metric": "byte_perplexity"},
        {"metric": "bits_per_byte"},
    ],
}
# Tasks that come with dqt: the file of their data, and lm-eval's settings.
OFFLINE: dict[str, tuple[str, dict[str, Any]]] = {
    "dqt_code": ("code.jsonl", _CHOICE),
    "dqt_english": ("english.jsonl", _CHOICE),
    "dqt_text": ("text.jsonl", _TEXT),
}
# Perplexity on the two texts of the paper, and the zero-shot tasks of the BitNet line of papers, to which it
# compares itself. The paper's own list could not be checked here, and this was never run: it wants a hub.
PAPER = (
    "wikitext",
    "dqt_fineweb",
    *("arc_easy", "arc_challenge", "hellaswag", "boolq", "openbookqa", "piqa", "winogrande"),
)
FINEWEB_DOCUMENTS = 500
GROUPS: dict[str, tuple[str, ...]] = {"offline": tuple(OFFLINE), "paper": PAPER}


@dataclass(frozen=True)
class Scores:
    """What lm-eval found.

    Attributes:
        model: The directory that was scored.
        sha256: Its hash, see `model_hash`.
        results: Task to metric to value.
        samples: Task to how many of its examples were scored.
    """

    model: str
    sha256: str
    results: dict[str, dict[str, float]]
    samples: dict[str, int]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        from importlib.metadata import version

        model = {"path": self.model, "sha256": self.sha256}
        return {
            "model": model,
            "lm_eval": version("lm_eval"),
            "results": self.results,
            "samples": self.samples,
        }

    def __str__(self) -> str:
        lines = [f"model sha256 {self.sha256}"]
        for task, metrics in self.results.items():
            for name, value in metrics.items():
                error = metrics.get(f"{name}_stderr")
                if not name.endswith("_stderr"):
                    spread = f" ± {error:.4f}" if error else ""
                    lines.append(
                        f"{task:16} {name:16} {value:10.4f}{spread}  ({self.samples[task]:,} examples)"
                    )
        return "\n".join(lines)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what `dqt eval` takes for tasks."""
    parser.add_argument(
        "--tasks",
        metavar="NAMES",
        help="score lm-eval tasks instead: offline, paper, or names with commas between (wants dqt[eval])",
    )
    parser.add_argument("--limit", type=int, metavar="N", help="at most as many examples of each task")


def run(arguments: argparse.Namespace) -> int:
    """Runs `dqt eval RUN --tasks`."""
    if arguments.text or arguments.windows is not None:
        raise ConfigError("--tasks bring their own text: leave --text and --windows out")
    scores = score(arguments.directory, arguments.tasks.split(","), arguments.limit)
    print(json.dumps(scores.to_dict(), indent=2, ensure_ascii=False) if arguments.json else scores)
    return 0


def score(directory: Path, names: list[str], limit: int | None = None) -> Scores:
    """Scores a finished model.

    Args:
        directory: A run, or its `model/`.
        names: Tasks and groups: of `OFFLINE`, of `GROUPS`, or of lm-eval.
        limit: At most as many examples of each task; None takes all.

    Raises:
        ConfigError: If lm-eval is missing, or a task unknown.
        DataError: If a task's data can't be had.
        ModelError: If there is no finished model.
    """
    if limit is not None and limit < 1:
        raise ConfigError(f"--limit must be at least 1, not {limit}")
    require("lm_eval", "eval")
    tasks, manager = _find_tasks(names)

    from lm_eval import simple_evaluate
    from transformers import AutoTokenizer

    from dqt.train.savedmodel import find_model, load_model, precision

    model, _, info = load_model(directory)
    path = find_model(directory)
    tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    with _quiet(), precision(info):
        try:
            found = simple_evaluate(
                _harness_model(model, tokenizer),
                tasks=tasks,
                task_manager=manager,
                limit=limit,
                log_samples=False,
                bootstrap_iters=100,
            )
        except (OSError, ConnectionError, ImportError) as error:  # of huggingface_hub and datasets
            reason = " ".join(str(error).split())[:200]
            raise DataError(f"the data of {', '.join(names)} can't be had: {reason}") from error
    results = {task: _metrics(values) for task, values in found["results"].items()}
    samples = {task: count["effective"] for task, count in found["n-samples"].items()}
    return Scores(str(path), model_hash(path), {t: m for t, m in results.items() if t in samples}, samples)


def model_hash(path: Path) -> str:
    """SHA-256 over the names and SHA-256 of a model's files.

    They are those of the manifest, which loading has compared with the files; `save_pretrained` writes none.
    """
    from dqt.train.storage import MANIFEST, load_json, sha256

    if (path / MANIFEST).is_file():
        files = {name: entry["sha256"] for name, entry in load_json(path / MANIFEST)["files"].items()}
    else:
        files = {file.name: sha256(file) for file in path.iterdir() if file.is_file()}
    lines = [f"{name} {digest}\n" for name, digest in sorted(files.items())]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _find_tasks(names: list[str]) -> tuple[list[Any], Any]:
    """lm-eval's tasks by name, ours as their settings, and the manager that knows both."""
    wanted = [task.strip() for name in names for task in GROUPS.get(name.strip(), (name,))]
    ours = {**{name: _offline(name) for name in OFFLINE}, "dqt_fineweb": _fineweb()}
    # Without lm-eval's own, 0.1 s instead of many, in which it reads ten thousand files.
    manager = _manager(include_defaults=not set(wanted) <= set(ours))
    known = [*GROUPS, *ours, *manager.all_tasks]
    for name in wanted:
        if name not in known:
            raise ConfigError(f"unknown task {name!r}; {_nearest(name, known)}")
    return [ours.get(name, name) for name in wanted], manager


def _manager(**arguments: Any) -> Any:
    with _quiet():
        from lm_eval.tasks import TaskManager

        return TaskManager(**arguments)


def _nearest(name: str, known: list[str]) -> str:
    """A hint; lm-eval's own thousands of names are not listed."""
    nearest, _, valid = did_you_mean(name, known).rpartition("valid: ")
    listed = ", ".join([*GROUPS, *OFFLINE])
    return f"{nearest}here: {listed}; lm-eval's: lm-eval ls tasks" if valid else nearest


def _offline(name: str) -> dict[str, Any]:
    file, settings = OFFLINE[name]

    def read(**_: Any) -> dict[str, Any]:
        from datasets import Dataset

        lines = (DATA / file).read_text(encoding="utf-8").splitlines()
        return {"test": Dataset.from_list([json.loads(line) for line in lines])}

    return {"task": name, "custom_dataset": read, "test_split": "test", **settings}


def _fineweb() -> dict[str, Any]:
    """The first documents of FineWeb's sample, streamed, as far as the name of a data set fixes them."""

    def read(**_: Any) -> dict[str, Any]:
        from datasets import Dataset, load_dataset

        stream = load_dataset("HuggingFaceFW/fineweb", "sample-10BT", split="train", streaming=True)
        return {"test": Dataset.from_list([{"text": row["text"]} for row in stream.take(FINEWEB_DOCUMENTS)])}

    return {"task": "dqt_fineweb", "custom_dataset": read, "test_split": "test", **_TEXT}


def _harness_model(model: PreTrainedModel, tokenizer: Any) -> Any:
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=8)


def _metrics(values: dict[str, Any]) -> dict[str, float]:
    """lm-eval's "acc,none" as "acc"; only numbers that are scores."""
    return {
        key.partition(",")[0]: float(value)
        for key, value in values.items()
        if "," in key and isinstance(value, int | float)
    }


@contextlib.contextmanager
def _quiet() -> Any:
    """Without the warnings and progress of lm-eval and what it imports."""
    level = logging.root.manager.disable
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(level)
