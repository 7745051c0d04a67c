"""Tasks through lm-eval: the scores are those of the definition, and name the model that they are of."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import lm_eval
import pytest
import torch

from dqt import harness
from dqt.cli import main
from dqt.harness import DATA, OFFLINE, score
from dqt.train.savedmodel import load_model
from export_helpers import saved_model


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # A context that holds every example.
    return saved_model(tmp_path_factory.mktemp("harness"), sizes={"seq_len": 512})


def log_likelihood(model: Any, context: list[int], ids: list[int]) -> float:
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([(context + ids)[:-1]])).logits[0].float()
    found = torch.log_softmax(logits, -1)[len(context) - 1 :]
    return float(found.gather(1, torch.tensor(ids)[:, None]).sum())


def examples(name: str) -> list[dict[str, Any]]:
    lines = (DATA / OFFLINE[name][0]).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def test_scores_are_those_of_the_definition(run: Path) -> None:
    model, tokenizer, _ = load_model(run)

    def encode(text: str) -> list[int]:
        return tokenizer.core.encode(text, add_special_tokens=False).ids

    scores = score(run, ["offline"])
    assert scores.samples == {name: len(examples(name)) for name in OFFLINE}
    for name in ("dqt_code", "dqt_english"):
        right = 0
        for example in examples(name):
            context = encode(example["context"])
            found = []
            for choice in example["choices"]:
                ids = encode(example["context"] + choice)
                found.append(log_likelihood(model, ids[: len(context)], ids[len(context) :]))
            right += found.index(max(found)) == example["answer"]
        assert scores.results[name]["acc"] == pytest.approx(right / len(examples(name)))
    nats = sum(log_likelihood(model, [tokenizer.end_id], encode(e["text"])) for e in examples("dqt_text"))
    size = sum(len(e["text"].encode()) for e in examples("dqt_text"))
    bits = -nats / size / torch.log(torch.tensor(2.0)).item()
    assert scores.results["dqt_text"]["bits_per_byte"] == pytest.approx(bits, rel=1e-3)


def test_every_example_has_one_answer_and_its_place_varies() -> None:
    for name in ("dqt_code", "dqt_english"):
        found = examples(name)
        assert len({example["context"] for example in found}) == len(found)
        assert all(len(set(example["choices"])) == 4 for example in found)
        assert {example["answer"] for example in found} == {0, 1, 2, 3}


def test_the_hash_is_that_of_the_model(run: Path, tmp_path: Path) -> None:
    other = saved_model(tmp_path, bits=4, sizes={"seq_len": 512})
    hashes = [score(path, ["dqt_text"], limit=1).sha256 for path in (run, run / "model", other)]
    assert hashes[0] == hashes[1] != hashes[2]


def test_json(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", str(run), "--tasks", "dqt_english", "--limit", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["model"] == {"path": str(run / "model"), "sha256": harness.model_hash(run / "model")}
    assert found["samples"] == {"dqt_english": 2}
    assert set(found["results"]["dqt_english"]) == {"acc", "acc_stderr", "acc_norm", "acc_norm_stderr"}


def test_a_task_that_is_none_of_ours(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As lm-eval's own, a YAML file that names a data set; but this one lies here."""
    data = {"data_files": {"test": str(DATA / "code.jsonl")}, "cache_dir": str(tmp_path / "cache")}
    task = {"task": "theirs", "dataset_path": "json", "dataset_kwargs": data, "test_split": "test"}
    (tmp_path / "theirs.yaml").write_text(json.dumps(task | harness._CHOICE))
    original = harness._manager
    monkeypatch.setattr(
        harness, "_manager", lambda **_: original(include_defaults=False, include_path=[tmp_path])
    )
    scores = score(run, ["theirs", "dqt_code"], limit=3)
    assert scores.samples == {"theirs": 3, "dqt_code": 3}
    assert scores.results["theirs"] == scores.results["dqt_code"]


def only_folders(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """Lets lm-eval index some of its folders of tasks, and not all ten thousand files."""
    folders = [Path(lm_eval.__file__).parent / "tasks" / name for name in names]
    original = harness._manager
    monkeypatch.setattr(
        harness, "_manager", lambda **_: original(include_defaults=False, include_path=folders)
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--tasks oflfine", "did you mean 'offline'?"),
        ("--tasks dqt_code,,", "unknown task ''"),
        ("--tasks offline --limit 0", "at least 1, not 0"),
        ("--tasks offline --windows 3", "leave --text and --windows out"),
    ],
)
def test_bad_input(
    arguments: str,
    message: str,
    run: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    only_folders(monkeypatch)
    assert main(["eval", str(run), *arguments.split()]) == 2
    assert message in capsys.readouterr().err


def test_a_missing_harness_is_named(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert main(["eval", str(run), "--tasks", "offline"]) == 2
    assert "pip install 'dqt[eval]'" in capsys.readouterr().err


def test_data_that_cannot_be_had(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(OFFLINE, "dqt_text", ("none.jsonl", OFFLINE["dqt_text"][1]))
    assert main(["eval", str(run), "--tasks", "dqt_text"]) == 2
    assert "the data of dqt_text can't be had" in capsys.readouterr().err


def test_the_paper_is_one_name(monkeypatch: pytest.MonkeyPatch) -> None:
    only_folders(
        monkeypatch, "wikitext", "arc", "hellaswag", "super_glue", "openbookqa", "piqa", "winogrande"
    )
    tasks, manager = harness._find_tasks(["paper"])
    assert [task if isinstance(task, str) else task["task"] for task in tasks] == list(harness.PAPER)
    assert set(harness.PAPER) - {"dqt_fineweb"} <= set(manager.all_tasks)
