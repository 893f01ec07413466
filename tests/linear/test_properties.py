"""What linear attention promises whatever the numbers: no future, states that compose, exact symmetries, never NaN.

Each test states what would make it fail; each runs on every backend of this machine whose table has what it needs.
"""

from __future__ import annotations

import math
import random
from dataclasses import replace
from itertools import pairwise, product
from typing import Any

import pytest
import torch
from hypothesis import assume, given, note
from hypothesis import strategies as st
from torch import Tensor

import fastattn
from fastattn import verify
from fastattn.backends import capabilities
from fastattn.linear import Cosformer, FeatureMap, LinearState, relu_features, softmax_features
from fastattn.verify.bar import largest, largest_error
from fastattn.verify.check import missing_features
from fastattn.verify.linear import NAIVE, call, make_inputs
from fastattn.verify.linear.cases import Case
from fastattn.verify.linear.inputs import Inputs

TABLES = {c.backend: c for c in capabilities("linear")}
BACKENDS = verify.backends_on("cpu", family="linear")
CAUSAL = (
    "identity",
    "elu",
    "relu_projected",
    "softmax",
    "softmax_bias",
    "decay_head",
    "decay_step",
    "decay_softmax",
    "vector_decay",
    "delta",
    "delta_decay",
    "gqa_softmax",
)

every_backend = pytest.mark.parametrize("backend", BACKENDS)
compiled_or_plain = pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "triton"])


def every_mechanism(*interpreted: str) -> Any:
    """Parametrise over backends and the mechanisms that each can; over these few on Triton's interpreter."""
    pairs = [(b, name) for b in BACKENDS for name in (interpreted if b == "triton" else CAUSAL)]
    cases = {name: verify.find_case(name, "linear") for name in CAUSAL}
    able = [p for p in pairs if not missing_features(cases[p[1]], torch.float32, TABLES[p[0]], "cpu")]
    return pytest.mark.parametrize(("backend", "name"), able)


def sized(name: str, backend: str, **changes: Any) -> Case:
    """The case of the grid without states, changed; of one head on Triton's interpreter, which is slow."""
    case = replace(verify.find_case(name, "linear"), **{"state_in": False, "state_out": False, **changes})
    return replace(case, batch=1, heads=1, kv_heads=None) if backend == "triton" else case


def accurate(backend: str) -> torch.dtype:
    return torch.float64 if torch.float64 in TABLES[backend].dtypes else torch.float32


def close(found: Tensor, exact: Tensor) -> None:
    tolerance = 1e-10 if found.dtype == torch.float64 else 2e-5
    assert largest_error(found, exact.double()) <= tolerance * max(largest(exact), 1.0)


@every_mechanism("softmax_bias", "vector_decay", "delta_decay")
def test_no_future(backend: str, name: str, seed: int) -> None:
    """Fails where a later key, value, decay or beta, however large, changes one bit of an earlier output."""
    case = sized(name, backend, q_len=70)
    inputs = make_inputs(case, torch.float32, "cpu", seed)
    before = call(case, inputs, backend)["out"]
    places, sizes = ((40,), (1e4,)) if backend == "triton" else ((1, 40, 64, 69), (-3.0, 1e4, 1e30))
    for t, size in product(places, sizes):
        # Keys of the delta rule have norm 1: beyond it its state may grow without bound, and overflow.
        factors = {"key": -1.0 if case.delta else size, "value": size, "beta": 0.5}
        factors |= {} if case.decay == "head" else {"decay": 0.1}
        changed = inputs
        for argument, factor in factors.items():
            later = torch.ones(70, 1).index_fill(0, torch.arange(t, 70), factor)
            changed = changed.map(lambda x, by=later: x * (by if x.ndim == 4 else by[:, 0]), argument)
        after = call(case, changed, backend)["out"]
        assert torch.equal(after[:, :, :t], before[:, :, :t]), (t, size)
        assert not torch.equal(after[:, :, t:], before[:, :, t:])


