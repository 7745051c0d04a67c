"""Optimizers that train low-bit weights in place: an update rule each, and one shared write-back."""

from dqt.optim.adafactor import Adafactor
from dqt.optim.adamw import AdamW
from dqt.optim.paper import PaperAdafactor, PaperAdamW
from dqt.optim.release import GradientRelease
from dqt.optim.sgd import SGD

__all__ = ["SGD", "Adafactor", "AdamW", "GradientRelease", "PaperAdafactor", "PaperAdamW"]
