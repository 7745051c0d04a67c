"""Rows 11 and 12: files of strangers run nothing, lead nowhere, take no more memory than they may."""

from __future__ import annotations

import ast
import json
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from malformed_files import CONFIGS, INFOS, JSONS, SAFETENSORS, SPLITS, STATES, TOMLS
from nursery import Nursery, named
from strangers import MODEL, limit_memory, load_checkpoint, without_manifest

import dqt
from dqt.data.prepare import Corpus
from dqt.data.tokenizer import load_tokenizer, train_tokenizer
from dqt.errors import DqtError
from dqt.inspection import inspect_path
from dqt.report import read_run
from dqt.train import savedmodel, storage
from dqt.train.config import Config
from dqt.train.rundir import RunDirectory
from dqt.train.savedmodel import load_model

# What opens files from elsewhere, and the directory that it is given.
LOADERS: list[tuple[Callable[[Path], Any], str]] = [
    (load_checkpoint, "step-000004"),
    (inspect_path, "step-000004"),
    (load_model, "model"),
    (load_tokenizer, "model"),
    (lambda path: Corpus.open(path, verify=True), "corpus"),
    (lambda path: Config.from_toml(path / "config.toml"), "run"),
    (lambda path: RunDirectory(path).read_record(), "run"),
    (lambda path: read_run(path), "run"),
]


# -- row 11 --------------------------------------------------------------------------------------------------


class Payload:
    """What runs when it is unpickled."""

    def __init__(self, sign: str) -> None:
        self.sign = sign

    def __reduce__(self) -> Any:
        return (open, (self.sign, "w"))


