"""A profile as one page that needs nothing else: no script, no network, the picture within."""

from __future__ import annotations

import base64
from html import escape
from pathlib import Path

from fastattn.bench.environment import headline
from fastattn.bench.profile import Profile
from fastattn.bench.profile_report import Sheet, command_of, sheets, subject_lines, summary, title_of

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .15rem .6rem; text-align: right; white-space: nowrap; } .word { text-align: left; }
th { border-bottom: 1px solid #999; font-weight: 600; } .first td { border-top: 1px solid #e4e4e4; }
.bold { font-weight: 600; } .dim, .about { color: #666; } .about { font-size: .9rem; max-width: 50rem; }
pre { background: #f5f5f5; padding: .6rem .8rem; overflow-x: auto; white-space: pre-wrap; }
.wide { overflow-x: auto; } img { max-width: 100%; }
"""


def write_page(profile: Profile, picture: Path, path: Path) -> Path:
    """Write the page; `picture` is a PNG, which becomes part of it."""
    title = f"fastattn profile: {title_of(profile)}"
    image = base64.b64encode(picture.read_bytes()).decode()
    found = summary(profile)
    if profile.interrupted:
        found = [*found, "Interrupted: this is what was measured until then."]
    parts = [
        f"<h1>{escape(title)}</h1>",
        _pre([headline(profile.environment)]),
        *(["<ul>", *(f"<li>{escape(line)}</li>" for line in found), "</ul>"] if found else []),
        f'<p><img alt="Memory and time against length; the figures are in the tables" '
        f'src="data:image/png;base64,{image}"></p>',
        "<h2>What ran, and what was changed in it</h2>",
        _pre(subject_lines(profile)),
        *(_section(sheet) for sheet in sheets(profile)),
        "<h2>To measure it again</h2>",
        _pre([command_of(profile)]),
    ]
    if profile.snapshots:
        parts += ["<h2>Allocations</h2>", _pre([f"{name}: {file}" for name, file in profile.snapshots.items()])]
    head = f'<head><meta charset="utf-8"><title>{escape(title)}</title><style>{STYLE}</style></head>'
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        "\n".join(["<!DOCTYPE html>", f'<html lang="en">{head}<body>', *parts, "</body></html>\n"]), encoding="utf-8"
    )
    return path


def _pre(lines: list[str]) -> str:
    return f"<pre>{escape(chr(10).join(lines))}</pre>"


def _section(sheet: Sheet) -> str:
    words = [column in sheet.left for column in sheet.columns]

    def cells(tag: str, values: tuple[str, ...]) -> str:
        classes = [' class="word"' if word else "" for word in words]
        return "".join(f"<{tag}{c}>{escape(v)}</{tag}>" for c, v in zip(classes, values, strict=True))

    lines = [f"<h2>{escape(sheet.title)}</h2>"]
    if sheet.rows:
        lines.append(f'<p class="about">{escape(sheet.about)}</p>' if sheet.about else "")
        lines.append(f'<div class="wide"><table><thead><tr>{cells("th", sheet.columns)}</tr></thead><tbody>')
        for style, values in sheet.rows:
            classes = " ".join(filter(None, (style, "first" if values[0] else "")))
            lines.append(f'<tr class="{classes}">{cells("td", values)}</tr>')
        lines.append("</tbody></table></div>")
    lines += [f'<p class="dim">{escape(note)}</p>' for note in sheet.notes]
    return "\n".join(filter(None, lines))
