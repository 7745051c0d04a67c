"""How much rounding adds to the variance of a weight that sits in a well: stochastic against low discrepancy.

    python benchmarks/rounding.py

Simulated, no network: each weight w is on a grid of whole steps and sees the gradient c * w plus noise of
standard deviation 1, kept in a first moment m; the displacement is -lr * m. Without rounding the variance of
w settles at some value; the table gives that, and what each rounding adds to it. One seed; 2,000 weights.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dqt.numerics.rounding import golden_sequence, low_discrepancy_rounding, stochastic_rounding

WEIGHTS, STEPS, SETTLED = 2000, 6000, 2000
CASES = [  # beta1, lr in grid steps, curvature c
    (0.9, 0.5, 0.1),
    (0.9, 0.5, 0.01),
    (0.9, 0.15, 0.01),
    (0.9, 0.05, 0.01),
    (0.95, 0.15, 0.01),
    (0.95, 0.05, 0.01),
    (0.0, 0.15, 0.01),
]


def rounded(kind: str, displacement: Tensor, first: Tensor, step: int, generator: torch.Generator) -> Tensor:
    """The displacement as a rounding makes it."""
    if kind == "none":
        return displacement
    if kind == "stochastic":
        words = torch.randint(0, 2**32, displacement.shape, generator=generator)
        return stochastic_rounding(displacement, words).float()
    return low_discrepancy_rounding(displacement, golden_sequence(first, step)).float()


def variance(kind: str, beta1: float, lr: float, curvature: float) -> float:
    """Mean square of the weights after they have settled."""
    noise = torch.Generator().manual_seed(0)
    rounding = torch.Generator().manual_seed(1)
    first = torch.randint(0, 2**32, (WEIGHTS,), generator=rounding)
    weight, moment, seen = torch.zeros(WEIGHTS), torch.zeros(WEIGHTS), []
    for step in range(STEPS):
        gradient = curvature * weight + torch.randn(WEIGHTS, generator=noise)
        moment = beta1 * moment + (1 - beta1) * gradient
        weight = weight + rounded(kind, -lr * moment, first, step, rounding)
        if step >= SETTLED and step % 10 == 0:
            seen.append(float(weight.square().mean()))
    return sum(seen) / len(seen)


def main() -> None:
    """Prints the table."""
    print("| beta1 | lr | c | without rounding | stochastic adds | low discrepancy adds | ratio |")
    print("|---|---|---|---|---|---|---|")
    for beta1, lr, curvature in CASES:
        plain, sr, low = (
            variance(kind, beta1, lr, curvature) for kind in ("none", "stochastic", "low discrepancy")
        )
        settings = f"{beta1} | {lr} | {curvature}"
        ratio = (low - plain) / (sr - plain)
        print(
            f"| {settings} | {plain:.2f} | {sr - plain:.2f} | {low - plain:.2f} | {ratio:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
