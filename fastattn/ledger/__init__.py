"""The hardware ledger: which kernels were shown to be right on which devices, and how fast they were.

Each record is one JSON file beside this module, written by ``fastattn verify --record`` on the device that it names.
A kernel counts as verified where a record of that device holds the digest of its present source; after any change of
the source the digest differs and the kernel is unverified until somebody records it again.

Schema 1, one object:

    schema    1
    device    type ("cpu", "cuda"), name, isa (instruction sets that ran; compute capability on a GPU), threads
    recorded  when, ISO 8601, UTC
    versions  of fastattn, python and torch
    commit    of the source tree; null where it was not a checkout
    kernels   {kernel name: digest of its source, what it includes, and its flags}: the kernels that this record proves.
              A kernel is named family/backend/instruction set, as in "dense/cpu/v4" and "linear/triton"
    cases     [{family, case, ratios: {"cpu/v4 float32": 0.41, ...}}]: for each backend, instruction set and dtype the
              largest error of results and gradients, divided by the bar it must not pass (1 is the bar). null: a
              failure without a finite error. family is absent where the record knows of none but "dense"
    timings   [{shape, dtype, causal, pass, fastattn_ms, sdpa_ms, speedup, delegated_ms}]: interleaved medians beside
              PyTorch's scaled_dot_product_attention, called directly and (delegated_ms, null where it cannot run) as
              backend "sdpa". Selection reads the latter: see `sdpa_advantage`

This module imports nothing but the standard library.
"""

from __future__ import annotations

import json
import math
import platform
import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

SCHEMA = 1
FOLDER = Path(__file__).parent
_LISTS = ("cases", "timings")

# What PyTorch's attention must be ahead by for calls to go to it: less is within the noise of medians of five, and not
# worth running code that is not ours.
MARGIN = 1.1
# A recorded length speaks for lengths within this factor: short and long problems are bound by different things.
REACH = 4


@lru_cache(maxsize=1)
def cpu_name() -> str:
    """The CPU's model name, as the operating system gives it."""
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return " ".join(found.group(1).split()) if found else platform.processor() or platform.machine()


def slug(name: str) -> str:
    """A device's name as a file name: lower case, words joined by hyphens."""
    plain = re.sub(r"\((r|tm)\)", " ", name.lower())
    return re.sub(r"[^a-z0-9]+", "-", plain).strip("-")


def write_record(record: Mapping[str, Any], folder: Path | str = FOLDER) -> Path:
    """Write a record as ``folder``/<device-slug>.json, one line for each case and timing, and return the path.

    Raises:
        ValueError: the record is not of this schema.
    """
    if record.get("schema") != SCHEMA:
        raise ValueError(f"record: expected schema {SCHEMA}, got {record.get('schema')!r}")
    parts = []
    for key, value in record.items():
        if key in _LISTS:
            rows = ",\n".join(f"    {json.dumps(row)}" for row in value)
            parts.append(f"  {json.dumps(key)}: [\n{rows}\n  ]" if value else f"  {json.dumps(key)}: []")
        else:
            parts.append(f"  {json.dumps(key)}: " + json.dumps(value, indent=2).replace("\n", "\n  "))
    path = Path(folder) / f"{slug(record['device']['name'])}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{\n" + ",\n".join(parts) + "\n}\n")
    return path


def load_records(folder: Path | str = FOLDER) -> list[dict[str, Any]]:
    """Every record of this schema in ``folder``, by file name; files of another schema are passed over."""
    records = [json.loads(path.read_text()) for path in sorted(Path(folder).glob("*.json"))]
    return [record for record in records if record.get("schema") == SCHEMA]


def find_record(device: str | None = None, folder: Path | str = FOLDER) -> dict[str, Any] | None:
    """The record of the device with that name (default: this machine's CPU), or None."""
    wanted = slug(cpu_name() if device is None else device)
    return next((r for r in load_records(folder) if slug(r["device"]["name"]) == wanted), None)


def unverified(
    kernel_digests: Mapping[str, str], device: str | None = None, folder: Path | str = FOLDER
) -> Iterable[str]:
    """The names of those kernels whose present digest no record of the device proves."""
    record = find_record(device, folder)
    proved = record["kernels"] if record else {}
    return [name for name, digest in kernel_digests.items() if proved.get(name) != digest]


def status(kernel_digests: Mapping[str, str], device: str | None = None, folder: Path | str = FOLDER) -> str:
    """What the ledger says of these kernels ({name: digest}) on a device (default: this machine's CPU).

    Returns:
        "verified on <device>", "not verified on this hardware" (a record exists, but not of every one of these
        digests), or "no record for this device".
    """
    record = find_record(device, folder)
    if record is None:
        return "no record for this device"
    if not kernel_digests or unverified(kernel_digests, device, folder):
        return "not verified on this hardware"
    return f"verified on {record['device']['name']}"


def sdpa_advantage(
    timings: Iterable[Mapping[str, Any]], *, dtype: str, head_dim: int, causal: bool, backward: bool, seqlen: int
) -> float | None:
    """fastattn's recorded time over that of backend "sdpa", where the latter is ahead by more than noise.

    Args:
        timings: of a record.
        dtype, head_dim, causal: of the problem; a row must have the same.
        backward: the backward alone is meant (the recorded "forward+backward" less "forward"), not the forward.
        seqlen: the nearest recorded length decides, if it is within `REACH`.

    Returns:
        the factor, at least `MARGIN`; None where it is less, or not recorded.
    """
    times = {
        (row["shape"][2], row["pass"]): (row["fastattn_ms"], row["delegated_ms"])
        for row in timings
        if row.get("delegated_ms") and (row["dtype"], row["shape"][3], row["causal"]) == (dtype, head_dim, causal)
    }
    if not times:
        return None
    nearest = min(sorted(length for length, _ in times), key=lambda length: abs(math.log(length / seqlen)))
    if not 1 / REACH <= nearest / seqlen <= REACH:
        return None
    forward, both = times.get((nearest, "forward")), times.get((nearest, "forward+backward"))
    if forward is None or (backward and both is None):
        return None
    ours, sdpa = (b - f for b, f in zip(both, forward, strict=True)) if backward and both else forward
    return ours / sdpa if 0 < sdpa * MARGIN <= ours else None
