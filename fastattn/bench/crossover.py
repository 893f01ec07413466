"""From which length on what stands in for softmax attention is faster than it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fastattn.bench.linear.problem import MECHANISMS
from fastattn.bench.results import OK, Row


@dataclass(frozen=True)
class Crossing:
    """`faster` overtakes `slower` at `length`, by interpolation; None where it does not up to `longest`."""

    faster: str
    slower: str
    length: float | None
    longest: int

    def __str__(self) -> str:
        if self.length is None:
            return f"{self.faster} is not faster than {self.slower} up to {self.longest:,}"
        return f"{self.faster} is faster than {self.slower} from about {round(self.length, -2):,.0f} on"


def overtaking(fast: Mapping[int, float], slow: Mapping[int, float]) -> float | None:
    """The length from which `fast` takes less time at every length measured in both; None where it does not.

    Between two lengths times are taken to grow as a power of the length. Below the shortest there is no telling: then
    it is that.
    """
    lengths = sorted(fast.keys() & slow.keys())
    gains = [math.log(slow[n] / fast[n]) for n in lengths]
    if not gains or gains[-1] <= 0:
        return None
    last = max((i for i, gain in enumerate(gains) if gain <= 0), default=None)
    if last is None:
        return float(lengths[0])
    share = -gains[last] / (gains[last + 1] - gains[last])
    return lengths[last] * (lengths[last + 1] / lengths[last]) ** share


def crossings(rows: Sequence[Row]) -> list[Crossing]:
    """Of the rows of one table: stand-ins against fastattn's softmax attention, or fastattn's own against that."""
    times: dict[str, dict[int, float]] = {}
    for row in rows:
        if row.status == OK and row.median_ms:
            times.setdefault(row.implementation, {})[row.problem.seqlen] = row.median_ms
    pairs = [(name, "fastattn") for name in times if name.partition(":")[0] in MECHANISMS]
    pairs += [("fastattn", "flash")] if "flash" in times else []
    found = []
    for fast, slow in pairs:
        both = times.get(fast, {}).keys() & times.get(slow, {}).keys()
        if len(both) > 1:
            found.append(Crossing(fast, slow, overtaking(times[fast], times[slow]), max(both)))
    return found
