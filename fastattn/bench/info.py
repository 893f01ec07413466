"""What `fastattn info` tells: versions, device, instruction sets, backends, and what has been verified here."""

from __future__ import annotations

import platform
import re
from pathlib import Path

import torch

from fastattn import _extension, ledger
from fastattn.backends import Requirements, capabilities, delegated, device_name
from fastattn.bench.environment import commit, environment, version_of
from fastattn.bench.report import size_name

Section = tuple[str, list[tuple[str, str]]]


def openmp_runtimes() -> list[str]:
    """File names of the OpenMP runtimes that this process has loaded (Linux; elsewhere empty)."""
    try:
        maps = Path("/proc/self/maps").read_text()
    except OSError:
        return []
    paths = re.findall(r"\S*/lib(?:gomp|iomp5|omp)[-.\w]*\.so\S*", maps)
    return sorted({Path(path).name for path in paths})


def _versions() -> list[tuple[str, str]]:
    facts = environment(torch.device("cpu"))
    revision = commit()
    return [
        ("fastattn", f"{facts['fastattn'] or 'not installed'}{f' ({revision})' if revision else ''}"),
        ("torch", f"{torch.__version__}, CUDA {torch.version.cuda or 'not built in'}"),
        ("triton", version_of("triton") or "not installed"),
        ("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
    ]


def _device() -> list[tuple[str, str]]:
    facts = environment(torch.device("cpu"))
    lines = [
        ("CPU", f"{facts['cpu']}, {facts['cores']} cores, {facts['memory_gib']} GiB"),
        ("threads", f"{torch.get_num_threads()} (torch.get_num_threads())"),
    ]
    if not torch.cuda.is_available():
        return [*lines, ("GPU", "none that torch can use")]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        capability = f"sm_{properties.major}{properties.minor}"
        lines.append((f"GPU {index}", f"{properties.name}, {capability}, {size_name(properties.total_memory)}"))
    return lines


def _native() -> list[tuple[str, str]]:
    native, reason = _extension.load()
    if native is None:
        return [("C++ kernels", f"missing: {reason}")]
    build = native.build_info()
    lines = [
        ("instruction set", f"{native.cpu_isa()} in use, out of {', '.join(native.cpu_isas())}"),
        ("torch uses", torch.backends.cpu.get_cpu_capability()),
        ("compiler", str(build["compiler"])),
    ]
    runtimes = openmp_runtimes()
    if not build["openmp"]:
        threads = "kernels were built without it and start threads of their own for each call"
    elif len(runtimes) == 1:
        threads = f"one runtime, shared with torch ({runtimes[0]})"
    elif runtimes:
        threads = f"{len(runtimes)} runtimes: {', '.join(runtimes)}; kernels and torch have separate thread pools"
    else:
        threads = "in use; the runtimes of this process cannot be listed on this system"
    return [*lines, ("OpenMP", threads)]


def _backends() -> list[tuple[str, str]]:
    lines = []
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for capability in capabilities("dense"):
        reason = capability.unavailable(device, None)
        devices = ", ".join(sorted(capability.devices)) or "any device"
        text = f"not available: {reason}" if reason else f"{devices}; {capability.dtype_names()}"
        lines.append((capability.backend, text))
    return lines


def delegation(device: str) -> str:
    """How many of the problems whose times are recorded for the device go to PyTorch's own attention."""
    name = device_name(device)
    record = None if name is None else ledger.find_record(name)
    if record is None or not record["timings"]:
        return "nothing: no times are recorded for this device"
    asked = [
        Requirements(
            device,
            getattr(torch, row["dtype"]),
            row["shape"][3],
            frozenset(name for name, needed in (("causal", row["causal"]), ("backward", "+" in row["pass"])) if needed),
            seqlen=row["shape"][2],
        )
        for row in record["timings"]
    ]
    taken = sum(delegated("dense", needs) is not None for needs in asked)
    return f"{taken or 'none'} of {len(asked)} recorded problems, to PyTorch's own attention (sdpa)"


def _ledger() -> list[tuple[str, str]]:
    from fastattn.verify import kernel_digests

    digests = kernel_digests("cpu")
    lines = [("this CPU", ledger.status(digests))]
    unproved = sorted(ledger.unverified(digests))
    if unproved:
        lines.append(("not verified", f"{', '.join(unproved)}; run fastattn verify --record"))
    lines.append(("delegated", delegation("cpu")))
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
        lines.append(("this GPU", ledger.status(kernel_digests("cuda"), name)))
        lines.append(("delegated", delegation("cuda")))
    return lines


def sections() -> list[Section]:
    """Titles with (name, value) lines, in the order to show them."""
    return [
        ("Versions", _versions()),
        ("Device", _device()),
        ("Native core", _native()),
        ("Backends of dense attention, in selection order", _backends()),
        ("Hardware ledger", _ledger()),
    ]
