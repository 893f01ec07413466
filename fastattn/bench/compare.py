"""Two runs side by side: what got slower, larger or wrong."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fastattn.bench.case import Case
from fastattn.bench.environment import hardware
from fastattn.bench.families import family_of
from fastattn.bench.results import OK, Results, Row


@dataclass(frozen=True)
class Change:
    """One row in both runs, as new / old; above 1 is worse. None where either run has no figure.

    `time` compares absolute medians; `to_steady` compares time divided by that of the family's steady baseline in the
    same run (SDPA, or the chunkwise form in PyTorch), which cancels how fast the machine happened to be; `memory`
    compares the peak extra memory.
    """

    problem: Case
    implementation: str
    old: Row
    new: Row
    time: float | None
    to_steady: float | None
    memory: float | None
    verdict: str = ""


@dataclass(frozen=True)
class Comparison:
    changes: tuple[Change, ...]
    warnings: tuple[str, ...]
    unmatched: int

    @property
    def regressions(self) -> tuple[Change, ...]:
        return tuple(change for change in self.changes if change.verdict)


def _ratio(new: float | None, old: float | None) -> float | None:
    return new / old if new is not None and old else None


def _by_key(results: Results) -> dict[tuple[Case, str], Row]:
    return {(row.problem, row.implementation): row for row in results.rows}


def _relative(rows: Mapping[tuple[Case, str], Row], row: Row) -> float | None:
    base = rows.get((row.problem, family_of(row.problem).steady))
    return _ratio(row.median_ms, base.median_ms if base else None)


def _verdict(change: Change, fail_on: float, same_hardware: bool) -> str:
    """Why the row is a regression, or nothing.

    On the same hardware a slowdown must show in the absolute time and, where the steady baseline was measured, in the
    ratio to it: the one alone means that the machine was slower, the other alone that the baseline was faster that day.
    On different hardware only the ratio counts.
    """
    if change.old.status == OK and change.new.status != OK:
        return f"was ok, now {change.new.status}: {change.new.reason}"
    limit = 1 + fail_on
    slower = change.time is not None and change.time > limit
    slower_than_steady = change.to_steady is not None and change.to_steady > limit
    if not same_hardware:
        regressed = slower_than_steady
    elif change.to_steady is None:
        regressed = slower
    else:
        regressed = slower and slower_than_steady
    if regressed:
        return "slower"
    if change.memory is not None and change.memory > limit:
        return "more memory"
    return ""


def compare(old: Results, new: Results, fail_on: float) -> Comparison:
    """Compare fastattn's rows that both runs have; `fail_on` is the tolerated worsening (0.05 = 5 %)."""
    same = hardware(old.environment) == hardware(new.environment)
    warnings = []
    if not same:
        warnings.append(
            f"different hardware: {hardware(old.environment)} and {hardware(new.environment)}; "
            "absolute times are shown but not judged"
        )
    if old.environment.get("torch") != new.environment.get("torch"):
        warnings.append(f"different torch: {old.environment.get('torch')} and {new.environment.get('torch')}")
    before, after = _by_key(old), _by_key(new)
    ours = {key for key in before.keys() | after.keys() if key[1].startswith("fastattn")}
    # Skipped, or failing, in both: nothing to say.
    idle = {key for key in ours & before.keys() & after.keys() if not (before[key].median_ms or after[key].median_ms)}
    changes = []
    for key, row in after.items():
        if key not in ours - idle or key not in before:
            continue
        change = Change(
            *key,
            before[key],
            row,
            _ratio(row.median_ms, before[key].median_ms),
            _ratio(_relative(after, row), _relative(before, before[key])),
            _ratio(row.extra_mib, before[key].extra_mib),
        )
        changes.append(Change(**{**change.__dict__, "verdict": _verdict(change, fail_on, same)}))
    return Comparison(tuple(changes), tuple(warnings), len(ours - idle) - len(changes))
