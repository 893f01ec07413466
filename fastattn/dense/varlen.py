"""`attention_varlen`: sequences of different lengths packed one after another, without padding."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, Unpack, overload

import torch
from torch import Tensor

from fastattn.dense import arguments as check
from fastattn.dense.api import normalise
from fastattn.dense.arguments import Options
from fastattn.dense.op import attention_op

if TYPE_CHECKING:
    from fastattn.dense.arguments import Mask


@overload
def attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    return_lse: Literal[False] = False,
    **options: Unpack[Options],
) -> Tensor: ...
@overload
def attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    return_lse: Literal[True],
    **options: Unpack[Options],
) -> tuple[Tensor, Tensor]: ...
def attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    attn_mask: Mask | None = None,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    query_start: int | Tensor | None = None,
    key_start: Tensor | None = None,
    key_lengths: Tensor | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    scale: float | None = None,
    return_lse: bool = False,
    deterministic: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`attention` within each of B packed sequences; the options mean what they mean there, sequence by sequence.

    Args:
        query: (total_q, Hq, D), sequence b in rows cu_seqlens_q[b] to cu_seqlens_q[b + 1].
        key: (total_k, Hkv, D), likewise by cu_seqlens_k.
        value: (total_k, Hkv, Dv).
        cu_seqlens_q, cu_seqlens_k: (B + 1,) int32, starting at 0 and not decreasing.
        max_seqlen_q, max_seqlen_k: longest sequence on either side, or more.
        attn_mask: broadcastable to (B, Hq, max_seqlen_q, max_seqlen_k), or a BlockMask.

    Returns:
        out (total_q, Hq, Dv), or (out, lse) with lse (Hq, total_q). Rows past the last sequence are 0, their LSE -inf.

    Raises:
        TypeError, ValueError, UnsupportedError: as `attention`.
    """
    for name, t in (("query", query), ("key", key), ("value", value)):
        check.tensor(name, t, 3, "(total, heads, head_dim)")
    query, key, value = check.autocast(query, key, value)
    check.qkv(query, key, value)
    for name, cu in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        check.tensor(name, cu, 1, "(B + 1,)")
        if cu.dtype != torch.int32:
            raise TypeError(f"fastattn: {name} must be int32, got {cu.dtype}")
        if cu.device != query.device:
            raise ValueError(f"fastattn: {name} must be on query's device {query.device}, got {cu.device}")
    if cu_seqlens_q.shape != cu_seqlens_k.shape or cu_seqlens_q.shape[0] < 1:
        raise ValueError(
            "fastattn: cu_seqlens_q and cu_seqlens_k must both have shape (B + 1,), got "
            f"{tuple(cu_seqlens_q.shape)} and {tuple(cu_seqlens_k.shape)}"
        )
    for name, longest in (("max_seqlen_q", max_seqlen_q), ("max_seqlen_k", max_seqlen_k)):
        if not check.is_integer(longest):
            raise TypeError(f"fastattn: {name} must be an int, got {type(longest).__name__}")
        if longest < 0:
            raise ValueError(f"fastattn: {name} must not be negative, got {longest}")
    options: Options = {
        "attn_mask": attn_mask,
        "causal": causal,
        "window": window,
        "query_start": query_start,
        "key_start": key_start,
        "key_lengths": key_lengths,
        "softcap": softcap,
        "alibi_slopes": alibi_slopes,
        "sinks": sinks,
        "dropout_p": dropout_p,
        "scale": scale,
        "deterministic": deterministic,
        "backend": backend,
    }
    check.flag("return_lse", return_lse)
    problem = normalise(
        query.transpose(0, 1)[None],
        key.transpose(0, 1)[None],
        value.transpose(0, 1)[None],
        (cu_seqlens_q.shape[0] - 1, query.shape[1], max_seqlen_q, max_seqlen_k),
        cu_seqlens_q=cu_seqlens_q.contiguous(),
        cu_seqlens_k=cu_seqlens_k.contiguous(),
        **options,
    )
    out, lse = attention_op(problem)
    out = out[0].transpose(0, 1)
    return (out, lse[0]) if return_lse else out
