"""Directories of tensors and JSON that appear whole or not at all, and whose damage is noticed.

Files are written to a staging directory beside the target, listed in `manifest.json` with size and SHA-256,
synced, and made current by one rename: a kill at any moment leaves either the old directory or the new one.
In packed weights every bit pattern is legal, so that only a hash can tell damage; it costs a read of every
file on load.

Tensors are safetensors, everything else JSON: nothing that is loaded can run code.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor, nn

from dqt.errors import ModelError

MANIFEST = "manifest.json"
FORMAT_VERSION = 1
STAGING_PREFIX = ".staging-"
REPLACED_PREFIX = ".replaced-"


@contextlib.contextmanager
def staged_directory(target: Path) -> Iterator[Path]:
    """Gives a directory to write files into, which becomes `target` when the block ends without an error.

    Raises:
        ModelError: If it can't be written.
    """
    staging = target.with_name(STAGING_PREFIX + target.name)
    try:
        shutil.rmtree(staging, ignore_errors=True)  # what a killed process may have left
        staging.mkdir(parents=True)
        yield staging
        _write_manifest(staging)
        replaced = target.with_name(REPLACED_PREFIX + target.name)
        shutil.rmtree(replaced, ignore_errors=True)
        if target.exists():
            target.rename(replaced)
        staging.rename(target)
        _sync(target.parent)
        shutil.rmtree(replaced, ignore_errors=True)
    except OSError as error:
        raise ModelError(
            f"{target} can't be written: {error.strerror or error}; free some space there"
        ) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Replaces a file in one step."""
    temporary = path.with_name(STAGING_PREFIX + path.name)
    temporary.write_text(text, encoding="utf-8")
    _sync(temporary)
    temporary.replace(path)


def to_json(content: Any) -> str:
    """JSON as it is written everywhere here."""
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes tensors that share no memory, every one in its own dtype."""
    plain = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    try:
        safetensors.torch.save_file(plain, path, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(str(error)) from error
    path.chmod(path.parent.stat().st_mode & 0o666)  # safetensors makes it private, whatever the umask


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Reads what `save_tensors` wrote.

    Raises:
        ModelError: If the file is missing or damaged.
    """
    try:
        return safetensors.torch.load_file(path)
    except (OSError, SafetensorError, ValueError) as error:
        raise ModelError(f"{path} can't be read: {error}") from error


def without_aliases(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Splits a state dict into tensors, and the names of tied ones: second name to the first one's."""
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    first: dict[tuple[Any, ...], str] = {}
    for name, tensor in state.items():
        place = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.device)
        if tensor.numel() and place in first:
            aliases[name] = first[place]
        else:
            first[place] = name
            tensors[name] = tensor
    return tensors, aliases


def load_model_tensors(model: nn.Module, path: Path) -> None:
    """Loads a model's tensors, all of them and no others, from a file that `save_tensors` wrote.

    Raises:
        ModelError: If the file is damaged, or its tensors are not the model's.
    """
    tensors = load_tensors(path)
    for alias, name in without_aliases(model.state_dict())[1].items():
        if name in tensors:
            tensors[alias] = tensors[name]
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise ModelError(f"{path} does not fit the model: {reason[:400]}") from error


def load_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
        ModelError: If the file is missing, damaged, or something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(f"{path} can't be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path} is damaged: {error}") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path} is damaged: not a JSON object")
    return content


def verify(directory: Path) -> None:
    """Compares every file with the manifest.

    Raises:
        ModelError: If a file is missing or altered, or the directory was written by a newer dqt.
    """
    manifest = load_json(directory / MANIFEST)
    check_version(directory / MANIFEST, manifest)
    files = manifest.get("files")
    if not isinstance(files, dict) or not all(isinstance(entry, dict) for entry in files.values()):
        raise ModelError(f"{directory / MANIFEST} is damaged: it lists no files")
    for name, entry in files.items():
        path = directory / name
        if Path(name).name != name or not path.is_file() or path.is_symlink():
            raise ModelError(f"{path} is missing, or not a plain file")
        if path.stat().st_size != entry.get("bytes") or _sha256(path) != entry.get("sha256"):
            raise ModelError(
                f"{path} is damaged: it differs from the SHA-256 in {MANIFEST}; use another copy"
            )


def check_version(path: Path, content: Mapping[str, Any]) -> None:
    """Raises ModelError unless the format version in a JSON file is one that this dqt reads."""
    version = content.get("format_version")
    if version != FORMAT_VERSION:
        newer = isinstance(version, int) and version > FORMAT_VERSION
        advice = "update dqt" if newer else "the file is damaged"
        raise ModelError(f"{path} has format {version!r}, this dqt reads {FORMAT_VERSION}: {advice}")


def _write_manifest(directory: Path) -> None:
    files = {}
    for path in sorted(directory.iterdir()):
        files[path.name] = {"bytes": path.stat().st_size, "sha256": _sha256(path)}
        _sync(path)
    (directory / MANIFEST).write_text(
        to_json({"format_version": FORMAT_VERSION, "files": files}), encoding="utf-8"
    )
    _sync(directory / MANIFEST)
    _sync(directory)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    """Forces a file, or a directory's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
