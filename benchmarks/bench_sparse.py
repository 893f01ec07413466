"""Sparse attention: making masks, and attention over them beside PyTorch given the mask and the dense kernel.

pytest-benchmark times each on its own; `fastattn bench --preset sparse` interleaves them, and is the one to take ratios
from.
"""

import pytest

from fastattn import sparse
from fastattn.bench.memory import MIB, AllocationMeter
from fastattn.bench.run import make_step
from fastattn.bench.sparse.problem import PATTERNS, SparseProblem
from fastattn.bench.sparse.suites import implementation

MILLION = 1 << 20


@pytest.mark.parametrize(
    "pattern",
    [
        lambda: sparse.sliding_window(MILLION, window=4096, causal=True),
        lambda: sparse.longformer(MILLION, window=256, global_tokens=16),
        lambda: sparse.bigbird(MILLION),
        lambda: sparse.documents([4096] * 256),
    ],
    ids=["window 4096", "longformer", "bigbird", "documents"],
)
def test_make_mask_of_a_million_tokens(benchmark, pattern):
    """All lists and their transposes, blocks of 128."""
    mask = benchmark.pedantic(pattern, rounds=7, warmup_rounds=1)
    benchmark.extra_info |= {"mib": sum(t.nbytes for t in mask.lists) / MIB, "mask": repr(mask)}


@pytest.mark.parametrize("impl", ["sdpa", "dense", "fastattn"])
@pytest.mark.parametrize("pattern", [name for name in PATTERNS if name != "random"])
@pytest.mark.parametrize("mode", ["fwd", "fwdbwd"])
def test_pattern(benchmark, device, finished, seqlen, mode, pattern, impl):
    problem = SparseProblem(seqlen, causal=True, mode=mode, pattern=pattern)
    chosen = implementation(impl)
    case = chosen.solves(problem)
    inputs = case.inputs(device)
    kernel, attend = chosen.bind(case)
    step = make_step(case, attend, inputs)
    with AllocationMeter(device) as meter:
        results = step()
    check = case.judge(inputs).check(results)
    benchmark.group = problem.label()
    benchmark.extra_info |= {"kernel": kernel, "flops": case.flops, "extra_mib": meter.peak / MIB}
    benchmark.extra_info["max_error"] = check.worst[0]
    assert check.passed, f"wrong result: error and bar {check.worst}"
    benchmark.pedantic(finished(step), rounds=5, warmup_rounds=1)
