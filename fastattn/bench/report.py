"""Results as tables on a terminal, or as plain text where there is none."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from fastattn.bench.case import Case
from fastattn.bench.compare import Comparison
from fastattn.bench.crossover import crossings
from fastattn.bench.environment import headline
from fastattn.bench.families import family_of
from fastattn.bench.results import OK, WRONG, Results, Row, geometric_means
from fastattn.bench.targets import SINGLE_CASE, Outcome

MODE_NAMES = {"fwd": "forward", "fwdbwd": "forward + backward"}

# Piped output has no width of its own; the widest table needs this much.
PLAIN_WIDTH = 130


def make_console(stderr: bool = False) -> Console:
    """A console that honours NO_COLOR and prints whole tables into pipes and files."""
    stream = sys.stderr if stderr else sys.stdout
    return Console(stderr=stderr, highlight=False, width=None if stream.isatty() else PLAIN_WIDTH)


@contextmanager
def progress_bar(console: Console) -> Iterator[Callable[[int, int, str], None]]:
    """A function to call with (done, total, what is next): a bar on a terminal, else a line now and then."""
    if not console.is_terminal:
        yield _ProgressLines(console)
        return
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=None)
        yield lambda done, total, label: bar.update(task, completed=done, total=total, description=label)


class _ProgressLines:
    """Progress for logs: the first step, then one line in `EVERY_S` seconds."""

    EVERY_S = 10.0

    def __init__(self, console: Console) -> None:
        self._console = console
        self._due = 0.0

    def __call__(self, done: int, total: int, label: str) -> None:
        if time.monotonic() >= self._due:
            self._console.print(f"{done} of {total}: {label}", markup=False)
            self._due = time.monotonic() + self.EVERY_S


def table(*columns: str, left: Sequence[str] = ()) -> Table:
    """A table in the package's one style; columns are right-aligned unless named in `left`."""
    made = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        # Only prose may wrap; numbers that do not fit must not be cut into pieces.
        prose = column in left
        made.add_column(column, justify="left" if prose else "right", no_wrap=not prose, overflow="fold")
    return made


def number(value: float | None, unit: str = "") -> str:
    """Three significant digits, without an exponent."""
    if value is None:
        return "-"
    if value >= 99.95:
        return f"{value:,.0f}{unit}"
    return f"{value:.1f}{unit}" if value >= 9.995 else f"{value:.2f}{unit}"


