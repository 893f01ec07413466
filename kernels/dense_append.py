"""New keys and values into a KV cache, contiguous or paged, with rotary position embeddings on the way.

Rotary embeddings: Su et al., RoFormer (arXiv:2104.09864).
"""

import triton
import triton.language as tl

from fastattn.kernels.dense_scores import VARYING, head_rows


@triton.jit
def _copy_rotated(
    source, target, target_stride, cos, sin, valid,
    D: tl.constexpr, BLOCK_D: tl.constexpr, HALF: tl.constexpr, BLOCK_HALF: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """Copy one row; its first 2 * HALF columns rotated by the angles whose cosines and sines these are, if valid."""
    columns = tl.arange(0, BLOCK_D)
    copied = valid & (columns >= 2 * HALF) & (columns < D)
    tl.store(target + columns * target_stride, tl.load(source + columns, mask=copied), mask=copied)
    if HALF > 0:
        c = tl.arange(0, BLOCK_HALF)
        first = 2 * c if INTERLEAVED else c
        second = 2 * c + 1 if INTERLEAVED else c + HALF
        rotated = valid & (c < HALF)
        x = tl.load(source + first, mask=rotated).to(tl.float32)
        y = tl.load(source + second, mask=rotated).to(tl.float32)
        cosine = tl.load(cos + c, mask=rotated).to(tl.float32)
        sine = tl.load(sin + c, mask=rotated).to(tl.float32)
        kind = target.dtype.element_ty
        tl.store(target + first * target_stride, (x * cosine - y * sine).to(kind), mask=rotated)
        tl.store(target + second * target_stride, (y * cosine + x * sine).to(kind), mask=rotated)


@triton.jit(do_not_specialize=VARYING)
def append_kernel(
    query, query_stride_b, query_stride_h, query_stride_s,
    rotated, rotated_stride_b, rotated_stride_h, rotated_stride_s,
    key, key_stride_b, key_stride_h, key_stride_s,
    value, value_stride_b, value_stride_h, value_stride_s,
    key_cache, key_cache_stride_b, key_cache_stride_h, key_cache_stride_s, key_cache_stride_d,
    value_cache, value_cache_stride_b, value_cache_stride_h, value_cache_stride_s, value_cache_stride_d,
    key_lengths, block_table, block_table_stride, pages, cos, cos_stride, sin, sin_stride, positions,
    heads, kv_heads, new_rows, seqlen_q, seqlen_new, capacity,
    D: tl.constexpr, BLOCK_D: tl.constexpr, DV: tl.constexpr, BLOCK_DV: tl.constexpr, HALF: tl.constexpr,
    BLOCK_HALF: tl.constexpr, INTERLEAVED: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    """One row a program: the first new_rows = B * kv heads * seqlen_new go to the caches, the others are queries.

    Rows past the capacity are dropped; positions past the cosines take the last of them.
    """
    program = tl.program_id(0)
    if program < new_rows:
        s = program % seqlen_new
        head = program // seqlen_new % kv_heads
        b = program // seqlen_new // kv_heads
        position = tl.load(key_lengths + b) + s
        fits = (position >= 0) & (position < capacity)
        place = tl.where(fits, position, 0)
        page = b
        row = place
        if PAGE is not None:
            page = tl.load(block_table + b.to(tl.int64) * block_table_stride + place // PAGE)
            fits = fits & (page >= 0) & (page < pages)
            row = place % PAGE
        angle = tl.minimum(place, positions - 1).to(tl.int64)
        source = head_rows(key, b, key_stride_b, head, key_stride_h, s, key_stride_s)
        target = head_rows(key_cache, page, key_cache_stride_b, head, key_cache_stride_h, row, key_cache_stride_s)
        _copy_rotated(
            source.base, target.base, key_cache_stride_d, None if HALF == 0 else cos + angle * cos_stride,
            None if HALF == 0 else sin + angle * sin_stride, fits, D, BLOCK_D, HALF, BLOCK_HALF, INTERLEAVED,
        )  # fmt: skip
        source = head_rows(value, b, value_stride_b, head, value_stride_h, s, value_stride_s)
        target = head_rows(
            value_cache, page, value_cache_stride_b, head, value_cache_stride_h, row, value_cache_stride_s
        )
        _copy_rotated(source.base, target.base, value_cache_stride_d, None, None, fits, DV, BLOCK_DV, 0, 0, False)
    else:
        program -= new_rows
        i = program % seqlen_q
        head = program // seqlen_q % heads
        b = program // seqlen_q // heads
        position = tl.load(key_lengths + b) + seqlen_new - seqlen_q + i
        angle = tl.minimum(tl.maximum(position, 0), positions - 1).to(tl.int64)
        source = head_rows(query, b, query_stride_b, head, query_stride_h, i, query_stride_s)
        target = head_rows(rotated, b, rotated_stride_b, head, rotated_stride_h, i, rotated_stride_s)
        _copy_rotated(
            source.base, target.base, 1, None if HALF == 0 else cos + angle * cos_stride,
            None if HALF == 0 else sin + angle * sin_stride, True, D, BLOCK_D, HALF, BLOCK_HALF, INTERLEAVED,
        )  # fmt: skip
