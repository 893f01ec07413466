"""`Preset`: a named set of cases and the figures that they are to reach."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastattn.bench.case import Case
from fastattn.bench.targets import Target


@dataclass(frozen=True)
class Preset:
    """Problems and the time they get.

    `implementations` are measured instead of the default, those in `subjects` on some of the problems only.
    `environment` is what the process must have been started with. A memory profile and the targets follow the tables.
    """

    problems: Callable[[], Sequence[Case]]
    time_limit_s: float
    what: str
    profile_seqlens: tuple[int, ...] = ()
    implementations: tuple[str, ...] = ()
    subjects: Mapping[str, Callable[[Any], bool]] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    targets: tuple[Target, ...] = ()
