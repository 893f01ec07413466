"""The `cpu` backend: hands the C++ kernels of csrc/cpu their one parameter struct (csrc/linear_params.h)."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fastattn import _extension
from fastattn.backends import Capability
from fastattn.dense.native import Strided, dtypes_of, launch, view
from fastattn.dense.problem import unit_rows
from fastattn.linear.problem import Gradients, Problem, Results, allocate_backward, allocate_forward

CAPABILITY = Capability(
    backend="cpu",
    family="linear",
    devices=frozenset({"cpu"}),
    dtypes=frozenset({torch.float32, torch.bfloat16, torch.float16, torch.float64}),
    max_head_dim=None,
    features=frozenset(
        {
            "backward",
            "causal",
            "normalize",
            "decay",
            "vector_decay",
            "delta",
            "projection",
            "softmax_features",
            "state",
            "key_mask",
            "packed",
            "gqa",
            "value_dim",
        }
    ),
    unavailable=lambda device, index: _extension.unavailable(),
)


def _per_sequence(state: Tensor | None) -> Strided | None:
    """(B, H, M, Dv); (B, H, M) as one row of each head; (B, H)."""
    if state is None or state.dim() == 4:
        return None if state is None else view(state)
    batch, head, *column = state.stride()
    return (state.data_ptr(), batch, head, 0, *(column or [1]), 0)


class _Call:
    """A parameter struct, and the tensors that it points into."""

    def __init__(self, p: Problem):
        self.native: ModuleType = _extension.native()
        self.params: Any = self.native.LinearParams()
        self.cu_seqlens = p.cu_seqlens
        self.kept: list[Tensor] = []
        params, dtypes = self.params, dtypes_of(self.native)
        params.batch, params.heads_q, params.seqlen_q, params.head_dim = p.query.shape
        params.heads_kv, params.seqlen_k, params.head_dim_v = p.value.shape[1:]
        if p.cu_seqlens is not None:
            params.batch = p.num_sequences
            # Working memory goes by the longest sequence.
            params.seqlen_q = params.seqlen_k = int(p.cu_seqlens.diff().max()) if p.num_sequences else 0
        params.features = p.num_features
        params.dtype = dtypes[p.query.dtype]
        params.feature = getattr(self.native.Feature, p.feature)
        params.feature_eps, params.scale = p.feature_eps, p.scale
        params.causal, params.normalize = p.causal, p.normalize
        params.vector_decay = p.decay is not None and p.decay.dim() == 4
        self.rows(query=p.query, key=p.key, value=p.value, decay=p.decay, beta=p.beta)
        if p.key_mask is not None:
            params.key_mask = view(p.key_mask[:, None], p.cu_seqlens)
        for name in ("projection", "feature_bias"):
            if (tensor := getattr(p, name)) is not None:
                setattr(params, name, tensor.data_ptr())
        self.states(
            initial_kv=p.initial_kv,
            initial_normalizer=p.initial_normalizer,
            initial_log_scale=p.initial_log_scale,
        )
        params.threads = torch.get_num_threads()

    def rows(self, **tensors: Tensor | None) -> None:
        """Fields with a row for each step; three axes are one number a step."""
        for name, tensor in tensors.items():
            if tensor is not None:
                if tensor.dim() == 4:
                    tensor = unit_rows(tensor)
                self.kept.append(tensor)
                setattr(self.params, name, view(tensor, self.cu_seqlens))

    def states(self, **tensors: Tensor | None) -> None:
        """Fields with a part for each sequence; an empty tensor stands for an absent one."""
        for name, tensor in tensors.items():
            if tensor is not None and tensor.numel():
                if tensor.dim() > 2:
                    tensor = unit_rows(tensor)
                self.kept.append(tensor)
                setattr(self.params, name, _per_sequence(tensor))


def forward(p: Problem) -> Results:
    """Launch the forward."""
    results = allocate_forward(p)
    call = _Call(p)
    if p.cu_seqlens is not None:  # rows past the last sequence belong to none
        results.out.zero_()
        results.denominator.zero_()
    call.rows(out=results.out, denominator=results.denominator if p.normalize else None)
    call.states(final_kv=results.kv, final_normalizer=results.normalizer, final_log_scale=results.log_scale)
    launch(call.native.cpu_linear_forward, call.native.cpu_linear_forward_scratch, call.params)
    return results


def backward(
    p: Problem,
    out: Tensor,
    denominator: Tensor,
    grad_out: Tensor,
    grad_kv: Tensor | None,
    grad_normalizer: Tensor | None,
) -> Gradients:
    """Launch the backward."""
    results = allocate_backward(p)
    call = _Call(p)
    grads = {n: g for n, g, t in zip(results._fields, results, p.differentiable(), strict=True) if t is not None}
    # The kernels write the gradients of key and value for each query head.
    heads, kv_heads = p.query.shape[1], p.key.shape[1]
    shared = ("key", "value") if heads != kv_heads else ()
    written = {n: g.new_empty(g.shape[0], heads, *g.shape[2:]) if n in shared else g for n, g in grads.items()}
    if p.cu_seqlens is not None:  # rows past the last sequence belong to none
        for name in written.keys() - {"initial_kv", "initial_normalizer"}:
            written[name].zero_()
    call.rows(out=out, denominator=denominator if p.normalize else None, grad_out=grad_out)
    call.states(grad_kv=grad_kv, grad_normalizer=grad_normalizer)
    call.rows(**{f"grad_{n}": g for n, g in written.items() if not n.startswith("initial")})
    call.states(**{f"grad_{n}": g for n, g in written.items() if n.startswith("initial")})
    launch(call.native.cpu_linear_backward, call.native.cpu_linear_backward_scratch, call.params)
    for name in shared:
        torch.sum(written[name].unflatten(1, (kv_heads, -1)), 2, out=grads[name])
    return results
