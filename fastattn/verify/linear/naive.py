"""Linear attention in plain PyTorch with autograd, in the two ways that one would write it by hand.

``by_weights`` materialises the weight of every query and key, and in float64 is the truth; ``step_by_step`` carries a
state from step to step. Both round in the inputs' own dtype, and the larger error of the two is the yardstick of the
bar: kernels, which go chunk by chunk, sum in an order between them. They share nothing with the reference backend.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fastattn.verify.bar import accumulator_of
from fastattn.verify.linear.cases import Case
from fastattn.verify.linear.inputs import RELU_EPS, Inputs, signs


@dataclass
class _Prepared:
    """A problem in terms of features, in the inputs' dtype; masked keys hold zeros. Hq heads everywhere."""

    phi: Tensor  # (B, H, Nq, M)
    psi: Tensor  # (B, H, Nk, M); exponents (-inf where masked) of softmax features
    value: Tensor  # (B, H, Nk, Dv), with normalize a further column of ones
    decay: Tensor | None  # (B, H, N, 1 or M), in the accumulation dtype
    beta: Tensor | None  # (B, H, N, 1)
    state: Tensor  # (B, H, M, Dv), with normalize a further column
    log_scale: Tensor | None  # (B, H, 1, 1), of softmax features


def _prepare(case: Case, inputs: Inputs) -> _Prepared:
    dtype = inputs.query.dtype
    query = inputs.query
    key, value = (t.repeat_interleave(case.heads // case.hkv, 1) for t in (inputs.key, inputs.value))
    batch, heads, length, width = value.shape
    keep = value.new_ones(batch, 1, length, 1, dtype=torch.bool)
    if inputs.key_mask is not None:
        keep = inputs.key_mask[:, None, :, None]
    value = value.where(keep, 0)
    decay, beta = inputs.decay, inputs.beta
    if decay is not None:
        decay = decay[None, :, None].expand(batch, heads, length) if decay.ndim == 1 else decay
        decay = (decay if decay.ndim == 4 else decay[..., None]).where(keep, 0)
    if beta is not None:
        beta = beta[..., None].where(keep, 0)
    state = inputs.initial_kv
    state = value.new_zeros(batch, heads, case.m, width) if state is None else state.to(dtype)
    if case.normalize:
        normalizer = inputs.initial_normalizer
        normalizer = state.new_zeros(state.shape[:3]) if normalizer is None else normalizer.to(dtype)
        state = torch.cat([state, normalizer[..., None]], -1)
        value = torch.cat([value, torch.ones_like(value[..., :1])], -1)
    log_scale = None
    if case.feature == "softmax":
        assert inputs.projection is not None
        scale = case.head_dim**-0.5 if case.scale is None else case.scale
        phi, psi = (x @ (scale**0.5 * inputs.projection).mT for x in (query, key))
        if inputs.bias is not None:
            phi, psi = phi + inputs.bias, psi + inputs.bias
        phi = torch.exp(phi - phi.detach().amax(-1, keepdim=True))
        psi = (psi - scale / 2 * key.square().sum(-1, keepdim=True)).masked_fill(~keep, -math.inf)
        log_scale = state.new_full((batch, heads), -math.inf)
        if inputs.initial_log_scale is not None:
            log_scale = inputs.initial_log_scale.to(dtype)
        log_scale = log_scale[..., None, None]
    else:
        phi, psi = _features(case, inputs, query), _features(case, inputs, key).where(keep, 0)
    return _Prepared(phi, psi, value, decay, beta, state, log_scale)


def _features(case: Case, inputs: Inputs, x: Tensor) -> Tensor:
    projected = x if inputs.projection is None else x @ inputs.projection.mT
    match case.feature:
        case "elu":
            return torch.nn.functional.elu(projected) + 1
        case "relu":
            return torch.relu(projected) + (0 if inputs.projection is None else RELU_EPS)
        case "signs":
            return signs(x)
        case "cosformer":
            positions = torch.arange(x.shape[2], device=x.device, dtype=torch.float64)[:, None]
            angles = math.pi / 2 * positions / max(case.rows[1:])
            return torch.cat([torch.relu(x) * f(angles).to(x.dtype) for f in (torch.cos, torch.sin)], -1)
    return projected


def _rescaled(before: Tensor, exponents: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(log scale, factor of the state, features) once keys of those exponents, (B, H, n, M), are seen too."""
    after = torch.cat([before, exponents.detach().amax((2, 3), keepdim=True)], 2).amax(2, keepdim=True)
    known = after.masked_fill(after == -math.inf, 0)
    return after, torch.exp(before - known), torch.exp(exponents - known)


def step_by_step(case: Case, inputs: Inputs) -> dict[str, Tensor]:
    """The results of a batch of sequences, not packed: one step of the recurrence after another."""
    p = _prepare(case, inputs)
    state, log_scale = p.state, p.log_scale
    length = p.psi.shape[2]
    if not case.causal or not length:  # without an order, all keys are one step
        psi = p.psi
        if log_scale is not None and length:
            log_scale, factor, psi = _rescaled(log_scale, psi)
            state = state * factor
        state = state + psi.mT @ p.value
        return _results(case, p.phi @ state, state, log_scale)
    keys, factors = [x[:, :, 0, :, None] for x in p.psi.split(1, 2)], [state.new_ones(1, 1, 1, 1)] * length
    if p.decay is not None:
        factors = [torch.exp(x[:, :, 0, :, None]).to(state.dtype) for x in p.decay.split(1, 2)]
    if log_scale is not None:
        for t, exponents in enumerate(keys):
            log_scale, factor, keys[t] = _rescaled(log_scale, exponents)
            factors[t] = factors[t] * factor
    states = []
    if p.beta is None:
        gains = torch.stack(keys, 2) * p.value[..., None, :]
        for gain, factor in zip(gains.unbind(2), factors, strict=True):
            state = torch.addcmul(gain, state, factor)
            states.append(state)
    else:
        values, betas = p.value.split(1, 2), p.beta.split(1, 2)
        for value, beta, key, factor in zip(values, betas, keys, factors, strict=True):
            state = state * factor
            state = state + beta * key * (value - key.mT @ state)
            states.append(state)
    out = (p.phi[..., None, :] @ torch.stack(states, 2)).squeeze(3)
    return _results(case, out, state, log_scale)


def by_weights(case: Case, inputs: Inputs) -> dict[str, Tensor]:
    """The same results from the (Nq, Nk) weights of each head."""
    p = _prepare(case, inputs)
    phi, psi, value, state, log_scale = p.phi, p.psi, p.value, p.state, p.log_scale
    if log_scale is not None and psi.shape[2]:
        log_scale, factor, psi = _rescaled(log_scale, psi)
        state = state * factor
    started, left, remaining = phi, psi, state.new_ones(1, 1, 1, 1)
    factors = None
    if p.decay is not None:
        total = p.decay.cumsum(2)
        future = torch.ones(total.shape[2], total.shape[2], dtype=torch.bool, device=total.device).triu(1)
        factors = (total[:, :, :, None] - total[:, :, None]).masked_fill(future[..., None], -math.inf)
        factors = torch.exp(factors).to(phi.dtype)
        last = p.decay.sum(2, keepdim=True)
        started, left = phi * torch.exp(total).to(phi.dtype), psi * torch.exp(last - total).to(phi.dtype)
        remaining = torch.exp(last[:, :, 0, :, None]).to(phi.dtype)
    weights = _products(phi, psi, factors)
    weights = weights.tril() if case.causal else weights
    if p.beta is not None:  # value_t less what the state recalls for key_t, which earlier steps corrected in turn
        recalled = psi if p.decay is None else psi * torch.exp(total).to(phi.dtype)
        overlaps, wide = p.beta * _products(psi, psi, factors), accumulator_of(phi.dtype)
        corrections = p.beta * (value - recalled @ state)
        value = torch.linalg.solve_triangular(
            overlaps.tril(-1).to(wide), corrections.to(wide), upper=False, unitriangular=True
        ).to(phi.dtype)
    out = weights @ value + started @ state
    return _results(case, out, left.mT @ value + remaining * state, log_scale)


def _products(x: Tensor, y: Tensor, factors: Tensor | None) -> Tensor:
    """sum_m x_im y_jm factors_ijm."""
    if factors is None:
        return x @ y.mT
    if factors.shape[-1] == 1:
        return x @ y.mT * factors[..., 0]
    return torch.einsum("bhim,bhjm,bhijm->bhij", x, y, factors)


def _results(case: Case, out: Tensor, state: Tensor, log_scale: Tensor | None) -> dict[str, Tensor]:
    if case.normalize:
        sums = out[..., -1:]
        out = torch.where(sums == 0, 0, out[..., :-1] / sums.masked_fill(sums == 0, 1))
    else:
        out = out * (case.head_dim**-0.5 if case.scale is None else case.scale)
    results = {"out": out}
    if case.state_out:
        results["kv"] = state[..., :-1] if case.normalize else state
        if case.normalize:
            results["normalizer"] = state[..., -1]
        if log_scale is not None:
            results["log_scale"] = log_scale[..., 0, 0]
    return results
