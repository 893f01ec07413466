"""`attention_with_kvcache`: decoding against a cache of keys and values, contiguous or in pages."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, Required, TypedDict, Unpack, overload

import torch
from torch import Tensor

from fastattn import backends
from fastattn.dense import append as append  # registers fastattn::kvcache_append
from fastattn.dense import arguments as check
from fastattn.dense.api import normalise
from fastattn.dense.op import attention_op, transformed
from fastattn.errors import UnsupportedError

if TYPE_CHECKING:
    from fastattn.dense.arguments import Mask

Rotary = tuple[Tensor, Tensor] | tuple[Tensor, Tensor, bool]


class CacheOptions(TypedDict, total=False):
    """The keyword arguments of `attention_with_kvcache`, but for return_lse, which decides its result."""

    key: Tensor | None
    value: Tensor | None
    key_lengths: Required[Tensor]
    block_table: Tensor | None
    rotary: Rotary | None
    attn_mask: Mask | None
    causal: bool
    window: tuple[int | None, int | None] | None
    key_start: Tensor | None
    softcap: float | None
    alibi_slopes: Tensor | None
    sinks: Tensor | None
    scale: float | None
    deterministic: bool
    backend: str | None


@overload
def attention_with_kvcache(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    *,
    return_lse: Literal[False] = False,
    **options: Unpack[CacheOptions],
) -> Tensor: ...
@overload
def attention_with_kvcache(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    *,
    return_lse: Literal[True],
    **options: Unpack[CacheOptions],
) -> tuple[Tensor, Tensor]: ...
def attention_with_kvcache(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    *,
    key: Tensor | None = None,
    value: Tensor | None = None,
    key_lengths: Tensor,
    block_table: Tensor | None = None,
    rotary: Rotary | None = None,
    attn_mask: Mask | None = None,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    key_start: Tensor | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    deterministic: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`attention` against a cache of which each sequence fills a part, after appending its new keys. Inference only.

    With L[b] = key_lengths[b] + S_new (S_new = 0 without key), sequence b has the keys j < L[b], and its queries stand
    at the end: query i at key position L[b] - Sq + i. What lies past L[b] in the cache may be anything, NaN included.
    The contract is that of flash-attn's `flash_attn_with_kvcache`, but for rotary: there query i turns by the position
    key_lengths[b] + i if causal or windowed, else by key_lengths[b]; here always by its own at the end.

    Args:
        query: (B, Hq, Sq, D), float32, bfloat16, float16 or float64.
        key_cache: (B, Hkv, capacity, D), in query's dtype, Hq a multiple of Hkv. With block_table, pages (pages, Hkv,
            page_size, D), and capacity is page_size times the table's columns (PagedAttention, Kwon et al.,
            arXiv:2309.06180).
        value_cache: the same with Dv.
        key, value: (B, Hkv, S_new, D) and (B, Hkv, S_new, Dv), both or neither: written into the caches, in place, at
            positions key_lengths[b] to L[b] - 1. Nothing else of the caches changes.
        key_lengths: (B,) integers, the keys of each sequence before the append.
        block_table: (B, n) int32 or int64: key j of sequence b is row j % page_size of page block_table[b,
            j // page_size]. Entries that no key uses may be anything. Sequences may share pages, but not the rows that
            they append to.
        rotary: (cos, sin) or (cos, sin, interleaved): tables (positions, R / 2), R <= D, in query's dtype or float32.
            The first R columns of the new keys and of the queries turn by their positions (RoPE, Su et al.,
            arXiv:2104.09864) before use, in float32 (float64 for float64); query itself is not changed. interleaved =
            False pairs column c with c + R / 2 (GPT-NeoX, Llama), True 2c with 2c + 1 (GPT-J). Needs key.
        attn_mask: broadcastable to (B, Hq, Sq, capacity), bool or float, or a BlockMask.
        causal, window, key_start, softcap, alibi_slopes, sinks, scale, return_lse, deterministic, backend: as in
            `attention`.

    Under autocast query, key and value are cast, a cache never.

    Returns:
        out (B, Hq, Sq, Dv), or (out, lse) with lse (B, Hq, Sq) float32 (float64 for float64).

    Raises:
        TypeError, ValueError: an argument is of the wrong type, dtype, shape, device or range, or requires a gradient
            while gradients are enabled.
        UnsupportedError: the named backend cannot run this call, or a torch.func transform or forward-mode AD is
            active.
    """
    check.flag("return_lse", return_lse)
    check.tensor("query", query, 4, "(batch, heads, seqlen, head_dim)")
    if (key is None) != (value is None):
        given, absent = ("key", "value") if value is None else ("value", "key")
        raise ValueError(f"fastattn: {given} must come with {absent}, got {absent}=None")
    if key is None or value is None:
        query, _, _ = check.autocast(query, query, query)
    else:
        for name, new in (("key", key), ("value", value)):
            check.tensor(name, new, 4, "(batch, kv_heads, new keys, head_dim)")
        query, key, value = check.autocast(query, key, value)
    capacity, table = _caches(query, key_cache, value_cache, block_table)
    seqlen_new = 0 if key is None or value is None else _new(key, value, query, key_cache, value_cache, capacity)
    cos, sin, interleaved = _rotary(rotary, query, seqlen_new if key is not None else None)

    batch, heads, seqlen_q, _ = query.shape
    check.tensor("key_lengths", key_lengths, 1, f"({batch},)")
    lengths = check.per_sequence("key_lengths", key_lengths, batch, query)
    assert lengths is not None
    ends = lengths + seqlen_new
    problem = normalise(
        query,
        key_cache,
        value_cache,
        (batch, heads, seqlen_q, capacity),
        query_start=ends - seqlen_q,
        key_lengths=ends,
        block_table=table,
        attn_mask=attn_mask,
        causal=causal,
        window=window,
        key_start=key_start,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        sinks=sinks,
        scale=scale,
        deterministic=deterministic,
        backend=backend,
    )
    _without_gradients(
        query=query,
        key_cache=key_cache,
        value_cache=value_cache,
        key=key,
        value=value,
        attn_mask=problem.attn_mask,
        sinks=sinks,
        cos=cos,
        sin=sin,
    )
    if key is not None:
        if problem.backend is not None and not torch.compiler.is_compiling():
            # Before the append, so that a call which the named backend refuses leaves the caches as they were.
            backends.select("dense", problem.requirements(), problem.backend)
        rotated = torch.ops.fastattn.kvcache_append(
            query, key_cache, value_cache, key, value, lengths, table, cos, sin, interleaved, problem.backend
        )
        if cos is not None:
            problem.query = rotated
    out, lse = attention_op(problem)
    return (out, lse) if return_lse else out


