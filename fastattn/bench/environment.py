"""Where a measurement was taken: hardware, threads, versions and commit. It heads every result."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path

import torch

from fastattn import _extension
from fastattn.ledger import cpu_name

Environment = dict[str, str | int | float | None]


def cpu_isa() -> str | None:
    """The instruction set that the C++ kernels use in this process, or None without the native module."""
    native, _ = _extension.load()
    return None if native is None else str(native.cpu_isa())


def total_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def version_of(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


@lru_cache(maxsize=1)
def commit() -> str | None:
    """The checkout's commit, `+` appended where tracked files differ from it; None outside a checkout."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()

    try:
        return git("rev-parse", "--short=10", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def driver_version() -> str | None:
    try:
        lines = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            check=True,
            timeout=20,
        ).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        return None
    return lines[0].strip() if lines else None


def environment(device: torch.device) -> Environment:
    """What must be known to judge a figure measured on `device`."""
    facts: Environment = {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "fastattn": version_of("fastattn"),
        "commit": commit(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "device": device.type,
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "isa": cpu_isa(),
        "torch_isa": torch.backends.cpu.get_cpu_capability(),
        "memory_gib": round(total_memory() / 2**30, 1),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts |= {
            "gpu": properties.name,
            "gpu_memory_gib": round(properties.total_memory / 2**30, 1),
            "multiprocessors": properties.multi_processor_count,
            "compute_capability": f"{properties.major}.{properties.minor}",
            "cuda": torch.version.cuda,
            "driver": driver_version(),
            "triton": version_of("triton"),
        }
    return facts


def hardware(facts: Environment) -> str:
    """The part of an environment that two runs must share for their times to be comparable."""
    if facts.get("device") == "cuda":
        return str(facts.get("gpu"))
    return f"{facts.get('cpu')}, {facts.get('threads')} threads, {facts.get('isa') or 'no native kernels'}"


def headline(facts: Environment) -> str:
    """One or two lines that head tables and plots."""
    commit_part = f" ({facts['commit']})" if facts.get("commit") else ""
    parts = [f"fastattn {facts.get('fastattn') or 'not installed'}{commit_part}", f"torch {facts.get('torch')}"]
    if facts.get("device") == "cuda":
        parts += [f"CUDA {facts.get('cuda')}", f"triton {facts.get('triton')}", f"driver {facts.get('driver')}"]
        machine = (
            f"{facts.get('gpu')}, {facts.get('multiprocessors')} SMs, {facts.get('gpu_memory_gib')} GiB, "
            f"sm_{str(facts.get('compute_capability')).replace('.', '')}"
        )
    else:
        machine = (
            f"{facts.get('cpu')}, {facts.get('threads')} threads, {facts.get('isa') or 'no native kernels'}, "
            f"{facts.get('memory_gib')} GiB"
        )
    return f"{machine}\n{' | '.join(parts)} | {str(facts.get('time'))[:10]}"
