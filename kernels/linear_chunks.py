"""Linear attention, chunk by chunk: the states between chunks, the outputs and the gradients within them.

The chunkwise form of Yang et al. 2024, "Gated Linear Attention Transformers", section 4. Each kernel runs forward in
time for outputs and the gradient of query, and with REVERSE backward in time for the gradients of value and key; then
keys are the rows, queries the columns, and states are gradients of states.
"""

import triton
import triton.language as tl

from fastattn.kernels.dense_scores import Rows, head_rows, sequence_bounds
from fastattn.kernels.linear_tiles import (
    VARYING,
    chunk_steps,
    decayed,
    features,
    first_slot,
    kept_since_start,
    load_extra,
    load_normalizer,
    load_tile,
    load_values,
    present,
    rows_of,
    slot_steps,
    store_tile,
    through_map,
)

LEAST_DENOMINATOR: tl.constexpr = tl.constexpr(2.0**-100)  # Problem.least_denominator


@triton.jit(do_not_specialize=VARYING)
def state_kernel(
    kv, normalizers, initial, before, source, values, map, prefix, cu_seqlens, heads, length, slots, parts,
    FEATURE: tl.constexpr, NORMALIZE: tl.constexpr, REVERSE: tl.constexpr, VECTOR: tl.constexpr, M: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, DV: tl.constexpr, CHUNK: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_V: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """States from `initial` through all chunks: `before` each of them, by slot, and after the last.

    The latter are kv (sequences, Hq, parts, M, DV) and normalizers (.., M): where steps have no order, each part sums
    some of the chunks. Grid: (blocks of DV * blocks of M * parts * heads * sequences,).
    """
    program = tl.program_id(0)
    v_blocks = tl.cdiv(DV, BLOCK_V)
    m_blocks = tl.cdiv(M, BLOCK_M)
    v0 = program % v_blocks * BLOCK_V
    m0 = program // v_blocks % m_blocks * BLOCK_M
    part = program // v_blocks // m_blocks % parts
    line = program // v_blocks // m_blocks // parts
    head, b = line % heads, line // heads
    first, rows = sequence_bounds(b, length, cu_seqlens)
    batch = b if cu_seqlens is None else 0
    m = m0 + tl.arange(0, BLOCK_M)
    line = tl.cast(line, tl.int64)

    state = tl.zeros((BLOCK_M, BLOCK_V), tl.float32)
    normalizer = tl.zeros((BLOCK_M,), tl.float32)
    if initial.kv is not None:
        state += load_tile(Rows(initial.kv + line * M * DV, DV), m, m < M, v0, DV, BLOCK_V)
        if NORMALIZE and initial.normalizer is not None:
            normalizer += load_normalizer(initial.normalizer, line, m, M)
    chunks = tl.cdiv(rows, CHUNK)
    begin = part * chunks // parts
    end = (part + 1) * chunks // parts
    slot0 = (tl.cast(batch, tl.int64) * heads + head) * slots + first_slot(b, first, cu_seqlens, CHUNK)
    for step in range(begin, end):
        chunk = begin + end - 1 - step if REVERSE else step
        steps = chunk_steps(batch, head, heads, first, rows, length, chunk, CHUNK)
        if before.kv is not None:
            store_tile(Rows(before.kv + (slot0 + chunk) * M * DV, DV), m, m < M, v0, state, DV, BLOCK_V)
            if NORMALIZE:
                tl.store(before.normalizer + (slot0 + chunk) * M + m, normalizer, mask=(m < M) & (v0 == 0))
        valid = present(source, steps)
        _, found = features(
            source, rows_of(source, steps), steps, valid, m0, map, FEATURE, M, D, BLOCK_D, BLOCK_M, PRECISION
        )  # fmt: skip
        if prefix is not None:
            from_start, to_end, whole = kept_since_start(
                prefix, steps, m0 if VECTOR else 0, M if VECTOR else 1, BLOCK_M if VECTOR else 1
            )
            found = found * (from_start if REVERSE else to_end)
            state = state * whole[:, None]
            normalizer = normalizer * whole
        value = load_values(values, rows_of(values, steps), steps, valid, v0, DV, BLOCK_V, OPERAND)
        state = tl.dot(tl.trans(found.to(OPERAND)), value, state, input_precision=PRECISION)
        if NORMALIZE:
            normalizer += tl.sum(found * load_extra(values, steps, valid)[:, None], 0)
    place = line * parts + part
    store_tile(Rows(kv + place * M * DV, DV), m, m < M, v0, state, DV, BLOCK_V)
    if NORMALIZE:
        tl.store(normalizers + place * M + m, normalizer, mask=(m < M) & (v0 == 0))


@triton.jit(do_not_specialize=VARYING)
def output_kernel(
    out, out_stride_b, out_stride_h, out_stride_s, denominator, row, column, values, states, map, prefix, weights,
    scale, cu_seqlens, slot_sequences, heads, length, slots,
    FEATURE: tl.constexpr, CAUSAL: tl.constexpr, NORMALIZE: tl.constexpr, REVERSE: tl.constexpr, VECTOR: tl.constexpr,
    M: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, DV: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out (B, Hq, N, DV): what the rows read of the states and, if CAUSAL, of the values of their chunk.

    With NORMALIZE divided by the denominator (B, Hq, N), which is stored (0 where it counts as none), else times
    scale. weights (B, Hq, N, CHUNK) are those within the chunks where they are not a product of features (VECTOR
    decay). states None: only the chunk.
    Grid: (blocks of DV * slots * heads * batch,).
    """
    program = tl.program_id(0)
    v_blocks = tl.cdiv(DV, BLOCK_V)
    v0 = program % v_blocks * BLOCK_V
    steps, b, exists = slot_steps(program // v_blocks, heads, slots, length, cu_seqlens, slot_sequences, CHUNK)
    if not exists:
        return
    index = tl.cast(program // v_blocks, tl.int64) if CAUSAL else tl.cast(b, tl.int64) * heads + steps.head
    row_valid, column_valid = present(row, steps), steps.i < steps.rows
    row_rows = rows_of(row, steps)
    if CAUSAL:
        column_valid = present(column, steps)
        column_rows = rows_of(column, steps)

    acc = tl.zeros((CHUNK, BLOCK_V), tl.float32)
    total = tl.zeros((CHUNK,), tl.float32)
    products = tl.zeros((CHUNK, CHUNK), tl.float32)
    for m0 in range(0, M, BLOCK_M):
        m = m0 + tl.arange(0, BLOCK_M)
        _, found = features(row, row_rows, steps, row_valid, m0, map, FEATURE, M, D, BLOCK_D, BLOCK_M, PRECISION)
        if CAUSAL and not VECTOR:
            _, others = features(
                column, column_rows, steps, column_valid, m0, map, FEATURE, M, D, BLOCK_D, BLOCK_M, PRECISION
            )  # fmt: skip
            products = tl.dot(found.to(OPERAND), tl.trans(others.to(OPERAND)), products, input_precision=PRECISION)
        if states.kv is not None:
            if VECTOR:
                from_start, to_end, _whole = kept_since_start(prefix, steps, m0, M, BLOCK_M)
                found = found * (to_end if REVERSE else from_start)
            state = load_tile(Rows(states.kv + index * M * DV, DV), m, m < M, v0, DV, BLOCK_V).to(OPERAND)
            acc = tl.dot(found.to(OPERAND), state, acc, input_precision=PRECISION)
            if NORMALIZE:
                total += tl.sum(found * load_normalizer(states.normalizer, index, m, M)[None, :], 1)
    if CAUSAL:
        if VECTOR:
            pointers = weights + steps.at * CHUNK
            offset = steps.i - steps.i % CHUNK
            seen = row_valid[:, None] & column_valid[None, :]
            if REVERSE:
                seen = seen & (steps.i[None, :] >= steps.i[:, None])
                pointers += steps.i[None, :] * CHUNK + (steps.i - offset)[:, None]
            else:
                seen = seen & (steps.i[None, :] <= steps.i[:, None])
                pointers += steps.i[:, None] * CHUNK + (steps.i - offset)[None, :]
            products = tl.load(pointers, mask=seen, other=0.0)
        else:
            if prefix is not None:
                from_start, to_end, _whole = kept_since_start(prefix, steps, 0, 1, 1)
                kept = to_end if REVERSE else from_start
                acc = acc * kept
                total = total * tl.sum(kept, 1)
            products = decayed(products, prefix, steps, REVERSE)
        value = load_values(values, rows_of(values, steps), steps, column_valid, v0, DV, BLOCK_V, OPERAND)
        acc = tl.dot(products.to(OPERAND), value, acc, input_precision=PRECISION)
        total += tl.sum(products, 1)
    if NORMALIZE:
        total = tl.where(tl.abs(total) < LEAST_DENOMINATOR, 0.0, total)
        empty = (total == 0)[:, None]
        acc = tl.where(empty, 0.0, acc / tl.where(empty, 1.0, total[:, None]))
        tl.store(denominator + steps.at + steps.i, total, mask=row_valid & (v0 == 0))
    else:
        acc = acc * scale
    results = head_rows(out, steps.batch, out_stride_b, steps.head, out_stride_h, steps.first, out_stride_s)
    store_tile(results, steps.i, steps.i < steps.rows, v0, acc, DV, BLOCK_V)


@triton.jit(do_not_specialize=VARYING)
def gradient_kernel(
    grad, grad_stride_b, grad_stride_h, grad_stride_s, changes, totals, row, column, row_values, column_values, states,
    other_states, map, prefix, intra, half_scale, cu_seqlens, slot_sequences, heads, length, slots,
    FEATURE: tl.constexpr, CAUSAL: tl.constexpr, NORMALIZE: tl.constexpr, REVERSE: tl.constexpr, VECTOR: tl.constexpr,
    M: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, DV: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """grad (B, Hq, N, D): the gradient of the rows, query's or with REVERSE key's.

    The gradient of a weight is the product of its row's and column's values, and extras. changes (B, Hq, N, 1 or M):
    forward set to, in reverse diminished by, features times their gradients; totals (slots, 1 or M), in reverse: the
    product of the states after each chunk (other_states: those before it) and their gradients. Both are None without a
    gradient of decay. intra (B, Hq, N, M): the features' gradients from within the chunk with VECTOR decay.
    half_scale: a key's exponents lack half_scale |x|^2. Grid: (slots * heads * batch,).
    """
    program = tl.program_id(0)
    steps, b, exists = slot_steps(program, heads, slots, length, cu_seqlens, slot_sequences, CHUNK)
    if not exists:
        return
    index = tl.cast(program, tl.int64) if CAUSAL else tl.cast(b, tl.int64) * heads + steps.head
    results = head_rows(grad, steps.batch, grad_stride_b, steps.head, grad_stride_h, steps.first, grad_stride_s)
    row_valid, column_valid = present(row, steps), steps.i < steps.rows
    row_rows, row_value_rows = rows_of(row, steps), rows_of(row_values, steps)
    if map.projection is not None:
        gradient = tl.zeros((CHUNK, BLOCK_D), tl.float32)
    extra = load_extra(row_values, steps, row_valid)

    if CAUSAL and not VECTOR:
        column_valid = present(column, steps)
        column_rows, column_value_rows = rows_of(column, steps), rows_of(column_values, steps)
        weights = tl.zeros((CHUNK, CHUNK), tl.float32)
        for v0 in range(0, DV, BLOCK_V):
            value = load_values(row_values, row_value_rows, steps, row_valid, v0, DV, BLOCK_V, OPERAND)
            other = load_values(column_values, column_value_rows, steps, column_valid, v0, DV, BLOCK_V, OPERAND)
            weights = tl.dot(value, tl.trans(other), weights, input_precision=PRECISION)
        if NORMALIZE:
            weights += extra[:, None] * load_extra(column_values, steps, column_valid)[None, :]
        weights = decayed(weights, prefix, steps, REVERSE).to(OPERAND)

    change = tl.zeros((CHUNK,), tl.float32)
    total = 0.0
    for m0 in range(0, M, BLOCK_M):
        m = m0 + tl.arange(0, BLOCK_M)
        found_gradient = tl.zeros((CHUNK, BLOCK_M), tl.float32)
        product = tl.zeros((BLOCK_M,), tl.float32)
        for v0 in range(0, DV, BLOCK_V):
            value = load_values(row_values, row_value_rows, steps, row_valid, v0, DV, BLOCK_V, OPERAND)
            state = load_tile(Rows(states.kv + index * M * DV, DV), m, m < M, v0, DV, BLOCK_V)
            found_gradient = tl.dot(value, tl.trans(state.to(OPERAND)), found_gradient, input_precision=PRECISION)
            if totals is not None:
                other_state = load_tile(Rows(other_states.kv + index * M * DV, DV), m, m < M, v0, DV, BLOCK_V)
                product += tl.sum(state * other_state, 1)
        if NORMALIZE:
            normalizer = load_normalizer(states.normalizer, index, m, M)
            found_gradient += extra[:, None] * normalizer[None, :]
            if totals is not None:
                product += normalizer * load_normalizer(other_states.normalizer, index, m, M)
        y, found = features(row, row_rows, steps, row_valid, m0, map, FEATURE, M, D, BLOCK_D, BLOCK_M, PRECISION)
        if prefix is not None:
            from_start, to_end, whole = kept_since_start(
                prefix, steps, m0 if VECTOR else 0, M if VECTOR else 1, BLOCK_M if VECTOR else 1
            )
            found_gradient = found_gradient * (to_end if REVERSE else from_start)
            if totals is not None:
                product = product * whole + tl.sum(found * found_gradient, 0)
                if VECTOR:
                    tl.store(totals + index * M + m, product, mask=m < M)
                else:
                    total += tl.sum(product)
        if VECTOR:
            pointers = (steps.at + steps.i.to(tl.int64))[:, None] * M + m[None, :]
            inside = (steps.i < steps.rows)[:, None] & (m < M)[None, :]
            found_gradient += tl.load(intra + pointers, mask=inside, other=0.0)
            if changes is not None:
                gain = found * found_gradient
                if REVERSE:
                    gain = tl.load(changes + pointers, mask=inside, other=0.0) - gain
                tl.store(changes + pointers, gain, mask=inside)
        elif CAUSAL:
            _, others = features(
                column, column_rows, steps, column_valid, m0, map, FEATURE, M, D, BLOCK_D, BLOCK_M, PRECISION
            )  # fmt: skip
            found_gradient = tl.dot(weights, others.to(OPERAND), found_gradient, input_precision=PRECISION)
        if half_scale is not None or (changes is not None and not VECTOR):
            change += tl.sum(found * found_gradient, 1)
        found_gradient = through_map(found_gradient, y, found, FEATURE)
        if map.projection is None:
            found_gradient = tl.where(row_valid[:, None], found_gradient, 0.0)
            store_tile(results, steps.i, steps.i < steps.rows, m0, found_gradient, M, BLOCK_M)
        else:
            projection = load_tile(Rows(map.projection, D), m, m < M, 0, D, BLOCK_D)
            gradient = tl.dot(found_gradient.to(OPERAND), projection, gradient, input_precision=PRECISION)

    if map.projection is not None:
        if half_scale is not None:
            x = load_tile(row_rows, steps.i, row_valid, 0, D, BLOCK_D).to(tl.float32)
            gradient -= (2 * half_scale * change)[:, None] * x
        gradient = tl.where(row_valid[:, None], gradient, 0.0)
        store_tile(results, steps.i, steps.i < steps.rows, 0, gradient, D, BLOCK_D)
    if changes is not None and not VECTOR:
        there = steps.i < steps.rows
        if REVERSE:
            change = tl.load(changes + steps.at + steps.i, mask=there, other=0.0) - change
        tl.store(changes + steps.at + steps.i, change, mask=there)
    if totals is not None and not VECTOR:
        tl.store(totals + index, total)
