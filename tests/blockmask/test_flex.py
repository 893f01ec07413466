"""flex_attention's BlockMask as attn_mask: the same results as the boolean mask that it stands for.

That mask is built here element by element, by calling `mask_mod` with Python numbers.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, and_masks, create_block_mask

import fastattn
from fastattn.blockmask import BlockMask as OwnBlockMask
from fastattn.blockmask import flex
from fastattn.blockmask.flex import dense_mask


def elementwise(rule: Callable[..., Any], shape: tuple[int, int, int, int]) -> Tensor:
    mask = torch.zeros(shape, dtype=torch.bool)
    for index in torch.cartesian_prod(*(torch.arange(size) for size in shape)).tolist():
        mask[tuple(index)] = bool(rule(*map(torch.tensor, index)))
    return mask


def rules() -> dict[str, Callable[..., Any]]:
    document = torch.randint(0, 3, (2, 70))
    return {
        "causal": lambda b, h, i, j: i >= j,
        "window": lambda b, h, i, j: (i - j).abs() <= 5,
        "documents": lambda b, h, i, j: document[b, i] == document[b, j],
        "heads": lambda b, h, i, j: (j % (h + 2) == 0) & (i != 3),
        "everything": lambda b, h, i, j: i >= 0,
        "nothing": lambda b, h, i, j: i < 0,
        "both": and_masks(lambda b, h, i, j: i >= j, lambda b, h, i, j: i - j < 9),
    }


@pytest.mark.parametrize("name", list(rules()))
@pytest.mark.parametrize("elements", [1, flex.ELEMENTS])
def test_dense_mask(name: str, elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if full and partial blocks are mixed up, the ragged last blocks are cut wrong, or rows go astray when the
    rule is evaluated a row at a time."""
    monkeypatch.setattr(flex, "ELEMENTS", elements)
    rule, shape = rules()[name], (2, 3, random.randrange(1, 30), random.randrange(1, 30))
    made = create_block_mask(rule, *shape, device="cpu", BLOCK_SIZE=(8, 4))
    assert torch.equal(dense_mask(made), elementwise(rule, shape))
    assert torch.equal(OwnBlockMask.from_torch(made).to_dense(), elementwise(rule, shape))


@pytest.mark.parametrize("name", list(rules()))
def test_converted(name: str) -> None:
    """Fails if converting asks the rule for other pairs than those of partial blocks, or numbers past the ends."""
    rule, shape = rules()[name], (2, 3, random.randrange(1, 70), random.randrange(1, 70))
    made = create_block_mask(rule, *shape, device="cpu", BLOCK_SIZE=(32, 16))
    own = OwnBlockMask.from_torch(made)
    assert own.block_size == (32, 16)
    assert torch.equal(own.to_dense(), elementwise(rule, shape))


