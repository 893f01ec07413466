"""The picture of approximations: distance from softmax attention, and time, by width."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fastattn.bench.plots import NAMES, OFFSET, legend, new_figure, plain_log_axis, style_of
from fastattn.bench.results import OK, Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FEWEST_WIDTHS = 3


def approximation_rows(rows: Sequence[Row]) -> list[Row]:
    """The rows of problems on which some mechanism was measured in several widths."""
    widths: dict[tuple, set[str]] = {}
    for row in rows:
        name, _, width = row.implementation.partition(":")
        if width and row.off_softmax is not None:
            widths.setdefault((row.problem, name), set()).add(width)
    problems = {problem for (problem, _), found in widths.items() if len(found) >= FEWEST_WIDTHS}
    return [row for row in rows if row.problem in problems]


def plot_approximation(rows: Sequence[Row], title: str) -> Figure:
    """A column for each kind of data: above, the distance, with that of the mean of the values, which looks at neither
    queries nor keys; below, the time, with that of softmax attention."""
    problems = list(dict.fromkeys(row.problem for row in rows))
    figure, panels = new_figure(2, len(problems), height=7.4)
    drawn: dict[str, Any] = {}
    for column, problem in enumerate(problems):
        mine = [row for row in rows if row.problem == problem and row.status == OK]
        above, below = panels[0][column], panels[1][column]
        lines: dict[str, list[tuple[int, Row]]] = {}
        for row in mine:
            name, _, width = row.implementation.partition(":")
            if width and row.off_softmax is not None:
                lines.setdefault(name, []).append((int(width), row))
        for name, found in lines.items():
            colour, marker = style_of(name, list(lines))
            widths = [width for width, _ in found]
            for axes, field in ((below, "median_ms"), (above, "off_softmax")):
                values = [getattr(row, field) for _, row in found]
                (drawn[name],) = axes.plot(widths, values, color=colour, marker=marker)
        by_name = {row.implementation: row for row in mine}
        _level(above, by_name.get("mean"), "off_softmax", "the mean of the values")
        _level(below, by_name.get("fastattn"), "median_ms", "softmax attention, fastattn")
        above.set_title(f"{problem.data} queries and keys, head size {problem.head_dim}")
        for axes in (above, below):
            axes.set_xscale("log", base=2)
            ticks = sorted({width for found in lines.values() for width, _ in found})
            axes.set_xticks(ticks, [str(n) for n in ticks], fontsize=8)
            axes.minorticks_off()
            plain_log_axis(axes)
        below.set_xlabel("features, keys or landmarks")
    panels[0][0].set_ylabel("|out - softmax attention| / |softmax attention|")
    panels[1][0].set_ylabel("milliseconds")
    legend(figure, {NAMES.get(name, name): line for name, line in drawn.items()}, title)
    return figure


def _level(axes: Axes, row: Row | None, field: str, words: str) -> None:
    """A dashed line at what needs no width, with its name."""
    level = None if row is None else getattr(row, field)
    if level:
        axes.axhline(level, color="#777777", linestyle=(0, (4, 4)), linewidth=1.1)
        place = ("axes fraction", "data")
        axes.annotate(words, (0.02, level), xycoords=place, xytext=(0, 6), fontsize=8, color="#555555", **OFFSET)
