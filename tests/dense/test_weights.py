"""The attention weights that are made from the log-sum-exp, block of rows by block of rows.

Fails where a block is put together wrongly (positions, masks, the keys that a causal block leaves out), or where
gradients of the weights, or gradients of those, are not the reference's.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastattn.dense import api, reference, weights
from fastattn.dense.op import attention_op

BATCH, HEADS, LENGTH_Q, LENGTH_K = 2, 2, 7, 11
OPTIONS: dict[str, dict[str, Any]] = {
    "full": {},
    "causal": {"causal": True},
    "top-left": {"causal": True, "query_start": 0},
    "starts": {"causal": True, "query_start": torch.tensor([0, 3])},
    "window": {"window": (2, 1)},
    "lengths": {"key_lengths": torch.tensor([0, 8])},
    "bias": {"attn_mask": torch.randn(BATCH, 1, LENGTH_Q, LENGTH_K, dtype=torch.float64)},
    "row mask": {"attn_mask": torch.rand(1, HEADS, LENGTH_Q, 1) > 0.3, "causal": True},
    "key mask": {"attn_mask": torch.rand(BATCH, 1, 1, LENGTH_K) > 0.3, "causal": True},
    "dropout": {"dropout_p": 0.4},
}


def _problem(options: dict[str, Any], requires_grad: bool = False):
    tensors = [
        torch.randn(BATCH, heads, length, 4, dtype=torch.float64, requires_grad=requires_grad)
        for heads, length in ((HEADS, LENGTH_Q), (1, LENGTH_K), (1, LENGTH_K))
    ]
    return api.normalise(*tensors, (BATCH, HEADS, LENGTH_Q, LENGTH_K), **options)


@pytest.mark.parametrize("average", [False, True], ids=["per-head", "averaged"])
@pytest.mark.parametrize("name", OPTIONS)
def test_blocks_make_the_whole(name: str, average: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = _problem(OPTIONS[name])
    _, lse = attention_op(problem)
    expected = reference.attention_weights(problem, lse)
    for rows in (1, 3, LENGTH_Q):
        monkeypatch.setitem(weights.BLOCK, "cpu", rows * BATCH * HEADS * LENGTH_K)
        found = weights.attention_weights(problem, lse, average)
        torch.testing.assert_close(found, expected.mean(dim=1) if average else expected, atol=1e-12, rtol=0)


def test_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the weights alone, and once more: through query, key and the log-sum-exp."""
    monkeypatch.setitem(weights.BLOCK, "cpu", 1)
    bias = torch.randn(1, 1, 3, 4, dtype=torch.float64, requires_grad=True)

    def averaged(query: torch.Tensor, key: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        problem = api.normalise(query, key, key, (1, 2, 3, 4), attn_mask=bias, causal=True)
        return weights.attention_weights(problem, attention_op(problem)[1], True)

    query, key = (torch.randn(1, 2, n, 2, dtype=torch.float64, requires_grad=True) for n in (3, 4))
    assert torch.autograd.gradcheck(averaged, (query, key, bias))
    assert torch.autograd.gradgradcheck(averaged, (query, key, bias))
