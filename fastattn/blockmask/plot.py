"""Pictures of block masks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from fastattn.blockmask.lists import FULL, entries_of, unpack_bits

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from fastattn.blockmask.mask import BlockMask

_MOST_PIXELS = 1024


def plot(mask: BlockMask, ax: Axes | None, batch: int, head: int) -> Axes:
    """Draw one head of a mask: pairs where there are few, else the share of pairs that each block, or square, keeps."""
    import matplotlib.pyplot as plt

    one = mask[batch, head]
    grid = one.grid
    if ax is None:
        ax = plt.figure(figsize=(4, 4), layout="constrained").add_subplot()
    if max(grid.seqlen_q, grid.seqlen_k) <= _MOST_PIXELS:
        share = one.to_dense()[0, 0].float()
    else:
        entries = entries_of(one.lists)
        kept = torch.cat([unpack_bits(one.lists.tiles).float().mean((1, 2)), torch.ones(1)])
        down, across = (-(-n // _MOST_PIXELS) for n in (grid.rows, grid.columns))
        share = torch.zeros(-(-grid.rows // down), -(-grid.columns // across))
        share.index_put_(
            (entries.row // down, entries.column // across),
            torch.where(entries.tile == FULL, 1.0, kept[entries.tile]) / (down * across),
            accumulate=True,
        )
    image = ax.imshow(
        share.cpu().numpy(), cmap="Blues", vmin=0, vmax=1, extent=(0, grid.seqlen_k, grid.seqlen_q, 0),
        aspect="equal", interpolation="nearest",
    )  # fmt: skip
    image.set_label("share of pairs kept")
    ax.set_xlabel("key")
    ax.set_ylabel("query")
    ax.set_title(f"{1 - mask.sparsity:.1%} of {grid.block_q} x {grid.block_k} blocks", fontsize="medium")
    return ax
