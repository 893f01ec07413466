r"""The delta rule, chunk by chunk: its values depend on the state, which a triangular system per chunk resolves.

With b the sums of decay from the chunk's start, e_i = v_i - (what is recalled for k_i) are the errors that the state is
corrected by. In a chunk that the state S enters,

    (I + L) e = v - exp(b) k S,    L_ij = exp(b_i - b_j) (k_i . k_j) beta_j    for j < i

so that e = corrected - recalled S with corrected = (I + L)^-1 v and recalled = (I + L)^-1 exp(b) k (the WY form of Yang
et al. 2024, "Parallelizing Linear Transformers with the Delta Rule over Sequence Length"). All else is linear attention
with the values beta e (kernels/linear_chunks.py).
"""

import triton
import triton.language as tl

from fastattn.kernels.dense_scores import Rows, head_rows, sequence_bounds
from fastattn.kernels.linear_tiles import (
    VARYING,
    chunk_steps,
    decayed,
    first_slot,
    kept_since_start,
    load_tile,
    load_values,
    present,
    rows_of,
    slot_steps,
    store_tile,
)


@triton.jit
def _inverse(lower, CHUNK: tl.constexpr, PRECISION: tl.constexpr):
    """(I + lower)^-1 for a strictly lower triangular (CHUNK, CHUNK) tile.

    By blocks of the diagonal, doubled: [[A, 0], [C, B]]^-1 = [[A^-1, 0], [-B^-1 C A^-1, B^-1]]. As stable as
    substitution, where a series in powers of `lower` is not.
    """
    row = tl.arange(0, CHUNK)[:, None]
    column = tl.arange(0, CHUNK)[None, :]
    found = tl.where(row == column, 1.0, 0.0)
    half = 1
    while half < CHUNK:
        block = 2 * half
        corner = (row // block == column // block) & (row % block >= half) & (column % block < half)
        product = tl.dot(tl.where(corner, lower, 0.0), found, input_precision=PRECISION)
        found -= tl.dot(found, product, input_precision=PRECISION)
        half = block
    return found


@triton.jit(do_not_specialize=VARYING)
def prepare_kernel(
    corrected, recalled, inverse, key, values, beta, prefix, cu_seqlens, slot_sequences, heads, length, slots,
    D: tl.constexpr, DV: tl.constexpr, CHUNK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """corrected (B, Hq, N, DV), recalled (B, Hq, N, D) and inverse = (I + L)^-1 (B, Hq, N, CHUNK), in OPERAND.

    Grid: (slots * heads * batch,).
    """
    steps, _b, exists = slot_steps(tl.program_id(0), heads, slots, length, cu_seqlens, slot_sequences, CHUNK)
    if not exists:
        return
    valid = present(key, steps)
    key_rows, value_rows = rows_of(key, steps), rows_of(values, steps)
    products = tl.zeros((CHUNK, CHUNK), tl.float32)
    for m0 in range(0, D, BLOCK_M):
        k = load_tile(key_rows, steps.i, valid, m0, D, BLOCK_M).to(OPERAND)
        products = tl.dot(k, tl.trans(k), products, input_precision=PRECISION)
    strength = tl.load(beta + steps.at + steps.i, mask=valid, other=0.0)
    lower = tl.where(steps.i[None, :] < steps.i[:, None], decayed(products, prefix, steps, False), 0.0)
    found = _inverse(lower * strength[None, :], CHUNK, PRECISION).to(OPERAND)
    there = steps.i < steps.rows
    store_tile(Rows(inverse + steps.at * CHUNK, CHUNK), steps.i, there, 0, found, CHUNK, CHUNK)
    for v0 in range(0, DV, BLOCK_V):
        value = load_values(values, value_rows, steps, valid, v0, DV, BLOCK_V, OPERAND)
        product = tl.dot(found, value, input_precision=PRECISION)
        store_tile(Rows(corrected + steps.at * DV, DV), steps.i, there, v0, product, DV, BLOCK_V)
    for m0 in range(0, D, BLOCK_M):
        k = load_tile(key_rows, steps.i, valid, m0, D, BLOCK_M)
        if prefix is not None:
            from_start, _to_end, _whole = kept_since_start(prefix, steps, 0, 1, 1)
            k = k.to(tl.float32) * from_start
        product = tl.dot(found, k.to(OPERAND), input_precision=PRECISION)
        store_tile(Rows(recalled + steps.at * D, D), steps.i, there, m0, product, D, BLOCK_M)


@triton.jit(do_not_specialize=VARYING)
def scan_kernel(
    states, last, initial, errors, recalled, beta, query, key, grads, prefix, cu_seqlens, heads, length, slots,
    REVERSE: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, DV: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_V: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """States (D, DV) before each chunk, by slot, and the last (sequences, Hq, D, DV), from `initial` or zero.

    errors (B, Hq, N, DV), in place: what `prepare_kernel` calls corrected becomes e. With REVERSE, gradients of states
    after each chunk, and errors: the gradient of beta e through the outputs of its chunk becomes the whole gradient.
    Grid: (blocks of DV * heads * sequences,).
    """
    program = tl.program_id(0)
    v_blocks = tl.cdiv(DV, BLOCK_V)
    v0 = program % v_blocks * BLOCK_V
    line = program // v_blocks
    head, b = line % heads, line // heads
    first, rows = sequence_bounds(b, length, cu_seqlens)
    batch = b if cu_seqlens is None else 0
    line = tl.cast(line, tl.int64)
    d = tl.arange(0, BLOCK_D)
    state = tl.zeros((BLOCK_D, BLOCK_V), tl.float32)
    if initial is not None:
        state += load_tile(Rows(initial + line * D * DV, DV), d, d < D, v0, DV, BLOCK_V)
    chunks = tl.cdiv(rows, CHUNK)
    slot0 = (tl.cast(batch, tl.int64) * heads + head) * slots + first_slot(b, first, cu_seqlens, CHUNK)
    for step in range(chunks):
        chunk = chunks - 1 - step if REVERSE else step
        steps = chunk_steps(batch, head, heads, first, rows, length, chunk, CHUNK)
        store_tile(Rows(states + (slot0 + chunk) * D * DV, DV), d, d < D, v0, state, DV, BLOCK_V)
        valid = present(key, steps)
        k = load_tile(rows_of(key, steps), steps.i, valid, 0, D, BLOCK_D).to(tl.float32)
        if prefix is not None:
            from_start, to_end, whole = kept_since_start(prefix, steps, 0, 1, 1)
            k = k * to_end
        recall = load_tile(Rows(recalled + steps.at * D, D), steps.i, valid, 0, D, BLOCK_D)
        error_rows = Rows(errors + steps.at * DV, DV)
        error = load_tile(error_rows, steps.i, valid, v0, DV, BLOCK_V).to(tl.float32)
        operand = state.to(OPERAND)
        if REVERSE:
            error += tl.dot(k.to(OPERAND), operand, input_precision=PRECISION)
        else:
            error -= tl.dot(recall, operand, input_precision=PRECISION)
        store_tile(error_rows, steps.i, steps.i < steps.rows, v0, error, DV, BLOCK_V)
        strength = tl.load(beta + steps.at + steps.i, mask=valid, other=0.0)
        value = (error * strength[:, None]).to(OPERAND)
        if prefix is not None:
            state = state * whole[:, None]
        if REVERSE:
            there = steps.i < steps.rows
            q = load_tile(rows_of(query, steps), steps.i, there, 0, D, BLOCK_D)
            if prefix is not None:
                q = q.to(tl.float32) * from_start
            grad = load_values(grads, rows_of(grads, steps), steps, there, v0, DV, BLOCK_V, OPERAND)
            state = tl.dot(tl.trans(q.to(OPERAND)), grad, state, input_precision=PRECISION)
            state -= tl.dot(tl.trans(recall), value, input_precision=PRECISION)
        else:
            state = tl.dot(tl.trans(k.to(OPERAND)), value, state, input_precision=PRECISION)
    store_tile(Rows(last + line * D * DV, DV), d, d < D, v0, state, DV, BLOCK_V)


@triton.jit(do_not_specialize=VARYING)
def system_gradient_kernel(
    grad_value, grad_value_stride_b, grad_value_stride_h, grad_value_stride_s,
    grad_key, grad_key_stride_b, grad_key_stride_h, grad_key_stride_s,
    grad_beta, changes, inverse, grad_errors, errors, states, key, beta, prefix, cu_seqlens, slot_sequences, heads,
    length, slots,
    D: tl.constexpr, DV: tl.constexpr, CHUNK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients through the chunks' systems: grad_value and grad_beta (B, Hq, N) set, grad_key and changes added to.

    grad_errors (B, Hq, N, DV) are of beta e, states those before the chunks. Grid: (slots * heads * batch,).
    """
    program = tl.program_id(0)
    steps, _b, exists = slot_steps(program, heads, slots, length, cu_seqlens, slot_sequences, CHUNK)
    if not exists:
        return
    index = tl.cast(program, tl.int64)
    there, valid = steps.i < steps.rows, present(key, steps)
    solved = load_tile(Rows(inverse + steps.at * CHUNK, CHUNK), steps.i, there, 0, CHUNK, CHUNK)
    strength = tl.load(beta + steps.at + steps.i, mask=valid, other=0.0)
    grad_rows, error_rows = Rows(grad_errors + steps.at * DV, DV), Rows(errors + steps.at * DV, DV)
    value_results = head_rows(
        grad_value, steps.batch, grad_value_stride_b, steps.head, grad_value_stride_h, steps.first, grad_value_stride_s
    )
    key_results = head_rows(
        grad_key, steps.batch, grad_key_stride_b, steps.head, grad_key_stride_h, steps.first, grad_key_stride_s
    )
    key_rows = rows_of(key, steps)

    overlaps = tl.zeros((CHUNK, CHUNK), tl.float32)
    strength_grad = tl.zeros((CHUNK,), tl.float32)
    for v0 in range(0, DV, BLOCK_V):
        grad = load_tile(grad_rows, steps.i, valid, v0, DV, BLOCK_V).to(tl.float32)
        error = load_tile(error_rows, steps.i, valid, v0, DV, BLOCK_V)
        side = tl.dot(tl.trans(solved), (grad * strength[:, None]).to(OPERAND), input_precision=PRECISION)
        store_tile(value_results, steps.i, there, v0, tl.where(valid[:, None], side, 0.0), DV, BLOCK_V)
        overlaps = tl.dot(side.to(OPERAND), tl.trans(error), overlaps, input_precision=PRECISION)
        strength_grad += tl.sum(grad * error.to(tl.float32), 1)
    earlier = steps.i[None, :] < steps.i[:, None]
    overlaps = tl.where(earlier, decayed(overlaps, prefix, steps, False), 0.0).to(OPERAND)

    change = tl.zeros((CHUNK,), tl.float32)
    for m0 in range(0, D, BLOCK_M):
        m = m0 + tl.arange(0, BLOCK_M)
        k = load_tile(key_rows, steps.i, valid, m0, D, BLOCK_M).to(tl.float32)
        as_row = tl.zeros((CHUNK, BLOCK_M), tl.float32)
        for v0 in range(0, DV, BLOCK_V):
            grad = load_tile(grad_rows, steps.i, valid, v0, DV, BLOCK_V).to(tl.float32)
            side = tl.dot(tl.trans(solved), (grad * strength[:, None]).to(OPERAND), input_precision=PRECISION)
            state = load_tile(Rows(states + index * D * DV, DV), m, m < D, v0, DV, BLOCK_V).to(OPERAND)
            as_row = tl.dot(side.to(OPERAND), tl.trans(state), as_row, input_precision=PRECISION)
        if prefix is not None:
            from_start, _to_end, _whole = kept_since_start(prefix, steps, 0, 1, 1)
            as_row = as_row * from_start
        as_row = tl.dot(overlaps, (k * strength[:, None]).to(OPERAND), as_row, input_precision=PRECISION)
        as_column = tl.dot(tl.trans(overlaps), k.to(OPERAND), input_precision=PRECISION)
        strength_grad -= tl.sum(k * as_column, 1)
        as_column = as_column * strength[:, None]
        change += tl.sum(k * (as_column - as_row), 1)
        before = load_tile(key_results, steps.i, valid, m0, D, BLOCK_M).to(tl.float32)
        store_tile(key_results, steps.i, there, m0, before - as_row - as_column, D, BLOCK_M)
    tl.store(grad_beta + steps.at + steps.i, tl.where(valid, strength_grad, 0.0), mask=there)
    if changes is not None:
        before = tl.load(changes + steps.at + steps.i, mask=there, other=0.0)
        tl.store(changes + steps.at + steps.i, before + change, mask=there)
