"""Interleaved timing: every implementation of a row is timed in turns, in one process, so that their ratios hold.

A machine's speed drifts (other users, clocks, temperature). Functions timed one after the other see different
machines; functions whose samples are spread evenly over the same seconds see the same one.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch

Step = Callable[[], object]

# A shorter sample would tell more of one-off stalls, and of what the one before it left in the caches, than of the
# function, so short calls are timed in batches.
SHORTEST_SAMPLE_S = 5e-3

# A first call includes loading, allocating and waking threads; where it took no longer than this, another call tells
# what a call really costs.
LONG_CALL_S = 0.25


@dataclass(frozen=True)
class Timing:
    """Samples of one function, in seconds per call."""

    samples: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    def quantile(self, q: float) -> float:
        """The q-quantile (0..1), linear between the samples."""
        ordered = sorted(self.samples)
        position = q * (len(ordered) - 1)
        low = math.floor(position)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (position - low) * (ordered[high] - ordered[low])


class Clock(Protocol):
    def time(self, step: Step, calls: int) -> float:
        """Seconds per call of `step`, called `calls` times."""
        ...


@dataclass(frozen=True)
class CpuClock:
    now: Callable[[], float] = time.perf_counter

    def time(self, step: Step, calls: int) -> float:
        start = self.now()
        for _ in range(calls):
            step()
        return (self.now() - start) / calls


class CudaClock:
    """CUDA events around the calls, after the L2 cache was overwritten (as triton.testing.do_bench does)."""

    def __init__(self, device: torch.device) -> None:
        # Twice the largest L2 in use today (H200: 50 MB, B200: 126 MB).
        self._flush = torch.empty(256 << 20, dtype=torch.int8, device=device)

    def time(self, step: Step, calls: int) -> float:
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        self._flush.zero_()
        start.record()
        for _ in range(calls):
            step()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop) / 1e3 / calls


def clock_for(device: torch.device) -> Clock:
    return CudaClock(device) if device.type == "cuda" else CpuClock()


def schedule(counts: Mapping[str, int]) -> list[str]:
    """Names, each repeated counts[name] times and spread evenly over the whole run."""
    slots = [((k + 0.5) / n, i, name) for i, (name, n) in enumerate(counts.items()) for k in range(n)]
    return [name for _, _, name in sorted(slots)]


def interleave(
    steps: Mapping[str, Step],
    clock: Clock,
    *,
    budget_s: float,
    warm_s: Mapping[str, float] | None = None,
    min_samples: int = 3,
    max_samples: int = 30,
) -> dict[str, Timing | Exception]:
    """Time all `steps` in turns within about `budget_s` seconds; each gets an equal share of the time.

    Warm-up is not counted. `warm_s` holds the seconds of steps that the caller has already run once: those that took
    long are not warmed up again. A step that raises is dropped, its exception in place of its timing.
    """
    results: dict[str, Timing | Exception] = {}
    counts: dict[str, int] = {}
    calls: dict[str, int] = {}
    share = budget_s / max(1, len(steps))
    for name, step in steps.items():
        cost = (warm_s or {}).get(name)
        try:
            if cost is None:
                cost = clock.time(step, 1)
            if cost < LONG_CALL_S:
                cost = clock.time(step, 1)
        except Exception as error:
            results[name] = error
            continue
        calls[name] = max(1, math.ceil(SHORTEST_SAMPLE_S / max(cost, 1e-9)))
        counts[name] = max(min_samples, min(max_samples, int(share / (calls[name] * max(cost, 1e-9)))))
    samples: dict[str, list[float]] = {name: [] for name in counts}
    for name in schedule(counts):
        if name in results:
            continue
        try:
            samples[name].append(clock.time(steps[name], calls[name]))
        except Exception as error:
            results[name] = error
    return {name: results[name] if name in results else Timing(tuple(samples[name])) for name in steps}
