"""The public functions of dense attention: validate, normalise to a `Problem`, call the op."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, Unpack, overload

import torch
from torch import Tensor

from fastattn import backends
from fastattn.dense import arguments as check
from fastattn.dense.arguments import Options
from fastattn.dense.op import attention_op
from fastattn.dense.philox import draw_rng
from fastattn.dense.problem import LSE_DTYPE, Problem, default_scale

if TYPE_CHECKING:
    from fastattn.dense.arguments import Mask


@overload
def attention(
    query: Tensor, key: Tensor, value: Tensor, *, return_lse: Literal[False] = False, **options: Unpack[Options]
) -> Tensor: ...
@overload
def attention(
    query: Tensor, key: Tensor, value: Tensor, *, return_lse: Literal[True], **options: Unpack[Options]
) -> tuple[Tensor, Tensor]: ...
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
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
    r"""Softmax attention without the attention matrix: softmax(scale * query @ key^T + bias) @ value.

    Query i stands at key position p = i + query_start and sees the keys j that satisfy all of: key_start[b] <= j <
    key_lengths[b]; j <= p if causal; p - left <= j <= p + right for window = (left, right); attn_mask keeps j. With the
    default query_start = Sk - Sq the last query stands at the last key (bottom-right alignment)::

        causal, Sq = 2, Sk = 5        causal, Sq = 5, Sk = 2
            1 1 1 1 0                     0 0
            1 1 1 1 1                     0 0
                                          0 0
                                          1 0
                                          1 1

    A row that sees no key gives 0, an LSE of -inf (or its sink) and no gradient.

    Args:
        query: (B, Hq, Sq, D), float32, bfloat16, float16 or float64, any strides; a transposed (B, S, H, D) tensor
            costs nothing.
        key: (B, Hkv, Sk, D), Hq a multiple of Hkv (grouped-query attention).
        value: (B, Hkv, Sk, Dv).
        attn_mask: broadcastable to (B, Hq, Sq, Sk): bool (True keeps the key) or float in query's dtype or float32
            (added to the scores; -inf masks the key; differentiable). Or a `BlockMask` for (B or 1, Hq or 1, Sq, Sk),
            whose left-out blocks cost nothing; flex_attention's is converted once. Or a pair (BlockMask, tensor): both
            apply.
        causal: keys after the query's position are not seen.
        window: (left, right) keys around the position, both ends included; None leaves a side unlimited.
        query_start: key position of the first query, an int or an integer tensor (B,).
        key_start: (B,) integers; keys before it do not exist (left padding).
        key_lengths: (B,) integers; keys from it on do not exist (right padding, caches).
        softcap: scores become softcap * tanh(scores / softcap) (Gemma 2), before biases and masks.
        alibi_slopes: (Hq,) or (B, Hq); slope * |p - j| is subtracted (Press et al., ALiBi). No gradient.
        sinks: (Hq,) logits of a key without a value, one per head (GPT-OSS). Differentiable.
        dropout_p: probability of dropping an attention weight; drawn from torch's generator, always applied when > 0.
        scale: factor on query @ key^T; default 1 / sqrt(D).
        return_lse: also return the natural-log sum of exponentials of each row.
        deterministic: bit-identical repeats; also implied by torch.use_deterministic_algorithms.
        backend: the backend to use, by name; None takes the first that supports the call, or PyTorch's own attention
            ("sdpa") where the hardware ledger records that as faster on this device: `explain` says which.

    Returns:
        out (B, Hq, Sq, Dv) over (B, Sq, Hq, Dv) memory, or (out, lse) with lse (B, Hq, Sq) float32 (float64 for
        float64), differentiable.

    Raises:
        TypeError, ValueError: an argument is of the wrong type, dtype, shape, device or range.
        UnsupportedError: the named backend cannot run this call.
    """
    check.flag("return_lse", return_lse)
    problem = problem_of(
        query,
        key,
        value,
        attn_mask=attn_mask,
        causal=causal,
        window=window,
        query_start=query_start,
        key_start=key_start,
        key_lengths=key_lengths,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        sinks=sinks,
        dropout_p=dropout_p,
        scale=scale,
        deterministic=deterministic,
        backend=backend,
    )
    out, lse = attention_op(problem, return_lse)
    return (out, lse) if return_lse else out


def problem_of(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Problem:
    """The `Problem` of a call of `attention`, its arguments checked."""
    for name, t in (("query", query), ("key", key), ("value", value)):
        check.tensor(name, t, 4, "(batch, heads, seqlen, head_dim)")
    query, key, value = check.autocast(query, key, value)
    check.qkv(query, key, value)
    shape = (query.shape[0], query.shape[1], query.shape[2], key.shape[2])
    return normalise(query, key, value, shape, **options)


def normalise(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    shape: tuple[int, int, int, int],
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
    deterministic: bool = False,
    backend: str | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    block_table: Tensor | None = None,
) -> Problem:
    """The `Problem` of a call whose query, key and value are checked; shape is (sequences, Hq, max Sq, max Sk)."""
    batch, heads = shape[:2]
    mask, lists = check.attn_mask(attn_mask, shape, query, backend)
    mask_rows, mask_row_blocks, mask_columns, mask_column_blocks, mask_tiles = lists or (None,) * 5
    accumulate = LSE_DTYPE.get(query.dtype, torch.float32)
    left, right = check.window(window, check.flag("causal", causal))
    offset, starts = check.query_start(query_start, batch, query)
    probability = check.dropout(dropout_p)
    return Problem(
        query=query,
        key=key,
        value=value,
        attn_mask=mask,
        sinks=check.sinks(sinks, heads, query, accumulate),
        alibi_slopes=check.alibi_slopes(alibi_slopes, batch, heads, query, accumulate),
        query_start=starts,
        key_start=check.per_sequence("key_start", key_start, batch, query),
        key_lengths=check.per_sequence("key_lengths", key_lengths, batch, query),
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        block_table=block_table,
        mask_rows=mask_rows,
        mask_row_blocks=mask_row_blocks,
        mask_columns=mask_columns,
        mask_column_blocks=mask_column_blocks,
        mask_tiles=mask_tiles,
        max_seqlen_q=shape[2],
        max_seqlen_k=shape[3],
        query_offset=offset,
        window_left=left,
        window_right=right,
        scale=default_scale(query.shape[-1]) if scale is None else check.number("scale", scale),
        softcap=check.softcap(softcap),
        deterministic=check.flag("deterministic", deterministic) or torch.are_deterministic_algorithms_enabled(),
        backend=check.backend(backend),
        dropout_p=probability,
        # Last, so that a rejected call leaves torch's generator alone.
        rng=draw_rng(query.device) if probability > 0 else None,
    )


def explain(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> backends.Explanation:
    """Which backends can run `attention(query, key, value, **options)`, which one would, and why not the others.

    Nothing is computed. Takes every option of `attention`; print the result to read it.
    """
    check.flag("return_lse", options.pop("return_lse", False))
    dropout_p = options.pop("dropout_p", 0.0)
    problem = problem_of(query, key, value, **options)
    extra = [*problem.gradient_features(), *(["dropout"] if check.dropout(dropout_p) > 0 else [])]
    return backends.explain("dense", problem.requirements(*extra), problem.backend)


def merge_partials(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Combine attention over two disjoint sets of keys into attention over both, exactly and differentiably.

    Args:
        out_a, out_b: (..., Dv) outputs of the two parts.
        lse_a, lse_b: (...) their LSE; -inf where a part saw no key.

    Returns:
        (out, lse) in the dtypes of out_a and lse_a.
    """
    for name, out, lse in (("a", out_a, lse_a), ("b", out_b, lse_b)):
        if not isinstance(out, Tensor) or not isinstance(lse, Tensor):
            raise TypeError(f"fastattn: out_{name} and lse_{name} must be torch.Tensors")
        for what, t in ((f"out_{name}", out), (f"lse_{name}", lse)):
            if not t.is_floating_point():
                raise TypeError(f"fastattn: {what} must be a floating-point tensor, got {t.dtype}")
            if t.device != out_a.device:
                raise ValueError(f"fastattn: {what} must be on out_a's device {out_a.device}, got {t.device}")
        if out.shape[:-1] != lse.shape:
            raise ValueError(
                f"fastattn: lse_{name} must have out_{name}'s shape without its last axis, {tuple(out.shape[:-1])}, "
                f"got {tuple(lse.shape)}"
            )
    if out_a.shape != out_b.shape:
        raise ValueError(f"fastattn: out_b must have out_a's shape {tuple(out_a.shape)}, got {tuple(out_b.shape)}")
    empty = torch.maximum(lse_a, lse_b) == float("-inf")
    highest = torch.maximum(lse_a, lse_b).detach().masked_fill(empty, 0.0)
    weight_a, weight_b = torch.exp(lse_a - highest), torch.exp(lse_b - highest)
    total = (weight_a + weight_b).masked_fill(empty, 1.0)
    share_a, share_b = (weight_a / total)[..., None], (weight_b / total)[..., None]
    out = (share_a * out_a + share_b * out_b).to(out_a.dtype)
    return out, (highest + torch.log(total)).masked_fill(empty, float("-inf"))
