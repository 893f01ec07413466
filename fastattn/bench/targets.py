"""Figures that fastattn is held to, and whether a run reached them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from fastattn.bench.case import Case
from fastattn.bench.results import OK, Results, Row

SINGLE_CASE = 0.85


Run = Mapping[Case, Mapping[str, Row]]  # all rows by problem and implementation


@dataclass(frozen=True)
class Measure:
    """What a target is stated in. `of` takes fastattn's row and the run that it is of."""

    name: str
    of: Callable[[Row, Run], float | None]
    percent: bool = False
    beside: int | None = None  # another length that it looks at


def speedup(base: str) -> Measure:
    """How many times as fast as a baseline."""
    return Measure(f"x {base}", lambda row, run: row.speedup.get(base))


def time_at(seqlen: int, *, each_token: bool) -> Measure:
    """The time of a call, or of each token, at another length over that at the row's own: 1 where it stays the same."""

    def of(row: Row, run: Run) -> float | None:
        there = run.get(replace(row.problem, seqlen=seqlen), {}).get(row.implementation)
        if there is None or not there.median_ms or not row.median_ms or there.status != OK:
            return None
        ratio = there.median_ms / row.median_ms
        return ratio * row.problem.seqlen / seqlen if each_token else ratio

    return Measure(f"of the time at {seqlen // 1024}k" + (" per token" if each_token else ""), of, beside=seqlen)


def _gradient_error_beside_sdpa(row: Row, run: Run) -> float | None:
    sdpa = run.get(row.problem, {}).get("sdpa")
    names = [name for name in row.errors if name.startswith("grad_")]
    if sdpa is None or not names or any(name not in sdpa.errors for name in names):
        return None
    return min(sdpa.errors[name] / row.errors[name] for name in names)


# Of the machine's limit: the matrix-product peak, or the read bandwidth in decoding.
fraction = Measure("of the limit", lambda row, run: row.peak_fraction, percent=True)
# How many times as far from float64 SDPA's gradients are, in the one where that is least.
gradient_error_beside_sdpa = Measure("x more exact than sdpa", _gradient_error_beside_sdpa)
TIMES_SDPA = speedup("sdpa")


@dataclass(frozen=True)
class Target:
    """A figure to reach on the problems that `picks` picks.

    It is met when the geometric mean over the cases reaches `goal` and every case reaches `SINGLE_CASE` of it.
    """

    what: str
    goal: float
    picks: Callable[[Any], bool]
    measure: Measure = TIMES_SDPA


@dataclass(frozen=True)
class Outcome:
    """A target against a run; `mean` and `lowest` are None where no case was measured."""

    target: Target
    cases: int
    unmeasured: int
    mean: float | None
    lowest: float | None

    @property
    def met(self) -> bool:
        if self.mean is None or self.lowest is None or self.unmeasured:
            return False
        return self.mean >= self.target.goal and self.lowest >= SINGLE_CASE * self.target.goal


def judge_target(target: Target, results: Results) -> Outcome:
    by_problem: dict[Case, dict[str, Row]] = {}
    for row in results.rows:
        by_problem.setdefault(row.problem, {})[row.implementation] = row
    figures = [
        target.measure.of(beside["fastattn"], by_problem) if beside["fastattn"].status == OK else None
        for problem, beside in by_problem.items()
        if "fastattn" in beside and target.picks(problem)
    ]
    found = [figure for figure in figures if figure]
    mean = math.exp(sum(map(math.log, found)) / len(found)) if found else None
    return Outcome(target, len(found), len(figures) - len(found), mean, min(found, default=None))
