"""flash-attn's arguments in fastattn's terms, and what only flash-attn has: packed tensors, packed queries on pages of
keys, S_dmask.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, TypedDict

import torch
from torch import Tensor

from fastattn.dense import arguments as check
from fastattn.dense.api import normalise
from fastattn.dense.arguments import Options
from fastattn.dense.philox import draw_rng, dropout_keep
from fastattn.dense.problem import check_pages
from fastattn.dense.weights import attention_weights


class Scoring(TypedDict):
    """What every function takes, under the names of `fastattn.attention`."""

    causal: bool
    window: tuple[int | None, int | None]
    softcap: float | None
    alibi_slopes: Tensor | None
    scale: float | None


def scoring(
    softmax_scale: float | None, causal: bool, window_size: Sequence[int], softcap: float, alibi_slopes: Tensor | None
) -> Scoring:
    if not isinstance(window_size, tuple | list) or len(window_size) != 2:
        raise TypeError(f"fastattn: window_size must be a pair (left, right) of ints, got {window_size!r}")
    left, right = (integer("window_size", side, "a pair (left, right) of ints") for side in window_size)
    cap = check.number("softcap", softcap)
    return {
        "causal": check.flag("causal", causal),
        "window": (None if left < 0 else left, None if right < 0 else right),
        "softcap": cap if cap > 0 else None,
        "alibi_slopes": alibi_slopes,
        "scale": None if softmax_scale is None else check.number("softmax_scale", softmax_scale),
    }


def integer(name: str, value: Any, expected: str = "an int") -> int:
    """An int, or the value of a tensor () of integers, which flash-attn's binding reads too."""
    if isinstance(value, Tensor) and value.dim() == 0 and not value.is_floating_point():
        return int(value)
    if not check.is_integer(value):
        raise TypeError(f"fastattn: {name} must be {expected}, got {value!r}")
    return value


def unpacked(name: str, packed: Tensor, parts: int, layout: str) -> tuple[Tensor, ...]:
    """Views of the parts of a packed tensor; their gradients come back in one."""
    check.tensor(name, packed, layout.count(",") + 1, layout)
    if packed.shape[-3] != parts:
        raise ValueError(f"fastattn: {name} must have shape {layout}, got {tuple(packed.shape)}")
    return packed.unbind(-3)


def values_are_checked(like: Tensor) -> bool:
    """Where fastattn checks the values in index tensors: elsewhere reading them would wait for the device."""
    on_cpu = like.device.type == "cpu" or os.environ.get("FASTATTN_CHECK") == "1"
    return on_cpu and not torch.compiler.is_compiling()


def lengths(name: str, cu_seqlens: Tensor, like: Tensor) -> Tensor:
    """The lengths (batch,) of packed sequences."""
    check.tensor(name, cu_seqlens, 1, "(batch + 1,)")
    if cu_seqlens.dtype != torch.int32:
        raise TypeError(f"fastattn: {name} must be int32, got {cu_seqlens.dtype}")
    if cu_seqlens.device != like.device:
        raise ValueError(f"fastattn: {name} must be on q's device {like.device}, got {cu_seqlens.device}")
    return cu_seqlens.diff()


def from_pages(
    k: Tensor, v: Tensor, block_table: Tensor, lengths_k: Tensor, max_seqlen_k: int
) -> tuple[Tensor, Tensor, Tensor, int]:
    """(k, v, cu_seqlens_k, capacity): copies (batch * capacity, nheads_k, headdim) of the pages of each sequence.

    capacity is max_seqlen_k in whole pages; sequence b fills lengths_k[b] of its own.
    """
    for name, t in (("k", k), ("v", v)):
        check.tensor(name, t, 4, "(pages, page_size, nheads_k, headdim), because there is a block_table")
        if 0 in t.shape[:2]:
            raise ValueError(f"fastattn: {name} must have at least one page of at least one key, got {tuple(t.shape)}")
    batch = lengths_k.shape[0]
    check.tensor("block_table", block_table, 2, f"({batch}, pages per sequence)")
    if block_table.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"fastattn: block_table must be int32 or int64, got {block_table.dtype}")
    if block_table.shape[0] != batch:
        raise ValueError(
            f"fastattn: block_table must have a row for each of {batch} sequences, got {tuple(block_table.shape)}"
        )
    if block_table.device != k.device:
        raise ValueError(f"fastattn: block_table must be on k's device {k.device}, got {block_table.device}")
    if k.shape[:3] != v.shape[:3]:
        raise ValueError(f"fastattn: k and v must agree in all but headdim, got {tuple(k.shape)} and {tuple(v.shape)}")
    if max_seqlen_k < 0:
        raise ValueError(f"fastattn: max_seqlen_k must not be negative, got {max_seqlen_k}")
    pages, page_size = k.shape[:2]
    table = block_table[:, : -(-max_seqlen_k // page_size)]
    capacity = page_size * table.shape[1]
    if values_are_checked(k):
        held = lengths_k.tolist()
        if max(held, default=0) > min(capacity, max_seqlen_k):
            raise ValueError(
                "fastattn: block_table and max_seqlen_k must have room for the longest sequence of cu_seqlens_k, "
                f"{max(held)} keys, got {min(capacity, max_seqlen_k)}"
            )
        check_pages(table, held, page_size, pages)
    used = table.clamp(0, pages - 1).flatten()  # entries that no key uses may be anything
    k, v = (t.index_select(0, used).flatten(0, 1) for t in (k, v))
    return k, v, torch.arange(batch + 1, dtype=torch.int32, device=k.device) * capacity, capacity


def check_rotary(positions: Tensor, rotary_cos: Tensor) -> None:
    """Raise ValueError where a query's position (batch, seqlen_q) has no row in the table."""
    if values_are_checked(positions) and positions.numel() and int(positions.max()) >= rotary_cos.shape[0]:
        raise ValueError(
            f"fastattn: rotary_cos must have a row for each position of the queries, up to {int(positions.max())}, got "
            f"{tuple(rotary_cos.shape)}"
        )


def coming_rng(device: torch.device) -> Tensor:
    """The [seed, offset] that the next call with dropout on this device will draw."""
    with torch.random.fork_rng([] if device.type == "cpu" else [device], device_type=device.type):
        return draw_rng(device)


@torch.no_grad()
def dropout_pattern(
    query: Tensor, key: Tensor, value: Tensor, lse: Tensor, rng: Tensor, options: Options, sequence: int = 0
) -> Tensor:
    """The softmax (B, Hq, Sq, Sk) of a problem with this LSE, negative where this rng drops it.

    `sequence` is the place of a problem of batch size 1 among packed ones.
    """
    shape = (*query.shape[:3], key.shape[2])
    kept = dropout_keep(rng, options["dropout_p"], shape, sequence)
    slopes = options["alibi_slopes"]
    if slopes is not None and slopes.dim() == 2:
        slopes = slopes[sequence : sequence + query.shape[0]]
    whole: Options = {**options, "dropout_p": 0.0, "alibi_slopes": slopes}
    softmax = attention_weights(normalise(query, key, value, shape, **whole), lse, average=False)
    return torch.where(kept, softmax, -softmax)