def _caches(query: Tensor, key_cache: Any, value_cache: Any, block_table: Any) -> tuple[int, Tensor | None]:
    """Check the caches against query and the block table; (capacity, the table as int32)."""
    if query.dtype not in check.DTYPES:
        names = ", ".join(str(d).removeprefix("torch.") for d in check.DTYPES)
        raise TypeError(f"fastattn: query must be one of {names}, got {query.dtype}")
    layout = "(batch, kv_heads, capacity, head_dim)"
    if block_table is not None:
        layout = "(pages, kv_heads, page_size, head_dim), because there is a block_table"
    for name, cache in (("key_cache", key_cache), ("value_cache", value_cache)):
        check.tensor(name, cache, 4, layout)
        if cache.dtype != query.dtype:
            raise TypeError(
                f"fastattn: {name} must have query's dtype {query.dtype} (a cache is never cast), got {cache.dtype}"
            )
        if cache.device != query.device:
            raise ValueError(f"fastattn: {name} must be on query's device {query.device}, got {cache.device}")
    shape_q, shape_k, shape_v = query.shape, key_cache.shape, value_cache.shape
    if shape_k[:-1] != shape_v[:-1]:
        raise ValueError(
            "fastattn: key_cache and value_cache must agree in all but head_dim, got "
            f"{tuple(shape_k)} and {tuple(shape_v)}"
        )
    if shape_q[3] != shape_k[3]:
        raise ValueError(f"fastattn: key_cache must have query's head_dim {shape_q[3]}, got {shape_k[3]}")
    if shape_q[3] == 0 or shape_v[3] == 0:
        raise ValueError(
            f"fastattn: head_dim must be at least 1, got query {tuple(shape_q)}, value_cache {tuple(shape_v)}"
        )
    if shape_k[1] == 0 or shape_q[1] % shape_k[1] != 0:
        raise ValueError(
            f"fastattn: query's heads must be a multiple of key_cache's heads, got {shape_q[1]} and {shape_k[1]}"
        )
    if block_table is None:
        if shape_k[0] != shape_q[0]:
            raise ValueError(
                f"fastattn: key_cache must have query's batch size {shape_q[0]}, got {tuple(shape_k)}; "
                "pages need a block_table"
            )
        return shape_k[2], None
    if shape_k[2] == 0:
        raise ValueError(f"fastattn: key_cache must have a page_size of at least 1, got {tuple(shape_k)}")
    check.tensor("block_table", block_table, 2, f"({shape_q[0]}, pages per sequence)")
    if block_table.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"fastattn: block_table must be int32 or int64, got {block_table.dtype}")
    if block_table.shape[0] != shape_q[0]:
        raise ValueError(
            f"fastattn: block_table must have shape ({shape_q[0]}, pages per sequence), a row for each of query, got "
            f"{tuple(block_table.shape)}"
        )
    if block_table.device != query.device:
        raise ValueError(f"fastattn: block_table must be on query's device {query.device}, got {block_table.device}")
    # Clamped, so that what does not fit stays recognisably wrong.
    table = block_table.clamp(-(2**31), 2**31 - 1) if block_table.dtype == torch.int64 else block_table
    return shape_k[2] * block_table.shape[1], table.to(torch.int32).contiguous()


