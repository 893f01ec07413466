"""Memory as a function of length: a + b L + c L², fitted, and what follows from the fit."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import torch

# Float64 leaves about this much of an exact fit's relative residual.
NOISE = 1e-9
QUADRATIC_GAIN = 10.0
QUADRATIC_SHARE = 1e-3


@dataclass(frozen=True)
class Fit:
    """bytes = constant + linear * L + quadratic * L²; `residual` is the largest relative deviation of a point."""

    constant: float
    linear: float
    quadratic: float
    residual: float

    def at(self, length: float) -> float:
        return self.constant + self.linear * length + self.quadratic * length**2

    def dominant(self, length: int) -> str:
        """The term that is largest at `length`: "constant", "linear" or "quadratic"."""
        terms = {
            "constant": self.constant,
            "linear": self.linear * length,
            "quadratic": self.quadratic * length**2,
        }
        return max(terms, key=lambda name: terms[name])

    def longest(self, capacity: float) -> int | None:
        """The largest whole length that needs no more than `capacity` bytes; None where memory does not grow."""
        room = capacity - self.constant
        if room <= 0:
            return 0
        if self.quadratic > 0:
            # The form of the root that does not cancel where the quadratic term is small.
            root = 2 * room / (self.linear + math.sqrt(self.linear**2 + 4 * self.quadratic * room))
            return math.floor(root)
        return math.floor(room / self.linear) if self.linear > 0 else None


def fit_growth(lengths: Sequence[int], sizes: Sequence[float]) -> Fit:
    """Non-negative least squares on relative deviations, so that short lengths count as much as long ones.

    Three coefficients have seven non-empty supports: each is solved without the sign condition, and the best of those
    that satisfy it is the answer (Lawson and Hanson, 1974, reduce larger problems to the same search). A term counts
    only if it improves the fit beyond rounding, a quadratic one only if it improves the sum of squares tenfold and is
    a thousandth of the longest length's size: buffers grow in steps, and a step is no law of growth to extrapolate by.

    Raises:
        ValueError: fewer than two points, or a size that is not positive.
    """
    if len(lengths) < 2 or len(lengths) != len(sizes):
        raise ValueError(f"fit_growth: needs at least two points, got {len(lengths)} lengths and {len(sizes)} sizes")
    if min(sizes) <= 0:
        raise ValueError(f"fit_growth: sizes must be positive, got {min(sizes)}")
    length_N = torch.tensor(lengths, dtype=torch.float64)
    size_N = torch.tensor(sizes, dtype=torch.float64)
    scale = length_N.max()
    design_NT = torch.stack([torch.ones_like(length_N), length_N / scale, (length_N / scale) ** 2], dim=1)
    design_NT = design_NT / size_N[:, None]
    best_loss, best_T = math.inf, torch.zeros(3, dtype=torch.float64)
    supports = [s for count in (1, 2, 3) for s in combinations(range(3), count) if count <= len(lengths)]
    for support in sorted(supports, key=lambda support: 2 in support):
        part = design_NT[:, list(support)]
        solution = torch.linalg.lstsq(part, torch.ones_like(size_N)).solution
        if solution.min() < 0 or (2 in support and solution[-1] < QUADRATIC_SHARE * size_N[length_N.argmax()]):
            continue
        loss = (part @ solution - 1).square().sum().item()
        gain = QUADRATIC_GAIN if 2 in support and best_T[2] == 0 else 1.0
        if loss * gain < best_loss * (1 - NOISE) - NOISE**2:
            best_loss = loss
            best_T = torch.zeros(3, dtype=torch.float64)
            best_T[list(support)] = solution
    residual = (design_NT @ best_T - 1).abs().max().item()
    constant, linear, quadratic = (best_T / torch.stack([scale**0, scale, scale**2])).tolist()
    return Fit(constant, linear, quadratic, residual)
