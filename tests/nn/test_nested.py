"""`fastattn.nn.MultiheadAttention` on nested inputs, which torch's encoder hands to its layers at inference.

A test here fails if packed sequences mix, shift or lose their gradients, or if a nested input that cannot be packed is
computed with.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from fastattn.nn import MultiheadAttention

EMBED, HEADS = 12, 3
EXACT = {"rtol": 1e-10, "atol": 1e-12}
pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")


@pytest.mark.parametrize("need_weights", [True, False])
def test_nested_inputs(need_weights: bool, twins) -> None:
    """Nested query and key/value equal torch sequence by sequence, gradients too; fails if sequences mix or shift."""
    theirs, ours = twins(EMBED, HEADS, batch_first=True)
    lengths_q, lengths_k = [3, 0, 5], [4, 2, 7]
    queries, keys = (
        [torch.randn(n, EMBED, dtype=torch.float64) for n in lengths] for lengths in (lengths_q, lengths_k)
    )
    nested = [torch.nested.as_nested_tensor(t) for t in (queries, keys)]
    out, weights = ours(nested[0], nested[1], nested[1], need_weights=need_weights)
    expected = [theirs(q, k, k) for q, k in zip(queries, keys, strict=True)]
    assert (weights is None) == (not need_weights)
    for b, (a, (expected_out, expected_weights)) in enumerate(zip(out.unbind(), expected, strict=True)):
        assert_close(a, expected_out, **EXACT)
        if weights is not None:
            assert weights.shape == (3, 5, 7)
            assert_close(weights[b, : lengths_q[b], : lengths_k[b]], expected_weights, **EXACT)
            assert weights[b].count_nonzero() == expected_weights.numel()
    sum(part.square().sum() for part in out.unbind()).backward()
    sum(e.square().sum() for e, _ in expected).backward()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert_close(a.grad, b.grad, **EXACT)


def test_nested_dropout_matches_its_weights(twins) -> None:
    """Fails if a nested call's weights drop other elements than its output, in any of its sequences."""
    _, layer = twins(EMBED, HEADS, batch_first=True, dropout=0.5)
    sequences = [torch.randn(n, EMBED, dtype=torch.float64) for n in (6, 9)]
    nested = torch.nested.as_nested_tensor(sequences)
    out, weights = layer(nested, nested, nested, average_attn_weights=False, is_causal=True)
    for x, found, dropped in zip(sequences, out.unbind(), weights, strict=True):
        value = nn.functional.linear(x, layer.in_proj_weight[2 * EMBED :], layer.in_proj_bias[2 * EMBED :])
        value = value.unflatten(-1, (HEADS, -1)).transpose(0, 1)
        probabilities = dropped[:, : len(x), : len(x)]
        assert (probabilities.triu(1) == 0).all()
        assert_close(found, layer.out_proj((probabilities @ value).transpose(0, 1).flatten(1)), **EXACT)


def test_bad_nested_inputs() -> None:
    """Fails if nested inputs that cannot be packed are accepted or the message does not say why not."""
    layer = MultiheadAttention(EMBED, HEADS, batch_first=True)
    dense = torch.zeros(2, 3, EMBED)
    nested = torch.nested.as_nested_tensor([torch.zeros(n, EMBED) for n in (3, 1)])
    longer = torch.nested.as_nested_tensor([torch.zeros(n, EMBED) for n in (3, 2)])
    jagged = torch.nested.as_nested_tensor([torch.zeros(n, EMBED) for n in (3, 1)], layout=torch.jagged)
    with pytest.raises(TypeError, match="got key dense"):
        layer(nested, dense, dense)
    with pytest.raises(TypeError, match=r"got query nested, torch\.jagged"):
        layer(jagged, jagged, jagged)
    with pytest.raises(ValueError, match=r"\[3, 1\] for key, \[3, 2\] for value"):
        layer(nested, nested, longer)
    with pytest.raises(ValueError, match="carry their lengths"):
        layer(nested, nested, nested, attn_mask=torch.zeros(3, 3))
    with pytest.raises(ValueError, match="need batch_first"):
        MultiheadAttention(EMBED, HEADS)(nested, nested, nested)
    with pytest.raises(ValueError, match="add_zero_attn"):
        MultiheadAttention(EMBED, HEADS, batch_first=True, add_zero_attn=True)(nested, nested, nested)