def published_performer(q: Tensor, k: Tensor, v: Tensor, projection: Tensor, eps: float = 1e-4) -> Tensor:
    """Causal Performer attention as it was published: eps within the features, the maximum before |x|^2 / 2."""

    def features(x: Tensor, dims: tuple[int, ...]) -> Tensor:
        x = x * x.shape[-1] ** -0.25
        exponents = x @ projection.mT
        norms = x.square().sum(-1, keepdim=True) / 2
        return torch.exp(exponents - norms - exponents.amax(dims, keepdim=True)) + eps

    weights = (features(q, (-1,)) @ features(k, (-2, -1)).mT).tril()
    return weights @ v / weights.sum(-1, keepdim=True)


@every_backend
def test_performer_does_not_see_a_late_key_as_the_published_way_does(backend: str) -> None:
    """Fails where scaling the last key by 6 changes earlier rows; the published features change by over 1e-4 (in
    float64: it is no rounding)."""
    q, k, v = torch.randn(3, 1, 2, 48, 32)
    projection = torch.randn(64, 32)
    late = torch.cat([k[:, :, :-1], 6 * k[:, :, -1:]], 2)
    wide = [t.double() for t in (q, k, late, v, projection)]
    leak = published_performer(wide[0], wide[1], *wide[3:]) - published_performer(wide[0], wide[2], *wide[3:])
    assert largest(leak[:, :, :-1]) > 1e-4
    ours = [
        fastattn.performer_attention(q, x, v, projection=projection, causal=True, backend=backend) for x in (k, late)
    ]
    assert torch.equal(ours[0][:, :, :-1], ours[1][:, :, :-1])


@every_backend
def test_early_rows_do_not_underflow_under_a_late_key(backend: str) -> None:
    """Fails where the keys' features are scaled by a maximum over the whole sequence: a late key's is e^100 times
    theirs, and early denominators vanish in float32."""
    length, dim, m = (20, 8, 8) if backend == "triton" else (70, 8, 32)
    q, k, v = torch.randn(3, 1, 1, length, dim)
    projection = 6 * torch.randn(m, dim)
    projection[0] *= 15 / projection[0].norm()
    k[:, :, 0] = 0  # all its features are 1
    k[:, :, -2] = projection[0] * dim**0.25  # x = w_0, where w_0 . x - |x|^2 / 2 is largest: |w_0|^2 / 2 = 112
    case = Case("late_key", heads=1, batch=1, q_len=length, head_dim=dim, feature="softmax", num_features=m)
    inputs = replace(make_inputs(case, torch.float32, "cpu", 0), query=q, key=k, value=v, projection=projection)
    exact = NAIVE[1](case, inputs.to(torch.float64), 0)["out"]  # step by step, with a running maximum
    found = call(case, inputs, backend)["out"]
    # The roundings of exponents up to |w_0|^2 are relative errors of features.
    assert largest_error(found, exact) <= 112 * 4 * torch.finfo(torch.float32).eps * largest(exact)


@every_backend
@pytest.mark.parametrize("causal", [False, True])
def test_softmax_features_stay_in_range(backend: str, causal: bool, seed: int) -> None:
    """Fails where features overflow, or are lost in an epsilon, for queries and keys of any size: float32 must be
    within 1e-5 of float64 with the same projection."""
    for magnitude in (1.0,) if backend == "triton" else (0.25, 0.5, 1.0, 2.0, 3.0):
        size: dict[str, Any] = {"head_dim": 64, "num_features": 256, "q_len": 80}
        if backend == "triton":
            size = {"head_dim": 16, "num_features": 32, "q_len": 20}
        case = Case("range", batch=1, causal=causal, feature="softmax", magnitude=magnitude, **size)
        inputs = make_inputs(case, torch.float32, "cpu", seed)
        exact = NAIVE[1](case, inputs.to(torch.float64), 0)["out"]
        assert largest_error(call(case, inputs, backend)["out"], exact) <= 1e-5 * largest(exact), magnitude


def state_of(results: dict[str, Tensor]) -> dict[str, Tensor | None]:
    return {f"initial_{name}": results.get(name) for name in LinearState._fields}


def rows(inputs: Inputs, begin: int, end: int) -> Inputs:
    """Those steps of one batch."""
    part = inputs.map(lambda t: t[:, :, begin:end] if t.ndim > 2 else t, "query", "key", "value", "decay", "beta")
    return part.map(lambda t: t[:, begin:end], "key_mask")


