"""Dense attention, forward: one program takes a tile of rows of one head over all the keys that they see.

The online softmax of FlashAttention-2 (Dao, arXiv:2307.08691). Blocks of keys that every row sees in full run without
mask arithmetic; the others, at both ends of the interval, run in a second loop.
"""

import triton
import triton.language as tl

from fastattn.kernels.dense_scores import (
    LN2,
    LOG2E,
    VARYING,
    Dropout,
    Interval,
    Scoring,
    dropout_keep,
    full_scores,
    head_rows,
    key_limits,
    key_range,
    listed_keeps,
    listed_line,
    load_rows,
    nth_line,
    sees,
    sequence_bounds,
    step_start,
    store_rows,
)


@triton.jit
def attend(
    acc, total, highest, query, query_tail, keys, values, i, begin, stop, gap_at, gap, listed, low, high, interval,
    scoring, dropout,
    D: tl.constexpr, BLOCK_D: tl.constexpr, TAIL: tl.constexpr, BLOCK_TAIL: tl.constexpr, DV: tl.constexpr,
    BLOCK_DV: tl.constexpr, BLOCK_N: tl.constexpr, PAGE: tl.constexpr, PRECISION: tl.constexpr, LIMIT: tl.constexpr,
    MASK_Q: tl.constexpr = 0, MASK_K: tl.constexpr = 0, TILES: tl.constexpr = False,
):  # fmt: skip
    """Blocks of keys from begin to stop, skipping `gap` keys at gap_at; LIMIT: the interval may cut through them.

    With `listed`, begin and stop count MASK_K for each block in its list, and TILES says that they have tiles. acc,
    total and highest are the state of the online softmax. query_tail holds the query's TAIL columns after the first D,
    or is None; values None: the values are the first D columns of the keys.
    """
    for step in range(begin, stop, BLOCK_N):
        j0 = step_start(step, gap_at, gap, listed, MASK_K, LIMIT)
        key = load_rows(keys, j0, low, high, BLOCK_N, D, BLOCK_D, LIMIT, PAGE)
        j = (j0 + tl.arange(0, BLOCK_N))[None, :]
        products = tl.dot(query, tl.trans(key), input_precision=PRECISION)
        if query_tail is not None:
            tail = load_rows(keys, j0, low, high, BLOCK_N, TAIL, BLOCK_TAIL, LIMIT, PAGE, D)
            products = tl.dot(query_tail, tl.trans(tail), products, input_precision=PRECISION)
        scores, _ = full_scores(products, i[:, None], j, interval.position, scoring)
        if LIMIT:
            scores = tl.where(sees(i[:, None], j, interval), scores, float("-inf"))
        if TILES:
            keep = listed_keeps(listed, step, i[:, None], j, MASK_K, MASK_Q, MASK_K)
            scores = tl.where(keep, scores, float("-inf"))
        new_highest = tl.maximum(highest, tl.max(scores, 1))
        pivot = new_highest
        if LIMIT or TILES or scoring.mask is not None:  # a row without keys so far: -inf minus -inf would be NaN
            pivot = tl.where(new_highest == float("-inf"), 0.0, new_highest)
        weights = tl.exp2(scores - pivot[:, None])
        shrink = tl.exp2(highest - pivot)
        total = total * shrink + tl.sum(weights, 1)
        acc = acc * shrink[:, None]
        highest = new_highest
        if dropout.rng is not None:
            weights = tl.where(dropout_keep(dropout, i, j0, BLOCK_N), weights, 0.0)
        value = key if values is None else load_rows(values, j0, low, high, BLOCK_N, DV, BLOCK_DV, LIMIT, PAGE)
        acc = tl.dot(weights.to(value.dtype), value, acc, input_precision=PRECISION)
    return acc, total, highest


@triton.jit
def finish(acc, total, highest, sink, dropout_scale):
    """(output, LSE) of rows whose online softmax ended in that state; sink: their logits, or None."""
    if sink is not None:
        new_highest = tl.maximum(highest, sink * LOG2E)
        shrink = tl.exp2(highest - new_highest)
        total = total * shrink + tl.exp2(sink * LOG2E - new_highest)
        acc = acc * shrink[:, None]
        highest = new_highest
    empty = total == 0.0
    divisor = tl.where(empty, 1.0, total)
    lse = tl.where(empty, float("-inf"), (highest + tl.log2(divisor)) * LN2)
    return acc * (dropout_scale / divisor)[:, None], lse


