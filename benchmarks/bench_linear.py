"""Linear attention: the quadratic form, PyTorch's chunkwise one and fastattn by length, mechanism and pass.

pytest-benchmark times each on its own; `fastattn bench --preset linear` interleaves them, and is the one to take ratios
from.
"""

import pytest

from fastattn.bench.linear.problem import LinearProblem
from fastattn.bench.linear.suites import implementation
from fastattn.bench.memory import MIB, AllocationMeter
from fastattn.bench.run import make_step


@pytest.mark.parametrize("impl", ["naive", "torch", "fastattn"])
@pytest.mark.parametrize("mechanism", ["linear", "retention", "gla", "delta", "performer"])
@pytest.mark.parametrize("mode", ["fwd", "fwdbwd"])
def test_linear(benchmark, device, finished, seqlen, mode, mechanism, impl):
    problem = LinearProblem(seqlen, causal=True, mode=mode, mechanism=mechanism)
    inputs = problem.inputs(device)
    kernel, attend = implementation(impl).bind(problem)
    step = make_step(problem, attend, inputs)
    with AllocationMeter(device) as meter:
        results = step()
    check = problem.judge(inputs).check(results)
    benchmark.group = problem.label()
    benchmark.extra_info |= {"kernel": kernel, "flops": problem.flops, "extra_mib": meter.peak / MIB}
    benchmark.extra_info["max_error"] = check.worst[0]
    assert check.passed, f"wrong result: error and bar {check.worst}"
    benchmark.pedantic(finished(step), rounds=5, warmup_rounds=1)


@pytest.mark.parametrize("impl", ["torch", "fastattn", "flash"])
def test_step(benchmark, device, finished, seqlen, impl):
    """One step after so many others; "flash" is softmax attention over a KV cache of that length."""
    problem = LinearProblem(seqlen, causal=True, step=True)
    chosen = implementation(impl)
    case = chosen.solves(problem)
    inputs = case.inputs(device)
    kernel, attend = chosen.bind(case)
    step = make_step(case, attend, inputs)
    assert case.judge(inputs).check(step()).passed
    benchmark.group = problem.label()
    benchmark.extra_info |= {"kernel": kernel}
    benchmark.pedantic(finished(step), rounds=20, warmup_rounds=3)
