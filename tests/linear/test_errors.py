"""Every bad argument of the linear family's functions is named, with what was given and what was expected.

A test fails where a bad argument is accepted, raises another exception, fails to say what is wrong, or is noticed only
after work has begun.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fastattn
from fastattn.linear import Cosformer, FeatureMap, LinearState, api, relu_features, softmax_features

B, HQ, HKV, N, D, DV, M = 2, 4, 2, 5, 8, 6, 3
# argument, bad value, exception, words of the message besides the argument's name
Bad = tuple[str, Any, type[Exception], tuple[str, ...]]


def zeros(*shape: int, **kwargs: Any) -> Tensor:
    return torch.zeros(shape, **kwargs)


def state(**changes: Any) -> LinearState:
    return LinearState(zeros(B, HQ, D, DV), zeros(B, HQ, D))._replace(**changes)


def qkv() -> dict[str, Any]:
    return {"query": zeros(B, HQ, N, D), "key": zeros(B, HKV, N, D), "value": zeros(B, HKV, N, DV)}


def linear(**changes: Any) -> dict[str, Any]:
    return {**qkv(), "causal": True, "feature_map": "elu"} | changes


def performer(**changes: Any) -> dict[str, Any]:
    return {**qkv(), "projection": zeros(M, D), "causal": True} | changes


def delta(**changes: Any) -> dict[str, Any]:
    return {**qkv(), "beta": zeros(B, HQ, N)} | changes


def step(**changes: Any) -> dict[str, Any]:
    return {name: t[:, :, 0] for name, t in qkv().items()} | {"state": None, "feature_map": "elu"} | changes


QKV: list[Bad] = [
    *(
        bad
        for name in ("query", "key", "value")
        for bad in [
            (name, [1.0], TypeError, ("list", "Tensor")),
            (name, None, TypeError, ("NoneType", "Tensor")),
            (name, zeros(N, D), ValueError, (f"({N}, {D})",)),
        ]
    ),
    ("query", zeros(B, HQ, N, D, dtype=torch.int64), TypeError, ("int64", "float32", "float64")),
    ("query", zeros(B, HQ, N, D + 1), ValueError, (str(D + 1), str(D))),
    ("query", zeros(B + 1, HQ, N, D), ValueError, ("batch", "3", "2")),
    ("query", zeros(B, 3, N, D), ValueError, ("3", "2", "multiple")),
    ("key", zeros(B, HKV, N, D, dtype=torch.float16), TypeError, ("float16", "float32")),
    ("key", zeros(B, HKV, N, D, device="meta"), ValueError, ("meta", "cpu")),
    ("key", zeros(B, HKV, N + 1, D), ValueError, (str(N + 1), str(N))),
    ("value", zeros(B, HKV, N, DV).double(), TypeError, ("float64", "float32")),
    ("value", zeros(B, HKV, N, 0), ValueError, ("at least 1",)),
]

SHARED: list[Bad] = [
    ("scale", "0.1", TypeError, ("str", "number")),
    ("scale", math.nan, ValueError, ("nan", "finite")),
    ("key_mask", [True] * N, TypeError, ("list", "bool", f"({B}, {N})")),
    ("key_mask", zeros(B, N), TypeError, ("float32", "bool")),
    ("key_mask", zeros(B, N + 1, dtype=torch.bool), ValueError, (f"({B}, {N + 1})", f"({B}, {N})")),
    ("key_mask", zeros(B, N, dtype=torch.bool, device="meta"), ValueError, ("meta", "cpu")),
    ("initial_state", (zeros(B, HQ, D, DV), None, None), TypeError, ("tuple", "LinearState")),
    ("initial_state", zeros(B, HQ, D, DV), TypeError, ("Tensor", "LinearState")),
    ("return_state", 1, TypeError, ("int", "bool")),
    ("cu_seqlens", [0, N], TypeError, ("list", "Tensor")),
    ("cu_seqlens", zeros(3), TypeError, ("float32", "int32")),
    ("cu_seqlens", zeros(0, dtype=torch.int32), TypeError, ("(0,)", "at least one")),
    ("cu_seqlens", zeros(1, 2, dtype=torch.int32), ValueError, ("(1, 2)",)),
    ("cu_seqlens", zeros(2, dtype=torch.int32, device="meta"), ValueError, ("meta", "cpu")),
    ("cu_seqlens", torch.tensor([0, N]), ValueError, ("(1, Hq, total, D)", f"({B}, {HQ}, {N}, {D})")),
    ("backend", "cudnn", ValueError, ("cudnn", "reference")),
    ("backend", 3, ValueError, ("3", "reference")),
]

DECAY: list[Bad] = [
    ("decay", -0.5, TypeError, ("float", "Tensor")),
    ("decay", zeros(HQ, dtype=torch.int64), TypeError, ("int64", "floating")),
    ("decay", zeros(HKV), ValueError, (f"({HKV},)", f"({HQ},)", f"({B}, {HQ}, {N})")),
    ("decay", zeros(HQ, device="meta"), ValueError, ("meta", "cpu")),
]

LINEAR: list[Bad] = [
    *QKV,
    *SHARED,
    *DECAY,
    ("causal", 1, TypeError, ("int", "bool")),
    ("causal", None, TypeError, ("NoneType", "bool")),
    ("normalize", 0, TypeError, ("int", "bool")),
    ("key", zeros(B, HKV, N + 2, D), ValueError, (str(N + 2),)),
    ("feature_map", "gelu", ValueError, ("gelu", "identity", "cosformer")),
    ("feature_map", None, TypeError, ("NoneType", "callable")),
    ("feature_map", FeatureMap("gelu"), ValueError, ("gelu", "softmax")),
    ("feature_map", FeatureMap("softmax"), ValueError, ("projection",)),
    ("feature_map", FeatureMap("elu", eps=0.1), ValueError, ("eps", "elu")),
    ("feature_map", relu_features(zeros(M, D), eps="1"), TypeError, ("eps", "str")),
    ("feature_map", relu_features([[1.0] * D]), TypeError, ("projection", "list")),
    ("feature_map", relu_features(zeros(M, D + 1)), ValueError, ("projection", f"({M}, {D + 1})", f"(M, {D})")),
    ("feature_map", relu_features(zeros(0, D)), ValueError, ("projection", f"(0, {D})")),
    ("feature_map", relu_features(zeros(M, D, dtype=torch.int64)), TypeError, ("projection", "int64")),
    ("feature_map", relu_features(zeros(M, D, requires_grad=True)), ValueError, ("projection", "gradient", "detach")),
    ("feature_map", softmax_features(zeros(M, D), zeros(M + 1)), ValueError, ("bias", f"({M + 1},)")),
    ("feature_map", softmax_features(zeros(M, D), zeros(M, requires_grad=True)), ValueError, ("bias", "gradient")),
    ("feature_map", softmax_features(zeros(M, D), 1.0), TypeError, ("bias", "float")),
    ("feature_map", FeatureMap("relu", zeros(M, D), zeros(M)), ValueError, ("bias", "relu")),
    ("feature_map", lambda x: x.sum(-1), ValueError, (f"({B}, {HQ}, {N}, 'features')", f"({B}, {HQ}, {N})")),
    ("feature_map", lambda x: None, ValueError, ("NoneType",)),
    ("feature_map", lambda x: x[..., : x.shape[1]], ValueError, ("as many features", str(HQ), str(HKV))),
    ("decay", zeros(B, HQ, N, D + 1), ValueError, (f"({B}, {HQ}, {N}, {D})", f"({B}, {HQ}, {N}, {D + 1})")),
    ("initial_state", state(normalizer=None), ValueError, ("normalizer", f"({B}, {HQ}, {D})", "None")),
    ("initial_state", state(log_scale=zeros(B, HQ)), ValueError, ("log_scale", "None", f"({B}, {HQ})")),
    ("initial_state", state(kv=zeros(B, HKV, D, DV)), ValueError, ("kv", f"({B}, {HQ}, {D}, {DV})")),
    ("initial_state", state(kv=zeros(B, HQ, D, DV, dtype=torch.int64)), TypeError, ("kv", "int64")),
    ("initial_state", state(kv=zeros(B, HQ, D, DV, device="meta")), ValueError, ("kv", "meta", "cpu")),
]

PERFORMER: list[Bad] = [
    *QKV,
    *SHARED,
    ("causal", 1, TypeError, ("int", "bool")),
    ("projection", None, TypeError, ("NoneType", "Tensor")),
    ("projection", zeros(M, D + 1), ValueError, (f"({M}, {D + 1})",)),
    ("features", "trig", ValueError, ("trig", "positive", "hyperbolic", "relu")),
    ("bias", zeros(M + 1), ValueError, (f"({M + 1},)",)),
    ("bias", 1.0, TypeError, ("float", "Tensor")),
    ("scale", -0.5, ValueError, ("-0.5", "positive")),
    ("scale", 0.0, ValueError, ("0.0", "positive")),
    ("initial_state", state(), ValueError, ("kv", f"({B}, {HQ}, {M}, {DV})")),
]

DELTA: list[Bad] = [
    *QKV,
    *SHARED,
    *DECAY,
    ("beta", None, TypeError, ("NoneType", "Tensor")),
    ("beta", zeros(B, HQ), ValueError, (f"({B}, {HQ})", f"({B}, {HQ}, {N})")),
    ("beta", zeros(B, HKV, N), ValueError, (f"({B}, {HKV}, {N})", f"({B}, {HQ}, {N})")),
    ("beta", zeros(B, HQ, N, dtype=torch.int64), TypeError, ("int64", "floating")),
    ("beta", zeros(B, HQ, N, device="meta"), ValueError, ("meta", "cpu")),
    ("decay", zeros(B, HQ, N, D), ValueError, ("(H,)", "(B, H, N)", "beta")),
    ("initial_state", state(), ValueError, ("normalizer", "None")),
]

STEP: list[Bad] = [
    ("query", zeros(B, HQ, 1, D), ValueError, (f"({B}, {HQ}, 1, {D})", "(batch, heads, head_dim)")),
    ("key", None, TypeError, ("NoneType", "Tensor")),
    ("value", zeros(B, HKV), ValueError, (f"({B}, {HKV})",)),
    ("state", (zeros(B, HQ, D, DV),), TypeError, ("tuple", "LinearState")),
    ("decay", -0.5, TypeError, ("float", "Tensor")),
    ("decay", zeros(B, HKV), ValueError, (f"({B}, {HKV}, 1)",)),
    ("beta", zeros(B, HQ), ValueError, ("normalize=False",)),
    ("feature_map", "gelu", ValueError, ("gelu", "identity")),
    ("normalize", 1, TypeError, ("int", "bool")),
    ("scale", "0.1", TypeError, ("str", "number")),
    ("backend", "cudnn", ValueError, ("cudnn", "reference")),
]

FUNCTIONS: list[tuple[Callable[..., Any], Callable[..., dict[str, Any]], list[Bad]]] = [
    (fastattn.linear_attention, linear, LINEAR),
    (fastattn.performer_attention, performer, PERFORMER),
    (fastattn.delta_rule, delta, DELTA),
    (fastattn.linear_attention_step, step, STEP),
]
EVERY = [(function, good, bad) for function, good, bads in FUNCTIONS for bad in bads]


def _label(parameters: tuple[Callable[..., Any], Any, Bad]) -> str:
    function, _, (name, value, _, _) = parameters
    shown = (
        f"{value.dtype}{tuple(value.shape)}".removeprefix("torch.")
        if isinstance(value, Tensor)
        else getattr(value, "__name__", str(value)[:20])
    )
    return f"{function.__name__}-{name}-{shown}"


@pytest.mark.parametrize("parameters", EVERY, ids=_label)
def test_bad_argument(
    parameters: tuple[Callable[..., Any], Callable[..., dict[str, Any]], Bad], monkeypatch: pytest.MonkeyPatch
) -> None:
    function, good, (name, value, exception, words) = parameters
    monkeypatch.setattr(api, "linear_attention_op", lambda p: pytest.fail("work began"))
    with pytest.raises((TypeError, ValueError)) as caught:
        function(**good(**{name: value}))
    message = str(caught.value)
    assert type(caught.value) is exception, message
    assert message.startswith("fastattn: ")
    for word in ("initial_state" if name == "state" else name, *words):
        assert word in message, f"{word!r} is missing from {message!r}"


@pytest.mark.parametrize(("function", "good"), [(f, good) for f, good, _ in FUNCTIONS])
def test_the_good_arguments_are_good(function: Callable[..., Any], good: Callable[..., dict[str, Any]]) -> None:
    """Fails where the arguments that the rows above change are wrong themselves, or a misspelt one is ignored."""
    function(**good())
    with pytest.raises(TypeError, match="is_causal"):
        function(**good(), is_causal=True)


OPTIONS = {"scale", "key_mask", "initial_state", "cu_seqlens", "backend"}


@pytest.mark.parametrize(("function", "good", "tested"), FUNCTIONS)
def test_every_argument_has_a_bad_input(function: Callable[..., Any], good: Any, tested: list[Bad]) -> None:
    """Fails where a new argument comes without a row above."""
    names = set(inspect.signature(function).parameters)
    if "options" in names:
        names = names - {"options"} | OPTIONS
    assert names == {bad[0] for bad in tested}


# Arguments that are good alone, and what a message about both must say
PAIRS: list[tuple[Callable[..., Any], dict[str, Any], tuple[str, ...]]] = [
    (fastattn.linear_attention, linear(decay=zeros(HQ), causal=False), ("decay", "causal=True")),
    (
        fastattn.linear_attention,
        linear(feature_map=softmax_features(zeros(M, D)), normalize=False),
        ("softmax", "normalize=True"),
    ),
    (
        fastattn.linear_attention,
        linear(feature_map=relu_features(zeros(M, D)), decay=zeros(B, HQ, N, M)),
        ("decay", "projection"),
    ),
    (
        fastattn.linear_attention,
        linear(
            feature_map=softmax_features(zeros(M, D)),
            initial_state=LinearState(zeros(B, HQ, M, DV), zeros(B, HQ, M)),
        ),
        ("log_scale", f"({B}, {HQ})", "None"),
    ),
    (fastattn.performer_attention, performer(features="relu", bias=zeros(M)), ("bias", "relu")),
    (fastattn.performer_attention, performer(features="hyperbolic", projection=None), ("projection", "Tensor")),
    (fastattn.performer_attention, performer(features="hyperbolic", bias=1.0), ("bias", "Tensor")),
    (fastattn.performer_attention, performer(features="hyperbolic", bias=zeros(M + 1)), ("bias", f"({M},)")),
    (
        fastattn.linear_attention_step,
        step(beta=zeros(B, HQ + 1), normalize=False, feature_map="identity"),
        ("beta", f"({B}, {HQ}, 1)"),
    ),
]


@pytest.mark.parametrize(("function", "arguments", "words"), PAIRS)
def test_arguments_that_exclude_each_other(
    function: Callable[..., Any], arguments: dict[str, Any], words: tuple[str, ...]
) -> None:
    with pytest.raises((TypeError, ValueError)) as caught:
        function(**arguments)
    message = str(caught.value)
    assert message.startswith("fastattn: ")
    assert all(word in message for word in words), message


def test_beta_is_of_the_delta_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails where beta goes with a feature map, which the delta rule has not, and is computed as something else."""
    options = {"beta": zeros(B, HQ), "normalize": False}
    with pytest.raises(ValueError, match=r"beta .*identity"):
        fastattn.linear_attention_step(**step(feature_map="elu", **options))
    with pytest.raises(ValueError, match=r"beta .*causal=True"):
        fastattn.linear.explain(**linear(causal=False, feature_map="identity", normalize=False, beta=zeros(B, HQ, N)))


