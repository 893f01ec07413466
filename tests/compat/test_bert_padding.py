"""`bert_padding`: what comes out of `unpad_input` for masks of any shape, the way back, and gradients."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from fastattn.compat.flash_attn.bert_padding import (
    index_first_axis,
    index_put_first_axis,
    pad_input,
    unpad_input,
    unpad_input_for_concatenated_sequences,
)

MASKS = {
    "right": [[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1]],
    "left": [[0, 0, 1, 1], [1, 1, 1, 1], [0, 1, 1, 1]],
    "between": [[1, 0, 1, 0], [0, 1, 0, 0], [1, 1, 0, 1]],
    "empty row": [[0, 0, 0, 0], [1, 1, 0, 0], [1, 0, 0, 0]],
}


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.int64])
@pytest.mark.parametrize("rest", [(5,), (3, 2, 5)])
@pytest.mark.parametrize("name", MASKS)
def test_round_trip(name: str, rest: tuple[int, ...], dtype: torch.dtype) -> None:
    """Against indexing by the mask; fails if a token is lost, misplaced or given another's gradient, if the padding is
    not zero, or if one of the five values has another meaning or type."""
    mask = torch.tensor(MASKS[name], dtype=dtype)
    hidden = torch.randn(3, 4, *rest, requires_grad=True)
    packed, indices, cu_seqlens, longest, seqused = unpad_input(hidden, mask)
    lengths = [sum(row) for row in MASKS[name]]
    assert torch.equal(packed, hidden[mask.bool()])
    assert torch.equal(indices, mask.bool().flatten().nonzero().flatten())
    assert cu_seqlens.dtype == seqused.dtype == torch.int32
    assert cu_seqlens.tolist() == [0, lengths[0], sum(lengths[:2]), sum(lengths)]
    assert type(longest) is int
    assert longest == max(lengths)
    assert seqused.tolist() == lengths

    padded = pad_input(packed, indices, 3, 4)
    kept = mask.bool().view(3, 4, *(1 for _ in rest))
    assert torch.equal(padded, hidden * kept)
    weight = torch.randn_like(padded)
    (grad,) = torch.autograd.grad(padded, hidden, weight)
    assert torch.equal(grad, weight * kept)


def test_unused_tokens_are_packed_but_do_not_count() -> None:
    """Fails if the tokens of unused_mask are left out, or counted in seqused."""
    mask = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0]])
    unused = torch.tensor([[0, 0, 1, 0], [0, 0, 0, 1]])
    hidden = torch.randn(2, 4, 3)
    packed, indices, cu_seqlens, longest, seqused = unpad_input(hidden, mask, unused)
    assert torch.equal(packed, hidden[(mask + unused).bool()])
    assert indices.tolist() == [0, 1, 2, 4, 7]
    assert cu_seqlens.tolist() == [0, 3, 5]
    assert longest == 3
    assert seqused.tolist() == [2, 1]
    assert torch.equal(unpad_input(hidden, mask.bool(), unused.bool())[0], packed)


def test_concatenated_sequences() -> None:
    """flash-attn's own example; fails if the sequences of a row are merged, or its padding packed."""
    lengths = torch.tensor([[2, 3, 0, 0, 0, 0], [3, 2, 0, 0, 0, 0], [6, 0, 0, 0, 0, 0]])
    hidden = torch.randn(3, 6, 4, requires_grad=True)
    packed, indices, cu_seqlens, longest = unpad_input_for_concatenated_sequences(hidden, lengths)
    assert torch.equal(packed, torch.cat((hidden[0, :5], hidden[1, :5], hidden[2])))
    assert cu_seqlens.dtype == torch.int32
    assert cu_seqlens.tolist() == [0, 2, 5, 8, 10, 16]
    assert longest == 6
    padded = pad_input(packed, indices, 3, 6)
    assert padded[0, 5].eq(0).all()
    (grad,) = torch.autograd.grad(padded.sum(), hidden)
    assert grad[..., 0].tolist() == [[1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1]]


def test_nothing_but_padding() -> None:
    """Fails if a batch without a token raises."""
    hidden, mask = torch.randn(2, 3, 4), torch.zeros(2, 3, dtype=torch.int64)
    packed, indices, cu_seqlens, longest, seqused = unpad_input(hidden, mask)
    assert (packed.shape, cu_seqlens.tolist(), longest, seqused.tolist()) == ((0, 4), [0, 0, 0], 0, [0, 0])
    assert torch.equal(pad_input(packed, indices, 2, 3), torch.zeros(2, 3, 4))
    packed, _, cu_seqlens, longest = unpad_input_for_concatenated_sequences(hidden, mask)
    assert (packed.shape, cu_seqlens.tolist(), longest) == ((0, 4), [0], 0)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_index_functions(dtype: torch.dtype) -> None:
    """Fails if rows are taken or put wrongly, or the gradients of a row taken twice do not add up."""
    x = torch.randn(5, 2, 3, dtype=torch.float64, requires_grad=True)
    indices = torch.tensor([3, 0, 3], dtype=dtype)
    taken = index_first_axis(x, indices)
    assert torch.equal(taken, x[indices.long()])
    (grad,) = torch.autograd.grad(taken.sum(), x)
    assert grad[:, 0, 0].tolist() == [1, 0, 0, 2, 0]

    places = torch.tensor([4, 1], dtype=dtype)
    put = index_put_first_axis(x[:2], places, 6)
    assert torch.equal(put[places.long()], x[:2])
    assert put[[0, 2, 3, 5]].eq(0).all()
    weight = torch.randn_like(put)
    (grad,) = torch.autograd.grad(put, x, weight)
    assert_close(grad[:2], weight[places.long()])


@pytest.mark.parametrize(
    ("mask", "error", "match"),
    [
        (torch.ones(2, 4), TypeError, "attention_mask must be bool or integer, got torch.float32"),
        (torch.ones(2, 3, dtype=torch.bool), ValueError, r"hidden_states' batch and seqlen \(2, 4\), got \(2, 3\)"),
        (torch.ones(8, dtype=torch.bool), ValueError, r"attention_mask must have shape \(batch, seqlen\)"),
    ],
)
def test_masks_that_do_not_fit(mask: torch.Tensor, error: type[Exception], match: str) -> None:
    """Fails if an additive mask, or one of another shape, is taken for a padding mask."""
    with pytest.raises(error, match=match):
        unpad_input(torch.randn(2, 4, 3), mask)
