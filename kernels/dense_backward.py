"""Dense attention, backward: the probabilities are recomputed from the LSE, tile by tile.

Three kernels over the same formulas, none of which adds atomically, so that repeats are bit-identical: one holds a tile
of keys and walks the rows (gradients of key and value), one holds a tile of rows and walks the keys (gradient of
query), one holds a tile of the bias and walks the axes that it broadcasts over (gradient of the bias).
"""

import triton
import triton.language as tl

from fastattn.kernels.dense_scores import (
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
    row_range,
    sees,
    sequence_bounds,
    step_start,
    store_rows,
    tile_keeps,
)


@triton.jit(do_not_specialize=VARYING)
def delta_kernel(
    out, out_stride_b, out_stride_h, out_stride_s,
    grad_out, grad_out_stride_b, grad_out_stride_h, grad_out_stride_s,
    grad_lse, grad_lse_stride_b, grad_lse_stride_h, grad_lse_stride_s,
    delta, heads, tiles, seqlen_q,
    DV: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """delta (B, Hq, Sq) = rowsum(out * grad_out) - grad_lse: what the softmax's gradient takes off every row."""
    program = tl.program_id(0)
    m0 = program % tiles * BLOCK_M
    head = program // tiles % heads
    b = program // tiles // heads
    outs = head_rows(out, b, out_stride_b, head, out_stride_h, 0, out_stride_s)
    grads = head_rows(grad_out, b, grad_out_stride_b, head, grad_out_stride_h, 0, grad_out_stride_s)
    out_tile = load_rows(outs, m0, 0, seqlen_q, BLOCK_M, DV, BLOCK_DV, True)
    grad_tile = load_rows(grads, m0, 0, seqlen_q, BLOCK_M, DV, BLOCK_DV, True)
    found = tl.sum(out_tile.to(tl.float32) * grad_tile.to(tl.float32), 1)
    i = m0 + tl.arange(0, BLOCK_M)
    if grad_lse is not None:
        lses = head_rows(grad_lse, b, grad_lse_stride_b, head, grad_lse_stride_h, 0, grad_lse_stride_s)
        found -= tl.load(lses.base + i.to(tl.int64) * lses.stride, mask=i < seqlen_q, other=0.0)
    tl.store(delta + (b.to(tl.int64) * heads + head) * seqlen_q + i, found, mask=i < seqlen_q)


@triton.jit
def _load_row_values(lse, delta, at, i, rows):
    """(LSE in log2 units, +inf for rows without keys, whose probabilities are then 0; delta) of rows i."""
    found = tl.load(lse + at + i, mask=i < rows, other=float("-inf"))
    found = tl.where(found == float("-inf"), float("inf"), found * LOG2E)
    return found, tl.load(delta + at + i, mask=i < rows, other=0.0)


@triton.jit
def _gradients(scores, capped, products, lse, delta, keep, cap, dropout_scale):
    """(probabilities after dropout, gradient of the scores, gradient of the products but for the scale) of a tile.

    products is grad_out . value; keep is None without dropout.
    """
    weights = tl.exp2(scores - lse)
    dropped = weights
    if keep is not None:
        dropped = tl.where(keep, weights * dropout_scale, 0.0)
        products = tl.where(keep, products * dropout_scale, 0.0)
    grad_scores = weights * (products - delta)
    grad_products = grad_scores
    if cap is not None:
        grad_products = grad_scores * (1.0 - capped * capped)
    return dropped, grad_scores, grad_products


@triton.jit
def _walk_rows(
    grad_key, grad_value, key, value, queries, grads, lse, delta, at, j, n0, begin, stop, gap_at, gap, listed, rows,
    interval, scoring, dropout,
    D: tl.constexpr, BLOCK_D: tl.constexpr, DV: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, LIMIT: tl.constexpr,
    MASK_Q: tl.constexpr = 0, MASK_K: tl.constexpr = 0, TILES: tl.constexpr = False,
):  # fmt: skip
    """Rows from begin to stop, skipping `gap` rows at gap_at, for one tile of keys; tiles are keys by rows.

    With `listed`, as in `attend`: begin and stop count MASK_Q for each block of rows in its list.
    """
    for step in range(begin, stop, BLOCK_M):
        m0 = step_start(step, gap_at, gap, listed, MASK_Q, LIMIT)
        i = m0 + tl.arange(0, BLOCK_M)
        query = load_rows(queries, m0, 0, rows, BLOCK_M, D, BLOCK_D, LIMIT)
        lse_tile, delta_tile = _load_row_values(lse, delta, at, i, rows)
        products = tl.dot(key, tl.trans(query), input_precision=PRECISION)
        scores, capped = full_scores(products, i[None, :], j[:, None], interval.position, scoring)
        if LIMIT:
            scores = tl.where(sees(i[None, :], j[:, None], interval), scores, float("-inf"))
        if TILES:
            kept = listed_keeps(listed, step, i[None, :], j[:, None], MASK_Q, MASK_Q, MASK_K)
            scores = tl.where(kept, scores, float("-inf"))
        keep = None
        if dropout.rng is not None:
            keep = tl.trans(dropout_keep(dropout, i, n0, BLOCK_N))
        grad_out = load_rows(grads, m0, 0, rows, BLOCK_M, DV, BLOCK_DV, LIMIT)
        products = tl.dot(value, tl.trans(grad_out), input_precision=PRECISION)
        dropped, _, grad_products = _gradients(
            scores, capped, products, lse_tile[None, :], delta_tile[None, :], keep, scoring.cap, dropout.scale
        )
        grad_value = tl.dot(dropped.to(grad_out.dtype), grad_out, grad_value, input_precision=PRECISION)
        grad_key = tl.dot(grad_products.to(query.dtype), query, grad_key, input_precision=PRECISION)
    return grad_key, grad_value


@triton.jit(do_not_specialize=VARYING)
def key_value_kernel(
    query, query_stride_b, query_stride_h, query_stride_s,
    key, key_stride_b, key_stride_h, key_stride_s,
    value, value_stride_b, value_stride_h, value_stride_s,
    mask, mask_stride_b, mask_stride_h, mask_stride_q, mask_stride_k,
    lse, delta,
    grad_out, grad_out_stride_b, grad_out_stride_h, grad_out_stride_s,
    grad_key, grad_key_stride_b, grad_key_stride_h, grad_key_stride_s,
    grad_value, grad_value_stride_b, grad_value_stride_h, grad_value_stride_s,
    lines, lines_stride_b, lines_stride_h, blocks, mask_tiles,
    alibi_slopes, query_start, key_start, key_lengths, cu_seqlens_q, cu_seqlens_k, rng,
    heads, tiles, seqlen_q, seqlen_k, query_offset, window_left, window_right,
    scale, factor, cap, dropout_threshold, dropout_scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, DV: tl.constexpr, BLOCK_DV: tl.constexpr, GROUP: tl.constexpr,
    PACKED: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    MASK_Q: tl.constexpr, MASK_K: tl.constexpr, LIMITED: tl.constexpr,
):  # fmt: skip
    """Gradients of key and value. Grid: (tiles of keys * kv heads * sequences,); heads counts the query's.

    lines, blocks and mask_tiles are a block mask's columns, column_blocks and tiles, or None.
    """
    program = tl.program_id(0)
    tile = program % tiles
    kv_head = program // tiles % (heads // GROUP)
    b = program // tiles // (heads // GROUP)
    if lines is not None:  # the longest columns first
        parts = MASK_K // BLOCK_N
        tile = nth_line(lines, b, lines_stride_b, kv_head * GROUP, lines_stride_h, tile // parts) * parts + tile % parts
    n0 = tile * BLOCK_N
    row0, rows = sequence_bounds(b, seqlen_q, cu_seqlens_q)
    key0, seqlen = sequence_bounds(b, seqlen_k, cu_seqlens_k)
    if n0 >= seqlen:
        return
    batch = 0 if PACKED else b
    position, first, end = key_limits(b, rows, seqlen, key_start, key_lengths, query_offset, query_start)
    interval = Interval(position, first, end, window_left, window_right)
    keys = head_rows(key, batch, key_stride_b, kv_head, key_stride_h, key0, key_stride_s)
    values = head_rows(value, batch, value_stride_b, kv_head, value_stride_h, key0, value_stride_s)
    # Keys that no row sees may be NaN.
    low, high, _, _, _, _ = key_range(0, rows - 1, interval, BLOCK_N)
    key_tile = load_rows(keys, n0, low, high, BLOCK_N, D, BLOCK_D, True)
    value_tile = load_rows(values, n0, low, high, BLOCK_N, DV, BLOCK_DV, True)
    n_first = tl.maximum(interval.first, n0)
    n_last = tl.minimum(interval.end, n0 + BLOCK_N) - 1
    block_low, block_high, full_low, full_high = row_range(n0, n_first, n_last, rows, interval, BLOCK_M, BLOCK_N)
    gap = full_high - full_low
    j = n0 + tl.arange(0, BLOCK_N)
    grad_key_tile = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    grad_value_tile = tl.zeros((BLOCK_N, BLOCK_DV), tl.float32)
    for member in range(GROUP):
        head = kv_head * GROUP + member
        queries = head_rows(query, batch, query_stride_b, head, query_stride_h, row0, query_stride_s)
        grads = head_rows(grad_out, batch, grad_out_stride_b, head, grad_out_stride_h, row0, grad_out_stride_s)
        slope = None if alibi_slopes is None else tl.load(alibi_slopes + b * heads + head) * LOG2E
        mask_at = mask
        if mask is not None:
            mask_at += b.to(tl.int64) * mask_stride_b + head.to(tl.int64) * mask_stride_h
        scoring = Scoring(factor, cap, slope, mask_at, mask_stride_q, mask_stride_k, rows, seqlen)
        dropout = Dropout(rng, dropout_threshold, dropout_scale, b * heads + head)
        at = (tl.cast(batch, tl.int64) * heads + head) * seqlen_q + row0
        if lines is not None:
            listed, full, count = listed_line(
                lines, b, lines_stride_b, head, lines_stride_h, n0 // MASK_K, blocks, 3, mask_tiles
            )
            # Full blocks of rows may end past the last row, so the walk always looks at limits.
            grad_key_tile, grad_value_tile = _walk_rows(
                grad_key_tile, grad_value_tile, key_tile, value_tile, queries, grads, lse, delta, at, j, n0, 0,
                full * MASK_Q, 0, 0, listed, rows, interval, scoring, dropout, D, BLOCK_D, DV, BLOCK_DV, BLOCK_M,
                BLOCK_N, PRECISION, True, MASK_Q, MASK_K,
            )  # fmt: skip
            grad_key_tile, grad_value_tile = _walk_rows(
                grad_key_tile, grad_value_tile, key_tile, value_tile, queries, grads, lse, delta, at, j, n0,
                full * MASK_Q, count * MASK_Q, 0, 0, listed, rows, interval, scoring, dropout, D, BLOCK_D, DV, BLOCK_DV,
                BLOCK_M, BLOCK_N, PRECISION, True, MASK_Q, MASK_K, True,
            )  # fmt: skip
        else:
            grad_key_tile, grad_value_tile = _walk_rows(
                grad_key_tile, grad_value_tile, key_tile, value_tile, queries, grads, lse, delta, at, j, n0, full_low,
                full_high, 0, 0, None, rows, interval, scoring, dropout, D, BLOCK_D, DV, BLOCK_DV, BLOCK_M, BLOCK_N,
                PRECISION, False,
            )  # fmt: skip
            grad_key_tile, grad_value_tile = _walk_rows(
                grad_key_tile, grad_value_tile, key_tile, value_tile, queries, grads, lse, delta, at, j, n0, block_low,
                block_high - gap, full_low, gap, None, rows, interval, scoring, dropout, D, BLOCK_D, DV, BLOCK_DV,
                BLOCK_M, BLOCK_N, PRECISION, True,
            )  # fmt: skip
    results = head_rows(grad_key, batch, grad_key_stride_b, kv_head, grad_key_stride_h, key0, grad_key_stride_s)
    store_rows(results, n0, seqlen, grad_key_tile * scale, D, BLOCK_D)
    results = head_rows(grad_value, batch, grad_value_stride_b, kv_head, grad_value_stride_h, key0, grad_value_stride_s)
    store_rows(results, n0, seqlen, grad_value_tile, DV, BLOCK_DV)


@triton.jit
def _walk_keys(
    grad_query, query, grad_out, lse, delta, keys, values, i, begin, stop, gap_at, gap, listed, low, high,
    interval, scoring, dropout,
    D: tl.constexpr, BLOCK_D: tl.constexpr, DV: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr, LIMIT: tl.constexpr,
    MASK_Q: tl.constexpr = 0, MASK_K: tl.constexpr = 0, TILES: tl.constexpr = False,
):  # fmt: skip
    """Keys from begin to stop, skipping `gap` keys at gap_at, for one tile of rows; `listed` as in `attend`."""
    for step in range(begin, stop, BLOCK_N):
        j0 = step_start(step, gap_at, gap, listed, MASK_K, LIMIT)
        j = (j0 + tl.arange(0, BLOCK_N))[None, :]
        key = load_rows(keys, j0, low, high, BLOCK_N, D, BLOCK_D, LIMIT)
        value = load_rows(values, j0, low, high, BLOCK_N, DV, BLOCK_DV, LIMIT)
        products = tl.dot(query, tl.trans(key), input_precision=PRECISION)
        scores, capped = full_scores(products, i[:, None], j, interval.position, scoring)
        if LIMIT:
            scores = tl.where(sees(i[:, None], j, interval), scores, float("-inf"))
        if TILES:
            kept = listed_keeps(listed, step, i[:, None], j, MASK_K, MASK_Q, MASK_K)
            scores = tl.where(kept, scores, float("-inf"))
        keep = None
        if dropout.rng is not None:
            keep = dropout_keep(dropout, i, j0, BLOCK_N)
        products = tl.dot(grad_out, tl.trans(value), input_precision=PRECISION)
        _, _, grad_products = _gradients(
            scores, capped, products, lse[:, None], delta[:, None], keep, scoring.cap, dropout.scale
        )
        grad_query = tl.dot(grad_products.to(key.dtype), key, grad_query, input_precision=PRECISION)
    return grad_query


@triton.jit(do_not_specialize=VARYING)
def query_kernel(
    query, query_stride_b, query_stride_h, query_stride_s,
    key, key_stride_b, key_stride_h, key_stride_s,
    value, value_stride_b, value_stride_h, value_stride_s,
    mask, mask_stride_b, mask_stride_h, mask_stride_q, mask_stride_k,
    lse, delta,
    grad_out, grad_out_stride_b, grad_out_stride_h, grad_out_stride_s,
    grad_query, grad_query_stride_b, grad_query_stride_h, grad_query_stride_s,
    lines, lines_stride_b, lines_stride_h, blocks, mask_tiles,
    alibi_slopes, query_start, key_start, key_lengths, cu_seqlens_q, cu_seqlens_k, rng,
    heads, tiles, seqlen_q, seqlen_k, query_offset, window_left, window_right,
    scale, factor, cap, dropout_threshold, dropout_scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, DV: tl.constexpr, BLOCK_DV: tl.constexpr, GROUP: tl.constexpr,
    PACKED: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    MASK_Q: tl.constexpr, MASK_K: tl.constexpr, LIMITED: tl.constexpr,
):  # fmt: skip
    """Gradient of query. Grid: (tiles of rows * heads * sequences,). A block mask as in `forward_kernel`."""
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
    grads = head_rows(grad_out, batch, grad_out_stride_b, head, grad_out_stride_h, row0, grad_out_stride_s)
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
    gap = full_high - full_low
    i = m0 + tl.arange(0, BLOCK_M)
    at = (tl.cast(batch, tl.int64) * heads + head) * seqlen_q + row0
    lse_tile, delta_tile = _load_row_values(lse, delta, at, i, rows)
    query_tile = load_rows(queries, m0, 0, rows, BLOCK_M, D, BLOCK_D, True)
    grad_tile = load_rows(grads, m0, 0, rows, BLOCK_M, DV, BLOCK_DV, True)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    if lines is not None:
        listed, full, count = listed_line(
            lines, b, lines_stride_b, head, lines_stride_h, m0 // MASK_Q, blocks, 2, mask_tiles
        )
        acc = _walk_keys(
            acc, query_tile, grad_tile, lse_tile, delta_tile, keys, values, i, 0, full * MASK_K, 0, 0, listed, low,
            high, interval, scoring, dropout, D, BLOCK_D, DV, BLOCK_DV, BLOCK_N, PRECISION, LIMITED, MASK_Q, MASK_K,
        )  # fmt: skip
        acc = _walk_keys(
            acc, query_tile, grad_tile, lse_tile, delta_tile, keys, values, i, full * MASK_K, count * MASK_K,
            0, 0, listed, low, high, interval, scoring, dropout, D, BLOCK_D, DV, BLOCK_DV, BLOCK_N, PRECISION, True,
            MASK_Q, MASK_K, True,
        )  # fmt: skip
    else:
        acc = _walk_keys(
            acc, query_tile, grad_tile, lse_tile, delta_tile, keys, values, i, full_low, full_high, 0, 0, None,
            low, high, interval, scoring, dropout, D, BLOCK_D, DV, BLOCK_DV, BLOCK_N, PRECISION, False,
        )  # fmt: skip
        acc = _walk_keys(
            acc, query_tile, grad_tile, lse_tile, delta_tile, keys, values, i, block_low, block_high - gap,
            full_low, gap, None, low, high, interval, scoring, dropout, D, BLOCK_D, DV, BLOCK_DV, BLOCK_N, PRECISION,
            True,
        )  # fmt: skip
    results = head_rows(grad_query, batch, grad_query_stride_b, head, grad_query_stride_h, row0, grad_query_stride_s)
    store_rows(results, m0, rows, acc * scale, D, BLOCK_D)


@triton.jit
def _find_block(listed, count, block):
    """The place of a block among the first count entries of a list of rows; -1 where it is not there."""
    place = -1
    for n in range(0, count):
        if tl.load(listed.blocks + 2 * n) == block:
            place = n
    return place


@triton.jit(do_not_specialize=VARYING)
def bias_kernel(
    query, query_stride_b, query_stride_h, query_stride_s,
    key, key_stride_b, key_stride_h, key_stride_s,
    value, value_stride_b, value_stride_h, value_stride_s,
    mask, mask_stride_b, mask_stride_h, mask_stride_q, mask_stride_k,
    lse, delta,
    grad_out, grad_out_stride_b, grad_out_stride_h, grad_out_stride_s,
    grad_mask, grad_mask_stride_b, grad_mask_stride_h, grad_mask_stride_q, grad_mask_stride_k,
    lines, lines_stride_b, lines_stride_h, blocks, mask_tiles,
    alibi_slopes, query_start, key_start, key_lengths, cu_seqlens_q, cu_seqlens_k, rng,
    heads, sequences, mask_b, mask_h, mask_q, mask_k, tiles_q, tiles_k,
    seqlen_q, seqlen_k, query_offset, window_left, window_right, factor, cap, dropout_threshold, dropout_scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, DV: tl.constexpr, BLOCK_DV: tl.constexpr, GROUP: tl.constexpr,
    PACKED: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    MASK_Q: tl.constexpr, MASK_K: tl.constexpr, LIMITED: tl.constexpr,
):  # fmt: skip
    """Gradient of a bias (mask_b, mask_h, mask_q, mask_k), each axis full or 1, summed over the axes that are 1.

    Grid: (tiles of the bias * mask_h * mask_b,), tiles_k fastest; tiles_q and tiles_k count the tiles of full axes.
    """
    program = tl.program_id(0)
    own_k = tiles_k if mask_k > 1 else 1
    own_q = tiles_q if mask_q > 1 else 1
    tile_k = program % own_k
    tile_q = program // own_k % own_q
    mask_head = program // own_k // own_q % mask_h
    mask_batch = program // own_k // own_q // mask_h
    loop_k = tiles_k // own_k
    loop_q = tiles_q // own_q
    loop_h = heads // mask_h
    loop_b = sequences // mask_b
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in range(loop_b * loop_h * loop_q * loop_k):
        n0 = (tile_k + step % loop_k) * BLOCK_N
        m0 = (tile_q + step // loop_k % loop_q) * BLOCK_M
        head = mask_head + step // loop_k // loop_q % loop_h
        b = mask_batch + step // loop_k // loop_q // loop_h
        row0, rows = sequence_bounds(b, seqlen_q, cu_seqlens_q)
        key0, seqlen = sequence_bounds(b, seqlen_k, cu_seqlens_k)
        position, first, end = key_limits(b, rows, seqlen, key_start, key_lengths, query_offset, query_start)
        interval = Interval(position, first, end, window_left, window_right)
        low, high, block_low, block_high, _, _ = key_range(m0, tl.minimum(m0 + BLOCK_M, rows) - 1, interval, BLOCK_N)
        kept = (m0 < rows) & (n0 >= block_low) & (n0 < block_high)
        mask_tile = -1
        if lines is not None:
            listed, _full, count = listed_line(
                lines, b, lines_stride_b, head, lines_stride_h, m0 // MASK_Q, blocks, 2, mask_tiles
            )
            place = _find_block(listed, tl.where(kept, count, 0), n0 // MASK_K)
            kept = kept & (place >= 0)
            mask_tile = tl.load(listed.blocks + 2 * place + 1, mask=kept, other=-1)
        if kept:
            batch = 0 if PACKED else b
            queries = head_rows(query, batch, query_stride_b, head, query_stride_h, row0, query_stride_s)
            grads = head_rows(grad_out, batch, grad_out_stride_b, head, grad_out_stride_h, row0, grad_out_stride_s)
            keys = head_rows(key, batch, key_stride_b, head // GROUP, key_stride_h, key0, key_stride_s)
            values = head_rows(value, batch, value_stride_b, head // GROUP, value_stride_h, key0, value_stride_s)
            slope = None if alibi_slopes is None else tl.load(alibi_slopes + b * heads + head) * LOG2E
            mask_at = mask
            if mask is not None:
                mask_at += b.to(tl.int64) * mask_stride_b + head.to(tl.int64) * mask_stride_h
            scoring = Scoring(factor, cap, slope, mask_at, mask_stride_q, mask_stride_k, rows, seqlen)
            i = m0 + tl.arange(0, BLOCK_M)
            j = (n0 + tl.arange(0, BLOCK_N))[None, :]
            at = (tl.cast(batch, tl.int64) * heads + head) * seqlen_q + row0
            lse_tile, delta_tile = _load_row_values(lse, delta, at, i, rows)
            query_tile = load_rows(queries, m0, 0, rows, BLOCK_M, D, BLOCK_D, True)
            key_tile = load_rows(keys, n0, low, high, BLOCK_N, D, BLOCK_D, True)
            products = tl.dot(query_tile, tl.trans(key_tile), input_precision=PRECISION)
            scores, capped = full_scores(products, i[:, None], j, interval.position, scoring)
            scores = tl.where(sees(i[:, None], j, interval), scores, float("-inf"))
            if lines is not None:  # noqa: SIM102 (decided at compile time)
                if mask_tile >= 0:
                    passes = tile_keeps(mask_tile, mask_tiles, i[:, None], j, MASK_Q, MASK_K)
                    scores = tl.where(passes, scores, float("-inf"))
            keep = None
            if rng is not None:
                dropout = Dropout(rng, dropout_threshold, dropout_scale, b * heads + head)
                keep = dropout_keep(dropout, i, n0, BLOCK_N)
            grad_tile = load_rows(grads, m0, 0, rows, BLOCK_M, DV, BLOCK_DV, True)
            value_tile = load_rows(values, n0, low, high, BLOCK_N, DV, BLOCK_DV, True)
            products = tl.dot(grad_tile, tl.trans(value_tile), input_precision=PRECISION)
            _dropped, grad_scores, _grad_products = _gradients(
                scores, capped, products, lse_tile[:, None], delta_tile[:, None], keep, cap, dropout_scale
            )
            acc += grad_scores
    base = grad_mask + mask_batch.to(tl.int64) * grad_mask_stride_b + mask_head.to(tl.int64) * grad_mask_stride_h
    i = tile_q * BLOCK_M + tl.arange(0, BLOCK_M).to(tl.int64)
    j = tile_k * BLOCK_N + tl.arange(0, BLOCK_N).to(tl.int64)
    kind = grad_mask.dtype.element_ty
    if mask_q > 1 and mask_k > 1:
        pointers = base + i[:, None] * grad_mask_stride_q + j[None, :] * grad_mask_stride_k
        tl.store(pointers, acc.to(kind), mask=(i < mask_q)[:, None] & (j < mask_k)[None, :])
    elif mask_q > 1:
        tl.store(base + i * grad_mask_stride_q, tl.sum(acc, 1).to(kind), mask=i < mask_q)
    elif mask_k > 1:
        tl.store(base + j * grad_mask_stride_k, tl.sum(acc, 0).to(kind), mask=j < mask_k)
    else:
        tl.store(base, tl.sum(acc).to(kind))
