"""The `reference` backend: the definition of what dense attention computes, in plain differentiable PyTorch.

It materialises the (B, Hq, Sq, Sk) matrix, accumulates in float32 (float64 for float64 inputs) and is the oracle that
every kernel is held to.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fastattn.backends import FEATURES, Capability
from fastattn.dense.philox import dropout_keep
from fastattn.dense.problem import Problem, allocate_backward, allocate_forward

CAPABILITY = Capability(
    backend="reference",
    family="dense",
    devices=frozenset(),
    dtypes=frozenset({torch.float32, torch.bfloat16, torch.float16, torch.float64}),
    max_head_dim=None,
    features=frozenset(FEATURES),
)


def interval(p: Problem) -> Tensor:
    """Which keys each row may see by position alone: bool (B or 1, 1, Sq, Sk)."""
    device = p.query.device
    seqlen_q, seqlen_k = p.query.shape[2], p.key.shape[2]
    position = torch.arange(seqlen_q, device=device).view(1, 1, -1, 1) + p.offset
    key = torch.arange(seqlen_k, device=device).view(1, 1, 1, -1)
    if p.query_start is not None:
        position = position + p.query_start.view(-1, 1, 1, 1)
    seen = torch.ones_like(position, dtype=torch.bool) & torch.ones_like(key, dtype=torch.bool)
    if p.window_left is not None:
        seen = seen & (key >= position - p.window_left)
    if p.window_right is not None:
        seen = seen & (key <= position + p.window_right)
    if p.key_start is not None:
        seen = seen & (key >= p.key_start.view(-1, 1, 1, 1))
    if p.key_lengths is not None:
        seen = seen & (key < p.key_lengths.view(-1, 1, 1, 1))
    return seen


def _scores(p: Problem, q_BHSD: Tensor, k_BHSD: Tensor, sees: Tensor) -> Tensor:
    """Scores with everything that is added or masked, (B, Hq, Sq, Sk); -inf where a row does not see a key."""
    scores = (q_BHSD @ k_BHSD.mT) * p.scale
    if p.softcap is not None:
        scores = p.softcap * torch.tanh(scores / p.softcap)
    if p.alibi_slopes is not None:
        seqlen_q, seqlen_k = scores.shape[-2:]
        position = torch.arange(seqlen_q, device=scores.device).view(1, 1, -1, 1) + p.offset
        if p.query_start is not None:
            position = position + p.query_start.view(-1, 1, 1, 1)
        distance = (position - torch.arange(seqlen_k, device=scores.device)).abs()
        scores = scores - p.alibi_slopes[:, :, None, None] * distance
    if p.attn_mask is not None:
        if p.attn_mask.dtype == torch.bool:
            sees = sees & p.attn_mask
        else:
            scores = scores + p.attn_mask.to(scores.dtype)
    return scores.masked_fill(~sees, float("-inf"))


def formula(p: Problem) -> tuple[Tensor, Tensor]:
    """(out, lse) as differentiable PyTorch operations, to any order and under torch.func transforms."""
    if p.cu_seqlens_q is not None:
        return _formula_packed(p)
    dtype = p.accumulate_dtype
    sees = interval(p)
    # A key that no row of its sequence sees may hold anything, NaN included.
    exists = sees.any(dim=2)[..., None]
    groups = p.query.shape[1] // p.key.shape[1]
    q = p.query.to(dtype)
    k = torch.where(exists, p.key, 0).to(dtype).repeat_interleave(groups, dim=1)
    v = torch.where(exists, p.value, 0).to(dtype).repeat_interleave(groups, dim=1)

    scores = _scores(p, q, k, sees)
    sink = None if p.sinks is None else p.sinks.to(dtype).view(1, -1, 1)
    if scores.shape[-1] == 0:
        highest = scores.new_full(scores.shape[:-1], float("-inf"))
    else:
        highest = scores.detach().amax(dim=-1)
    if sink is not None:
        highest = torch.maximum(highest, sink.detach())
    highest = highest.masked_fill(highest == float("-inf"), 0.0)  # a row without keys
    weights = torch.exp(scores - highest[..., None])
    total = weights.sum(dim=-1)
    if sink is not None:
        total = total + torch.exp(sink - highest)
    empty = total == 0
    total = total.masked_fill(empty, 1.0)
    lse = (highest + torch.log(total)).masked_fill(empty, float("-inf"))
    probabilities = weights / total[..., None]
    if p.rng is not None:
        shape = (q.shape[0], q.shape[1], q.shape[2], k.shape[2])
        keep = dropout_keep(p.rng, p.dropout_p, shape, p.first_sequence)
        kept = 1.0 / (1.0 - p.dropout_p) if p.dropout_p < 1.0 else 0.0
        probabilities = torch.where(keep, probabilities * kept, 0.0)
    return (probabilities @ v).to(p.query.dtype), lse


def _formula_packed(p: Problem) -> tuple[Tensor, Tensor]:
    outs, lses = [], []
    end = 0
    for rows, _, sequence in p.sequences():
        out, lse = formula(sequence)
        outs.append(out)
        lses.append(lse)
        end = rows.stop
    rest = p.query.shape[2] - end  # rows past the last sequence belong to none
    shape = (1, p.query.shape[1], rest)
    outs.append(p.query.new_zeros((*shape, p.value.shape[3])))
    lses.append(p.query.new_full(shape, float("-inf"), dtype=p.accumulate_dtype))
    return torch.cat(outs, dim=2), torch.cat(lses, dim=2)


def forward(p: Problem) -> tuple[Tensor, Tensor]:
    """Launch the forward: (out, lse)."""
    out, lse = allocate_forward(p)
    result, result_lse = formula(p)
    return out.copy_(result), lse.copy_(result_lse)


def gradients(
    p: Problem, grad_out: Tensor | None, grad_lse: Tensor | None, create_graph: bool = False
) -> dict[str, Tensor]:
    """Vector-Jacobian products of `formula` for every differentiable input that requires a gradient, by field name."""
    names = [n for n in ("query", "key", "value", "attn_mask", "sinks") if _wants_gradient(getattr(p, n))]
    with torch.enable_grad():
        outputs = formula(p)
    pairs = [(o, g) for o, g in zip(outputs, (grad_out, grad_lse), strict=True) if g is not None and o.requires_grad]
    inputs = [getattr(p, n) for n in names]
    if not pairs:
        return {n: torch.zeros_like(t) for n, t in zip(names, inputs, strict=True)}
    found = torch.autograd.grad(
        [o for o, _ in pairs],
        inputs,
        [g for _, g in pairs],
        create_graph=create_graph,
        allow_unused=True,
        materialize_grads=True,
    )
    return dict(zip(names, found, strict=True))


def _wants_gradient(tensor: Tensor | None) -> bool:
    return tensor is not None and tensor.requires_grad


def backward(
    p: Problem, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None, mask_grad: bool
) -> tuple[Tensor, ...]:
    """Launch the backward: gradients as `allocate_backward` lists them."""
    del out, lse  # recomputed
    results = allocate_backward(p, mask_grad)
    wanted = {"query": p.query, "key": p.key, "value": p.value, "attn_mask": p.attn_mask, "sinks": p.sinks}
    if not mask_grad:
        del wanted["attn_mask"]
    leaves: dict[str, Any] = {n: t.detach().requires_grad_() for n, t in wanted.items() if t is not None}
    found = gradients(replace(p, **leaves), grad_out, grad_lse)
    for name, result in zip(("query", "key", "value", "attn_mask", "sinks"), results, strict=True):
        if name in found:
            result.copy_(found[name])
    return results
