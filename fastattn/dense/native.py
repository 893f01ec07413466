"""The `cpu` backend: hands the C++ kernels of csrc/cpu their one parameter struct (csrc/dense_params.h)."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fastattn import _extension
from fastattn.backends import Capability
from fastattn.dense.append import Appending, allocate_rotated
from fastattn.dense.problem import Problem, allocate_backward, allocate_forward, unit_rows

CAPABILITY = Capability(
    backend="cpu",
    family="dense",
    devices=frozenset({"cpu"}),
    dtypes=frozenset({torch.float32, torch.bfloat16, torch.float16, torch.float64}),
    max_head_dim=256,
    features=frozenset(
        {
            "backward",
            "causal",
            "window",
            "alignment",
            "query_start",
            "key_start",
            "key_lengths",
            "packed",
            "paged",
            "bool_mask",
            "float_bias",
            "block_mask",
            "bias_grad",
            "lse_grad",
            "gqa",
            "value_dim",
            "softcap",
            "alibi",
            "sinks",
            "dropout",
            "deterministic",
        }
    ),
    unavailable=lambda device, index: _extension.unavailable(),
)

Strided = tuple[int, ...]  # address, a stride per axis, address of the first rows of packed sequences or 0


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def view(tensor: Tensor, cu_seqlens: Tensor | None = None) -> Strided:
    """A (B, H, S, D) tensor, or a (B, H, S) one; of packed sequences with their boundaries."""
    batch, *others = tensor.stride()
    if len(others) == 2:
        others.append(0)
    if cu_seqlens is None:
        return (tensor.data_ptr(), batch, *others, 0)
    return (tensor.data_ptr(), 0, *others, cu_seqlens.data_ptr())


def _per_head(tensor: Tensor) -> Strided:
    """(Hq,) or (B, Hq)."""
    return (tensor.data_ptr(), *(0, *tensor.stride())[-2:], 0, 0, 0)


def _params(native: ModuleType, p: Problem, query: Tensor, key: Tensor, value: Tensor) -> Any:
    params = native.DenseParams()
    params.batch, params.heads_q, params.seqlen_q, params.head_dim = query.shape
    params.heads_kv, rows, params.head_dim_v = value.shape[1:]
    params.seqlen_k = p.seqlen_k
    if p.cu_seqlens_q is not None:
        params.batch = len(p.cu_seqlens_q) - 1
        # Working memory goes by the longest sequence; none is longer than all of them. A block mask has lines up to the
        # lengths that it was made for.
        params.seqlen_q, params.seqlen_k = p.max_seqlen_q, p.max_seqlen_k
        if p.mask_rows is None:
            params.seqlen_q = min(params.seqlen_q, query.shape[2])
            params.seqlen_k = min(params.seqlen_k, key.shape[2])
    dtypes = dtypes_of(native)
    params.dtype = dtypes[query.dtype]
    params.query = view(query, p.cu_seqlens_q)
    params.key, params.value = view(key, p.cu_seqlens_k), view(value, p.cu_seqlens_k)
    mask = p.attn_mask
    if mask is not None:
        params.attn_mask = _broadcast_view(mask)
        params.mask_dtype = dtypes[mask.dtype]
    lists = p.mask_lists
    if lists is not None:
        params.mask_rows, params.mask_columns = _broadcast_view(lists.rows), _broadcast_view(lists.columns)
        params.mask_row_blocks = lists.row_blocks.data_ptr()
        params.mask_column_blocks = lists.column_blocks.data_ptr()
        params.mask_tiles = lists.tiles.data_ptr()
    params.query_start = _address(p.query_start)
    params.key_start = _address(p.key_start)
    params.key_lengths = _address(p.key_lengths)
    if p.block_table is not None:
        params.block_table, params.block_table_stride = p.block_table.data_ptr(), p.block_table.stride(0)
        params.page_size = rows
    if p.query_offset is None:
        params.align_ends = True
    else:
        params.query_offset = p.query_offset
    if p.window_left is not None:
        params.window_left = p.window_left
    if p.window_right is not None:
        params.window_right = p.window_right
    params.scale = p.scale
    if p.softcap is not None:
        params.softcap = p.softcap
    if p.alibi_slopes is not None:
        params.alibi_slopes = _per_head(p.alibi_slopes)
    if p.sinks is not None:
        params.sinks = _per_head(p.sinks)
    if p.rng is not None:
        params.dropout_p, params.rng = p.dropout_p, p.rng.data_ptr()
    params.threads = torch.get_num_threads()
    return params


def _broadcast_view(mask: Tensor) -> Strided:
    strides = [0 if size == 1 else stride for size, stride in zip(mask.shape, mask.stride(), strict=True)]
    return (mask.data_ptr(), *strides, 0)


@cache
def dtypes_of(native: ModuleType) -> dict[torch.dtype, Any]:
    return {
        torch.float32: native.Dtype.float32,
        torch.bfloat16: native.Dtype.bfloat16,
        torch.float16: native.Dtype.float16,
        torch.float64: native.Dtype.float64,
        torch.bool: native.Dtype.bool,
    }


def launch(kernel: Callable[[Any], None], scratch_bytes: Callable[[Any], int], params: Any) -> None:
    # From torch's allocator, like every other buffer: its memory tools then see all that a call needs.
    scratch = torch.empty(max(scratch_bytes(params), 1), dtype=torch.uint8)
    params.scratch = scratch.data_ptr()
    kernel(params)


def forward(p: Problem) -> tuple[Tensor, Tensor]:
    """Launch the forward: (out, lse)."""
    native = _extension.native()
    out, lse = allocate_forward(p)
    if p.cu_seqlens_q is not None:  # rows past the last sequence belong to none
        out.zero_()
        lse.fill_(float("-inf"))
    # Kept in locals: the kernel reads them through bare pointers.
    query, key, value = unit_rows(p.query), unit_rows(p.key), unit_rows(p.value)
    params = _params(native, p, query, key, value)
    params.out, params.lse = view(out, p.cu_seqlens_q), view(lse, p.cu_seqlens_q)
    launch(native.cpu_dense_forward, native.cpu_dense_forward_scratch, params)
    return out, lse


def backward(
    p: Problem, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None, mask_grad: bool
) -> tuple[Tensor, ...]:
    """Launch the backward: gradients as `allocate_backward` lists them."""
    native = _extension.native()
    results = allocate_backward(p, mask_grad)
    grad_query, grad_key, grad_value, grad_mask, grad_sinks = results
    if p.cu_seqlens_q is not None:  # rows and keys past the last sequence belong to none
        for grad in (grad_query, grad_key, grad_value):
            grad.zero_()
    grad_sinks.zero_()
    # Broadcast and low-precision biases are summed in the accumulation dtype.
    mask_sum = (
        torch.zeros(p.attn_mask.shape, dtype=p.accumulate_dtype) if mask_grad and p.attn_mask is not None else None
    )
    query, key, value = unit_rows(p.query), unit_rows(p.key), unit_rows(p.value)
    out, grad_out = unit_rows(out), unit_rows(grad_out)
    params = _params(native, p, query, key, value)
    params.out, params.lse = view(out, p.cu_seqlens_q), view(lse, p.cu_seqlens_q)
    params.grad_out, params.grad_query = view(grad_out, p.cu_seqlens_q), view(grad_query, p.cu_seqlens_q)
    params.grad_key, params.grad_value = view(grad_key, p.cu_seqlens_k), view(grad_value, p.cu_seqlens_k)
    if grad_lse is not None:
        params.grad_lse = view(grad_lse, p.cu_seqlens_q)
    if mask_sum is not None:
        params.grad_mask = _broadcast_view(mask_sum)
    if p.sinks is not None:
        params.grad_sinks = _per_head(grad_sinks)
    launch(native.cpu_dense_backward, native.cpu_dense_backward_scratch, params)
    if mask_sum is not None:
        grad_mask.copy_(mask_sum)
    return results


def append(a: Appending) -> Tensor:
    """Write new keys and values into a cache, as `fastattn.dense.append.append` does."""
    native = _extension.native()
    dtypes = dtypes_of(native)
    rotated = allocate_rotated(a.query, a.cos)
    params = native.AppendParams()
    params.batch, params.heads_q, params.seqlen_q, params.head_dim = a.query.shape
    params.heads_kv, params.seqlen_new, params.head_dim_v = a.value.shape[1:]
    params.dtype = dtypes[a.query.dtype]
    # Kept in locals: the kernel reads them through bare pointers.
    query, key, value = unit_rows(a.query), unit_rows(a.key), unit_rows(a.value)
    params.key, params.value = view(key), view(value)
    params.key_cache, params.value_cache = view(a.key_cache), view(a.value_cache)
    params.key_lengths = a.key_lengths.data_ptr()
    if a.block_table is not None:
        params.block_table, params.block_table_stride = a.block_table.data_ptr(), a.block_table.stride(0)
        params.page_size = a.key_cache.shape[2]
    if a.cos is not None and a.sin is not None:
        params.query, params.rotated = view(query), view(rotated)
        params.cos, params.sin = view(a.cos[None, None]), view(a.sin[None, None])
        params.table_dtype, params.rotary_dim = dtypes[a.cos.dtype], 2 * a.cos.shape[1]
        params.interleaved = a.interleaved
    params.threads = torch.get_num_threads()
    native.cpu_append(params)
    return rotated
