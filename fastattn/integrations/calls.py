"""Where calls of `scaled_dot_product_attention` ran, counted."""

from __future__ import annotations

from typing import Literal

from fastattn import backends
from fastattn.dense import delegate
from fastattn.dense.problem import Problem
from fastattn.errors import UnsupportedError

Place = Literal["fastattn", "torch"]

# The reference computes what torch's own would, and no faster.
OWN_KERNELS = frozenset(backends.backend_names("dense")) - {"reference", backends.DELEGATE}


class CallReport:
    """Counts of the calls of scaled_dot_product_attention by where they ran and why; print it to read it.

    Calls are counted when they run, in compiled code too; `override_sdpa` does not know the backend of the latter.
    """

    def __init__(self) -> None:
        self._calls: dict[tuple[Place, str], int] = {}

    def add(self, place: Place, why: str) -> None:
        self._calls[place, why] = self._calls.get((place, why), 0) + 1

    def count(self, place: Place) -> int:
        """How many calls ran there."""
        return sum(n for (where, _), n in self.items() if where == place)

    def items(self) -> list[tuple[tuple[Place, str], int]]:
        """((where, why), how many), the most frequent first. On "fastattn" why is the backend's name."""
        return sorted(self._calls.copy().items(), key=lambda item: -item[1])

    def __str__(self) -> str:
        lines = [f"scaled_dot_product_attention: {self.count('fastattn')} on fastattn, {self.count('torch')} on torch"]
        lines += [f"{n:>7}  {place}: {why}" for (place, why), n in self.items()]
        return "\n".join(lines)

    __repr__ = __str__


def selected(p: Problem, *extra: str) -> tuple[str | None, str]:
    """(None, fastattn's backend for a problem), or (why it should be torch's own, "")."""
    if delegate.calling():
        return "asked for by name: backend='sdpa'", ""
    needs = p.requirements(*extra)
    try:
        backend = backends.select("dense", needs, None).CAPABILITY.backend
    except UnsupportedError as error:
        return str(error).removeprefix("fastattn: "), ""
    if backend == backends.DELEGATE:
        return "recorded as faster on this device", ""
    if backend not in OWN_KERNELS:
        verdicts = backends.explain("dense", needs, None)
        return "; ".join(f"{v.backend}: {', '.join(v.reasons)}" for v in verdicts if v.backend in OWN_KERNELS), ""
    return None, backend
