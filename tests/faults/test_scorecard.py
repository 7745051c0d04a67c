"""The scorecard has twenty rows; every one has a test here, and a mutation that shows that it can fail."""

from __future__ import annotations

import ast
from collections import defaultdict
from pathlib import Path

ROWS = {
    1: "resumed at N, twice, in the middle of an epoch: bitwise equal, same batches",
    2: "kill -9 at every write point of a save, while overwriting, while purging",
    3: "a stale staging directory, half a checkpoint, foreign files",
    4: "any file cut at every sixteenth, emptied or missing",
    5: "one bit flipped in any byte of any file",
    6: "no space for a checkpoint, shards, metrics",
    7: "a directory that can't be written, is not there, is a file",
    8: "signals once and twice, in step, evaluation, warm-up, save, data preparation",
    9: "NaN and Inf in the loss, in one gradient element, in an update, in a scale",
    10: "a spike of the loss",
    11: "pickle payloads under every name that a loader opens",
    12: "malformed safetensors, JSON, TOML, tokenizer, shard manifest",
    13: "resumed with another model, bits, method, vocabulary, data",
    14: "an older and a newer format",
    15: "a shard changed or lost between runs, or during one",
    16: "two runs in one directory",
    17: "an allocation that fails",
    18: "non-ASCII paths, odd locale, no home",
    19: "2,000 steps, 50 random kills: bitwise equal, memory does not grow",
    20: "kernels under sanitizers and random inputs",
}


def test_every_row_has_a_test_and_a_mutation() -> None:
    mutations: dict[int, set[str]] = defaultdict(set)
    for path in Path(__file__).parent.glob("test_*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "pytest.mark.row":
                number, *taken = node.args
                assert taken, f"{path.name}: row {ast.unparse(number)} without a mutation"
                mutations[ast.literal_eval(number)] |= {ast.unparse(each) for each in taken}
    assert sorted(mutations) == sorted(ROWS)
