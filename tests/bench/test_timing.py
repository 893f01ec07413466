"""Fails if samples are not spread over the run, warm-up is counted, quantiles are off or a time limit is not kept."""

import pytest

from fastattn.bench.plan import TimePlan
from fastattn.bench.suites import Problem
from fastattn.bench.timing import CpuClock, Timing, interleave, schedule


class FakeTime:
    """A clock that only the steps advance."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def step(self, *seconds):
        """A step that takes the given seconds on its successive calls, the last one for ever after."""
        calls = list(seconds)

        def run():
            self.now += calls.pop(0) if len(calls) > 1 else calls[0]

        return run


def test_median_and_quantiles():
    timing = Timing((5.0, 1.0, 3.0, 2.0, 4.0))
    assert timing.median == 3.0
    assert timing.quantile(0.0) == 1.0
    assert timing.quantile(0.2) == pytest.approx(1.8)
    assert timing.quantile(0.8) == pytest.approx(4.2)
    assert timing.quantile(1.0) == 5.0
    assert Timing((7.0,)).quantile(0.8) == 7.0


def test_schedule_spreads_every_name_over_the_run():
    order = schedule({"fast": 8, "slow": 2})
    assert order.count("fast") == 8
    assert order.count("slow") == 2
    # Two samples spread evenly lie in different halves, with as many of the others around each.
    assert [order[:5].count("slow"), order[5:].count("slow")] == [1, 1]
    assert schedule({"a": 3, "b": 3}) == ["a", "b"] * 3


def test_warm_up_is_not_counted():
    time = FakeTime()
    timings = interleave({"step": time.step(1.0, 0.001)}, CpuClock(time), budget_s=0.1)
    assert timings["step"].median == pytest.approx(0.001)
    assert max(timings["step"].samples) < 0.01


def test_budget_bounds_the_number_of_samples():
    time = FakeTime()
    timings = interleave({"a": time.step(0.01), "b": time.step(0.1)}, CpuClock(time), budget_s=2.0, max_samples=1000)
    assert len(timings["a"].samples) == pytest.approx(100, abs=1)
    assert len(timings["b"].samples) == pytest.approx(10, abs=1)
    few = interleave({"a": time.step(5.0)}, CpuClock(time), budget_s=1.0)
    assert len(few["a"].samples) == 3


def test_long_steps_that_the_caller_ran_are_not_warmed_up_again():
    time = FakeTime()
    interleave({"a": time.step(5.0)}, CpuClock(time), budget_s=1.0, warm_s={"a": 5.0}, min_samples=2)
    assert time.now == 10.0


def test_short_steps_are_timed_in_batches():
    time = FakeTime()
    calls = []

    def step():
        calls.append(1)
        time.now += 1e-6

    timings = interleave({"a": step}, CpuClock(time), budget_s=0.0, min_samples=2)
    assert timings["a"].median == pytest.approx(1e-6)
    assert len(calls) >= 2 * 200


def test_a_step_that_raises_leaves_the_others_alone():
    time = FakeTime()

    def broken():
        raise RuntimeError("no such kernel")

    timings = interleave({"broken": broken, "fine": time.step(0.1)}, CpuClock(time), budget_s=1.0)
    assert str(timings["broken"]) == "no such kernel"
    assert timings["fine"].median == pytest.approx(0.1)


def test_time_plan_gives_long_problems_more_and_skips_what_cannot_fit():
    time = FakeTime()
    problems = [Problem(512), Problem(8192)]
    plan = TimePlan(problems, 100.0, "cpu", now=time)
    first = plan.allowance(0)
    assert 0 < first < plan.allowance(1)
    plan.learn("naive", problems[0], problems[0].flops, 1.0)
    assert plan.too_slow("naive", problems[0], problems[0].flops, 4, first) is None
    assert "time limit" in plan.too_slow("naive", problems[1], problems[1].flops, 4, plan.allowance(1))
    assert plan.too_slow("sdpa", problems[1], problems[1].flops, 4, plan.allowance(1)) is None
    plan.learn("flex", problems[0], problems[0].flops, 1e-6)
    plan.learn_compilation("flex", 200.0)
    assert "compiles too long" in plan.too_slow("flex", problems[1], problems[1].flops, 4, plan.allowance(1))
    time.now = 100.0
    assert plan.too_slow("sdpa", problems[1], problems[1].flops, 4, 0.0) == "the time limit is reached"
    assert plan.allowance(1) == 0.0
    assert TimePlan(problems, None, "cpu").too_slow("naive", problems[1], problems[1].flops, 4, 0.0) is None
