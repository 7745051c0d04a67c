"""The command line: what it does end to end, and how it answers bad input."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from dqt.cli import main
from train_helpers import STDLIB

TEXT = [str(path) for path in sorted(STDLIB.glob("*.py"))]
SETTINGS = {
    "model.hidden_size": 32,
    "model.intermediate_size": 64,
    "model.num_attention_heads": 2,
    "data.vocab_size": 300,
    "train.eval_windows": 3,
    "train.sample_tokens": 5,
    "train.threads": 1,
}
MICRO = [
    *("--preset", "micro", "--seq-len", "16", "--batch-size", "2"),
    *(part for key, value in SETTINGS.items() for part in ("--set", f"{key}={value}")),
]


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Text is prepared once for all tests here, and never in the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DQT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished ternary run."""
    directory = tmp_path_factory.mktemp("runs") / "ternary"
    assert main(["train", *MICRO, "--text", *TEXT, "--steps", "6", "--out", str(directory)]) == 0
    return directory


def files(directory: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


# -- commands that work --------------------------------------------------------------------------------------


def test_train_writes_everything(run: Path) -> None:
    names = {path.name for path in run.iterdir()}
    assert names == {
        "checkpoints",
        "config.toml",
        "metrics.jsonl",
        "model",
        "plots",
        "report.html",
        "run.json",
    }


def test_train_says_what_came_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *MICRO, "--text", *TEXT, "--steps", "2", "--out", str(tmp_path / "run")]) == 0
    out = capsys.readouterr().out
    for wanted in (
        r"step 2/2",
        r"validation loss \d",
        r"bits a byte",
        r"FP32 AdamW",
        r"sample",
        r"report\.html",
    ):
        assert re.search(wanted, out)


def test_the_config_beside_a_run_reproduces_it(run: Path, tmp_path: Path) -> None:
    assert main(["train", str(run / "config.toml"), "--out", str(tmp_path / "again")]) == 0
    for file in ("model/model.safetensors", "checkpoints/step-000006/optimizer.safetensors"):
        assert (tmp_path / "again" / file).read_bytes() == (run / file).read_bytes()


def test_flags_override_the_config(run: Path, tmp_path: Path) -> None:
    arguments = ["--out", str(tmp_path / "r"), "--steps", "1", "--bits", "4", "--seed", "3", "--lr", "1e-4"]
    assert (
        main(["train", str(run / "config.toml"), *arguments, "--method", "strict"]) == 2
    )  # residual_bits is 8
    arguments += ["--set", "optim.betas=[0.5, 0.9]", "--set", "quant.scale_rule=absmax"]
    assert main(["train", *MICRO, "--text", *TEXT, *arguments]) == 0
    config = (tmp_path / "r" / "config.toml").read_text()
    for line in ("steps = 1", 'bits = "4"', "seed = 3", "lr = 0.0001", "0.5,", 'scale_rule = "absmax"'):
        assert line in config


