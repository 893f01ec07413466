"""`attention_weights` of chosen rows and heads, against probabilities computed element by element in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import fastattn
from fastattn.bench.memory import AllocationMeter
from fastattn.dense import weights as blockwise
from fastattn.dense.probabilities import attention_weights
from fastattn.errors import UnsupportedError

BATCH, HEADS, KV_HEADS, LENGTH_Q, LENGTH_K, WIDTH = 2, 4, 2, 7, 11, 5
SHAPE = (BATCH, HEADS, LENGTH_Q, LENGTH_K)
ROWS = [5, 0, 1, 2, -1, 2, 6]  # unordered, repeated, negative, with runs
OPTIONS = (
    *("full", "causal", "top-left", "starts", "window", "open window", "key limits", "no keys", "bool", "row mask"),
    *("bias", "softcap", "alibi", "alibi per sequence", "sinks", "scale", "all"),
)


def _options(name: str) -> dict[str, Any]:
    """Random values of one option, or of nearly all; drawn in the test, from its seed."""
    float64 = {"dtype": torch.float64}
    every: dict[str, dict[str, Any]] = {
        "full": {},
        "causal": {"causal": True},
        "top-left": {"causal": True, "query_start": 0},
        "starts": {"causal": True, "query_start": torch.tensor([-2, 3])},
        "window": {"window": (2, 1)},
        "open window": {"window": (None, 2), "query_start": 1},
        "key limits": {"key_start": torch.tensor([3, 0]), "key_lengths": torch.tensor([9, 4]), "window": (4, None)},
        "no keys": {"key_lengths": torch.tensor([0, 2]), "window": (1, 0), "sinks": torch.randn(HEADS, **float64)},
        "bool": {"attn_mask": torch.rand(BATCH, 1, LENGTH_Q, LENGTH_K) > 0.4},
        "row mask": {"attn_mask": torch.rand(1, HEADS, LENGTH_Q, 1) > 0.4, "causal": True},
        "bias": {"attn_mask": torch.randn(HEADS, LENGTH_Q, LENGTH_K, **float64), "window": (3, None)},
        "softcap": {"softcap": 0.7},
        "alibi": {"alibi_slopes": torch.rand(HEADS), "window": (5, 2)},
        "alibi per sequence": {"alibi_slopes": torch.rand(BATCH, HEADS), "query_start": torch.tensor([1, 8])},
        "sinks": {"sinks": torch.randn(HEADS), "causal": True},
        "scale": {"scale": -1.3},
    }
    if name != "all":
        return every[name]
    together = ("starts", "key limits", "bias", "softcap", "alibi per sequence", "sinks", "scale")
    return {option: value for part in together for option, value in every[part].items()}


def _qk(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    sizes = ((HEADS, LENGTH_Q), (KV_HEADS, LENGTH_K))
    query, key = (torch.randn(BATCH, heads, length, WIDTH, dtype=dtype) for heads, length in sizes)
    return query, key


def _naive(query: Tensor, key: Tensor, **options: Any) -> Tensor:
    """(B, Hq, Sq, Sk) float64, one element at a time, from the contract of `attention`."""
    (batch, heads, length_q, width), (kv_heads, length_k) = query.shape, key.shape[1:3]
    products = query.double() @ torch.stack([key[:, h * kv_heads // heads] for h in range(heads)], dim=1).double().mT
    mask, slopes, sinks = (options.get(name) for name in ("attn_mask", "alibi_slopes", "sinks"))
    mask = None if mask is None else mask.expand(batch, heads, length_q, length_k)
    slopes = None if slopes is None else slopes.double().expand(batch, heads)
    left, right = options.get("window") or (None, None)
    right = 0 if options.get("causal") else right
    starts = options.get("query_start")
    starts = length_k - length_q if starts is None else starts
    weights = torch.zeros(batch, heads, length_q, length_k, dtype=torch.float64)
    for b in range(batch):
        start = int(starts[b]) if isinstance(starts, Tensor) else starts
        first = int(options["key_start"][b]) if "key_start" in options else 0
        last = int(options["key_lengths"][b]) if "key_lengths" in options else length_k
        for h in range(heads):
            for i in range(length_q):
                p, scores = i + start, {}
                for j in range(first, last):
                    if (left is not None and j < p - left) or (right is not None and j > p + right):
                        continue
                    score = float(products[b, h, i, j]) * options.get("scale", 1 / math.sqrt(width))
                    if "softcap" in options:
                        score = options["softcap"] * math.tanh(score / options["softcap"])
                    if slopes is not None:
                        score -= float(slopes[b, h]) * abs(p - j)
                    if mask is not None and mask.dtype != torch.bool:
                        score += float(mask[b, h, i, j])
                    if mask is None or mask.dtype != torch.bool or mask[b, h, i, j]:
                        scores[j] = score
                total = sum(map(math.exp, scores.values()))
                total += 0.0 if sinks is None else math.exp(float(sinks[h]))
                for j, score in scores.items():
                    weights[b, h, i, j] = math.exp(score) / total
    return weights


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a chosen row or head loses its position, mask, slope, sink or key head, in blocks of any size; or if
    the given LSE is read at other rows than the chosen."""
    (query, key), options = _qk(), _options(name)
    expected = _naive(query, key, **options)
    heads = [3, 0, 1, -1]
    chosen = expected[:, heads][:, :, ROWS]
    _, lse = fastattn.attention(query, key, key, return_lse=True, **options)
    for block in (1, 16, 1 << 20):  # one row of one head at a time, some, all
        monkeypatch.setitem(blockwise.BLOCK, "cpu", block * BATCH * LENGTH_K)
        assert_close(attention_weights(query, key, **options), expected, atol=1e-12, rtol=0)
        for given in (None, lse):
            for average, truth in ((None, chosen), ("heads", chosen.mean(dim=1)), ("rows", chosen.mean(dim=2))):
                found = attention_weights(query, key, rows=ROWS, heads=heads, average=average, lse=given, **options)
                assert_close(found, truth, atol=1e-12, rtol=0)


