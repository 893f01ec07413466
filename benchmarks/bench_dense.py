"""Dense attention: naive, SDPA and fastattn by length, dtype, mask and pass, through the code of `fastattn bench`.

pytest-benchmark times each on its own; `fastattn bench` interleaves them, and is the one to take ratios from.
"""

import pytest

from fastattn.bench.memory import MIB, AllocationMeter
from fastattn.bench.run import make_step
from fastattn.bench.suites import Problem, implementation


@pytest.mark.parametrize("impl", ["naive", "sdpa", "fastattn"])
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("mode", ["fwd", "fwdbwd"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_dense(benchmark, device, finished, seqlen, dtype, mode, causal, impl):
    problem = Problem(seqlen, dtype=dtype, mode=mode, causal=causal)
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
