"""Measure problems: check, meter and time every implementation of each, and put the rows together."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor

from fastattn.bench.case import Case, Implementation, Judge
from fastattn.bench.environment import environment
from fastattn.bench.families import family_of
from fastattn.bench.memory import MIB, AllocationMeter, available_memory, is_out_of_memory
from fastattn.bench.peaks import Peak, measure_peaks, read_bandwidth
from fastattn.bench.plan import TimePlan
from fastattn.bench.results import FAILED, OOM, SKIPPED, WRONG, Results, Row
from fastattn.bench.timing import Timing, clock_for, interleave

Progress = Callable[[int, int, str], None]  # problems done, problems in all, what comes next

# Of the memory that is free, what one implementation may be expected to use: estimates are low.
MEMORY_SHARE = 0.7

MIN_SAMPLES = 3


@dataclass(frozen=True)
class Settings:
    """How to measure: seconds for everything (None: no limit), memory in bytes one implementation may need.

    `notes` go into the results: what there is to know about the run as a whole.
    """

    device: torch.device
    time_limit_s: float | None = None
    memory_limit: int | None = None
    max_samples: int = 30
    notes: tuple[str, ...] = ()


def make_step(problem: Case, attend: Callable, inputs: tuple[Tensor, ...]) -> Callable[[], tuple]:
    """One call of what is timed; returns (out,) or (out, the gradient of every input)."""
    *tensors, grad_out = inputs
    if problem.mode == "fwd":

        def forward() -> tuple:
            with torch.no_grad():
                return (attend(*tensors),)

        return forward
    leaves = [t.detach().requires_grad_() for t in tensors]

    def forward_backward() -> tuple:
        out = attend(*leaves)
        return (out.detach(), *torch.autograd.grad(out, leaves, grad_out))

    return forward_backward


def _failure(row: Row, error: BaseException) -> Row:
    lines = str(error).strip().splitlines()
    reason = "out of memory" if is_out_of_memory(error) else f"{type(error).__name__}: {lines[0] if lines else ''}"
    return replace(row, status=OOM if is_out_of_memory(error) else FAILED, reason=reason[:200])


class _Solved:
    """A case that implementations solve: its inputs and, once there is a result to judge, its judge."""

    def __init__(self, case: Case, device: torch.device) -> None:
        self.case = case
        self.inputs = case.inputs(device)
        self._judge: Judge | None = None

    @property
    def judge(self) -> Judge:
        self._judge = self._judge or self.case.judge(self.inputs)
        return self._judge


def _solved(known: dict[Case, _Solved], case: Case, settings: Settings) -> _Solved:
    if case not in known:
        known[case] = _Solved(case, settings.device)
    return known[case]


def measure(
    problem: Case, implementations: Sequence[Implementation], settings: Settings, plan: TimePlan, index: int
) -> list[Row]:
    """The rows of one problem, in the order of `implementations`; speed-ups and fractions are not yet filled in."""
    implementations = [impl for impl in implementations if impl.subject(problem)]
    started = time.perf_counter()
    allowance = plan.allowance(index)
    limit = settings.memory_limit or int(MEMORY_SHARE * available_memory(settings.device))
    solved: dict[Case, _Solved] = {}
    rows: dict[str, Row] = {}
    steps: dict[str, Callable[[], tuple]] = {}
    warm: dict[str, float] = {}
    # What is quadratic in memory is the slowest: last, so that the others have been measured if time runs out.
    for impl in sorted(implementations, key=lambda impl: (impl.compiles, impl.estimate(impl.solves(problem)))):
        row = Row(problem, impl.name)
        case = impl.solves(problem)
        needed = impl.estimate(case)
        slow = plan.too_slow(impl.name, problem, impl.work(case), MIN_SAMPLES + 1, allowance)
        if needed > limit:
            reason = f"needs more memory than there is (about {needed / MIB:,.0f} MiB of {limit / MIB:,.0f})"
            rows[impl.name] = replace(row, status=SKIPPED, reason=reason)
            continue
        if slow:
            rows[impl.name] = replace(row, status=SKIPPED, reason=slow)
            continue
        try:
            kernel, attend = impl.bind(case)
            row = replace(row, kernel=kernel)
            step = make_step(case, attend, _solved(solved, case, settings).inputs)
            before = time.perf_counter()
            if impl.compiles or settings.device.type == "cuda":
                step()  # compilation and autotuning are neither the kernel's memory nor its time
                plan.learn_compilation(impl.name, time.perf_counter() - before)
            before = time.perf_counter()
            with AllocationMeter(settings.device) as meter:
                results = step()
            warm[impl.name] = time.perf_counter() - before
            judge = solved[case].judge
            check = judge.check(results)
            if case != problem and case.approximates_softmax:
                row = replace(row, off_softmax=_solved(solved, problem, settings).judge.distance(results[0]))
            del results
        except Exception as error:
            rows[impl.name] = _failure(row, error)
            continue
        steps[impl.name] = step
        error_now, bar = check.worst
        rows[impl.name] = replace(
            row,
            status=row.status if check.passed else WRONG,
            reason="" if check.passed else f"error {error_now:.1e} is over its bar {bar:.1e}",
            extra_mib=meter.peak / MIB,
            max_error=error_now,
            error_bar=bar,
            errors=check.errors,
            checked=judge.checked,
        )
    gc.collect()
    timings = interleave(
        steps,
        clock_for(settings.device),
        budget_s=max(0.0, allowance - (time.perf_counter() - started)),
        warm_s=warm,
        min_samples=MIN_SAMPLES,
        max_samples=settings.max_samples,
    )
    by_name = {impl.name: impl for impl in implementations}
    for name, timing in timings.items():
        if isinstance(timing, Timing):
            impl = by_name[name]
            plan.learn(name, problem, impl.work(impl.solves(problem)), timing.median)
            rows[name] = _timed(rows[name], impl.solves(problem), timing)
        else:
            rows[name] = _failure(rows[name], timing)
    return [rows[impl.name] for impl in implementations]


def _timed(row: Row, case: Case, timing: Timing) -> Row:
    return replace(
        row,
        median_ms=1e3 * timing.median,
        p20_ms=1e3 * timing.quantile(0.2),
        p80_ms=1e3 * timing.quantile(0.8),
        samples=len(timing.samples),
        gflops=case.flops / timing.median / 1e9,
        gbs=row.problem.bytes_read / timing.median / 1e9 if row.problem.bytes_read else None,
    )


def compare_rows(rows: Sequence[Row], peak: Peak | None, read_gbs: float | None = None) -> list[Row]:
    """Fill in fractions of the peak (of the read bandwidth in decoding), and speed-ups where both results are right."""
    medians = {row.implementation: row.median_ms for row in rows if row.status == "ok" and row.median_ms}
    filled = []
    for row in rows:
        fraction = row.gflops / peak.best if row.gflops and peak and peak.best else None
        if row.problem.bytes_read:
            fraction = row.gbs / read_gbs if row.gbs and read_gbs else None
        speedup = {
            base: medians[base] / medians[row.implementation]
            for base in family_of(row.problem).baselines
            if base in medians and row.implementation in medians and base != row.implementation
        }
        filled.append(replace(row, peak_fraction=fraction, speedup=speedup))
    return filled


def run(
    problems: Sequence[Case],
    implementations: Sequence[Implementation],
    settings: Settings,
    progress: Progress = lambda done, total, label: None,
) -> Results:
    """Measure all `problems` with all `implementations`; rows come in the order of `problems`.

    The least work is measured first, so that a time limit cuts the longest problems, and of every kind.
    """
    progress(0, len(problems), "matrix-product peaks")
    order = sorted(range(len(problems)), key=lambda i: problems[i].flops)
    plan = TimePlan([problems[i] for i in order], settings.time_limit_s, settings.device.type)
    peaks = measure_peaks((p.dtype for p in problems), settings.device)
    read_gbs = read_bandwidth(settings.device) if any(p.bytes_read for p in problems) else None
    measured: dict[int, list[Row]] = {}
    gc.freeze()  # what is there by now stays: going through it after every problem would take a fifth of a second
    for done, i in enumerate(order):
        progress(done, len(problems), problems[i].label())
        rows = measure(problems[i], implementations, settings, plan, done)
        measured[i] = compare_rows(rows, peaks[problems[i].dtype], read_gbs)
    progress(len(problems), len(problems), "done")
    shown: dict[str, object] = {
        "time_limit_s": settings.time_limit_s,
        "max_samples": settings.max_samples,
        "implementations": [impl.name for impl in implementations],
        "notes": list(settings.notes),
    }
    return Results(
        environment(settings.device),
        shown,
        {dtype: asdict(peak) for dtype, peak in peaks.items()},
        tuple(row for i in range(len(problems)) for row in measured[i]),
        read_gbs,
    )
