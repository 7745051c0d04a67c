"""Row 15: a token shard that changes or goes, between runs or during one, is named; no step is half done."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from dqt.data import shards
from dqt.data.prepare import Corpus
from dqt.data.shards import BLOCK, open_shard, token_dtype, write_shard
from dqt.errors import DataError


def hashing_each_block(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(shards, "_matches", lambda block, sums, number: True)


@pytest.mark.row(15, hashing_each_block)
def test_a_shard_that_changes_under_a_run(tmp_path: Path) -> None:
    count = 3 * BLOCK
    entry = write_shard(tmp_path / "t.bin", [np.arange(count) % 300], token_dtype(300))
    opened = open_shard(tmp_path, entry, 300, verify=False)
    assert opened.read(count - 5, 5).tolist() == [(count - 5 + i) % 300 for i in range(5)]
    raw = bytearray((tmp_path / "t.bin").read_bytes())
    raw[2 * BLOCK + 100] ^= 1  # in place, as a disk does it
    (tmp_path / "t.bin").write_bytes(raw)
    assert opened.read(0, 100).tolist() == list(range(100))
    with pytest.raises(DataError, match=rf"t.bin was altered between bytes {2 * BLOCK} and {3 * BLOCK}"):
        opened.read(BLOCK, 20)
    with pytest.raises(DataError, match=r"t.bin was altered between"):
        open_shard(tmp_path, entry, 300)


@pytest.mark.row(15, hashing_each_block)
def test_a_shard_that_shrinks_or_goes(tmp_path: Path) -> None:
    tokens = np.arange(3 * BLOCK) % 300
    entry = write_shard(tmp_path / "t.bin", [tokens], token_dtype(300))
    opened = open_shard(tmp_path, entry, 300)
    (tmp_path / "t.bin").unlink()
    assert opened.read(7, 5).tolist() == tokens[7:12].tolist()  # the open file is still there
    with pytest.raises(DataError, match=r"t.bin is missing"):
        open_shard(tmp_path, entry, 300)
    entry = write_shard(tmp_path / "t.bin", [tokens], token_dtype(300))
    opened = open_shard(tmp_path, entry, 300)
    with (tmp_path / "t.bin").open("r+b") as file:
        file.truncate(BLOCK)
    with pytest.raises(DataError, match=r"altered between bytes"):
        opened.read(2 * BLOCK, 5)
    with (tmp_path / "t.bin").open("r+b") as file:
        file.truncate(3 * BLOCK * 2)  # as long as before, and empty behind
    with pytest.raises(DataError, match=r"altered between bytes"):
        opened.read(2 * BLOCK, 5)


@pytest.mark.row(15, hashing_each_block)
def test_the_step_is_not_half_applied(tmp_path: Path) -> None:
    from test_numbers import a_learner, everything

    subject = a_learner(tmp_path, train__accumulation=2)
    directory = Path(shutil.copytree(subject.corpus.directory, tmp_path / "corpus"))
    corpus = Corpus.open(directory)
    object.__setattr__(subject, "corpus", corpus)
    subject.train_step(telemetry=False)
    before = everything(subject)
    second = subject.sampler.window(subject.samples + 2)  # of the second micro-batch
    raw = bytearray((directory / "train.bin").read_bytes())
    raw[2 * second] ^= 1
    (directory / "train.bin").write_bytes(raw)
    first = subject.sampler.window(subject.samples)
    if first * 2 // BLOCK == second * 2 // BLOCK:
        assert subject.samples == 4  # both read the block, and the first one finds it
    with pytest.raises(DataError, match=r"train.bin was altered between bytes \d+ and \d+"):
        subject.train_step(telemetry=False)
    after = everything(subject)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert all(parameter.grad is None for parameter in subject.model.parameters())
