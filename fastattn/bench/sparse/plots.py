"""The picture of sparse attention: time by the share of blocks that are kept, beside the dense kernel's."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from fastattn.bench.plots import NAMES, legend, new_figure, plain_log_axis, style_of
from fastattn.bench.report import MODE_NAMES
from fastattn.bench.results import OK, Row

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FEWEST = 3


def density_rows(rows: Sequence[Row]) -> list[Row]:
    """The rows of problems of one kind that were measured at several densities."""
    found: dict[tuple, set[float]] = {}
    for row in rows:
        density = getattr(row.problem, "density", None)
        if density is not None:
            found.setdefault(_kind(row), set()).add(density)
    return [row for row in rows if len(found.get(_kind(row), ())) >= FEWEST]


def _kind(row: Row) -> tuple:
    p = row.problem
    return p.mode, p.dtype, p.seqlen, p.head_dim, getattr(p, "pattern", None)


def plot_density(rows: Sequence[Row], title: str) -> Figure:
    """A panel for each pass and dtype. Dashed: the dense kernel's time times the density, which is all that skipping
    blocks can save; the vertical line is where skipping begins to pay."""
    kinds = list(dict.fromkeys(_kind(row) for row in rows))
    figure, [panels] = new_figure(1, len(kinds), height=4.2)
    names = list(dict.fromkeys(row.implementation for row in rows))
    drawn: dict[str, Any] = {}
    for axes, kind in zip(panels, kinds, strict=True):
        mine = [row for row in rows if _kind(row) == kind and row.status == OK and row.median_ms]
        lines: dict[str, list[tuple[float, float]]] = {}
        for row in mine:
            lines.setdefault(row.implementation, []).append((100 * row.problem.density, row.median_ms))  # type: ignore[attr-defined, arg-type]
        for name, points in lines.items():
            colour, marker = style_of(name, names)
            (drawn[name],) = axes.plot(*zip(*sorted(points), strict=True), color=colour, marker=marker)
        dense = dict(lines.get("dense", []))
        if dense:
            ideal = sorted((density, time * density / 100) for density, time in dense.items())
            style: dict[str, Any] = {"linestyle": (0, (4, 4)), "color": "#777777", "linewidth": 0.9, "zorder": 1}
            (drawn["density x dense"],) = axes.plot(*zip(*ideal, strict=True), **style)
        level = _crossing(sorted(lines.get("fastattn", [])), dense)
        if level is not None:
            axes.axvline(level, color="#777777", linestyle=(0, (1, 2)), linewidth=1.2)
            axes.annotate(f"{level:.0f} %", (level, 0.03), xycoords=axes.get_xaxis_transform(), fontsize=8, ha="right")
        axes.set_xscale("log")
        ticks = sorted({density for points in lines.values() for density, _ in points})
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
        plain_log_axis(axes)
        axes.set_xlabel("blocks kept, %")
        axes.set_title(f"{MODE_NAMES[kind[0]]}, {kind[1]}, {kind[2] // 1024}k")
    panels[0].set_ylabel("milliseconds")
    words = {**NAMES, "sdpa": "torch SDPA, given the mask"}
    legend(figure, {words.get(name, name): line for name, line in drawn.items()}, title)
    return figure


def _crossing(ours: Sequence[tuple[float, float]], dense: dict[float, float]) -> float | None:
    """The density from which on the dense kernel is faster, by interpolation; None where it never is."""
    gains = [(density, dense[density] / time) for density, time in ours if density in dense]
    for (low, before), (high, after) in pairwise(gains):
        if before > 1 >= after:
            return low + (high - low) * (before - 1) / (before - after)
    return None
