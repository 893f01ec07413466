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
from fastattn.dense.append import append as append
from fastattn.dense.problem import Problem, allocate_backward, allocate_forward

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

_Strided = tuple[int, ...]  # address, then a stride per axis


def _view(tensor: Tensor) -> _Strided:
    return (tensor.data_ptr(), *tensor.stride())


def _rows(tensor: Tensor) -> Tensor:
    """The tensor with the unit column stride that kernels rely on; a copy only where it has another."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def _lse_view(lse_BHS: Tensor) -> _Strided:
    return (lse_BHS.data_ptr(), *lse_BHS.stride(), 0)


def _per_head(tensor: Tensor) -> _Strided:
    return (tensor.data_ptr(), 0, tensor.stride(0), 0, 0)


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _params(native: ModuleType, p: Problem, query: Tensor, key: Tensor, value: Tensor) -> Any:
    params = native.DenseParams()
    params.batch, params.heads_q, params.seqlen_q, params.head_dim = query.shape
    params.heads_kv, rows, params.head_dim_v = value.shape[1:]
    params.seqlen_k = p.seqlen_k
    dtypes = _dtypes(native)
    params.dtype = dtypes[query.dtype]
    params.query, params.key, params.value = _view(query), _view(key), _view(value)
    mask = p.attn_mask
    if mask is not None:
        params.attn_mask = _broadcast_view(mask, p)
        params.mask_dtype = dtypes[mask.dtype]
    params.query_start = _address(p.query_start)
    params.key_start = _address(p.key_start)
    params.key_lengths = _address(p.key_lengths)
    if p.block_table is not None:
        params.block_table, params.block_table_stride = p.block_table.data_ptr(), p.block_table.stride(0)
        params.page_size = rows
    params.query_offset = p.offset
    if p.window_left is not None:
        params.window_left = p.window_left
    if p.window_right is not None:
        params.window_right = p.window_right
    params.scale = p.scale
    if p.softcap is not None:
        params.softcap = p.softcap
    if p.alibi_slopes is not None:
        params.alibi_slopes = (*_view(p.alibi_slopes), 0, 0)
    if p.sinks is not None:
        params.sinks = _per_head(p.sinks)
    if p.rng is not None:
        params.dropout_p, params.rng, params.first_sequence = p.dropout_p, p.rng.data_ptr(), p.first_sequence
    params.threads = torch.get_num_threads()
    return params


def _broadcast_view(mask: Tensor, p: Problem) -> _Strided:
    return _view(mask.expand(p.query.shape[0], p.query.shape[1], p.query.shape[2], p.seqlen_k))


@cache
def _dtypes(native: ModuleType) -> dict[torch.dtype, Any]:
    return {
        torch.float32: native.Dtype.float32,
        torch.bfloat16: native.Dtype.bfloat16,
        torch.float16: native.Dtype.float16,
        torch.float64: native.Dtype.float64,
        torch.bool: native.Dtype.bool,
    }


def _launch(kernel: Callable[[Any], None], scratch_bytes: Callable[[Any], int], params: Any) -> None:
    # From torch's allocator, like every other buffer: its memory tools then see all that a call needs.
    scratch = torch.empty(max(scratch_bytes(params), 1), dtype=torch.uint8)
    params.scratch = scratch.data_ptr()
    kernel(params)


def _forward_into(p: Problem, out: Tensor, lse: Tensor) -> None:
    native = _extension.native()
    # Kept in locals: the kernel reads them through bare pointers.
    query, key, value = _rows(p.query), _rows(p.key), _rows(p.value)
    params = _params(native, p, query, key, value)
    params.out, params.lse = _view(out), _lse_view(lse)
    _launch(native.cpu_dense_forward, native.cpu_dense_forward_scratch, params)


def _backward_into(
    p: Problem,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    grads: tuple[Tensor, Tensor, Tensor],
    grad_mask: Tensor | None,
    grad_sinks: Tensor,
) -> None:
    native = _extension.native()
    query, key, value = _rows(p.query), _rows(p.key), _rows(p.value)
    out, grad_out = _rows(out), _rows(grad_out)
    params = _params(native, p, query, key, value)
    params.out, params.lse, params.grad_out = _view(out), _lse_view(lse), _view(grad_out)
    if grad_lse is not None:
        params.grad_lse = _lse_view(grad_lse)
    params.grad_query, params.grad_key, params.grad_value = (_view(g) for g in grads)
    if grad_mask is not None:
        params.grad_mask = _broadcast_view(grad_mask, p)
    if p.sinks is not None:
        params.grad_sinks = _per_head(grad_sinks)
    _launch(native.cpu_dense_backward, native.cpu_dense_backward_scratch, params)


def forward(p: Problem) -> tuple[Tensor, Tensor]:
    """Launch the forward: (out, lse)."""
    out, lse = allocate_forward(p)
    if p.cu_seqlens_q is None:
        _forward_into(p, out, lse)
        return out, lse
    end = 0
    for rows, _, sequence in p.sequences():
        _forward_into(sequence, out[:, :, rows], lse[:, :, rows])
        end = rows.stop
    out[:, :, end:] = 0  # rows past the last sequence belong to none
    lse[:, :, end:] = float("-inf")
    return out, lse


def backward(
    p: Problem, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None, mask_grad: bool
) -> tuple[Tensor, ...]:
    """Launch the backward: gradients as `allocate_backward` lists them."""
    results = allocate_backward(p, mask_grad)
    grad_query, grad_key, grad_value, grad_mask, grad_sinks = results
    grad_sinks.zero_()
    # Broadcast and low-precision biases are summed in the accumulation dtype.
    mask_sum = (
        torch.zeros(p.attn_mask.shape, dtype=p.accumulate_dtype) if mask_grad and p.attn_mask is not None else None
    )
    if p.cu_seqlens_q is None:
        _backward_into(p, out, lse, grad_out, grad_lse, (grad_query, grad_key, grad_value), mask_sum, grad_sinks)
    else:
        end_q = end_k = 0
        for b, (rows, keys, sequence) in enumerate(p.sequences()):
            seqlen_q, seqlen_k = rows.stop - rows.start, keys.stop - keys.start
            _backward_into(
                sequence,
                out[:, :, rows],
                lse[:, :, rows],
                grad_out[:, :, rows],
                None if grad_lse is None else grad_lse[:, :, rows],
                (grad_query[:, :, rows], grad_key[:, :, keys], grad_value[:, :, keys]),
                p.mask_of_sequence(mask_sum, b, seqlen_q, seqlen_k),
                grad_sinks,
            )
            end_q, end_k = rows.stop, keys.stop
        grad_query[:, :, end_q:] = 0
        grad_key[:, :, end_k:] = 0
        grad_value[:, :, end_k:] = 0
    if mask_sum is not None:
        grad_mask.copy_(mask_sum)
    return results
