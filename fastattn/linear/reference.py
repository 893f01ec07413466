"""The `reference` backend: the definition of what linear attention computes, in plain differentiable PyTorch.

The chunkwise algorithm: within a chunk of steps the weights are a small matrix, across chunks a state is carried.
Accumulates in float32 (float64 for float64 inputs).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn.backends import FEATURES, Capability
from fastattn.linear.problem import Gradients, Problem, Results, allocate_backward, allocate_forward

CAPABILITY = Capability(
    backend="reference",
    family="linear",
    devices=frozenset(),
    dtypes=frozenset({torch.float32, torch.bfloat16, torch.float16, torch.float64}),
    max_head_dim=None,
    features=frozenset(FEATURES["linear"]),
)

CHUNK = 64
VECTOR_DECAY_CHUNK = 16  # its weights within a chunk are built from CHUNK x CHUNK x M decay factors


@dataclass(slots=True)
class _Parts:
    """A problem in terms of features, in the accumulation dtype; keys and values once per query head."""

    query: Tensor  # (B, Hq, Nq, M)
    key: Tensor  # (B, Hq, Nk, M)
    value: Tensor  # (B, Hq, Nk, Dv), with normalize a further column of ones
    decay: Tensor | None  # (B, Hq, N, 1 or M), with what the softmax features' running maximum adds
    beta: Tensor | None  # (B, Hq, N, 1)
    state: Tensor  # (B, Hq, M, Dv), before the first step, with normalize a further column for the normalizer
    log_scale: Tensor | None  # (B, Hq), after the last step


def features(x: Tensor, p: Problem) -> Tensor:
    """(B, H, N, D) to (B, H, N, M) by the problem's feature map; of softmax features W x + bias."""
    x = x if p.projection is None else x @ p.projection.mT
    if p.feature == "elu":
        return torch.where(x > 0, x + 1, torch.exp(x.clamp(max=0)))
    if p.feature == "relu":
        return torch.relu(x) + p.feature_eps
    return x if p.feature_bias is None else x + p.feature_bias


def _parts(p: Problem) -> _Parts:
    dtype, group = p.accumulate_dtype, p.query.shape[1] // p.key.shape[1]
    query = p.query.to(dtype)
    key, value = (t.to(dtype).repeat_interleave(group, 1) for t in (p.key, p.value))
    decay = None if p.decay is None else p.decay if p.decay.dim() == 4 else p.decay[..., None]
    beta = None if p.beta is None else p.beta[..., None]
    keep = None if p.key_mask is None else p.key_mask[:, None, :, None]
    if keep is not None:  # a masked key may hold anything, NaN included
        key, value = torch.where(keep, key, 0), torch.where(keep, value, 0)
        decay = None if decay is None else torch.where(keep, decay, 0)
        beta = None if beta is None else torch.where(keep, beta, 0)
    phi, psi = features(query, p), features(key, p)
    state = p.initial_kv
    if state is None:
        state = phi.new_zeros(*query.shape[:2], p.num_features, value.shape[3])
    if p.normalize:
        z = state.new_zeros(state.shape[:3]) if p.initial_normalizer is None else p.initial_normalizer
        state = torch.cat([state, z[..., None]], -1)
        value = torch.cat([value, value.new_ones(*value.shape[:3], 1)], -1)
    log_scale = None
    if p.feature == "softmax":
        phi = torch.exp(phi - phi.detach().amax(-1, keepdim=True))
        exponents = psi - p.scale / 2 * key.square().sum(-1, keepdim=True)
        if keep is not None:
            exponents = exponents.masked_fill(~keep, float("-inf"))
        reached = _log_scales(p, exponents.detach())
        before, after = (reached[:, :, :-1], reached[:, :, 1:]) if p.causal else (reached[:, :, :1], reached[:, :, -1:])
        psi = torch.exp(exponents - _finite(after))
        change = _ratio(before, after)
        if p.causal:
            decay = change if decay is None else decay + change
        else:
            state = state * torch.exp(change)
        log_scale = reached[:, :, -1, 0]
    elif keep is not None:
        psi = torch.where(keep, psi, 0)
    return _Parts(phi, psi, value, decay, beta, state, log_scale)


