"""flash-attn's seven functions, argument by argument, on fastattn's kernels.

Interface: flash_attn/flash_attn_interface.py of flash-attn 2.8, https://github.com/Dao-AILab/flash-attention, on any
device, in float32, bfloat16, float16 and float64. What the functions have in common:

- q (batch, seqlen_q, nheads, headdim), k and v (batch, seqlen_k, nheads_k, headdim), nheads a multiple of nheads_k; in
  the varlen functions packed, (total, heads, headdim). Any strides. v may have another headdim.
- dropout_p, softmax_scale (default 1 / sqrt(headdim)).
- causal: aligned bottom-right, so that the last query sees the last key.
- window_size (left, right): query i sees keys i + seqlen_k - seqlen_q - left to i + seqlen_k - seqlen_q + right; a
  negative side, -1 by custom, is unlimited.
- softcap: scores become softcap * tanh(scores / softcap); 0.0 or less switches it off.
- alibi_slopes (nheads,) or (batch, nheads): -slope * |i + seqlen_k - seqlen_q - j| is added.
- deterministic: bit-identical gradients, or an error.
- return_attn_probs: the result is (out, softmax_lse, S_dmask). softmax_lse (batch, nheads, seqlen_q), varlen (nheads,
  total_q), is float32 (float64 for float64) and differentiable, -inf for a row that sees no key. S_dmask (batch,
  nheads, seqlen_q, seqlen_k), varlen (batch, nheads, max_seqlen_q, max_seqlen_k), holds the softmax, negative where
  dropout dropped it, without gradient; as in flash-attn it is empty without dropout. It has the size of the score
  matrix: for tests.

What does not fit raises TypeError, ValueError or UnsupportedError before any work, as `fastattn.attention` does.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastattn.compat.flash_attn import _translate as translate
from fastattn.dense import arguments as check
from fastattn.dense.api import attention
from fastattn.dense.append import rotate
from fastattn.dense.arguments import Options
from fastattn.dense.kvcache import CacheOptions, attention_with_kvcache
from fastattn.dense.varlen import attention_varlen

Result = Tensor | tuple[Tensor, Tensor, Tensor]


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """Attention of q, k and v (batch, seqlen, heads, headdim); out (batch, seqlen_q, nheads, headdim).

    The arguments, and the result of return_attn_probs, are those of the module's docstring.
    """
    for name, t in (("q", q), ("k", k), ("v", v)):
        check.tensor(name, t, 4, "(batch, seqlen, heads, headdim)")
    scoring = translate.scoring(softmax_scale, causal, window_size, softcap, alibi_slopes)
    options: Options = {**scoring, "dropout_p": check.dropout(dropout_p), "deterministic": deterministic}
    query, key, value = (t.transpose(1, 2) for t in (q, k, v))
    if not check.flag("return_attn_probs", return_attn_probs):
        return attention(query, key, value, **options).transpose(1, 2)
    rng = translate.coming_rng(q.device) if dropout_p > 0 else None
    out, lse = attention(query, key, value, return_lse=True, **options)
    if rng is None:
        return out.transpose(1, 2), lse, out.new_empty(0)
    pattern = translate.dropout_pattern(query, key, value, lse, rng, options)
    return out.transpose(1, 2), lse, pattern.to(out.dtype)


def flash_attn_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """`flash_attn_func` with k and v in one tensor kv (batch, seqlen_k, 2, nheads_k, headdim), read in place."""
    k, v = translate.unpacked("kv", kv, 2, "(batch, seqlen, 2, nheads_k, headdim)")
    return flash_attn_func(
        q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
    )


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """`flash_attn_func` with q, k and v in one tensor qkv (batch, seqlen, 3, nheads, headdim), read in place."""
    q, k, v = translate.unpacked("qkv", qkv, 3, "(batch, seqlen, 3, nheads, headdim)")
    return flash_attn_func(
        q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
    )


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Result:
    """`flash_attn_func` within each of the packed sequences.

    Args:
        q: (total_q, nheads, headdim), sequence b in rows cu_seqlens_q[b] to cu_seqlens_q[b + 1].
        k, v: (total_k, nheads_k, headdim), likewise by cu_seqlens_k.
        cu_seqlens_q, cu_seqlens_k: (batch + 1,) int32, starting at 0.
        max_seqlen_q, max_seqlen_k: the longest sequences, or more; a tensor () is read.
        block_table: (batch, n) int32 or int64; k and v are then pages (pages, page_size, nheads_k, headdim), any
            page_size, and key j of sequence b is row j % page_size of page block_table[b, j // page_size]. The pages
            that up to max_seqlen_k keys use are copied first: for prefilling, where that is little beside the
            attention. One token at a time, `flash_attn_with_kvcache` reads them in place. No dropout.

    Returns:
        out (total_q, nheads, headdim), or with return_attn_probs (out, softmax_lse, S_dmask). Rows past the last
        sequence are 0.
    """
    check.tensor("q", q, 3, "(total_q, nheads, headdim)")
    scoring = translate.scoring(softmax_scale, causal, window_size, softcap, alibi_slopes)
    options: Options = {**scoring, "dropout_p": check.dropout(dropout_p), "deterministic": deterministic}
    longest_q = translate.integer("max_seqlen_q", max_seqlen_q)
    longest_k = translate.integer("max_seqlen_k", max_seqlen_k)
    if block_table is not None:
        if dropout_p > 0:
            raise ValueError(f"fastattn: dropout_p must be 0 with block_table, got {dropout_p}")
        lengths_q = translate.lengths("cu_seqlens_q", cu_seqlens_q, q)
        lengths_k = translate.lengths("cu_seqlens_k", cu_seqlens_k, q)
        k, v, cu_seqlens_k, longest_k = translate.from_pages(k, v, block_table, lengths_k, longest_k)
        options["key_lengths"] = lengths_k
        options["query_start"] = lengths_k - lengths_q
    packed = (q, k, v, cu_seqlens_q, cu_seqlens_k, longest_q, longest_k)
    if not check.flag("return_attn_probs", return_attn_probs):
        return attention_varlen(*packed, **options)
    rng = translate.coming_rng(q.device) if dropout_p > 0 else None
    out, lse = attention_varlen(*packed, return_lse=True, **options)
    if rng is None:
        return out, lse, out.new_empty(0)
    bounds_q, bounds_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    pattern = out.new_zeros(len(bounds_q) - 1, q.shape[1], longest_q, longest_k)
    for b in range(len(bounds_q) - 1):
        rows, keys = slice(*bounds_q[b : b + 2]), slice(*bounds_k[b : b + 2])
        query, key, value = (t.transpose(0, 1)[None] for t in (q[rows], k[keys], v[keys]))
        part = translate.dropout_pattern(query, key, value, lse[None, :, rows], rng, options, b)
        pattern[b, :, : part.shape[2], : part.shape[3]] = part[0]
    return out, lse, pattern


def flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """`flash_attn_varlen_func` with k and v in one tensor kv (total_k, 2, nheads_k, headdim), read in place."""
    k, v = translate.unpacked("kv", kv, 2, "(total_k, 2, nheads_k, headdim)")
    return flash_attn_varlen_func(
        *(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal),
        *(window_size, softcap, alibi_slopes, deterministic, return_attn_probs),
    )


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """`flash_attn_varlen_func` with q, k and v in one tensor qkv (total, 3, nheads, headdim), read in place."""
    q, k, v = translate.unpacked("qkv", qkv, 3, "(total, 3, nheads, headdim)")
    return flash_attn_varlen_func(
        *(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, dropout_p, softmax_scale, causal),
        *(window_size, softcap, alibi_slopes, deterministic, return_attn_probs),
    )


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Write k and v into the caches, in place, and attend to all that these then hold. No gradient: one that a tensor
    requires, while gradients are enabled, raises.

    Args:
        q: (batch, seqlen_q, nheads, headdim), the queries at the end of their sequences.
        k_cache, v_cache: (batch_cache, seqlen_cache, nheads_k, headdim), of which sequence b uses the b-th, or the one
            that cache_batch_idx names; with block_table pages (pages, page_size, nheads_k, headdim), any page_size.
        k, v: (batch, seqlen_new, nheads_k, headdim), both or neither, written behind the cache_seqlens keys.
        rotary_cos, rotary_sin: (positions, rotary_dim / 2), in q's dtype or float32. New key s turns by position
            cache_seqlens[b] + s; query i by cache_seqlens[b] + i if causal or windowed, else by cache_seqlens[b].
            Needs k.
        cache_seqlens: (batch,) ints, or one int, the keys before the append; None means full caches, without k.
        cache_batch_idx: (batch,) ints. Two sequences that append to one cache leave either's keys there.
        cache_leftpad: (batch,) ints, the first key of each sequence.
        block_table: (batch, n) ints, as in `flash_attn_varlen_func`, but nothing is copied.
        rotary_interleaved: pair columns 2c and 2c + 1 (GPT-J) rather than c and c + rotary_dim / 2 (GPT-NeoX, Llama).
        num_splits: must be 0: the kernels themselves decide how to split the keys.
        return_softmax_lse: also return softmax_lse (batch, nheads, seqlen_q).

    Returns:
        out (batch, seqlen_q, nheads, headdim), or (out, softmax_lse).
    """
    check.flag("return_softmax_lse", return_softmax_lse)
    check.tensor("q", q, 4, "(batch, seqlen, nheads, headdim)")
    for name, t in (("k_cache", k_cache), ("v_cache", v_cache)):
        check.tensor(name, t, 4, "(batch or pages, rows, nheads_k, headdim)")
    for name, new, other in (("k", k, v), ("v", v, k)):
        if new is not None:
            check.tensor(name, new, 4, "(batch, seqlen_new, nheads_k, headdim)")
        elif other is not None:
            raise ValueError(f"fastattn: {name} must be given where the other of k and v is, got None")
    if num_splits != 0:
        raise ValueError(f"fastattn: num_splits must be 0 (the kernels choose their splits), got {num_splits}")
    scoring = translate.scoring(softmax_scale, causal, window_size, softcap, alibi_slopes)
    batch, seqlen_q = q.shape[:2]
    if cache_batch_idx is not None:
        if block_table is not None:
            raise ValueError("fastattn: cache_batch_idx must be None with block_table, which says where the keys are")
        index = check.per_sequence("cache_batch_idx", cache_batch_idx, batch, q)
        assert index is not None
        block_table = index[:, None]  # a whole cache is a page
    elif block_table is None:
        k_cache, v_cache = k_cache[:batch], v_cache[:batch]
    else:
        check.tensor("block_table", block_table, 2, f"({batch}, pages per sequence)")
    if cache_seqlens is None:
        if k is not None:
            raise ValueError("fastattn: cache_seqlens must be given with k and v, got None")
        cache_seqlens = k_cache.shape[1] * (1 if block_table is None else block_table.shape[1])
    if not isinstance(cache_seqlens, Tensor):
        cache_seqlens = q.new_full((batch,), translate.integer("cache_seqlens", cache_seqlens), dtype=torch.int64)
    lengths = check.per_sequence("cache_seqlens", cache_seqlens, batch, q)
    assert lengths is not None

    query, key_cache, value_cache = (t.transpose(1, 2) for t in (q, k_cache, v_cache))
    options: CacheOptions = {
        **scoring,
        "key": None if k is None else k.transpose(1, 2),
        "value": None if v is None else v.transpose(1, 2),
        "key_lengths": lengths,
        "key_start": cache_leftpad,
        "block_table": block_table,
    }
    if rotary_cos is not None or rotary_sin is not None:
        for name, table in (("rotary_cos", rotary_cos), ("rotary_sin", rotary_sin)):
            check.tensor(name, table, 2, "(positions, rotary_dim / 2)")
        assert rotary_cos is not None
        assert rotary_sin is not None
        interleaved = check.flag("rotary_interleaved", rotary_interleaved)
        options["rotary"] = (rotary_cos, rotary_sin, interleaved)
        advancing = causal or scoring["window"] != (None, None)
        if k is not None and not (k.shape[1] == seqlen_q and (advancing or seqlen_q == 1)):
            # attention_with_kvcache turns the queries by the positions that end where the keys do.
            positions = lengths.long()[:, None] + torch.arange(seqlen_q, device=q.device) * advancing
            translate.check_rotary(positions, rotary_cos)
            attention_with_kvcache(query[:, :, :0], key_cache, value_cache, **options)
            query = rotate(query, rotary_cos, rotary_sin, positions, interleaved)
            options |= {"key": None, "value": None, "rotary": None, "key_lengths": lengths + k.shape[1]}
    if return_softmax_lse:
        out, lse = attention_with_kvcache(query, key_cache, value_cache, return_lse=True, **options)
        return out.transpose(1, 2), lse
    return attention_with_kvcache(query, key_cache, value_cache, **options).transpose(1, 2)
