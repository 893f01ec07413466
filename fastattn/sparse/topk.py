"""A block mask that content chooses: each block of queries sees the blocks of keys nearest to it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastattn.blockmask import BlockMask, lists
from fastattn.blockmask.lists import FULL, Entries, Grid
from fastattn.blockmask.mask import check_block_size
from fastattn.dense import arguments as check
from fastattn.linear import lowrank
from fastattn.sparse.builders import count


@torch.no_grad()
def topk_block_mask(query: Tensor, key: Tensor, *, k: int, block_size: int = 64, causal: bool = True) -> BlockMask:
    """Each block of queries sees its own block of keys and the k - 1 others whose mean key fits its mean query best.

    The gate of mixture-of-block attention (MoBA, Lu et al. 2025, arXiv:2502.13189), asked once for each block of
    queries instead of each query. Blocks are compared by the product of the means of their tokens, so the choice takes
    (S / block_size) ** 2 products for each head. It has no gradient; which of equal products is taken is not defined.

    Args:
        query: (B, Hq, S, D), float32, bfloat16, float16 or float64, any strides.
        key: (B, Hkv, S, D), Hq a multiple of Hkv (grouped-query attention).
        k: blocks seen, the own one included, at least 1; fewer where there are fewer.
        block_size: of queries and keys: 16, 32, 64, 128 or 256.
        causal: only keys j <= i, hence only earlier blocks besides the own one.

    Returns:
        A mask of shape (B, Hq, S, S) on query's device, for `attention(query, key, value, attn_mask=mask)`. It cannot
        be resized to a longer sequence.

    Raises:
        TypeError, ValueError: an argument is of the wrong type, dtype, shape, device or range, or query and key are of
            different lengths.
    """
    query, key, _ = lowrank.inputs(query, key, key)
    count("k", k, 1)
    size, across = check_block_size(block_size)
    if size != across:
        raise ValueError(f"fastattn: block_size must be square, got {(size, across)}")
    check.flag("causal", causal)
    batch, heads, length = query.shape[:3]
    if key.shape[2] != length:
        raise ValueError(f"fastattn: query and key must be of one length, got {length} and {key.shape[2]}")
    grid = Grid(batch, heads, length, length, size, size)
    device = query.device
    with lowrank.without_autocast(device):
        queries, keys = (_means(t, size) for t in (query, key))
        queries = queries.unflatten(1, (key.shape[1], -1))
        scores = (queries @ keys[:, :, None].mT).flatten(0, 2)  # (B * Hq, blocks, blocks)
    row = torch.arange(grid.rows, device=device)[:, None]
    scores = scores.masked_fill(row == row.mT, math.inf)
    if causal:
        scores = scores.masked_fill(row < row.mT, -math.inf)
    chosen = scores.topk(min(k, grid.columns), sorted=False).indices
    head, line, place = (chosen <= row if causal else torch.ones_like(chosen, dtype=torch.bool)).nonzero().unbind(1)
    column = chosen[head, line, place]
    tile = torch.where((line == column) & causal, 0, FULL)
    tiles = lists.pack_bits(torch.ones(size, size, dtype=torch.bool, device=device).tril())[None]
    return BlockMask.from_entries(Entries(head, line, column, tile), tiles, grid)


def _means(x: Tensor, size: int) -> Tensor:
    """(B, H, S, D) to the means of blocks of so many tokens, (B, H, blocks, D); the last block may have fewer."""
    x = lowrank.accumulable(x)
    whole = x.shape[2] // size * size
    means = x[:, :, :whole].unflatten(2, (-1, size)).mean(3)
    return means if whole == x.shape[2] else torch.cat([means, x[:, :, whole:].mean(2, keepdim=True)], 2)
