"""Directories of tensors and JSON that appear whole or not at all, and whose damage is noticed.

Files are written to a staging directory beside the target, listed in `manifest.json` with size and SHA-256,
synced, and made current by one rename; where there is an old directory, the rename exchanges the two. A kill
at any moment leaves the old directory or the new one, and perhaps a leftover under a name that counts for
nothing, which `sweep` removes. In packed weights every bit pattern is legal, so that only a hash can tell
damage; it costs a read of every file on load. The manifest carries its own hash.

Tensors are safetensors, everything else JSON: nothing that is loaded can run code. What a file says about
sizes is believed only as far as the file's own size goes.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor, nn

from dqt.errors import ModelError, WriteError

MANIFEST = "manifest.json"
FORMAT_VERSION = 2
READABLE_VERSIONS = (1, 2)
"""1 has manifests without a hash of their own."""

STAGING_PREFIX, REPLACED_PREFIX, REMOVED_PREFIX = ".staging-", ".replaced-", ".removed-"
LEFTOVERS = (STAGING_PREFIX, REPLACED_PREFIX, REMOVED_PREFIX)
_MOST_JSON = 16 << 20  # bytes; 10,000 tensors are 3 MB
_MOST_HEADER = 16 << 20  # bytes of a safetensors header; 10,000 tensors are 1 MB

# -- directories ---------------------------------------------------------------------------------------------


@contextlib.contextmanager
def staged_directory(target: Path, needed: int | None = None) -> Iterator[Path]:
    """Gives a directory to write files into, which becomes `target` when the block ends without an error.

    Args:
        target: What is made, or replaced.
        needed: Bytes that will be written, for the message when they don't fit.

    Raises:
        WriteError: If it can't be written; the old `target` is as it was.
    """
    staging = target.with_name(STAGING_PREFIX + target.name)
    try:
        _delete(staging)  # what a killed process may have left
        staging.mkdir(parents=True)
        yield staging
        _write_manifest(staging)
        _make_current(staging, target)
    except OSError as error:
        raise WriteError(f"{target} can't be written: {_reason(error, target.parent, needed)}") from error
    finally:
        with contextlib.suppress(OSError):
            _delete(staging)


def remove_directory(path: Path) -> None:
    """Removes a directory that `staged_directory` wrote; a kill on the way leaves it whole, or a leftover."""
    doomed = path.with_name(REMOVED_PREFIX + path.name)
    _delete(doomed)
    path.rename(doomed)
    _delete(doomed)


def sweep(directory: Path) -> list[str]:
    """Clears up what killed processes left in a directory, where nothing else may be writing.

    Returns:
        What was done, a line each.
    """
    lines = []
    for path in sorted(directory.iterdir()) if directory.is_dir() else ():
        prefix = next((prefix for prefix in LEFTOVERS if path.name.startswith(prefix)), None)
        if prefix is None:
            continue
        target = path.with_name(path.name.removeprefix(prefix))
        if prefix == REPLACED_PREFIX and not target.exists():
            path.rename(target)
            lines.append(f"put {target} back, which was to be replaced when the process was killed")
        else:
            _delete(path)
            lines.append(f"removed {path}, which a killed process left half-done")
    return lines


def write_text(path: Path, text: str) -> None:
    """Replaces a file in one step.

    Raises:
        WriteError: If it can't be written; the old file is as it was.
    """
    temporary = path.with_name(STAGING_PREFIX + path.name)
    try:
        temporary.write_text(text, encoding="utf-8")
        _sync(temporary)
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise WriteError(f"{path} can't be written: {_reason(error, path.parent, len(text))}") from error


def _make_current(staging: Path, target: Path) -> None:
    if not target.exists():
        staging.rename(target)
    elif not _exchange(staging, target):
        replaced = target.with_name(REPLACED_PREFIX + target.name)
        _delete(replaced)
        target.rename(replaced)  # a kill after this line is mended by `sweep`
        staging.rename(target)
        _delete(replaced)
    _sync(target.parent)
    _sync(target.parent.parent)  # the parent may be new


def _exchange(first: Path, second: Path) -> bool:
    """Swaps two directories in one step; False where the system or the file system can't."""
    libc = ctypes.CDLL(None, use_errno=True)
    names = os.fsencode(first), os.fsencode(second)
    if sys.platform == "linux" and hasattr(libc, "renameat2"):
        here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
        return libc.renameat2(here, names[0], here, names[1], exchange) == 0
    if sys.platform == "darwin" and hasattr(libc, "renamex_np"):
        swap = 2  # RENAME_SWAP
        return libc.renamex_np(names[0], names[1], swap) == 0
    return False


def _delete(path: Path) -> None:
    """Removes a directory, a file, or a link and not what it leads to."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _reason(error: OSError, directory: Path, needed: int | None) -> str:
    """Why something can't be written, and how much room it needs."""
    reason = str(error.strerror or error)
    try:
        free = f"{shutil.disk_usage(directory).free / 1e6:,.1f} MB free"
    except OSError:
        return f"{reason}; choose another directory"
    if needed is not None:
        return f"{reason} (it needs {needed / 1e6:,.1f} MB, {free}); free some space there"
    return f"{reason} ({free}); free some space there"


