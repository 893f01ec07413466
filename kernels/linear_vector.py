"""Within a chunk, where each feature decays on its own: what is no product of two matrices.

A weight is the sum over features of phi_im psi_jm exp(b_im - b_jm). Between two blocks of SUB steps it is a product of
matrices again, phi exp(b_i - b_r) and psi exp(b_r - b_j) with r a step between them, so that no exponent is positive;
within a block it is summed one by one (Yang et al. 2024, "Gated Linear Attention Transformers", section 4.3).
"""

import triton
import triton.language as tl

from fastattn.kernels.dense_scores import Rows
from fastattn.kernels.linear_tiles import (
    VARYING,
    Steps,
    features,
    load_extra,
    load_values,
    present,
    rows_of,
    slot_steps,
    store_tile,
)


@triton.jit
def _block(steps, block, SUB: tl.constexpr):
    """The `Steps` of one block of a chunk."""
    i = tl.min(steps.i) + block * SUB + tl.arange(0, SUB)
    return Steps(steps.batch, steps.head, steps.first, steps.rows, steps.at, i, steps.last)


@triton.jit
def _sums(prefix, steps, i, m, M: tl.constexpr):
    """b of steps i (any shape but for the features' axis) and features m."""
    at = steps.at + tl.minimum(i, steps.last).to(tl.int64)
    return tl.load(prefix + at * M + m, mask=m < M, other=0.0)


@triton.jit
def _kept(row_sums, column_sums, SUB: tl.constexpr, REVERSE: tl.constexpr):
    """What is left of a column's features at a row of the same block, (SUB, SUB, BLOCK); 0 where a row may not look."""
    since = row_sums[:, None, :] - column_sums[None, :, :]
    row = tl.arange(0, SUB)[:, None, None]
    column = tl.arange(0, SUB)[None, :, None]
    seen = column >= row if REVERSE else column <= row
    since = -since if REVERSE else since
    return tl.where(seen, tl.exp(tl.where(seen, since, 0.0)), 0.0)