def size_name(size: float) -> str:
    """Bytes, in the unit that leaves a readable number."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"


def length_name(seqlen: int) -> str:
    return f"{seqlen // 1024}k" if seqlen % 1024 == 0 else str(seqlen)


def check_mark(console: Console, good: bool) -> Text:
    marks = ("yes", "NO") if console.options.ascii_only else ("✓", "✗")
    return Text(marks[0], "green") if good else Text(marks[1], "bold red")


def problem_title(problems: Sequence[Case]) -> str:
    """What the problems of one table have in common."""
    problem = problems[0]
    batches = list(dict.fromkeys(p.batch for p in problems))
    batch = f"{batches[0]} to {batches[-1]}" if len(batches) > 1 else f"{batches[0]}"
    feature = f", {problem.feature}" if problem.feature else ""
    mask = "causal" if problem.causal else "full"
    heads = str(problem.heads) if problem.heads == problem.kv_heads else f"{problem.heads}/{problem.kv_heads}"
    return (
        f"{MODE_NAMES[problem.mode]}, {problem.dtype}, {mask}, batch {batch}, heads {heads}, "
        f"head size {problem.head_dim}{feature}"
    )


def print_group(console: Console, rows: Sequence[Row]) -> None:
    """One table: the rows of one mode, dtype, mask and shape, by length; below it, why rows have no figures."""
    kernels = {r.implementation: r.kernel for r in rows if r.implementation == "fastattn" and r.kernel}
    unit = "GB/s" if rows[0].problem.bytes_read else "GFLOP/s"
    off_softmax = any(row.off_softmax is not None for row in rows)
    bases = _bases(rows)
    shown = table(
        *("length", "implementation", "ms", "p20-p80", unit, "of peak", "extra MiB", "max err", "ok"),
        *(["off softmax"] if off_softmax else []),
        *(f"vs {title}" for title in bases.values()),
        left=("implementation",),
    )
    title = problem_title([row.problem for row in rows]) + "".join(
        f" | backend {kernel}" for kernel in kernels.values()
    )
    console.print(title, style="bold")
    reasons: dict[tuple[str, str], list[str]] = {}
    for seqlen, block in groupby(rows, key=lambda row: row.problem.seqlen):
        for i, row in enumerate(block):
            label = [length_name(seqlen) if i == 0 else "", row.implementation]
            if row.status != OK:
                reason = row.reason + ("; speed-up withheld" if row.status == WRONG else "")
                # What stands in brackets differs by length; it is in the JSON.
                key = (row.implementation, f"{row.status}: {reason.partition(' (')[0]}")
                reasons.setdefault(key, []).append(length_name(seqlen))
            if row.median_ms is None:
                shown.add_row(*label, row.status, *[""] * (6 + off_softmax + len(bases)), style="dim")
            else:
                style = "bold" if row.implementation.startswith("fastattn") else None
                figures = _figures(console, row)
                if off_softmax:
                    figures.append("-" if row.off_softmax is None else f"{row.off_softmax:.3f}")
                shown.add_row(*label, *figures, *(number(row.speedup.get(base), "x") for base in bases), style=style)
    console.print(shown)
    for (name, reason), lengths in reasons.items():
        console.print(Text(f"  {name} at {', '.join(lengths)} {reason}", "dim"))
    found = crossings(rows)
    for crossing in found:
        console.print(f"  {crossing}")
    if reasons or found:
        console.print()


def _figures(console: Console, row: Row) -> list[str | Text]:
    return [
        number(row.median_ms),
        f"{number(row.p20_ms)}-{number(row.p80_ms)}",
        number(row.gflops if row.gbs is None else row.gbs),
        "-" if row.peak_fraction is None else f"{row.peak_fraction:.0%}",
        number(row.extra_mib),
        "-" if row.max_error is None else f"{row.max_error:.1e}",
        check_mark(console, row.status == OK),
    ]


def _bases(rows: Sequence[Row]) -> dict[str, str]:
    """Which of the family's baselines have a column, by its title: those that were to be measured."""
    columns = family_of(rows[0].problem).columns
    return {base: title for base, title in columns.items() if any(row.implementation == base for row in rows)}


def print_peaks(console: Console, results: Results) -> None:
    words = {"matmul": "torch.mm", "registers": "registers", "widened": "converted to float32"}
    for dtype, peak in results.peaks.items():
        parts = [f"{words[kind]} {number(rate)}" for kind, rate in peak.items() if rate]
        console.print(f"matrix-product peak, {dtype}: {', '.join(parts)} GFLOP/s", style="dim")
    if results.read_gbs:
        console.print(f"read bandwidth: {number(results.read_gbs)} GB/s", style="dim")


def print_geometric_means(console: Console, results: Results) -> None:
    """The speed-ups in one line per table above; wrong, failed and skipped rows are in none of them."""
    means = geometric_means(results.rows)
    if not means:
        return
    bases = _bases(results.rows)
    shown = table(
        *("implementation", "what"),
        *(column for title in bases.values() for column in (f"vs {title}", "lowest")),
        "lengths",
        left=("implementation", "what"),
    )
    for _, pair in groupby(means, key=lambda m: (m.implementation, m.mode, m.dtype, m.causal, m.head_dim, m.feature)):
        by_base = {mean.against: mean for mean in pair}
        first = next(iter(by_base.values()))
        what = f"{MODE_NAMES[first.mode]}, {first.dtype}, {'causal' if first.causal else 'full'}, D {first.head_dim}"
        what += f", {first.feature}" if first.feature else ""
        cells = []
        for base in bases:
            mean = by_base.get(base)
            cells += [number(mean.mean, "x"), number(mean.lowest, "x")] if mean else ["-", "-"]
        cases = "/".join(str(by_base[b].cases) for b in bases if b in by_base)
        shown.add_row(first.implementation, what, *cells, cases)
    console.print("Geometric means of the speed-ups", style="bold")
    console.print(shown)


