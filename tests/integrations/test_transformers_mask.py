"""The two functions that are registered with transformers, called directly: every mask against transformers' own dense
one, every argument against plain float64 attention."""

from __future__ import annotations

import importlib
import random
import runpy
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

transformers = pytest.importorskip("transformers", minversion="5.17")

masking_utils = importlib.import_module("transformers.masking_utils")
integration = importlib.import_module("fastattn.integrations.transformers")
IntervalMask, attention_mask_function = integration.IntervalMask, integration.attention_mask_function

EXACT = {"rtol": 1e-10, "atol": 1e-12}


def mask_functions(batch: int) -> dict[str, Any]:
    chunks = masking_utils.chunked_causal_mask_function(3, torch.randint(0, 3, (batch,)))
    blocks = masking_utils.blockwise_overlay(torch.randint(-1, 3, (batch, 64)))
    causal = masking_utils.causal_mask_function
    return {
        "causal": causal,
        "bidirectional": masking_utils.bidirectional_mask_function,
        "window": masking_utils.sliding_window_causal_mask_function(random.randint(1, 6)),
        "empty window": masking_utils.sliding_window_causal_mask_function(0),
        "band": masking_utils.sliding_window_bidirectional_mask_function(random.randint(0, 6)),
        "chunks": chunks,
        "images": masking_utils.or_masks(causal, blocks),
        "prefix": masking_utils.or_masks(causal, lambda b, h, q, k: (q < 3) & (k < 3)),
        "custom": masking_utils.and_masks(causal, lambda b, h, q, k: (q + k) % 3 > 0),
    }


COMPACT = ("causal", "bidirectional", "window", "band")


def padding_masks(batch: int, length: int) -> dict[str, Tensor | None]:
    first, count = torch.randint(0, length, (batch, 1)), torch.randint(0, length + 1, (batch, 1))
    keys = torch.arange(length)
    run = (keys >= first) & (keys < first + count)
    return {
        "none": None,
        "ones": torch.ones(batch, length, dtype=torch.bool),
        "runs": run,
        "holes": torch.rand(batch, length) < 0.5,
    }


@pytest.mark.parametrize("name", list(mask_functions(1)))
def test_mask_is_transformers_own(name: str) -> None:
    """Random sizes, offsets (caches), padding and packing; fails if one element of a mask is not that of sdpa_mask, or
    if a mask that numbers can express is kept densely."""
    for _ in range(40):
        batch, length = random.randint(1, 3), random.randint(1, 7)
        q_offset, kv_offset = random.choice([(0, 0), (0, 0), (4, 0), (4, 3)])
        sizes = {"batch_size": batch, "q_length": length, "kv_length": random.choice([length, length + 4, length + 1])}
        sizes |= {"q_offset": random.choice([q_offset, torch.tensor(q_offset)]), "kv_offset": kv_offset}
        seen = max(1, sizes["kv_length"] + kv_offset + random.choice([-1, 0, 0, 2]))
        for padding, attention_mask in padding_masks(batch, seen).items():
            given = sizes | {"mask_function": mask_functions(batch)[name], "attention_mask": attention_mask}
            found = attention_mask_function(**given)
            expected = masking_utils.sdpa_mask(**given, allow_is_causal_skip=False)
            assert isinstance(found, IntervalMask)
            if padding != "holes" and name in COMPACT:
                assert found.attn_mask is None
            assert torch.equal(found.dense(), expected)
            assert attention_mask_function(**given, allow_is_bidirectional_skip=True) is not None or expected.all()


@pytest.mark.parametrize("trick", ["none", "none, unmapped", "positions", "order", "order, unmapped"])
@pytest.mark.parametrize("name", list(mask_functions(1)))
def test_packed_mask_is_transformers_own(name: str, trick: str) -> None:
    """Fails if a packed mask differs from sdpa_mask's, also where positions do not count up by one within a sequence or
    where a sequence comes in two parts; or if well-formed packing is not recognised. Mapped: each sequence's positions
    start at 0 in the mask function, as in transformers since 5.23; unmapped: they count on, as before."""
    if "unmapped" not in trick and not hasattr(masking_utils, "packed_sequence_compatibility_function"):
        pytest.skip("this version of transformers does not map the positions of packed sequences")
    for _ in range(20):
        batch, length = random.randint(1, 3), random.randint(2, 9)
        lengths = [random.randint(1, 4) for _ in range(9)]
        positions = torch.stack([torch.cat([torch.arange(n) for n in random.sample(lengths, 9)])[:length]] * batch)
        sequence = masking_utils.find_packed_sequence_indices(positions)
        if sequence is None:
            continue
        if trick == "positions":
            positions = positions + torch.randint(0, 2, positions.shape)
        if "order" in trick:
            sequence = sequence % 2
        function = mask_functions(batch)[name]
        if "unmapped" in trick:
            function = masking_utils.and_masks(function, masking_utils.packed_sequence_mask_function(sequence))
        else:
            function = masking_utils.packed_sequence_compatibility_function(function, positions, sequence)
        given = {"batch_size": batch, "q_length": length, "kv_length": length, "mask_function": function}
        found = attention_mask_function(**given)
        if "none" in trick and name in COMPACT:
            assert found.attn_mask is None
            assert found.longest == max(lengths_of(sequence))
        assert torch.equal(found.dense(), masking_utils.sdpa_mask(**given, allow_is_causal_skip=False))


