"""The picture of a profile: memory and time against length, log-log."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastattn.bench.environment import headline
from fastattn.bench.memory import MIB
from fastattn.bench.plots import NAMES, legend, length_axis, new_figure, plain_log_axis, save, slope_guide, style_of
from fastattn.bench.profile import Profile
from fastattn.bench.profile_report import title_of
from fastattn.bench.report import size_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from fastattn.bench.point import Figures


def plot_profile(profile: Profile, path: Path) -> Path:
    """Total memory with the fits, the machine's memory and a cross where memory ran out; beside it the time."""
    figure, [[memory, time]] = new_figure(1, 2, width=11.4, height=4.8)
    _curves(memory, profile, lambda f: f.total / MIB, "MiB: parameters, inputs and peak")
    _curves(time, profile, lambda f: f.median_ms, "milliseconds per step", linestyle="-", linewidth=0.7)
    lengths = sorted({point.subject.seqlen for point in profile.points})
    for name in profile.implementations:
        colour, _ = style_of(name, profile.implementations)
        for growth in profile.growth:
            if growth.implementation == name:
                curve = [(n, growth.fit.at(n) / MIB) for n in lengths]
                memory.plot(*zip(*curve, strict=True), color=colour, linewidth=1.4)
        for point in profile.points:
            if point.subject.implementation == name and point.status == "oom":
                memory.plot(point.subject.seqlen, profile.capacity / MIB, "x", color=colour, markersize=9, mew=2.2)
    memory.axhline(profile.capacity / MIB, color="#777777", linewidth=0.9)
    words = f"memory of the machine, {size_name(profile.capacity)}"
    memory.annotate(words, (lengths[0], profile.capacity / MIB), fontsize=8, color="#777777", va="bottom")
    what, shape = title_of(profile).split(", ", 1)
    title = f"Memory and time: {what}\n{shape}"
    handles, labels = memory.get_legend_handles_labels()
    if handles:
        legend(figure, dict(zip(labels, handles, strict=True)), title)
    return save(figure, path, title, headline(profile.environment))


def _curves(axes: Axes, profile: Profile, value: Callable[[Figures], float | None], ylabel: str, **line: Any) -> None:
    lengths = sorted({point.subject.seqlen for point in profile.points})
    drawn: list[float] = []
    for name in profile.implementations:
        colour, marker = style_of(name, profile.implementations)
        mine = [p for p in profile.points if p.subject.implementation == name and p.figures]
        measured = [(p.subject.seqlen, v) for p in mine if p.figures and (v := value(p.figures))]
        if measured:
            drawn += [v for _, v in measured]
            label = NAMES.get(name, name)
            axes.plot(
                *zip(*measured, strict=True), color=colour, marker=marker, label=label, **({"linestyle": ""} | line)
            )
    length_axis(axes, lengths)
    plain_log_axis(axes)
    if drawn and len(lengths) > 1:
        for slope in (1, 2):
            slope_guide(axes, slope, (lengths[0], min(drawn) * 0.7), lengths[-1])
    axes.set_ylabel(ylabel)
