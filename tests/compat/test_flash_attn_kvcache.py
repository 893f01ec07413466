"""`flash_attn_with_kvcache` against caches grown by hand and flash-attn's documentation, and a decoding loop.

In float64. Whatever of a cache holds no key is NaN, so that reading it shows.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from fastattn.compat.flash_attn import flash_attn_with_kvcache

EXACT = {"rtol": 1e-9, "atol": 1e-11}
BATCH, CAPACITY, HEADDIM = 3, 12, 6
HELD = [4, 0, 7]
SCORING: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"causal": True, "alibi_slopes": torch.tensor([0.2, 0.5, 0.1, 0.9])},
    "window": {"window_size": (2, 0), "softcap": 1.5, "softmax_scale": 0.7},
}
NEW = {"equal": (3, 3), "one": (1, 1), "more queries": (3, 1), "more keys": (1, 3)}
Cache = tuple[list[Tensor], dict[str, Tensor], Callable[[int, int], tuple[int, int]]]


def _plain() -> Cache:
    """Caches, the arguments that go with them, and where key j of sequence b is in them."""
    caches = [torch.full((BATCH + 1, CAPACITY, 2, HEADDIM), math.nan, dtype=torch.float64) for _ in range(2)]
    return caches, {}, lambda b, j: (b, j)


def _by_index() -> Cache:
    caches = _plain()[0]
    index = torch.tensor([2, 3, 0], dtype=torch.int32)
    return caches, {"cache_batch_idx": index}, lambda b, j: (int(index[b]), j)


def _paged() -> Cache:
    caches = [torch.full((10, 4, 2, HEADDIM), math.nan, dtype=torch.float64) for _ in range(2)]
    table = torch.tensor([[7, 1, 3], [2, 5, 8], [9, 0, 4]], dtype=torch.int32)
    return caches, {"block_table": table}, lambda b, j: (int(table[b, j // 4]), j % 4)


def _turned(x: Tensor, position: int, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """x (heads, headdim) after a rotation by the angles of one position, as complex numbers."""
    half = cos.shape[1]
    pairs = x[:, : 2 * half].unflatten(-1, (half, 2) if interleaved else (2, half))
    pairs = pairs if interleaved else pairs.transpose(-1, -2)
    turned = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * torch.complex(cos, sin)[position])
    turned = turned if interleaved else turned.transpose(-1, -2)
    return torch.cat((turned.flatten(-2), x[:, 2 * half :]), dim=-1)


@pytest.mark.parametrize("scoring", SCORING)
@pytest.mark.parametrize("cache", [_plain, _by_index, _paged])
@pytest.mark.parametrize(
    ("new", "rotary"), [(None, None), *((new, rotary) for new in NEW for rotary in (None, "interleaved", "halves"))]
)
def test_against_grown_caches(
    rotary: str | None, new: str | None, cache: Callable[[], Cache], scoring: str, documented: Callable[..., Any]
) -> None:
    """Fails if a key is appended, turned or looked for in the wrong place, anything else of a cache changes, the
    queries turn by other positions than documented, or what is masked counts."""
    options = SCORING[scoring]
    seqlen_q, seqlen_new = NEW[new] if new else (2, 0)
    caches, arguments, place = cache()
    for pages in caches:
        for b, held in enumerate(HELD):
            for j in range(held):
                pages[place(b, j)] = torch.randn(2, HEADDIM)
    q = torch.randn(BATCH, seqlen_q, 4, HEADDIM, dtype=torch.float64)
    added = [torch.randn(BATCH, seqlen_new, 2, HEADDIM, dtype=torch.float64) for _ in range(2)]
    leftpad = torch.tensor([1, 0, 5], dtype=torch.int32)
    cos, sin = torch.randn(2, CAPACITY, 2, dtype=torch.float64)
    interleaved = rotary == "interleaved"

    expected, before = [pages.clone() for pages in caches], [pages.clone() for pages in caches]
    outs, lses = [], []
    for b, held in enumerate(HELD):
        for j in range(seqlen_new):
            k = added[0][b, j]
            expected[0][place(b, held + j)] = _turned(k, held + j, cos, sin, interleaved) if rotary else k
            expected[1][place(b, held + j)] = added[1][b, j]
        queries = q[b]
        if rotary:
            positions = [held + (i if scoring != "plain" else 0) for i in range(seqlen_q)]
            turned = [_turned(x, at, cos, sin, interleaved) for x, at in zip(queries, positions, strict=True)]
            queries = torch.stack(turned)
        seen = range(int(leftpad[b]), held + seqlen_new)
        none = q.new_zeros(0, 2, HEADDIM)
        k, v = (torch.stack([pages[place(b, j)] for j in seen]) if seen else none for pages in expected)
        out, lse, _ = documented(queries, k, v, **options)
        outs.append(out)
        lses.append(lse)

    out, lse = flash_attn_with_kvcache(
        q,
        *caches,
        *(added if new else ()),
        rotary_cos=cos if rotary else None,
        rotary_sin=sin if rotary else None,
        rotary_interleaved=interleaved,
        cache_seqlens=torch.tensor(HELD, dtype=torch.int32),
        cache_leftpad=leftpad,
        **arguments,
        **options,
        return_softmax_lse=True,
    )
    assert_close(out, torch.stack(outs), **EXACT)
    assert_close(lse, torch.stack(lses), **EXACT)
    for pages, grown, old in zip(caches, expected, before, strict=True):
        assert_close(pages, grown, **EXACT, equal_nan=True)
        untouched = old.isnan().logical_and(grown.isnan()) | (old == grown)
        assert torch.equal(pages.nan_to_num()[untouched], old.nan_to_num()[untouched])


@pytest.mark.parametrize("seqlens", [None, CAPACITY])
@pytest.mark.parametrize("cache", [_plain, _by_index, _paged])
def test_one_length_for_all(cache: Callable[[], Cache], seqlens: int | None, documented: Callable[..., Any]) -> None:
    """Fails if cache_seqlens=None is not the whole cache, or one number not the length of every sequence."""
    caches, arguments, place = cache()
    caches = [torch.randn_like(pages) for pages in caches]
    q = torch.randn(BATCH, 2, 4, HEADDIM, dtype=torch.float64)
    out = flash_attn_with_kvcache(q, *caches, cache_seqlens=seqlens, causal=True, **arguments)
    for b in range(BATCH):
        k, v = (torch.stack([pages[place(b, j)] for j in range(CAPACITY)]) for pages in caches)
        assert_close(out[b], documented(q[b], k, v, causal=True)[0], **EXACT)


class _Llama(torch.nn.Module):
    """One attention layer with rotary embeddings and grouped-query heads, as Llama has it."""

    def __init__(self) -> None:
        super().__init__()
        self.q = torch.nn.Linear(16, 4 * 8, bias=False, dtype=torch.float64)
        self.kv = torch.nn.Linear(16, 2 * 2 * 8, bias=False, dtype=torch.float64)
        angles = torch.arange(CAPACITY)[:, None] / 10000 ** (torch.arange(4) / 4)
        self.cos, self.sin = angles.cos().double(), angles.sin().double()

    def forward(self, x: Tensor, caches: list[Tensor], held: Tensor) -> Tensor:
        k, v = self.kv(x).unflatten(-1, (2, 2, 8)).unbind(2)
        return flash_attn_with_kvcache(
            self.q(x).unflatten(-1, (4, 8)),
            *caches,
            k,
            v,
            rotary_cos=self.cos,
            rotary_sin=self.sin,
            cache_seqlens=held,
            causal=True,
            rotary_interleaved=False,
        )

    def plain(self, x: Tensor) -> Tensor:
        q, (k, v) = self.q(x).unflatten(-1, (4, 8)), self.kv(x).unflatten(-1, (2, 2, 8)).unbind(2)
        cos, sin = (torch.cat((table, table), 1)[: x.shape[1], None] for table in (self.cos, self.sin))
        q, k = (t * cos + torch.cat((-t[..., 4:], t[..., :4]), -1) * sin for t in (q, k))
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)


def test_llama_decodes() -> None:
    """A prompt in one call and then token by token equals causal attention over the whole; fails if a step sees another
    number of keys, or turns by another position, than its place in the text."""
    model, x = _Llama(), torch.randn(2, CAPACITY, 16, dtype=torch.float64)
    caches = [torch.full((2, CAPACITY, 2, 8), math.nan, dtype=torch.float64) for _ in range(2)]
    held = torch.zeros(2, dtype=torch.int32)
    outs = []
    with torch.no_grad():
        for tokens in x.split([5, *[1] * (CAPACITY - 5)], dim=1):
            outs.append(model(tokens, caches, held))
            held += tokens.shape[1]
        assert_close(torch.cat(outs, dim=1), model.plain(x), **EXACT)


REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "splits": ({"num_splits": 2}, ValueError, "num_splits must be 0"),
    "k without v": ({"v": None}, ValueError, "v must be given"),
    "v without k": ({"k": None}, ValueError, "k must be given"),
    "k without lengths": ({"cache_seqlens": None}, ValueError, "cache_seqlens must be given with k and v"),
    "one table": ({"rotary_cos": torch.ones(12, 2)}, TypeError, "rotary_sin must be a torch.Tensor"),
    "rotary without k": (
        {"rotary_cos": torch.ones(12, 2), "rotary_sin": torch.ones(12, 2), "k": None, "v": None},
        ValueError,
        "rotary must come with key and value",
    ),
    "short table": (
        {"rotary_cos": torch.ones(10, 2), "rotary_sin": torch.ones(10, 2), "causal": True},
        ValueError,
        r"rotary_cos must have a row for each position of the queries, up to 10, got \(10, 2\)",
    ),
    "interleaved": (
        {"rotary_cos": torch.ones(12, 2), "rotary_sin": torch.ones(12, 2), "rotary_interleaved": 1},
        TypeError,
        "rotary_interleaved must be a bool",
    ),
    "index and table": (
        {"cache_batch_idx": torch.tensor([0, 1]), "block_table": torch.tensor([[0], [1]])},
        ValueError,
        "cache_batch_idx must be None with block_table",
    ),
    "index": ({"cache_batch_idx": torch.tensor([0])}, ValueError, "cache_batch_idx must have shape"),
    "seqlens": ({"cache_seqlens": 1.5}, TypeError, "cache_seqlens must be an int, got 1.5"),
    "full": ({"cache_seqlens": 12}, ValueError, r"key_lengths\[0\] must be between 0 and 11"),
    "layout": (
        {"k_cache": torch.zeros(2, 12, 8)},
        ValueError,
        r"k_cache must have shape \(batch or pages, rows, nheads_k",
    ),
    "lse": ({"return_softmax_lse": None}, TypeError, "return_softmax_lse must be a bool"),
    "gradient": (
        {"q": torch.zeros(2, 3, 2, 8, requires_grad=True)},
        ValueError,
        "attention_with_kvcache has no gradient, but query requires one",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_and_caches_unchanged(case: str) -> None:
    """Fails if an argument that does not fit is ignored, or refused only after the caches were written to."""
    changed, error, match = REFUSED[case]
    arguments = {name: torch.zeros(2, 12, 2, 8) for name in ("k_cache", "v_cache")}
    arguments |= {"q": torch.ones(2, 3, 2, 8), "k": torch.ones(2, 1, 2, 8), "v": torch.ones(2, 1, 2, 8)}
    arguments |= {"cache_seqlens": 8, **changed}
    with pytest.raises(error, match=f"fastattn: {match}"):
        flash_attn_with_kvcache(**arguments)
    assert not arguments["k_cache"].any()
    assert not arguments["v_cache"].any()


def test_gradients_do_not_stop_inference() -> None:
    """Parameters that could be trained do not keep a model from decoding under no_grad."""
    q = torch.randn(2, 1, 2, 8, requires_grad=True)
    cache = torch.randn(2, 4, 2, 8)
    with torch.no_grad():
        out = flash_attn_with_kvcache(q, cache, cache)
    assert not out.requires_grad
