"""Every test starts from the same seed, on one thread (the suite may share two cores)."""

from __future__ import annotations

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)
settings.register_profile("dqt", deadline=None, max_examples=30, derandomize=True, database=None)
settings.load_profile("dqt")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
