"""What every linear kernel shares: where a chunk lies, tiles, feature maps, decay.

Conventions of the linear kernels: a sequence is cut into chunks of CHUNK steps, counted from its own start, and what is
kept of a chunk lies in its slot. i are rows within the sequence. What is kept of a step is float32 and contiguous,
(B, H, N); a state is kv (M, DV) and normalizer (M,). Operands of matrix products are bfloat16 for bfloat16 inputs and
else float32, because sums over keys leave float16's range; sums are float32.

Forward and backward are the same kernels, run in both directions: what the keys and values are to a query, the queries
and gradients of the output are to a key, with time reversed.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from fastattn.kernels.dense_scores import Rows, head_rows, sequence_bounds

# Arguments that differ from call to call: Triton would compile a kernel anew where one is 1, or a multiple of 16.
VARYING = ("heads", "length", "slots", "parts")


class Source(NamedTuple):
    """Query or key (B, H, N, D), and what their features take besides."""

    base: tl.tensor
    stride_b: tl.tensor
    stride_h: tl.tensor
    stride_s: tl.tensor
    group: tl.tensor  # query heads to each of its heads
    shift: tl.tensor  # per step, what exponents of softmax features lack; or None
    mask: tl.tensor  # (B, N) int8, 0 masks the step; or None
    mask_stride: tl.tensor


class Values(NamedTuple):
    """Values or gradients of the output (B, H, N, DV), as kernels use them: times scale and factor."""

    base: tl.tensor
    stride_b: tl.tensor
    stride_h: tl.tensor
    stride_s: tl.tensor
    group: tl.tensor
    scale: tl.tensor
    factor: tl.tensor  # per step, or None
    extra: tl.tensor  # per step, what stands in the normaliser's column; None: 1


class Map(NamedTuple):
    """The feature map's parameters."""

    projection: tl.tensor  # (M, D) in the operands' dtype, or None
    residual: tl.tensor  # what the former lacks of float32, likewise; None where it lacks nothing
    bias: tl.tensor  # (M,) float32, or None
    eps: tl.tensor


class State(NamedTuple):
    """States one after another, or None."""

    kv: tl.tensor
    normalizer: tl.tensor


class Steps(NamedTuple):
    """Some steps of one head of one sequence."""

    batch: tl.tensor
    head: tl.tensor  # of the query
    first: tl.tensor  # the sequence's first row in memory
    rows: tl.tensor  # the sequence's
    at: tl.tensor  # where what is kept of the sequence's steps begins
    i: tl.tensor  # the steps, (CHUNK,)
    last: tl.tensor  # the chunk's last row


@triton.jit
def chunk_steps(batch, head, heads, first, rows, length, chunk, CHUNK: tl.constexpr):
    """The `Steps` of a chunk of a sequence."""
    at = (tl.cast(batch, tl.int64) * heads + head) * length + first
    i = chunk * CHUNK + tl.arange(0, CHUNK)
    return Steps(batch, head, first, rows, at, i, tl.minimum(chunk * CHUNK + CHUNK, rows) - 1)


@triton.jit
def slot_steps(program, heads, slots, length, cu_seqlens, slot_sequences, CHUNK: tl.constexpr):
    """(steps, sequence, whether the slot holds a chunk) of slot program % slots of head program // slots."""
    slot = program % slots
    head = program // slots % heads
    if cu_seqlens is None:
        b = program // slots // heads
        batch, first, rows, chunk = b, 0, length, slot
    else:
        b = tl.load(slot_sequences + slot)
        first, rows = sequence_bounds(b, length, cu_seqlens)
        batch, chunk = 0, slot - first_slot(b, first, cu_seqlens, CHUNK)
    steps = chunk_steps(batch, head, heads, first, rows, length, chunk, CHUNK)
    return steps, b, (chunk >= 0) & (chunk * CHUNK < rows)


@triton.jit
def first_slot(b, first, cu_seqlens, CHUNK: tl.constexpr):
    """The slot of the first chunk of sequence b, of those of its head."""
    return 0 if cu_seqlens is None else first // CHUNK + b


@triton.jit
def rows_of(source, steps):
    """The `Rows` of a `Source` or of `Values` in the steps' sequence and head."""
    return head_rows(
        source.base, steps.batch, source.stride_b, steps.head // source.group, source.stride_h, steps.first,
        source.stride_s,
    )  # fmt: skip


@triton.jit
def present(source, steps):
    """Which steps there are, those of a masked key not among them."""
    valid = steps.i < steps.rows
    if source.mask is not None:
        pointers = source.mask + tl.cast(steps.batch, tl.int64) * source.mask_stride + steps.first + steps.i
        valid = valid & (tl.load(pointers, mask=valid, other=0) != 0)
    return valid


