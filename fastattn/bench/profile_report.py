"""A profile in words: the same tables for the terminal and for the page, and the files that hold them."""

from __future__ import annotations

import io
import shlex
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from textwrap import indent
from typing import TYPE_CHECKING

from rich.console import Console

from fastattn.bench.environment import headline
from fastattn.bench.memory import MIB
from fastattn.bench.point import kind_of
from fastattn.bench.profile import Point, Profile, file_stem
from fastattn.bench.report import PLAIN_WIDTH, length_name, number, size_name, table
from fastattn.bench.subject import Shape

if TYPE_CHECKING:
    from fastattn.bench.point import Figures

OURS = ("fastattn", "replaced", "activated", "overridden")


@dataclass
class Sheet:
    """A table: its title, what its figures are, and rows of cells with "bold", "dim" or "" for a style."""

    title: str
    columns: tuple[str, ...]
    left: tuple[str, ...]  # columns of words
    about: str = ""
    rows: list[tuple[str, tuple[str, ...]]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def title_of(profile: Profile) -> str:
    subject = profile.points[0].subject
    return kind_of(subject.what).title(subject)


def command_of(profile: Profile) -> str:
    """The command that measures the same again."""
    subject = profile.points[0].subject
    lengths = ",".join(str(n) for n in dict.fromkeys(point.subject.seqlen for point in profile.points))
    words = ["fastattn", "profile", "--model", subject.what, "--seqlen", lengths]
    words += ["--impl", ",".join(profile.implementations), "--mode", subject.mode, "--device", subject.device]
    for name, value in asdict(subject.shape).items():
        if value != getattr(Shape(), name):
            words += ["--full"] if name == "causal" else [f"--{name.replace('_', '-')}", str(value)]
    if subject.time_limit is not None:
        words += ["--time-limit", f"{subject.time_limit:g}"]
    return shlex.join(words)


def subject_lines(profile: Profile) -> list[str]:
    """What ran, and what each implementation changed in it; that nothing was changed is said as plainly."""
    lines: list[str] = []
    for name, found in profile.inspections.items():
        if not lines:
            dtypes = f" {', '.join(found.dtypes)}" if found.dtypes else ""
            inputs = ", ".join(found.inputs)
            lines.append(
                f"{found.name}: {found.parameters:,}{dtypes} parameters, inputs {inputs} at the shortest length"
            )
        if found.changed is not None:
            nothing = "CHANGES NOTHING in this model. " if found.changed == 0 else ""
            lines.append(f"{name}: {nothing}{indent(found.report, '  ').lstrip()}")
    return lines


def summary(profile: Profile) -> list[str]:
    """For each implementation, what it makes of the baseline at the longest length that both ran."""
    base, *others = profile.implementations
    lines = []
    for name in others:
        found = profile.inspections.get(name)
        if found is not None and found.changed == 0:
            lines.append(f"{name}: changes nothing in this model")
            continue
        mine = [(p, profile.ratio(p)) for p in profile.points if p.subject.implementation == name]
        both = [(point, ratio) for point, ratio in mine if ratio.memory]
        if not both:
            lines.append(f"{name}: no length at which both it and {base} ran")
            continue
        point, ratio = both[-1]
        time = f" and {number(ratio.time, 'x')} as fast" if ratio.time else ""
        share = 1 / (ratio.memory or 1)
        where = length_name(point.subject.seqlen)
        lines.append(f"{name} at {where}: {share:.0%} of the memory of {base}{time}")
    return lines


def _mib(size: int | None) -> str:
    return number(None if size is None else size / MIB)


def _rows(profile: Profile, sheet: Sheet, cells: Callable[[Point, Figures], tuple[str, ...]]) -> Sheet:
    """Add a row for each point, the length only where it changes; none for what was not measured for being the same."""
    previous = None
    unchanged = [name for name, found in profile.inspections.items() if found.changed == 0]
    for point in profile.points:
        if point.figures is None and point.subject.implementation in unchanged:
            continue
        length = length_name(point.subject.seqlen) if point.subject.seqlen != previous else ""
        previous, name = point.subject.seqlen, point.subject.implementation
        if point.figures is None:
            sheet.rows.append(("dim", (length, name, point.status, *[""] * (len(sheet.columns) - 3))))
        else:
            style = "bold" if name in OURS else ""
            sheet.rows.append((style, (length, name, *cells(point, point.figures))))
    return sheet


def memory_sheet(profile: Profile) -> Sheet:
    figures = [point.figures for point in profile.points if point.figures]
    shown: dict[str, Callable[[Figures], int | None]] = {
        "parameters": lambda f: f.parameters,
        "inputs": lambda f: f.inputs,
        "forward": lambda f: f.forward_peak,
        "kept": lambda f: f.kept,
        "backward": lambda f: f.backward_peak,
        "peak": lambda f: f.peak,
        "resident": lambda f: f.resident_peak,
    }
    optional = {"backward", "resident"}
    shown = {
        name: get for name, get in shown.items() if name not in optional or any(get(f) is not None for f in figures)
    }
    sheet = Sheet(
        f"Memory: {title_of(profile)}",
        ("length", "implementation", *shown),
        ("implementation",),
        about="MiB. forward, kept, backward and resident are peaks above parameters and inputs; backward includes what "
        "the\nforward kept. Torch's allocations, and the process's resident size; every line in a fresh process.",
    )
    _rows(profile, sheet, lambda _, f: tuple(_mib(get(f)) for get in shown.values()))
    missing: dict[tuple[str, str], list[str]] = {}
    for point in profile.points:
        if point.figures is None:
            key = point.subject.implementation, f"{point.status}: {point.reason}"
            missing.setdefault(key, []).append(length_name(point.subject.seqlen))
    sheet.notes = [f"{name} at {', '.join(lengths)} {reason}" for (name, reason), lengths in missing.items()]
    return sheet


def comparison_sheet(profile: Profile) -> Sheet:
    base = profile.implementations[0]
    sheet = Sheet(
        f"Time of a step and total memory, beside {base}",
        ("length", "implementation", "ms", "p20-p80", "samples", "total MiB", "speed-up", "memory ratio"),
        ("implementation",),
        about="ms: median. Each line in its own process, one after the other, in changing order; not interleaved, as\n"
        "`fastattn bench` does it: read small differences as noise. total: parameters, inputs and peak.\n"
        f"Ratios: {base} over this line.",
    )

    def cells(point: Point, f: Figures) -> tuple[str, ...]:
        ratio = profile.ratio(point)
        spread = f"{number(f.p20_ms)}-{number(f.p80_ms)}" if f.samples else "-"
        compared = ["" if point.subject.implementation == base else number(r, "x") for r in (ratio.time, ratio.memory)]
        return number(f.median_ms), spread, str(f.samples), _mib(f.total), *compared

    return _rows(profile, sheet, cells)


def growth_sheet(profile: Profile) -> Sheet:
    sheet = Sheet(
        "Total memory fitted as a + b L + c L² (non-negative least squares)",
        (
            *("implementation", "a", "b per token", "c per token²", "residual", "dominant"),
            f"fits {size_name(profile.capacity)} up to",
        ),
        ("implementation", "dominant"),
    )
    for g in profile.growth:
        cells = (
            *(
                g.implementation,
                size_name(g.fit.constant),
                f"{g.fit.linear / 1024:.2f} KiB",
                f"{g.fit.quadratic:.2f} B",
            ),
            *(f"{g.fit.residual:.1%}", g.dominant),
            "any length" if g.longest is None else f"{g.longest:,} tokens",
        )
        sheet.rows.append(("bold" if g.implementation in OURS else "", cells))
    if not profile.growth:
        sheet.notes.append("A fit needs at least four measured lengths.")
    return sheet


def sheets(profile: Profile) -> list[Sheet]:
    return [memory_sheet(profile), comparison_sheet(profile), growth_sheet(profile)]


def print_profile(console: Console, profile: Profile) -> None:
    """What ran, the tables, then in a line each what came of it."""

    def say(text: str, style: str = "") -> None:
        console.print(text, style=style, markup=False, soft_wrap=True)

    say(headline(profile.environment), "bold")
    for line in subject_lines(profile):
        say(line)
    for sheet in sheets(profile):
        console.print()
        say(sheet.title, "bold")
        if sheet.about and sheet.rows:
            say(sheet.about, "dim")
        if sheet.rows:
            shown = table(*sheet.columns, left=sheet.left)
            for style, cells in sheet.rows:
                shown.add_row(*cells, style=style or None)
            console.print(shown)
        for note in sheet.notes:
            say(f"  {note}", "dim")
    for line in summary(profile):
        say(line, "bold")
    for name, path in profile.snapshots.items():
        say(f"allocations of {name}: {path}", "dim")
    if profile.interrupted:
        say("interrupted: this is what was measured until then", "bold")


def as_text(profile: Profile) -> str:
    text = io.StringIO()
    print_profile(Console(file=text, width=PLAIN_WIDTH, highlight=False), profile)
    return text.getvalue()


def write_files(profile: Profile, directory: Path) -> list[Path]:
    """The JSON, the picture and the page, named after the subject."""
    from fastattn.bench.profile_html import write_page
    from fastattn.bench.profile_plot import plot_profile

    stem = directory / file_stem(profile.points[0].subject.what)
    profile.write_json(stem.with_suffix(".json"))
    picture = plot_profile(profile, stem.with_suffix(".png"))
    return [stem.with_suffix(".json"), picture, write_page(profile, picture, stem.with_suffix(".html"))]
