"""flex_attention's `BlockMask`: as a bool mask, and as the blocks that it keeps."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastattn.blockmask.lists import FULL, Entries, Grid
from fastattn.blockmask.rules import ELEMENTS, elementwise, from_candidates

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask


def is_block_mask(value: Any) -> bool:
    """Whether it is a `torch.nn.attention.flex_attention.BlockMask`, without importing that module."""
    flex = sys.modules.get("torch.nn.attention.flex_attention")
    return flex is not None and isinstance(value, flex.BlockMask)


def shape_of(block_mask: BlockMask) -> tuple[int, int, int, int]:
    """(B or 1, H or 1, Sq, Sk), or ValueError where its lists are not for that shape."""
    shape = tuple(block_mask.shape)
    rows_q, rows_k = block_mask.BLOCK_SIZE
    blocks = tuple(block_mask.kv_indices.shape[-2:])
    if len(shape) != 4 or blocks != (-(-shape[2] // rows_q), -(-shape[3] // rows_k)):
        raise ValueError(
            f"fastattn: a BlockMask must be for (B, H, Sq, Sk), got one for {shape} with {blocks} blocks of "
            f"{rows_q} x {rows_k}"
        )
    return shape


def entries_of(block_mask: BlockMask) -> tuple[Entries, Tensor]:
    """The kept blocks. Full blocks do not ask its rule, and what is listed past the counts may be anything."""
    grid = Grid(*shape_of(block_mask), *block_mask.BLOCK_SIZE)
    partial, full = _kept_blocks(block_mask)
    head, row, column = (partial | full).flatten(0, 1).nonzero().unbind(1)
    tile = torch.where(full.flatten(0, 1)[head, row, column], FULL, 0)
    rule = elementwise(block_mask.mask_mod)

    def keep(head: Tensor, queries: Tensor, keys: Tensor) -> Tensor:
        # Pairs past the ends are asked for the last one: a rule may look things up by number.
        queries, keys = queries.clamp(max=grid.seqlen_q - 1), keys.clamp(max=grid.seqlen_k - 1)
        head = head[:, 0, 0]
        return rule(head // grid.heads, head % grid.heads, queries[..., 0], keys[:, 0]).bool()

    return from_candidates(keep, Entries(head, row, column, tile), grid)


def dense_mask(block_mask: BlockMask) -> Tensor:
    """The bool mask (B or 1, H or 1, Sq, Sk): all of its full blocks, and what its rule keeps of its partial ones.

    Nothing here depends on values, so that it can be part of a compiled graph.
    """
    batch, heads, seqlen_q, seqlen_k = shape = shape_of(block_mask)
    rows_q, rows_k = block_mask.BLOCK_SIZE
    partial, full = _kept_blocks(block_mask)
    device = partial.device
    keep = elementwise(block_mask.mask_mod)
    mask = torch.empty(shape, dtype=torch.bool, device=device)
    head = torch.arange(batch * heads, device=device)
    column = torch.arange(seqlen_k, device=device)
    step = max(1, ELEMENTS // max(1, batch * heads * seqlen_k))
    for first in range(0, seqlen_q, step):
        some = torch.arange(first, min(first + step, seqlen_q), device=device)
        kept, whole = ((t[:, :, some // rows_q])[..., column // rows_k] for t in (partial, full))
        found = keep(head // heads, head % heads, some.expand(len(head), -1), column.expand(len(head), -1))
        mask[:, :, first : first + step] = whole | (kept & found.unflatten(0, (batch, heads)))
    return mask


def _kept_blocks(block_mask: BlockMask) -> tuple[Tensor, Tensor]:
    """(those of which it keeps part, those that it keeps in full), (B, H, query blocks, key blocks) bool."""
    partial = _listed(block_mask.kv_num_blocks, block_mask.kv_indices)
    if block_mask.full_kv_num_blocks is None or block_mask.full_kv_indices is None:
        return partial, torch.zeros_like(partial)
    return partial, _listed(block_mask.full_kv_num_blocks, block_mask.full_kv_indices)


def _listed(counts: Tensor, indices: Tensor) -> Tensor:
    """(B, H, query blocks, key blocks), True for the first counts[b, h, i] of indices[b, h, i]; the others are free."""
    columns = indices.shape[-1]
    listed = torch.arange(columns, device=indices.device) < counts[..., None]
    kept = torch.zeros((*indices.shape[:-1], columns + 1), dtype=torch.bool, device=indices.device)
    return kept.scatter(-1, indices.long().where(listed, columns), True)[..., :columns]