@pytest.mark.parametrize(
    ("choice", "places"),
    [
        (slice(-2, None), [5, 6]),
        (slice(5, 0, -2), [5, 3, 1]),
        ((3,), [3]),
        (range(1, 4), [1, 2, 3]),
        ([], []),
        (torch.tensor([4, 4, -7]), [4, 4, 0]),
        (torch.tensor([1], dtype=torch.int32), [1]),
    ],
    ids=str,
)
def test_ways_to_choose(choice: Any, places: list[int]) -> None:
    """Fails if a kind of index names other rows than it does for a list; an empty one gives an empty axis."""
    query, key = _qk()
    expected = attention_weights(query, key, causal=True)[:, :, places]
    assert_close(attention_weights(query, key, rows=choice, causal=True), expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_other_dtypes(dtype: torch.dtype) -> None:
    """Fails if a product or a mean is rounded on the way: the result is float64's, rounded once."""
    query, key = _qk(dtype)
    expected = _naive(query, key, causal=True)
    for average, axis in ((None, None), ("heads", 1), ("rows", 2)):
        found = attention_weights(query, key, causal=True, average=average)
        assert found.dtype == dtype
        truth = expected if axis is None else expected.mean(dim=axis)
        # One rounding to nearest is half an epsilon; float32 has the rounding of its exponentials besides.
        bound = 8 if dtype == torch.float32 else 0.51
        assert_close(found.double(), truth, atol=1e-7, rtol=bound * torch.finfo(dtype).eps)


def test_autocast_casts_as_attention_does() -> None:
    """Fails if the weights under autocast are those of other inputs, or the products inside are cast down again."""
    query, key = _qk(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = attention_weights(query, key)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, attention_weights(query.bfloat16(), key.bfloat16()))


def test_keys_that_do_not_exist_are_not_read() -> None:
    """Fails if NaN outside the key interval reaches a weight."""
    query, key = _qk()
    key[:, :, 8:] = float("nan")
    lengths = torch.tensor([8, 5])
    found = attention_weights(query, key, key_lengths=lengths, average="rows")
    assert_close(found, _naive(query, key, key_lengths=lengths).mean(dim=2), atol=1e-12, rtol=0)


def test_lse_of_more_keys() -> None:
    """Fails if a given LSE is not the denominator: the weights of two halves of the keys are those of all."""
    query, key = _qk()
    _, lse = fastattn.attention(query, key, key, return_lse=True)
    halves = [attention_weights(query, part, lse=lse) for part in (key[:, :, :6], key[:, :, 6:])]
    assert_close(torch.cat(halves, dim=3), _naive(query, key), atol=1e-12, rtol=0)


@pytest.mark.parametrize("length_q", [0, 3])
def test_no_keys_or_no_rows(length_q: int) -> None:
    """Fails if an empty axis raises, or averages over nothing are NaN."""
    query, key = torch.randn(1, 2, length_q, 4), torch.randn(1, 2, 0, 4)
    assert attention_weights(query, key).shape == (1, 2, length_q, 0)
    key = torch.randn(1, 2, 5, 4)
    received = attention_weights(query[:, :, :0], key, average="rows")
    assert torch.equal(received, torch.zeros(1, 2, 5))


def test_result_carries_no_gradient() -> None:
    """Fails if a graph of the blocks is kept alive."""
    query, key = (t.requires_grad_() for t in _qk())
    assert not attention_weights(query, key).requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_is_the_result_and_a_block(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if the score matrix of all rows or all heads is made, or all keys are copied for each query head."""
    monkeypatch.setitem(blockwise.BLOCK, "cpu", 1 << 16)
    query = torch.randn(1, 8, 1024, 32, dtype=dtype)
    key = torch.randn(1, 2, 1024, 32, dtype=dtype)
    rows = slice(100, 900, 100)
    # The scores of a block, their masked copy, and what is smaller: two times four bytes, and as much again.
    budget = 4 * 4 * blockwise.BLOCK["cpu"]
    choices = (({"rows": rows}, None), ({"rows": rows}, "heads"), ({"heads": [5]}, "rows"), ({"heads": [5]}, None))
    for options, average in choices:
        with AllocationMeter(torch.device("cpu")) as memory:
            result = attention_weights(query, key, causal=True, average=average, **options)
        own = result.numel() * result.element_size()
        assert 0 < memory.peak < own + budget, (average, memory.peak / 2**20, own / 2**20)
        assert memory.live < own + 2**16


def test_a_row_of_a_long_context_is_cheap() -> None:
    """Fails if one row costs what all rows do: memory far above the block would show it."""
    query, key = torch.randn(1, 4, 16384, 16), torch.randn(1, 1, 16384, 16)
    with AllocationMeter(torch.device("cpu")) as memory:
        row = attention_weights(query, key, rows=[-1], causal=True)
    assert memory.peak < 2**24
    expected = torch.softmax(query[:, :, -1:].double() @ key.double().mT / 4, dim=-1)
    assert_close(row.double(), expected, atol=1e-7, rtol=1e-5)


WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "row range": ({"rows": [0, 7]}, ValueError, "rows must be between -7 and 6, got 7"),
    "negative range": ({"heads": [-5]}, ValueError, "heads must be between -4 and 3, got -5"),
    "one int": ({"rows": 3}, TypeError, "rows must be a slice, a sequence of ints or a 1-D integer tensor, got int"),
    "floats": ({"rows": [1.0]}, TypeError, "rows must be a slice"),
    "bools": ({"rows": [True]}, TypeError, "rows must be a slice"),
    "bool tensor": ({"heads": torch.ones(4, dtype=torch.bool)}, TypeError, r"heads must .* got torch.bool \(4,\)"),
    "2-D tensor": ({"heads": torch.zeros(1, 1, dtype=torch.int64)}, TypeError, r"got torch.int64 \(1, 1\)"),
    "text": ({"rows": "12"}, TypeError, "rows must be a slice"),
    "average": ({"average": "keys"}, ValueError, "average must be None, 'heads' or 'rows', got 'keys'"),
    "average bool": ({"average": True}, ValueError, "average must be None"),
    "lse shape": ({"lse": torch.zeros(2, 4, 6, dtype=torch.float64)}, ValueError, r"lse must have shape \(2, 4, 7\)"),
    "lse dtype": ({"lse": torch.zeros(2, 4, 7)}, TypeError, "lse must be torch.float64, got torch.float32"),
    "lse type": ({"lse": 1.0}, TypeError, "lse must be a torch.Tensor"),
    "lengths": ({"key_lengths": torch.tensor([0, 12])}, ValueError, "key_lengths"),
    "window": ({"window": 3}, TypeError, "window must be a pair"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments(name: str) -> None:
    """Fails if a wrong argument is ignored, or the message does not name it."""
    options, error, message = WRONG[name]
    query, key = _qk()
    with pytest.raises(error, match=f"^fastattn: .*{message}"):
        attention_weights(query, key, **options)


def test_transforms_are_refused() -> None:
    """Fails if a torch.func transform gets an error of torch's, or a wrong result."""
    query, key = _qk()
    with pytest.raises(UnsupportedError, match=r"attention_weights does not support torch\.func"):
        torch.func.vmap(lambda q: attention_weights(q[None], key[:1]))(query)