def test_converted_once() -> None:
    """Fails if every call converts the mask again: the rule would be asked each time."""
    asked = []

    def rule(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        asked.append(1)
        return i >= j

    made = create_block_mask(rule, None, None, 40, 40, device="cpu", BLOCK_SIZE=16)
    q = torch.randn(1, 2, 40, 8)
    first = fastattn.attention(q, q, q, attn_mask=made)
    count = len(asked)
    torch.testing.assert_close(fastattn.attention(q, q, q, attn_mask=made), first, rtol=0, atol=0)
    assert len(asked) == count
    torch.testing.assert_close(first, fastattn.attention(q, q, q, causal=True))


@pytest.mark.parametrize("sizes", [(None, None), (2, None), (None, 3)])
def test_broadcast_axes_stay_broadcast(sizes: tuple[int | None, int | None]) -> None:
    """Fails if a mask that all heads share is expanded for each of them."""
    made = create_block_mask(lambda b, h, i, j: i >= j, *sizes, 16, 16, device="cpu", BLOCK_SIZE=8)
    mask = dense_mask(made)
    assert mask.shape == (sizes[0] or 1, sizes[1] or 1, 16, 16)
    assert torch.equal(mask[0, 0], torch.ones(16, 16, dtype=torch.bool).tril())


def test_lists_alone_decide_full_blocks() -> None:
    """Fails if a full block asks mask_mod, a block in no list is kept, or an index past the count is read: those may be
    anything."""
    counts, full_counts = torch.tensor([[[1, 2]]]), torch.tensor([[[1, 0]]])
    indices = torch.tensor([[[[2, -7, 99], [0, 1, 50]]]])
    full_indices = torch.tensor([[[[1, 1234, -1], [2, 2, 2]]]])
    made = BlockMask.from_kv_blocks(
        *(t.int() for t in (counts, indices, full_counts, full_indices)),
        BLOCK_SIZE=4,
        mask_mod=lambda b, h, i, j: j % 2 == 0,
        seq_lengths=(7, 10),
        compute_q_blocks=False,
    )
    expected = torch.zeros(7, 10, dtype=torch.bool)
    expected[:4, 4:8] = True
    expected[:4, 8::2] = True
    expected[4:, 0:8:2] = True
    assert torch.equal(dense_mask(made)[0, 0], expected)


def test_attention_takes_it() -> None:
    """Fails if the mask is dropped or meets causal otherwise than by AND; forward, gradients and a row without keys."""
    rule, shape = rules()["heads"], (2, 4, 21, 30)
    made, mask = create_block_mask(rule, *shape, device="cpu", BLOCK_SIZE=8), elementwise(rule, shape)
    leaves = [
        torch.randn(2, heads, n, 8, dtype=torch.float64, requires_grad=True) for heads, n in [(4, 21), (2, 30), (2, 30)]
    ]
    grad_out = torch.randn(2, 4, 21, 8, dtype=torch.float64)
    results = []
    for given in (made, mask):
        out, lse = fastattn.attention(*leaves, attn_mask=given, causal=True, return_lse=True)
        results.append([out, lse, *torch.autograd.grad(out, leaves, grad_out)])
    torch.testing.assert_close(*results, rtol=0, atol=0)
    assert (results[0][0][:, :, 3] == 0).all()


def test_other_functions_take_it() -> None:
    """Fails if packed sequences or a cache refuse a BlockMask, or read another mask."""
    made = create_block_mask(lambda b, h, i, j: j % 3 != 1, None, None, 4, 16, device="cpu", BLOCK_SIZE=4)
    mask = dense_mask(made)
    query, cache = torch.randn(2, 2, 4, 8), torch.randn(2, 2, 16, 8)
    cached = [
        fastattn.attention_with_kvcache(query, cache, cache, key_lengths=torch.tensor([9, 16]), attn_mask=given)
        for given in (made, mask)
    ]
    torch.testing.assert_close(*cached, rtol=0, atol=0)
    packed = torch.randn(7, 2, 8), torch.randn(20, 2, 8), torch.randn(20, 2, 8)
    bounds = torch.tensor([0, 4, 7], dtype=torch.int32), torch.tensor([0, 16, 20], dtype=torch.int32)
    both = [fastattn.attention_varlen(*packed, *bounds, 4, 16, attn_mask=given) for given in (made, mask)]
    torch.testing.assert_close(*both, rtol=0, atol=0)
    assert not torch.allclose(both[0], fastattn.attention_varlen(*packed, *bounds, 4, 16))


def test_compiled() -> None:
    """Fails on a graph break or another mask in compiled code."""
    torch.compiler.reset()
    made = create_block_mask(rules()["documents"], 2, None, 24, 24, device="cpu", BLOCK_SIZE=8)
    q, k, v = torch.randn(3, 2, 2, 24, 8)

    def model(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return fastattn.attention(q, k, v, attn_mask=made)

    torch.testing.assert_close(torch.compile(model, fullgraph=True)(q, k, v), model(q, k, v))


@pytest.mark.parametrize("shape", [(2, 3, 17, 16), (2, 3, 16, 15), (1, 3, 16, 16), (2, 1, 16, 16)])
def test_made_for_another_shape(shape: tuple[int, int, int, int]) -> None:
    """Fails if a mask of other lengths, batch or heads is cut, stretched or broadcast in silence."""
    made = create_block_mask(lambda b, h, i, j: i >= j, 2, 3, 16, 16, device="cpu", BLOCK_SIZE=8)
    batch, heads, rows, keys = shape
    q, k = torch.randn(batch, heads, rows, 8), torch.randn(batch, heads, keys, 8)
    with pytest.raises(ValueError, match=r"attn_mask, a BlockMask, must be made for .* got one for \(2, 3, 16, 16\)"):
        fastattn.attention(q, k, k, attn_mask=made)
