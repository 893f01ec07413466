"""`attention_with_kvcache`: what it appends, where its queries stand, and that it touches nothing else.

Judged by the brute force of conftest.py over the caches' contents and by a rotation written out column by column, on
every backend of this machine, contiguous and in pages where the backend's table has them.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

import fastattn
from fastattn import verify
from fastattn.backends import capabilities
from fastattn.dense import append

B, HQ, HKV, D, DV, CAPACITY = 2, 4, 2, 8, 6, 12
CACHE = {"query_start", "key_lengths", "gqa", "value_dim", "causal", "alignment"}  # what nearly every test here needs
TABLES = {c.backend: c for c in capabilities("dense")}
TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-12, torch.bfloat16: 2e-2, torch.float16: 3e-3}
BruteForce = Callable[..., tuple[Tensor, Tensor]]


def ways(*dtypes: torch.dtype) -> list[tuple[str, int | None]]:
    """(backend, page_size) that the tables allow; None is the contiguous cache."""
    return [
        (backend, page_size)
        for backend in verify.backends_on("cpu", *dtypes)
        for page_size in (None, 3)
        if TABLES[backend].features >= CACHE | ({"paged"} if page_size else set())
    ]


every_way = pytest.mark.parametrize(("backend", "page_size"), ways())
# For what does not depend on the kernel: Triton's interpreter is slow.
reference_ways = pytest.mark.parametrize(("backend", "page_size"), [("reference", None), ("reference", 3)])


def supported(backend: str, *features: str) -> None:
    if lacking := set(features) - TABLES[backend].features:
        pytest.skip(f"{backend} does not support {', '.join(lacking)}")


@dataclass
class Cache:
    """Random keys and values up to the lengths, NaN after them, in pages of page_size (shuffled) or contiguous."""

    lengths: list[int]
    page_size: int | None
    dtype: torch.dtype = torch.float32
    capacity: int = CAPACITY

    def __post_init__(self) -> None:
        batch = len(self.lengths)
        dense = [torch.randn(batch, HKV, self.capacity, width).to(self.dtype) for width in (D, DV)]
        for t in dense:
            for b, length in enumerate(self.lengths):
                t[b, :, length:] = torch.nan
        self.table = None
        if self.page_size is None:
            self.key, self.value = dense
            return
        columns = self.capacity // self.page_size
        self.table = torch.randperm(batch * columns + 2)[: batch * columns].view(batch, columns)
        self.key, self.value = (
            torch.full((batch * columns + 2, HKV, self.page_size, width), torch.nan, dtype=self.dtype)
            for width in (D, DV)
        )
        for pages, t in ((self.key, dense[0]), (self.value, dense[1])):
            pages[self.table] = t.unflatten(2, (columns, self.page_size)).transpose(1, 2)

    def contents(self) -> tuple[Tensor, Tensor]:
        """Keys (B, Hkv, capacity, D) and values (B, Hkv, capacity, Dv), copied out of their pages."""
        if self.table is None:
            return self.key.clone(), self.value.clone()
        key, value = (pages[self.table].transpose(1, 2).flatten(2, 3) for pages in (self.key, self.value))
        return key, value

    def attend(self, query: Tensor, **options: Any) -> Any:
        lengths = torch.tensor(self.lengths)
        return fastattn.attention_with_kvcache(
            query, self.key, self.value, **{"key_lengths": lengths, "block_table": self.table} | options
        )


def new_tokens(seqlen: int, dtype: torch.dtype = torch.float32, batch: int = B) -> tuple[Tensor, Tensor, Tensor]:
    """query, key and value of as many tokens."""
    shapes = ((HQ, D), (HKV, D), (HKV, DV))
    query, key, value = (torch.randn(batch, heads, seqlen, width).to(dtype) for heads, width in shapes)
    return query, key, value


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def tables(positions: int, columns: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    angles = torch.arange(positions).double()[:, None] * 100.0 ** -(torch.arange(columns).double() / columns)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotated(x: Tensor, starts: list[int], cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Row s of sequence b of x (B, H, S, D) turned to position starts[b] + s, in float64."""
    x, cos, sin = x.double(), cos.double(), sin.double()
    result, half = x.clone(), cos.shape[1]
    for b, start in enumerate(starts):
        for s in range(x.shape[2]):
            for c in range(half):
                i, j = (2 * c, 2 * c + 1) if interleaved else (c, c + half)
                turn = torch.complex(cos[start + s, c], sin[start + s, c])
                pair = torch.complex(x[b, :, s, i], x[b, :, s, j]) * turn
                result[b, :, s, i], result[b, :, s, j] = pair.real, pair.imag
    return result


