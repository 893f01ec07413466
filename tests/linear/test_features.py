"""Feature maps: what each computes, that callables and packed positions reach it, and that softmax is estimated.

Each test states what would make it fail.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

import fastattn
from fastattn import verify
from fastattn.linear import Cosformer, FeatureMap, relu_features, softmax_features
from fastattn.linear.features import NAMES, resolve
from fastattn.linear.random_features import random_projection

BACKENDS = [backend for backend in verify.backends_on("cpu", family="linear") if backend != "triton"]
every_backend = pytest.mark.parametrize("backend", BACKENDS)


def by_features(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention with weights q_i . k_j, normalised."""
    weights = q @ k.mT
    return weights @ v / weights.sum(-1, keepdim=True)


@every_backend
def test_each_name(backend: str) -> None:
    """Fails where a name stands for another function than its paper's, at and below zero too."""
    q, k, v = torch.randn(3, 1, 2, 9, 6, dtype=torch.float64)
    q[..., 0], k[..., 0] = 0.0, 1.0  # no row is without a positive feature
    q[..., 1] = 1.0
    k = k.abs()
    maps = {"identity": lambda x: x, "elu": lambda x: functional.elu(x) + 1, "relu": functional.relu}
    assert set(maps) | {"cosformer"} == set(NAMES)
    for name, function in maps.items():
        inputs = (q.abs() if name == "identity" else q, k, v)
        found = fastattn.linear_attention(*inputs, causal=False, feature_map=name, backend=backend)
        torch.testing.assert_close(found, by_features(*map(function, inputs[:2]), v))


@every_backend
def test_relu_features_add_eps(backend: str) -> None:
    """Fails where eps is added before the relu, to one side only, or not at all."""
    q, k, v = torch.randn(3, 1, 2, 9, 6, dtype=torch.float64)
    projection = torch.randn(4, 6, dtype=torch.float64)

    def mapped(x: Tensor) -> Tensor:
        return torch.relu(x @ projection.mT) + 0.25

    found = fastattn.linear_attention(
        q, k, v, causal=False, feature_map=relu_features(projection, 0.25), backend=backend
    )
    torch.testing.assert_close(found, by_features(mapped(q), mapped(k), v))
    found = fastattn.linear_attention(q, k, v, causal=False, feature_map=relu_features(None, 0.25), backend=backend)
    torch.testing.assert_close(found, by_features(torch.relu(q) + 0.25, torch.relu(k) + 0.25, v))


@every_backend
def test_performer_attention_is_its_feature_maps(backend: str) -> None:
    """Fails where an option of `performer_attention` is another feature map than its name says."""
    q, k, v = torch.randn(3, 1, 2, 9, 6, dtype=torch.float64)
    projection, bias = torch.randn(5, 6, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    both = torch.cat([projection, -projection])
    options: dict[str, Any] = {"causal": True, "backend": backend}
    pairs: list[tuple[dict[str, Any], FeatureMap]] = [
        ({}, softmax_features(projection)),
        ({"bias": bias}, softmax_features(projection, bias)),
        ({"features": "hyperbolic"}, softmax_features(both)),
        ({"features": "hyperbolic", "bias": bias}, softmax_features(both, torch.cat([bias, bias]))),
        ({"features": "relu"}, relu_features(projection, 1e-3)),
    ]
    for given, feature_map in pairs:
        found = fastattn.performer_attention(q, k, v, projection=projection, **given, **options)
        assert torch.equal(found, fastattn.linear_attention(q, k, v, feature_map=feature_map, **options))


@every_backend
@pytest.mark.parametrize("causal", [False, True])
def test_performer_estimates_softmax_attention(backend: str, causal: bool) -> None:
    """Fails where many features do not come close to softmax attention of the same scale: a lost |x|^2 / 2, a scale
    applied once or twice more, a key's factor that does not cancel. Values with a row of their own for each key show a
    collapse to the average."""
    q, k = 0.5 * torch.randn(2, 1, 2, 40, 16, dtype=torch.float64)  # |x + y|^2 near 2: a relative error of 2 %
    v = torch.eye(40, dtype=torch.float64).expand(1, 2, 40, 40)
    average = torch.ones(40, 40, dtype=torch.float64)
    average = average.tril() if causal else average
    average = average / average.sum(-1, keepdim=True)
    projection = random_projection(20_000, 16, dtype=torch.float64)
    options: dict[str, Any] = {"causal": causal}
    for scale in (None, 0.125):
        exact = fastattn.attention(q, k, v, scale=scale, backend="reference", **options)
        found = fastattn.performer_attention(q, k, v, projection=projection, scale=scale, backend=backend, **options)
        assert (found - exact).norm() < 0.3 * (average - exact).norm()


@every_backend
def test_a_module_learns_through_its_feature_map(backend: str) -> None:
    """Fails where no gradient reaches the parameters of a feature map that is a module."""
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Softplus())
    q, k, v = torch.randn(3, 1, 2, 9, 6)
    found = fastattn.linear_attention(q, k, v, causal=False, feature_map=module, backend=backend)
    exact = by_features(module(q), module(k), v)
    torch.testing.assert_close(found, exact)
    weights = list(module.parameters())
    grads = [torch.autograd.grad(t.square().sum(), weights) for t in (found, exact)]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)


