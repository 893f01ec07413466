"""Digests that say which source a kernel was built from.

A digest covers the kernel's source, all project files that it includes, and the compiler flags, so a recorded
verification stays valid through edits of comments and blank space and ends with any other change. Standard library
only: the native build runs this file as a script before the package is importable.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import re
import tokenize
from collections.abc import Iterable
from pathlib import Path

_C_TOKEN = re.compile(r"//(?:\\\n|[^\n])*|/\*.*?\*/|\"(?:\\.|[^\"\\])*\"|'(?:\\.|[^'\\])*'", re.DOTALL)
_C_INCLUDE = re.compile(r"^\s*#\s*include\s*\"([^\"]+)\"", re.MULTILINE)


def strip_c(source: str) -> str:
    """C, C++ or CUDA source without comments, with runs of blank space made one blank and empty lines dropped."""
    text = _C_TOKEN.sub(lambda m: " " if m.group().startswith("/") else m.group(), source)
    lines = (" ".join(line.split()) for line in text.splitlines())
    return "\n".join(line for line in lines if line)


def strip_python(source: str) -> str:
    """Python source as its tokens, without comments and blank lines; indentation and strings count."""
    skipped = {tokenize.COMMENT, tokenize.NL}
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    kept = (
        f"{tokenize.tok_name[t.type]} {'' if t.type in (tokenize.INDENT, tokenize.NEWLINE) else t.string}"
        for t in tokens
        if t.type not in skipped
    )
    return "\n".join(kept)


def digest(files: Iterable[Path], flags: str = "") -> str:
    """SHA-256 (hexadecimal) of the files' code, in the order given, and the flags. File names do not count."""
    sha = hashlib.sha256()
    for path in files:
        source = path.read_text(encoding="utf-8")
        code = strip_python(source) if path.suffix == ".py" else strip_c(source)
        sha.update(code.encode() + b"\0")
    sha.update(" ".join(flags.split()).encode())
    return sha.hexdigest()


def with_includes(entry: Path) -> list[Path]:
    """The file and everything it includes by `#include "..."`, each once, in the order of first inclusion."""
    found: dict[Path, None] = {}

    def visit(path: Path) -> None:
        path = path.resolve()
        if path in found:
            return
        found[path] = None
        for name in _C_INCLUDE.findall(strip_c(path.read_text(encoding="utf-8"))):
            visit(path.parent / name)

    visit(entry)
    return list(found)


def _write_header(header: Path, compiler: str, entry: Path, builds: list[str]) -> None:
    """Writes build_info.h for csrc/bindings.cpp. Each build is "name=flags"."""
    files = with_includes(entry)
    rows, flag_text = [], []
    for build in builds:
        name, _, flags = build.partition("=")
        rows.append(f'    {{"{name}", "{digest(files, flags)}"}},')
        flag_text.append(f"{name}: {' '.join(flags.split())}")
    text = "\n".join(
        [
            "#pragma once",
            "struct KernelDigest { const char *isa, *digest; };",
            f'inline constexpr char kCompiler[] = "{compiler}";',
            f'inline constexpr char kFlags[] = "{"; ".join(flag_text)}";',
            "inline constexpr KernelDigest kDigests[] = {",
            *rows,
            "};",
            "",
        ]
    )
    header.parent.mkdir(parents=True, exist_ok=True)
    header.write_text(text, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description="Write build_info.h with the digest of each build of a kernel source.")
    parser.add_argument("--header", type=Path, required=True)
    parser.add_argument("--compiler", required=True)
    parser.add_argument("--entry", type=Path, required=True)
    parser.add_argument("builds", nargs="+", metavar="NAME=FLAGS")
    arguments = parser.parse_args()
    _write_header(arguments.header, arguments.compiler, arguments.entry, arguments.builds)


if __name__ == "__main__":
    main()
