"""Selection and its account: `explain` lists every backend with the truth, and a call does what `explain` says.

Fails where the verdicts, the capability table and what a call really runs disagree.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import fastattn
from fastattn import _extension, backends
from fastattn.backends import FEATURES, capabilities
from fastattn.dense import delegate, native, reference, triton

NAMES = [c.backend for c in capabilities("dense")]
NATIVE = _extension.unavailable() is None


def qkv(dtype: torch.dtype = torch.float32, heads: int = 4, kv_heads: int = 4, dim: int = 16, value_dim: int = 16):
    return [torch.randn(2, h, 6, d, dtype=dtype) for h, d in ((heads, dim), (kv_heads, dim), (kv_heads, value_dim))]


FEATURE_CALLS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "causal": ({}, {"causal": True}),
    "window": ({}, {"window": (2, None)}),
    "alignment": ({}, {"causal": True, "query_start": 1}),
    "query_start": ({}, {"query_start": torch.tensor([0, 1])}),
    "key_start": ({}, {"key_start": torch.tensor([0, 1])}),
    "key_lengths": ({}, {"key_lengths": torch.tensor([5, 1])}),
    "bool_mask": ({}, {"attn_mask": torch.ones(6, 6, dtype=torch.bool)}),
    "float_bias": ({}, {"attn_mask": torch.zeros(6, 6)}),
    "bias_grad": ({}, {"attn_mask": torch.zeros(6, 6, requires_grad=True)}),
    "gqa": ({"kv_heads": 2}, {}),
    "value_dim": ({"value_dim": 8}, {}),
    "softcap": ({}, {"softcap": 2.0}),
    "alibi": ({}, {"alibi_slopes": torch.ones(4)}),
    "sinks": ({}, {"sinks": torch.ones(4)}),
    "dropout": ({}, {"dropout_p": 0.5}),
    "deterministic": ({}, {"deterministic": True}),
}


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The backends that calls launch, in order."""
    names: list[str] = []
    for name, module in (("reference", reference), ("cpu", native), ("triton", triton), ("sdpa", delegate)):
        original = module.forward

        def spy(p: Any, name: str = name, original: Any = original) -> Any:
            names.append(name)
            return original(p)

        monkeypatch.setattr(module, "forward", spy)
    return names


def test_every_backend_is_listed_in_selection_order() -> None:
    verdicts = fastattn.explain(*qkv())
    assert [v.backend for v in verdicts] == NAMES
    assert sum(v.selected for v in verdicts) == 1
    assert all(v.supported == (not v.reasons) for v in verdicts)
    assert all(v.supported for v in verdicts if v.selected)


@pytest.mark.parametrize("feature", FEATURE_CALLS)
def test_verdicts_follow_the_table(feature: str, launched: list[str]) -> None:
    """The first backend whose table has the feature is selected, and runs; the others say what they lack."""
    shapes, options = FEATURE_CALLS[feature]
    tensors = qkv(**shapes)
    verdicts = {v.backend: v for v in fastattn.explain(*tensors, **options)}
    able = [c.backend for c in capabilities("dense") if feature in c.features and not c.unavailable("cpu", None)]
    assert [name for name, v in verdicts.items() if v.selected] == able[:1]
    assert launched == []  # explain computes nothing
    for capability in capabilities("dense"):
        reasons = "; ".join(verdicts[capability.backend].reasons)
        assert (FEATURES["dense"][feature] in reasons) == (feature not in capability.features), reasons
    fastattn.attention(*tensors, **options)
    assert launched == able[:1]


