"""What the measuring code asks of a family of attention: its kind of case, its implementations and its baselines."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from fastattn.bench import suites
from fastattn.bench.case import Case, Implementation
from fastattn.bench.linear import suites as linear
from fastattn.bench.linear.problem import LinearProblem
from fastattn.bench.sparse import suites as sparse
from fastattn.bench.sparse.problem import SparseProblem


@dataclass(frozen=True)
class Family:
    """`baselines` are what speed-ups are stated against; tables show those against `columns`, by their titles.

    `steady` is the implementation that two runs are compared by, so that the machine's own speed cancels.
    """

    problem: type[Case]
    implementation: Callable[[str], Implementation]
    default: Callable[[torch.device], tuple[str, ...]]
    baselines: tuple[str, ...]
    columns: dict[str, str]
    steady: str


FAMILIES = {
    "dense": Family(
        suites.Problem,
        suites.implementation,
        suites.default_implementations,
        ("naive", "sdpa", "flex"),
        {"naive": "naive", "sdpa": "SDPA"},
        "sdpa",
    ),
    "linear": Family(
        LinearProblem,
        linear.implementation,
        linear.default_implementations,
        ("naive", "torch", "fla", "sdpa", "flash"),
        {"naive": "naive", "torch": "torch", "fla": "FLA"},
        "torch",
    ),
    "sparse": Family(
        SparseProblem,
        sparse.implementation,
        sparse.default_implementations,
        ("naive", "sdpa", "flex", "dense"),
        {"naive": "naive", "sdpa": "SDPA", "flex": "flex", "dense": "dense"},
        "dense",
    ),
}


def family_of(case: Case) -> Family:
    return FAMILIES[case.family]
