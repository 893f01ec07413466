"""Bad input: each argument of each public function raises before any work and says what it got and what it wanted.

Fails where an argument is silently accepted, ignored or misread; where the exception is of another type, or does not
name the argument, the given and the expected; where a kernel was launched, or torch's generator drawn from, before it.
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

B, HQ, HKV, SQ, SK, D, DV = 2, 4, 2, 6, 8, 16, 12
Bad = tuple[str, Any, type[Exception], tuple[str, ...]]


@pytest.fixture(autouse=True)
def nothing_computed(monkeypatch: pytest.MonkeyPatch):
    """Any launch of a backend fails the test, and so does a draw from torch's generator."""

    def launched(*args: Any, **kwargs: Any) -> None:
        pytest.fail("a backend was launched before the argument was rejected")

    for module in ("reference", "native"):
        for function in ("forward", "backward"):
            monkeypatch.setattr(f"fastattn.dense.{module}.{function}", launched)
    before = torch.get_rng_state()
    yield
    assert torch.equal(before, torch.get_rng_state()), "torch's generator was drawn from"


def zeros(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    return torch.zeros(shape, dtype=dtype, device=device)


def dense(**changes: Any) -> dict[str, Any]:
    return {"query": zeros(B, HQ, SQ, D), "key": zeros(B, HKV, SK, D), "value": zeros(B, HKV, SK, DV)} | changes


def packed(**changes: Any) -> dict[str, Any]:
    return {
        "query": zeros(SQ, HQ, D),
        "key": zeros(SK, HKV, D),
        "value": zeros(SK, HKV, DV),
        "cu_seqlens_q": torch.tensor([0, 2, SQ], dtype=torch.int32),
        "cu_seqlens_k": torch.tensor([0, 5, SK], dtype=torch.int32),
        "max_seqlen_q": 4,
        "max_seqlen_k": 5,
    } | changes


def sdpa(**changes: Any) -> dict[str, Any]:
    return dense(key=zeros(B, HQ, SK, D), value=zeros(B, HQ, SK, DV)) | changes


# argument, bad value, exception, words of the message besides the argument's name
OPTIONS: list[Bad] = [
    ("attn_mask", "causal", TypeError, ("str", "Tensor")),
    ("attn_mask", zeros(SQ, SK, dtype=torch.int64), TypeError, ("int64", "bool", "float32")),
    ("attn_mask", zeros(SQ, SK, dtype=torch.float16), TypeError, ("float16", "float32")),
    ("attn_mask", zeros(SQ, SK, dtype=torch.float64), TypeError, ("float64", "float32")),
    ("attn_mask", zeros(SQ + 1, 5), ValueError, (f"({SQ + 1}, 5)", "broadcast")),
    ("attn_mask", zeros(1, 1, 1, SQ, 5), ValueError, (f"(1, 1, 1, {SQ}, 5)", "broadcast")),
    ("attn_mask", zeros(2, 3, 1, 1), ValueError, ("(2, 3, 1, 1)", "broadcast")),
    ("attn_mask", zeros(1, 1, device="meta"), ValueError, ("meta", "cpu")),
    ("causal", 1, TypeError, ("bool", "int")),
    ("causal", None, TypeError, ("bool", "NoneType")),
    ("causal", "top_left", TypeError, ("bool", "str")),
    ("window", 5, TypeError, ("5", "left, right")),
    ("window", (1,), TypeError, ("(1,)", "left, right")),
    ("window", (1, 2, 3), TypeError, ("(1, 2, 3)", "left, right")),
    ("window", (1.5, 2), TypeError, ("1.5", "int")),
    ("window", (True, 2), TypeError, ("True", "int")),
    ("window", (-1, -1), ValueError, ("-1", "None")),
    ("window", (3, -2), ValueError, ("-2", "negative")),
    ("query_start", 1.5, TypeError, ("float", "int")),
    ("query_start", True, TypeError, ("bool", "int")),
    ("query_start", [0, 1], TypeError, ("list", "int")),
    ("query_start", zeros(B), TypeError, ("float32", "int32", "int64")),
    ("query_start", zeros(B + 1, dtype=torch.int32), ValueError, (f"({B + 1},)", f"({B},)")),
    ("query_start", zeros(dtype=torch.int32), ValueError, ("()", f"({B},)")),
    ("query_start", zeros(B, dtype=torch.int32, device="meta"), ValueError, ("meta", "cpu")),
    *(
        bad
        for name in ("key_start", "key_lengths")
        for bad in [
            (name, 3, TypeError, ("int", "Tensor")),
            (name, [3, 4], TypeError, ("list", "Tensor")),
            (name, zeros(B), TypeError, ("float32", "int32", "int64")),
            (name, zeros(B, dtype=torch.bool), TypeError, ("bool", "int32")),
            (name, zeros(B + 1, dtype=torch.int32), ValueError, (f"({B + 1},)", f"({B},)")),
            (name, zeros(B, 1, dtype=torch.int32), ValueError, (f"({B}, 1)", f"({B},)")),
            (name, zeros(B, dtype=torch.int32, device="meta"), ValueError, ("meta", "cpu")),
            (name, torch.tensor([0, -1], dtype=torch.int32), ValueError, ("-1", "negative")),
        ]
        if not (name == "key_lengths" and bad[3] == ("-1", "negative"))
    ),
    ("key_lengths", torch.tensor([0, -1]), ValueError, ("-1", "between 0")),
    ("key_lengths", torch.tensor([0, 2**32 + 1]), ValueError, ("between 0",)),  # 1 in 32 bits
    ("softcap", "30", TypeError, ("str", "number")),
    ("softcap", True, TypeError, ("bool", "number")),
    ("softcap", zeros(1), TypeError, ("Tensor", "number")),
    ("softcap", 0.0, ValueError, ("0.0", "positive", "None")),
    ("softcap", -2.0, ValueError, ("-2.0", "positive")),
    ("softcap", math.nan, ValueError, ("nan", "finite")),
    ("softcap", math.inf, ValueError, ("inf", "finite")),
    ("alibi_slopes", 0.5, TypeError, ("float", "Tensor")),
    ("alibi_slopes", zeros(HQ, dtype=torch.int64), TypeError, ("int64", "floating")),
    ("alibi_slopes", zeros(HQ + 1), ValueError, (f"({HQ + 1},)", f"({HQ},)")),
    ("alibi_slopes", zeros(B + 1, HQ), ValueError, (f"({B + 1}, {HQ})", f"({B}, {HQ})")),
    ("alibi_slopes", zeros(1, HQ), ValueError, (f"(1, {HQ})", f"({B}, {HQ})")),
    ("alibi_slopes", zeros(HQ).requires_grad_(), ValueError, ("gradient", "detach")),
    ("alibi_slopes", zeros(HQ, device="meta"), ValueError, ("meta", "cpu")),
    ("sinks", 0.5, TypeError, ("float", "Tensor")),
    ("sinks", zeros(HQ, dtype=torch.int64), TypeError, ("int64", "floating")),
    ("sinks", zeros(HKV), ValueError, (f"({HKV},)", f"({HQ},)")),
    ("sinks", zeros(1, HQ), ValueError, (f"(1, {HQ})", f"({HQ},)")),
    ("sinks", zeros(HQ, device="meta"), ValueError, ("meta", "cpu")),
    ("dropout_p", "0.1", TypeError, ("str", "number")),
    ("dropout_p", True, TypeError, ("bool", "number")),
    ("dropout_p", -0.1, ValueError, ("-0.1", "between 0 and 1")),
    ("dropout_p", 1.5, ValueError, ("1.5", "between 0 and 1")),
    ("dropout_p", math.nan, ValueError, ("nan", "finite")),
    ("scale", "0.1", TypeError, ("str", "number")),
    ("scale", True, TypeError, ("bool", "number")),
    ("scale", zeros(1), TypeError, ("Tensor", "number")),
    ("scale", math.nan, ValueError, ("nan", "finite")),
    ("scale", -math.inf, ValueError, ("inf", "finite")),
    ("return_lse", 1, TypeError, ("int", "bool")),
    ("deterministic", 1, TypeError, ("int", "bool")),
    ("deterministic", None, TypeError, ("NoneType", "bool")),
    ("backend", "cudnn", ValueError, ("cudnn", "reference")),
    ("backend", 3, ValueError, ("3", "reference")),
]


def tensors(shape: Callable[..., dict[str, Any]]) -> list[Bad]:
    """Bad query, key and value of a function whose good arguments `shape` gives."""
    good = shape()
    bad: list[Bad] = []
    for name in ("query", "key", "value"):
        bad += [
            (name, good[name].tolist(), TypeError, ("list", "Tensor")),
            (name, None, TypeError, ("NoneType", "Tensor")),
            (name, good[name][0], ValueError, (str(tuple(good[name].shape[1:])),)),
        ]
    for name in ("key", "value"):
        bad += [
            (name, good[name].double(), TypeError, ("float64", "float32")),
            (name, good[name].to("meta"), ValueError, ("meta", "cpu")),
        ]
    return [
        *bad,
        ("query", good["query"].long(), TypeError, ("int64", "float32", "bfloat16", "float16", "float64")),
        ("query", good["query"].to(torch.complex64), TypeError, ("complex64", "float32")),
        ("query", good["query"].repeat_interleave(2, -1), ValueError, (str(2 * D), str(D))),
        ("key", good["key"][..., :-1], ValueError, (str(D - 1), str(D))),
        ("value", good["value"][..., :0], ValueError, ("at least 1",)),
    ]


DENSE: list[Bad] = [
    *tensors(dense),
    ("query", zeros(B + 1, HQ, SQ, D), ValueError, ("batch", "3", "2")),
    ("query", zeros(B, 3, SQ, D), ValueError, ("3", "2", "multiple")),
    ("key", zeros(B, HKV, SK + 1, D), ValueError, (str(SK + 1), str(SK))),
    ("value", zeros(B, HKV + 1, SK, DV), ValueError, (str(HKV + 1), str(HKV))),
    ("key_lengths", torch.tensor([1, SK + 1]), ValueError, (str(SK + 1), f"{SK}")),
]

_INT = torch.int32
PACKED: list[Bad] = [
    *tensors(packed),
    ("query", zeros(SQ, 3, D), ValueError, ("3", "2", "multiple")),
    ("key", zeros(SK + 1, HKV, D), ValueError, (str(SK + 1), str(SK))),
    ("key_lengths", torch.tensor([1, 4]), ValueError, ("4", "3")),
    ("max_seqlen_q", 3, ValueError, ("3", "4")),
    ("max_seqlen_k", 4, ValueError, ("4", "5")),
    *(
        bad
        for side, total in (("q", SQ), ("k", SK))
        for bad in [
            (f"cu_seqlens_{side}", [0, 2, total], TypeError, ("list", "Tensor")),
            (f"cu_seqlens_{side}", torch.tensor([0, 2, total]), TypeError, ("int64", "int32")),
            (f"cu_seqlens_{side}", torch.tensor([0, 2, 2, total], dtype=_INT), ValueError, ("(4,)", "(3,)")),
            (f"cu_seqlens_{side}", torch.tensor([[0, 2, total]], dtype=_INT), ValueError, ("(1, 3)",)),
            (f"cu_seqlens_{side}", torch.tensor([0, 2, total], dtype=_INT, device="meta"), ValueError, ("meta", "cpu")),
            (f"cu_seqlens_{side}", torch.tensor([1, 2, total], dtype=_INT), ValueError, ("[1, 2,", "from 0")),
            (f"cu_seqlens_{side}", torch.tensor([0, total, 2], dtype=_INT), ValueError, (f"[0, {total}, 2]", "rise")),
            (
                f"cu_seqlens_{side}",
                torch.tensor([0, 2, total + 1], dtype=_INT),
                ValueError,
                (str(total + 1), str(total)),
            ),
            (f"max_seqlen_{side}", 2.0, TypeError, ("float", "int")),
            (f"max_seqlen_{side}", torch.tensor(5), TypeError, ("Tensor", "int")),
            (f"max_seqlen_{side}", True, TypeError, ("bool", "int")),
            (f"max_seqlen_{side}", -1, ValueError, ("-1", "negative")),
        ]
    ),
]

SDPA: list[Bad] = [
    ("query", None, TypeError, ("NoneType", "Tensor")),
    ("key", [1.0], TypeError, ("list", "Tensor")),
    ("value", 3, TypeError, ("int", "Tensor")),
    ("query", zeros(D), ValueError, (f"({D},)", "2")),
    ("query", zeros(B, HQ, SQ, D).long(), TypeError, ("int64", "float32")),
    ("query", zeros(B, HQ, SQ, D - 1), ValueError, (str(D - 1), str(D))),
    ("key", zeros(B, HQ, SK, D, dtype=torch.float16), TypeError, ("float16", "float32")),
    ("key", zeros(B, HKV, SK, D), ValueError, (str(HKV), str(HQ))),
    ("key", zeros(B + 1, HQ, SK, D), ValueError, (str(B + 1), str(B))),
    ("value", zeros(B, HQ, SK + 1, DV), ValueError, (str(SK + 1), str(SK))),
    ("attn_mask", "causal", TypeError, ("str", "Tensor")),
    ("attn_mask", zeros(SQ, SK, dtype=torch.int64), TypeError, ("int64", "bool")),
    ("attn_mask", zeros(SQ, SK + 1), ValueError, (f"({SQ}, {SK + 1})", "broadcast")),
    ("dropout_p", 1.5, ValueError, ("1.5", "between 0 and 1")),
    ("is_causal", 1, TypeError, ("int", "bool")),
    ("scale", "0.1", TypeError, ("str", "number")),
    ("scale", math.nan, ValueError, ("nan", "finite")),
    ("enable_gqa", 1, TypeError, ("int", "bool")),
]

EVERY = [
    *((fastattn.attention, dense, bad) for bad in DENSE + OPTIONS),
    *((fastattn.attention_varlen, packed, bad) for bad in PACKED + OPTIONS),
    *((fastattn.scaled_dot_product_attention, sdpa, bad) for bad in SDPA),
]


def _label(parameters: tuple[Callable[..., Any], Any, Bad]) -> str:
    function, _, (name, value, _, _) = parameters
    shown = (
        f"{value.dtype}{tuple(value.shape)}".removeprefix("torch.") if isinstance(value, Tensor) else str(value)[:20]
    )
    return f"{function.__name__}-{name}-{shown}"


@pytest.mark.parametrize("parameters", EVERY, ids=_label)
def test_bad_argument(parameters: tuple[Callable[..., Any], Callable[..., dict[str, Any]], Bad]) -> None:
    function, good, (name, value, exception, words) = parameters
    with pytest.raises((TypeError, ValueError)) as caught:
        function(**good(**{name: value}))
    message = str(caught.value)
    assert type(caught.value) is exception, message
    for word in (name, *words):
        assert word in message, f"{word!r} is missing from {message!r}"


@pytest.mark.parametrize("bad", [b for b in DENSE + OPTIONS if b[0] != "key_lengths" and b[3] != ("-1", "negative")],
                         ids=lambda b: _label((fastattn.explain, None, b)))  # fmt: skip
def test_explain_checks_the_same(bad: Bad) -> None:
    """`explain` of a wrong call raises as the call does; values inside tensors are only read by the call."""
    name, value, exception, words = bad
    with pytest.raises(exception) as caught:
        fastattn.explain(**dense(**{name: value}))
    assert all(word in str(caught.value) for word in (name, *words))


@pytest.mark.parametrize("function", [fastattn.attention, fastattn.attention_varlen, fastattn.explain])
def test_unknown_argument(function: Callable[..., Any]) -> None:
    """A misspelt option is a TypeError, never ignored."""
    good = packed() if function is fastattn.attention_varlen else dense()
    with pytest.raises(TypeError, match="is_causal"):
        function(**good, is_causal=True)


@pytest.mark.parametrize(
    ("function", "tested"),
    [
        (fastattn.attention, DENSE + OPTIONS),
        (fastattn.attention_varlen, PACKED + OPTIONS),
        (fastattn.scaled_dot_product_attention, SDPA),
    ],
)
def test_every_argument_has_a_bad_input(function: Callable[..., Any], tested: list[Bad]) -> None:
    """Fails where a new argument comes without a row above."""
    assert set(inspect.signature(function).parameters) == {bad[0] for bad in tested}


OUT, LSE = (2, 3, 4), (2, 3)
MERGE: list[tuple[dict[str, Any], type[Exception], tuple[str, ...]]] = [
    ({"out_a": None}, TypeError, ("out_a", "Tensor")),
    ({"lse_b": [1.0]}, TypeError, ("lse_b", "Tensor")),
    ({"lse_a": zeros(2, 4)}, ValueError, ("lse_a", "(2, 4)", "(2, 3)")),
    ({"lse_b": zeros(3)}, ValueError, ("lse_b", "(3,)", "(2, 3)")),
    ({"out_b": zeros(2, 3, 5)}, ValueError, ("out_b", "(2, 3, 5)", "(2, 3, 4)")),
    ({"out_b": zeros(2, 4, 4), "lse_b": zeros(2, 4)}, ValueError, ("out_b", "(2, 4, 4)", "(2, 3, 4)")),
    ({"lse_a": zeros(*LSE, dtype=torch.int64)}, TypeError, ("lse_a", "int64")),
    ({"out_b": zeros(*OUT, device="meta")}, ValueError, ("out_b", "meta", "cpu")),
]


@pytest.mark.parametrize(("change", "exception", "words"), MERGE)
def test_merge_partials(change: dict[str, Any], exception: type[Exception], words: tuple[str, ...]) -> None:
    good = {"out_a": zeros(*OUT), "lse_a": zeros(*LSE), "out_b": zeros(*OUT), "lse_b": zeros(*LSE)}
    with pytest.raises((TypeError, ValueError)) as caught:
        fastattn.merge_partials(**good | change)
    assert type(caught.value) is exception, caught.value
    assert all(word in str(caught.value) for word in words), caught.value


def test_a_named_backend_never_falls_back() -> None:
    """Fails where backend="cpu" quietly runs something else for what its table lacks, or does not name the feature."""
    table = {c.backend: c for c in fastattn.backends.capabilities("dense")}["cpu"]
    q = zeros(1, 1, 3, 8)
    unsupported = {
        "softcap": {"softcap": 1.0},
        "alibi": {"alibi_slopes": zeros(1)},
        "sinks": {"sinks": zeros(1)},
        "dropout": {"dropout_p": 0.5},
    }
    state = torch.get_rng_state()
    for feature, option in unsupported.items():
        if feature in table.features:
            continue
        with pytest.raises(fastattn.UnsupportedError, match=fastattn.backends.FEATURES["dense"][feature]) as caught:
            fastattn.attention(q, q, q, backend="cpu", **option)
        assert "backend='cpu'" in str(caught.value)
    torch.set_rng_state(state)
    wide = zeros(1, 1, 3, 257)
    with pytest.raises(fastattn.UnsupportedError, match=r"256.*257"):
        fastattn.attention(wide, wide, wide, backend="cpu")
