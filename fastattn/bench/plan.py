"""Sharing out a time limit: how long each problem may take, and what would not fit."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from fastattn.bench.case import Case

# Only relative sizes matter: a fixed cost for inputs and checks, and a rate every implementation is within 10 x of.
FIXED_S = 0.2
TYPICAL_FLOPS = {"cpu": 50e9, "cuda": 200e12}


class TimePlan:
    """Divides what is left of `limit_s` among the problems still to come, by their arithmetic.

    An implementation that is slow on a problem may take `SHARE_OF_REST` of all the time left, so that a baseline is not
    dropped for the little that its problem was allotted. Each one that does leaves less to the next: the limit holds.
    Without a limit every problem gets `DEFAULT_ALLOWANCE_S` and nothing is skipped.
    """

    DEFAULT_ALLOWANCE_S = 5.0
    SHARE_OF_REST = 0.06

    def __init__(
        self,
        problems: Sequence[Case],
        limit_s: float | None,
        device_type: str,
        now: Callable[[], float] = time.perf_counter,
    ) -> None:
        rate = TYPICAL_FLOPS.get(device_type, TYPICAL_FLOPS["cpu"])
        self._weights = [FIXED_S + problem.flops / rate for problem in problems]
        self._limit_s = limit_s
        self._now = now
        self._start = now()
        self._seconds_per_work: dict[tuple[str, str, str], float] = {}
        self._compile_s: dict[str, float] = {}

    def allowance(self, index: int) -> float:
        """Seconds that problem `index` may take."""
        if self._limit_s is None:
            return self.DEFAULT_ALLOWANCE_S
        return self._left() * self._weights[index] / sum(self._weights[index:])

    def _left(self) -> float:
        return max(0.0, (self._limit_s or 0.0) - (self._now() - self._start))

    def learn(self, implementation: str, problem: Case, work: float, seconds: float) -> None:
        """Note what an implementation's call took, of which the time grows with `work`."""
        key = (implementation, problem.dtype, problem.mode)
        # The best rate so far: short problems are slower per operation than the longer ones that follow.
        self._seconds_per_work[key] = min(seconds / work, self._seconds_per_work.get(key, float("inf")))

    def learn_compilation(self, implementation: str, seconds: float) -> None:
        """Note what a first call took, which every further problem pays again."""
        self._compile_s[implementation] = seconds

    def too_slow(self, implementation: str, problem: Case, work: float, calls: int, allowance_s: float) -> str | None:
        """Why `calls` calls would not fit the allowance, judging by the best rate seen; None if they do."""
        rate = self._seconds_per_work.get((implementation, problem.dtype, problem.mode))
        if self._limit_s is None:
            return None
        if self._left() <= 0:
            return "the time limit is reached"
        if rate is None:
            return None
        seconds, once = rate * work, self._compile_s.get(implementation, 0.0)
        if once + calls * seconds <= max(allowance_s, self.SHARE_OF_REST * self._left()):
            return None
        if once > calls * seconds:
            return f"compiles too long for the time limit (about {once:.2g} s)"
        return f"too slow for the time limit (about {seconds:.2g} s a call)"