def assert_near(found: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(found.double(), exact, rtol=tolerance, atol=tolerance)


OPTIONS: dict[str, tuple[set[str], Callable[[], dict[str, Any]]]] = {
    "full": (set(), dict),
    "causal": ({"causal"}, lambda: {"causal": True}),
    "window": ({"window"}, lambda: {"window": (3, 1)}),
    "key_start": ({"key_start"}, lambda: {"key_start": torch.tensor([2, 1]), "causal": True}),
    "bool_mask": ({"bool_mask"}, lambda: {"attn_mask": torch.rand(B, 1, 1, CAPACITY) < 0.7}),
    "bias": ({"float_bias"}, lambda: {"attn_mask": torch.randn(HQ, 1, CAPACITY), "scale": -0.4}),
    "softcap": ({"softcap"}, lambda: {"softcap": 1.5}),
    "alibi_sinks": (
        {"alibi", "sinks"},
        lambda: {"alibi_slopes": torch.rand(B, HQ), "sinks": torch.randn(HQ), "causal": True},
    ),
}


def _appends() -> list[tuple[str, int, int, str, int | None]]:
    """Every option with more queries than new keys, other lengths once; the grid has the other options in pages."""
    options = [(option, 4, 2) for option in OPTIONS] + [("causal", *lengths) for lengths in ((1, 1), (3, 3), (2, 0))]
    return [(*o, *way) for way in ways() for o in options if way[1] is None or o[0] in ("causal", "key_start", "bias")]


@pytest.mark.parametrize(("option", "seqlen_q", "seqlen_new", "backend", "page_size"), _appends())
def test_appends_and_attends(
    option: str, seqlen_q: int, seqlen_new: int, backend: str, page_size: int | None, brute_force: BruteForce
) -> None:
    """Fails where a key lands in another row, anything else of the caches changes, a query stands elsewhere than at the
    end, or what lies past the end (NaN) is read."""
    features, make = OPTIONS[option]
    supported(backend, *features)
    cache = Cache([3, 9], page_size)
    before = cache.contents()
    query, _, _ = new_tokens(seqlen_q)
    _, key, value = new_tokens(seqlen_new)
    options = make()
    given = {"key": key, "value": value} if seqlen_new else {}
    out, lse = cache.attend(query, **given, **options, return_lse=True, backend=backend)
    for now, then, new in zip(cache.contents(), before, (key, value), strict=True):
        for b, length in enumerate(cache.lengths):
            then[b, :, length : length + seqlen_new] = new[b]
        assert same_bits(now, then)
    ends = torch.tensor(cache.lengths) + seqlen_new
    doubles = {n: t.double() if isinstance(t, Tensor) and t.is_floating_point() else t for n, t in options.items()}
    exact, exact_lse = brute_force(
        query.double(),
        *(t.double() for t in cache.contents()),
        query_start=ends - seqlen_q,
        key_lengths=ends,
        **doubles,
    )
    assert_near(out, exact, torch.float32)
    assert_near(lse, exact_lse, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("page_size", [None, 3])
def test_other_dtypes(dtype: torch.dtype, page_size: int | None, brute_force: BruteForce) -> None:
    """Fails where a dtype loses more than its own rounding, in rotation or attention, or the LSE has another dtype."""
    cos, sin = tables(CAPACITY, 3, dtype)
    for backend in (b for b, p in ways(dtype) if p == page_size):
        cache = Cache([3, 8], page_size, dtype)
        query, key, value = new_tokens(2, dtype)
        out, lse = cache.attend(
            query, key=key, value=value, rotary=(cos, sin), causal=True, return_lse=True, backend=backend
        )
        ends = torch.tensor(cache.lengths) + 2
        exact, exact_lse = brute_force(
            rotated(query, cache.lengths, cos, sin, False),
            *(t.double() for t in cache.contents()),
            query_start=ends - 2,
            key_lengths=ends,
            causal=True,
        )
        assert out.dtype == dtype
        assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert_near(out, exact, dtype)
        assert_near(lse, exact_lse, dtype)


@pytest.mark.parametrize(
    ("backend", "page_size", "interleaved", "columns"),
    [(*way, *pairs) for way in ways() for pairs in (((False, 1), (True, 4)) if way[1] else ((False, 4), (True, 2)))],
)
def test_rotary(interleaved: bool, columns: int, backend: str, page_size: int | None, brute_force: BruteForce) -> None:
    """Fails where columns are paired or turned wrongly, columns past R change, a position is off by one, the values or
    query itself are turned, or more queries than new keys get the new keys' positions."""
    cache = Cache([5, 2], page_size)
    _, key, value = new_tokens(2)
    query, _, _ = new_tokens(4)
    untouched = query.clone()
    cos, sin = tables(CAPACITY, columns)
    rotary = (cos, sin, interleaved) if interleaved else (cos, sin)
    out = cache.attend(query, key=key, value=value, rotary=rotary, causal=True, backend=backend)
    keys, values = cache.contents()
    turned = rotated(key, cache.lengths, cos, sin, interleaved)
    for b, length in enumerate(cache.lengths):
        torch.testing.assert_close(keys[b, :, length : length + 2].double(), turned[b], rtol=1e-6, atol=1e-6)
        assert same_bits(keys[b, :, length : length + 2, 2 * columns :], key[b, ..., 2 * columns :])
        assert same_bits(values[b, :, length : length + 2], value[b])
    assert same_bits(query, untouched)
    starts = [length - 2 for length in cache.lengths]
    exact, _ = brute_force(
        rotated(query, starts, cos, sin, interleaved),
        keys.double(),
        values.double(),
        query_start=torch.tensor(starts),
        key_lengths=torch.tensor(cache.lengths) + 2,
        causal=True,
    )
    assert_near(out, exact, torch.float32)


@every_way
def test_steps_equal_one_causal_call(backend: str, page_size: int | None) -> None:
    """A prompt, single tokens and a chunk, one call each, give what one causal call over all tokens gives: fails where
    a step loses, shifts or turns anything twice."""
    steps, interleaved = (3, 1, 2), page_size is None
    query, key, value = new_tokens(sum(steps))
    cos, sin = tables(CAPACITY, 4)
    starts = [0] * B
    exact = fastattn.attention(
        rotated(query, starts, cos, sin, interleaved),
        rotated(key, starts, cos, sin, interleaved),
        value.double(),
        causal=True,
    )
    cache, outs = Cache([0, 0], page_size), []
    for q, k, v in zip(*(t.split(steps, 2) for t in (query, key, value)), strict=True):
        outs.append(cache.attend(q, key=k, value=v, rotary=(cos, sin, interleaved), causal=True, backend=backend))
        cache.lengths = [length + q.shape[2] for length in cache.lengths]
    assert_near(torch.cat(outs, 2), exact, torch.float32)


@every_way
def test_strided_tensors(backend: str, page_size: int | None) -> None:
    """Fails where strides of caches in (B, S, H, D) memory, of slices of a wider buffer or of the tokens are misread,
    or the neighbours of a slice are written to."""
    query, key, value = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in new_tokens(2))
    plain = Cache([3, 9], page_size)
    strided = Cache([3, 9], page_size)
    strided.table = plain.table
    wide = torch.zeros(*plain.key.transpose(1, 2).shape[:3], 2 * D + DV)
    strided.key, strided.value = wide[..., D : 2 * D].transpose(1, 2), wide[..., 2 * D :].transpose(1, 2)
    strided.key.copy_(plain.key)
    strided.value.copy_(plain.value)
    rotary = tables(CAPACITY, 4)
    rotary = (rotary[0].mT.contiguous().mT, rotary[1])
    outs = [c.attend(query, key=key, value=value, rotary=rotary, backend=backend) for c in (plain, strided)]
    torch.testing.assert_close(*outs)
    assert same_bits(strided.key, plain.key)
    assert same_bits(strided.value, plain.value)
    assert not wide[..., :D].any()


@pytest.mark.parametrize("backend", [b for b, page_size in ways() if page_size])
def test_pages_that_no_key_uses(backend: str) -> None:
    """Fails where a table entry past the last key is followed (negative, past the last page, past int32), an int32
    table is read differently, or two sequences that share their first page see different keys in it."""
    cache = Cache([4, 3], 3)
    assert cache.table is not None
    cache.table[1, 0] = cache.table[0, 0]
    query, key, value = new_tokens(1)
    saved = cache.key.clone(), cache.value.clone()
    outs = []
    for table in (cache.table.clone(), cache.table.int()):
        cache.key, cache.value = (t.clone() for t in saved)
        outs.append(cache.attend(query, key=key, value=value, block_table=table, backend=backend))
    for unused in (-1, 10**6, -(2**40)):
        table = cache.table.clone()
        table[:, 2:] = unused
        cache.key, cache.value = (t.clone() for t in saved)
        outs.append(cache.attend(query, key=key, value=value, block_table=table, backend=backend))
    for out in outs[1:]:
        torch.testing.assert_close(out, outs[0], rtol=0.0, atol=0.0)
    keys, _ = cache.contents()
    assert same_bits(keys[0, :, :3], keys[1, :, :3])


@every_way
@pytest.mark.parametrize("empty", ["batch", "queries", "new keys"])
def test_empty(empty: str, backend: str, page_size: int | None) -> None:
    """Fails where an axis of size 0 crashes, or its neighbours are lost with it."""
    batch = 0 if empty == "batch" else B
    cache = Cache([3, 9][:batch], page_size)
    query, key, value = new_tokens(2, batch=batch)
    if empty == "queries":
        query = query[:, :, :0]
    if empty == "new keys":
        key, value = key[:, :, :0], value[:, :, :0]
    lengths = torch.tensor(cache.lengths, dtype=torch.int32)
    rotary = tables(CAPACITY, 4)
    out, lse = cache.attend(
        query, key=key, value=value, key_lengths=lengths, rotary=rotary, return_lse=True, backend=backend
    )
    assert (out.shape, lse.shape) == ((*query.shape[:3], DV), query.shape[:3])
    assert out.isfinite().all()
    keys, _ = cache.contents()
    for b, length in enumerate(cache.lengths):
        assert keys[b, :, length : length + key.shape[2]].isfinite().all()


@every_way
def test_a_full_cache_and_an_empty_one(backend: str, page_size: int | None) -> None:
    """The last row of the capacity is usable; a sequence without any key gives 0 and an LSE of -inf."""
    cache = Cache([0, CAPACITY - 1], page_size)
    query, key, value = new_tokens(1)
    assert cache.attend(query, key=key, value=value, backend=backend).isfinite().all()
    cache = Cache([0, CAPACITY], page_size)
    out, lse = cache.attend(query, return_lse=True, backend=backend)
    assert not out[0].any()
    assert (lse[0] == -math.inf).all()
    assert out[1].isfinite().all()


@pytest.mark.parametrize("paged", [False, True])
def test_rows_that_do_not_fit_are_not_written(paged: bool) -> None:
    """What devices do where values are not checked: fails where a row outside the cache is written, a row that fits is
    lost to one that does not, or anything else changes."""
    new = [torch.randn(2, 3, 1, 4)]  # (B, S_new, Hkv, width)
    page = torch.tensor([[0, 0, 0], [1, 1, 7 if paged else 1]])
    row = torch.tensor([[3, 4, 5], [-1, 4, 2]])
    cache = [torch.randn(2, 5, 1, 4)]  # (pages, rows, Hkv, width)
    fits = (page < 2) & (row >= 0) & (row < 5)
    expected = cache[0].clone()
    for b in range(2):
        for s in range(3):
            if fits[b, s]:
                expected[page[b, s], row[b, s]] = new[0][b, s]
    written, rows, values = append._only_those_that_fit(cache, page, row, new, fits)
    cache[0].index_put_((written, rows), values[0])
    assert same_bits(cache[0], expected)
    written, rows, values = append._only_those_that_fit(cache, page, row, new, torch.zeros_like(fits))
    cache[0].index_put_((written, rows), values[0])
    assert same_bits(cache[0], expected)


def zeros(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    return torch.zeros(shape, dtype=dtype, device=device)


def arguments(paged: bool, **changes: Any) -> dict[str, Any]:
    """A good call of two queries and new keys, with changes; pages of 4 rows, three to a sequence."""
    rows, pages = (4, 7) if paged else (CAPACITY, B)
    return {
        "query": zeros(B, HQ, 2, D),
        "key_cache": zeros(pages, HKV, rows, D),
        "value_cache": zeros(pages, HKV, rows, DV),
        "key": zeros(B, HKV, 2, D) + 1,
        "value": zeros(B, HKV, 2, DV) + 1,
        "key_lengths": torch.tensor([3, 9]),
        "block_table": torch.tensor([[0, 2, 1], [5, 3, 4]]) if paged else None,
    } | changes


_COS = zeros(CAPACITY, 2)
Bad = tuple[str, Any, type[Exception], tuple[str, ...]]
ANY: list[Bad] = [
    ("query", None, TypeError, ("NoneType", "Tensor")),
    ("query", zeros(B, HQ, D), ValueError, (f"({B}, {HQ}, {D})",)),
    ("query", zeros(B, HQ, 2, D, dtype=torch.int64), TypeError, ("int64", "bfloat16")),
    ("query", zeros(B, 3, 2, D), ValueError, ("3", "2", "multiple")),
    ("query", zeros(B, HQ, 2, D + 1), ValueError, (str(D + 1), str(D))),
    *(
        bad
        for name, width in (("key_cache", D), ("value_cache", DV))
        for bad in [
            (name, [1.0], TypeError, ("list", "Tensor")),
            (name, zeros(HKV, CAPACITY, width), ValueError, (f"({HKV}, {CAPACITY}, {width})",)),
            (name, zeros(B, HKV, 4, width, dtype=torch.float16), TypeError, ("float16", "float32", "never cast")),
            (name, zeros(B, HKV, 4, width, device="meta"), ValueError, ("meta", "cpu")),
            (name, zeros(B, HKV, 5, width), ValueError, (f"({B}, {HKV}, 5, {width})",)),
        ]
    ),
    *(
        bad
        for name, width in (("key", D), ("value", DV))
        for bad in [
            (name, None, ValueError, ("None",)),
            (name, 3, TypeError, ("int", "Tensor")),
            (name, zeros(HKV, 2, width), ValueError, (f"({HKV}, 2, {width})",)),
            (name, zeros(B, HKV, 2, width, dtype=torch.float64), TypeError, ("float64", "float32")),
            (name, zeros(B, HKV, 2, width, device="meta"), ValueError, ("meta", "cpu")),
            (name, zeros(B, HKV + 1, 2, width), ValueError, (f"({B}, {HKV + 1}, 2, {width})", f"({B}, {HKV}, 2,")),
            (name, zeros(B, HKV, 2, width + 1), ValueError, (str(width + 1), f"({B}, {HKV}, 2, {width})")),
            (name, zeros(B + 1, HKV, 2, width), ValueError, (f"({B + 1}, {HKV}, 2, {width})",)),
        ]
    ),
    ("value", zeros(B, HKV, 3, DV), ValueError, (f"({B}, {HKV}, 3, {DV})", f"({B}, {HKV}, 2, {DV})")),
    ("key_lengths", None, TypeError, ("NoneType", "Tensor")),
    ("key_lengths", 3, TypeError, ("int", "Tensor")),
    ("key_lengths", zeros(B), TypeError, ("float32", "int32", "int64")),
    ("key_lengths", torch.tensor([1, 2, 3]), ValueError, ("(3,)", f"({B},)")),
    ("key_lengths", torch.tensor([1, 2], device="meta"), ValueError, ("meta", "cpu")),
    ("key_lengths", torch.tensor([3, -1]), ValueError, ("[1]", "-1", "between 0 and 10")),
    ("key_lengths", torch.tensor([11, 0]), ValueError, ("[0]", "11", "between 0 and 10")),
    ("key_lengths", torch.tensor([0, 2**32]), ValueError, ("[1]", "between 0 and 10")),  # 0 in 32 bits
    ("rotary", _COS, TypeError, ("Tensor", "(cos, sin)")),
    ("rotary", (_COS,), TypeError, ("1 values", "(cos, sin)")),
    ("rotary", (_COS, None), TypeError, ("sin", "NoneType")),
    ("rotary", (_COS, _COS, 1), TypeError, ("interleaved", "int", "bool")),
    ("rotary", (_COS[0], _COS[0]), ValueError, ("cos", "(2,)")),
    ("rotary", (_COS.double(), _COS.double()), TypeError, ("float64", "float32")),
    ("rotary", (_COS, _COS.to("meta")), ValueError, ("sin", "meta", "cpu")),
    ("rotary", (_COS, _COS[:-1]), ValueError, (f"({CAPACITY}, 2)", f"({CAPACITY - 1}, 2)")),
    ("rotary", (zeros(12, 5), zeros(12, 5)), ValueError, ("(12, 5)", "1 to 4")),
    ("rotary", (zeros(12, 0), zeros(12, 0)), ValueError, ("(12, 0)", "1 to 4")),
    ("rotary", (_COS[:1], _COS[:1]), ValueError, ("at least 2", "(1, 2)")),
    ("rotary", (_COS[:8], _COS[:8]), ValueError, ("positions 0 to 7", "sequence 1", "9 to 10")),
    ("attn_mask", zeros(2, 11), ValueError, ("(2, 11)", f"({B}, {HQ}, 2, {CAPACITY})")),
    ("causal", 1, TypeError, ("int", "bool")),
    ("window", (1,), TypeError, ("(1,)", "left, right")),
    ("key_start", torch.tensor([1]), ValueError, ("(1,)", f"({B},)")),
    ("softcap", 0.0, ValueError, ("0.0", "positive")),
    ("alibi_slopes", zeros(HQ + 1), ValueError, (f"({HQ + 1},)", f"({HQ},)")),
    ("sinks", zeros(HKV), ValueError, (f"({HKV},)", f"({HQ},)")),
    ("scale", "1", TypeError, ("str", "number")),
    ("return_lse", 1, TypeError, ("int", "bool")),
    ("deterministic", 1, TypeError, ("int", "bool")),
    ("backend", "flash", ValueError, ("flash", "reference")),
]
CONTIGUOUS: list[Bad] = [
    ("query", zeros(3, HQ, 2, D), ValueError, ("3", "block_table")),
    ("key_cache", zeros(1, HKV, CAPACITY, D).expand(B, -1, -1, -1), ValueError, ("expanded", "written")),
    ("key", zeros(B, HKV, CAPACITY + 1, D), ValueError, (f"({B}, {HKV}, 2, {DV})",)),
]
PAGED: list[Bad] = [
    ("query", zeros(3, HQ, 2, D), ValueError, ("3",)),
    ("block_table", [[0, 1, 2]], TypeError, ("list", "Tensor")),
    ("block_table", zeros(B, 3), TypeError, ("float32", "int32", "int64")),
    ("block_table", torch.tensor([0, 1, 2]), ValueError, ("(3,)", "pages per sequence")),
    ("block_table", torch.tensor([[0, 1, 2]]), ValueError, ("(1, 3)", f"({B}, pages")),
    ("block_table", zeros(B, 3, dtype=torch.int32, device="meta"), ValueError, ("meta", "cpu")),
    ("block_table", torch.tensor([[0, -1, 1], [5, 3, 4]]), ValueError, ("[0, 1]", "-1", "0 to 6")),
    ("block_table", torch.tensor([[0, 2, 1], [5, 3, 7]]), ValueError, ("[1, 2]", "7", "0 to 6")),
    ("block_table", torch.tensor([[0, 2, 1], [2**32, 3, 4]]), ValueError, ("[1, 0]", "0 to 6")),  # 0 in 32 bits
]
EVERY = [(paged, bad) for paged in (False, True) for bad in ANY + (PAGED if paged else CONTIGUOUS)]


def _label(value: Any) -> str:
    if not isinstance(value, tuple):
        return "paged" if value else "contiguous"
    name, given = value[:2]
    shown = f"{given.dtype}{tuple(given.shape)}" if isinstance(given, Tensor) else type(given).__name__
    return f"{name}-{shown}".replace("torch.", "")


@pytest.mark.parametrize(("paged", "bad"), EVERY, ids=_label)
def test_bad_argument(paged: bool, bad: Bad) -> None:
    """Fails where a wrong argument is accepted, the message does not name it with given and expected, or the caches
    were written to before it was rejected."""
    name, value, exception, words = bad
    given = arguments(paged, **{name: value})
    with pytest.raises((TypeError, ValueError)) as caught:
        fastattn.attention_with_kvcache(**given)
    message = str(caught.value)
    assert type(caught.value) is exception, message
    for word in (name, *words):
        assert word in message, f"{word!r} is missing from {message!r}"
    for cache in (given["key_cache"], given["value_cache"]):
        assert not isinstance(cache, Tensor) or cache.device.type == "meta" or not cache.any()


def test_the_call_that_the_bad_ones_vary_is_good() -> None:
    """Fails where the errors above are those of another argument; and every argument is among them."""
    for paged in (False, True):
        fastattn.attention_with_kvcache(**arguments(paged, rotary=(_COS, _COS, True)))
    names = {bad[0] for _, bad in EVERY}
    assert names == set(inspect.signature(fastattn.attention_with_kvcache).parameters)


def test_errors_of_combinations() -> None:
    """Arguments that are good alone: rotary without key, more keys than the capacity, queries before position 0, pages
    of no rows."""
    call = fastattn.attention_with_kvcache
    with pytest.raises(ValueError, match="rotary must come with key"):
        call(**arguments(False, key=None, value=None, rotary=(_COS, _COS)))
    with pytest.raises(ValueError, match="capacity 12, got 13"):
        call(**arguments(False, key=zeros(B, HKV, 13, D), value=zeros(B, HKV, 13, DV)))
    with pytest.raises(ValueError, match=r"sequence 0 stand at -2 to 4"):
        call(**arguments(False, query=zeros(B, HQ, 7, D), rotary=(_COS, _COS)))
    with pytest.raises(ValueError, match="page_size of at least 1"):
        call(**arguments(True, key_cache=zeros(3, HKV, 0, D), value_cache=zeros(3, HKV, 0, DV)))
    with pytest.raises(ValueError, match=r"key_lengths\[0\] must be between 0 and .* 12, got 13"):
        call(**arguments(False, key=None, value=None, key_lengths=torch.tensor([13, 0])))


@pytest.mark.parametrize("name", ["query", "key_cache", "value_cache", "key", "value", "attn_mask", "sinks", "rotary"])
def test_gradients_are_refused(name: str) -> None:
    """Fails where a gradient that will never come is promised, or no_grad does not help."""
    given = arguments(
        False, attn_mask=zeros(CAPACITY), sinks=zeros(HQ), rotary=(_COS.clone(), _COS), backend="reference"
    )
    tensor = given[name][0] if name == "rotary" else given[name]
    tensor.requires_grad_()
    with pytest.raises(ValueError, match=f"{'cos' if name == 'rotary' else name} requires.*no_grad"):
        fastattn.attention_with_kvcache(**given)
    assert not given["key_cache"].any()
    with torch.no_grad():
        out = fastattn.attention_with_kvcache(**given)
    assert not out.requires_grad


@pytest.mark.parametrize("backend", verify.backends_on("cpu"))
def test_a_refused_call_writes_nothing(backend: str) -> None:
    """Fails where a backend runs what its table lacks, or refuses only after the append."""
    asked: dict[str, dict[str, Any]] = {"softcap": {"softcap": 1.0}, "sinks": {"sinks": zeros(HQ)}, "paged": {}}
    for feature, option in asked.items():
        if feature in TABLES[backend].features:
            continue
        given = arguments(feature == "paged", backend=backend, **option)
        with pytest.raises(fastattn.UnsupportedError, match=feature):
            fastattn.attention_with_kvcache(**given)
        assert not given["key_cache"].any()
        assert not given["value_cache"].any()


@pytest.mark.parametrize("transform", ["vmap", "jvp", "dual"])
def test_transforms_are_refused(transform: str) -> None:
    """Fails where a transform gets a result that ignores it."""
    given = arguments(False)
    call = partial(fastattn.attention_with_kvcache, **{n: t for n, t in given.items() if n != "query"})
    query = given["query"]

    def dual() -> None:
        with forward_ad.dual_level():
            call(forward_ad.make_dual(query, query))

    transformed = {
        "vmap": lambda: torch.vmap(call)(query[None]),
        "jvp": lambda: torch.func.jvp(call, (query,), (query,)),
        "dual": dual,
    }[transform]
    with pytest.raises(fastattn.UnsupportedError, match=r"torch\.func"):
        transformed()
    assert not given["key_cache"].any()


@reference_ways
def test_inference_mode(backend: str, page_size: int | None) -> None:
    """Fails where inference mode, with a cache made inside or outside of it, gets another result."""
    cache = Cache([3, 9], page_size)
    query, key, value = new_tokens(2)
    saved = cache.key.clone(), cache.value.clone()
    call = partial(cache.attend, query, key=key, value=value, rotary=tables(CAPACITY, 4), backend=backend)
    expected, filled = call(), cache.key
    cache.key, cache.value = saved
    with torch.inference_mode():
        inside = cache.key.clone(), cache.value.clone()
        assert same_bits(call(), expected)
        assert same_bits(cache.key, filled)
        cache.key, cache.value = inside
        assert same_bits(call(), expected)


@pytest.mark.parametrize("backend", [b for b, page_size in ways(torch.bfloat16) if page_size is None])
def test_autocast(backend: str) -> None:
    """Fails where query, key and value are not cast to autocast's dtype, or a cache of another dtype is accepted."""
    query, key, value = new_tokens(2)
    low = Cache([3, 9], None, torch.bfloat16)
    expected_cache = Cache([3, 9], None, torch.bfloat16)
    expected_cache.key, expected_cache.value = low.key.clone(), low.value.clone()
    lows = {"key": key.bfloat16(), "value": value.bfloat16()}
    expected = expected_cache.attend(query.bfloat16(), **lows, backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        assert same_bits(low.attend(query, key=key, value=value, backend=backend), expected)
        assert same_bits(low.key, expected_cache.key)
        ends = torch.tensor(low.lengths) + 2
        assert low.attend(query, key_lengths=ends, backend=backend).dtype == torch.bfloat16
        with pytest.raises(TypeError, match=r"key_cache must have query's dtype torch.bfloat16 .*float32"):
            Cache([3, 9], None).attend(query, key=key, value=value, backend=backend)


@pytest.mark.parametrize(
    ("backend", "page_size", "rotary"),
    [(*way, rotary) for way in ways() for rotary in (False, True) if way[0] == "reference" or rotary == bool(way[1])],
)
def test_opcheck(rotary: bool, backend: str, page_size: int | None) -> None:
    """Fails where the op writes what its schema does not declare, aliases an input, or fake and real disagree."""
    cache = Cache([3, 8], page_size)
    query, key, value = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in new_tokens(2))
    lengths = torch.tensor(cache.lengths, dtype=torch.int32)
    table = None if cache.table is None else cache.table.int()
    cos, sin = tables(CAPACITY, 3) if rotary else (None, None)
    args = (query, cache.key, cache.value, key, value, lengths, table, cos, sin, True, backend)
    torch.library.opcheck(torch.ops.fastattn.kvcache_append, args)


@reference_ways
def test_compile(backend: str, page_size: int | None) -> None:
    """Fails where tracing breaks the graph, the append of the compiled function is lost or lands elsewhere, other
    lengths compile again, or the bits differ from eager's."""
    torch._dynamo.reset()
    graphs = []

    def count(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    rotary = tables(CAPACITY, 4)

    def layer(cache: tuple[Tensor, Tensor], lengths: Tensor, table: Tensor | None, *new: Tensor) -> Any:
        query, key, value = new
        out, lse = fastattn.attention_with_kvcache(
            query * 2,
            *cache,
            key=key,
            value=value,
            key_lengths=lengths,
            block_table=table,
            rotary=rotary,
            causal=True,
            return_lse=True,
            backend=backend,
        )
        return out + 1, lse, cache[0].isnan().sum()

    compiled = torch.compile(layer, fullgraph=True, backend=count)
    for lengths in ([3, 8], [0, 5]):
        cache = Cache(lengths, page_size)
        new = new_tokens(2)
        eager_cache, compiled_cache = ((cache.key.clone(), cache.value.clone()) for _ in range(2))
        expected = layer(eager_cache, torch.tensor(lengths), cache.table, *new)
        found = compiled(compiled_cache, torch.tensor(lengths), cache.table, *new)
        torch.testing.assert_close(found, expected, rtol=0.0, atol=0.0)
        assert all(same_bits(a, b) for a, b in zip(compiled_cache, eager_cache, strict=True))
    assert len(graphs) == 1


@pytest.mark.parametrize("bad", [-1, 192, 2**31 - 1])
def test_large_tables(bad: int) -> None:
    """Fails if an entry of a large table that no key uses counts, or one that a key uses does not."""
    lengths = torch.tensor([5, 192, 70])
    table = torch.randperm(192).repeat(3, 1).int()
    for b, length in enumerate(lengths.tolist()):
        table[b, length:] = bad
    query, cache = torch.randn(3, 2, 1, 8), torch.randn(192, 2, 1, 8)
    fastattn.attention_with_kvcache(query, cache, cache, key_lengths=lengths, block_table=table)
    table[2, 69] = bad
    with pytest.raises(ValueError, match=rf"block_table\[2, 69\] must be a page from 0 to 191, got {bad}"):
        fastattn.attention_with_kvcache(query, cache, cache, key_lengths=lengths, block_table=table)
