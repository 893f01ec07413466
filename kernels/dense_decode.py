"""Attention of few queries over many keys (decoding): the keys are split between programs, then merged.

Flash-Decoding (Dao et al., 2023). The query heads that share keys lie in one tile with their rows, row r being query
r // GROUP of head r % GROUP, so that keys are read once. Keys may lie in the pages of a cache (Kwon et al.,
arXiv:2309.06180).
"""

import triton
import triton.language as tl

from fastattn.kernels.dense_forward import attend, finish
from fastattn.kernels.dense_scores import (
    LOG2E,
    VARYING,
    Dropout,
    Interval,
    Pages,
    Scoring,
    head_rows,
    key_limits,
    key_range,
)


@triton.jit(do_not_specialize=VARYING)
def split_kernel(
    query, query_stride_b, query_stride_h, query_stride_s,
    key, key_stride_b, key_stride_h, key_stride_s,
    value, value_stride_b, value_stride_h, value_stride_s,
    mask, mask_stride_b, mask_stride_h, mask_stride_q, mask_stride_k,
    out, out_stride_b, out_stride_h, out_stride_s, out_stride_split,
    lse, lse_stride_b, lse_stride_h, lse_stride_s, lse_stride_split,
    sinks, alibi_slopes, query_start, key_start, key_lengths, rng,
    block_table, block_table_stride, pages,
    heads, tiles, splits, chunk, seqlen_q, seqlen_k, query_offset, window_left, window_right,
    factor, cap, dropout_threshold, dropout_scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, TAIL: tl.constexpr, BLOCK_TAIL: tl.constexpr, DV: tl.constexpr,
    BLOCK_DV: tl.constexpr, GROUP: tl.constexpr, PAGE: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """out (B, Hq, Sq, splits, Dv) and lse (B, Hq, Sq, splits) of every part; a part without keys leaves its out alone.

    Part s holds the keys [s * chunk, (s + 1) * chunk) or, where chunk is None, the s-th equal share of those that the
    tile sees. PAGE is the page size, or None. Grid: (splits * tiles * kv heads * B,), splits fastest.
    """
    program = tl.program_id(0)
    split = program % splits
    r0 = program // splits % tiles * BLOCK_M
    kv_head = program // splits // tiles % (heads // GROUP)
    b = program // splits // tiles // (heads // GROUP)

    r = r0 + tl.arange(0, BLOCK_M)
    i = r // GROUP
    head = kv_head * GROUP + r % GROUP
    valid = i < seqlen_q
    safe_head = tl.minimum(head, heads - 1)
    slope = None if alibi_slopes is None else tl.load(alibi_slopes + b * heads + safe_head[:, None]) * LOG2E
    mask_at = mask
    if mask is not None:
        mask_at += b.to(tl.int64) * mask_stride_b + safe_head[:, None].to(tl.int64) * mask_stride_h
    scoring = Scoring(factor, cap, slope, mask_at, mask_stride_q, mask_stride_k, seqlen_q, seqlen_k)
    dropout = Dropout(rng, dropout_threshold, dropout_scale, (b * heads + head)[:, None])
    position, first, end = key_limits(b, seqlen_q, seqlen_k, key_start, key_lengths, query_offset, query_start)
    interval = Interval(position, first, end, window_left, window_right)
    i_last = tl.minimum((r0 + BLOCK_M - 1) // GROUP, seqlen_q - 1)
    low, high, block_low, block_high, full_low, full_high = key_range(r0 // GROUP, i_last, interval, BLOCK_N)
    if chunk is None:
        share = tl.cdiv((block_high - block_low) // BLOCK_N, splits) * BLOCK_N
        begin = tl.minimum(block_low + split * share, block_high)
        stop = tl.minimum(begin + share, block_high)
    else:
        begin = tl.maximum(split * chunk, block_low)
        stop = tl.maximum(tl.minimum((split + 1) * chunk, block_high), begin)
    full_low = tl.minimum(tl.maximum(full_low, begin), stop)
    full_high = tl.maximum(tl.minimum(full_high, stop), full_low)

    if PAGE is None:
        keys = head_rows(key, b, key_stride_b, kv_head, key_stride_h, 0, key_stride_s)
    else:
        table = block_table + b.to(tl.int64) * block_table_stride
        keys = Pages(key + kv_head.to(tl.int64) * key_stride_h, key_stride_s, table, key_stride_b, pages)
    if value is None:
        values = None
    elif PAGE is None:
        values = head_rows(value, b, value_stride_b, kv_head, value_stride_h, 0, value_stride_s)
    else:
        table = block_table + b.to(tl.int64) * block_table_stride
        values = Pages(value + kv_head.to(tl.int64) * value_stride_h, value_stride_s, table, value_stride_b, pages)
    row_pointers = query + b.to(tl.int64) * query_stride_b + head.to(tl.int64) * query_stride_h
    row_pointers = (row_pointers + i.to(tl.int64) * query_stride_s)[:, None]
    columns = tl.arange(0, BLOCK_D)[None, :]
    query_tile = tl.load(row_pointers + columns, mask=valid[:, None] & (columns < D), other=0.0)
    query_tail = None
    if TAIL > 0:
        columns = tl.arange(0, BLOCK_TAIL)[None, :]
        query_tail = tl.load(row_pointers + D + columns, mask=valid[:, None] & (columns < TAIL), other=0.0)

    acc = tl.zeros((BLOCK_M, BLOCK_DV), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    highest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    acc, total, highest = attend(
        acc, total, highest, query_tile, query_tail, keys, values, i, full_low, full_high, 0, 0, None, low, high,
        interval, scoring, dropout, D, BLOCK_D, TAIL, BLOCK_TAIL, DV, BLOCK_DV, BLOCK_N, PAGE, PRECISION, False,
    )  # fmt: skip
    gap = full_high - full_low
    acc, total, highest = attend(
        acc, total, highest, query_tile, query_tail, keys, values, i, begin, stop - gap, full_low, gap, None, low,
        high, interval, scoring, dropout, D, BLOCK_D, TAIL, BLOCK_TAIL, DV, BLOCK_DV, BLOCK_N, PAGE, PRECISION, True,
    )  # fmt: skip
    sink = None if sinks is None else tl.load(sinks + safe_head)
    acc, lse_tile = finish(acc, total, highest, sink, dropout_scale)

    places = b.to(tl.int64) * lse_stride_b + head.to(tl.int64) * lse_stride_h + i.to(tl.int64) * lse_stride_s
    tl.store(lse + places + split * lse_stride_split, lse_tile, mask=valid)
    places = b.to(tl.int64) * out_stride_b + head.to(tl.int64) * out_stride_h + i.to(tl.int64) * out_stride_s
    columns = tl.arange(0, BLOCK_DV)[None, :]
    tl.store(
        out + (places + split * out_stride_split)[:, None] + columns,
        acc.to(out.dtype.element_ty),
        mask=valid[:, None] & (columns < DV),
    )


@triton.jit(do_not_specialize=VARYING)
def combine_kernel(
    partial_out, partial_lse, out, out_stride_b, out_stride_h, out_stride_s, lse, sinks, heads, splits, seqlen_q,
    DV: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_SPLITS: tl.constexpr,
):  # fmt: skip
    """Merge the parts of `split_kernel`, which are contiguous, into out and a contiguous lse. Grid: (B * Hq * Sq,)."""
    program = tl.program_id(0)
    i = program % seqlen_q
    head = program // seqlen_q % heads
    b = program // seqlen_q // heads
    row = program.to(tl.int64)
    columns = tl.arange(0, BLOCK_DV)[None, :]
    acc = tl.zeros((1, BLOCK_DV), tl.float32)
    total = tl.zeros((1,), tl.float32)
    highest = tl.full((1,), float("-inf"), tl.float32)
    for begin in range(0, splits, BLOCK_SPLITS):
        split = begin + tl.arange(0, BLOCK_SPLITS)
        lses = tl.load(partial_lse + row * splits + split, mask=split < splits, other=float("-inf")) * LOG2E
        new_highest = tl.maximum(highest, tl.max(lses, 0))
        pivot = tl.where(new_highest == float("-inf"), 0.0, new_highest)
        weights = tl.exp2(lses - pivot)
        shrink = tl.exp2(highest - pivot)
        highest = new_highest
        total = total * shrink + tl.sum(weights, 0)
        parts = tl.load(
            partial_out + (row * splits + split)[:, None] * DV + columns,
            mask=(lses > float("-inf"))[:, None] & (columns < DV),
            other=0.0,
        )
        acc = acc * shrink[:, None] + tl.sum(weights[:, None] * parts, 0)[None, :]
    acc, lse_tile = finish(acc, total, highest, None if sinks is None else tl.load(sinks + head), 1.0)
    tl.store(lse + row + tl.arange(0, 1), lse_tile)
    results = head_rows(out, b, out_stride_b, head, out_stride_h, i, out_stride_s)
    tl.store(results.base + columns, acc.to(out.dtype.element_ty), mask=columns < DV)
