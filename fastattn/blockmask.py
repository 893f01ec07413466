"""flex_attention's `BlockMask` as a mask of `attention`.

It is expanded to the boolean mask that it stands for, one byte for each of its (batch or 1, head or 1, query, key)
elements: right for every BlockMask, and no faster than that mask.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

ELEMENTS = 1 << 24  # of the rule evaluated at one time: torch.vmap has temporaries of eight bytes for each


def is_block_mask(value: Any) -> bool:
    """Whether it is a `torch.nn.attention.flex_attention.BlockMask`, without importing that module."""
    flex = sys.modules.get("torch.nn.attention.flex_attention")
    return flex is not None and isinstance(value, flex.BlockMask)


def dense_mask(block_mask: BlockMask, shape: tuple[int, int, int, int]) -> Tensor:
    """The boolean mask (B or 1, Hq or 1, Sq, Sk) of a BlockMask: all of its full blocks, and of its partial blocks the
    elements that its `mask_mod` keeps.

    Args:
        shape: (B, Hq, Sq, Sk) of the call.

    Raises:
        ValueError: it was made for another shape.
    """
    mine = tuple(block_mask.shape)
    sizes, (rows_q, rows_k) = mine[:-2], block_mask.BLOCK_SIZE
    blocks = block_mask.kv_indices.shape[-2:]
    fits = len(sizes) == 2 and mine[2:] == shape[2:] and all(m in (1, s) for m, s in zip(sizes, shape, strict=False))
    if not fits or blocks != (-(-shape[2] // rows_q), -(-shape[3] // rows_k)):
        raise ValueError(
            f"fastattn: attn_mask, a BlockMask, must be made for (B, Hq, Sq, Sk) = {tuple(shape)} (1 for B or Hq too), "
            f"got one for {mine} with {tuple(blocks)} blocks of {rows_q} x {rows_k}"
        )
    partial = _kept_blocks(block_mask.kv_num_blocks, block_mask.kv_indices)
    full = torch.zeros_like(partial)
    if block_mask.full_kv_num_blocks is not None and block_mask.full_kv_indices is not None:
        full = _kept_blocks(block_mask.full_kv_num_blocks, block_mask.full_kv_indices)
    keep = block_mask.mask_mod
    for axis in (3, 2, 1, 0):  # each index its own axis, the batch first
        keep = torch.vmap(keep, in_dims=tuple(0 if axis == other else None for other in range(4)))
    batch, head, row, column = (torch.arange(size, device=partial.device) for size in mine)
    mask = torch.empty(mine, dtype=torch.bool, device=partial.device)
    step = max(1, ELEMENTS // max(1, sizes[0] * sizes[1] * shape[3]))
    for first in range(0, shape[2], step):
        some = row[first : first + step]
        kept, whole = ((t[:, :, some // rows_q])[..., column // rows_k] for t in (partial, full))
        mask[:, :, first : first + step] = whole | (kept & keep(batch, head, some, column))
    return mask


def _kept_blocks(counts: Tensor, indices: Tensor) -> Tensor:
    """(B, H, query blocks, key blocks), True for the first counts[b, h, i] of indices[b, h, i]; the others are free."""
    columns = indices.shape[-1]
    listed = torch.arange(columns, device=indices.device) < counts[..., None]
    kept = torch.zeros((*indices.shape[:-1], columns + 1), dtype=torch.bool, device=indices.device)
    return kept.scatter(-1, indices.long().where(listed, columns), True)[..., :columns]