def _sync(path: Path) -> None:
    """Forces a file, or a directory's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# -- manifest ------------------------------------------------------------------------------------------------


def verify(directory: Path, required: tuple[str, ...] = ()) -> None:
    """Compares every file with the manifest.

    Args:
        directory: What `staged_directory` wrote.
        required: Files that the manifest must list, because they will be read.

    Raises:
        ModelError: If a file is missing or altered, or the directory was written by a newer dqt.
    """
    path = directory / MANIFEST
    manifest = load_json(path)
    check_version(path, manifest)
    files = manifest.get("files")
    if manifest["format_version"] > 1 and _read(path, _MOST_JSON) != _manifest_text(files):
        raise ModelError(f"{path} is damaged: it differs from its own SHA-256; use another copy")
    if not isinstance(files, dict) or not all(isinstance(entry, dict) for entry in files.values()):
        raise ModelError(f"{path} is damaged: it lists no files")
    if unlisted := sorted(set(required) - set(files)):
        raise ModelError(f"{path} is damaged: it does not list {', '.join(unlisted)}")
    for name, entry in files.items():
        path = directory / name
        if Path(name).name != name or not path.is_file() or path.is_symlink():
            raise ModelError(f"{path} is missing, or not a plain file")
        try:
            same = path.stat().st_size == entry.get("bytes") and sha256(path) == entry.get("sha256")
        except OSError as error:
            raise ModelError(f"{path} can't be read: {error.strerror}") from error
        if not same:
            raise ModelError(
                f"{path} is damaged: it differs from the SHA-256 in {MANIFEST}; use another copy"
            )


def check_version(path: Path, content: Mapping[str, Any]) -> None:
    """Raises ModelError unless the format version in a JSON file is one that this dqt reads."""
    version = content.get("format_version")
    if type(version) is not int or version not in READABLE_VERSIONS:
        newer = type(version) is int and version > FORMAT_VERSION
        advice = "update dqt" if newer else "the file is damaged"
        raise ModelError(f"{path} has format {version!r}, this dqt reads up to {FORMAT_VERSION}: {advice}")


def _write_manifest(directory: Path) -> None:
    files = {}
    for path in sorted(directory.iterdir()):
        files[path.name] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
        _sync(path)
    (directory / MANIFEST).write_text(_manifest_text(files), encoding="utf-8")
    _sync(directory / MANIFEST)
    _sync(directory)


def _manifest_text(files: Any) -> str:
    """The only text that a manifest of these files may have, so that every flipped bit shows."""
    digest = hashlib.sha256(to_json(files).encode("utf-8", "surrogatepass")).hexdigest()
    return to_json({"format_version": FORMAT_VERSION, "files_sha256": digest, "files": files})


def sha256(path: Path) -> str:
    """The SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# -- JSON ----------------------------------------------------------------------------------------------------


def to_json(content: Any) -> str:
    """JSON as it is written everywhere here."""
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def load_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
        ModelError: If the file is missing, damaged, too large to be one of ours, or something else.
    """
    try:
        content = json.loads(_read(path, _MOST_JSON))
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path} is damaged: {str(error)[:200]}") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path} is damaged: not a JSON object")
    return content


def _read(path: Path, limit: int) -> str:
    """The text of a plain file."""
    try:
        if not path.is_file():  # a pipe would be waited for
            raise ModelError(f"{path} is missing, or not a plain file")
        if path.stat().st_size > limit:
            raise ModelError(f"{path} is damaged: {path.stat().st_size} bytes are more than it can have")
        return path.read_bytes().decode("utf-8")
    except OSError as error:
        raise ModelError(f"{path} can't be read: {error.strerror}") from error


# -- tensors -------------------------------------------------------------------------------------------------


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
    tensor_shapes(path)
    try:
        return safetensors.torch.load_file(path)
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise ModelError(f"{path} can't be read: {error}") from error


def tensor_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of the tensors in a file, which add up to no more than its size; reads the header only.

    Raises:
        ModelError: If the file is missing or damaged.
    """
    if not path.is_file():
        raise ModelError(f"{path} is missing, or not a plain file")
    try:
        with path.open("rb") as file:
            header = int.from_bytes(file.read(8), "little")
        if header > min(_MOST_HEADER, path.stat().st_size):
            raise ModelError(f"{path} is damaged: its header can't have {header} bytes")
        with safetensors.safe_open(path, framework="pt") as tensors:
            return {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
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
        ModelError: If the file is damaged, its tensors are not the model's, or a float one is not finite.
    """
    tensors, state = load_tensors(path), model.state_dict()
    for name, tensor in tensors.items():
        wanted = state[name].dtype if name in state else tensor.dtype
        if tensor.dtype != wanted:  # torch would convert it in silence
            raise ModelError(f"{path} does not fit the model: {name} is {tensor.dtype}, not {wanted}")
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise ModelError(f"{path} holds NaN or Inf in {name}: use another copy")
    for alias, name in without_aliases(state)[1].items():
        if name in tensors:
            tensors[alias] = tensors[name]
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise ModelError(f"{path} does not fit the model: {reason[:400]}") from error