def _log_scales(p: Problem, exponents: Tensor) -> Tensor:
    """c before the first and after each step, (B, Hq, N + 1, 1)."""
    highest = exponents.amax(-1, keepdim=True)
    start = highest.new_full((*highest.shape[:2], 1, 1), float("-inf"))
    if p.initial_log_scale is not None:
        start = p.initial_log_scale[..., None, None]
    return torch.cat([start, highest], 2).cummax(2).values


def _finite(log_scale: Tensor) -> Tensor:
    return log_scale.masked_fill(log_scale == float("-inf"), 0)


def _ratio(before: Tensor, after: Tensor) -> Tensor:
    """The log of what a state has to be multiplied by; 0 while there is none."""
    return (before - _finite(after)).masked_fill(before == float("-inf"), 0)


def formula(p: Problem, chunk: int | None = None) -> Results:
    """The results as differentiable PyTorch operations, to any order and under torch.func transforms."""
    if torch.is_autocast_enabled(p.query.device.type):
        # The products below are in the accumulation dtype; autocast would take them down.
        with torch.autocast(p.query.device.type, enabled=False):
            return formula(p, chunk)
    if p.cu_seqlens is not None:
        return _formula_packed(p)
    parts = _parts(p)
    if p.causal:
        vector = parts.decay is not None and parts.decay.shape[3] > 1
        out, state = chunkwise(parts, chunk or (VECTOR_DECAY_CHUNK if vector else CHUNK))
    else:
        state = parts.state + parts.key.mT @ parts.value
        out = parts.query @ state
    none = out.new_empty(0)
    denominator = normalizer = none
    if p.normalize:
        out, denominator = out[..., :-1], out[..., -1]
        state, normalizer = state[..., :-1], state[..., -1]
        empty = (denominator.abs() < p.least_denominator)[..., None]
        out = torch.where(empty, 0, out / denominator[..., None].masked_fill(empty, 1))
    elif p.feature != "softmax":
        out = out * p.scale
    if not p.return_state:
        state = normalizer = none
    log_scale = parts.log_scale if p.return_state and parts.log_scale is not None else none
    return Results(out.to(p.query.dtype), denominator, state, normalizer, log_scale)


def chunkwise(parts: _Parts, chunk: int) -> tuple[Tensor, Tensor]:
    """(out, final state) of a causal problem in terms of features: matrices within chunks, a state between them."""
    length = parts.query.shape[2]
    padding = -length % chunk

    def chunks(x: Tensor | None) -> Tensor | None:  # (B, H, T, C, ...); steps of zeros leave the state as it is
        return None if x is None else F.pad(x, (0, 0, 0, padding)).unflatten(2, (-1, chunk))

    q, k, v = chunks(parts.query), chunks(parts.key), chunks(parts.value)
    decay, beta = chunks(parts.decay), chunks(parts.beta)
    assert q is not None
    assert k is not None
    assert v is not None
    later = torch.ones(chunk, chunk, dtype=torch.bool, device=q.device).triu(1)
    if decay is None:
        q_start, k_end, forgotten = q, k, None
        weights, products = None, q @ k.mT
    else:
        total = decay.cumsum(3)  # log of what is left of the state at the chunk's start
        q_start, k_end = q * total.exp(), k * (total[..., -1:, :] - total).exp()
        forgotten = total[..., -1, :, None].exp()
        distance = total[..., :, None, :] - total[..., None, :, :]
        weights = distance.masked_fill(later[..., None], float("-inf")).exp()
        if weights.shape[-1] == 1:
            weights = weights.squeeze(-1)
            products = q @ k.mT * weights
        else:
            products = (q[..., :, None, :] * k[..., None, :, :] * weights).sum(-1)
    products = products.masked_fill(later, 0)

    # With the delta rule v depends on the state: v' = corrected - recalled @ state.
    recalled = None
    if beta is not None:
        overlaps = k @ k.mT if weights is None else k @ k.mT * weights
        system = (beta * overlaps).tril(-1) + torch.eye(chunk, dtype=q.dtype, device=q.device)
        k_start = k if decay is None else k * total.exp()
        solved = torch.linalg.solve_triangular(system, beta * torch.cat([v, k_start], -1), upper=False)
        v, recalled = solved.split([v.shape[-1], k.shape[-1]], -1)

    # Unbound once: the gradient of an index would fill a tensor of all chunks with zeros for each of them.
    steps = zip(
        *(
            [None] * q.shape[2] if x is None else x.unbind(2)
            for x in (products, v, q_start, k_end.mT, forgotten, recalled)
        ),
        strict=True,
    )
    state, outs = parts.state, []
    for product, values, from_start, to_end, kept, corrected in steps:
        values = values if corrected is None else values - corrected @ state
        outs.append(product @ values + from_start @ state)
        state = (state if kept is None else kept * state) + to_end @ values
    if not outs:
        return parts.query.new_empty(*v.shape[:2], 0, v.shape[-1]), state
    return torch.stack(outs, 2).flatten(2, 3)[:, :, :length], state


