"""Rows 2 to 6 and 14: what a save leaves behind when it is cut off, and what a reader notices."""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import os
import re
import resource
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import small
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from dqt.errors import ModelError, WriteError
from dqt.train import checkpoint, resume, storage
from dqt.train.checkpoint import list_checkpoints, prune, read_state
from dqt.train.savedmodel import load_model

FILES = ("model.safetensors", "optimizer.safetensors", "state.json", "manifest.json")
OLD_FORMAT = Path(__file__).parent / "format-1"

# -- mutations -----------------------------------------------------------------------------------------------


def staging(patch: pytest.MonkeyPatch) -> None:
    """Files are written straight to their final place."""

    @contextlib.contextmanager
    def straight(target: Path, needed: int | None = None) -> Iterator[Path]:
        target.mkdir(parents=True, exist_ok=True)
        yield target
        storage._write_manifest(target)

    patch.setattr(storage, "staged_directory", straight)


def renaming_before_removal(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(storage, "remove_directory", shutil.rmtree)


def sweeping(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(storage, "sweep", lambda directory: [])


def verification(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(storage, "verify", lambda directory, required=(): None)


def hashes(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(storage, "sha256", lambda path: "0" * 64)


def the_manifest_s_own_hash(patch: pytest.MonkeyPatch) -> None:
    def as_in_format_1(files: Any) -> str:
        return storage.to_json({"format_version": 1, "files": files})

    patch.setattr(storage, "_manifest_text", as_in_format_1)


def syncing(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(storage, "_sync", lambda path: None)


def cleaning_up_after_an_error(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(storage, "_delete", lambda path: None)


def saying_what_is_needed(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(storage, "_reason", lambda error, directory, needed: str(error))


def reading_old_formats(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(storage, "READABLE_VERSIONS", (2,))


def looking_at_the_version(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(storage, "check_version", lambda path, content: None)


# -- row 2: killed at any point of a save --------------------------------------------------------------------

WRITES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod", "os.truncate", "ctypes.dlsym"}


def kill_at(number: int) -> None:
    """Kills this process just before its `number`th change of the file system; Rust's own come between."""
    left = [number]

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        writes = event in WRITES or (event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR))
        if writes:
            left[0] -= 1
            if not left[0]:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def kill_at_byte(number: int) -> None:
    """Has the system kill this process when a file grows beyond `number` bytes."""
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (number, number))


def killed(prepare: Callable[[int], None], number: int, action: Callable[[], None]) -> bool:
    """Does something in a child process; returns whether that was killed."""
    child = os.fork()
    if not child:
        status = 1
        with contextlib.suppress(BaseException):
            prepare(number)
            action()
            status = 0
        os._exit(status)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code <= 0, "the action failed of itself"
    return code < 0


def save_and_purge(directory: Path) -> None:
    small.save(directory, 4)
    prune(directory, 1)


def overwrite(directory: Path) -> None:
    small.save(directory, 2, elapsed=9.0)


def overwrite_without_exchange(directory: Path) -> None:
    storage._exchange = lambda first, second: False
    overwrite(directory)


@pytest.mark.row(2, staging, renaming_before_removal, sweeping)
def test_killed_at_every_write_point(tmp_path: Path) -> None:
    base = tmp_path / "base"
    for step in (1, 2):
        small.save(base, step, good=step == 2, val_loss=2.0 - step)
    for action in (save_and_purge, overwrite, overwrite_without_exchange):
        for prepare in (kill_at, kill_at_byte):
            number = points = 0
            while True:
                number += 1
                directory = tmp_path / "run" / "checkpoints"
                shutil.copytree(base, directory)
                size = 512 * number
                if not killed(prepare, number if prepare is kill_at else size, lambda: action(directory)):  # noqa: B023
                    break
                points += 1
                if action is not overwrite_without_exchange:
                    assert list_checkpoints(directory)
                checkpoint.sweep(directory)
                left = {path.name for path in directory.iterdir()}
                assert left <= {"step-000001", "step-000002", "step-000004"}, f"leftovers at point {number}"
                assert {"step-000002", "step-000004"} & left
                for path in list_checkpoints(directory):
                    small.require_whole(path)
                shutil.rmtree(directory)
            assert points > (10 if prepare is kill_at else 2)
            small.require_whole(list_checkpoints(directory)[-1])
            shutil.rmtree(directory)


@pytest.mark.row(2, syncing)
def test_everything_is_on_disk_before_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A power cut can't be had in a test; the order of syncs and rename can."""
    order: list[str] = []
    fsync, rename = os.fsync, Path.rename

    def note_sync(descriptor: int) -> None:
        order.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    def note_rename(self: Path, target: Path) -> Path:
        order.append("rename")
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(Path, "rename", note_rename)
    path = small.save(tmp_path / "checkpoints", 1)
    assert "rename" in order
    at = order.index("rename")
    staged = path.with_name(storage.STAGING_PREFIX + path.name)
    assert {str(staged), *(str(staged / name) for name in FILES)} <= set(order[:at])
    assert str(path.parent) in order[at:]


# -- row 3: what others left ---------------------------------------------------------------------------------


@pytest.mark.row(3, sweeping)
def test_leftovers_and_foreign_files_are_named(tmp_path: Path) -> None:
    from train_helpers import run_micro

    run_micro(tmp_path)
    directory = tmp_path / "run" / "checkpoints"
    half = directory / "step-000009"
    half.mkdir()
    shutil.copy(directory / "step-000006" / "state.json", half)
    shutil.copytree(directory / "step-000003", directory / ".staging-step-000012")
    (directory / ".removed-step-000001").mkdir()
    (directory / "step-000007").symlink_to(directory / "step-000003")
    (directory / "notes.txt").write_text("mine")
    (directory / "step-12").mkdir()
    said = Lines()
    run_micro(tmp_path, resume="auto", train__steps=8, stream=said)
    text = said.text
    for name in (".staging-step-000012", ".removed-step-000001", "notes.txt", "step-12", "step-000007"):
        assert name in text, name
    assert "passed over step-000009" in text
    assert "resumed from" in text
    names = {path.name for path in directory.iterdir()}
    assert names == {"step-000006", "step-000008", "step-000007", "notes.txt", "step-12"} | (
        names & {"step-000003"}  # pinned if it was the best
    )
    small_run = read_state(directory / "step-000008")
    assert small_run["step"] == 8


class Lines:
    """A stream that keeps what is printed."""

    def __init__(self) -> None:
        self.text = ""

    def write(self, text: str) -> None:
        self.text += text

    def flush(self) -> None: ...

    def isatty(self) -> bool:
        return False


# -- rows 4 and 5: damaged files -----------------------------------------------------------------------------


def shorter_forms(path: Path) -> Iterator[bytes | None]:
    """A file's content cut at every sixteenth, empty, and None for a missing file."""
    raw = path.read_bytes()
    yield from (raw[: len(raw) * part // 16] for part in range(16))
    yield None


@pytest.mark.row(4, verification)
def test_cut_off_and_missing_files(tmp_path: Path) -> None:
    small.save(tmp_path, 1)
    newest = small.save(tmp_path, 2)
    for name in FILES:
        path = newest / name
        whole = path.read_bytes()
        for content in shorter_forms(path):
            path.unlink()
            if content is not None:
                path.write_bytes(content)
            with pytest.raises(ModelError) as error:
                read_state(newest)
            assert name in str(error.value)
            said: list[str] = []
            found = resume.find("auto", tmp_path, said.append)
            assert found is not None
            assert found.path.name == "step-000001"
            assert "passed over step-000002" in said[0]
            assert name in said[0]
            path.write_bytes(whole)
    small.require_whole(newest)


@pytest.mark.row(5, hashes, the_manifest_s_own_hash)
def test_one_flipped_bit(tmp_path: Path) -> None:
    saved = small.save(tmp_path, 1)
    originals = {name: (saved / name).read_bytes() for name in FILES}

    def require_noticed(name: str, bit: int) -> None:
        raw = bytearray(originals[name])
        raw[bit // 8] ^= 1 << bit % 8
        (saved / name).write_bytes(raw)
        try:
            with pytest.raises(ModelError, match=rf"{re.escape(name)} (is|has|can't)"):
                read_state(saved)
        finally:
            (saved / name).write_bytes(originals[name])

    @settings(max_examples=100, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
    @given(st.sampled_from(FILES), st.integers(0, 2**40))
    def any_bit(name: str, bit: int) -> None:
        require_noticed(name, bit % (8 * len(originals[name])))

    any_bit()
    for byte in range(len(originals["manifest.json"])):  # nothing else vouches for this one
        require_noticed("manifest.json", 8 * byte + byte % 8)


# -- row 6: no space -----------------------------------------------------------------------------------------

NO_SPACE = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def fail_at(patch: pytest.MonkeyPatch, number: int) -> None:
    """Lets the `number`th write of a save fail, after half of it."""
    left = [number]

    def failing(write: Callable[..., Any], leaves_half: bool) -> Callable[..., Any]:
        def attempt(target: Any, *arguments: Any, **options: Any) -> Any:
            left[0] -= 1
            if left[0]:
                return write(target, *arguments, **options)
            if leaves_half:
                Path(target).write_bytes(b"half")
            raise NO_SPACE

        return attempt

    patch.setattr(storage, "save_tensors", failing(storage.save_tensors, True))
    patch.setattr(Path, "write_text", failing(Path.write_text, True))
    patch.setattr(os, "fsync", failing(os.fsync, False))


@pytest.mark.row(6, saying_what_is_needed, cleaning_up_after_an_error)
def test_no_space_for_a_checkpoint(tmp_path: Path) -> None:
    small.save(tmp_path, 1)
    for number in itertools.count(1):
        with pytest.MonkeyPatch.context() as patch:
            fail_at(patch, number)
            try:
                small.save(tmp_path, 2)
                break
            except WriteError as error:
                message = str(error)
        assert re.search(r"No space left on device \(it needs 0.0 MB, [\d,.]+ MB free\); free some", message)
        if (tmp_path / "step-000002").exists():  # only the sync of the directory failed, after the rename
            small.require_whole(tmp_path / "step-000002")
            storage.remove_directory(tmp_path / "step-000002")
        assert [path.name for path in tmp_path.iterdir()] == ["step-000001"]
        small.require_whole(tmp_path / "step-000001")
    assert number > 8


# -- row 14: other formats -----------------------------------------------------------------------------------


def old_learner() -> tuple[Any, Any]:
    """Model and optimizer of the run that wrote the old files."""
    import torch

    from dqt.build import build_optimizer
    from dqt.models import build_config, build_with_recipe
    from dqt.train.config import Config

    state = checkpoint.peek(OLD_FORMAT / "step-000004")
    config = Config.from_dict(state["config"])
    model_config = build_config("micro", "llama", 257, config.train.seq_len, config.model.overrides)
    model, _ = build_with_recipe(model_config, config.recipe(), config.quant.rules_to_bits)
    optimizer = build_optimizer(model, config.recipe(), 1e-3, 0)
    for parameter in model.parameters():
        parameter.grad = torch.zeros(parameter.shape)
    return model, optimizer


@pytest.mark.row(14, reading_old_formats)
def test_an_older_format_is_read() -> None:
    try:
        state = read_state(OLD_FORMAT / "step-000004")
        loaded, tokenizer, info = load_model(OLD_FORMAT / "model")
    except ModelError as error:
        pytest.fail(str(error))
    assert (state["step"], state["samples"], state["good"], state["losses"]) == (4, 8, True, [])
    model, optimizer = old_learner()
    checkpoint.restore(OLD_FORMAT / "step-000004", state, model, optimizer)
    optimizer.step()
    assert optimizer.state[next(model.parameters())]["step"] == 5
    assert (tokenizer.vocab_size, info["format_version"]) == (257, 1)
    assert sum(parameter.numel() for parameter in loaded.parameters()) == 2528


@pytest.mark.row(14, looking_at_the_version)
def test_a_newer_format_is_refused_with_advice(tmp_path: Path) -> None:
    saved = small.save(tmp_path, 1)
    for name in ("manifest.json", "state.json"):
        whole = (saved / name).read_bytes()
        (saved / name).write_text(json.dumps(json.loads(whole) | {"format_version": 3}))
        if name == "state.json":
            (saved / "manifest.json").unlink()
            storage._write_manifest(saved)
        with pytest.raises(ModelError, match=r"format 3, this dqt reads up to 2: update dqt"):
            read_state(saved)
        (saved / name).write_bytes(whole)