def test_resume_goes_on(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(run, tmp_path / "run")
    again = ["train", str(run / "config.toml"), "--out", str(tmp_path / "run"), "--resume", "auto"]
    assert main(again) == 2  # has all of its steps
    assert main([*again, "--steps", "8"]) == 0
    assert "resumed from" in capsys.readouterr().out


def test_resume_from_a_path_needs_no_config(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(run, tmp_path / "run")
    assert main(["train", "--resume", str(tmp_path / "run"), "--steps", "8"]) == 0
    assert "resumed from" in capsys.readouterr().out
    assert json.loads((tmp_path / "run" / "run.json").read_text())["summary"]["step"] == 8


def test_eval_on_held_out_text_gives_the_loss_of_the_run(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained = json.loads((run / "run.json").read_text())["summary"]
    for directory in (run, run / "model"):
        assert main(["eval", str(directory), "--json"]) == 0
        facts = json.loads(capsys.readouterr().out)
        assert facts["loss"] == pytest.approx(trained["val_loss"], rel=1e-6)
        assert facts["bits_per_byte"] == pytest.approx(trained["val_bpb"], rel=1e-6)
    assert main(["eval", str(run)]) == 0
    assert f"{trained['val_loss']:.4f}" in capsys.readouterr().out


def test_eval_on_other_text(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.txt").write_text("Some text to predict. " * 20)
    assert main(["eval", str(run / "model"), "--text", str(tmp_path), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["perplexity"] > 1
    assert facts["bytes"] <= 440


def test_sample_is_a_function_of_the_seed(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def sample(*arguments: str) -> str:
        assert main(["sample", str(run), "--prompt", "def f(", "--tokens", "30", *arguments]) == 0
        return capsys.readouterr().out

    assert sample("--seed", "1") == sample("--seed", "1")
    assert sample("--seed", "1") != sample("--seed", "2")
    assert sample("--temperature", "0", "--seed", "1") == sample("--temperature", "0", "--seed", "2")
    assert sample().startswith("def f(")


@pytest.mark.parametrize("part", ["", "model", "checkpoints/step-000006"])
def test_inspect_reads_runs_models_and_checkpoints(
    part: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", str(run / part), "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["quantized"]["tensors"] == 14  # 7 of each of the 2 layers
    assert content["quantized"]["bits_per_weight"] == pytest.approx(2, abs=0.1)
    assert content["float_copies"] == []
    assert main(["inspect", str(run / part)]) == 0
    assert "no float copy of a low-bit weight exists" in capsys.readouterr().out


def test_inspect_takes_the_newest_checkpoint_of_a_killed_run(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "model")
    assert main(["inspect", str(tmp_path / "run")]) == 0
    assert "2.0" in capsys.readouterr().out


def test_report_and_doctor(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "report.html").unlink()
    assert main(["report", str(run)]) == 0
    assert capsys.readouterr().out.strip() == str(run / "report.html")
    assert (run / "report.html").is_file()
    assert main(["doctor", "--json"]) == 0
    assert "torch" in {finding["topic"] for finding in json.loads(capsys.readouterr().out)}


@pytest.mark.parametrize(
    "arguments", [[], ["--help"], ["--version"], ["train", "--help"], ["inspect", "--help"]]
)
def test_help(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert "dqt" in out
    if arguments in ([], ["--help"]):
        assert all(name in out for name in ("train", "eval", "sample", "inspect", "report", "doctor"))


# -- bad input -----------------------------------------------------------------------------------------------

# command line -> fragment of the message. {run} is a finished run, {tmp} the folder of `bad_files`.
BAD_INPUT: dict[str, str] = {
    "trian": "unknown command 'trian'; did you mean 'train'?",
    "train --stesp 5": "unknown argument '--stesp'; did you mean '--steps'?",
    "train --steps many": "invalid int value: 'many'",
    "train --steps": "expected one argument",
    "train --bits 9": "unknown bits '9'; valid: 1, ternary, 2",
    "train --bits trenary": "did you mean 'ternary'?",
    "train --method resdual": "did you mean 'residual'?",
    "train --method fp32 --bits 4": "fp32",
    "train --method paper --bits 1": "1-bit",
    "train --preset tinny": "unknown preset 'tinny'; did you mean 'tiny'?",
    "train --arch lama": "unknown arch 'lama'; did you mean 'llama'?",
    "train --data stdlibb": "did you mean 'stdlib'?",
    "train --steps 0": "train.steps = 0 makes no sense",
    "train --steps -3": "train.steps = -3 makes no sense",
    "train --seq-len 0": "train.seq_len = 0 makes no sense",
    "train --batch-size 0": "train.batch_size = 0 makes no sense",
    "train --lr 0": "optim.lr = 0.0 makes no sense",
    "train --lr nan": "optim.lr = nan makes no sense",
    "train --lr inf": "optim.lr = inf makes no sense",
    "train --seed -1": "train.seed = -1 makes no sense",
    "train --set optim.epsilon=1": "unknown key optim.epsilon; did you mean 'eps'?",
    "train --set optim": "write KEY=VALUE",
    "train --set train.steps=soon": "train.steps must be a whole number, not 'soon'",
    "train tiny": "did you mean --preset tiny?",
    "train {tmp}/none.toml": "there is no config file",
    "train {tmp}/broken.toml": "is no valid TOML",
    "train {tmp}/key.toml": "did you mean 'steps'?",
    "train {tmp}/section.toml": "did you mean 'train'?",
    "train --text {tmp}/none.txt": "none.txt does not exist",
    "train --set data.text=5": "data.text must be a list, not 5",
    "train --set data.text=[1,2]": "data.text must be a string, not 1",
    "train --set model.hidden_size=0": "model.hidden_size = 0 makes no sense: use 1 or more",
    "train --text {tmp}/empty.txt": "empty.txt is empty",
    "train --text {tmp}/binary.txt": "binary.txt is binary (a NUL byte at offset 3)",
    "train --text {tmp}/latin.txt": "latin.txt is not UTF-8: byte 0xe9 at offset 3",
    "train --text {tmp}/short.txt": "too little text",
    "train --text {tmp}/short.txt --data stdlib": "give one of them",
    "train --resume {tmp}/none": "there is no such directory",
    "train --resume {tmp}": "neither a checkpoint nor a run",
    "train --resume auto --overwrite": "choose one",
    "train --out {run}": "holds a finished run: choose another --out, or replace it by --overwrite",
    "train --out {tmp}/short.txt": "is a file, not a directory",
    "train --out {tmp}/short.txt/below": "is a file, not a directory",
    "train --out {tmp}": "holds other files",
    "eval {tmp}/none": "there is no directory",
    "eval {tmp}": "holds no model",
    "eval {run} --text {tmp}/none.txt": "none.txt does not exist",
    "eval {run} --text {tmp}/latin.txt": "offset 3",
    "eval {run} --windows 0": "--windows must be at least 1",
    "eval {run} --limit 5": "--limit is about the examples of --tasks",
    "eval": "required: RUN",
    "sample {tmp}": "holds no model",
    "sample {run} --tokens 0": "must be at least 1, not 0",
    "sample {run} --temperature -1": "temperature must be between",
    "sample {run} --temperature nan": "temperature must be between",
    "inspect {tmp}": "holds no model",
    "report {tmp}": "is not a run directory",
    "report {tmp}/none": "there is no directory",
    "doctor --jsno": "did you mean '--json'?",
    "inspect {damaged}": "differs from the SHA-256",
    "eval {newer}": "update dqt",
    "sample {tokenizer}": "tokenizer",
    "eval {changed}": "the text has changed since",
}


@pytest.fixture(scope="module")
def bad_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bad")
    contents = {
        "broken.toml": b"[train\n",
        "key.toml": b"[train]\nstep = 5\n",
        "section.toml": b"[trian]\nsteps = 5\n",
        "empty.txt": b"",
        "binary.txt": b"abc\0def",
        "latin.txt": b"caf\xe9 au lait, a longer text",
        "short.txt": b"A short text.\nOf two lines.\n",
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    return folder


def flip_a_byte(model: Path) -> None:
    path = model / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def make_newer(model: Path) -> None:
    path = model / "dqt.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format_version": 99}))


def remove_tokenizer(model: Path) -> None:
    (model / "tokenizer.json").unlink()


def change_data(model: Path) -> None:
    config = model.parent / "config.toml"
    config.write_text(re.sub(r"val_fraction = [0-9.]+", "val_fraction = 0.2", config.read_text()))


DAMAGE: dict[str, Callable[[Path], None]] = {
    "damaged": flip_a_byte,
    "newer": make_newer,
    "tokenizer": remove_tokenizer,
    "changed": change_data,
}


@pytest.mark.parametrize("command", BAD_INPUT)
def test_bad_input(
    command: str,
    run: Path,
    bad_files: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    places = {"run": run, "tmp": bad_files}
    for name, damage in DAMAGE.items():
        if f"{{{name}}}" in command:
            places[name] = tmp_path / name
            shutil.copytree(run, places[name])
            damage(places[name] / "model")
    before = {place: files(path) for place, path in places.items()}
    here = sorted(tmp_path.iterdir())

    name, *arguments = command.format(**places).split()
    if name == "train":  # everything else is as it should be, and small
        text = [] if {"--text", "--data"} & set(arguments) else ["--text", *TEXT]
        arguments = [*text, *MICRO, *arguments]
    assert main([name, *arguments]) == 2

    captured = capsys.readouterr()
    assert captured.err.startswith("dqt: error: ")
    assert BAD_INPUT[command] in captured.err
    assert len(captured.err.strip().splitlines()) <= 2
    assert {place: files(path) for place, path in places.items()} == before, "something was written or lost"
    assert sorted(tmp_path.iterdir()) == here, "something was written"


def test_an_output_directory_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
    assert main(["train", *MICRO, "--text", *TEXT, "--out", str(tmp_path / "run")]) == 2
    assert "can't be written" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


# -- the process ---------------------------------------------------------------------------------------------


def start(*arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "dqt", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_ctrl_c_leaves_a_usable_result(tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = start("train", *MICRO, "--text", *TEXT, "--steps", "100000", "--out", str(run))
    deadline = time.monotonic() + 120
    while not (run / "metrics.jsonl").is_file() or not (run / "metrics.jsonl").stat().st_size:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130
    assert err == ""
    assert "interrupted after" in out
    assert (run / "report.html").is_file()
    assert main(["inspect", str(run)]) == 0
    assert main(["sample", str(run), "--tokens", "3"]) == 0


def test_a_reader_that_goes_away_is_no_error(run: Path) -> None:
    process = start("inspect", str(run))
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait(timeout=60) == 0


def test_a_keyboard_interrupt_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("dqt.doctor.examine", interrupted)
    assert main(["doctor"]) == 130
    assert capsys.readouterr().err == "dqt: interrupted\n"


def test_out_of_memory_is_explained(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def exhausted(*arguments: object) -> None:
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 9 bytes")

    monkeypatch.setattr("dqt.train.savedmodel.load_model", exhausted)
    for command in ("eval", "sample"):
        assert main([command, str(run)]) == 2
        assert "out of memory" in capsys.readouterr().err
