"""The record of a run: rows with everything needed to judge them, as versioned JSON and as an append-only CSV."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from fastattn.bench.case import Case
from fastattn.bench.environment import Environment, hardware
from fastattn.bench.families import FAMILIES, Family, family_of

SCHEMA = "fastattn.bench/1"

# Fields of a row that are more than one value.
NESTED = ("problem", "errors", "speedup")

# status -> does the row carry a time
OK, WRONG, SKIPPED, OOM, FAILED = "ok", "wrong", "skipped", "oom", "failed"


@dataclass(frozen=True)
class Row:
    """One implementation on one problem. Times are milliseconds per call; fields that were not measured are None.

    `errors` are by tensor, relative to the largest reference value, `max_error` the one nearest to (or furthest above)
    its bar; `extra_mib` the peak memory above the inputs, outputs and gradients included. `speedup` maps the family's
    baselines to the ratio of medians, and is empty for a result that failed its check. `off_softmax` is how far the
    output of what stands in for softmax attention is from that: the norm of the difference, relative.
    """

    problem: Case
    implementation: str
    kernel: str = ""
    status: str = OK
    reason: str = ""
    median_ms: float | None = None
    p20_ms: float | None = None
    p80_ms: float | None = None
    samples: int = 0
    gflops: float | None = None
    gbs: float | None = None  # decoding only, whose peak_fraction is that of the read bandwidth
    peak_fraction: float | None = None
    extra_mib: float | None = None
    max_error: float | None = None
    error_bar: float | None = None
    errors: Mapping[str, float] = field(default_factory=dict)
    checked: str = ""
    speedup: Mapping[str, float] = field(default_factory=dict)
    off_softmax: float | None = None


@dataclass(frozen=True)
class Results:
    """A run of cases of one family: where, how, the machine's peaks by dtype (GFLOP/s), the rows and, for decoding, the
    read bandwidth."""

    environment: Environment
    settings: dict[str, object]
    peaks: dict[str, dict[str, float | None]]
    rows: tuple[Row, ...]
    read_gbs: float | None = None

    @property
    def family(self) -> str:
        return self.rows[0].problem.family if self.rows else "dense"

    def to_json(self) -> str:
        means = [asdict(mean) for mean in geometric_means(self.rows)]
        head = {"schema": SCHEMA, "family": self.family}
        return json.dumps({**head, **asdict(self), "geometric_means": means}, indent=1)

    def write_json(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(self.to_json() + "\n")

    @classmethod
    def read_json(cls, path: Path) -> Results:
        """Load what `write_json` wrote.

        Raises:
            ValueError: the file is not a result of this schema.
        """
        try:
            document = json.loads(path.read_text())
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ValueError(f"{path}: cannot be read as a benchmark result ({error})") from error
        schema = document.get("schema") if isinstance(document, dict) else None
        if schema != SCHEMA:
            raise ValueError(f"{path}: expected schema {SCHEMA!r}, found {schema!r}")
        family = FAMILIES.get(document.get("family", "dense"))
        if family is None:
            raise ValueError(f"{path}: no family {document['family']!r}; there are {', '.join(FAMILIES)}")
        rows = tuple(Row(**{**row, "problem": family.problem(**row["problem"])}) for row in document["rows"])
        return cls(document["environment"], document["settings"], document["peaks"], rows, document.get("read_gbs"))

    def append_csv(self, path: Path) -> None:
        """Append one line per row; the columns are stable, so one file can collect many runs of a family.

        Raises:
            ValueError: the file exists with other columns.
        """
        lines, columns = list(self._csv_lines()), csv_columns(FAMILIES[self.family])
        path.parent.mkdir(parents=True, exist_ok=True)
        new = not path.exists() or path.stat().st_size == 0
        if not new:
            with path.open(newline="") as existing:
                header = next(csv.reader(existing), [])
            if tuple(header) != columns:
                raise ValueError(f"{path}: has other columns than this version writes; name another file")
        with path.open("a", newline="") as file:
            writer = csv.DictWriter(file, columns)
            if new:
                writer.writeheader()
            writer.writerows(lines)

    def _csv_lines(self) -> Iterable[dict[str, object]]:
        facts = self.environment
        run = {
            "time": facts.get("time"),
            "commit": facts.get("commit"),
            "version": facts.get("fastattn"),
            "torch": facts.get("torch"),
            "hardware": hardware(facts),
        }
        for row in self.rows:
            line: dict[str, object] = {**run, **asdict(row.problem)}
            line |= {f.name: getattr(row, f.name) for f in fields(Row) if f.name not in NESTED}
            yield line | {f"vs_{base}": row.speedup.get(base) for base in family_of(row.problem).columns}


def csv_columns(family: Family) -> tuple[str, ...]:
    return (
        *("time", "commit", "version", "torch", "hardware"),
        *(f.name for f in fields(family.problem)),
        *(f.name for f in fields(Row) if f.name not in NESTED),
        *(f"vs_{base}" for base in family.columns),
    )


@dataclass(frozen=True)
class GeometricMean:
    """Mean speed-up of one implementation over another, over the cases of one table."""

    implementation: str
    against: str
    mode: str
    dtype: str
    causal: bool
    head_dim: int
    feature: str
    mean: float
    lowest: float
    cases: int


def geometric_means(rows: Iterable[Row]) -> list[GeometricMean]:
    """Speed-ups of fastattn's rows that passed their check, grouped as the tables are."""
    groups: dict[tuple[str, str, str, str, bool, int, str], list[float]] = {}
    for row in rows:
        if not row.implementation.startswith("fastattn"):
            continue
        p = row.problem
        for against, ratio in row.speedup.items():
            key = (row.implementation, against, p.mode, p.dtype, p.causal, p.head_dim, p.feature)
            groups.setdefault(key, []).append(ratio)
    return [
        GeometricMean(*key, math.exp(sum(map(math.log, ratios)) / len(ratios)), min(ratios), len(ratios))
        for key, ratios in groups.items()
    ]
