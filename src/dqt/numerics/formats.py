"""The low-bit number formats: which integers a weight can be, and how many bits each takes.

A weight is `(code - offset) * scale`: neighbours lie exactly one `scale` apart in every format, so rounding,
write-back and telemetry need no special cases. Only binary has an offset: its codes {0, 1} stand for the
values ±1/2. All others are two's complement integers. Ternary is stored in 2 bits of which one pattern (-2)
is unused: 5 codes a byte would save 0.4 bits and cost a division by 3 for every weight read.
"""

from __future__ import annotations

from dataclasses import dataclass

from dqt.errors import ConfigError, did_you_mean


@dataclass(frozen=True)
class Format:
    """One low-bit format.

    Attributes:
        name: What the user writes: "1", "ternary", "2" to "8".
        bits: Bits a code takes in packed storage.
        qmin: The smallest code.
        qmax: The largest code.
        offset: The code's value in grid steps is `code - offset`.
    """

    name: str
    bits: int
    qmin: int
    qmax: int
    offset: float = 0.0

    @property
    def levels(self) -> int:
        """Number of different codes."""
        return self.qmax - self.qmin + 1

    @property
    def signed(self) -> bool:
        """Whether packed fields are two's complement."""
        return self.qmin < 0

    @property
    def half_range(self) -> float:
        """Distance from zero to the largest value, in grid steps."""
        return self.qmax - self.offset

    @property
    def product_factor(self) -> int:
        """Integer products use `product_factor * (code - offset)`, the least multiple that is an integer."""
        return 2 if self.offset else 1

    def __str__(self) -> str:
        return self.name


FORMATS: dict[str, Format] = {
    "1": Format("1", 1, 0, 1, offset=0.5),
    "ternary": Format("ternary", 2, -1, 1),
    **{str(n): Format(str(n), n, -(2 ** (n - 1)), 2 ** (n - 1) - 1) for n in range(2, 9)},
}


# Step / sigma that minimizes the mean square error of rounding a Gaussian to a symmetric grid of n bits (Max,
# 1960). On the two's complement grid its error is within 0.7 % of the least one, at 2 bits, and nearer above:
# see `tests/test_scales.py`. Ternary and binary have it too, for who asks for `gaussian` there.
GAUSSIAN_STEP = {
    "1": 1.596,
    "ternary": 1.224,
    "2": 0.996,
    "3": 0.586,
    "4": 0.335,
    "5": 0.188,
    "6": 0.104,
    "7": 0.057,
    "8": 0.031,
}


def parse_bits(bits: str | int | Format) -> Format:
    """Returns the format that `bits` names.

    Args:
        bits: "ternary", or 1 to 8 as a number or a string.

    Raises:
        ConfigError: If there is no such format.
    """
    if isinstance(bits, Format):
        return bits
    key = str(bits).strip().lower()
    if isinstance(bits, bool) or key not in FORMATS:
        raise ConfigError(f"unknown bits {bits!r}; {did_you_mean(key, FORMATS)}")
    return FORMATS[key]