@triton.jit(do_not_specialize=VARYING)
def weights_kernel(
    weights, query, key, map, prefix, cu_seqlens, slot_sequences, heads, length, slots,
    FEATURE: tl.constexpr, M: tl.constexpr, CHUNK: tl.constexpr, SUB: tl.constexpr, BLOCK_M: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """weights (B, Hq, N, CHUNK) float32 of each step and those before it in its chunk; others are undefined.

    Grid: (CHUNK / SUB * CHUNK / SUB * slots * heads * batch,).
    """
    program = tl.program_id(0)
    blocks: tl.constexpr = CHUNK // SUB
    row_block, column_block = program // blocks % blocks, program % blocks
    slot = program // blocks // blocks
    chunk, _b, exists = slot_steps(slot, heads, slots, length, cu_seqlens, slot_sequences, CHUNK)
    if (not exists) | (column_block > row_block):
        return
    rows, columns = _block(chunk, row_block, SUB), _block(chunk, column_block, SUB)
    row_valid, column_valid = present(query, rows), present(key, columns)
    query_rows, key_rows = rows_of(query, rows), rows_of(key, columns)
    found = tl.zeros((SUB, SUB), tl.float32)
    for m0 in range(0, M, BLOCK_M):
        m = m0 + tl.arange(0, BLOCK_M)
        _, phi = features(query, query_rows, rows, row_valid, m0, map, FEATURE, M, M, M, BLOCK_M, PRECISION)
        _, psi = features(key, key_rows, columns, column_valid, m0, map, FEATURE, M, M, M, BLOCK_M, PRECISION)
        row_sums = _sums(prefix, chunk, rows.i[:, None], m[None, :], M)
        column_sums = _sums(prefix, chunk, columns.i[:, None], m[None, :], M)
        if column_block < row_block:
            between = _sums(prefix, chunk, tl.min(rows.i), m, M)[None, :]
            phi = phi * tl.exp(row_sums - between)
            psi = psi * tl.exp(between - column_sums)
            found = tl.dot(phi.to(OPERAND), tl.trans(psi.to(OPERAND)), found, input_precision=PRECISION)
        else:
            kept = _kept(row_sums, column_sums, SUB, False)
            found += tl.sum(phi[:, None, :] * psi[None, :, :] * kept, 2)
    there = rows.i < rows.rows
    store_tile(Rows(weights + chunk.at * CHUNK, CHUNK), rows.i, there, column_block * SUB, found, CHUNK, SUB)


@triton.jit(do_not_specialize=VARYING)
def feature_gradient_kernel(
    intra, row, column, row_values, column_values, map, prefix, cu_seqlens, slot_sequences, heads, length, slots,
    FEATURE: tl.constexpr, NORMALIZE: tl.constexpr, REVERSE: tl.constexpr, M: tl.constexpr, DV: tl.constexpr,
    CHUNK: tl.constexpr, SUB: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr, OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """intra (B, Hq, N, M) float32: the gradient of the rows' features through the weights of their chunk.

    Rows and columns are as in `gradient_kernel`. Grid: (blocks of M * CHUNK / SUB * slots * heads * batch,).
    """
    program = tl.program_id(0)
    blocks: tl.constexpr = CHUNK // SUB
    m_blocks = tl.cdiv(M, BLOCK_M)
    m0 = program % m_blocks * BLOCK_M
    block = program // m_blocks % blocks
    slot = program // m_blocks // blocks
    chunk, _b, exists = slot_steps(slot, heads, slots, length, cu_seqlens, slot_sequences, CHUNK)
    rows = _block(chunk, block, SUB)
    first = tl.min(rows.i)
    if (not exists) | (first >= rows.rows):
        return
    m = m0 + tl.arange(0, BLOCK_M)
    row_valid = present(row, rows)
    row_extra = load_extra(row_values, rows, row_valid)
    row_sums = _sums(prefix, chunk, rows.i[:, None], m[None, :], M)
    between = _sums(prefix, chunk, first + SUB - 1 if REVERSE else first, m, M)[None, :]
    found = tl.zeros((SUB, BLOCK_M), tl.float32)
    own = tl.zeros((SUB, BLOCK_M), tl.float32)
    for other in range(block if REVERSE else 0, blocks if REVERSE else block + 1):
        columns = _block(chunk, other, SUB)
        column_valid = present(column, columns)
        weights = row_extra[:, None] * load_extra(column_values, columns, column_valid)[None, :] if NORMALIZE else 0.0
        weights += tl.zeros((SUB, SUB), tl.float32)
        for v0 in range(0, DV, BLOCK_V):
            value = load_values(row_values, rows_of(row_values, rows), rows, row_valid, v0, DV, BLOCK_V, OPERAND)
            pair = load_values(
                column_values, rows_of(column_values, columns), columns, column_valid, v0, DV, BLOCK_V, OPERAND
            )  # fmt: skip
            weights = tl.dot(value, tl.trans(pair), weights, input_precision=PRECISION)
        _, others = features(
            column, rows_of(column, columns), columns, column_valid, m0, map, FEATURE, M, M, M, BLOCK_M, PRECISION
        )  # fmt: skip
        sums = _sums(prefix, chunk, columns.i[:, None], m[None, :], M)
        if other != block:
            others = others * tl.exp(sums - between if REVERSE else between - sums)
            found = tl.dot(weights.to(OPERAND), others.to(OPERAND), found, input_precision=PRECISION)
        else:
            own = tl.sum(weights[:, :, None] * others[None, :, :] * _kept(row_sums, sums, SUB, REVERSE), 1)
    found = own + found * tl.exp(between - row_sums if REVERSE else row_sums - between)
    store_tile(Rows(intra + chunk.at * M, M), rows.i, rows.i < rows.rows, m0, found, M, BLOCK_M)
