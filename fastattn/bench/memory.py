"""Peak memory of a block of code, by two independent meters.

`AllocationMeter` adds up what torch allocates: exact, but blind to memory that a kernel takes behind torch's back.
`ResidentMeter` asks the operating system for the process's largest resident size: it sees everything, in pages, and
is meaningful only in a process that has not already grown (see `point`).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Self

import torch
from torch.autograd.profiler import profile

MIB = 1 << 20

SNAPSHOT_EVENTS = 100_000  # the latest; bounds the file


def running_peak(deltas: Iterable[int]) -> tuple[int, int]:
    """(largest running sum, final sum) of signed allocation sizes; the empty sum 0 counts."""
    live = peak = 0
    for delta in deltas:
        live += delta
        peak = max(peak, live)
    return peak, live


@contextlib.contextmanager
def _stderr_silenced() -> Iterator[None]:
    """Some torch builds print a line to file descriptor 2 whenever a profiler starts or stops."""
    sys.stderr.flush()
    saved = os.dup(2)
    sink = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(sink, 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(sink)


class AllocationMeter:
    """Context manager; afterwards `peak` and `live` are bytes above those allocated on entry.

    On CUDA: the caching allocator's statistics. On the CPU: the profiler's allocation events; a free of memory that
    was allocated before entry counts as negative.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.peak = 0
        self.live = 0

    def __enter__(self) -> Self:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            torch.cuda.reset_peak_memory_stats(self._device)
            self._base = torch.cuda.memory_allocated(self._device)
        else:
            # Not torch.profiler.profile, which imports the compiler: two seconds and a hundred MiB in a fresh process.
            self._profile = profile(profile_memory=True)
            with _stderr_silenced():
                self._profile.__enter__()
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            self.peak = torch.cuda.max_memory_allocated(self._device) - self._base
            self.live = torch.cuda.memory_allocated(self._device) - self._base
            return
        with _stderr_silenced():
            self._profile.__exit__(None, None, None)
        recorded = self._profile.kineto_results
        events: list[Any] = [e for e in recorded.events() if e.name() == "[memory]"] if recorded else []
        events.sort(key=lambda e: e.start_ns())
        self.peak, self.live = running_peak(e.nbytes() for e in events)


def _status_bytes(field: str) -> int | None:
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    match = re.search(rf"^{field}:\s+(\d+) kB", status, re.MULTILINE)
    return int(match.group(1)) * 1024 if match else None


class ResidentMeter:
    """Context manager; afterwards `peak` is bytes of resident memory above entry, or None where not measurable.

    Linux only: writing 5 to /proc/self/clear_refs resets VmHWM (proc(5)); where that is forbidden VmHWM still is the
    peak as long as it grew inside the block.
    """

    peak: int | None = None

    def __enter__(self) -> Self:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
        self._base = _status_bytes("VmRSS")
        return self

    def __exit__(self, *exc_info: object) -> None:
        high = _status_bytes("VmHWM")
        if high is not None and self._base is not None:
            self.peak = max(0, high - self._base)


def return_free_memory() -> None:
    """Give the heap's free pages back to the system, so that a `ResidentMeter` sees them taken again (glibc only)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def record_snapshot(run: Callable[[], object], path: Path) -> None:
    """Call `run` and write every CUDA allocation of it, with its Python stack, for pytorch.org/memory_viz."""
    torch.cuda.memory._record_memory_history(max_entries=SNAPSHOT_EVENTS)
    try:
        run()
        torch.cuda.synchronize()
        torch.cuda.memory._dump_snapshot(str(path))
    finally:
        torch.cuda.memory._record_memory_history(enabled=None)


def _cgroup_headroom() -> int | None:
    """Bytes left under this process's control-group limit (v2, then v1), or None without a limit."""
    for limit_path, used_path, stat_path, reclaimable in (
        ("memory.max", "memory.current", "memory.stat", "inactive_file"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_inactive_file"),
    ):
        root = Path("/sys/fs/cgroup")
        try:
            limit, used = (root / limit_path).read_text().strip(), int((root / used_path).read_text())
            stat = dict(line.split() for line in (root / stat_path).read_text().splitlines())
        except (OSError, ValueError):
            continue
        # v1 spells "no limit" as a number near 2**63. Cached files count as used but give way.
        if limit.isdigit() and int(limit) < 1 << 60:
            return int(limit) - used + int(stat.get(reclaimable, 0))
    return None


def available_memory(device: torch.device) -> int:
    """Bytes that can still be allocated on `device`: free device memory, or the machine's or control group's share."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        match = re.search(r"^MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
        free = int(match.group(1)) * 1024 if match else None
    except OSError:
        free = None
    if free is None:
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    headroom = _cgroup_headroom()
    return free if headroom is None else min(free, headroom)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception is torch's or Python's way to say that memory ran out."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )
