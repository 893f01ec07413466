"""What every dense kernel shares: sequences, the interval of keys, scores with all that is added to them, dropout.

Conventions of the dense kernels: an optional argument that is None costs nothing, because Triton compiles the branch
away. Scores are in units of log2, so that exponentials are exp2. `i` and `j` are positions within the sequence,
int32 tensors shaped to broadcast against each other, rows by keys or keys by rows.
"""

from typing import NamedTuple

import triton
import triton.language as tl

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN2: tl.constexpr = tl.constexpr(0.6931471805599453)

# Arguments that differ from call to call: Triton would compile a kernel anew where one is 1, or a multiple of 16.
VARYING = (
    *(
        "seqlen_q",
        "seqlen_k",
        "query_offset",
        "window_left",
        "window_right",
        "tiles",
        "tiles_q",
        "tiles_k",
        "sequences",
    ),
    *("splits", "chunk", "pages", "seqlen_new", "new_rows", "capacity", "positions", "lse_stride_b", "lse_stride_h"),
    *("block_table_stride", "dropout_threshold", "lines_stride_b", "lines_stride_h"),
)


class Rows(NamedTuple):
    """A (rows, columns) matrix in memory."""

    base: tl.tensor  # row 0
    stride: tl.tensor


class Pages(NamedTuple):
    """A (rows, columns) matrix in the pages of a cache."""

    base: tl.tensor  # row 0 of page 0
    stride: tl.tensor
    table: tl.tensor  # the pages in order
    page_stride: tl.tensor
    pages: tl.tensor  # how many there are


class Interval(NamedTuple):
    """Which keys exist, and which of them a row sees."""

    position: tl.tensor  # the key position of row 0
    first: tl.tensor
    end: tl.tensor
    window_left: tl.tensor
    window_right: tl.tensor


class Listed(NamedTuple):
    """Kept blocks of a block mask (fastattn/blockmask/lists.py): those of one line, or None in place of all of it."""

    blocks: tl.tensor  # pointer to the first entry: the block, its tile
    stride: tl.tensor  # from one entry to the next
    tiles: tl.tensor  # pointer


class Scoring(NamedTuple):
    """What makes a score of a product q . k, for one sequence and head (or one head a row)."""

    factor: tl.tensor  # scale * log2(e), or scale / softcap with a cap
    cap: tl.tensor  # softcap * log2(e), or None
    slope: tl.tensor  # of ALiBi, times log2(e), or None
    mask: tl.tensor  # pointer to (rows, keys): int8, 0 masks; float, added; or None
    mask_stride_q: tl.tensor
    mask_stride_k: tl.tensor
    rows: tl.tensor  # of the mask
    keys: tl.tensor


class Dropout(NamedTuple):
    rng: tl.tensor  # pointer to seed and offset, or None
    threshold: tl.tensor
    scale: tl.tensor  # 1 / (1 - p)
    head: tl.tensor  # b * Hq + h


@triton.jit
def sequence_bounds(b, total, cu_seqlens):
    """(first row, rows) of sequence b on one side; clamped, so that wrong boundaries read nothing out of bounds."""
    if cu_seqlens is None:
        first = 0
        last = total
    else:
        first = tl.minimum(tl.maximum(tl.load(cu_seqlens + b), 0), total)
        last = tl.minimum(tl.maximum(tl.load(cu_seqlens + b + 1), first), total)
    return first, last - first


@triton.jit
def head_rows(base, batch, stride_b, head, stride_h, row0, stride_s):
    """The `Rows` of one head from row0 on."""
    base += tl.cast(batch, tl.int64) * stride_b + tl.cast(head, tl.int64) * stride_h
    return Rows(base + tl.cast(row0, tl.int64) * stride_s, stride_s)


@triton.jit
def key_limits(b, seqlen_q, seqlen_k, key_start, key_lengths, query_offset, query_start):
    """(position, first, end) of the `Interval` of sequence b."""
    first = 0
    end = seqlen_k
    if key_start is not None:
        first = tl.maximum(tl.load(key_start + b), 0)
    if key_lengths is not None:
        end = tl.minimum(tl.load(key_lengths + b), seqlen_k)
    position = seqlen_k - seqlen_q if query_offset is None else query_offset
    if query_start is not None:
        position += tl.minimum(tl.maximum(tl.load(query_start + b), -(2**29)), 2**29)
    return position, first, end


@triton.jit
def key_range(i_first, i_last, interval, BLOCK: tl.constexpr):
    """The keys that rows i_first to i_last see: (low, high, block_low, block_high, full_low, full_high).

    Some row sees each of low to high; the blocks of them are block_low to block_high, and every row sees every key of
    the blocks full_low to full_high.
    """
    p_first, p_last = interval.position + i_first, interval.position + i_last
    low, high = interval.first, interval.end
    full_low, full_high = interval.first, interval.end
    if interval.window_left is not None:
        low = tl.maximum(low, p_first - interval.window_left)
        full_low = tl.maximum(full_low, p_last - interval.window_left)
    if interval.window_right is not None:
        high = tl.minimum(high, p_last + interval.window_right + 1)
        full_high = tl.minimum(full_high, p_first + interval.window_right + 1)
    high = tl.maximum(high, low)
    block_low = low // BLOCK * BLOCK
    block_high = tl.cdiv(high, BLOCK) * BLOCK
    block_high = tl.where(high > low, block_high, block_low)
    full_low = tl.minimum(tl.cdiv(full_low, BLOCK) * BLOCK, block_high)
    full_low = tl.maximum(full_low, block_low)
    full_high = tl.maximum(tl.minimum(tl.maximum(full_high, 0) // BLOCK * BLOCK, block_high), full_low)
    return low, high, block_low, block_high, full_low, full_high


@triton.jit
def row_range(n0, n_first, n_last, seqlen_q, interval, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """(block_low, block_high, full_low, full_high) of the rows that see the tile of keys at n0; `key_range` transposed.

    Of the tile's keys, n_first to n_last exist.
    """
    low, high = 0, seqlen_q
    full_low, full_high = 0, seqlen_q
    if interval.window_right is not None:
        behind = interval.window_right + interval.position
        low = tl.maximum(low, n_first - behind)
        full_low = tl.maximum(full_low, n0 + BLOCK_N - 1 - behind)
    if interval.window_left is not None:
        ahead = interval.window_left - interval.position + 1
        high = tl.minimum(high, n_last + ahead)
        full_high = tl.minimum(full_high, n0 + ahead)
    whole = (n_first == n0) & (n_last == n0 + BLOCK_N - 1)
    high = tl.where(n_last >= n_first, tl.maximum(high, low), low)
    block_low = low // BLOCK_M * BLOCK_M
    block_high = tl.where(high > low, tl.cdiv(high, BLOCK_M) * BLOCK_M, block_low)
    full_low = tl.maximum(tl.minimum(tl.cdiv(full_low, BLOCK_M) * BLOCK_M, block_high), block_low)
    full_high = tl.maximum(tl.minimum(tl.maximum(full_high, 0) // BLOCK_M * BLOCK_M, block_high), full_low)
    full_high = tl.where(whole, full_high, full_low)
    return block_low, block_high, full_low, full_high


@triton.jit
def listed_line(lines, b, lines_stride_b, head, lines_stride_h, n, blocks, stride, tiles):
    """(`Listed`, full blocks, all blocks) of line n of the lines of one sequence and head."""
    line = lines + tl.cast(b, tl.int64) * lines_stride_b + tl.cast(head, tl.int64) * lines_stride_h + 4 * n
    first = tl.load(line)
    return (
        Listed(blocks + first.to(tl.int64) * stride, stride, tiles),
        tl.load(line + 1) - first,
        tl.load(line + 2) - first,
    )


@triton.jit
def nth_line(lines, b, lines_stride_b, head, lines_stride_h, n):
    """The line that comes n-th when the longest come first."""
    return tl.load(lines + tl.cast(b, tl.int64) * lines_stride_b + tl.cast(head, tl.int64) * lines_stride_h + 4 * n + 3)


@triton.jit
def step_start(step, gap_at, gap, listed, SIZE: tl.constexpr, LIMIT: tl.constexpr):
    """Where a step of a walk begins: the step itself, past the gap, or in the block of SIZE that a list has there."""
    if listed is not None:
        return tl.load(listed.blocks + step // SIZE * listed.stride) * SIZE + step % SIZE
    elif LIMIT:
        return tl.where(step < gap_at, step, step + gap)
    else:
        return step


@triton.jit
def tile_keeps(tile, tiles, i, j, MASK_Q: tl.constexpr, MASK_K: tl.constexpr):
    """Which (i, j) a tile of a block mask keeps."""
    bits = tiles + tl.cast(tile, tl.int64) * (MASK_Q * MASK_K // 8)
    return (tl.load(bits + i % MASK_Q * (MASK_K // 8) + j % MASK_K // 8) >> (j % 8).to(tl.uint8)) & 1 != 0


@triton.jit
def listed_keeps(listed, step, i, j, SIZE: tl.constexpr, MASK_Q: tl.constexpr, MASK_K: tl.constexpr):
    """Which (i, j) the block at that step of the list keeps; it has a tile."""
    tile = tl.load(listed.blocks + step // SIZE * listed.stride + 1)
    return tile_keeps(tile, listed.tiles, i, j, MASK_Q, MASK_K)


@triton.jit
def _page(matrix, slot):
    """The page in that slot of the table; clamped, so that a wrong table reads nothing out of bounds."""
    page = tl.minimum(tl.maximum(tl.load(matrix.table + slot), 0), matrix.pages - 1)
    return page.to(tl.int64) * matrix.page_stride


@triton.jit
def load_rows(
    matrix, row0, low, high, BLOCK: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, LIMIT: tl.constexpr,
    PAGE: tl.constexpr = None, COLUMN: tl.constexpr = 0,
):  # fmt: skip
    """BLOCK rows of `Rows` from row0 on, columns COLUMN to COLUMN + D, as (BLOCK, BLOCK_D); of `Pages` of PAGE rows.

    0 past D and, with LIMIT, outside the rows [low, high): what lies there may be NaN, or no memory at all. row0 is a
    multiple of BLOCK.
    """
    rows = tl.arange(0, BLOCK)
    columns = tl.arange(0, BLOCK_D)
    if PAGE is None:
        offsets = tl.cast(row0, tl.int64) * matrix.stride + rows.to(tl.int64) * matrix.stride
    elif PAGE % BLOCK == 0:  # the block lies within one page
        offsets = _page(matrix, row0 // PAGE) + (row0 % PAGE + rows).to(tl.int64) * matrix.stride
    else:
        at = tl.minimum(tl.maximum(row0 + rows, low), tl.maximum(high - 1, 0))
        offsets = _page(matrix, at // PAGE) + (at % PAGE).to(tl.int64) * matrix.stride
    pointers = matrix.base + offsets[:, None] + (COLUMN + columns)[None, :]
    if LIMIT:
        valid = ((row0 + rows >= low) & (row0 + rows < high))[:, None]
        if D != BLOCK_D:
            valid = valid & (columns < D)[None, :]
        return tl.load(pointers, mask=valid, other=0.0)
    if D != BLOCK_D:
        return tl.load(pointers, mask=(columns < D)[None, :], other=0.0)
    return tl.load(pointers)


@triton.jit
def store_rows(matrix, row0, rows, tile, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Store a tile of `Rows` in one piece from row0 on, as far as there are rows and columns."""
    i = row0 + tl.arange(0, tile.shape[0])
    columns = tl.arange(0, BLOCK_D)[None, :]
    pointers = matrix.base + i.to(tl.int64)[:, None] * matrix.stride + columns
    tl.store(pointers, tile.to(matrix.base.dtype.element_ty), mask=(i < rows)[:, None] & (columns < D))


@triton.jit
def soft_tanh(x):
    """Hyperbolic tangent to float32's precision, near zero too, without a vendor's library."""
    square = x * x
    series = x + x * square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * (62 / 2835))))
    far = 1 - 2 / (tl.exp(2 * tl.minimum(tl.maximum(x, -20.0), 20.0)) + 1)
    return tl.where(square < 0.0625, series, far)


@triton.jit
def sees(i, j, interval):
    """Which (i, j) the interval admits."""
    seen = (j >= interval.first) & (j < interval.end)
    if interval.window_left is not None:
        seen = seen & (j >= i + interval.position - interval.window_left)
    if interval.window_right is not None:
        seen = seen & (j <= i + interval.position + interval.window_right)
    return seen


@triton.jit
def full_scores(products, i, j, position, scoring):
    """(scores in log2 units, tanh of the capped ones or 0) of a tile of products q . k; -inf where the mask says so."""
    scores = products * scoring.factor
    capped = 0.0
    if scoring.cap is not None:
        capped = soft_tanh(scores)
        scores = scoring.cap * capped
    if scoring.slope is not None:
        scores -= scoring.slope * tl.abs(i + position - j).to(tl.float32)
    if scoring.mask is not None:
        inside = (i < scoring.rows) & (j < scoring.keys)
        pointers = scoring.mask + i.to(tl.int64) * scoring.mask_stride_q + j.to(tl.int64) * scoring.mask_stride_k
        if scoring.mask.dtype.element_ty == tl.int8:
            scores = tl.where(tl.load(pointers, mask=inside, other=0) != 0, scores, float("-inf"))
        else:
            scores += tl.load(pointers, mask=inside, other=0.0).to(tl.float32) * LOG2E
    return scores, capped


@triton.jit
def dropout_keep(dropout, i, j0, BLOCK_N: tl.constexpr):
    """Which elements of rows i (BLOCK_M,) by keys j0 to j0 + BLOCK_N dropout keeps; j0 is a multiple of 4.

    All four words of a Philox call serve: word j % 4 of counter (j // 4, i, head, offset) belongs to key j.
    """
    seed = tl.load(dropout.rng)
    offset = tl.load(dropout.rng + 1)
    quads = (j0 // 4 + tl.arange(0, BLOCK_N // 4))[None, :].to(tl.uint32)
    rows = i[:, None].to(tl.uint32)
    zero = quads * 0 + rows * 0
    head = tl.cast(dropout.head, tl.uint32) + zero
    w0, w1, w2, w3 = tl.philox(seed, quads + zero, rows + zero, head, offset.to(tl.uint32) + zero)
    limit = tl.cast(dropout.threshold, tl.int64)
    even = tl.join(w0.to(tl.int64) >= limit, w2.to(tl.int64) >= limit)
    odd = tl.join(w1.to(tl.int64) >= limit, w3.to(tl.int64) >= limit)
    return tl.reshape(tl.join(even, odd), (i.shape[0], BLOCK_N))
