"""How the memory of attention grows with the sequence: measured point by point, fitted and extrapolated."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from fastattn.bench.environment import Environment, environment, headline, total_memory
from fastattn.bench.fit import Fit, fit_growth
from fastattn.bench.memory import MIB, available_memory
from fastattn.bench.plots import NAMES, length_axis, new_figure, plain_log_axis, save, slope_guide, style_of
from fastattn.bench.point import Measurer, Phases, PointError, Subject
from fastattn.bench.report import length_name, number, size_name, table

if TYPE_CHECKING:
    from rich.console import Console

SCHEMA = "fastattn.profile/1"

WHAT = {
    "op": "attention call, forward + backward",
    "layer": "multi-head attention layer, forward + backward",
    "lm": "language model, forward + backward",
}


@dataclass(frozen=True)
class Point:
    """One implementation at one length: figures, or the reason why there are none."""

    subject: Subject
    phases: Phases | None = None
    status: str = "ok"
    reason: str = ""


@dataclass(frozen=True)
class Growth:
    """The fitted total memory of one implementation and what it implies; `longest` is None where nothing grows."""

    implementation: str
    fit: Fit
    dominant: str
    longest: int | None


@dataclass(frozen=True)
class MemoryProfile:
    environment: Environment
    capacity: int  # bytes of memory that the machine or the GPU has
    points: tuple[Point, ...]
    growth: tuple[Growth, ...]

    def write_json(self, path: Path) -> None:
        document = {"schema": SCHEMA, **asdict(self)}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(document, indent=1) + "\n")


def profile_memory(
    subject: Subject,
    seqlens: Sequence[int],
    implementations: Sequence[str],
    progress: Callable[[int, int, str], None] = lambda done, total, label: None,
) -> MemoryProfile:
    """Measure every implementation at every length, each in a fresh process, shortest first.

    Once an implementation has run out of memory it is not tried at longer lengths.
    """
    device = torch.device(subject.device)
    capacity = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else total_memory()
    # A tenth is left to everything else on the machine.
    limit = subject.memory_limit or int(0.9 * available_memory(device))
    points: list[Point] = []
    exhausted: set[str] = set()
    plan = [(seqlen, name) for seqlen in sorted(seqlens) for name in implementations]
    with Measurer() as measurer:
        for done, (seqlen, name) in enumerate(plan):
            progress(done, len(plan), f"{name} at {length_name(seqlen)}")
            at = replace(subject, seqlen=seqlen, implementation=name, memory_limit=limit)
            if name in exhausted:
                points.append(Point(at, status="skipped", reason="ran out of memory at a shorter length"))
                continue
            try:
                points.append(Point(at, measurer.measure(at)))
            except PointError as error:
                points.append(Point(at, status=error.status, reason=str(error)))
                if error.status == "oom":
                    exhausted.add(name)
    progress(len(plan), len(plan), "done")
    growth = tuple(g for name in implementations if (g := _growth(name, points, capacity)))
    return MemoryProfile(environment(device), capacity, tuple(points), growth)


def _growth(name: str, points: Sequence[Point], capacity: int) -> Growth | None:
    measured = [(p.subject.seqlen, p.phases.total) for p in points if p.subject.implementation == name and p.phases]
    # Three coefficients through three points would fit anything.
    if len(measured) < 4:
        return None
    lengths, sizes = zip(*measured, strict=True)
    fit = fit_growth(lengths, sizes)
    return Growth(name, fit, fit.dominant(max(lengths)), fit.longest(capacity))


def title_of(subject: Subject) -> str:
    mask = "causal" if subject.causal or subject.what == "lm" else "full"
    size = f"batch {subject.batch}, {subject.heads} heads, head size {subject.head_dim}"
    layers = f", {subject.layers} layers" if subject.what == "lm" else ""
    return f"{WHAT[subject.what]}, {subject.dtype}, {mask}, {size}{layers}"


def print_profile(console: Console, profile: MemoryProfile) -> None:
    """The table by phase, then what the fit says."""
    console.print(headline(profile.environment), style="bold")
    console.print(
        "MiB. forward, kept, backward and resident are peaks above parameters and inputs; backward includes what the\n"
        "forward kept. Torch's allocations, and the process's resident size; every line in a fresh process.",
        style="dim",
    )
    console.print()
    subject = profile.points[0].subject
    resident = any(point.phases and point.phases.resident_peak is not None for point in profile.points)
    columns = ["length", "implementation", "parameters", "inputs", "forward", "kept", "backward", "peak"]
    shown = table(*columns, *(["resident"] if resident else []), left=("implementation",))
    previous = None
    for point in profile.points:
        length = length_name(point.subject.seqlen) if point.subject.seqlen != previous else ""
        previous = point.subject.seqlen
        name, phases = point.subject.implementation, point.phases
        if phases is None:
            shown.add_row(length, name, point.status, *[""] * (5 + resident), style="dim")
            continue
        figures = (
            *(phases.parameters, phases.inputs, phases.forward_peak, phases.kept_for_backward, phases.backward_peak),
            phases.peak,
            *([phases.resident_peak] if resident else []),
        )
        style = "bold" if name == "fastattn" else None
        shown.add_row(length, name, *(number(None if f is None else f / MIB) for f in figures), style=style)
    console.print(f"Memory: {title_of(subject)}", style="bold")
    console.print(shown)
    for point in profile.points:
        if point.phases is None:
            where = f"{point.subject.implementation} at {length_name(point.subject.seqlen)}"
            console.print(f"  {where} {point.status}: {point.reason}", style="dim", markup=False)
    _print_growth(console, profile)


def _print_growth(console: Console, profile: MemoryProfile) -> None:
    if not profile.growth:
        console.print("A fit needs at least four measured lengths.", style="dim")
        return
    capacity = size_name(profile.capacity)
    shown = table(
        *("implementation", "a", "b per token", "c per token²", "residual", "dominant", f"fits {capacity} up to"),
        left=("implementation", "dominant"),
    )
    for g in profile.growth:
        shown.add_row(
            g.implementation,
            size_name(g.fit.constant),
            f"{g.fit.linear / 1024:.2f} KiB",
            f"{g.fit.quadratic:.2f} B",
            f"{g.fit.residual:.1%}",
            g.dominant,
            "any length" if g.longest is None else f"{g.longest:,} tokens",
            style="bold" if g.implementation == "fastattn" else None,
        )
    console.print("Total memory fitted as a + b L + c L² (non-negative least squares)", style="bold")
    console.print(shown)


def plot_profile(profile: MemoryProfile, path: Path) -> Path:
    """Peak memory against length, log-log, with the fits, the machine's memory and a cross where memory ran out."""
    names = list(dict.fromkeys(point.subject.implementation for point in profile.points))
    figure, [[axes]] = new_figure(1, 1, width=7.6, height=5.0)
    lengths = sorted({point.subject.seqlen for point in profile.points})
    drawn: list[float] = []
    for name in names:
        colour, marker = style_of(name, names)
        mine = [point for point in profile.points if point.subject.implementation == name]
        measured = [(p.subject.seqlen, p.phases.total / MIB) for p in mine if p.phases]
        if measured:
            drawn += [size for _, size in measured]
            label = NAMES.get(name, name)
            axes.plot(*zip(*measured, strict=True), color=colour, marker=marker, linestyle="", label=label)
        for growth in profile.growth:
            if growth.implementation == name:
                curve = [(n, growth.fit.at(n) / MIB) for n in lengths]
                axes.plot(*zip(*curve, strict=True), color=colour, linewidth=1.4)
        for point in mine:
            if point.status in ("oom", "skipped"):
                axes.plot(point.subject.seqlen, profile.capacity / MIB, "x", color=colour, markersize=9, mew=2.2)
    length_axis(axes, lengths)
    plain_log_axis(axes)
    axes.axhline(profile.capacity / MIB, color="#777777", linewidth=0.9)
    axes.annotate(
        f"memory of the machine, {size_name(profile.capacity)}",
        (lengths[0], profile.capacity / MIB),
        fontsize=8,
        color="#777777",
        va="bottom",
    )
    if drawn and len(lengths) > 1:
        for slope in (1, 2):
            slope_guide(axes, slope, (lengths[0], min(drawn) * 0.7), lengths[-1])
    axes.set_ylabel("MiB: parameters, inputs and peak")
    axes.legend(loc="upper left", bbox_to_anchor=(0.0, 0.92))
    subject = profile.points[0].subject
    what, shape = title_of(subject).split(", ", 1)
    return save(figure, path, f"Peak memory: {what}\n{shape}", headline(profile.environment))