@every_mechanism("softmax_bias", "delta_decay")
@pytest.mark.parametrize("masked", [False, True])
def test_chunks_compose(backend: str, name: str, masked: bool, seed: int) -> None:
    """Fails where calls on pieces of random lengths, an empty one among them, and the state passed on, are not one
    call: outputs, the last state, and gradients through all of it."""
    case = sized(name, backend, q_len=70, state_out=True, key_mask="random" if masked else None)
    inputs, leaves = make_inputs(case, accurate(backend), "cpu", seed).leaves(case)
    whole = call(case, inputs, backend)
    cuts = sorted(random.choices(range(case.q_len + 1), k=1 if backend == "triton" else 2))
    bounds = [0, cuts[0], *cuts, case.q_len]
    outs, state = [], {}
    for begin, end in pairwise(bounds):
        results = call(case, replace(rows(inputs, begin, end), **state), backend)
        outs.append(results["out"])
        state = state_of(results)
    found = results | {"out": torch.cat(outs, 2)}
    assert found.keys() == whole.keys()
    for key, exact in whole.items():
        close(found[key], exact)
    if backend == "triton":
        return
    grads = [
        torch.autograd.grad(
            (results["out"] * inputs.grad_out).sum() + results["kv"].square().sum(), list(leaves.values())
        )
        for results in (found, whole)
    ]
    for mine, exact in zip(*grads, strict=True):
        close(mine, exact)


@every_mechanism("softmax_bias")
def test_single_steps_are_one_call(backend: str, name: str, seed: int) -> None:
    """Fails where a step of `linear_attention_step` is not the step of a longer call, from the first one on."""
    case = sized(name, backend, q_len=2 if backend == "triton" else 9, state_out=True)
    inputs = make_inputs(case, accurate(backend), "cpu", seed)
    whole = call(case, inputs, backend)
    feature_map: Any = case.feature
    if inputs.projection is not None:
        softmax = case.feature == "softmax"
        feature_map = softmax_features(inputs.projection, inputs.bias) if softmax else relu_features(inputs.projection)
    state = None
    for t in range(case.q_len):
        at = {
            n: None if (x := getattr(inputs, n)) is None else x[:, :, t] if x.ndim > 2 else x for n in ("decay", "beta")
        }
        qkv = (getattr(inputs, n)[:, :, t] for n in ("query", "key", "value"))
        out, state = fastattn.linear_attention_step(
            *qkv, state, feature_map=feature_map, normalize=case.normalize, backend=backend, **at
        )
        close(out, whole["out"][:, :, t])
    assert state is not None
    for key, exact in whole.items():
        if key != "out":
            close(getattr(state, key), exact)


@compiled_or_plain
def test_cosformer_steps_by_start(backend: str) -> None:
    """Fails where `start` does not continue the positions of the calls before."""
    q, k, v = torch.randn(3, 1, 2, 12, 4)
    whole = fastattn.linear_attention(q, k, v, causal=True, feature_map=Cosformer(12), backend=backend)
    state = None
    for t in range(12):
        out, state = fastattn.linear_attention_step(
            q[:, :, t], k[:, :, t], v[:, :, t], state, feature_map=Cosformer(12, start=t), backend=backend
        )
        torch.testing.assert_close(out, whole[:, :, t])


@compiled_or_plain
@pytest.mark.parametrize("name", ["full_elu", "full_softmax", "key_mask_full"])
def test_order_of_keys_does_not_matter(backend: str, name: str, seed: int) -> None:
    """Fails where a bidirectional result depends on the order of keys, or on the other queries."""
    case = replace(verify.find_case(name, "linear"), q_len=20, k_len=70)
    inputs = make_inputs(case, accurate(backend), "cpu", seed)
    out = call(case, inputs, backend)["out"]
    order, turned = torch.randperm(70), torch.randperm(20)
    shuffled = inputs.map(lambda t: t[:, :, order], "key", "value").map(lambda t: t[:, order], "key_mask")
    close(call(case, shuffled, backend)["out"], out)
    some = call(case, inputs.map(lambda t: t[:, :, turned[:7]], "query"), backend)["out"]
    close(some, out[:, :, turned[:7]])


