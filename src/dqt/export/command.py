"""`dqt export`: writes a finished model for another program, and runs it there if asked to.

Everything is checked before a file is written, and the result appears whole or not at all: with `--verify`
only if the other program agrees.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dqt.errors import ConfigError, DataError, ModelError, did_you_mean

if TYPE_CHECKING:
    from dqt.export.verify import Agreement

TARGETS = {
    "hf": "float safetensors for transformers, from any bit width",
    "hf-bitnet": "packed ternary weights for transformers",
    "gguf": "a GGUF file for llama.cpp",
}
VERIFY_TOKENS = 2000


@dataclass(frozen=True)
class Export:
    """What was written.

    Attributes:
        path: The directory.
        files: Its files, with their sizes in bytes.
        notes: What the user should know.
        agreement: What `--verify` found.
    """

    path: Path
    files: dict[str, int]
    notes: list[str]
    agreement: Agreement | None

    def __str__(self) -> str:
        lines = [f"{self.path}: {sum(self.files.values()):,} bytes"]
        lines += [f"  {name:32} {size:>14,}" for name, size in self.files.items()]
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join(lines + ([f"verified {self.agreement}"] if self.agreement else []))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments, but for the run."""
    parser.add_argument("--to", required=True, metavar="FORMAT", help=f"{', '.join(TARGETS)}")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="where to (default: export/FORMAT in the run)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier export")
    parser.add_argument(
        "--lossless",
        action="store_true",
        help="gguf: write rows that don't fit a block in a larger type, instead of refusing them",
    )
    parser.add_argument(
        "--verify",
        nargs="?",
        type=int,
        const=VERIFY_TOKENS,
        metavar="TOKENS",
        help=f"run it in the other program and compare (default: {VERIFY_TOKENS} tokens)",
    )
    parser.add_argument(
        "--text", nargs="+", metavar="PATH", help="text to verify on (default: Python's standard library)"
    )


def run(arguments: argparse.Namespace) -> int:
    """Runs the command."""
    result = export(
        arguments.directory,
        arguments.to,
        arguments.out,
        overwrite=arguments.overwrite,
        lossless=arguments.lossless,
        verify_tokens=arguments.verify,
        text=arguments.text,
    )
    if arguments.json:
        facts = {"path": str(result.path), "files": result.files, "notes": result.notes}
        agreement = result.agreement.to_dict() if result.agreement else None
        print(json.dumps(facts | {"verified": agreement}, indent=2, ensure_ascii=False))
    else:
        print(result)
    return 0


def export(
    directory: Path,
    target: str,
    out: Path | None = None,
    *,
    overwrite: bool = False,
    lossless: bool = False,
    verify_tokens: int | None = None,
    text: list[str] | None = None,
) -> Export:
    """Exports a finished model.

    Args:
        directory: A run, or its `model/`.
        target: A key of `TARGETS`.
        out: The directory to write; None takes `export/TARGET` in the run.
        overwrite: Whether an earlier export there is replaced.
        lossless: For GGUF, see `dqt.export.gguf_file.write_gguf`.
        verify_tokens: On how many tokens to compare it with the other program; None does not.
        text: Files and folders to read for that; None takes Python's standard library.

    Returns:
        What was written.

    Raises:
        ConfigError: If an argument makes no sense, or a package is missing.
        ModelError: If the model can't be exported so, the result can't be written, or does not verify.
    """
    _check(directory, target, lossless, verify_tokens, text)

    from dqt.export import card, verify
    from dqt.export.gguf_file import write_gguf
    from dqt.export.hf import write_hf, write_hf_bitnet
    from dqt.export.source import load_source, without_masters
    from dqt.train.storage import staged_directory

    if verify_tokens is not None:
        verify.require_runtime(target)
    source = load_source(directory)
    path = out or source.directory.resolve().parent / "export" / target
    earlier = _is_export(path)
    if path.exists() and not (overwrite and earlier):
        advice = "add --overwrite, or " if earlier else ""
        raise ModelError(f"{path} exists already: {advice}give another --out")
    sample = None if verify_tokens is None else verify.sample(source, verify_tokens, text)
    notes: list[str] = []
    agreement = None
    with staged_directory(path) as staging:
        exported = without_masters(source)
        file = f"{source.name}.gguf" if target == "gguf" else None
        if target == "gguf":
            assert file is not None
            notes = write_gguf(exported, staging / file, lossless, card.describe(exported))
        else:
            (write_hf if target == "hf" else write_hf_bitnet)(exported, staging)
        if sample is not None:
            agreement = verify.verify(source, target, staging / file if file else staging, sample)
            if not agreement.holds:
                raise ModelError(
                    f"{target} does not compute what dqt does, nothing was written\n{agreement.brief}"
                )
        card.write_card(exported, target, staging, file, notes, agreement)
    files = {item.name: item.stat().st_size for item in sorted(path.iterdir())}
    return Export(path, files, notes, agreement)


def _check(directory: Path, target: str, lossless: bool, tokens: int | None, text: list[str] | None) -> None:
    if target not in TARGETS:
        raise ConfigError(f"unknown export format {target!r}; {did_you_mean(target, TARGETS)}")
    if lossless and target != "gguf":
        raise ConfigError(f"--lossless is about the blocks of gguf, and {target} has none: leave it out")
    if tokens is not None and tokens < 1:
        raise ConfigError(f"--verify must compare at least 1 token, not {tokens}")
    if text and tokens is None:
        raise ConfigError("--text is what --verify reads: add --verify")
    if not directory.is_dir():
        raise ModelError(f"there is no directory {str(directory)!r}: give a run that dqt train wrote")
    for path in text or ():
        if not Path(path).exists():
            raise DataError(f"{path} does not exist: give an existing text file or folder")


def _is_export(path: Path) -> bool:
    """Whether an export stands there: models and checkpoints have manifests too, but no card."""
    from dqt.export.card import CARD
    from dqt.train.storage import MANIFEST, load_json

    return (path / MANIFEST).is_file() and CARD in load_json(path / MANIFEST).get("files", ())
