"""Does every kernel compute what the reference defines, on the machine at hand? ``fastattn verify`` asks here.

``verify`` walks the feature grid (``cases.GRID``) over backends, instruction sets and dtypes and returns a ``Report``;
``record`` writes the report into the hardware ledger (``fastattn.ledger``). The contract tests run the same cases.
"""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from fastattn import _extension, ledger
from fastattn._digest import digest
from fastattn.backends import DELEGATE, capabilities
from fastattn.verify.cases import GRID, Case, find_case
from fastattn.verify.check import CaseResult, run_case
from fastattn.verify.timings import timings

__all__ = ["GRID", "Case", "CaseResult", "Report", "Row", "find_case", "record", "run_case", "verify"]

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class Row:
    """One case on one backend, instruction set ("" where the backend has none) and dtype."""

    isa: str
    result: CaseResult

    @property
    def kernel(self) -> str:
        """The backend, with its instruction set where it has several."""
        return f"{self.result.backend}/{self.isa}" if self.isa else self.result.backend

    @property
    def dtype(self) -> str:
        return str(self.result.dtype).removeprefix("torch.")


@dataclass
class Report:
    """What ``verify`` found on one device."""

    device: str
    rows: list[Row] = field(default_factory=list)
    seed: int = 0

    @property
    def passed(self) -> bool:
        """Whether every row passed (and there is one)."""
        return bool(self.rows) and all(row.result.passed for row in self.rows)

    @property
    def failures(self) -> list[Row]:
        return [row for row in self.rows if not row.result.passed]

    def kernels(self) -> list[str]:
        """Names of the kernels that ran, in order."""
        return list(dict.fromkeys(row.kernel for row in self.rows))

    def summary(self) -> str:
        """One line for each kernel and dtype (cases passed, worst ratio and its case), then one for each failure."""
        lines = []
        for kernel, dtype in dict.fromkeys((row.kernel, row.dtype) for row in self.rows):
            mine = [row.result for row in self.rows if (row.kernel, row.dtype) == (kernel, dtype)]
            ran = [result for result in mine if result.supported]
            line = f"{kernel:<24} {dtype:<9} {sum(r.passed for r in ran)} of {len(ran)} cases pass"
            if len(mine) > len(ran):
                line += f", {len(mine) - len(ran)} refused as declared"
            if ran:
                worst = max(ran, key=lambda result: result.worst)
                line += f"; largest error {worst.worst:.2f} of the bar ({worst.case.name})"
            lines.append(line)
        lines += [
            f"FAILED {row.kernel} {row.dtype} {row.result.case.name}: {row.result.message}" for row in self.failures
        ]
        return "\n".join(lines)


def backends_on(device: str, *dtypes: torch.dtype, own: bool = False) -> list[str]:
    """The backends present on this machine that run on the device, and in all of these dtypes; in selection order.

    With ``own``, without PyTorch's own attention.
    """
    kind, index = torch.device(device).type, torch.device(device).index
    return [
        c.backend
        for c in capabilities("dense")
        if not c.unavailable(kind, index)
        and (not c.devices or kind in c.devices)
        and all(c.has_dtype(dtype, kind) for dtype in dtypes)
        and not (own and c.backend == DELEGATE)
    ]


def instruction_sets(backend: str) -> tuple[str, ...]:
    """The instruction sets a backend can be forced to on this machine; ("",) where there is no choice."""
    if backend != "cpu":
        return ("",)
    native, _ = _extension.load()
    return tuple(native.cpu_isas()) if native else ("",)


@contextmanager
def forced_isa(isa: str) -> Iterator[None]:
    """Within it, the cpu kernels run on that instruction set ("" leaves the choice alone)."""
    if not isa:
        yield
        return
    native = _extension.native()
    before = native.cpu_isa()
    native.set_cpu_isa(isa)
    try:
        yield
    finally:
        native.set_cpu_isa(before)


