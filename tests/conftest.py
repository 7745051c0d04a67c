"""Every test starts from the same seed, on one thread (the suite may share two cores)."""

from __future__ import annotations

import os

os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel is defined; there may be no GPU

import pytest
import torch
from hypothesis import settings

from dqt.ops.bf16_guard import ensure_bf16_products

ensure_bf16_products()  # some tests run bfloat16 products; this must come before the process's first product
torch.set_num_threads(1)
settings.register_profile("dqt", deadline=None, max_examples=30, derandomize=True, database=None)
settings.load_profile("dqt")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