@pytest.mark.parametrize("bounds", [[1, 3, 5], [0, 4, 2], [0, 3, 6], [0, -1, 5]], ids=str)
def test_boundaries_that_do_not_fit(bounds: list[int]) -> None:
    """Values inside a tensor are checked where it lies on the CPU. Fails where rows outside the tensors are read."""
    q = zeros(1, 2, 5, 8)
    with pytest.raises(ValueError, match=r"cu_seqlens must rise from 0 and end at most at 5") as caught:
        fastattn.linear_attention(q, q, q, causal=True, feature_map="elu", cu_seqlens=torch.tensor(bounds))
    assert str(bounds) in str(caught.value)


def test_a_feature_map_runs_after_the_other_arguments_are_checked() -> None:
    """Fails where a callable, which may be a large module, runs before a wrong argument that it has no part in."""
    called = []

    def feature_map(x: Tensor) -> Tensor:
        called.append(x)
        return x

    for wrong in ({"backend": "cudnn"}, {"key_mask": zeros(B)}, {"scale": "1"}):
        with pytest.raises((TypeError, ValueError)):
            fastattn.linear_attention(**linear(feature_map=feature_map, **wrong))
    with pytest.raises(ValueError, match="beta"):
        fastattn.linear.explain(**linear(feature_map=feature_map, normalize=False, beta=zeros(1)))
    assert not called


