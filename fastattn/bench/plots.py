"""Pictures of a run: latency, memory and throughput against length, and speed-ups case by case.

One style, readable without colour vision.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastattn.bench.case import Case
from fastattn.bench.crossover import crossings
from fastattn.bench.environment import headline
from fastattn.bench.linear.problem import MECHANISMS
from fastattn.bench.report import MODE_NAMES, length_name
from fastattn.bench.results import OK, Results, Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette (2008), which the common kinds of colour blindness can tell apart; markers differ as well.
STYLES = {
    "naive": ("#D55E00", "o"),
    "dense": ("#000000", "X"),
    "sdpa": ("#0072B2", "s"),
    "fastattn": ("#009E73", "D"),
    "original": ("#D55E00", "o"),
    "replaced": ("#009E73", "D"),
    "torch": ("#CC79A7", "^"),
    "flash": ("#E69F00", "v"),
    "performer": ("#CC79A7", "^"),
    "linear": ("#000000", "X"),
    "gla": ("#E69F00", "v"),
    "delta": ("#56B4E9", "P"),
    "retention": ("#999999", "*"),
    "linformer": ("#8C4A1F", "<"),
    "nystrom": ("#6A3D9A", ">"),
}
OTHER_STYLES = (("#CC79A7", "^"), ("#E69F00", "v"), ("#56B4E9", "P"), ("#000000", "X"), ("#999999", "*"))
OFFSET: dict[str, Any] = {"textcoords": "offset points", "va": "center"}

Value = Callable[[Row], "float | None"]
Finish = Callable[["Axes", list[Row]], None]

NAMES = {
    "naive": "naive attention",
    "sdpa": "torch SDPA",
    "flex": "compiled flex_attention",
    "dense": "fastattn, dense",
    "fastattn": "fastattn",
    "performer": "Performer",
    "linear": "linear attention",
    "gla": "GLA",
    "delta": "delta rule",
    "linformer": "Linformer",
    "nystrom": "Nystrom",
}
LINEAR_NAMES = {
    "naive": "naive (quadratic)",
    "torch": "torch, chunkwise",
    "sdpa": "torch SDPA (softmax)",
    "flash": "fastattn (softmax)",
    "fla": "flash-linear-attention",
    "fastattn": "fastattn",
}
PANELS_IN_A_ROW = 4

RC: dict[Any, Any] = {
    "figure.dpi": 130,
    "font.size": 10,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "grid.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "lines.linewidth": 1.8,
    "lines.markersize": 5.5,
    "legend.frameon": False,
    "axes.titlesize": 10.5,
}


def style_of(name: str, names: Sequence[str]) -> tuple[str, str]:
    """(colour, marker) of an implementation, stable for those that are always there."""
    kind = name.partition(":")[0]  # a mechanism of a certain width looks like that of any
    if name in STYLES or kind in MECHANISMS:
        return STYLES[kind]
    others = [n for n in names if n not in STYLES]
    return OTHER_STYLES[others.index(name) % len(OTHER_STYLES)]


def length_axis(axes: Axes, lengths: Iterable[int]) -> None:
    """Logarithmic, labelled at the lengths that were measured."""
    ticks = sorted(set(lengths))
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [length_name(n) for n in ticks])
    axes.minorticks_off()
    axes.set_xlim(ticks[0] / 1.25, ticks[-1] * 1.4)
    axes.set_xlabel("sequence length")


def plain_log_axis(axes: Axes) -> None:
    """A logarithmic vertical axis with plain numbers (0.1, 1, 10) instead of powers; also 2 and 5 where it is short."""

    def between(value: float, _: object) -> str:
        low, high = axes.get_ylim()
        return f"{value:g}" if high < 50 * low and f"{value:e}"[0] in "25" else ""

    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_minor_formatter(between)


def slope_guide(axes: Axes, slope: int, anchor: tuple[float, float], end: float) -> None:
    """A thin dashed line that grows as length**slope from `anchor`; slope 1 or 2."""
    (x, y), top = anchor, anchor[1] * (end / anchor[0]) ** slope
    axes.plot([x, end], [y, top], linestyle=(0, (4, 4)), color="#777777", linewidth=0.9, zorder=1)
    axes.annotate({1: "~L", 2: "~L²"}[slope], (end, top), color="#777777", fontsize=8, xytext=(3, 0), **OFFSET)


def new_figure(
    rows: int, columns: int, width: float | None = None, height: float | None = None
) -> tuple[Figure, list[list[Axes]]]:
    """A grid of panels, sizes in inches."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with rc_context(RC):
        # A plain figure on the file backend: no display, and nothing left behind in pyplot's global list.
        figure = Figure(figsize=(width or max(6.0, 3.7 * columns), height or 0.9 + 3.1 * rows), layout="constrained")
        FigureCanvasAgg(figure)
        panels = figure.subplots(rows, columns, squeeze=False)
    return figure, [list(row) for row in panels]


