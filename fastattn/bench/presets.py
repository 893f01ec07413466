"""Named sets of problems for `fastattn bench --preset`, and the figures that the CPU kernels are held to."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fastattn.bench.results import OK, Results, Row
from fastattn.bench.suites import Problem, grid


@dataclass(frozen=True)
class Preset:
    """Problems, the time they get, and whether a memory profile follows."""

    problems: Callable[[], list[Problem]]
    time_limit_s: float
    what: str
    profile_seqlens: tuple[int, ...] = ()


def _quickstart() -> list[Problem]:
    """Every kind of call at short and middle lengths; the longest only where they say most (causal, as in training)."""
    dtypes, both = ("float32", "bfloat16"), (False, True)
    short = (512, 1024, 2048)
    return [
        *_merge(grid((*short, 4096), dtypes=dtypes, causal=both), grid((8192,), dtypes=dtypes, causal=(True,))),
        *grid((*short,), head_dims=(128,), dtypes=dtypes, causal=both),
        *_merge(
            grid((*short, 4096), dtypes=dtypes, causal=(True,), modes=("fwdbwd",)),
            grid((8192,), causal=(True,), modes=("fwdbwd",)),
        ),
        *grid(short, dtypes=dtypes, causal=(False,), modes=("fwdbwd",)),
    ]


def _merge(*groups: Sequence[Problem]) -> list[Problem]:
    """One list in which problems that belong to one table stand together, by length."""
    tables: dict[tuple, list[Problem]] = {}
    for problem in (p for group in groups for p in group):
        tables.setdefault((problem.mode, problem.dtype, problem.causal, problem.head_dim), []).append(problem)
    return [problem for table in tables.values() for problem in table]


def _figures() -> list[Problem]:
    lengths = (512, 1024, 2048, 4096, 8192)
    dtypes = ("float32", "bfloat16")
    return [
        *grid(lengths, head_dims=(64, 128), dtypes=dtypes, causal=(False, True)),
        *grid(lengths, head_dims=(64, 128), dtypes=dtypes, causal=(True,), modes=("fwdbwd",)),
    ]


PRESETS = {
    "quickstart": Preset(
        _quickstart,
        115.0,
        "forward and forward + backward, float32 and bfloat16, 512 to 8192, then a memory profile",
        (512, 1024, 2048, 4096, 8192),
    ),
    "quick": Preset(lambda: grid((256, 512, 1024), modes=("fwd", "fwdbwd")), 10.0, "a first look in seconds"),
    "figures": Preset(_figures, 900.0, "the cases that the CPU kernels' speed targets name"),
}


@dataclass(frozen=True)
class Target:
    """A ratio to SDPA that fastattn is to reach on the cases of one (mode, dtype, mask).

    It is met when the geometric mean over the cases reaches `ratio` and every case reaches `SINGLE_CASE` of it.
    """

    mode: str
    dtype: str
    causal: bool
    ratio: float

    def cases(self, results: Results) -> list[Row]:
        wanted = (self.mode, self.dtype, self.causal)
        return [
            row
            for row in results.rows
            if row.implementation == "fastattn" and (row.problem.mode, row.problem.dtype, row.problem.causal) == wanted
        ]


SINGLE_CASE = 0.85

# On 2 threads of an AVX-512 AMD CPU, lengths 512 to 8192, head sizes 64 and 128, batch x heads 4.
CPU_TARGETS = (
    Target("fwd", "float32", False, 2.2),
    Target("fwd", "float32", True, 2.5),
    Target("fwd", "bfloat16", False, 4.0),
    Target("fwd", "bfloat16", True, 4.5),
    Target("fwdbwd", "float32", True, 2.6),
    Target("fwdbwd", "bfloat16", True, 3.4),
)


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
        return self.mean >= self.target.ratio and self.lowest >= SINGLE_CASE * self.target.ratio


def judge_target(target: Target, results: Results) -> Outcome:
    rows = target.cases(results)
    ratios = [row.speedup["sdpa"] for row in rows if row.status == OK and "sdpa" in row.speedup]
    mean = math.exp(sum(map(math.log, ratios)) / len(ratios)) if ratios else None
    return Outcome(target, len(ratios), len(rows) - len(ratios), mean, min(ratios, default=None))
