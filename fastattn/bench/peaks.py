"""What the machine can do at best: matrix-product peaks and read bandwidth, measured, to state results as fractions."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial

import torch

from fastattn import _extension
from fastattn.bench.case import DTYPES
from fastattn.bench.timing import Clock, Timing, clock_for, interleave


@dataclass(frozen=True)
class Peak:
    """Matrix-product peaks of one dtype in GFLOP/s.

    `matmul` is torch.mm's, `registers` the multiply-add limit of the vector units. `widened` is the best of both in
    float32, which a 16-bit dtype can be converted to: on a CPU without 16-bit arithmetic that is the faster way.
    """

    matmul: float
    registers: float | None = None
    widened: float | None = None

    @property
    def best(self) -> float:
        """What fractions refer to: the largest, since a library may miss what the hardware can do."""
        return max(self.matmul, self.registers or 0.0, self.widened or 0.0)


def _best_rate(clock: Clock, work: float, timing: Timing | Exception) -> float:
    """GFLOP/s (or GB/s) of the fastest sample: a peak is what was reached once, not what is typical."""
    return 0.0 if isinstance(timing, Exception) else work / min(timing.samples) / 1e9


def matmul_peak(dtype: str, device: torch.device, budget_s: float = 0.5) -> float:
    """Best GFLOP/s of torch.mm on square matrices of `dtype`."""
    sizes = (4096, 8192) if device.type == "cuda" else (512, 1024)
    clock = clock_for(device)
    best = 0.0
    for n in sizes:
        a = torch.randn(n, n, device=device).to(DTYPES[dtype])
        b = torch.randn(n, n, device=device).to(DTYPES[dtype])
        timing = interleave({"mm": partial(torch.mm, a, b)}, clock, budget_s=budget_s / len(sizes))["mm"]
        rate = _best_rate(clock, 2.0 * n**3, timing)
        # A dtype without fast arithmetic does not get faster with size, only longer to measure.
        slow = rate < 20.0
        best = max(best, rate)
        if slow:
            break
    return best


def register_peak(dtype: str, device: torch.device) -> float | None:
    """GFLOP/s of multiply-adds that never leave the registers, with torch's thread count; None where not available."""
    native, _ = _extension.load()
    if device.type != "cpu" or native is None:
        return None
    # 0 says that the instruction set in use computes this dtype in another.
    return native.cpu_fma_peak(torch.get_num_threads(), getattr(native.Dtype, dtype)) or None


def measure_peaks(dtypes: Iterable[str], device: torch.device) -> dict[str, Peak]:
    """The peaks of each dtype; the matrix products of each are timed for half a second."""
    names = list(dict.fromkeys(dtypes))
    convertible = [name for name in names if device.type == "cpu" and DTYPES[name].itemsize == 2]
    wanted = [*names, *(["float32"] if convertible and "float32" not in names else [])]
    peaks = {name: Peak(matmul_peak(name, device), register_peak(name, device)) for name in wanted}
    for name in convertible:
        peaks[name] = replace(peaks[name], widened=peaks["float32"].best)
    return {name: peaks[name] for name in names}


def read_bandwidth(device: torch.device, budget_s: float = 0.5) -> float:
    """GB/s of reading a tensor that fits no cache: torch's sum, or a plain loop over vectors where that is faster."""
    size = (4 << 30) if device.type == "cuda" else (256 << 20)
    data = torch.ones(size // 4, device=device)
    clock = clock_for(device)
    best = _best_rate(clock, float(size), interleave({"sum": data.sum}, clock, budget_s=budget_s)["sum"])
    native, _ = _extension.load()
    if device.type == "cpu" and native is not None:
        best = max(best, native.cpu_read_bandwidth(data.data_ptr(), size, torch.get_num_threads()))
    return best
