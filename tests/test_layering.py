"""Imports run downward only, and the command line starts without the heavy packages."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import dqt

SOURCE = Path(dqt.__file__).parent

# Lowest first. A module may import those of its own layer and of the layers before it in this list. A package
# counts with all its modules unless one of them is listed itself.
LAYERS = (
    "errors",
    "choices",
    "sizes",
    "allocator",
    "extras",
    "numerics",
    "ops",
    "tensor",
    "nn",
    "fused",
    "calibrate",
    "rules",
    "packed",
    "baselines",
    "hf",
    "quantize",
    "optim",
    "lora",
    "recipe",
    "recipes",
    "build",
    "models",
    "data",
    "train.losses",
    "start",
    "train.sections",
    "train.given",
    "train.config",
    "memory",
    "footprint",
    "plan",
    "evaluate",
    "sampling",
    "train",
    "export",
    "harness",
    "inspection",
    "plots",
    "report",
    "compare.statistics",
    "compare.tuning",
    "compare.suites",
    "compare",
    "doctor",
    "flags",
    "commands",
    "cli",
    "__main__",
)
# dqt itself imports lazily, the others need nothing but the errors.
FREE = {"", "train.guard", "train.schedule", "train.section", "train.storage"}

HEAVY = ("torch", "transformers", "matplotlib", "numpy", "safetensors", "tokenizers", "datasets")


def modules() -> list[tuple[str, Path]]:
    """Every module of the package as (dotted name below dqt, file)."""
    found = []
    for path in sorted(SOURCE.rglob("*.py")):
        parts = path.relative_to(SOURCE).with_suffix("").parts
        found.append((".".join(part for part in parts if part != "__init__"), path))
    return found


def imports(path: Path) -> Iterator[tuple[str, int]]:
    """Modules of dqt that a file imports, anywhere in it, as (dotted name below dqt, line)."""
    known = {name for name, _ in modules()}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative imports hide the layer"
            base = node.module or ""
            names = [f"{base}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        for name in names:
            if name.split(".")[0] == "dqt":
                below = name.removeprefix("dqt").removeprefix(".")
                # `from dqt.errors import DqtError` names a module and something in it.
                yield (below if below in known else below.rpartition(".")[0]), node.lineno


def layer(module: str) -> int:
    """Index of a module's layer."""
    while module:
        if module in LAYERS:
            return LAYERS.index(module)
        module = module.rpartition(".")[0]
    raise AssertionError(f"a module in no layer: add it to LAYERS in {__file__}")


@pytest.mark.parametrize(("module", "path"), [m for m in modules() if m[0] not in FREE], ids=lambda m: str(m))
def test_imports_run_downward(module: str, path: Path) -> None:
    own = layer(module)
    upward = [
        f"line {line}: {module} (layer {own}) imports {target} (layer {layer(target)})"
        for target, line in imports(path)
        if target not in FREE and layer(target) > own
    ]
    assert not upward


@pytest.mark.parametrize("module", sorted(FREE - {""}))
def test_free_modules_import_only_the_errors(module: str) -> None:
    path = SOURCE / (module.replace(".", "/") + ".py")
    assert {target for target, _ in imports(path)} <= {"errors", ""}


@pytest.mark.parametrize(
    "statement",
    [
        "import dqt",
        "import dqt.cli",
        "import dqt.cli; dqt.cli.main(['--help'])",
        "import dqt.cli; dqt.cli.main(['train', '--help'])",
        "import dqt.cli; dqt.cli.main(['train', '--no-such-option'])",
        "import dqt.cli; dqt.cli.main(['train', '--bits', '9'])",
        "import dqt.cli; dqt.cli.main(['train', '--preset', 'tinny'])",
        "import dqt.cli; dqt.cli.main(['trian'])",
        "import dqt.cli; dqt.cli.main(['eval', 'no-such-run'])",
        "import dqt.cli; dqt.cli.main(['compare', '--help'])",
        "import dqt.cli; dqt.cli.main(['compare', 'mian'])",
        "import dqt.cli; dqt.cli.main(['plan', '--preset', '7b', '--bits', '4'])",
    ],
)
def test_command_line_starts_light(statement: str) -> None:
    code = (
        f"import sys\ntry:\n    {statement}\nexcept SystemExit:\n    pass\n"
        f"print('LOADED', [name for name in {HEAVY!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "LOADED []"
