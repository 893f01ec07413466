"""A BlockMask as attn_mask of everything that takes one, against the bool mask that it stands for."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

import fastattn
from fastattn.blockmask import BlockMask
from fastattn.dense.api import problem_of
from fastattn.sparse import documents, longformer, sliding_window


def qkv(length: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [torch.randn(2, heads, length, 8, dtype=dtype).requires_grad_() for heads in (4, 2, 2)]


@pytest.mark.parametrize("block_size", [64, 128])
def test_compiled(block_size: int) -> None:
    """Fails on a graph break or another result in compiled code, in the C++ kernels' grid or not."""
    torch.compiler.reset()
    mask = sliding_window(150, window=20, causal=True, block_size=block_size)
    leaves = qkv(150, torch.float32)

    def model(*tensors: Tensor) -> Tensor:
        return fastattn.attention(*tensors, attn_mask=mask)

    both = [function(*leaves) for function in (torch.compile(model, fullgraph=True), model)]
    torch.testing.assert_close(*both)
    torch.testing.assert_close(*(torch.autograd.grad(out.square().sum(), leaves) for out in both))


def test_op() -> None:
    """Fails if the registered op's fake, schema or dispatch is wrong with a block mask."""
    leaves = [t.detach() for t in qkv(70, torch.float32)]
    opcheck(
        torch.ops.fastattn.dense_forward.default, problem_of(*leaves, attn_mask=sliding_window(70, window=9)).args()
    )


def test_double_backward() -> None:
    """Fails if gradients of gradients forget the block mask, or the bias beside it."""
    keep = torch.rand(40, 40) < 0.5
    bias = torch.randn(4, 40, 40, dtype=torch.float64, requires_grad=True)
    leaves = [*qkv(40), bias]
    found = []
    for mask in ((BlockMask.from_dense(keep, block_size=16), bias), bias.where(keep, float("-inf"))):
        out = fastattn.attention(*leaves[:3], attn_mask=mask)  # type: ignore[arg-type]
        first = torch.autograd.grad(out.square().sum(), leaves, create_graph=True)
        found.append(torch.autograd.grad(sum(g.square().sum() for g in first), leaves))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_decoding() -> None:
    """Fails if the row of one query is not the mask's, block boundaries included, or a cache gets other keys."""
    length = random.randrange(65, 140)
    mask = longformer(length, window=30, global_tokens=3, causal=True, block_size=32)
    q, k, v = (t.detach() for t in qkv(length))
    whole = fastattn.attention(q, k, v, attn_mask=mask)
    for i in (0, 31, 32, 64, length - 1):
        row = mask[..., i : i + 1, :]
        one = fastattn.attention(q[:, :, i : i + 1], k, v, attn_mask=row)
        torch.testing.assert_close(one, whole[:, :, i : i + 1], rtol=1e-12, atol=1e-12)
        lengths = torch.full((2,), length, dtype=torch.int32)
        cached = fastattn.attention_with_kvcache(q[:, :, i : i + 1], k, v, key_lengths=lengths, attn_mask=row)
        torch.testing.assert_close(cached, one, rtol=1e-12, atol=1e-12)


def test_packed() -> None:
    """Fails if each packed sequence does not get its part of its own mask."""
    keep = torch.rand(3, 4, 50, 50) < 0.5
    mask = BlockMask.from_dense(keep, block_size=(16, 32))
    bounds = torch.tensor([0, 50, 57, 90], dtype=torch.int32)
    leaves = [torch.randn(90, heads, 8, dtype=torch.float64, requires_grad=True) for heads in (4, 2, 2)]
    both = [fastattn.attention_varlen(*leaves, bounds, bounds, 50, 50, attn_mask=given) for given in (mask, keep)]
    torch.testing.assert_close(*both, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(*(torch.autograd.grad(out.square().sum(), leaves) for out in both))


def test_weights() -> None:
    """Fails if the weights that users look at are of other pairs than the output's."""
    keep = torch.rand(1, 4, 60, 60) < 0.4
    mask = BlockMask.from_dense(keep, block_size=16)
    q, k, v = (t.detach() for t in qkv(60))
    with fastattn.maps.capture() as calls:
        out = fastattn.attention(q, k, v, attn_mask=mask)
    rows = [3, 17, 18, 59]
    expected = fastattn.attention_weights(q, k, rows=rows, heads=[2, 0], attn_mask=keep)
    torch.testing.assert_close(fastattn.attention_weights(q, k, rows=rows, heads=[2, 0], attn_mask=mask), expected)
    torch.testing.assert_close(calls[0].weights(rows=rows, heads=[2, 0]), expected)
    torch.testing.assert_close(calls[0].sequence(1).weights(rows=rows, heads=[2, 0]), expected[1:])
    weights = fastattn.attention_weights(q, k, attn_mask=mask)
    torch.testing.assert_close(weights @ v.repeat_interleave(2, 1), out)


def test_flops() -> None:
    """Fails if pairs that are left out count as work."""
    mask = documents([30, 50, 20], causal=False, block_size=16)
    leaves = qkv(100, torch.float32)
    with FlopCounterMode(display=False) as counter:
        fastattn.attention(*leaves, attn_mask=mask).sum().backward()
    pairs = 2 * 4 * (30**2 + 50**2 + 20**2)
    assert counter.get_total_flops() == pairs * 2 * 8 * 7


def test_left_out_keys_are_not_read() -> None:
    """Fails if NaN in keys that no query sees, in kept blocks too, reaches the C++ kernels' results."""
    keep = torch.rand(100, 130) < 0.5
    keep[:, 5] = keep[:, 60:100] = False
    q, k, v = torch.randn(1, 2, 100, 16), *torch.randn(2, 1, 2, 130, 16)
    k[:, :, 5] = k[:, :, 60:100] = v[:, :, 5] = v[:, :, 60:100] = float("nan")
    leaves = [t.requires_grad_() for t in (q, k, v)]
    out = fastattn.attention(*leaves, attn_mask=BlockMask.from_dense(keep, block_size=32), backend="cpu")
    assert out.isfinite().all()
    assert all(g.isfinite().all() for g in torch.autograd.grad(out.sum(), leaves))
