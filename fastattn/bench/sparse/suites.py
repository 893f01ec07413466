"""The implementations set beside each other in measuring sparse attention."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

import fastattn
from fastattn.bench.case import Attend, Implementation, default_device
from fastattn.bench.sparse.problem import SparseProblem, dense
from fastattn.bench.suites import bind_fastattn as bind_dense
from fastattn.bench.suites import naive_bytes
from fastattn.dense.naive import naive_attention

NAMES = ("naive", "sdpa", "flex", "dense", "fastattn", "fastattn:<backend>")


def bind_naive(problem: SparseProblem) -> tuple[str, Attend]:
    mask = problem.mask.to_dense()
    return "matmul, softmax, matmul", lambda q, k, v: naive_attention(q, k, v, attn_mask=mask)


def bind_sdpa(problem: SparseProblem) -> tuple[str, Attend]:
    mask = problem.mask.to_dense()
    gqa = problem.heads != problem.kv_heads
    return "torch's choice, given the mask", lambda q, k, v: F.scaled_dot_product_attention(
        q, k, v, mask, enable_gqa=gqa
    )


def bind_flex(problem: SparseProblem) -> tuple[str, Attend]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    # torch compiles one function for a few shapes only, then runs it uncompiled: every problem starts afresh.
    torch.compiler.reset()
    compiled = torch.compile(flex_attention, dynamic=False)
    shape = (None, None, problem.seqlen, problem.seqlen)
    mask = create_block_mask(problem.rule, *shape, device=default_device().type, BLOCK_SIZE=problem.block)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = compiled(q, k, v, block_mask=mask, enable_gqa=problem.heads != problem.kv_heads)
        assert isinstance(out, Tensor)
        return out

    return "compiled", attend


def bind_fastattn(problem: SparseProblem, backend: str | None = None) -> tuple[str, Attend]:
    mask = problem.mask
    if backend is None:
        like = torch.empty(1, problem.heads, problem.seqlen, problem.head_dim, dtype=problem.torch_dtype)
        like = like.to(default_device()).requires_grad_(problem.mode == "fwdbwd")
        backend = next(v.backend for v in fastattn.explain(like, like, like, attn_mask=mask) if v.selected)
    return backend, lambda q, k, v: fastattn.attention(q, k, v, attn_mask=mask, backend=backend)


def implementation(name: str) -> Implementation:
    """Look up `naive`, `sdpa` and `flex` (given the mask), `dense` (fastattn without it), `fastattn[:<backend>]`.

    Raises:
        ValueError: no such implementation.
    """
    kind, _, backend = name.partition(":")
    if name == "naive":
        return Implementation(name, bind_naive, naive_bytes)
    if name == "sdpa":
        return Implementation(name, bind_sdpa, work=lambda p: dense(p).flops)
    if name == "flex":
        return Implementation(name, bind_flex, compiles=True)
    if name == "dense":
        return Implementation(name, bind_dense, solves=dense)
    if kind == "fastattn":
        return Implementation(name, lambda p: bind_fastattn(p, backend or None))
    raise ValueError(f"no implementation {name!r}; there are {', '.join(NAMES)}")


def default_implementations(device: torch.device) -> tuple[str, ...]:
    """Naive and PyTorch's attention given the mask, the dense kernel, and fastattn; on a GPU flex_attention too."""
    return ("naive", "sdpa", *(["flex"] if device.type == "cuda" else []), "dense", "fastattn")
