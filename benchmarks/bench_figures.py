"""The figures that the CPU kernels are held to, printed with whether they are met; never a failure.

pytest benchmarks/bench_figures.py --lengths 512..8k       the cases that the figures name (minutes)
"""

import pytest

from fastattn.bench.memory import MIB
from fastattn.bench.point import Measurer, Subject
from fastattn.bench.presets import CPU_TARGETS, judge_target
from fastattn.bench.report import make_console, print_targets
from fastattn.bench.run import Settings, run
from fastattn.bench.suites import grid, implementation

# Forward and backward at length 8192, 4 heads, head size 64, float32: over the inputs, outputs and gradients included.
MEMORY_MIB = 60.0


@pytest.mark.parametrize("target", CPU_TARGETS, ids=lambda t: f"{t.mode}-{t.dtype}-{'causal' if t.causal else 'full'}")
def test_speed(device, lengths, show, target):
    problems = grid(lengths, head_dims=(64, 128), dtypes=(target.dtype,), causal=(target.causal,), modes=(target.mode,))
    results = run(problems, [implementation(name) for name in ("sdpa", "fastattn")], Settings(device))
    wrong = [row for row in results.rows if row.status in ("wrong", "failed")]
    assert not wrong, [(row.problem.label(), row.implementation, row.reason) for row in wrong]
    show(print_targets, make_console(), [judge_target(target, results)])


def test_memory(device, show):
    with Measurer() as measurer:
        phases = measurer.measure(Subject("op", "fastattn", 8192, device=device.type))
    resident = "" if phases.resident_peak is None else f", resident {phases.resident_peak / MIB:.1f} MiB"
    show(
        print,
        f"peak extra memory, forward + backward, causal, length 8192, 4 heads, D 64, float32: "
        f"{phases.peak / MIB:.1f} MiB{resident}; the figure is at most {MEMORY_MIB:.0f}",
    )
