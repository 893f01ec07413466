"""Uninitialised memory that shows: a launcher that forgets to write an element returns NaN instead of a lucky zero."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

_ALLOCATORS: tuple[tuple[Any, str], ...] = (
    (torch, "empty"),
    (torch, "empty_like"),
    (torch, "empty_strided"),
    (Tensor, "new_empty"),
    (Tensor, "new_empty_strided"),
)


def _poison(tensor: Tensor) -> Tensor:
    if tensor.device.type == "meta" or torch.compiler.is_compiling():
        return tensor
    with torch.no_grad():
        if tensor.is_floating_point():
            tensor.fill_(float("nan"))
        elif tensor.dtype == torch.bool:
            tensor.fill_(True)
        elif not tensor.is_complex():
            tensor.fill_(torch.iinfo(tensor.dtype).max)
    return tensor


def _poisoning(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(allocate)
    def poisoned(*args: Any, **kwargs: Any) -> Tensor:
        return _poison(allocate(*args, **kwargs))

    return poisoned


@contextmanager
def poisoned_allocations() -> Iterator[None]:
    """Within it, torch's functions that return uninitialised memory return NaN (the largest integer, True)."""
    originals = [getattr(owner, name) for owner, name in _ALLOCATORS]
    for (owner, name), original in zip(_ALLOCATORS, originals, strict=True):
        setattr(owner, name, _poisoning(original))
    try:
        yield
    finally:
        for (owner, name), original in zip(_ALLOCATORS, originals, strict=True):
            setattr(owner, name, original)
