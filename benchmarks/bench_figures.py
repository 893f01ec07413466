"""The figures that the CPU kernels are held to, printed with whether they are met; never a failure.

pytest benchmarks/bench_figures.py --lengths 512..16k      the cases that the figures name (minutes)
fastattn bench --preset figures (or cpu, cpu-avx2, linear) the same cases in one run, with tables and pictures
"""

from dataclasses import replace

import pytest

from fastattn.bench.families import family_of
from fastattn.bench.memory import MIB
from fastattn.bench.point import Measurer, Subject
from fastattn.bench.presets import PRESETS
from fastattn.bench.report import make_console, print_targets
from fastattn.bench.run import Settings, run
from fastattn.bench.targets import judge_target

# Forward and backward at length 8192, 4 heads, head size 64, float32: over the inputs, outputs and gradients included.
MEMORY_MIB = 60.0


CASES = [(name, target) for name in ("figures", "cpu", "linear") for target in PRESETS[name].targets]


@pytest.mark.parametrize(("preset", "target"), CASES, ids=[f"{name}: {target.what}" for name, target in CASES])
def test_speed(device, lengths, show, preset, target):
    problems = [p for p in PRESETS[preset].problems() if target.picks(p)]
    measured = [p for p in problems if p.seqlen <= max(lengths)]
    if not measured:
        pytest.skip(f"its lengths begin at {min(p.seqlen for p in problems)}; --lengths ends at {max(lengths)}")
    family = family_of(measured[0])
    base = target.measure.name.removeprefix("x ")
    names = dict.fromkeys((family.steady, "fastattn", *([base] if base in family.baselines else [])))
    beside = [replace(p, seqlen=n) for p in measured if (n := target.measure.beside) is not None]
    results = run([*measured, *beside], [family.implementation(name) for name in names], Settings(device))
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