def verify(
    backends: Iterable[str] | None = None,
    device: str | None = None,
    dtypes: Iterable[torch.dtype] | None = None,
    progress: Callable[[int, int, str], None] | None = None,
    cases: Iterable[Case] = GRID,
    seed: int | None = None,
) -> Report:
    """Run the feature grid of the dense family, forward and backward, on backends present on this machine.

    Args:
        backends: names; default: every backend that runs on the device.
        device: a torch device; default "cuda" where there is one, else "cpu".
        dtypes: default: float32, bfloat16, float16, float64.
        progress: called before each row with (rows done, rows in all, what runs next).
        cases: the grid.
        seed: of the random inputs; default: a fresh one, kept in ``Report.seed``.

    Returns:
        a Report; failures are rows, never exceptions.

    Raises:
        ValueError: an unknown backend, or one that cannot run on the device at all.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    present = backends_on(device)
    chosen = present if backends is None else list(backends)
    if unknown := [name for name in chosen if name not in present]:
        raise ValueError(f"backends: {', '.join(unknown)} cannot run on {device} here; there are {', '.join(present)}")
    # Backend and instruction set innermost: they share the truth, which costs more than the kernels.
    targets = [(backend, isa) for backend in chosen for isa in instruction_sets(backend)]
    plan = [(case, dtype, target) for case in cases for dtype in dtypes or DTYPES for target in targets]
    report = Report(device, seed=torch.seed() % 2**31 if seed is None else seed)
    for done, (case, dtype, (backend, isa)) in enumerate(plan):
        if progress:
            progress(done, len(plan), f"{backend} {isa} {dtype} {case.name}".replace("  ", " "))
        with forced_isa(isa):
            report.rows.append(Row(isa, run_case(case, dtype, backend, device, report.seed)))
    if progress:
        progress(len(plan), len(plan), "done")
    return report


def kernel_digests(device: str = "cpu") -> dict[str, str]:
    """{"dense/cpu/<instruction set>" or "dense/triton": digest} of the kernels that run on the device.

    {} on a CPU without a native build.
    """
    if torch.device(device).type != "cpu":
        import fastattn.kernels

        folder = Path(fastattn.kernels.__path__[0])
        return {"dense/triton": digest(sorted(folder.glob("dense_*.py")))}
    native, _ = _extension.load()
    if native is None:
        return {}
    digests = native.build_info()["digests"]
    return {f"dense/cpu/{isa}": digests[isa] for isa in native.cpu_isas()}


def _commit() -> str | None:
    root = Path(__file__).resolve().parents[2]
    try:
        run = subprocess.run(["git", "-C", root, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return run.stdout.strip()


def _ratios(rows: list[Row]) -> dict[str, float | None]:
    return {
        f"{row.kernel} {row.dtype}": round(row.result.worst, 3) if row.result.worst != float("inf") else None
        for row in rows
        if row.result.supported
    }


def record(report: Report, path: Path | str | None = None, with_timings: bool = True) -> Path:
    """Write a report into the hardware ledger, with a few timings beside PyTorch's own attention.

    The record names a kernel as proved only where the report walked the whole grid on it, in every dtype, and every
    row passed.

    Args:
        path: folder of the record; default: the installed ledger.

    Returns:
        the path of the JSON file.
    """
    import fastattn

    on_cpu = torch.device(report.device).type == "cpu"
    by_kernel = {kernel: [row for row in report.rows if row.kernel == kernel] for kernel in report.kernels()}
    full = len(GRID) * len(DTYPES)
    proved = {k for k, rows in by_kernel.items() if len(rows) == full and all(row.result.passed for row in rows)}
    best = backends_on(report.device, own=True)[0]
    rows = list(timings(best, report.device)) if with_timings else []
    by_case: dict[str, list[Row]] = {}
    for row in report.rows:
        by_case.setdefault(row.result.case.name, []).append(row)
    content: dict[str, Any] = {
        "schema": ledger.SCHEMA,
        "device": {
            "type": torch.device(report.device).type,
            "name": ledger.cpu_name() if on_cpu else torch.cuda.get_device_name(report.device),
            "isa": [row for row in dict.fromkeys(r.isa for r in report.rows) if row],
            "threads": torch.get_num_threads(),
        },
        "recorded": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {
            "fastattn": fastattn.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
        },
        "commit": _commit(),
        "kernels": {
            name: digest
            for name, digest in kernel_digests(report.device).items()
            if name.removeprefix("dense/") in proved
        },
        "cases": [{"case": name, "ratios": _ratios(rows)} for name, rows in by_case.items()],
        "timings": rows,
    }
    return ledger.write_record(content, ledger.FOLDER if path is None else path)