@triton.jit(do_not_specialize=VARYING)
def forward_kernel(
    query, query_stride_b, query_stride_h, query_stride_s,
    key, key_stride_b, key_stride_h, key_stride_s,
    value, value_stride_b, value_stride_h, value_stride_s,
    mask, mask_stride_b, mask_stride_h, mask_stride_q, mask_stride_k,
    out, out_stride_b, out_stride_h, out_stride_s,
    lse, lse_stride_b, lse_stride_h,
    sinks, lines, lines_stride_b, lines_stride_h, blocks, mask_tiles,
    alibi_slopes, query_start, key_start, key_lengths, cu_seqlens_q, cu_seqlens_k, rng,
    heads, tiles, seqlen_q, seqlen_k, query_offset, window_left, window_right,
    factor, cap, dropout_threshold, dropout_scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, DV: tl.constexpr, BLOCK_DV: tl.constexpr, GROUP: tl.constexpr,
    PACKED: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    MASK_Q: tl.constexpr, MASK_K: tl.constexpr, LIMITED: tl.constexpr,
):  # fmt: skip
    """out (B, Hq, Sq, Dv) and lse (B, Hq, Sq). Grid: (tiles * heads * sequences,), tiles fastest.

    lines, blocks and mask_tiles are a block mask's rows, row_blocks and tiles, or None; LIMITED: its full blocks may
    hold keys that the interval leaves out.
    """
    program = tl.program_id(0)
    tile = program % tiles
    head = program // tiles % heads
    b = program // tiles // heads
    # The longest rows first.
    if lines is not None:
        parts = MASK_Q // BLOCK_M
        tile = nth_line(lines, b, lines_stride_b, head, lines_stride_h, tile // parts) * parts + tile % parts
    elif window_right is not None:
        tile = tiles - 1 - tile
    row0, rows = sequence_bounds(b, seqlen_q, cu_seqlens_q)
    key0, seqlen = sequence_bounds(b, seqlen_k, cu_seqlens_k)
    m0 = tile * BLOCK_M
    if m0 >= rows:
        return
    batch = 0 if PACKED else b
    queries = head_rows(query, batch, query_stride_b, head, query_stride_h, row0, query_stride_s)
    keys = head_rows(key, batch, key_stride_b, head // GROUP, key_stride_h, key0, key_stride_s)
    values = head_rows(value, batch, value_stride_b, head // GROUP, value_stride_h, key0, value_stride_s)
    slope = None if alibi_slopes is None else tl.load(alibi_slopes + b * heads + head) * LOG2E
    mask_at = mask
    if mask is not None:
        mask_at += b.to(tl.int64) * mask_stride_b + head.to(tl.int64) * mask_stride_h
    scoring = Scoring(factor, cap, slope, mask_at, mask_stride_q, mask_stride_k, rows, seqlen)
    dropout = Dropout(rng, dropout_threshold, dropout_scale, b * heads + head)
    position, first, end = key_limits(b, rows, seqlen, key_start, key_lengths, query_offset, query_start)
    interval = Interval(position, first, end, window_left, window_right)
    low, high, block_low, block_high, full_low, full_high = key_range(
        m0, tl.minimum(m0 + BLOCK_M, rows) - 1, interval, BLOCK_N
    )

    i = m0 + tl.arange(0, BLOCK_M)
    query_tile = load_rows(queries, m0, 0, rows, BLOCK_M, D, BLOCK_D, True)
    acc = tl.zeros((BLOCK_M, BLOCK_DV), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    highest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    if lines is not None:
        listed, full, count = listed_line(
            lines, b, lines_stride_b, head, lines_stride_h, m0 // MASK_Q, blocks, 2, mask_tiles
        )
        acc, total, highest = attend(
            acc, total, highest, query_tile, None, keys, values, i, 0, full * MASK_K, 0, 0, listed, low, high, interval,
            scoring, dropout, D, BLOCK_D, 0, 0, DV, BLOCK_DV, BLOCK_N, None, PRECISION, LIMITED, MASK_Q, MASK_K,
        )  # fmt: skip
        acc, total, highest = attend(
            acc, total, highest, query_tile, None, keys, values, i, full * MASK_K, count * MASK_K, 0, 0, listed, low,
            high, interval, scoring, dropout, D, BLOCK_D, 0, 0, DV, BLOCK_DV, BLOCK_N, None, PRECISION, True, MASK_Q,
            MASK_K, True,
        )  # fmt: skip
    else:
        acc, total, highest = attend(
            acc, total, highest, query_tile, None, keys, values, i, full_low, full_high, 0, 0, None, low, high,
            interval, scoring, dropout, D, BLOCK_D, 0, 0, DV, BLOCK_DV, BLOCK_N, None, PRECISION, False,
        )  # fmt: skip
        gap = full_high - full_low
        acc, total, highest = attend(
            acc, total, highest, query_tile, None, keys, values, i, block_low, block_high - gap, full_low, gap, None,
            low, high, interval, scoring, dropout, D, BLOCK_D, 0, 0, DV, BLOCK_DV, BLOCK_N, None, PRECISION, True,
        )  # fmt: skip
    acc, lse_tile = finish(acc, total, highest, None if sinks is None else tl.load(sinks + head), dropout_scale)

    results = head_rows(out, batch, out_stride_b, head, out_stride_h, row0, out_stride_s)
    store_rows(results, m0, rows, acc, DV, BLOCK_DV)
    lses = head_rows(lse, batch, lse_stride_b, head, lse_stride_h, row0, 1)
    tl.store(lses.base + i, lse_tile, mask=i < rows)