@triton.jit
def load_tile(rows, i, valid, column0, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    """Rows i, columns column0 to column0 + BLOCK; 0 where a row is not valid and past COLUMNS."""
    columns = column0 + tl.arange(0, BLOCK)
    mask = valid[:, None]
    if COLUMNS % BLOCK != 0:
        mask = mask & (columns < COLUMNS)[None, :]
    return tl.load(rows.base + i.to(tl.int64)[:, None] * rows.stride + columns[None, :], mask=mask, other=0.0)


@triton.jit
def store_tile(rows, i, valid, column0, tile, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    """What `load_tile` loads."""
    columns = column0 + tl.arange(0, BLOCK)
    mask = valid[:, None]
    if COLUMNS % BLOCK != 0:
        mask = mask & (columns < COLUMNS)[None, :]
    pointers = rows.base + i.to(tl.int64)[:, None] * rows.stride + columns[None, :]
    tl.store(pointers, tile.to(rows.base.dtype.element_ty), mask=mask)


@triton.jit
def load_values(values, rows, steps, valid, v0, DV: tl.constexpr, BLOCK_V: tl.constexpr, OPERAND: tl.constexpr):
    """(steps, BLOCK_V) of `Values` as an operand."""
    tile = load_tile(rows, steps.i, valid, v0, DV, BLOCK_V)
    if values.factor is not None:
        factor = tl.load(values.factor + steps.at + steps.i, mask=valid, other=0.0)
        tile = tile.to(tl.float32) * factor[:, None]
    if values.scale is not None:
        tile = tile.to(tl.float32) * values.scale
    return tile.to(OPERAND)


@triton.jit
def load_extra(values, steps, valid):
    """What stands in the normaliser's column, (steps,)."""
    if values.extra is None:
        found = valid.to(tl.float32)
    else:
        found = tl.load(values.extra + steps.at + steps.i, mask=valid, other=0.0)
    return found


@triton.jit
def load_normalizer(normalizer, index, m, M: tl.constexpr):
    return tl.load(normalizer + index * M + m, mask=m < M, other=0.0)


@triton.jit
def exponents(
    rows, steps, valid, m, map, M: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr
):
    """W x + bias of features m, (steps, features)."""
    found = tl.zeros((steps.i.shape[0], m.shape[0]), tl.float32)
    BLOCK: tl.constexpr = 64 if BLOCK_D > 64 else BLOCK_D  # of wide heads a part at a time, to spare registers
    for d0 in range(0, D, BLOCK):
        weights = load_tile(Rows(map.projection, D), m, m < M, d0, D, BLOCK)
        x = load_tile(rows, steps.i, valid, d0, D, BLOCK).to(weights.dtype)
        found = tl.dot(x, tl.trans(weights), found, input_precision=PRECISION)
        if map.residual is not None:  # exp makes a large error of an exponent's small one
            rest = load_tile(Rows(map.residual, D), m, m < M, d0, D, BLOCK)
            found = tl.dot(x, tl.trans(rest), found, input_precision=PRECISION)
    if map.bias is not None:
        found += tl.load(map.bias + m, mask=m < M, other=0.0)[None, :]
    return found


@triton.jit
def features(
    source, rows, steps, valid, m0, map,
    FEATURE: tl.constexpr, M: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """(arguments of f, features) m0 to m0 + BLOCK_M, float32; features are 0 where a step is not valid."""
    m = m0 + tl.arange(0, BLOCK_M)
    if map.projection is None:
        y = load_tile(rows, steps.i, valid, m0, M, BLOCK_M).to(tl.float32)
    else:
        y = exponents(rows, steps, valid, m, map, M, D, BLOCK_D, PRECISION)
    found = y
    if FEATURE == "elu":
        found = tl.where(y > 0, y + 1, tl.exp(tl.minimum(y, 0.0)))
    elif FEATURE == "relu":
        found = tl.where(y <= 0, 0.0, y) + map.eps
    elif FEATURE == "softmax":
        shift = tl.load(source.shift + steps.at + steps.i, mask=valid, other=0.0)
        found = tl.exp(y - shift[:, None])
    if FEATURE != "identity":
        found = tl.where(valid[:, None] & (m < M)[None, :], found, 0.0)
    return y, found


@triton.jit
def through_map(gradient, y, found, FEATURE: tl.constexpr):
    """The gradient of f's arguments, given that of the features."""
    if FEATURE == "elu":
        gradient = tl.where(y > 0, gradient, gradient * found)
    elif FEATURE == "relu":
        gradient = tl.where(y > 0, gradient, 0.0)
    elif FEATURE == "softmax":
        gradient = gradient * found
    return gradient


@triton.jit
def kept_since_start(prefix, steps, m0, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """(exp(b_i), exp(b_end - b_i), exp(b_end)) of features m0 on: what is left at step i of the state at the chunk's
    start, at the chunk's end of step i, and there of that state.

    b are the sums of the decay from the chunk's start; WIDTH: M, or 1 where features decay alike.
    """
    columns = m0 + tl.arange(0, BLOCK)
    i = tl.minimum(steps.i, steps.last).to(tl.int64)
    sums = tl.load(
        prefix + (steps.at + i)[:, None] * WIDTH + columns[None, :], mask=(columns < WIDTH)[None, :], other=0.0
    )
    end = tl.load(prefix + (steps.at + steps.last) * WIDTH + columns, mask=columns < WIDTH, other=0.0)
    return tl.exp(sums.to(tl.float32)), tl.exp((end[None, :] - sums).to(tl.float32)), tl.exp(end.to(tl.float32))


@triton.jit
def decayed(products, prefix, steps, REVERSE: tl.constexpr):
    """Products of a chunk's rows and columns, decayed from the earlier to the later step; 0 where a row may not see."""
    row, column = steps.i[:, None], steps.i[None, :]
    seen = column >= row if REVERSE else column <= row
    if prefix is not None:
        sums = tl.load(prefix + steps.at + tl.minimum(steps.i, steps.last))
        since = sums[None, :] - sums[:, None] if REVERSE else sums[:, None] - sums[None, :]
        products = products * tl.exp(tl.where(seen, since.to(tl.float32), 0.0))
    return tl.where(seen, products, 0.0)
