"""How memory and time grow with the sequence: measured point by point, fitted and extrapolated."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from fastattn.bench.case import MODES, default_device
from fastattn.bench.environment import Environment, environment, total_memory
from fastattn.bench.fit import Fit, fit_growth
from fastattn.bench.memory import available_memory
from fastattn.bench.model import reference_of
from fastattn.bench.point import Figures, Inspection, Measurer, PointError, kind_of
from fastattn.bench.subject import Subject

SCHEMA = "fastattn.profile/2"

Progress = Callable[[int, int, str], None]  # points done, points in all, what comes next


@dataclass(frozen=True)
class Point:
    """One implementation at one length: figures, or the reason why there are none."""

    subject: Subject
    figures: Figures | None = None
    status: str = "ok"  # or "oom", "timeout", "failed", "skipped"
    reason: str = ""


@dataclass(frozen=True)
class Growth:
    """The fitted total memory of one implementation and what it implies; `longest` is None where nothing grows."""

    implementation: str
    fit: Fit
    dominant: str
    longest: int | None


@dataclass(frozen=True)
class Ratio:
    """How many times the baseline's memory and time are a point's; None where either was not measured."""

    memory: float | None
    time: float | None


@dataclass(frozen=True)
class Profile:
    """What was measured, by length and in the order of the implementations, whose first is the baseline.

    `print` shows its tables; `write` makes files of it.
    """

    environment: Environment
    capacity: int  # bytes of memory that the machine or the GPU has
    inspections: dict[str, Inspection]  # by implementation; those that did not run have none
    points: tuple[Point, ...]
    growth: tuple[Growth, ...]
    snapshots: dict[str, str]  # by implementation: the file with the CUDA allocations of its longest step
    interrupted: bool

    @property
    def implementations(self) -> list[str]:
        return list(dict.fromkeys(point.subject.implementation for point in self.points))

    def ratio(self, point: Point) -> Ratio:
        """The baseline at the same length beside `point`: above 1 where the point needs less."""
        base = next(p for p in self.points if p.subject.seqlen == point.subject.seqlen).figures
        mine = point.figures
        if base is None or mine is None:
            return Ratio(None, None)
        time = base.median_ms / mine.median_ms if base.median_ms and mine.median_ms else None
        return Ratio(base.total / mine.total, time)

    def write_json(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".part")  # what was there before stays whole until this is
        unfinished.write_text(json.dumps({"schema": SCHEMA, **asdict(self)}, indent=1) + "\n")
        unfinished.replace(path)

    def write(self, directory: str | Path) -> list[Path]:
        """Write the JSON, a picture of memory and time, and a page with everything; returns the paths.

        Raises:
            ModuleNotFoundError: rich or matplotlib is missing (pip install 'fastattn[cli]').
        """
        from fastattn.bench.profile_report import write_files

        return write_files(self, Path(directory))

    def __str__(self) -> str:
        from fastattn.bench.profile_report import as_text

        return as_text(self)


def run_profile(
    subject: Subject,
    seqlens: Sequence[int],
    implementations: Sequence[str],
    progress: Progress = lambda done, total, label: None,
    out: Path | None = None,
) -> Profile:
    """Measure every implementation at every length, each in a fresh process, shortest first.

    The implementations take turns in going first. One that has run out of memory or of time is not tried at longer
    lengths. Ctrl-C ends the measuring: what is there is returned. With `out` the JSON is written after each point, and
    on CUDA, at the end, the allocations of each implementation's longest step.

    Raises:
        ValueError: the factory of a user's model does not keep its contract, or no implementation runs at all.
    """
    device, lengths = torch.device(subject.device), sorted(set(seqlens))
    run = _Run(
        replace(
            subject,
            warm_up=kind_of(subject.what).warm_up or lengths[0],
            # A tenth is left to everything else on the machine.
            memory_limit=subject.memory_limit or int(0.9 * available_memory(device)),
        ),
        lengths,
        list(dict.fromkeys(implementations)),
        progress,
        out and out / f"{file_stem(subject.what)}.json",
    )
    try:
        with Measurer() as measurer:
            run.inspect(measurer)
            run.measure(measurer)
            if out and device.type == "cuda":
                run.take_snapshots(measurer, out)
    except KeyboardInterrupt:
        if not any(point.figures for point in run.points.values()):
            raise
        run.interrupted = True
    return run.save()


class _Run:
    """A profile in the making."""

    def __init__(
        self, subject: Subject, lengths: list[int], names: list[str], progress: Progress, path: Path | None
    ) -> None:
        self._subject, self._lengths, self._names, self._path = subject, lengths, names, path
        self._environment = environment(torch.device(subject.device))
        self._steps = len(names) * (1 + len(lengths))
        self._done, self._progress = 0, progress
        self._given_up: dict[str, tuple[str, str]] = {}  # (status, reason) for all lengths that are still to come
        self.inspections: dict[str, Inspection] = {}
        self.points: dict[tuple[int, str], Point] = {}
        self.snapshots: dict[str, str] = {}
        self.interrupted = False

    def _at(self, seqlen: int, name: str) -> Subject:
        return replace(self._subject, seqlen=seqlen, implementation=name)

    def _next(self, label: str) -> None:
        self._progress(self._done, self._steps, label)
        self._done += 1

    def inspect(self, measurer: Measurer) -> None:
        """One step of every implementation at the shortest length: mistakes are known before minutes of measuring."""
        for name in self._names:
            self._next(f"{name}: a first step")
            try:
                self.inspections[name] = measurer.inspect(self._at(self._lengths[0], name))
            except PointError as error:
                if error.status == "refused":
                    raise ValueError(str(error)) from None
                self._given_up[name] = error.status, str(error)
                continue
            base = self.inspections.get(self._names[0])
            if self.inspections[name].changed == 0 and name != self._names[0] and base and not base.changed:
                self._given_up[name] = "skipped", f"it changes nothing in this model, so it is {self._names[0]} again"
        failed = [reason for status, reason in self._given_up.values() if status == "failed"]
        if len(failed) == len(self._names):
            raise ValueError(f"{self._subject.what} at length {self._lengths[0]}: {failed[0]}")

    def measure(self, measurer: Measurer) -> None:
        for i, seqlen in enumerate(self._lengths):
            for name in self._names[:: -1 if i % 2 else 1]:
                self._next(f"{name} at {seqlen}")
                at = self._at(seqlen, name)
                if name in self._given_up:
                    status, reason = self._given_up[name]
                    self.points[seqlen, name] = Point(at, None, status, reason)
                    continue
                try:
                    self.points[seqlen, name] = Point(at, measurer.measure(at))
                except PointError as error:
                    self.points[seqlen, name] = Point(at, None, error.status, str(error))
                    if error.status in ("oom", "timeout"):
                        words = {"oom": "ran out of memory", "timeout": "exceeded the time limit"}
                        self._given_up[name] = "skipped", f"{words[error.status]} at a shorter length"
                if self._path:
                    self.save()
        self._progress(self._steps, self._steps, "done")

    def take_snapshots(self, measurer: Measurer, out: Path) -> None:
        for name in self._names:
            measured = [p.subject for p in self.points.values() if p.figures and p.subject.implementation == name]
            if measured:
                path = out / f"{file_stem(self._subject.what)}_{name}.pickle"
                try:
                    measurer.snapshot(max(measured, key=lambda s: s.seqlen), path)
                    self.snapshots[name] = str(path)
                except PointError as error:
                    self.snapshots[name] = f"none: {error}"

    def save(self) -> Profile:
        """The profile as far as it has come, written where the caller asked for that."""
        device = torch.device(self._subject.device)
        capacity = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else total_memory()
        points = tuple(
            self.points.get((seqlen, name)) or Point(self._at(seqlen, name), None, "skipped", "not reached")
            for seqlen in self._lengths
            for name in self._names
        )
        profile = Profile(
            self._environment,
            capacity,
            self.inspections,
            points,
            tuple(g for name in self._names if (g := _growth(name, points, capacity))),
            self.snapshots,
            self.interrupted,
        )
        if self._path:
            profile.write_json(self._path)
        return profile


def _growth(name: str, points: Sequence[Point], capacity: int) -> Growth | None:
    measured = [(p.subject.seqlen, p.figures.total) for p in points if p.subject.implementation == name and p.figures]
    # Three coefficients through three points would fit anything.
    if len(measured) < 4:
        return None
    lengths, sizes = zip(*measured, strict=True)
    fit = fit_growth(lengths, sizes)
    return Growth(name, fit, fit.dominant(max(lengths)), fit.longest(capacity))


def file_stem(what: str) -> str:
    """The name, without a suffix, of the files about a subject."""
    where, _, name = what.rpartition(":")
    stem = f"{Path(where).stem if where.endswith('.py') else where}_{name}" if where else name
    return "profile_" + "".join(c if c.isalnum() else "_" for c in stem)


def profile_model(
    factory: str | Callable[[int], Any],
    seqlens: Sequence[int],
    *,
    implementations: Sequence[str] = ("original", "replaced", "activated"),
    mode: str = "fwdbwd",
    device: str | torch.device | None = None,
    time_limit: float | None = None,
    memory_limit: int | None = None,
    out: str | Path | None = None,
    progress: Progress = lambda done, total, label: None,
) -> Profile:
    """Memory and time of your model against sequence length, before and after fastattn.

    Every point runs in a fresh process, in which the factory builds the model anew.

    Args:
        factory: `factory(seqlen) -> (model, inputs)`: a `torch.nn.Module` and, for that length, a tensor, a tuple of
            arguments or a dict of keyword arguments. A function of a module or of a script, not of a session, or its
            name: "module:function" or "file.py:function", both as seen from the current directory. A script that calls
            `profile_model` does so under `if __name__ == "__main__":`.
        seqlens: the lengths; a fit needs four.
        implementations: the first is the baseline. "original" is the model as it was built; "replaced" after
            `fastattn.replace_attention`; "activated" within `fastattn.activated`, "overridden" within
            `fastattn.override_sdpa`.
        mode: "fwdbwd", a training step: forward, and backward from the output's `loss` (attribute or key), or from the
            sum of its first floating-point tensor; or "fwd", inference.
        device: "cpu" or "cuda", where model and inputs are moved to; default: the GPU where there is one.
        time_limit: seconds for each point, the building of the model included; one that takes longer is a row that
            says so.
        memory_limit: bytes for each point; default: nine tenths of what is free. CPU only.
        out: a folder for JSON (kept up to date point by point), a picture, a page with everything and, on CUDA,
            snapshots of the allocations.
        progress: called with (points done, points in all, what comes next).

    Returns:
        A `Profile`; print it, or read its `points`, `growth` and `ratio(point)`.

    Raises:
        TypeError, ValueError: an argument is wrong, or the factory does not keep its contract.
        ModuleNotFoundError: with `out`, where rich or matplotlib is missing (pip install 'fastattn[cli]').
    """
    what = reference_of(factory)
    known = kind_of(what).implementations
    if not implementations or set(implementations) - set(known) or isinstance(implementations, str):
        raise ValueError(f"fastattn: implementations must be some of {', '.join(known)}, got {implementations!r}")
    if mode not in MODES:
        raise ValueError(f"fastattn: mode must be one of {', '.join(MODES)}, got {mode!r}")
    if not seqlens or not all(isinstance(n, int) and n > 0 for n in seqlens):
        raise ValueError(f"fastattn: seqlens must be positive ints, got {seqlens!r}")
    for name, limit in (("time_limit", time_limit), ("memory_limit", memory_limit)):
        if limit is not None and not limit > 0:
            raise ValueError(f"fastattn: {name} must be positive, got {limit!r}")
    where = default_device() if device is None else torch.device(device)
    if where.type not in ("cpu", "cuda"):
        raise ValueError(f"fastattn: device must be cpu or cuda, got {device!r}")
    subject = Subject(
        what,
        implementations[0],
        min(seqlens),
        mode=mode,
        device=where.type,
        time_limit=time_limit,
        memory_limit=memory_limit,
    )
    if out is None:
        return run_profile(subject, seqlens, implementations, progress)
    for needed in ("rich", "matplotlib"):  # should be known before minutes of measuring
        importlib.import_module(needed)
    profile = run_profile(subject, seqlens, implementations, progress, Path(out))
    profile.write(out)
    return profile
