"""What a call costs the host besides its kernel: a tiny problem through every layer of fastattn, beside SDPA.

The design allows the whole path 20 microseconds over the kernel. On a GPU the kernel itself runs beside the host, and
"launch" is what the `triton` backend takes to put it there.
"""

import pytest
import torch
import torch.nn.functional as F

import fastattn
from fastattn import _extension
from fastattn.bench.report import make_console, table
from fastattn.bench.timing import CpuClock, Timing, interleave
from fastattn.dense import native, triton
from fastattn.dense.api import problem_of
from fastattn.dense.problem import allocate_forward

ALLOWED_US = 20.0
SHAPE = (1, 2, 8, 16)


def calls(device):
    """(name, function) from the bare kernel outwards; those that this machine has."""
    query, key, value = (torch.randn(SHAPE, device=device) for _ in range(3))
    trained = [t.clone().requires_grad_() for t in (query, key, value)]
    named = {}
    problem = problem_of(query, key, value, causal=True)
    core, _ = _extension.load()
    if core is not None and device.type == "cpu":
        out, lse = allocate_forward(problem)
        params = native._params(core, problem, query, key, value)
        params.out, params.lse = native.view(out, None), native.view(lse, None)

        scratch = torch.empty(core.cpu_dense_forward_scratch(params), dtype=torch.uint8)
        params.scratch = scratch.data_ptr()

        def kernel(alive=(query, key, value, out, lse, scratch)):  # params holds their bare pointers
            core.cpu_dense_forward(params)

        named["kernel"] = kernel
    if device.type == "cuda":
        named["launch"] = lambda: triton.forward(problem)
    named["op"] = lambda: torch.ops.fastattn.dense_forward(*problem.args())
    named["attention"] = lambda: fastattn.attention(query, key, value, causal=True)
    named["attention, recording gradients"] = lambda: fastattn.attention(*trained, causal=True)
    named["SDPA"] = lambda: F.scaled_dot_product_attention(query, key, value, is_causal=True)
    named["SDPA, recording gradients"] = lambda: F.scaled_dot_product_attention(*trained, is_causal=True)
    return named


def test_overhead(device, show):
    """Prints the table; what is over the allowance is marked, not failed: a busy machine is not a defect."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        named = calls(device)
        timings = interleave(named, CpuClock(), budget_s=2.0, max_samples=200)
        for route in (fastattn.activated, fastattn.override_sdpa):
            with route():
                again = {f"SDPA under {route.__name__}": named["SDPA"]}
                timings |= interleave(again, CpuClock(), budget_s=0.5, max_samples=200)
    finally:
        torch.set_num_threads(threads)
    micro = {name: 1e6 * timing.median for name, timing in timings.items() if isinstance(timing, Timing)}
    assert len(micro) == len(timings), timings
    kernel = micro.get("kernel", micro.get("launch"))
    shown = table("call", "us", "over the kernel", left=("call",))
    for name, value in micro.items():
        torchs = name in ("SDPA", "SDPA, recording gradients")
        over = "" if kernel is None or torchs else f"{value - kernel:.1f} us"
        shown.add_row(name, f"{value:.1f}", over)
    console = make_console()
    show(console.print, f"One call on {SHAPE}, 1 thread; allowed over the kernel: {ALLOWED_US:.0f} us")
    show(console.print, shown)


@pytest.mark.parametrize("name", ["kernel", "launch", "op", "attention", "attention, recording gradients", "SDPA"])
def test_call(benchmark, device, finished, name):
    named = calls(device)
    if name not in named:
        pytest.skip("not on this machine")
    benchmark.group = "overhead"
    benchmark(finished(named[name]))