@every_backend
def test_a_callable_never_sees_what_masked_keys_hold(backend: str) -> None:
    """Fails where NaN of a masked key passes through a feature map into a result or its parameters' gradients."""
    module = torch.nn.Linear(4, 4)
    q, k, v = torch.randn(3, 1, 1, 6, 4)
    key_mask = torch.tensor([[True, True, False, True, False, True]])
    k = k.masked_fill(~key_mask[:, None, :, None], math.nan)
    out = fastattn.linear_attention(
        q, k, v, causal=True, feature_map=lambda x: module(x).exp(), key_mask=key_mask, backend=backend
    )
    assert out.isfinite().all()
    assert all(g.isfinite().all() for g in torch.autograd.grad(out.sum(), list(module.parameters())))


def test_cosformer_features() -> None:
    """Fails where products of features are not relu(q) . relu(k) cos(pi (i - j) / 2L), or positions ignore `start`."""
    q, k = torch.randn(2, 7, 5, dtype=torch.float64)
    positions = torch.arange(7)
    angles = math.pi / 2 * (positions[:, None] - positions) / 10
    exact = torch.relu(q) @ torch.relu(k).mT * angles.double().cos()
    found = Cosformer(10)(q, positions) @ Cosformer(10)(k, positions).mT
    torch.testing.assert_close(found, exact)
    assert (found >= 0).all()  # within the length
    assert torch.equal(Cosformer(10, start=3)(q, positions), Cosformer(10)(q, positions + 3))
    assert Cosformer(10)(q.bfloat16(), positions).dtype == torch.bfloat16


@every_backend
def test_cosformer_counts_within_each_packed_sequence(backend: str) -> None:
    """Fails where positions run on from one packed sequence to the next, also past empty ones."""
    q, k, v = torch.randn(3, 1, 2, 12, 4)
    bounds = torch.tensor([0, 5, 5, 12])
    options: dict[str, Any] = {"causal": True, "feature_map": Cosformer(7), "backend": backend}
    packed = fastattn.linear_attention(q, k, v, cu_seqlens=bounds, **options)
    for begin, end in ((0, 5), (5, 12)):
        part = [x[:, :, begin:end] for x in (q, k, v)]
        torch.testing.assert_close(packed[:, :, begin:end], fastattn.linear_attention(*part, **options))


def test_resolve() -> None:
    """Fails where "cosformer" has another length than the call's, or what is no name is not passed on as it is."""
    assert resolve("cosformer", 9) == Cosformer(9)
    assert resolve("cosformer", 0) == Cosformer(1)  # no steps
    for feature_map in (FeatureMap("elu"), Cosformer(3), torch.relu):
        assert resolve(feature_map, 9) is feature_map


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@every_backend
def test_features_are_not_rounded_to_16_bits(backend: str, dtype: torch.dtype) -> None:
    """Fails where features, their sums or the state are kept in the inputs' dtype: 2000 steps of equal keys would
    stall, and the output, an average of values, be off by far more than its own rounding."""
    q, k = torch.ones(2, 1, 1, 2000, 4, dtype=dtype)
    v = torch.rand(1, 1, 2000, 4, dtype=torch.float64).to(dtype)
    out, state = fastattn.linear_attention(q, k, v, causal=True, feature_map="elu", return_state=True, backend=backend)
    exact = v.double().cumsum(2) / torch.arange(1, 2001)[:, None]
    assert (out.double() - exact).abs().max() <= torch.finfo(dtype).eps  # half a unit, and then some
    torch.testing.assert_close(state.normalizer, torch.full((1, 1, 4), 4000.0))