@compiled_or_plain
def test_exact_scalings(backend: str) -> None:
    """Powers of two move only exponents. Fails where out is not, bit for bit, linear in value and in scale, free of a
    factor of relu's keys and queries, and where its state is not as large as the keys and values are."""
    q, k, v = torch.randn(3, 2, 2, 70, 16)
    options: dict[str, Any] = {"causal": True, "return_state": True, "backend": backend}
    plain = {"feature_map": "identity", "normalize": False, **options}
    out, state = fastattn.linear_attention(q, k, v, scale=0.5, **plain)
    larger, larger_state = fastattn.linear_attention(q, k, 4 * v, scale=0.25, **plain)
    assert torch.equal(larger, 2 * out)
    assert torch.equal(larger_state.kv, 4 * state.kv)
    k = k.abs() + 0.1  # no denominator is zero
    out, state = fastattn.linear_attention(q.abs(), k, v, feature_map="relu", **options)
    same, larger_state = fastattn.linear_attention(8 * q.abs(), 4 * k, v, feature_map="relu", **options)
    assert torch.equal(same, out)
    assert torch.equal(larger_state.normalizer, 4 * state.normalizer)


@compiled_or_plain
@pytest.mark.parametrize("causal", [False, True])
def test_a_constant_bias_cancels(backend: str, causal: bool) -> None:
    """Fails where a common factor of all softmax features, here e^200, gets into the output, or not into log_scale."""
    q, k, v = torch.randn(3, 1, 2, 40, 8)
    projection = torch.randn(16, 8)
    options: dict[str, Any] = {"causal": causal, "return_state": True, "backend": backend}
    out, state = fastattn.performer_attention(q, k, v, projection=projection, **options)
    same, shifted = fastattn.performer_attention(
        q, k, v, projection=projection, bias=torch.full((16,), 200.0), **options
    )
    torch.testing.assert_close(same, out, rtol=1e-4, atol=1e-4)  # exponents near 200 round by 1e-5
    torch.testing.assert_close(shifted.log_scale, state.log_scale + 200)


@compiled_or_plain
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("feature", ["relu", "elu", "softmax"])
def test_no_key_or_no_weight_gives_zero(backend: str, causal: bool, feature: str) -> None:
    """Fails where a denominator of zero, for want of keys or because every feature is 0, gives NaN or a gradient."""
    q, k, v = torch.randn(3, 2, 1, 10, 4)
    q[:, :, 5], k[:, :, :3] = -1.0, -1.0  # relu: no feature of that query, no feature of the first keys
    key_mask = torch.tensor([[False] * 4 + [True] * 6, [False] * 10])
    k[:, :, :3] = k[:, :, :3].masked_fill(~key_mask[:, None, :3, None], math.nan)
    leaves = [t.requires_grad_() for t in (q, k, v)]
    feature_map = softmax_features(torch.randn(8, 4)) if feature == "softmax" else feature
    out, state = fastattn.linear_attention(
        *leaves, causal=causal, feature_map=feature_map, key_mask=key_mask, return_state=True, backend=backend
    )
    assert out.isfinite().all()
    blind = [out[1], out[0, :, :4]] if causal else [out[1]]
    blind += [out[0, :, 5]] if feature == "relu" else []
    assert all(torch.equal(rows, torch.zeros_like(rows)) for rows in blind)
    assert not state.kv[1].any()
    assert not state.normalizer[1].any()
    for grad in torch.autograd.grad(out, leaves, torch.randn_like(out)):
        assert grad.isfinite().all()
        assert not grad[1].any()


@compiled_or_plain
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_softmax_features_of_huge_inputs_are_finite(backend: str, dtype: torch.dtype) -> None:
    """Fails where |x|^2 / 2 of queries and keys of size 100 overflows, underflows or gives NaN, gradients too."""
    leaves = [(100 * torch.randn(1, 2, 70, 32)).to(dtype).requires_grad_() for _ in range(2)]
    leaves.append(torch.randn(1, 2, 70, 32).to(dtype).requires_grad_())
    for causal in (False, True):
        out = fastattn.performer_attention(*leaves, projection=torch.randn(64, 32), causal=causal, backend=backend)
        assert out.isfinite().all()
        assert largest(out) <= (1 + 1e-5) * largest(leaves[2])  # an average of values, its float32 sums rounded
        assert all(g.isfinite().all() for g in torch.autograd.grad(out.float().square().sum(), leaves))


