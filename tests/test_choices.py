"""What a config may choose is what there is."""

from __future__ import annotations

from dqt import choices
from dqt.numerics.rounding import ROUNDINGS
from dqt.numerics.scales import SCALE_RULES


def test_the_names_are_those_of_the_functions() -> None:
    assert tuple(ROUNDINGS) == choices.ROUNDINGS
    assert tuple(name for name, rule in ROUNDINGS.items() if rule.gate is not None) == choices.GATED_ROUNDINGS
    assert tuple(SCALE_RULES) == choices.SCALE_RULES