def reading_json_as_json(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(storage, "load_json", lambda path: pickle.loads(path.read_bytes()))


def reading_tensors_as_safetensors(patch: pytest.MonkeyPatch) -> None:
    def careless(path: Path) -> Any:
        return torch.load(path, weights_only=False)

    patch.setattr(storage, "verify", lambda directory, required=(): None)
    patch.setattr(storage, "load_tensors", careless)


@pytest.mark.row(11, reading_json_as_json, reading_tensors_as_safetensors)
def test_pickles_under_every_name(whole: Path, tmp_path: Path) -> None:
    sign = tmp_path / "ran"
    payloads = {"plain": pickle.dumps(Payload(str(sign)))}
    torch.save({"weight": Payload(str(sign))}, tmp_path / "zip")
    payloads["zip"] = (tmp_path / "zip").read_bytes()
    opened = 0
    for load, name in LOADERS:
        for file in sorted(path for path in (whole / name).rglob("*") if path.is_file()):
            for kind, payload in payloads.items():
                target = tmp_path / "spoilt" / kind
                shutil.rmtree(target, ignore_errors=True)
                shutil.copytree(whole / name, target)
                (target / file.relative_to(whole / name)).write_bytes(payload)
                if file.name != storage.MANIFEST:
                    without_manifest(target)
                try:
                    load(target)
                except DqtError:
                    opened += 1
                except Exception as error:
                    pytest.fail(f"{file.name}: {error!r}, and it has{'' if sign.exists() else ' not'} run")
                assert not sign.exists(), f"{file.name} ran"
    assert opened > 25


def building_no_class_but_ours(patch: pytest.MonkeyPatch) -> None:
    def careless(path: Path, tensors: int) -> Any:
        from transformers import AutoConfig

        return AutoConfig.from_pretrained(path.parent, trust_remote_code=True)

    patch.setattr(savedmodel, "_empty", careless)


@pytest.mark.row(11, building_no_class_but_ours)
def test_code_beside_a_model_does_not_run(tmp_path: Path) -> None:
    model = Path(shutil.copytree(MODEL, tmp_path / "model"))
    sign = tmp_path / "ran"
    (model / "evil.py").write_text(f"open({str(sign)!r}, 'w')\nclass Evil: ...\n")
    config = json.loads((model / "config.json").read_text())
    changes = {"auto_map": {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}}
    for kind in ("llama", "evil"):
        (model / "config.json").write_text(json.dumps(config | changes | {"model_type": kind}))
        without_manifest(model)
        message = "it was loaded"
        try:
            load_model(model)
        except Exception as error:
            message = repr(error)
        assert not sign.exists()
        assert message.startswith("ModelError(")
        assert "makes no model that dqt knows" in message


def test_nothing_in_dqt_can_unpickle() -> None:
    """No module imports pickle or a relative, or calls what unpickles or evaluates."""
    for path in Path(dqt.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = {alias.name for alias in node.names} | {getattr(node, "module", None)}
                assert not {"pickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"} & names, path
            if isinstance(node, ast.Call):
                assert ast.unparse(node.func) not in ("eval", "exec", "torch.load"), path
                assert "allow_pickle" not in {keyword.arg for keyword in node.keywords}, path


# -- row 12 --------------------------------------------------------------------------------------------------


def merge(path: Path, changes: dict[str, Any]) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def malformed(whole: Path, scratch: Path) -> Iterator[tuple[str, Callable[[Path], Any], Path]]:
    """Every case: its name, what loads it, and the directory."""

    def copy(name: str) -> Path:
        shutil.rmtree(scratch / name, ignore_errors=True)
        return Path(shutil.copytree(whole / name, scratch / name))

    def spoilt(name: str, file: str, content: bytes) -> Path:
        directory = copy(name)
        (directory / file).write_bytes(content)
        if file != storage.MANIFEST:
            without_manifest(directory)
        return directory

    for case, content in SAFETENSORS.items():
        yield f"safetensors, {case}", load_model, spoilt("model", "model.safetensors", content)
        yield f"optimizer, {case}", load_checkpoint, spoilt("step-000004", "optimizer.safetensors", content)
    for case, content in JSONS.items():
        for name, file, load in (
            *(
                ("model", file, load_model)
                for file in ("dqt.json", "config.json", "tokenizer.json", "manifest.json")
            ),
            *(("step-000004", file, inspect_path) for file in ("state.json", "manifest.json")),
            ("corpus", "manifest.json", lambda path: Corpus.open(path)),
            ("run", "run.json", lambda path: RunDirectory(path).read_record()),
        ):
            yield f"{file}, {case}", load, spoilt(name, file, content)
    for case, content in TOMLS.items():
        yield (
            f"config.toml, {case}",
            lambda path: Config.from_toml(path / "config.toml"),
            spoilt("run", "config.toml", content),
        )
    for file, name, load, cases in (
        ("state.json", "step-000004", inspect_path, STATES),
        ("config.json", "model", load_model, CONFIGS),
        ("dqt.json", "model", load_model, INFOS),
    ):
        for case, changes in cases.items():
            directory = copy(name)
            merge(directory / file, changes)
            without_manifest(directory)
            if case == "losses of words" or "optimizer" in changes:
                yield f"{file}, {case}", load_checkpoint, directory
            else:
                yield f"{file}, {case}", load, directory
    for case, changes in SPLITS.items():
        directory = copy("corpus")
        manifest = json.loads((directory / "manifest.json").read_text())
        manifest["splits"]["train"] |= changes
        (directory / "manifest.json").write_text(json.dumps(manifest))
        yield f"splits, {case}", lambda path: Corpus.open(path), directory
    for case, vocabulary in (("sparse", {"a": 2**32 - 1}), ("empty", {})):
        directory = copy("model")
        definition = json.loads((directory / "tokenizer.json").read_text())
        definition["model"] |= {"vocab": vocabulary, "merges": []}
        definition["added_tokens"] = []
        (directory / "tokenizer.json").write_text(json.dumps(definition))
        without_manifest(directory)
        yield f"tokenizer, {case}", load_model, directory
    directory = copy("model")
    (scratch / "secret").write_bytes((directory / "model.safetensors").read_bytes())
    (directory / "model.safetensors").unlink()
    (directory / "model.safetensors").symlink_to(scratch / "secret")
    without_manifest(directory)
    yield "a link out of the model", load_model, directory
    directory = copy("corpus")
    shutil.move(directory / "train.bin", scratch / "train.bin")
    (directory / "train.bin").symlink_to(scratch / "train.bin")
    yield "a link out of the corpus", lambda path: Corpus.open(path), directory


def load_all(whole: str, scratch: str, without: str) -> None:
    """Runs in a process of its own, with a limit on its memory; prints what was not refused as it should."""
    patch = pytest.MonkeyPatch()
    if without:
        globals()[without](patch)
    Path(scratch).mkdir()
    limit_memory()
    count = 0
    for name, load, directory in malformed(Path(whole), Path(scratch)):
        count += 1
        try:
            load(directory)
        except DqtError as error:
            if "\n" in str(error).strip() or len(str(error)) > 1200:
                print(f"{name}: a long message: {str(error)[:300]}")
        except BaseException as error:
            print(f"{name}: {type(error).__name__}: {str(error)[:300]}")
        else:
            print(f"{name}: was loaded")
    print(f"tried {count}")


def foreseeing_deep_nesting(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(storage, "RecursionError", KeyError, raising=False)


def plain_names(patch: pytest.MonkeyPatch) -> None:
    """Names in files lead where they lead."""
    patch.setattr(Path, "is_symlink", lambda self: False)


def checked_states(patch: pytest.MonkeyPatch) -> None:
    from dqt.train import checkpoint

    patch.setattr(checkpoint, "_STATE", {})


@pytest.mark.row(12, foreseeing_deep_nesting, plain_names, checked_states)
def test_malformed_files(whole: Path, tmp_path: Path, nursery: Nursery, mutation: Any) -> None:
    taken = mutation.__name__ if mutation else ""
    status, output = nursery.run([], (named(load_all), [str(whole), str(tmp_path / "scratch"), taken]))
    assert status == 0, output[-2000:]
    lines = [line for line in output.splitlines() if not line.startswith("[transformers]")]
    assert lines[:-1] == []
    assert int(lines[-1].removeprefix("tried ")) > 150


FUZZ = settings(max_examples=150, phases=[Phase.generate], suppress_health_check=list(HealthCheck))


def catching_everything(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(storage, "RecursionError", KeyError, raising=False)
    patch.setattr(storage, "SafetensorError", KeyError)


@pytest.mark.row(12, catching_everything)
def test_random_bytes_in_every_file(whole: Path, tmp_path: Path) -> None:
    """Hypothesis puts bytes, or cuts and repeats a piece, anywhere in a safetensors or JSON file."""
    base = Path(shutil.copytree(whole / "step-000004", tmp_path / "x"))
    originals = {path.name: path.read_bytes() for path in base.iterdir()}

    @FUZZ
    @given(
        st.sampled_from(["model.safetensors", "optimizer.safetensors", "state.json"]),
        st.floats(0, 1),
        st.binary(max_size=40),
        st.integers(0, 40),
    )
    def fuzz(name: str, where: float, insert: bytes, drop: int) -> None:
        raw = originals[name]
        at = int(where**4 * len(raw))  # mostly in the header
        (base / name).write_bytes(raw[:at] + insert + raw[at + drop :])
        without_manifest(base)
        try:
            load_checkpoint(base)
        except DqtError:
            return
        finally:
            for each, content in originals.items():
                (base / each).write_bytes(content)
        raise AssertionError("another model's checkpoint can't have been loaded")

    try:
        fuzz()
    except (ValueError, RecursionError, OSError) as error:
        pytest.fail(repr(error))
    except Exception as error:
        if isinstance(error, AssertionError):
            raise
        pytest.fail(repr(error))


def test_a_tokenizer_survives_its_own_file(tmp_path: Path) -> None:
    made = train_tokenizer(["def main():\n    return 1\n"] * 3, 262)
    made.save(tmp_path)
    assert load_tokenizer(tmp_path).sha256 == made.sha256
