"""The `reference` backend: the definition of what dense attention computes, in plain differentiable PyTorch.

It materialises the (B, Hq, Sq, Sk) matrix, accumulates in float32 (float64 for float64 inputs) and is the oracle that
every kernel is held to.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastattn.backends import FEATURES, Capability
from fastattn.blockmask.lists import to_dense
from fastattn.dense.append import append as append
from fastattn.dense.philox import dropout_keep
from fastattn.dense.problem import Problem, allocate_backward, allocate_forward

CAPABILITY = Capability(
    backend="reference",
    family="dense",
    devices=frozenset(),
    dtypes=frozenset({torch.float32, torch.bfloat16, torch.float16, torch.float64}),
    max_head_dim=None,
    features=frozenset(FEATURES["dense"]),
)


def reach(p: Problem) -> Tensor:
    """Which keys each row may see by position and block mask: bool (B or 1, Hq or 1, Sq, Sk)."""
    position, key = _positions(p), _keys(p)
    seen = torch.ones_like(position, dtype=torch.bool) & torch.ones_like(key, dtype=torch.bool)
    if p.window_left is not None:
        seen = seen & (key >= position - p.window_left)
    if p.window_right is not None:
        seen = seen & (key <= position + p.window_right)
    if p.key_start is not None:
        seen = seen & (key >= p.key_start.view(-1, 1, 1, 1))
    if p.key_lengths is not None:
        seen = seen & (key < p.key_lengths.view(-1, 1, 1, 1))
    lists = p.mask_lists
    if lists is not None:
        seen = seen & to_dense(lists, (0, seen.shape[2]), seen.shape[3])
    return seen


def _positions(p: Problem) -> Tensor:
    """The key position that each query stands at, (B or 1, 1, Sq, 1)."""
    position = torch.arange(p.query.shape[2], device=p.query.device).view(1, 1, -1, 1) + p.offset
    return position if p.query_start is None else position + p.query_start.view(-1, 1, 1, 1)


def _keys(p: Problem) -> Tensor:
    return torch.arange(p.key.shape[2], device=p.query.device).view(1, 1, 1, -1)


def masked_scores(p: Problem, query: Tensor, key: Tensor, sees: Tensor) -> tuple[Tensor, Tensor | None]:
    """Scores (B, Hq, Sq, Sk) with everything that is added, -inf where a row does not see a key; and softcap's tanh.

    query (B, Hq, Sq, D) and key (B, Hq, Sk, D) are those of the problem in the accumulation dtype.
    """
    scores = (query @ key.mT) * p.scale
    tanh = None
    if p.softcap is not None:
        tanh = torch.tanh(scores / p.softcap)
        scores = p.softcap * tanh
    if p.alibi_slopes is not None:
        scores = scores - p.alibi_slopes[:, :, None, None] * (_positions(p) - _keys(p)).abs()
    if p.attn_mask is not None:
        if p.attn_mask.dtype == torch.bool:
            sees = sees & p.attn_mask
        else:
            scores = scores + p.attn_mask.to(scores.dtype)
    return scores.masked_fill(~sees, float("-inf")), tanh


def dropout_factors(p: Problem) -> Tensor | None:
    """Dropout's factor on each probability, 0 or 1 / (1 - p), in the accumulation dtype; None without dropout."""
    if p.rng is None:
        return None
    factor = 1.0 / (1.0 - p.dropout_p) if p.dropout_p < 1.0 else 0.0
    shape = (p.query.shape[0], p.query.shape[1], p.query.shape[2], p.key.shape[2])
    return dropout_keep(p.rng, p.dropout_p, shape, p.first_sequence).to(p.accumulate_dtype) * factor


