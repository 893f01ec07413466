"""Linear attention's values per step: exponents of softmax features and their running maximum, sums of decay."""

import triton
import triton.language as tl

from fastattn.kernels.dense_scores import sequence_bounds
from fastattn.kernels.linear_tiles import (
    VARYING,
    exponents,
    load_tile,
    present,
    rows_of,
    slot_steps,
)

LEAST: tl.constexpr = tl.constexpr(-104.0)  # exp of less is 0 in float32; sums of -inf would differ by NaN


@triton.jit(do_not_specialize=VARYING)
def exponent_kernel(
    highest, norms, source, map, half_scale, cu_seqlens, slot_sequences, heads, length, slots,
    M: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, CHUNK: tl.constexpr, BLOCK_M: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """highest (B, H, N): each step's maximum of W x + bias; -inf for masked steps.

    With half_scale (keys) less norms (B, H, N) = half_scale |x|^2. Grid: (slots * heads * batch,); heads are source's.
    """
    steps, _b, exists = slot_steps(tl.program_id(0), heads, slots, length, cu_seqlens, slot_sequences, CHUNK)
    if not exists:
        return
    valid = present(source, steps)
    rows = rows_of(source, steps)
    found = tl.full((CHUNK,), float("-inf"), tl.float32)
    for m0 in range(0, M, BLOCK_M):
        m = m0 + tl.arange(0, BLOCK_M)
        y = exponents(rows, steps, valid, m, map, M, D, BLOCK_D, PRECISION)
        found = tl.maximum(found, tl.max(tl.where((m < M)[None, :], y, float("-inf")), 1))
    there = steps.i < steps.rows
    if half_scale is not None:
        wide = load_tile(rows, steps.i, valid, 0, D, BLOCK_D).to(tl.float32)
        norm = half_scale * tl.sum(wide * wide, 1)
        found -= norm
        tl.store(norms + steps.at + steps.i, norm, mask=there)
    tl.store(highest + steps.at + steps.i, tl.where(valid, found, float("-inf")), mask=there)


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b)


@triton.jit(do_not_specialize=VARYING)
def running_maximum_kernel(
    highest, norms, initial, shift, change, final, group, cu_seqlens, heads, length,
    CAUSAL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The keys' maxima become shift (B, Hq, N) = c + norms and change (B, Hq, N) = the decay that the change of c is.

    final (sequences, Hq): c after all steps, which not CAUSAL goes for every step. Grid: (heads * sequences,).
    """
    program = tl.program_id(0)
    head, b = program % heads, program // heads
    first, rows = sequence_bounds(b, length, cu_seqlens)
    batch = b if cu_seqlens is None else 0
    at = (tl.cast(batch, tl.int64) * heads + head) * length + first
    key_at = (tl.cast(batch, tl.int64) * (heads // group) + head // group) * length + first
    carried = tl.full((), float("-inf"), tl.float32)
    if initial is not None:
        carried = tl.maximum(carried, tl.load(initial + program))
    for start in range(0, rows, BLOCK):
        i = start + tl.arange(0, BLOCK)
        there = i < rows
        found = tl.load(highest + key_at + i, mask=there, other=float("-inf"))
        if CAUSAL:
            earlier = tl.load(highest + key_at + i - 1, mask=there & (i > start), other=float("-inf"))
            before = tl.maximum(tl.associative_scan(earlier, 0, _larger), carried)
            after = tl.maximum(before, found)
            finite = tl.where(after == float("-inf"), 0.0, after)
            tl.store(shift + at + i, finite + tl.load(norms + key_at + i, mask=there, other=0.0), mask=there)
            tl.store(change + at + i, tl.where(before == float("-inf"), 0.0, before - finite), mask=there)
        carried = tl.maximum(carried, tl.max(found, 0))
    tl.store(final + program, carried)
    if not CAUSAL:
        finite = tl.where(carried == float("-inf"), 0.0, carried)
        for start in range(0, rows, BLOCK):
            i = start + tl.arange(0, BLOCK)
            there = i < rows
            tl.store(shift + at + i, finite + tl.load(norms + key_at + i, mask=there, other=0.0), mask=there)


@triton.jit(do_not_specialize=VARYING)
def prefix_kernel(
    prefix, decay, decay_stride_b, decay_stride_h, decay_stride_s, decay_stride_m, change, source, cu_seqlens,
    slot_sequences, heads, length, slots,
    WIDTH: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """prefix (B, Hq, N, WIDTH): sums of decay and change from the chunk's start on; masked steps have none.

    Grid: (blocks of WIDTH * slots * heads * batch,).
    """
    program = tl.program_id(0)
    blocks = tl.cdiv(WIDTH, BLOCK)
    columns = program % blocks * BLOCK + tl.arange(0, BLOCK)
    steps, _b, exists = slot_steps(program // blocks, heads, slots, length, cu_seqlens, slot_sequences, CHUNK)
    if not exists:
        return
    inside = present(source, steps)[:, None] & (columns < WIDTH)[None, :]
    found = tl.zeros((CHUNK, BLOCK), tl.float32)
    if decay is not None:
        base = decay + tl.cast(steps.batch, tl.int64) * decay_stride_b + tl.cast(steps.head, tl.int64) * decay_stride_h
        rows = (steps.first + steps.i).to(tl.int64)
        pointers = base + rows[:, None] * decay_stride_s + columns[None, :] * decay_stride_m
        found += tl.load(pointers, mask=inside, other=0.0)
    i = steps.i.to(tl.int64)
    if change is not None:
        found += tl.load(change + steps.at + i, mask=steps.i < steps.rows, other=0.0)[:, None]
    found = tl.where(found < LEAST, LEAST, found)
    there = (steps.i < steps.rows)[:, None] & (columns < WIDTH)[None, :]
    sums = tl.cumsum(found.to(prefix.dtype.element_ty), 0)
    tl.store(prefix + (steps.at + i)[:, None] * WIDTH + columns[None, :], sums, mask=there)


@triton.jit(do_not_specialize=VARYING)
def decay_gradient_kernel(
    grad_decay, changes, totals, source, cu_seqlens, slot_sequences, heads, length, slots,
    WIDTH: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """grad_decay (B, Hq, N, WIDTH): of each step, the changes from it to the chunk's end, and the chunk's total.

    Grid: (blocks of WIDTH * slots * heads * batch,).
    """
    program = tl.program_id(0)
    blocks = tl.cdiv(WIDTH, BLOCK)
    columns = program % blocks * BLOCK + tl.arange(0, BLOCK)
    slot = program // blocks
    steps, _b, exists = slot_steps(slot, heads, slots, length, cu_seqlens, slot_sequences, CHUNK)
    if not exists:
        return
    there = (steps.i < steps.rows)[:, None] & (columns < WIDTH)[None, :]
    pointers = (steps.at + steps.i.to(tl.int64))[:, None] * WIDTH + columns[None, :]
    found = tl.cumsum(tl.load(changes + pointers, mask=there, other=0.0), 0, reverse=True)
    total = tl.load(totals + tl.cast(slot, tl.int64) * WIDTH + columns, mask=columns < WIDTH, other=0.0)
    found = tl.where(present(source, steps)[:, None], found + total[None, :], 0.0)
    tl.store(grad_decay + pointers, found, mask=there)
