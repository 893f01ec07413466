"""Linear attention by the letter of its contract, one head and one step at a time, for the tests to judge by.

The recurrence of `fastattn.linear.problem`, with one `if` per clause and softmax features as they are defined, without
the factors that cancel. It shares no code with the package.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

Features = Callable[[Tensor], Tensor]  # of one query or key, (D,) to (M,)


def softmax_feature(projection: Tensor, bias: Tensor | None, scale: float) -> Features:
    """exp(w_m . x + b_m - |x|^2 / 2) of x = sqrt(scale) times a query or key."""

    def features(vector: Tensor) -> Tensor:
        x = math.sqrt(scale) * vector
        exponents = projection @ x - x.dot(x) / 2
        return torch.exp(exponents if bias is None else exponents + bias)

    return features


def brute_force_linear(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    causal: bool,
    features: Features,
    normalize: bool,
    decay: Tensor | None = None,
    beta: Tensor | None = None,
    scale: float | None = None,
    key_mask: Tensor | None = None,
    initial_kv: Tensor | None = None,
    initial_normalizer: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(out, kv, normalizer) of (B, H, N, D) tensors; float64 in, float64 out; differentiable.

    decay: (H,), (B, H, N) or (B, H, N, M). scale: of an output that is not normalised.
    """
    batch, heads, q_len, dim = query.shape
    kv_heads, k_len = key.shape[1:3]
    scale = 1.0 / math.sqrt(dim) if scale is None else scale
    outs, states, sums = [], [], []
    for b in range(batch):
        for h in range(heads):
            shared = h // (heads // kv_heads)
            num_features = len(features(query.new_zeros(dim)))
            state = query.new_zeros(num_features, value.shape[-1]) if initial_kv is None else initial_kv[b, h]
            total = query.new_zeros(num_features) if initial_normalizer is None else initial_normalizer[b, h]
            rows = []

            def answer(vector: Tensor, state: Tensor, total: Tensor) -> Tensor:
                phi = features(vector)
                numerator = state.T @ phi
                if not normalize:
                    return scale * numerator
                denominator = phi.dot(total)
                return numerator / denominator if denominator != 0 else torch.zeros_like(numerator)

            for t in range(k_len):
                if key_mask is None or key_mask[b, t]:
                    psi, v = features(key[b, shared, t]), value[b, shared, t]
                    if decay is not None:
                        log_factor = decay[h] if decay.ndim == 1 else decay[b, h, t]
                        factor = torch.exp(log_factor.expand(num_features))
                        state, total = factor[:, None] * state, factor * total
                    if beta is not None:
                        v = beta[b, h, t] * (v - state.T @ psi)
                    state, total = state + torch.outer(psi, v), total + psi
                if causal:
                    rows.append(answer(query[b, h, t], state, total))
            if not causal:
                rows = [answer(query[b, h, i], state, total) for i in range(q_len)]
            outs.append(torch.stack(rows) if rows else query.new_zeros(0, value.shape[-1]))
            states.append(state)
            sums.append(total)
    kv = torch.stack(states).unflatten(0, (batch, heads))
    return torch.stack(outs).unflatten(0, (batch, heads)), kv, torch.stack(sums).unflatten(0, (batch, heads))


@pytest.fixture(scope="session")
def brute_force() -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """`brute_force_linear`."""
    return brute_force_linear


@pytest.fixture(scope="session")
def softmax_features_by_definition() -> Callable[..., Features]:
    """`softmax_feature`."""
    return softmax_feature


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    """Dynamo counts recompilations of a function over the whole process; each test is to count its own."""
    torch._dynamo.reset()