def legend(figure: Figure, lines: dict[str, Any], title: str) -> None:
    """The lines by their names: beside the picture's title, or, where they would cover it, on the right."""
    # Inches that the letters take, and each line's sample.
    needed = 0.1 * max(map(len, title.splitlines())) + sum(0.6 + 0.075 * len(name) for name in lines)
    above = needed < figure.get_figwidth()
    if not above:  # the panels keep their width
        figure.set_figwidth(figure.get_figwidth() + 0.8 + 0.075 * max(map(len, lines)))
    figure.legend(
        *(list(lines.values()), list(lines)),
        loc="outside upper right" if above else "outside right upper",
        ncols=len(lines) if above else 1,
        frameon=False,
    )


def save(figure: Figure, path: Path, title: str, facts: str) -> Path:
    """Write the picture with its title, and the hardware it was measured on below it."""
    from matplotlib import rc_context

    figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold")  # legends are on the right
    figure.supxlabel(facts, fontsize=7.5, color="#555555")
    path.parent.mkdir(parents=True, exist_ok=True)
    with rc_context(RC):
        figure.savefig(path)
    return path


def _panels(rows: Sequence[Row]) -> list[list[list[Row]]]:
    """The rows of each panel, as the panels stand: passes above each other; one after the other where that leaves holes
    or there is more than masks and dtypes to tell apart."""

    def kind(row: Row) -> tuple:
        return (row.problem.dtype, row.problem.causal, row.problem.feature)

    modes, kinds = (list(dict.fromkeys(found)) for found in ((r.problem.mode for r in rows), map(kind, rows)))
    grid = [[[r for r in rows if (r.problem.mode, kind(r)) == (mode, k)] for k in kinds] for mode in modes]
    if all(panel for line in grid for panel in line) and not any(row.problem.feature for row in rows):
        return grid
    panels = [panel for line in grid for panel in line if panel]
    return [panels[i : i + PANELS_IN_A_ROW] for i in range(0, len(panels), PANELS_IN_A_ROW)]


def _panel_title(problem: Case) -> str:
    title = f"{MODE_NAMES[problem.mode]}, {problem.dtype}, {'causal' if problem.causal else 'full'}"
    return f"{title}\n{problem.feature}" if problem.feature else title


def _draw(rows: Sequence[Row], names: Sequence[str], value: Value, ylabel: str, finish: Finish, title: str) -> Figure:
    layout = _panels(rows)
    columns = max(map(len, layout))
    figure, panels = new_figure(len(layout), columns)
    drawn: dict[str, Any] = {}
    for line, cells in zip(panels, layout, strict=True):
        for axes, panel in zip(line, [*cells, *[[]] * (columns - len(cells))], strict=True):
            if not panel:
                axes.set_visible(False)
                continue
            for name in names:
                mine = [row for row in panel if row.implementation == name and row.status == OK]
                points = [(row.problem.seqlen, v) for row in mine if (v := value(row))]
                if points:
                    colour, marker = style_of(name, names)
                    (drawn[name],) = axes.plot(*zip(*points, strict=True), color=colour, marker=marker)
            length_axis(axes, (row.problem.seqlen for row in panel))
            axes.set_title(_panel_title(panel[0].problem))
            finish(axes, panel)
        line[0].set_ylabel(ylabel)
    words = LINEAR_NAMES if rows[0].problem.family == "linear" else NAMES
    legend(figure, {words.get(name, name): line for name, line in drawn.items()}, title)
    return figure


