"""Does every kernel compute what the reference defines, on the machine at hand? ``fastattn verify`` asks here.

``verify`` walks the feature grids of all families (``GRIDS``) over backends, instruction sets and dtypes and returns a
``Report``; ``record`` writes the report into the hardware ledger (``fastattn.ledger``). The contract tests run the same
cases. What a family supplies is a ``family.Family``; all else is the same for every one.
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
from fastattn.verify.check import FAMILIES, CaseResult, run_case
from fastattn.verify.family import Case
from fastattn.verify.timings import timings

__all__ = ["GRIDS", "CaseResult", "Report", "Row", "find_case", "record", "run_case", "verify"]

GRIDS: dict[str, tuple[Case, ...]] = {name: family.GRID for name, family in FAMILIES.items()}

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class Row:
    """One case on one backend, instruction set ("" where the backend has none) and dtype."""

    isa: str
    result: CaseResult

    @property
    def target(self) -> str:
        """The backend, with its instruction set where it has several."""
        return f"{self.result.backend}/{self.isa}" if self.isa else self.result.backend

    @property
    def kernel(self) -> str:
        """The target's kernels of the case's family, as in "dense/cpu/v4"."""
        return f"{self.result.case.family}/{self.target}"

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


def find_case(name: str, family: str = "dense") -> Any:
    """The case called ``name``; KeyError if there is none."""
    return {case.name: case for case in GRIDS[family]}[name]


def backends_on(device: str, *dtypes: torch.dtype, own: bool = False, family: str = "dense") -> list[str]:
    """A family's backends on this machine that run on the device, and in all of these dtypes; in selection order.

    With ``own``, without PyTorch's own attention.
    """
    kind, index = torch.device(device).type, torch.device(device).index
    return [
        c.backend
        for c in capabilities(family)
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
    cases: Iterable[Case] | None = None,
    seed: int | None = None,
) -> Report:
    """Run the feature grids, forward and backward, on backends present on this machine.

    Args:
        backends: names; default: every backend that runs on the device.
        device: a torch device; default "cuda" where there is one, else "cpu".
        dtypes: default: float32, bfloat16, float16, float64.
        progress: called before each row with (rows done, rows in all, what runs next).
        cases: default: the grids of all families.
        seed: of the random inputs; default: a fresh one, kept in ``Report.seed``.

    Returns:
        a Report; failures are rows, never exceptions.

    Raises:
        ValueError: a backend that is unknown, or cannot run any family of the cases on the device at all.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    cases = [case for grid in GRIDS.values() for case in grid] if cases is None else list(cases)
    present = {family: backends_on(device, family=family) for family in dict.fromkeys(case.family for case in cases)}
    known = list(dict.fromkeys(name for names in present.values() for name in names))
    chosen = known if backends is None else list(backends)
    if unknown := [name for name in chosen if name not in known]:
        raise ValueError(f"backends: {', '.join(unknown)} cannot run on {device} here; there are {', '.join(known)}")
    # Backend and instruction set innermost: they share the truth, which costs more than the kernels.
    targets = {
        family: [(backend, isa) for backend in chosen if backend in names for isa in instruction_sets(backend)]
        for family, names in present.items()
    }
    plan = [(case, dtype, target) for case in cases for dtype in dtypes or DTYPES for target in targets[case.family]]
    report = Report(device, seed=torch.seed() % 2**31 if seed is None else seed)
    for done, (case, dtype, (backend, isa)) in enumerate(plan):
        if progress:
            target = f"{backend} {isa}" if isa else backend
            progress(done, len(plan), f"{case.family} {target} {dtype} {case.name}")
        with forced_isa(isa):
            report.rows.append(Row(isa, run_case(case, dtype, backend, device, report.seed)))
    if progress:
        progress(len(plan), len(plan), "done")
    return report


def kernel_digests(device: str = "cpu") -> dict[str, str]:
    """{"dense/cpu/<instruction set>" or "dense/triton": digest} of each family's kernels that run on the device.

    The native kernels of all families are built as one source for each instruction set, and share its digest.
    {} on a CPU without a native build.
    """
    if torch.device(device).type != "cpu":
        import fastattn.kernels

        folder = Path(fastattn.kernels.__path__[0])
        sources = {family: sorted(folder.glob(f"{family}_*.py")) for family in FAMILIES}
        return {f"{family}/triton": digest(files) for family, files in sources.items() if files}
    native, _ = _extension.load()
    if native is None:
        return {}
    digests = native.build_info()["digests"]
    families = [family for family in FAMILIES if "cpu" in backends_on("cpu", family=family)]
    return {f"{family}/cpu/{isa}": digests[isa] for family in families for isa in native.cpu_isas()}


def _commit() -> str | None:
    root = Path(__file__).resolve().parents[2]
    try:
        run = subprocess.run(["git", "-C", root, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return run.stdout.strip()


def _ratios(rows: list[Row]) -> dict[str, float | None]:
    return {
        f"{row.target} {row.dtype}": round(row.result.worst, 3) if row.result.worst != float("inf") else None
        for row in rows
        if row.result.supported
    }


def record(report: Report, path: Path | str | None = None, with_timings: bool = True) -> Path:
    """Write a report into the hardware ledger, with a few timings beside PyTorch's own attention.

    The record names a kernel as proved only where the report walked its family's whole grid on it, in every dtype, and
    every row passed.

    Args:
        path: folder of the record; default: the installed ledger.

    Returns:
        the path of the JSON file.
    """
    import fastattn

    on_cpu = torch.device(report.device).type == "cpu"
    by_kernel: dict[str, list[Row]] = {}
    by_case: dict[tuple[str, str], list[Row]] = {}
    for row in report.rows:
        by_kernel.setdefault(row.kernel, []).append(row)
        by_case.setdefault((row.result.case.family, row.result.case.name), []).append(row)
    proved = {
        kernel
        for kernel, rows in by_kernel.items()
        if len(rows) == len(GRIDS[rows[0].result.case.family]) * len(DTYPES) and all(row.result.passed for row in rows)
    }
    best = backends_on(report.device, own=True)[0]
    rows = list(timings(best, report.device)) if with_timings else []
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
        "kernels": {name: found for name, found in kernel_digests(report.device).items() if name in proved},
        "cases": [{"family": family, "case": name, "ratios": _ratios(of)} for (family, name), of in by_case.items()],
        "timings": rows,
    }
    return ledger.write_record(content, ledger.FOLDER if path is None else path)
