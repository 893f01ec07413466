"""The hardware ledger: records go out and come back, and "verified" means this kernel, on this device.

Fails where a record of another device, of another schema or of an older source counts as proof, where a partial or
failed run writes one, or where importing the ledger pulls in torch.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fastattn import ledger, verify
from fastattn.verify import CaseResult, Report, Row
from fastattn.verify.family import Case
from fastattn.verify.timings import interleaved_medians, timings

DIGESTS = {"dense/cpu/v3": "aa11", "dense/cpu/v4": "bb22", "linear/cpu/v4": "bb22"}


def record(**changes: Any) -> dict[str, Any]:
    return {
        "schema": ledger.SCHEMA,
        "device": {"type": "cpu", "name": ledger.cpu_name(), "isa": ["v3", "v4"], "threads": 2},
        "recorded": "2026-01-01T00:00:00+00:00",
        "versions": {"fastattn": "0", "python": "3", "torch": "2"},
        "commit": None,
        "kernels": dict(DIGESTS),
        "cases": [{"family": "dense", "case": "full", "ratios": {"cpu/v4 float32": 0.5}}],
        "timings": [],
    } | changes


def test_round_trip(tmp_path: Path) -> None:
    path = ledger.write_record(record(), tmp_path)
    assert path.name == f"{ledger.slug(ledger.cpu_name())}.json"
    assert ledger.load_records(tmp_path) == [record()]
    assert ledger.find_record(folder=tmp_path) == record()
    assert ledger.find_record("Some Other CPU", tmp_path) is None


def test_one_line_for_each_case(tmp_path: Path) -> None:
    """Readable, and a later record shows as a readable difference."""
    cases = [{"case": name, "ratios": {"cpu/v4 float32": 0.5}} for name in ("full", "causal")]
    text = ledger.write_record(record(cases=cases), tmp_path).read_text()
    assert [line for line in text.splitlines() if '"ratios"' in line] == [
        f"    {json.dumps(cases[0])},",
        f"    {json.dumps(cases[1])}",
    ]


def test_status(tmp_path: Path) -> None:
    assert ledger.status(DIGESTS, folder=tmp_path) == "no record for this device"
    ledger.write_record(record(), tmp_path)
    assert ledger.status(DIGESTS, folder=tmp_path) == f"verified on {ledger.cpu_name()}"
    assert ledger.status({"dense/cpu/v4": "bb22"}, folder=tmp_path) == f"verified on {ledger.cpu_name()}"
    changed = DIGESTS | {"dense/cpu/v4": "cc33"}
    assert ledger.status(changed, folder=tmp_path) == "not verified on this hardware"
    assert list(ledger.unverified(changed, folder=tmp_path)) == ["dense/cpu/v4"]
    assert ledger.status({"dense/cuda/sm_90": "bb22"}, folder=tmp_path) == "not verified on this hardware"
    assert ledger.status({}, folder=tmp_path) == "not verified on this hardware"
    assert ledger.status(DIGESTS, "Some GPU", tmp_path) == "no record for this device"


def test_another_schema_proves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"schema {ledger.SCHEMA}"):
        ledger.write_record(record(schema=0), tmp_path)
    (tmp_path / "old.json").write_text(json.dumps(record(schema=0)))
    assert ledger.load_records(tmp_path) == []
    assert ledger.status(DIGESTS, folder=tmp_path) == "no record for this device"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("Intel(R) Xeon(R) Platinum 8480C @ 2.00GHz", "intel-xeon-platinum-8480c-2-00ghz"),
        ("NVIDIA H100 80GB HBM3", "nvidia-h100-80gb-hbm3"),
        ("../../etc/passwd", "etc-passwd"),
    ],
)
def test_slug(name: str, expected: str) -> None:
    assert ledger.slug(name) == expected


def test_shipped_records_are_well_formed() -> None:
    """Fails where a JSON beside the module has another schema or device's name, or proves what went past the bar."""
    for path in ledger.FOLDER.glob("*.json"):
        shipped = json.loads(path.read_text())
        assert shipped.keys() == record().keys()
        assert path.name == f"{ledger.slug(shipped['device']['name'])}.json"
        for case in shipped["cases"]:
            for target, ratio in case["ratios"].items():
                kernel = f"{case.get('family', 'dense')}/{target.split()[0]}"
                assert kernel not in shipped["kernels"] or (ratio is not None and ratio <= 1.0), (path.name, case)


