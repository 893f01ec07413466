"""What the low-rank approximations of softmax attention share: their checks and the meaning of a mask."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from fastattn.dense import arguments as check
from fastattn.dense.problem import LSE_DTYPE


def positive(name: str, value: Any) -> int:
    if not check.is_integer(value):
        raise TypeError(f"fastattn: {name} must be an int, got {type(value).__name__}")
    if value < 1:
        raise ValueError(f"fastattn: {name} must be at least 1, got {value}")
    return value


def sequence_mask(name: str, mask: Any, like: Tensor) -> None:
    """Check a bool mask (B, N) of the positions of a (B, H, N, D) tensor; None is all of them."""
    if mask is None:
        return
    shape = (like.shape[0], like.shape[2])
    check.tensor(name, mask, 2, str(shape))
    if mask.dtype != torch.bool:
        raise TypeError(f"fastattn: {name} must be bool (True takes part), got {mask.dtype}")
    if mask.shape != shape:
        raise ValueError(f"fastattn: {name} must have shape {shape}, got {tuple(mask.shape)}")
    if mask.device != like.device:
        raise ValueError(f"fastattn: {name} must be on query's device {like.device}, got {mask.device}")


def inputs(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    key_mask: Tensor | None = None,
    scale: float | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value as autocast has them, these arguments checked as `attention` checks its own."""
    for name, t in (("query", query), ("key", key), ("value", value)):
        check.tensor(name, t, 4, "(batch, heads, seqlen, head_dim)")
    query, key, value = check.autocast(query, key, value)
    check.qkv(query, key, value)
    sequence_mask("key_mask", key_mask, key)
    if scale is not None:
        check.number("scale", scale)
    check.backend(backend)
    return query, key, value


def without_masked(x: Tensor, mask: Tensor | None) -> Tensor:
    """x (B, H, N, D) with 0 where the mask (B, N) is False, whatever stood there."""
    return x if mask is None else x.masked_fill(~mask[:, None, :, None], 0)


def accumulable(x: Tensor) -> Tensor:
    """x in the dtype that sums of its elements are kept in: float32, float64 for float64."""
    return x.to(LSE_DTYPE.get(x.dtype, torch.float32))


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """A scope in which matrix products keep their inputs' dtype."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


def causal_error(method: str, parts: str) -> ValueError:
    """What a module that offers causal attention raises where it is asked for together with such a method."""
    return ValueError(
        f"fastattn: causal must be False with {method} attention, got True: its {parts} mix earlier positions with "
        "later ones, so every result would see the future"
    )
