"""The compiled module `fastattn._native`, loaded at first use, and why it is missing where it is."""

from __future__ import annotations

from functools import cache
from types import ModuleType


@cache
def load() -> tuple[ModuleType | None, str | None]:
    """(module, None), or (None, the reason why there is none)."""
    try:
        from fastattn import _native
    except ImportError as error:
        return None, f"the C++ extension fastattn._native is not available ({error}); reinstall with a C++ compiler"
    return _native, None


def unavailable() -> str | None:
    return load()[1]


def native() -> ModuleType:
    module, reason = load()
    if module is None:
        raise ImportError(f"fastattn: {reason}")
    return module