def _growth_guides(axes: Axes, rows: list[Row], value: Value, slopes: Sequence[int]) -> None:
    lengths = sorted({row.problem.seqlen for row in rows})
    values = [v for row in rows if (v := value(row)) and row.status == OK]
    if not values:
        axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center", color="#777777")
        axes.set_yticks([])
        return
    plain_log_axis(axes)
    bottom = min(values) * 0.6
    for slope in slopes:
        slope_guide(axes, slope, (lengths[0], bottom), lengths[-1])


def _mark_missing(axes: Axes, rows: list[Row], names: Sequence[str]) -> None:
    """Crosses at the upper edge, where an implementation ran out of memory or was not run for it."""
    for row in rows:
        if row.status == "oom" or (row.status == "skipped" and "memory" in row.reason):
            colour, _ = style_of(row.implementation, names)
            axes.plot(
                row.problem.seqlen, 0.97, "x", color=colour, transform=axes.get_xaxis_transform(), markersize=9, mew=2.2
            )


def _with_lengths(rows: Sequence[Row]) -> list[Row]:
    """The rows of tables that make lines: of the many with features, those with more than two lengths, if there are."""
    lengths: dict[tuple, set[int]] = {}

    def table(row: Row) -> tuple:
        p = row.problem
        return (p.mode, p.dtype, p.causal, p.head_dim, p.feature)

    for row in rows:
        lengths.setdefault(table(row), set()).add(row.problem.seqlen)
    long = {key for key, found in lengths.items() if len(found) > 2 or not key[-1]}
    return [row for row in rows if not long or table(row) in long]


def _mark_crossings(axes: Axes, rows: list[Row], names: Sequence[str]) -> None:
    """Where what stands in for softmax attention becomes faster than it, on the length axis."""
    for crossing in crossings(rows):
        if crossing.length is not None and crossing.length > min(row.problem.seqlen for row in rows):
            name = crossing.faster if crossing.faster != "fastattn" else crossing.slower
            colour, _ = style_of(name, names)
            axes.axvline(crossing.length, color=colour, linestyle=(0, (1, 2)), linewidth=1.2)
            place = (crossing.length, 0.02)
            words = f"{round(crossing.length, -2):,.0f}"
            beside: dict[str, Any] = {"xytext": (2, 0), "textcoords": "offset points", "rotation": 90}
            axes.annotate(words, place, xycoords=axes.get_xaxis_transform(), fontsize=7.5, color=colour, **beside)


def _speedups(rows: Sequence[Row], title: str) -> Figure:
    """How many times as fast as each baseline fastattn is, one line a case."""
    figure, [[axes]] = new_figure(1, 1, width=9.0, height=1.3 + 0.27 * len(rows))
    bases = list(dict.fromkeys(base for row in rows for base in row.speedup))
    for base in bases:
        points = [(row.speedup[base], line) for line, row in enumerate(rows) if base in row.speedup]
        colour, marker = style_of(base, bases)
        name = (LINEAR_NAMES if rows[0].problem.family == "linear" else NAMES).get(base, base)
        axes.plot(*zip(*points, strict=True), color=colour, marker=marker, linestyle="none", label=name)
    axes.axvline(1.0, color="#777777", linewidth=0.9)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}x")
    axes.set_xlabel("times as fast as")
    axes.set_yticks(range(len(rows)), [_case(row) for row in rows])
    axes.invert_yaxis()
    handles, labels = axes.get_legend_handles_labels()
    legend(figure, dict(zip(labels, handles, strict=True)), title)
    return figure


