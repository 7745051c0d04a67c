"""Malformed files: content of safetensors, JSON and TOML files, and changes of JSON that was valid."""

from __future__ import annotations

import json
import struct
from typing import Any


def safetensors_of(header: Any, data: bytes = b"\0" * 64, size: int | None = None) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if size is None else size) + raw + data


def one(**changes: Any) -> dict[str, Any]:
    return {"a": {"dtype": "F32", "shape": [4, 4], "data_offsets": [0, 64], **changes}}


SAFETENSORS: dict[str, bytes] = {
    "empty": b"",
    "only a size": struct.pack("<Q", 100),
    "a huge header": safetensors_of(one(), size=2**63),
    "a header of the file's size": safetensors_of(one(), size=2**20) + b" " * 2**20,
    "no JSON": safetensors_of(b"{" * 100),
    "deep": safetensors_of(b'{"a":' + b"[" * 100_000),
    "a list": safetensors_of([1]),
    "huge shape": safetensors_of(one(shape=[2**40, 2**40])),
    "overflowing shape": safetensors_of(one(shape=[2**63, 2])),
    "negative shape": safetensors_of(one(shape=[-4, -4])),
    "a shape of floats": safetensors_of(one(shape=[4.0, 4.0])),
    "offsets beyond the end": safetensors_of(one(data_offsets=[0, 640], shape=[40, 4])),
    "offsets backwards": safetensors_of(one(data_offsets=[64, 0])),
    "overlaps": safetensors_of({**one(), "b": {"dtype": "F32", "shape": [4, 4], "data_offsets": [0, 64]}}),
    "a hole": safetensors_of({"a": {"dtype": "F32", "shape": [4], "data_offsets": [48, 64]}}),
    "another dtype": safetensors_of(one(dtype="F64")),
    "no dtype": safetensors_of(one(dtype="object")),
    "a million names": safetensors_of({str(i): one()["a"] for i in range(100_000)}),
}
JSONS: dict[str, bytes] = {
    "empty": b"",
    "half": b'{"step": 1',
    "deep": b"[" * 200_000,
    "deep objects": b'{"a":' * 200_000,
    "a huge number": b'{"step": ' + b"9" * 100_000 + b"}",
    "a list": b"[1, 2]",
    "null": b"null",
    "not UTF-8": b'{"a": "\xff\xfe"}',
    "surrogates": b'{"format_version": "\\ud800", "files": {}}',
    "NaN": b'{"format_version": NaN}',
    "large": b'{"a": "' + b"x" * (20 << 20) + b'"}',
}
TOMLS: dict[str, bytes] = {
    "half": b"[train",
    "deep": b"a = " + b"[" * 100_000,
    "deep tables": b"a = " + b"{a = " * 50_000,
    "a huge number": b"[train]\nsteps = " + b"9" * 100_000,
    "not UTF-8": b'[train]\nout = "\xff"',
    "large": b"# " + b"x" * (2 << 20),
    "types": b'[train]\nsteps = "many"',
    "negative": b"[train]\nsteps = -1",
    "inf": b"[optim]\nlr = inf",
    "a section that is none": b"train = 3",
    "unknown": b"[trian]\nsteps = 3",
}
STATES: dict[str, dict[str, Any]] = {
    "a text for a step": {"step": "4"},
    "a negative step": {"step": -1},
    "a huge step": {"step": 10**40},
    "no samples": {"samples": None},
    "endless": {"elapsed": float("inf")},
    "no config": {"config": [1]},
    "no sections": {"config": {"train": 3}},
    "no optimizer": {"optimizer": {}},
    "other scalars": {"optimizer": {"param_groups": [], "scalars": {"x": 3}}},
    "an optimizer of others": {
        "optimizer": {"param_groups": [{"param_names": ["x"]}], "scalars": {"x": {"step": 1}}}
    },
    "a huge model": {"config": {"model": {"preset": "13b"}}},
    "many layers": {"config": {"model": {"preset": "micro", "num_hidden_layers": 10**7}}},
    "wide layers": {"config": {"model": {"preset": "micro", "hidden_size": 2**30, "num_attention_heads": 2}}},
    "losses of words": {"losses": ["x"]},
}
CONFIGS: dict[str, dict[str, Any]] = {
    "many layers": {"num_hidden_layers": 10**9},
    "no layers": {"num_hidden_layers": None},
    "wide layers": {"hidden_size": 2**40},
    "a huge vocabulary": {"vocab_size": 2**40},
    "negative": {"hidden_size": -8},
    "words": {"hidden_size": "wide"},
    "another class": {"model_type": "gpt2"},
    "a wrong activation": {"hidden_act": "no such thing"},
    "heads": {"num_attention_heads": 0},
    "rope": {"rope_parameters": {"rope_type": "no such thing"}},
}


def low_bit(name: str, **changes: Any) -> dict[str, Any]:
    """A dqt.json in which one tensor is described so."""
    return {"tensors": {name: {"bits": "4", "shape": [8, 8], "scale": [], "products": {}, **changes}}}


UP = "model.layers.0.mlp.up_proj.weight"
INFOS: dict[str, dict[str, Any]] = {
    "no tensors": {"tensors": None},
    "bits": low_bit("model.norm.weight", bits="99", shape=[8]),
    "a huge scale": low_bit(UP, bits="ternary", scale=[2**40]),
    "a huge shape": low_bit(UP, shape=[2**40, 2**40]),
    "a path": low_bit("../../x.weight"),
    "dunders": low_bit("__class__.__init__.weight"),
    "a method of a list": {"method": ["bitnet"]},
}
SPLITS: dict[str, dict[str, Any]] = {
    "a path": {"file": "../../secret.bin"},
    "an absolute path": {"file": "/etc/passwd"},
    "a pickled dtype": {"dtype": "O"},
    "a long dtype": {"dtype": "S1000000000"},
    "a number for a name": {"file": 3},
    "negative": {"tokens": -1},
    "many tokens": {"tokens": 2**62},
    "half a token": {"tokens": 3.5},
    "no hash": {"sums_sha256": None},
}
