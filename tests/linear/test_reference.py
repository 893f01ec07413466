"""The reference backend of the linear family judged in float64, by three implementations written apart from it.

Fails where the reference departs from the contract by more than rounding: `verify.linear.naive` (whole matrices, and a
state carried from step to step, both over the whole grid) and `brute_force` (one head and step at a time, word by word)
would all have to be wrong the same way. Then the published formulas of the mechanisms that it covers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastattn
from fastattn.linear import Cosformer, FeatureMap, LinearState, relu_features, softmax_features
from fastattn.verify.bar import finite, largest, largest_error
from fastattn.verify.check import run_backend, run_naive
from fastattn.verify.linear import GRID, NAIVE, make_inputs
from fastattn.verify.linear.cases import Case

Brute = Callable[..., tuple[Tensor, Tensor, Tensor]]


@pytest.mark.parametrize("case", GRID, ids=str)
def test_whole_matrices_and_steps_agree(case: Case, seed: int) -> None:
    """Fails where a result or gradient differs from the weights of all pairs, or from the plain recurrence."""
    inputs = make_inputs(case, torch.float64, "cpu", seed)
    found = run_backend(case, inputs, "reference", seed)
    for form in range(len(NAIVE)):
        truth = run_naive(case, inputs, seed, form)
        assert found.keys() == truth.keys()
        for name, exact in truth.items():
            # Gradients of strongly decayed or nearly vanishing denominators lose a few digits more than 1e-12.
            assert largest_error(finite(found[name]), finite(exact)) <= 1e-11 * max(largest(finite(exact)), 1.0), name


def leaf(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


def tensors(length: int = 7, heads: int = 2, kv_heads: int = 2) -> list[Tensor]:
    return [leaf(2, heads, length, 3), leaf(2, kv_heads, length, 3), leaf(2, kv_heads, length, 4)]


W = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
BIAS = torch.linspace(-1, 1, 5, dtype=torch.float64)
MASK = torch.tensor([[True, False, True, True, False, True, True], [False, False, True, True, True, True, False]])
ELU = {"features": lambda x: F.elu(x) + 1, "feature_map": "elu", "normalize": True}
IDENTITY = {"features": lambda x: x, "feature_map": "identity", "normalize": False}
# Each mechanism on small shapes: the arguments of both functions, those of the public one only (feature_map) and of the
# brute force only (features); "decay" is its shape, "state" whether the call starts from one.
MECHANISMS: dict[str, dict[str, Any]] = {
    "identity": {**IDENTITY, "causal": True},
    "scale": {**IDENTITY, "causal": True, "scale": -0.7},
    "elu": {**ELU, "causal": True},
    "elu_full": {**ELU, "causal": False},
    "relu": {"features": torch.relu, "feature_map": "relu", "normalize": True, "causal": True},
    "relu_projected": {
        "features": lambda x: torch.relu(W @ x) + 0.01,
        "feature_map": relu_features(W, 0.01),
        "normalize": True,
        "causal": True,
    },
    "elu_projected": {
        "features": lambda x: F.elu(W @ x) + 1,
        "feature_map": FeatureMap("elu", W),
        "normalize": False,
        "causal": True,
    },
    "callable": {"features": lambda x: x**2, "feature_map": lambda x: x**2, "normalize": True, "causal": True},
    "gqa": {**ELU, "causal": True, "kv_heads": 1},
    "key_mask": {**ELU, "causal": True, "key_mask": MASK},
    "key_mask_full": {**ELU, "causal": False, "key_mask": MASK},
    "decay_head": {**IDENTITY, "causal": True, "decay": "H"},
    "decay_step": {**ELU, "causal": True, "decay": "BHN"},
    "decay_vector": {**IDENTITY, "causal": True, "decay": "BHNM"},
    "decay_key_mask": {**ELU, "causal": True, "decay": "BHN", "key_mask": MASK},
    "state": {**ELU, "causal": True, "state": True},
    "state_decay": {**IDENTITY, "causal": True, "decay": "BHNM", "state": True, "key_mask": MASK},
    "delta": {**IDENTITY, "causal": True, "delta": True},
    "delta_everything": {
        **IDENTITY,
        "causal": True,
        "delta": True,
        "decay": "BHN",
        "key_mask": MASK,
        "state": True,
        "kv_heads": 1,
    },
}


@pytest.mark.parametrize("options", MECHANISMS.values(), ids=MECHANISMS.keys())
def test_step_by_step_with_gradients(options: dict[str, Any], brute_force: Brute) -> None:
    """Fails where an output, a state or the gradient of any input differs from the contract's own words."""
    options = dict(options)
    normalize = options["normalize"]
    q, k, v = tensors(kv_heads=options.pop("kv_heads", 2))
    named = {"query": q, "key": k, "value": v}
    features, feature_map = options.pop("features"), options.pop("feature_map")
    num_features = len(features(torch.zeros(3, dtype=torch.float64)))
    shape = {"H": (2,), "BHN": (2, 2, 7), "BHNM": (2, 2, 7, num_features), None: None}[options.pop("decay", None)]
    if shape is not None:
        named["decay"] = (-torch.rand(shape, dtype=torch.float64)).requires_grad_()
    if options.pop("delta", False):
        named["beta"] = torch.rand(2, 2, 7, dtype=torch.float64, requires_grad=True)
    state = None
    if options.pop("state", False):
        named["initial_kv"] = leaf(2, 2, num_features, 4)
        if normalize:
            named["initial_normalizer"] = torch.rand(2, 2, num_features, dtype=torch.float64, requires_grad=True)
        state = LinearState(named["initial_kv"], named.get("initial_normalizer"))

    seeds = [torch.randn(s, dtype=torch.float64) for s in ((2, 2, 7, 4), (2, 2, num_features, 4), (2, 2, num_features))]

    def differentiate(results: tuple[Tensor, ...]) -> list[Tensor]:
        seeds_of = seeds[: len(results)]
        return [*results, *torch.autograd.grad(results, list(named.values()), seeds_of, materialize_grads=True)]

    exact = brute_force(**named, features=features, **options)
    given = {"decay": named.get("decay"), "initial_state": state, "return_state": True, "backend": "reference"}
    given |= {name: options[name] for name in ("scale", "key_mask") if name in options}
    if "beta" in named:
        out, new = fastattn.delta_rule(q, k, v, named["beta"], **given)
    else:
        given |= {"causal": options["causal"], "feature_map": feature_map, "normalize": normalize}
        out, new = fastattn.linear_attention(q, k, v, **given)
    found = (out, new.kv, new.normalizer) if normalize else (out, new.kv)
    assert (new.normalizer is None) == (not normalize)
    for mine, truth in zip(differentiate(found), differentiate(exact[: len(found)]), strict=True):
        torch.testing.assert_close(mine, truth, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_softmax_features_are_what_they_are_defined_as(
    causal: bool, masked: bool, scale: float | None, brute_force: Brute, softmax_features_by_definition: Callable
) -> None:
    """Fails where a factor that should cancel does not: output, gradients, state times exp(log_scale)."""
    q, k, v = tensors()
    features = softmax_features_by_definition(W, BIAS, 3**-0.5 if scale is None else scale)
    options = {"causal": causal, "normalize": True, "key_mask": MASK if masked else None}
    exact, kv, normalizer = brute_force(q, k, v, features=features, **options)
    found, state = fastattn.linear_attention(
        q, k, v, feature_map=softmax_features(W, BIAS), scale=scale, return_state=True, backend="reference", **options
    )
    grad = torch.randn_like(exact)
    torch.testing.assert_close(found, exact, rtol=1e-11, atol=1e-12)
    for mine, truth in zip(
        torch.autograd.grad(found, (q, k, v), grad), torch.autograd.grad(exact, (q, k, v), grad), strict=True
    ):
        torch.testing.assert_close(mine, truth, rtol=1e-10, atol=1e-11)
    assert state.log_scale is not None
    assert state.normalizer is not None
    factor = state.log_scale.exp()
    torch.testing.assert_close(state.kv * factor[..., None, None], kv, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(state.normalizer * factor[..., None], normalizer, rtol=1e-11, atol=1e-12)
    # The largest exponent of all keys that take part.
    exponents = torch.stack([features(x).log() for x in k.flatten(0, 2)]).unflatten(0, k.shape[:3])
    if masked:
        exponents = exponents.masked_fill(~MASK[:, None, :, None], -math.inf)
    torch.testing.assert_close(state.log_scale, exponents.amax((2, 3)))


def test_retention_formula() -> None:
    """RetNet, equation 5: (Q K^T * D) V with D_ij = gamma^(i-j) for j <= i, gamma = 1 - 2^(-5-h)."""
    q, k, v = tensors(20)
    gamma = 1 - 2.0 ** (-5 - torch.arange(2, dtype=torch.float64))
    distance = torch.arange(20)[:, None] - torch.arange(20)
    d = (gamma[:, None, None] ** distance.clamp(min=0)).tril()
    found = fastattn.linear_attention(
        q, k, v, causal=True, feature_map="identity", normalize=False, decay=gamma.log(), scale=1.0, backend="reference"
    )
    torch.testing.assert_close(found, (q @ k.mT * d) @ v)


def test_cosformer_formula() -> None:
    """cosFormer, equation 10: weights relu(q_i) . relu(k_j) cos(pi (i - j) / 2L), normalised over j."""
    q, k, v = (x.detach() for x in tensors(9))
    angles = math.pi / 2 * (torch.arange(9)[:, None] - torch.arange(9)) / 12
    weights = torch.relu(q) @ torch.relu(k).mT * torch.cos(angles.double())
    exact = weights @ v / weights.sum(-1, keepdim=True)
    options = {"causal": False, "backend": "reference"}
    found = fastattn.linear_attention(q, k, v, feature_map=Cosformer(12), **options)
    torch.testing.assert_close(found, exact.nan_to_num(0.0))
    by_name = fastattn.linear_attention(q, k, v, feature_map="cosformer", **options)
    assert torch.equal(by_name, fastattn.linear_attention(q, k, v, feature_map=Cosformer(9), **options))


def test_delta_rule_overwrites() -> None:
    """With beta = 1 and orthonormal keys a later value replaces the one before; plain linear attention adds them."""
    keys = torch.eye(3, dtype=torch.float64)[[0, 1, 0]][None, None]
    values = torch.tensor([[1.0], [2.0], [5.0]], dtype=torch.float64)[None, None]
    ones = torch.ones(1, 1, 3, dtype=torch.float64)
    out = fastattn.delta_rule(keys, keys, values, ones, scale=1.0, backend="reference")
    assert out.flatten().tolist() == [1.0, 2.0, 5.0]
    plain = fastattn.linear_attention(
        keys, keys, values, causal=True, feature_map="identity", normalize=False, scale=1.0, backend="reference"
    )
    assert plain.flatten().tolist() == [1.0, 2.0, 6.0]


def test_packed_equals_each_sequence_alone() -> None:
    """Fails where sequences of a packed batch see each other's keys, decay or state."""
    q, k, v = (x[:1].detach() for x in tensors(17))
    decay = -torch.rand(1, 2, 17, dtype=torch.float64)
    bounds = [0, 5, 5, 14, 17]
    first = LinearState(torch.randn(4, 2, 3, 4).double(), torch.rand(4, 2, 3).double())
    options: dict[str, Any] = {"causal": True, "feature_map": "elu", "return_state": True, "backend": "reference"}
    out, state = fastattn.linear_attention(
        q, k, v, decay=decay, initial_state=first, cu_seqlens=torch.tensor(bounds), **options
    )
    for s, (begin, end) in enumerate(pairwise(bounds)):
        part = [x[:, :, begin:end] for x in (q, k, v)]
        before = LinearState(first.kv[s : s + 1], first.normalizer[s : s + 1])  # type: ignore[index]
        alone, after = fastattn.linear_attention(*part, decay=decay[:, :, begin:end], initial_state=before, **options)
        torch.testing.assert_close(out[:, :, begin:end], alone)
        torch.testing.assert_close(state.kv[s : s + 1], after.kv)
        torch.testing.assert_close(state.normalizer[s : s + 1], after.normalizer)
