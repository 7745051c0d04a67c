"""Exports of trained models in the programs that they are for: how near they are, and how large.

    python benchmarks/export.py RUN... [--tokens 2000] [--to gguf hf hf-bitnet]

Each run is exported to a temporary directory by `dqt export --verify`, which runs the result in
`transformers` or llama.cpp on the text of Python's standard library. A size stands beside what the format's
bits make: low-bit weights in its bits, everything else in its floats. Nothing is timed.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from dqt.errors import ModelError
from dqt.export.blocks import block_type
from dqt.export.command import export
from dqt.export.source import Source, load_source, without_masters
from dqt.tensor import QuantizedTensor


def expected_bytes(source: Source, target: str) -> tuple[int, int]:
    """Bytes of low-bit weights in the format's bits, and of everything else in its floats."""
    low, floats = 0.0, 0
    for parameter in without_masters(source).model.parameters():
        matrix = parameter.ndim > 1
        if isinstance(parameter, QuantizedTensor) and matrix and target != "hf":
            kind = block_type(parameter.format, parameter.shape[1])
            low += parameter.numel() * (kind.bits if target == "gguf" and kind else 2) / 8
        else:
            floats += parameter.numel() * (2 if target == "gguf" and matrix else 4)
    return round(low), floats


def main() -> None:
    """Prints a line for each run and format."""
    parser = argparse.ArgumentParser()
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--tokens", type=int, default=2000)
    parser.add_argument("--to", nargs="+", default=["hf", "hf-bitnet", "gguf"])
    arguments = parser.parse_args()
    columns = (
        *("run", "to", "tokens", "next token, nats", "beyond the bound", "any token", "other likeliest"),
        *("own margin there", "int8 gap", "bytes", "over bits + floats"),
    )
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    for run in arguments.runs:
        source = load_source(run)
        for target in arguments.to:
            with tempfile.TemporaryDirectory() as folder:
                try:
                    found = export(run, target, Path(folder) / "out", verify_tokens=arguments.tokens)
                except ModelError as error:
                    print(f"| {run.name} | {target} | {' '.join(str(error).split())} |", flush=True)
                    continue
            agreement = found.agreement
            assert agreement is not None
            weights = sum(n for f, n in found.files.items() if f.endswith((".safetensors", ".gguf")))
            low, floats = expected_bytes(source, target)
            cells = (
                *(run.name, target, agreement.tokens, f"{agreement.largest:.2g}", agreement.beyond),
                *(f"{agreement.anywhere:.2g}", agreement.disagreements, f"{agreement.margin:.2g}"),
                "" if agreement.gap is None else f"{agreement.gap:.2g}",
                *(f"{weights:,}", f"{weights / (low + floats) - 1:+.2%}"),
            )
            print(f"| {' | '.join(map(str, cells))} |", flush=True)


if __name__ == "__main__":
    main()