def _formula_packed(p: Problem) -> Results:
    parts = [formula(sequence) for _, _, sequence in p.sequences()]
    if not parts:
        return Results(*(torch.zeros_like(t) for t in allocate_forward(p)))
    assert p.cu_seqlens is not None
    rest = p.query.shape[2] - int(p.cu_seqlens[-1])  # rows past the last sequence belong to none
    out = [p.query.new_zeros(1, p.query.shape[1], rest, p.value.shape[3])]
    denominator = [out[0].new_zeros(out[0].shape[:3], dtype=p.accumulate_dtype)] if p.normalize else []

    def joined(index: int, dim: int, *more: Tensor) -> Tensor:
        return torch.cat([*(part[index] for part in parts), *more], dim)

    states = (joined(i, 0) for i in (2, 3, 4))
    return Results(joined(0, 2, *out), joined(1, 2 if p.normalize else 0, *denominator), *states)


def forward(p: Problem) -> Results:
    """Launch the forward."""
    results = allocate_forward(p)
    for place, found in zip(results, formula(p), strict=True):
        place.copy_(found)
    return results


def backward(
    p: Problem,
    out: Tensor,
    denominator: Tensor,
    grad_out: Tensor,
    grad_kv: Tensor | None,
    grad_normalizer: Tensor | None,
) -> Gradients:
    """Launch the backward: autograd through the formula."""
    del out, denominator  # recomputed
    gradients = allocate_backward(p)
    leaves = [None if t is None else t.detach().requires_grad_() for t in p.differentiable()]
    inputs: dict[str, Any] = dict(zip(Gradients._fields, leaves, strict=True))
    with _autograd():
        found = differentiable_gradients(replace(p, **inputs), grad_out, grad_kv, grad_normalizer)
    for name, gradient in found.items():
        getattr(gradients, name).copy_(gradient.detach())
    return gradients


@contextmanager
def _autograd() -> Iterator[None]:
    """Autograd switched on, also where ops run below it (in compiled code), where enable_grad alone does nothing."""
    keys, off = torch._C.DispatchKey, torch._C._dispatch_tls_local_exclude_set()
    for key in (keys.AutogradFunctionality, keys.ADInplaceOrView):
        off = off - torch._C.DispatchKeySet(key)
    on = torch._C._dispatch_tls_local_include_set()
    with torch._C._ForceDispatchKeyGuard(on, off), torch.enable_grad():
        yield


def differentiable_gradients(
    p: Problem, grad_out: Tensor | None, grad_kv: Tensor | None, grad_normalizer: Tensor | None
) -> dict[str, Tensor]:
    """Gradients of every input that requires one, by field name, as a graph that can be differentiated again."""
    inputs = {
        n: t for n, t in zip(Gradients._fields, p.differentiable(), strict=True) if t is not None and t.requires_grad
    }
    results = formula(p)
    pairs = ((results.out, grad_out), (results.kv, grad_kv), (results.normalizer, grad_normalizer))
    outputs = [(o, g) for o, g in pairs if g is not None and o.requires_grad]
    found = torch.autograd.grad(
        [o for o, _ in outputs],
        list(inputs.values()),
        [g for _, g in outputs],
        create_graph=True,
        allow_unused=True,
        materialize_grads=True,
    )
    return dict(zip(inputs, found, strict=True))
