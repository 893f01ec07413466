"""The `triton` backend of the linear family: launches kernels/linear_*.py (installed as fastattn.kernels)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastattn.backends import FEATURES, Capability
from fastattn.dense.problem import unit_rows
from fastattn.dense.triton import CAPABILITY as DENSE
from fastattn.dense.triton_launch import matrix, padded, run, tiles_of
from fastattn.linear import triton_delta
from fastattn.linear.problem import Gradients, Problem, Results, allocate_backward, allocate_forward
from fastattn.linear.triton_launch import Launch, kernels, state

CAPABILITY = Capability(
    backend="triton",
    family="linear",
    devices=DENSE.devices,
    dtypes=DENSE.dtypes,
    max_head_dim=256,
    features=frozenset(FEATURES["linear"]) - {"transforms"},
    unavailable=DENSE.unavailable,
)


def forward(p: Problem) -> Results:
    """Launch the forward."""
    results = allocate_forward(p)
    if p.cu_seqlens is not None:  # rows past the last sequence belong to none
        results.out.zero_()
        results.denominator.zero_()
    launch = Launch(p)
    values = launch.values
    if p.beta is None:
        states, last = launch.states(launch.key, p.key, values, launch.initial_state(), reverse=False)
    else:
        errors = triton_delta.solve(launch)
        values, states, last = errors.values, errors.states, errors.last
    launch.outputs(results.out, results.denominator if p.normalize else None, launch.query, launch.key, values, states)
    if p.return_state:
        for place, found in zip(results[2:], (*last, launch.log_scale), strict=True):
            if found is not None:
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
    """Launch the backward: the states again, those of the gradients in reverse, then chunk by chunk."""
    results = allocate_backward(p)
    launch = Launch(p)
    query, key, values = launch.query, launch.key, launch.values
    grads = kernels().tiles.Values(*matrix(unit_rows(grad_out)), 1, p.scale, None, None)
    grad_last = _state_gradient(launch, grad_kv, grad_normalizer)
    if p.beta is None:
        states, _ = launch.states(key, p.key, values, launch.initial_state(), reverse=False)
        if p.normalize:
            grads = _before_division(launch, grads, unit_rows(out), denominator, unit_rows(grad_out), states)
        grad_states, grad_first = launch.states(query, p.query, grads, grad_last, reverse=True)
    else:
        errors = triton_delta.solve(launch)
        values, states = errors.values, errors.states
        grad_errors, grad_states, grad_first = triton_delta.error_gradients(launch, errors, grads, grad_last)

    # Gradients of key and value per query head; whole, where more is added to them.
    summed = launch.group > 1 or p.beta is not None
    grad_key, grad_value = (launch.per_step(*t.shape[2:]) if summed else t for t in (results.key, results.value))
    if p.cu_seqlens is not None:
        for grad in (results.query, grad_key, grad_value, results.decay, results.beta):
            grad.zero_()
    changes = totals = None
    if p.decay is not None:
        width = p.num_features if launch.vector else 1
        changes = launch.per_step(p.query.shape[2], width)
        totals = changes.new_empty((launch.chunks(p.query), width))
    launch.gradients(results.query, changes, None, query, key, grads, values, states, state(None))
    launch.gradients(grad_key, changes, totals, key, query, values, grads, grad_states, states, reverse=True)
    if p.beta is None:
        launch.outputs(grad_value, None, key, query, grads, grad_states, reverse=True)
    else:
        triton_delta.system_gradients(launch, errors, grad_errors, grad_key, grad_value, results.beta, changes)
    if changes is not None and totals is not None:
        launch.decay_gradient(results.decay, changes, totals)

    if summed:
        results.key.copy_(grad_key.unflatten(1, (-1, launch.group)).sum(2))
        results.value.copy_(grad_value.unflatten(1, (-1, launch.group)).sum(2))
    kept = launch.kept_initially()
    for grad, found in zip(results[-2:], grad_first, strict=True):
        if grad.numel():
            grad.copy_(found if kept is None else found * kept.view(*kept.shape, *[1] * (grad.dim() - 2)))
    return results


def _before_division(
    launch: Launch, grads: Any, out: Tensor, denominator: Tensor, grad_out: Tensor, states: Any
) -> Any:
    """The gradients of the numerators and, as what stands in the normaliser's column, of the denominators: `Values`."""
    if out.dtype != torch.float32:  # the two cancel in part, and what is left would be the rounding of out
        out = launch.per_step(*out.shape[2:])
        launch.outputs(out, torch.empty_like(denominator), launch.query, launch.key, launch.values, states)
    batch, heads, length, width = out.shape
    products = launch.per_step(length)
    block = 64
    tiles = tiles_of(length, block)
    run(
        kernels().rows.delta_kernel,
        tiles * heads * batch,
        *matrix(out),
        *matrix(grad_out),
        *(None, 0, 0, 0),
        products,
        heads,
        tiles,
        length,
        DV=width,
        BLOCK_DV=padded(width),
        BLOCK_M=block,
    )
    factor = torch.where(denominator == 0, 0.0, 1 / denominator)
    return grads._replace(scale=None, factor=factor, extra=-factor * products)


def _state_gradient(launch: Launch, grad_kv: Tensor | None, grad_normalizer: Tensor | None) -> Any:
    """The gradient of the state after the last step, as a `State`."""
    p = launch.p
    if grad_kv is None and grad_normalizer is None:
        return state(None)
    shape = (p.num_sequences, launch.heads, p.num_features, p.value.shape[3])
    kv = p.query.new_zeros(shape, dtype=torch.float32) if grad_kv is None else grad_kv.contiguous()
    if not p.normalize:
        return state(kv)
    return state(kv, kv.new_zeros(shape[:3]) if grad_normalizer is None else grad_normalizer.contiguous())