def lengths_of(sequence: Tensor) -> list[int]:
    return [n for row in sequence for n in torch.unique_consecutive(row, return_counts=True)[1].tolist()]


def a_mask() -> Tensor:
    return attention_mask_function(2, 3, 5, q_offset=2, attention_mask=torch.tensor([[1, 1, 1, 1, 1], [0, 1, 1, 1, 1]]))


def test_mask_is_dense_to_those_who_compute_with_it() -> None:
    """Fails if slicing, concatenating or selecting with a mask, or writing into it or into a slice of it, is not what
    it is with the dense one."""
    mask, dense, scores = a_mask(), a_mask().dense(), torch.randn(2, 4, 3, 5)
    assert dense.dtype == torch.bool
    assert mask.shape == dense.shape == (2, 1, 3, 5)
    assert mask.contiguous() is mask
    assert "window=(None, 0)" in repr(mask)
    assert not mask.is_dense
    for use in (
        lambda m: m[:, :, -1:, :4],
        lambda m: torch.cat([m, dense], -1),
        lambda m: scores.masked_fill(~m, 0.0),
        lambda m: torch.where(m, scores, 0.0),
    ):
        assert torch.equal(use(a_mask()), use(dense))
    for written in (mask, dense):
        written[..., 0] = False
        written[:, :, 1].logical_not_()
    query, key, value = a_call(3, 5)
    by_mask, by_dense = (integration.attention_function(CAUSAL_MODULE, query, key, value, m)[0] for m in (mask, dense))
    assert torch.equal(by_mask, by_dense)


def test_mask_refuses_to_be_taken_for_a_float_mask() -> None:
    """Fails if a model that adds the mask to its scores silently attends to what is masked."""
    mask, scores = a_mask(), torch.randn(2, 4, 3, 5)
    for misuse in (lambda: scores + mask, lambda: mask + scores, lambda: scores.add_(mask), lambda: mask.float()):
        with pytest.raises(NotImplementedError, match="attn_implementation='eager'"):
            misuse()