def _case(row: Row) -> str:
    p = row.problem
    heads = str(p.heads) if p.heads == p.kv_heads else f"{p.heads}/{p.kv_heads}"
    kind = [MODE_NAMES[p.mode], p.dtype, "causal" if p.causal else "full", p.feature, f"H {heads}, D {p.head_dim}"]
    return f"{', '.join(filter(None, kind))}, {length_name(p.seqlen)}"


def plot_results(results: Results, directory: Path) -> list[Path]:
    """Write latency, memory and throughput pictures for every head size; returns their paths.

    A run with more than plain attention gets a picture of fastattn's speed-ups too, one with approximations of several
    widths a picture of their distance from softmax attention.
    """
    from fastattn.bench.linear.plots import approximation_rows, plot_approximation
    from fastattn.bench.sparse.plots import density_rows, plot_density

    facts = headline(results.environment).replace("\n", " | ")
    written = []
    if any(row.problem.feature for row in results.rows):
        ours = [row for row in results.rows if row.implementation == "fastattn" and row.speedup]
        if ours:
            title = "Speed-ups of fastattn"
            written.append(save(_speedups(ours, title), directory / "speedups.png", title, facts))
    widths = approximation_rows(results.rows)
    if widths:
        title = "Distance from softmax attention by width"
        written.append(save(plot_approximation(widths, title), directory / "approximation.png", title, facts))
    densities = density_rows(results.rows)
    if densities:
        title = "Time by the share of blocks kept"
        written.append(save(plot_density(densities, title), directory / "density.png", title, facts))
    lines = _with_lengths([row for row in results.rows if row.problem.lines_up and row not in widths])
    names = list(dict.fromkeys(row.implementation for row in lines))
    head_dims = list(dict.fromkeys(row.problem.head_dim for row in lines))
    for head_dim in head_dims:
        rows = [row for row in lines if row.problem.head_dim == head_dim]
        first = rows[0].problem
        shape = f"batch {first.batch}, {first.heads} heads, head size {head_dim}"
        suffix = f"_d{head_dim}" if len(head_dims) > 1 else ""

        def median(row: Row) -> float | None:
            return row.median_ms

        def memory(row: Row) -> float | None:
            return row.extra_mib

        def rate(row: Row) -> float | None:
            return row.gflops

        def finish_latency(axes: Axes, rows: list[Row]) -> None:
            _growth_guides(axes, rows, median, (1, 2))
            _mark_missing(axes, rows, names)
            _mark_crossings(axes, rows, names)

        def finish_memory(axes: Axes, rows: list[Row]) -> None:
            _growth_guides(axes, rows, memory, (1, 2))
            _mark_missing(axes, rows, names)

        def finish_rate(axes: Axes, rows: list[Row]) -> None:
            peak = results.peaks.get(rows[0].problem.dtype, {})
            best = max((rate or 0.0 for rate in peak.values()), default=0.0)
            axes.set_ylim(0, 1.12 * max([best, *(row.gflops or 0.0 for row in rows)]))
            if best:
                axes.axhline(best, color="#777777", linestyle=(0, (4, 4)), linewidth=0.9)
                place = ("axes fraction", "data")
                axes.annotate("matmul peak", (0.02, best), xycoords=place, fontsize=8, color="#777777", va="bottom")

        pictures = [
            ("latency", median, "milliseconds", finish_latency, "Latency"),
            ("memory", memory, "peak extra MiB", finish_memory, "Peak memory above the inputs"),
            ("throughput", rate, "GFLOP/s", finish_rate, "Throughput"),
        ]
        # Operations in a second say nothing where implementations do not do the same ones.
        if first.family == "linear" or any(name.partition(":")[0] in MECHANISMS for name in names):
            pictures.pop()
        for stem, value, ylabel, finish, title in pictures:
            title = f"{title}: {shape}"
            figure = _draw(rows, names, value, ylabel, finish, title)
            written.append(save(figure, directory / f"{stem}{suffix}.png", title, facts))
    return written
