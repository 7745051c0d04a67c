"""The base of a config's sections: frozen dataclasses that check the types and values of their fields.

Types are exact, because TOML's are: "3" is no number and 1 is no truth value. Messages name the field as it
is written in the file.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, ClassVar

from dqt.errors import ConfigError, did_you_mean


class Section:
    """Checks the types of its fields, then what `_validate` adds."""

    section: ClassVar[str]

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for each in fields(typing.cast(Any, self)):
            where = f"{self.section}.{each.name}"
            object.__setattr__(self, each.name, _checked(where, getattr(self, each.name), hints[each.name]))
        self._validate()

    def _validate(self) -> None:
        """Refuses values that make no sense."""

    def _at_least(self, minimum: float, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            if value is not None and not minimum <= value < float("inf"):
                raise ConfigError(f"{self.section}.{name} = {value} makes no sense: use {minimum} or more")

    def _share(self, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise ConfigError(f"{self.section}.{name} = {value} makes no sense: use 0 to 1")

    def _one_of(self, name: str, choices: typing.Iterable[str]) -> None:
        value = getattr(self, name)
        if value is not None and value not in choices:
            raise ConfigError(f"unknown {self.section}.{name} {value!r}; {did_you_mean(value, choices)}")


_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "a string"}


def _checked(where: str, value: Any, hint: Any) -> Any:
    """`value` as the type that `hint` stands for; whole numbers are numbers too, and lists become tuples."""
    if isinstance(hint, types.UnionType):
        options = typing.get_args(hint)
        return None if value is None and type(None) in options else _checked(where, value, options[0])
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is tuple:
        variable = arguments[-1] is Ellipsis
        if not isinstance(value, list | tuple) or not (variable or len(value) == len(arguments)):
            wanted = "a list" if variable else f"a list of {len(arguments)}"
            raise ConfigError(f"{where} must be {wanted}, not {value!r}")
        return tuple(_checked(where, item, arguments[0]) for item in value)
    if origin is dict:
        if not isinstance(value, Mapping):
            raise ConfigError(f"{where} must be a table of names and values, not {value!r}")
        return {str(key): _checked(f"{where} {key!r}", item, str) for key, item in value.items()}
    if hint is float and type(value) is int:
        return float(value)
    if (
        hint is str
        and type(value) is int
        and where.startswith(("quant.bits", "quant.embeddings", "quant.rules"))
    ):
        return str(value)  # bits = 4 means bits = "4"
    if type(value) is not hint:
        raise ConfigError(f"{where} must be {_NAMES[hint]}, not {value!r}")
    return value