def test_import_is_light() -> None:
    """Fails where the ledger module itself imports torch (the package it lies in does)."""
    code = (
        "import importlib.util, sys\n"
        f"spec = importlib.util.spec_from_file_location('ledger', {str(Path(ledger.__file__))!r})\n"
        "module = importlib.util.module_from_spec(spec); spec.loader.exec_module(module)\n"
        "assert 'torch' not in sys.modules, 'torch'\n"
        "module.load_records(), module.status({})\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


EVERYTHING = tuple(case for grid in verify.GRIDS.values() for case in grid)


def _report(failing: str | None = None, cases: tuple[Case, ...] = EVERYTHING) -> Report:
    """A report in which each case passed on cpu/v4 in each dtype, but for `failing`, as family/case."""
    rows = [
        Row("v4", CaseResult(case, "cpu", dtype, {"out": 0.5}, f"{case.family}/{case.name}" != failing, ""))
        for case in cases
        for dtype in verify.DTYPES
    ]
    return Report("cpu", rows)


def _write(report: Report, folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setattr(verify, "kernel_digests", lambda device: dict(DIGESTS))
    return json.loads(verify.record(report, folder, with_timings=False).read_text())


def test_a_record_proves_what_ran_and_passed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails where anything but a family's whole grid in all dtypes, all passed, proves that family's kernel."""
    written = _write(_report(), tmp_path, monkeypatch)
    assert written["kernels"] == {"dense/cpu/v4": "bb22", "linear/cpu/v4": "bb22"}
    assert [(c["family"], c["case"]) for c in written["cases"]] == [(c.family, c.name) for c in EVERYTHING]
    assert set(written["cases"][0]["ratios"]) == {f"cpu/v4 {str(d).removeprefix('torch.')}" for d in verify.DTYPES}
    assert set(_write(_report("dense/causal"), tmp_path, monkeypatch)["kernels"]) == {"linear/cpu/v4"}
    assert set(_write(_report("linear/elu"), tmp_path, monkeypatch)["kernels"]) == {"dense/cpu/v4"}
    assert set(_write(_report(cases=EVERYTHING[1:]), tmp_path, monkeypatch)["kernels"]) == {"linear/cpu/v4"}
    assert set(_write(_report(cases=EVERYTHING[:-1]), tmp_path, monkeypatch)["kernels"]) == {"dense/cpu/v4"}
    assert ledger.status({"linear/cpu/v4": "bb22"}, folder=tmp_path) == "not verified on this hardware"


def test_digests_name_each_family() -> None:
    """Fails where a kernel of a family has no digest, or one does that this build has not."""
    families = [family for family in verify.GRIDS if "cpu" in verify.backends_on("cpu", family=family)]
    isas = [isa for isa in verify.instruction_sets("cpu") if isa]
    found = verify.kernel_digests("cpu")
    assert set(found) == {f"{family}/cpu/{isa}" for family in families for isa in isas}
    assert all(found[f"{family}/cpu/{isa}"] == found[f"dense/cpu/{isa}"] for family in families for isa in isas)
    on_gpu = verify.kernel_digests("cuda")  # of sources alone, so it needs no GPU
    assert {"dense/triton"} <= set(on_gpu) <= {f"{family}/triton" for family in verify.GRIDS}
    assert len(set(on_gpu.values())) == len(on_gpu)


def test_verify_reports_each_backend() -> None:
    """Fails where an instruction set or family has no rows, progress stops short, or a failure goes unnamed."""
    seen: list[tuple[int, int, str]] = []
    cases = [verify.find_case(name) for name in ("causal", "softcap", "packed_causal")]
    cases.append(verify.find_case("elu", "linear"))
    report = verify.verify(dtypes=[torch.float32], progress=lambda *step: seen.append(step), cases=cases, device="cpu")
    kernels = report.kernels()
    assert report.passed, report.summary()
    dense = [kernel for kernel in kernels if kernel.startswith("dense/")]
    assert dense[-2:] == ["dense/reference", "dense/sdpa"]
    assert kernels[-1] == "linear/reference"
    assert len(report.rows) == 3 * len(dense) + (len(kernels) - len(dense)) == seen[-1][0] == seen[-1][1]
    assert "linear/reference" in report.summary()
    broken = Report("cpu", [*report.rows, Row("", CaseResult(cases[0], "reference", torch.float32, {}, False, "odd"))])
    assert not broken.passed
    assert "FAILED dense/reference float32 causal: odd" in broken.summary()
    assert not Report("cpu").passed  # nothing ran, nothing is shown
    with pytest.raises(ValueError, match="no_such"):
        verify.verify(backends=["no_such"], device="cpu")
    with pytest.raises(ValueError, match="sdpa"):
        verify.verify(backends=["sdpa"], device="cpu", cases=cases[-1:])  # the linear family has none


def test_timings_rows() -> None:
    """Both functions in each row, with their ratio."""
    (row, *_) = timings("reference", "cpu", [torch.float32], lengths=[16])
    assert row["shape"] == [1, 4, 16, 64]
    assert row["fastattn_ms"] > 0 < row["sdpa_ms"]
    order: list[str] = []
    interleaved_medians([lambda: order.append("a"), lambda: order.append("b")], lambda: None, repeats=2)
    assert order == ["a", "b"] * 3  # one warm-up each, then in turn
