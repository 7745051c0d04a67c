"""Optimizers that train low-bit weights in place: an update rule each, and one shared write-back."""

from dqt.optim.adamw import AdamW
from dqt.optim.paper import PaperAdamW
from dqt.optim.release import GradientRelease

__all__ = ["AdamW", "GradientRelease", "PaperAdamW"]