@every_mechanism("delta_decay")
def test_repeats_are_bit_identical(backend: str, name: str, seed: int) -> None:
    """Fails where two runs of the same call, forward or backward, differ in one bit."""
    case = sized(name, backend, q_len=9 if backend == "triton" else 70)
    inputs = make_inputs(case, torch.float32, "cpu", seed)
    first, second = (verify.check.run_backend(case, inputs, backend, seed) for _ in range(2))
    for key, tensor in first.items():
        assert torch.equal(tensor, second[key]), key


FEATURES = ["identity", "elu", "relu", "softmax", "cosformer", "signs"]


@st.composite
def random_cases(draw: st.DrawFn) -> Case:
    """Options mixed as no list of cases would."""
    causal, heads = draw(st.booleans()), draw(st.sampled_from([1, 2, 4]))
    delta = causal and draw(st.booleans()) and draw(st.booleans())
    feature = "identity" if delta else draw(st.sampled_from(FEATURES))
    projected = feature == "softmax" or (feature in ("elu", "relu") and draw(st.booleans()))
    decays = [None, "head", "step", "constant"] + ([] if projected or delta else ["vector"])
    packed = draw(st.none() | st.lists(st.integers(0, 40), min_size=1, max_size=4).map(tuple))
    length = draw(st.integers(1, 90))
    return Case(
        "random",
        batch=draw(st.integers(1, 2)),
        heads=heads,
        kv_heads=draw(st.sampled_from([h for h in (1, 2, 4) if heads % h == 0])),
        q_len=length,
        k_len=None if causal or packed else draw(st.integers(1, 90)),
        head_dim=draw(st.integers(1, 40)),
        value_dim=draw(st.integers(1, 40)),
        causal=causal,
        feature=feature,
        num_features=draw(st.integers(1, 80)) if projected else None,
        bias=feature == "softmax" and draw(st.booleans()),
        # Products of identity features have any sign, and their sums may come close to zero.
        normalize=feature == "softmax" or (feature != "identity" and draw(st.booleans())),
        scale=draw(st.none() | st.sampled_from([0.05, 0.7])),
        decay=draw(st.sampled_from(decays)) if causal else None,
        decay_size=draw(st.sampled_from([0.0, 0.1, 2.0, 30.0])),
        delta=delta,
        key_mask=draw(st.sampled_from([None, "random", "padding", "sequence"])),
        state_in=draw(st.booleans()),
        state_out=draw(st.booleans()),
        packed=packed,
        tail=draw(st.integers(0, 5)) if packed else 0,
        layout=draw(st.sampled_from(["bhnd", "bnhd", "sliced"])),
        magnitude=draw(st.sampled_from([0.3, 1.0])),
    )


# A small problem has few results, and plain PyTorch may round all of them the lucky way.
LUCK = 20


@compiled_or_plain
@given(case=random_cases(), data=st.data())
def test_mixtures(backend: str, case: Case, data: st.DataObject) -> None:
    """Fails where some mixture of options is wrong by far more than rounding, or refused against the table."""
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64]))
    seed = data.draw(st.integers(0, 2**31 - 1))
    assume(case.packed is None or sum(case.packed) + case.tail > 0)
    result = verify.run_case(case, dtype, backend, "cpu", seed)
    note(result.message)
    assert result.passed or (result.errors and result.worst <= LUCK and "zero where" not in result.message)


def test_a_projection_of_the_identity_is_none() -> None:
    """Fails where a projected feature map differs from the same map of projected queries and keys."""
    q, k, v = torch.randn(3, 1, 2, 20, 6).double()
    projection = torch.randn(9, 6).double()
    options: dict[str, Any] = {"causal": True, "backend": "reference"}
    for kind in ("elu", "relu"):
        found = fastattn.linear_attention(q, k, v, feature_map=FeatureMap(kind, projection), **options)
        exact = fastattn.linear_attention(q @ projection.mT, k @ projection.mT, v, feature_map=kind, **options)
        torch.testing.assert_close(found, exact)
