"""What a safetensors file can't say of its low-bit weights: format, products, and that they are whole.

Every bit pattern is a legal weight, so that no loader can tell damage; the SHA-256 of a weight's codes and
scale can, at the price of a pass over them, about a second a gigabyte.
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from dqt.choices import Products
from dqt.errors import DqtError, ModelError
from dqt.numerics.formats import Format, parse_bits
from dqt.tensor import QuantizedTensor


@dataclass(frozen=True)
class Packed:
    """What a file can't say of a low-bit weight.

    Attributes:
        format: Of its codes.
        products: How linear layers multiply with it.
        sha256: Of codes and scale; None if nobody noted it.
    """

    format: Format
    products: Products
    sha256: str | None = None


def describe(model: nn.Module, hashes: bool = False) -> list[dict[str, Any]]:
    """The low-bit weights of a model: a group for each format, with the SHA-256 of each weight by name."""
    groups: dict[tuple[Format, Products], dict[str, str | None]] = {}
    for name, weight in model.named_parameters():
        if isinstance(weight, QuantizedTensor):
            group = groups.setdefault((weight.format, weight.products), {})
            group[name] = fingerprint(weight) if hashes else None
    return [
        {"bits": format.name, "products": asdict(products), "sha256": names}
        for (format, products), names in groups.items()
    ]


def read_description(groups: Any) -> dict[str, Packed]:
    """The low-bit weights that `describe` named.

    Raises:
        ModelError: If it is no such description.
    """
    found: dict[str, Packed] = {}
    try:
        for group in groups:
            format, products = parse_bits(group["bits"]), Products(**group["products"])
            for name, sha256 in group["sha256"].items():
                if not name.endswith(".weight") or name in found:
                    raise ValueError(f"{name!r} is named twice, or is no weight")
                found[name] = Packed(format, products, sha256)
    except (KeyError, TypeError, AttributeError, ValueError, DqtError) as error:
        raise ModelError(f"quantization_config in config.json is damaged: {error!r:.200}") from error
    return found


def fingerprint(weight: QuantizedTensor) -> str:
    """SHA-256 of a weight's codes and scale, as they are in a file."""
    digest = hashlib.sha256()
    for part in (weight.codes, weight.scale):
        digest.update(part.detach().cpu().contiguous().numpy().data)
    return digest.hexdigest()


def check(name: str, weight: QuantizedTensor, expected: Packed) -> None:
    """Raises ModelError unless a weight that was loaded is whole."""
    if expected.sha256 is not None and fingerprint(weight) != expected.sha256:
        raise ModelError(
            f"{name} is damaged: codes or scale differ from the SHA-256 in config.json; use another copy"
        )
    try:
        weight.check_codes()
    except ValueError as error:
        raise ModelError(f"{name} is damaged: {error}; use another copy") from error
    if not bool((weight.scale.isfinite() & (weight.scale > 0)).all()):
        raise ModelError(f"{name} is damaged: its scale is not finite and positive; use another copy")
