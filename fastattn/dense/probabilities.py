"""`attention_weights`: the probabilities of chosen query rows and heads, or their averages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, get_args

import torch
from torch import Tensor

from fastattn.dense import arguments as check
from fastattn.dense.api import problem_of
from fastattn.dense.op import transformed
from fastattn.dense.weights import Average, chosen_weights
from fastattn.errors import UnsupportedError

if TYPE_CHECKING:
    from fastattn.dense.arguments import Mask

Indices = slice | Sequence[int] | Tensor


def attention_weights(
    query: Tensor,
    key: Tensor,
    *,
    rows: Indices | None = None,
    heads: Indices | None = None,
    average: Average | None = None,
    attn_mask: Mask | None = None,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    query_start: int | Tensor | None = None,
    key_start: Tensor | None = None,
    key_lengths: Tensor | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    scale: float | None = None,
    lse: Tensor | None = None,
) -> Tensor:
    """The probabilities that `attention` weights values with, for looking at: the result carries no gradient.

    Only the rows and heads asked for are computed, a block at a time: time grows with the rows, not with Sq, and
    memory is that of the result and a block of a fixed size (or of one row of one head of each sequence, and its keys
    in the accumulation dtype, where that is larger).

    Args:
        query: (B, Hq, Sq, D), float32, bfloat16, float16 or float64.
        key: (B, Hkv, Sk, D), Hq a multiple of Hkv.
        rows: which queries: a slice, a sequence of integers or an integer tensor (R,), in any order, negative ones
            counted from the end. They keep their positions for causal, window, alibi_slopes and attn_mask. None: all.
        heads: which query heads, likewise.
        average: "heads" for the mean over the heads, "rows" for the mean over the rows, that is the attention each key
            receives; rows that see no key count as zeros.
        attn_mask, causal, window, query_start, key_start, key_lengths, softcap, alibi_slopes, sinks, scale: as in
            `attention`.
        lse: (B, Hq, Sq), as `attention` returned it for the same call, float32 (float64 for float64), which saves
            finding it again. That of more keys gives the probabilities among all of those.

    Returns:
        (B, H, R, Sk); averaged over heads (B, R, Sk), over rows (B, H, Sk); in query's dtype. A row sums to 1, to less
        with sinks, which take the rest; a row that sees no key is zero.

    Raises:
        TypeError, ValueError: an argument is of the wrong type, dtype, shape, device or range.
        UnsupportedError: a torch.func transform or forward-mode AD is active.
    """
    problem = problem_of(
        query,
        key,
        key,  # no value is read
        attn_mask=attn_mask,
        causal=causal,
        window=window,
        query_start=query_start,
        key_start=key_start,
        key_lengths=key_lengths,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        sinks=sinks,
        scale=scale,
    )
    chosen_rows, chosen_heads = indices("rows", rows, query.shape[2]), indices("heads", heads, query.shape[1])
    check_average(average)
    if lse is not None:
        _check_lse(lse, tuple(query.shape[:3]), query, problem.accumulate_dtype)
    if transformed():
        raise UnsupportedError("fastattn: attention_weights does not support torch.func transforms and forward-mode AD")
    problem.check_values()
    return chosen_weights(problem, chosen_rows, chosen_heads, lse, average)


def indices(name: str, value: Any, size: int) -> Sequence[int]:
    """Chosen places on an axis, checked and counted from 0."""
    if value is None:
        return range(size)
    if isinstance(value, slice):
        return range(size)[value]
    given = type(value).__name__
    if isinstance(value, Tensor):
        given = f"{value.dtype} {tuple(value.shape)}"
        integers = value.dim() == 1 and value.dtype in (torch.int32, torch.int64)
        value = value.tolist() if integers else None
    if not isinstance(value, Sequence) or not all(map(check.is_integer, value)):
        raise TypeError(f"fastattn: {name} must be a slice, a sequence of ints or a 1-D integer tensor, got {given}")
    for index in value:
        if not -size <= index < size:
            raise ValueError(f"fastattn: {name} must be between {-size} and {size - 1}, got {index}")
    return [index % size for index in value]


def check_average(value: Any) -> None:
    if value is not None and value not in get_args(Average):
        raise ValueError(f"fastattn: average must be None, 'heads' or 'rows', got {value!r}")


def _check_lse(lse: Any, shape: tuple[int, ...], query: Tensor, dtype: torch.dtype) -> None:
    check.tensor("lse", lse, 3, "(batch, heads, seqlen)")
    if lse.dtype != dtype:
        raise TypeError(f"fastattn: lse must be {dtype}, got {lse.dtype}")
    if tuple(lse.shape) != shape:
        raise ValueError(f"fastattn: lse must have shape {shape}, (B, Hq, Sq), got {tuple(lse.shape)}")
    if lse.device != query.device:
        raise ValueError(f"fastattn: lse must be on query's device {query.device}, got {lse.device}")
