"""Values that users type on the command line."""

from __future__ import annotations

import re
from collections.abc import Sequence

from fastattn.bench.case import DTYPES

SHORT_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "fp64": "float64"}


def parse_length(text: str) -> int:
    """`512`, `2k` (2048) or `1m` (1048576)."""
    match = re.fullmatch(r"(\d+)([km]?)", text.strip().lower())
    if not match or int(match.group(1)) == 0:
        raise ValueError(f"not a length: {text!r} (write 512, 2k or 1m)")
    return int(match.group(1)) * {"": 1, "k": 1024, "m": 1024**2}[match.group(2)]


def parse_lengths(text: str) -> list[int]:
    """Comma-separated lengths, and doublings from..to: `512,1k` or `512..8k`; ascending, without repetition."""
    lengths: set[int] = set()
    for part in text.split(","):
        first, dots, last = part.partition("..")
        low = parse_length(first)
        high = parse_length(last) if dots else low
        if high < low:
            raise ValueError(f"not a range of lengths: {part!r} runs backwards")
        while low <= high:
            lengths.add(low)
            low *= 2
    return sorted(lengths)


def parse_integers(text: str, what: str) -> list[int]:
    """Comma-separated positive integers."""
    try:
        values = [int(part) for part in text.split(",")]
    except ValueError:
        values = []
    if not values or min(values) < 1:
        raise ValueError(f"{what}: expected positive integers separated by commas, got {text!r}")
    return values


def parse_names(text: str, what: str, known: Sequence[str]) -> list[str]:
    """Comma-separated names out of `known`."""
    names = [part.strip() for part in text.split(",") if part.strip()]
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        raise ValueError(f"{what}: no {', '.join(unknown) or 'names given'}; there are {', '.join(known)}")
    return names


def parse_dtypes(text: str) -> list[str]:
    """Comma-separated dtypes, by torch's names or as fp32, bf16, fp16, fp64."""
    names = [SHORT_DTYPES.get(part.strip(), part.strip()) for part in text.split(",") if part.strip()]
    return parse_names(",".join(names), "dtype", tuple(DTYPES))


def parse_fraction(text: str) -> float:
    """`5%` or `0.05`."""
    try:
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise ValueError(f"expected a share such as 5% or 0.05, got {text!r}")
    return value


def parse_window(text: str) -> tuple[int | None, int | None]:
    """`left,right`, each a number of keys or `none` for no limit."""
    parts = [part.strip().lower() for part in text.split(",")]
    if len(parts) != 2 or not all(part == "none" or part.isdigit() for part in parts):
        raise ValueError(f"window: expected LEFT,RIGHT such as 255,0 or none,0, got {text!r}")
    left, right = (None if part == "none" else int(part) for part in parts)
    return left, right
