"""Errors that a user can cause.

Each message says what was wrong, where, and what to do, in one or two lines. The command line prints it
without a traceback and exits with status 2; library users catch `DqtError`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class DqtError(Exception):
    """Base class of every error that `dqt` raises on purpose."""


class ConfigError(DqtError):
    """A setting that is unknown, out of range, or at odds with another one."""


class DataError(DqtError):
    """Text, tokenizer or token shards that cannot be used."""


class ModelError(DqtError):
    """A model, run or checkpoint directory that cannot be read or written."""


class WriteError(ModelError):
    """A file or directory that can't be written, for want of space or permission; the old one is intact."""


class FloatWriteError(DqtError, TypeError):
    """Floats that an operation would write into a low-bit weight, as other libraries' optimizers do."""


class DivergedError(DqtError):
    """Training that has left the numbers it can go on from; the same run would end at the same step again."""


class NonFiniteError(DivergedError):
    """NaN or Inf in a loss, a gradient or an update; the named tensor was not changed."""


class LossSpikeError(DivergedError):
    """A loss far above those before it; nothing was changed."""


def did_you_mean(name: str, choices: Iterable[str]) -> str:
    """Returns the tail of a message about an unknown `name`: the nearest valid one, then all of them."""
    names = [str(choice) for choice in choices]
    by_lower = {choice.lower(): choice for choice in names}
    nearest = difflib.get_close_matches(str(name).lower(), by_lower, n=1, cutoff=0.4)
    hint = f"did you mean {by_lower[nearest[0]]!r}? " if nearest else ""
    return f"{hint}valid: {', '.join(names)}"
