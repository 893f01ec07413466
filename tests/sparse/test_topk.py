"""`topk_block_mask` against its definition, block by block; each test says what makes it fail."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import fastattn
from fastattn.sparse import causal as causal_mask
from fastattn.sparse import topk_block_mask

F64 = torch.float64


def expected_mask(query: Tensor, key: Tensor, k: int, size: int, causal: bool) -> Tensor:
    """(B, Hq, S, S) bool, by loops over query blocks."""
    batch, heads, length = query.shape[:3]
    shared = heads // key.shape[1]
    mask = torch.zeros(batch, heads, length, length, dtype=torch.bool)
    starts = range(0, length, size)
    for b in range(batch):
        for h in range(heads):
            means = [key[b, h // shared, j : j + size].double().mean(0) for j in starts]
            for row, i in enumerate(starts):
                mean = query[b, h, i : i + size].double().mean(0)
                others = [c for c in range(len(starts)) if (c < row if causal else c != row)]
                others.sort(key=lambda c: -float(mean @ means[c]))
                for column in [row, *others[: k - 1]]:
                    mask[b, h, i : i + size, column * size : (column + 1) * size] = True
    return mask.tril() if causal else mask


@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("causal", [False, True])
def test_definition(causal: bool, dtype: torch.dtype) -> None:
    """Fails where another block is chosen, a key head serves the wrong query heads, the last block's mean counts
    tokens that are not there, sums are rounded to 16 bits, or a later key is seen."""
    for _ in range(6):
        size, length, key_heads = random.choice([16, 32]), random.randint(1, 250), random.randint(1, 2)
        query = torch.randn(2, length, key_heads * random.randint(1, 3), 8, dtype=dtype).transpose(1, 2)
        key = torch.randn(2, length, key_heads, 8, dtype=dtype).transpose(1, 2)
        k = random.choice([1, 2, 3, 5, 40])
        mask = topk_block_mask(query, key, k=k, block_size=size, causal=causal)
        assert mask.shape == (2, query.shape[1], length, length)
        assert torch.equal(mask.to_dense(), expected_mask(query, key, k, size, causal))


def test_all_blocks() -> None:
    """Fails where a k of as many blocks as there are does not keep all of them, or blocks are not full."""
    query, key = torch.randn(2, 1, 3, 100, 8)
    assert topk_block_mask(query, key, k=7, block_size=16, causal=False).to_dense().all()
    made, whole = topk_block_mask(query, key, k=7, block_size=16), causal_mask(100, block_size=16)
    assert torch.equal(made.to_dense(), whole.to_dense().expand(1, 3, 100, 100))
    assert len(made.lists.row_blocks) == 3 * len(whole.lists.row_blocks)
    assert made.lists.tiles.shape == whole.lists.tiles.shape


def test_attention_with_it() -> None:
    """Fails where `attention` does not take the mask for grouped-query heads, or the choice has a gradient."""
    query = torch.randn(2, 4, 90, 8, dtype=F64, requires_grad=True)
    key, value = torch.randn(2, 2, 2, 90, 8, dtype=F64).requires_grad_().unbind(0)
    mask = topk_block_mask(query, key, k=2, block_size=16)
    found = fastattn.attention(query, key, value, attn_mask=mask)
    scores = query @ key.repeat_interleave(2, 1).mT / 8**0.5
    allowed = expected_mask(query.detach(), key.detach(), 2, 16, True)
    expected = scores.masked_fill(~allowed, -torch.inf).softmax(-1) @ value.repeat_interleave(2, 1)
    assert_close(found, expected, rtol=1e-10, atol=1e-12)
    weight = torch.randn_like(expected)
    ours, theirs = (torch.autograd.grad(out, (query, key), weight, retain_graph=True) for out in (found, expected))
    assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


def test_short_sequences() -> None:
    """Fails where a mask of no token, or of one, cannot be made."""
    for length in (0, 1):
        query = torch.randn(2, 2, length, 4)
        mask = topk_block_mask(query, query[:, :1], k=3)
        assert torch.equal(mask.to_dense(), torch.ones(2, 2, length, length, dtype=torch.bool))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"k": 0}, ValueError, "k must be at least 1, got 0"),
        ({"k": 2.0}, TypeError, "k must be an int, got float"),
        ({"block_size": 48}, ValueError, "block_size must be of 16, 32, 64, 128, 256, got 48"),
        ({"block_size": (16, 32)}, ValueError, r"block_size must be square, got \(16, 32\)"),
        ({"causal": 1}, TypeError, "causal must be a bool, got int"),
        ({"key": torch.randn(1, 2, 30, 4)}, ValueError, "query and key must be of one length, got 20 and 30"),
        ({"key": torch.randn(1, 2, 20, 5)}, ValueError, "key must have query's head_dim 4, got 5"),
        ({"key": torch.randn(1, 3, 20, 4)}, ValueError, "query's heads must be a multiple of key's heads"),
        ({"key": torch.randn(20, 4)}, ValueError, r"key must have shape .*, got \(20, 4\)"),
    ],
)
def test_errors(options: dict[str, Any], error: type[Exception], message: str) -> None:
    """Fails where a bad argument is accepted, or the message does not say what it was."""
    query = torch.randn(1, 2, 20, 4)
    with pytest.raises(error, match=message):
        topk_block_mask(query, **{"key": query, "k": 2, **options})