def attention_of_the_text_book(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    """(B, Sq, Hq, Dv) by float masks (0 and -inf where bool)."""
    key, value = (t.repeat_interleave(query.shape[1] // t.shape[1], 1) for t in (key, value))
    mask = (
        torch.zeros(mask.shape, dtype=query.dtype).masked_fill(~mask, float("-inf"))
        if mask.dtype == torch.bool
        else mask
    )
    scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5 + mask
    return (scores.softmax(-1) @ value).transpose(1, 2)


def a_call(length_q: int = 5, length_k: int = 7) -> tuple[Tensor, Tensor, Tensor]:
    """query, key, value (2, 4 | 2, S, 8), transposed as transformers gives them."""
    shapes = ((2, length_q, 4, 8), (2, length_k, 2, 8), (2, length_k, 2, 8))
    query, key, value = (torch.randn(shape, dtype=torch.float64).transpose(1, 2) for shape in shapes)
    return query, key, value


CAUSAL_MODULE = SimpleNamespace(is_causal=True)


@pytest.mark.parametrize("kind", ["bool", "one head's", "one row's", "float", "float32", "interval", "packed"])
@pytest.mark.parametrize("bias", [False, True])
def test_masks_and_position_bias(kind: str, bias: bool) -> None:
    """Fails if a mask of the user, or one that comes with a position bias, is lost, or if the bias has no gradient."""
    query, key, value = a_call(5, 5 if kind == "packed" else 7)
    kept = torch.rand(2, 4, 5, 7) < 0.6
    kept[..., 0] = True
    mask: Any = {
        "bool": kept,
        "one head's": kept[:, :1],
        "one row's": kept[:1, :1],
        "float": torch.randn(2, 4, 5, 7, dtype=torch.float64),
        "float32": torch.randn(2, 4, 5, 7).half(),
        "interval": attention_mask_function(2, 5, 7, q_offset=2, mask_function=mask_functions(2)["window"]),
        "packed": attention_mask_function(
            2, 5, 5, mask_function=masking_utils.packed_sequence_mask_function(torch.tensor([[0, 0, 1, 1, 1]] * 2))
        ),
    }[kind]
    dense = mask._evaluate() if isinstance(mask, IntervalMask) else mask
    position_bias = torch.randn(1, 4, *dense.shape[2:], dtype=torch.float64, requires_grad=True) if bias else None
    truth = position_bias.masked_fill(~dense, float("-inf")) if bias and dense.dtype == torch.bool else dense
    truth = truth if not bias or dense.dtype == torch.bool else position_bias + dense
    expected = attention_of_the_text_book(query, key, value, truth)
    found, weights = integration.attention_function(CAUSAL_MODULE, query, key, value, mask, position_bias=position_bias)
    assert weights is None
    assert found.is_contiguous()
    assert_close(found, expected, **EXACT)
    if bias:
        gradients = (torch.autograd.grad(out.sin().sum(), position_bias)[0] for out in (found, expected))
        assert_close(*gradients, **EXACT)


@pytest.mark.parametrize(("length_q", "is_causal"), [(5, None), (5, False), (5, True), (1, None)])
def test_without_a_mask_causality_is_as_in_sdpa_attention(length_q: int, is_causal: bool | None) -> None:
    """Fails if the module's is_causal, an explicit one, the exception for one query or the alignment (top-left: the
    first keys of a static cache) differ from transformers' own sdpa_attention_forward."""
    module = SimpleNamespace(is_causal=True, num_key_value_groups=2)
    call = (module, *a_call(length_q, 7), None)
    theirs, _ = transformers.AttentionInterface()["sdpa"](*call, is_causal=is_causal)
    found, _ = integration.attention_function(*call, is_causal=is_causal)
    assert_close(found, theirs, **EXACT)


def test_window_without_a_mask() -> None:
    """Fails if sliding_window is ignored in a causal call that comes without a mask."""
    query, key, value = a_call(6, 6)
    found, _ = integration.attention_function(CAUSAL_MODULE, query, key, value, None, sliding_window=3)
    window = masking_utils.sliding_window_causal_mask_function(3)
    kept = masking_utils.sdpa_mask(2, 6, 6, mask_function=window, allow_is_causal_skip=False)
    assert_close(found, attention_of_the_text_book(query, key, value, kept), **EXACT)


def test_mask_of_another_shape() -> None:
    """Fails if a mask made for fewer keys is stretched over those there are, or one for the whole batch is refused."""
    query, key, value = a_call()
    with pytest.raises(ValueError, match=r"attn_mask must broadcast to \(B, Hq, Sq, Sk\) = \(2, 4, 5, 7\)"):
        integration.attention_function(CAUSAL_MODULE, query, key, value, attention_mask_function(2, 5, 6, q_offset=1))
    mask = attention_mask_function(1, 5, 7, q_offset=2)
    found, _ = integration.attention_function(CAUSAL_MODULE, query, key, value, mask)
    assert_close(found, attention_of_the_text_book(query, key, value, mask.dense()), **EXACT)


def test_one_query_for_the_whole_batch() -> None:
    """Learned queries come with a batch of 1; fails if they are not broadcast, as SDPA does."""
    query, key, value = a_call()
    kept = torch.ones(1, 1, 5, 7, dtype=torch.bool)
    found, _ = integration.attention_function(SimpleNamespace(is_causal=False), query[:1], key, value, None)
    assert_close(found, attention_of_the_text_book(query[:1].expand(2, -1, -1, -1), key, value, kept), **EXACT)


@pytest.mark.parametrize("mask", [None, "padding", "dense"])
def test_lengths_of_packed_sequences_restrict_any_mask(mask: str | None) -> None:
    """cu_seq_lens with what else a model gives; fails if either of the two restrictions is dropped."""
    query, key, value = (t[:1] for t in a_call(7, 7))
    cu_seqlens = torch.tensor([0, 3, 4, 7], dtype=torch.int32)
    packing = {"cu_seq_lens_q": cu_seqlens, "cu_seq_lens_k": cu_seqlens, "max_length_q": 3, "max_length_k": 3}
    sequence = torch.tensor([0, 0, 0, 1, 2, 2, 2])
    kept = (sequence[:, None] == sequence) & torch.ones(7, 7, dtype=torch.bool).tril()
    given = None
    if mask == "padding":
        given = attention_mask_function(1, 7, 7, attention_mask=torch.tensor([[1, 1, 1, 1, 1, 1, 0]]))
        kept = kept & (torch.arange(7) < 6)
    if mask == "dense":
        given = torch.rand(1, 1, 7, 7) < 0.7
        given |= torch.eye(7, dtype=torch.bool)
        kept = (sequence[:, None] == sequence) & given
    found, _ = integration.attention_function(CAUSAL_MODULE, query, key, value, given, **packing)
    assert_close(found, attention_of_the_text_book(query, key, value, kept.expand(1, 1, 7, 7)), **EXACT)


def test_dropout_keeps_the_scale() -> None:
    """Fails if dropout is ignored, or if what remains is not scaled up by 1 / (1 - p)."""
    query, key, value = a_call(64, 64)
    outs = [
        integration.attention_function(CAUSAL_MODULE, query, key, torch.ones_like(value), None, dropout=0.25)[0]
        for _ in range(20)
    ]
    assert not torch.equal(outs[0], outs[1])
    assert abs(torch.stack(outs)[:, :, 32:].mean() - 1) < 0.02


def test_attention_weights_are_not_returned_in_silence() -> None:
    """Fails if output_attentions passes without a warning."""
    with pytest.warns(UserWarning, match="no attention weights"):
        integration.attention_function(CAUSAL_MODULE, *a_call(), None, output_attentions=True)


@pytest.mark.parametrize("name", ["cache", "indices", "sinks"])
def test_unknown_arguments_are_refused(name: str) -> None:
    """A paged cache, the keys that a sparse model has selected, another kind of sinks: each changes the result. Fails
    if one is ignored; None, flags and what is known to be for others must pass."""
    with pytest.raises(TypeError, match=f"SimpleNamespace gives its attention {name}"):
        integration.attention_function(CAUSAL_MODULE, *a_call(), None, **{name: torch.zeros(1)})
    harmless = {name: None, "use_cache": True, "position_ids": torch.arange(5)}
    integration.attention_function(CAUSAL_MODULE, *a_call(), None, **harmless)


def test_contradictions_are_refused() -> None:
    """Fails if is_causal=False loses against a causal mask, or half a packing is ignored, without a word."""
    mask = attention_mask_function(2, 5, 7, q_offset=2)
    with pytest.raises(ValueError, match=r"config\.is_causal = False"):
        integration.attention_function(CAUSAL_MODULE, *a_call(), mask, is_causal=False)
    with pytest.raises(ValueError, match="max_length_k must be given together"):
        integration.attention_function(CAUSAL_MODULE, *a_call(), None, cu_seq_lens_q=torch.tensor([0, 5]))
    with pytest.raises(ValueError, match=r"attention_mask must have shape \(2, at most 7\), got \(1, 7\)"):
        attention_mask_function(2, 5, 7, attention_mask=torch.ones(1, 7, dtype=torch.bool))


def registered(name: str) -> list[bool]:
    return [name in interface() for interface in (transformers.AttentionInterface, transformers.AttentionMaskInterface)]


def test_registration(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if importing registers, if only one of the two functions is registered or unregistered, or if a second
    registration fails."""
    for interface in (transformers.AttentionInterface, transformers.AttentionMaskInterface):
        others = {name: function for name, function in interface._global_mapping.items() if name != "fastattn"}
        monkeypatch.setattr(interface, "_global_mapping", others)
    runpy.run_path(integration.__file__)
    assert registered("fastattn") == [False, False]
    for _ in range(2):
        integration.register()
        assert registered("fastattn") == [True, True]
    integration.register("another")
    integration.unregister()
    assert registered("fastattn") == [False, False]
    assert registered("another") == [True, True]
    integration.unregister("another")
    with pytest.raises(ValueError, match="name must be one that was registered, got 'fastattn'"):
        integration.unregister()


@pytest.mark.parametrize("name", ["sdpa", "my_flash", "owner/repository", "paged|fast", ""])
def test_names_that_mean_something_to_transformers(name: str) -> None:
    """Fails if a name is taken that transformers would give a special treatment."""
    with pytest.raises(ValueError, match="name must be an identifier"):
        integration.register(name)


def test_names_of_others_are_left_alone() -> None:
    """Fails if another library's implementation is overwritten."""
    theirs = lambda *args, **options: None  # noqa: E731
    transformers.AttentionInterface.register("theirs", theirs)
    with pytest.raises(ValueError, match="name must be free"):
        integration.register("theirs")
    assert transformers.AttentionInterface()["theirs"] is theirs
    del transformers.AttentionInterface._global_mapping["theirs"]


@pytest.mark.parametrize("version", [None, "5.2.0"])
def test_needs_transformers(version: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a missing or an old transformers shows as anything but an ImportError that says so."""
    path = integration.__name__
    names = {"__version__": version, "AttentionInterface": None, "AttentionMaskInterface": None}
    monkeypatch.setitem(sys.modules, "transformers", SimpleNamespace(**names) if version else None)
    monkeypatch.setitem(sys.modules, path, integration)  # what the end of the test restores
    del sys.modules[path]
    with pytest.raises(ImportError, match=f"5.17 or newer, got {version}" if version else "does not import"):
        importlib.import_module(path)