def attention_weights(p: Problem, lse: Tensor) -> Tensor:
    """The probabilities that a problem's output was weighted with, after dropout, differentiable: exp(scores - lse).

    Args:
        p: not packed.
        lse: (B, Hq, Sq), as the forward returned it; part of the gradient flows through it.

    Returns:
        (B, Hq, Sq, Sk) in query's dtype; a row that sees no key is zero.
    """
    # In the accumulation dtype: scores rounded to half precision would not agree with the log-sum-exp.
    with torch.autocast(p.query.device.type, enabled=False):
        key = p.key.to(lse.dtype).repeat_interleave(p.query.shape[1] // p.key.shape[1], dim=1)
        scores, _ = masked_scores(p, p.query.to(lse.dtype), key, reach(p))
        # -inf minus -inf is NaN: a row without keys keeps its -inf scores, whose exponential is the zero wanted.
        weights = torch.exp(scores - lse.masked_fill(lse == float("-inf"), 0.0)[..., None])
        factors = dropout_factors(p)
        return (weights if factors is None else weights * factors).to(p.query.dtype)


@dataclass(frozen=True)
class _Parts:
    """What the forward and the backward formulas share, in the accumulation dtype; K and V once per query head."""

    query: Tensor  # (B, Hq, Sq, D)
    key: Tensor  # (B, Hq, Sk, D)
    value: Tensor  # (B, Hq, Sk, Dv)
    tanh: Tensor | None  # of the capped scores
    probabilities: Tensor  # (B, Hq, Sq, Sk), before dropout
    kept: Tensor | None  # dropout's factor on each probability: 0 or 1 / (1 - p)
    lse: Tensor  # (B, Hq, Sq)


def _parts(p: Problem) -> _Parts:
    dtype = p.accumulate_dtype
    sees = reach(p)
    # A key that no row of its sequence sees may hold anything, NaN included.
    exists = sees.any(dim=2)[..., None]
    groups = p.query.shape[1] // p.key.shape[1]
    query = p.query.to(dtype)
    key = torch.where(exists, p.key.repeat_interleave(groups, dim=1), 0).to(dtype)
    value = torch.where(exists, p.value.repeat_interleave(groups, dim=1), 0).to(dtype)

    scores, tanh = masked_scores(p, query, key, sees)
    sink = None if p.sinks is None else p.sinks.to(dtype).view(1, -1, 1)
    weights, total, highest = _exponentials(scores, sink)
    empty = total == 0
    total = total.masked_fill(empty, 1.0)
    return _Parts(
        query=query,
        key=key,
        value=value,
        tanh=tanh,
        probabilities=weights / total[..., None],
        kept=dropout_factors(p),
        lse=(highest + torch.log(total)).masked_fill(empty, float("-inf")),
    )


def _exponentials(scores: Tensor, sink: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """exp(scores - highest), their row sums with the sink's share, and the highest score (0 for a row without keys)."""
    if scores.shape[-1] == 0:
        highest = scores.new_full(scores.shape[:-1], float("-inf"))
    else:
        highest = scores.detach().amax(dim=-1)
    if sink is not None:
        highest = torch.maximum(highest, sink.detach())
    highest = highest.masked_fill(highest == float("-inf"), 0.0)
    weights = torch.exp(scores - highest[..., None])
    total = weights.sum(dim=-1)
    return weights, total if sink is None else total + torch.exp(sink - highest), highest


def formula(p: Problem) -> tuple[Tensor, Tensor]:
    """(out, lse) as differentiable PyTorch operations, to any order and under torch.func transforms."""
    if torch.is_autocast_enabled(p.query.device.type):
        # The products below are in the accumulation dtype; autocast would take them down again.
        with torch.autocast(p.query.device.type, enabled=False):
            return formula(p)
    if p.cu_seqlens_q is not None:
        return _formula_packed(p)
    parts = _parts(gathered(p))
    dropped = parts.probabilities if parts.kept is None else parts.probabilities * parts.kept
    return (dropped @ parts.value).to(p.query.dtype), parts.lse


def gathered(p: Problem) -> Problem:
    """The problem with each sequence's pages copied one after another."""
    if p.block_table is None:
        return p
    pages = p.block_table.long().clamp(0, max(p.key.shape[0] - 1, 0))  # entries that no key uses may be anything
    key, value = (cache[pages].transpose(1, 2).flatten(2, 3) for cache in (p.key, p.value))
    return replace(p, key=key, value=value, block_table=None)


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


def backward(
    p: Problem, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None, mask_grad: bool
) -> tuple[Tensor, ...]:
    """Launch the backward: gradients as `allocate_backward` lists them."""
    del out, lse  # recomputed
    results = allocate_backward(p, mask_grad)
    if p.cu_seqlens_q is None:
        for result, found in zip(results, _backward_formula(p, grad_out, grad_lse, mask_grad), strict=True):
            if found is not None:
                result.copy_(found)
        return results
    for result in results:
        result.zero_()
    for b, (rows, keys, sequence) in enumerate(p.sequences()):
        lse_part = None if grad_lse is None else grad_lse[:, :, rows]
        parts = _backward_formula(sequence, grad_out[:, :, rows], lse_part, mask_grad)
        grad_query, grad_key, grad_value, grad_mask, grad_sinks = results
        seqlen_q, seqlen_k = rows.stop - rows.start, keys.stop - keys.start
        places = (
            grad_query[:, :, rows],
            grad_key[:, :, keys],
            grad_value[:, :, keys],
            p.mask_of_sequence(grad_mask, b, seqlen_q, seqlen_k) if mask_grad else None,
            grad_sinks,
        )
        for place, found in zip(places, parts, strict=True):
            if place is not None and found is not None:
                place += found
    return results


def _backward_formula(
    p: Problem, grad_out: Tensor, grad_lse: Tensor | None, mask_grad: bool
) -> tuple[Tensor | None, ...]:
    """Gradients of query, key, value, attn_mask and sinks, written out: autograd is off where ops run."""
    parts = _parts(p)
    dtype = p.accumulate_dtype
    d_out = grad_out.to(dtype)
    d_probabilities = d_out @ parts.value.mT
    dropped = parts.probabilities
    if parts.kept is not None:
        d_probabilities = d_probabilities * parts.kept
        dropped = dropped * parts.kept
    # Softmax: dS = P * (dP - sum_j P dP), and LSE adds its own gradient to every score of the row.
    delta = (parts.probabilities * d_probabilities).sum(dim=-1)
    if grad_lse is not None:
        delta = delta - grad_lse
    d_scores = parts.probabilities * (d_probabilities - delta[..., None])
    d_products = d_scores if parts.tanh is None else d_scores * (1 - parts.tanh.square())
    d_products = d_products * p.scale

    grad_mask = grad_sinks = None
    if mask_grad:
        assert p.attn_mask is not None
        grad_mask = d_scores.sum_to_size(p.attn_mask.shape)
    if p.sinks is not None:
        sink = p.sinks.to(dtype).view(1, -1, 1)
        share = torch.exp((sink - parts.lse).masked_fill(sink == float("-inf"), float("-inf")))
        grad_sinks = -(share * delta).sum(dim=(0, 2))
    return (
        d_products @ parts.key,
        _sum_groups(d_products.mT @ parts.query, p.key.shape[1]),
        _sum_groups(dropped.mT @ d_out, p.key.shape[1]),
        grad_mask,
        grad_sinks,
    )


def _sum_groups(gradient: Tensor, heads_kv: int) -> Tensor:
    """(B, Hq, Sk, D) to (B, Hkv, Sk, D)."""
    return gradient.unflatten(1, (heads_kv, -1)).sum(dim=2)


def differentiable_gradients(p: Problem, grad_out: Tensor | None, grad_lse: Tensor | None) -> dict[str, Tensor]:
    """Gradients of every input that requires one, by field name, as a graph that can be differentiated again."""
    names = [n for n in ("query", "key", "value", "attn_mask", "sinks") if _requires_grad(getattr(p, n))]
    outputs = [(o, g) for o, g in zip(formula(p), (grad_out, grad_lse), strict=True) if g is not None]
    found = torch.autograd.grad(
        [o for o, _ in outputs],
        [getattr(p, n) for n in names],
        [g for _, g in outputs],
        create_graph=True,
        allow_unused=True,
        materialize_grads=True,
    )
    return dict(zip(names, found, strict=True))


def _requires_grad(tensor: Tensor | None) -> bool:
    return tensor is not None and tensor.requires_grad