def print_targets(console: Console, outcomes: Sequence[Outcome]) -> None:
    """Speed targets and whether this run reached them."""
    shown = table("what", "target", "", "mean", "lowest case", "cases", "met", left=("what", ""))

    def figure(value: float | None, percent: bool) -> str:
        return number(value) if value is None or not percent else f"{value:.0%}"

    for outcome in outcomes:
        measure = outcome.target.measure
        cases = f"{outcome.cases}" + (f" of {outcome.cases + outcome.unmeasured}" if outcome.unmeasured else "")
        shown.add_row(
            outcome.target.what,
            figure(outcome.target.goal, measure.percent),
            measure.name,
            figure(outcome.mean, measure.percent),
            figure(outcome.lowest, measure.percent),
            cases,
            check_mark(console, outcome.met),
        )
    console.print(f"Targets: met by the geometric mean, with every case at least {SINGLE_CASE} of it", style="bold")
    console.print(shown)


def print_comparison(console: Console, comparison: Comparison, fail_on: float) -> None:
    """Changes of fastattn's rows, worst first, and what counts as a regression."""
    for warning in comparison.warnings:
        console.print(f"warning: {warning}", style="yellow", markup=False)
    shown = table(
        *("problem", "implementation", "old ms", "new ms", "time", "to baseline", "memory", "verdict"),
        left=("problem", "implementation", "verdict"),
    )

    def share(ratio: float | None) -> str:
        return "-" if ratio is None else f"{ratio - 1:+.1%}"

    worst_first = sorted(comparison.changes, key=lambda c: (not c.verdict, -(c.to_steady or c.time or 1.0)))
    for change in worst_first:
        shown.add_row(
            change.problem.label(),
            change.implementation,
            number(change.old.median_ms),
            number(change.new.median_ms),
            share(change.time),
            share(change.to_steady),
            share(change.memory),
            change.verdict or "ok",
            style="bold red" if change.verdict else None,
        )
    console.print(shown)
    if comparison.unmatched:
        console.print(f"{comparison.unmatched} rows of fastattn are in one run only and were not compared", style="dim")
    count = len(comparison.regressions)
    console.print(f"{count} of {len(comparison.changes)} rows got worse by more than {fail_on:.1%}", style="bold")


def print_results(console: Console, results: Results) -> None:
    """Everything that a run has to say."""
    console.print(Text(headline(results.environment), "bold"))
    print_peaks(console, results)
    notes = results.settings.get("notes")
    for note in notes if isinstance(notes, list) else []:
        console.print(note, style="dim", markup=False)
    console.print(
        "ms: median of interleaved samples; extra MiB: peak above the inputs, outputs and gradients included;\n"
        "max err: against float64, relative to the largest value; ok: within 2 x (gradients 3 x) what plain PyTorch\n"
        "loses in that dtype. No speed-up is stated for a result that is not ok.",
        style="dim",
    )
    console.print()
    for group in _groups(results.rows):
        print_group(console, group)
    print_geometric_means(console, results)


def _groups(rows: Iterable[Row]) -> list[list[Row]]:
    def key(row: Row) -> tuple:
        p = row.problem
        return (p.mode, p.dtype, p.causal, p.heads, p.kv_heads, p.head_dim, p.feature)

    gathered: dict[tuple, list[Row]] = {}
    for row in rows:
        gathered.setdefault(key(row), []).append(row)
    return list(gathered.values())