def test_cosformer_needs_a_length() -> None:
    """Fails where positions beyond the length, whose weights would be negative, or no length at all are taken."""
    for bad in (0, -3, 2.5):
        with pytest.raises((TypeError, ValueError), match="length"):
            Cosformer(bad)
    with pytest.raises(ValueError, match="start"):
        Cosformer(4, start=-1)
    with pytest.raises(ValueError, match=r"length .*5"):
        fastattn.linear_attention(**linear(feature_map=Cosformer(N - 1)))
    with pytest.raises(ValueError, match=r"length .*6"):
        fastattn.linear_attention(**linear(feature_map=Cosformer(N, start=1)))


def test_a_named_backend_never_falls_back() -> None:
    """Fails where a named backend quietly runs something else for what its table lacks, or does not name it."""
    tables = fastattn.backends.capabilities("linear")
    texts = fastattn.backends.FEATURES["linear"]
    options = {
        "delta": lambda name: fastattn.delta_rule(**delta(backend=name)),
        "vector_decay": lambda name: fastattn.linear_attention(
            **linear(decay=zeros(B, HQ, N, D), feature_map="identity", normalize=False, backend=name)
        ),
        "softmax_features": lambda name: fastattn.performer_attention(**performer(backend=name)),
    }
    for table in tables:
        for feature, run in options.items():
            if feature in table.features:
                continue
            with pytest.raises(fastattn.UnsupportedError) as caught:
                run(table.backend)
            assert f"backend='{table.backend}'" in str(caught.value)
            assert texts[feature] in str(caught.value)