@pytest.mark.parametrize("backend", NAMES)
@torch.no_grad()  # the forward refuses without having been asked for gradients
def test_a_named_backend_runs_or_raises_what_explain_says(backend: str, launched: list[str]) -> None:
    for shapes, options in FEATURE_CALLS.values():
        tensors = qkv(**shapes)
        verdicts = {v.backend: v for v in fastattn.explain(*tensors, backend=backend, **options)}
        assert not any(v.selected for name, v in verdicts.items() if name != backend)
        assert verdicts[backend].selected == verdicts[backend].supported
        launched.clear()
        if verdicts[backend].supported:
            fastattn.attention(*tensors, backend=backend, **options)
            assert launched == [backend]
        else:
            with pytest.raises(fastattn.UnsupportedError) as caught:
                fastattn.attention(*tensors, backend=backend, **options)
            assert all(reason in str(caught.value) for reason in verdicts[backend].reasons)
            assert launched == []


def test_gradients_are_a_requirement_only_where_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """A forward-only backend serves calls without gradients and is passed over, with the reason, for others."""
    table = next(c for c in capabilities("dense") if c.backend == "reference")
    forward_only = backends.Capability(
        "forward_only", "dense", frozenset(), table.dtypes, None, table.features - {"backward"}
    )
    monkeypatch.setattr(backends, "capabilities", lambda family: (forward_only, table))
    tensors = qkv()
    assert fastattn.explain(*tensors)[0].selected
    needs = [t.requires_grad_() for t in tensors]
    verdict = fastattn.explain(*needs)[0]
    assert not verdict.supported
    assert FEATURES["dense"]["backward"] in verdict.reasons[0]
    with torch.no_grad():
        assert fastattn.explain(*needs)[0].selected


@pytest.mark.skipif(not NATIVE, reason="needs the native extension")
@pytest.mark.parametrize("dim", [256, 257])
def test_head_size_limit(dim: int, launched: list[str]) -> None:
    """Both the query's and the value's head size count."""
    for sizes in ({"dim": dim}, {"value_dim": dim}):
        tensors = qkv(**sizes)
        verdict = fastattn.explain(*tensors)[0]
        assert verdict.backend == "cpu"
        assert verdict.supported == (dim <= 256)
        assert verdict.supported or ("256" in verdict.reasons[0] and "257" in verdict.reasons[0])
    fastattn.attention(*qkv(dim=dim))
    assert launched == [next(v.backend for v in fastattn.explain(*qkv(dim=dim)) if v.selected)]
    assert (launched == ["cpu"]) == (dim <= 256)


def test_devices() -> None:
    """On the meta device no CPU kernel is offered."""
    verdicts = {v.backend: v for v in fastattn.explain(*(t.to("meta") for t in qkv()))}
    assert not verdicts["cpu"].supported
    assert "meta" in "; ".join(verdicts["cpu"].reasons)


def test_a_missing_extension_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the native module everything still runs, and `explain` says what is missing; naming it raises that."""
    monkeypatch.setattr(_extension, "load", lambda: (None, "there is no extension today"))
    backends.select.cache_clear()
    try:
        verdicts = {v.backend: v for v in fastattn.explain(*qkv())}
        assert any(v.selected for name, v in verdicts.items() if name != "cpu")
        assert "there is no extension today" in verdicts["cpu"].reasons[0]
        with pytest.raises(fastattn.UnsupportedError, match="there is no extension today"):
            fastattn.attention(*qkv(), backend="cpu")
        assert fastattn.attention(*qkv()).shape == (2, 4, 6, 16)
    finally:
        backends.select.cache_clear()


def test_explanation_reads_well() -> None:
    """One line for each backend, with its name, and "selected" or the reason."""
    text = str(fastattn.explain(*qkv(), softcap=3.0))
    lines = text.splitlines()
    assert [line.split()[0] for line in lines] == NAMES
    assert sum("selected" in line for line in lines) == 1
    if "softcap" not in next(c for c in capabilities("dense") if c.backend == "cpu").features:
        assert "softcap" in lines[0]


def test_explain_draws_nothing() -> None:
    """Fails where explaining a call with dropout moves torch's generator."""
    tensors: list[Tensor] = qkv()
    before = torch.get_rng_state()
    fastattn.explain(*tensors, dropout_p=0.3)
    assert torch.equal(before, torch.get_rng_state())