def _new(key: Tensor, value: Tensor, query: Tensor, key_cache: Tensor, value_cache: Tensor, capacity: int) -> int:
    """Check the keys and values to append against the caches; how many there are."""
    seqlen_new = key.shape[2]
    for name, new, cache in (("key", key, key_cache), ("value", value, value_cache)):
        if new.dtype != query.dtype:
            raise TypeError(f"fastattn: {name} must have query's dtype {query.dtype}, got {new.dtype}")
        if new.device != query.device:
            raise ValueError(f"fastattn: {name} must be on query's device {query.device}, got {new.device}")
        expected = (query.shape[0], cache.shape[1], seqlen_new, cache.shape[3])
        if tuple(new.shape) != expected:
            raise ValueError(
                f"fastattn: {name} must have shape {expected}, from query's batch size, key's length and {name}_cache, "
                f"got {tuple(new.shape)}"
            )
        if any(stride == 0 and size > 1 for stride, size in zip(cache.stride(), cache.shape, strict=True)):
            raise ValueError(f"fastattn: {name}_cache must not be expanded, because it is written to")
    if seqlen_new > capacity:
        raise ValueError(
            f"fastattn: key must have at most as many rows as the cache's capacity {capacity}, got {seqlen_new}"
        )
    return seqlen_new


def _rotary(rotary: Any, query: Tensor, seqlen_new: int | None) -> tuple[Tensor | None, Tensor | None, bool]:
    """(cos, sin, interleaved), checked; seqlen_new is None without key."""
    if rotary is None:
        return None, None, False
    if not isinstance(rotary, tuple | list) or len(rotary) not in (2, 3):
        raise TypeError(f"fastattn: rotary must be (cos, sin) or (cos, sin, interleaved), got {_described(rotary)}")
    if seqlen_new is None:
        raise ValueError("fastattn: rotary must come with key and value, got key=None")
    cos, sin, *rest = rotary
    interleaved = check.flag("rotary's interleaved", rest[0]) if rest else False
    for name, table in (("rotary's cos", cos), ("rotary's sin", sin)):
        check.tensor(name, table, 2, "(positions, R / 2)")
        if table.dtype not in (query.dtype, torch.float32):
            raise TypeError(f"fastattn: {name} must be float32 or query's dtype {query.dtype}, got {table.dtype}")
        if table.device != query.device:
            raise ValueError(f"fastattn: {name} must be on query's device {query.device}, got {table.device}")
    if cos.shape != sin.shape or cos.dtype != sin.dtype:
        raise ValueError(
            "fastattn: rotary's cos and sin must have the same shape and dtype, got "
            f"{tuple(cos.shape)} {cos.dtype} and {tuple(sin.shape)} {sin.dtype}"
        )
    if not 2 <= 2 * cos.shape[1] <= query.shape[3]:
        raise ValueError(
            f"fastattn: rotary's cos and sin must have 1 to {query.shape[3] // 2} columns, half of query's head_dim "
            f"{query.shape[3]} at most, got {tuple(cos.shape)}"
        )
    if cos.shape[0] < max(seqlen_new, query.shape[2]):
        raise ValueError(
            f"fastattn: rotary's cos and sin must have a row for each position, at least "
            f"{max(seqlen_new, query.shape[2])}, got {tuple(cos.shape)}"
        )
    return cos, sin, interleaved


def _described(value: Any) -> str:
    return f"{len(value)} values" if isinstance(value, tuple | list) else type(value).__name__


def _without_gradients(**tensors: Tensor | None) -> None:
    if transformed():
        raise UnsupportedError(
            "fastattn: attention_with_kvcache does not support torch.func transforms and forward-mode AD"
        )
    if torch.is_grad_enabled():
        for name, tensor in tensors.items():
            if tensor is not None and tensor.requires_grad:
                raise ValueError(
                    f"fastattn: attention_with_kvcache has no gradient, but {name} requires one; call it under "
                    f"torch.no_grad(), or pass {name}.detach()"
                )
