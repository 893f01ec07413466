"""How patterns become block masks.

Two mechanisms make all but one of them. Some patterns keep a pair by its distance i - j alone (`by_distance`): blocks
as far from the diagonal are alike. In the others each query sees one run of keys, perhaps only marked ones of it
(`by_span`): the ends of the runs tell which blocks are kept, and which of these are full. The rest are unions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastattn.blockmask import BlockMask, lists, rules
from fastattn.blockmask.lists import FULL, Entries, Grid
from fastattn.dense import arguments as check

Positions = Callable[[Tensor], Tensor]
Span = Callable[[Tensor], tuple[Tensor, Tensor]]

ENDLESS = 1 << 40  # beyond any position


def count(name: str, value: Any, least: int = 0) -> int:
    """An int that is at least so large."""
    if not check.is_integer(value):
        raise TypeError(f"fastattn: {name} must be an int, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"fastattn: {name} must be at least {least}, got {value}")
    return int(value)


def integers(name: str, values: Any, least: int = 0) -> list[int]:
    """Ints of a sequence, or of an integer tensor with one axis, each at least so large."""
    if isinstance(values, Tensor) and values.dim() == 1:
        values = values.tolist()
    if not isinstance(values, Sequence) or isinstance(values, str):
        raise TypeError(f"fastattn: {name} must be a sequence of ints, got {type(values).__name__}")
    return [count(f"{name}[{place}]", value, least) for place, value in enumerate(values)]


def ranges(begin: Tensor, end: Tensor) -> tuple[Tensor, Tensor]:
    """(which range, number) for all numbers of the ranges begin <= number < end, each int64 (n,), one after another."""
    sizes = (end - begin).clamp(min=0)
    which = torch.repeat_interleave(sizes)
    return which, torch.arange(len(which), device=which.device) + (begin + sizes - sizes.cumsum(0))[which]


def by_distance(keep: Positions, low: int, high: int, grid: Grid, device: torch.device) -> BlockMask:
    """The mask of the pairs for whose distance i - j `keep` is True, which it is between low and high only.

    Sides of blocks are powers of two, so that first tokens of two blocks lie a multiple of the smaller side apart. All
    blocks as far apart are alike, and what they keep is read off a stretch of distances.
    """
    block_q, block_k = grid.block_q, grid.block_k
    unit, stretch = min(block_q, block_k), block_q + block_k - 1
    nearest = -(-(max(low, 1 - grid.seqlen_k) - block_q + 1) // unit)
    farthest = (min(high, grid.seqlen_q - 1) + block_k - 1) // unit
    begin = nearest * unit - block_k + 1
    kept = keep(torch.arange(begin, farthest * unit + block_q, device=device)).unfold(0, stretch, unit)
    some = kept.any(1).nonzero()[:, 0]
    kept, apart = kept[some], nearest + some
    tile = torch.full_like(apart, FULL)
    partial = (~kept.all(1)).nonzero()[:, 0]
    one, tile[partial] = lists.distinct(kept[partial])
    across = torch.arange(block_q, device=device)[:, None] + torch.arange(block_k - 1, -1, -1, device=device)
    tiles = lists.pack_bits(kept[partial[one]][:, across])

    # With block number `line` of the longer side go the other side's blocks number line * ratio + shift.
    by_row = block_q >= block_k
    lines, others = (grid.rows, grid.columns) if by_row else (grid.columns, grid.rows)
    shift, tile = (-apart.flip(0), tile.flip(0)) if by_row else (apart, tile)
    start = torch.arange(lines, device=device) * (max(block_q, block_k) // unit)
    line, place = ranges(torch.searchsorted(shift, -start), torch.searchsorted(shift, others - start))
    other = start[line] + shift[place]
    row, column = (line, other) if by_row else (other, line)

    def pattern(length: int) -> BlockMask:
        return by_distance(keep, low, high, grid._replace(seqlen_q=length, seqlen_k=length), device)

    return BlockMask.from_entries(
        Entries(torch.zeros_like(row), row, column, tile[place]), tiles, grid, pattern=pattern
    )


def by_span(
    span: Span,
    grid: Grid,
    device: torch.device,
    *,
    queries: Positions | None = None,
    keys: Positions | None = None,
    any_length: bool = True,
) -> BlockMask:
    """The mask of the pairs with first(i) <= j < end(i) in which query and key are both marked.

    Args:
        span: positions (n,) to (first, end), each (n,) or (batch * heads, n); neither ever falls along positions.
        queries: positions (n,) to marks, (n,) or (batch * heads, n); None marks all.
        keys: likewise.
        any_length: these functions hold for sequences of any length.
    """
    heads, block_q, block_k = grid.batch * grid.heads, grid.block_q, grid.block_k
    # Queries past the last are as it is, so that they keep no block from being full.
    i = torch.arange(grid.rows * block_q, device=device).clamp(max=grid.seqlen_q - 1)
    j = torch.arange(grid.columns * block_k, device=device)
    first, end = (t.clamp(max=grid.seqlen_k).expand(heads, -1) for t in span(i))
    taken, given = (
        (torch.ones((), dtype=torch.bool, device=device) if marks is None else marks(t)).expand(heads, len(t))
        for marks, t in ((queries, i), (keys, j))
    )
    firsts, ends, takes = (t.unflatten(1, (grid.rows, block_q)) for t in (first, end, taken))
    gives = given.unflatten(1, (grid.columns, block_k))

    # The candidates of a query block are consecutive in the list of key blocks that have a mark.
    marked = gives.any(2).flatten()
    listed, rank = marked.nonzero()[:, 0], torch.nn.functional.pad(marked.cumsum(0), (1, 0))
    start = torch.arange(heads, device=device)[:, None] * grid.columns
    begin = rank[start + firsts[..., 0] // block_k]
    past = rank[start + -(-ends[..., -1] // block_k)]
    line, place = ranges(begin.flatten(), torch.where(takes.any(2), past, begin).flatten())
    head, row, column = line // grid.rows, line % grid.rows, listed[place] % grid.columns

    # Blocks are alike if their marks are and the runs of keys have the same ends within them.
    key = column * block_k
    full = (firsts[..., -1][head, row] <= key) & (key + block_k <= ends[..., 0][head, row])
    edge = (~full).nonzero()[:, 0]
    limits = torch.cat([firsts, ends], 2).int()[head[edge], row[edge]] - key[edge, None].int()
    kind = torch.zeros_like(row)
    kind[edge] = 1 + lists.distinct(limits.clamp_(0, block_k))[1]
    for function, marks, index in ((queries, takes, row), (keys, gives, column)):
        if function is not None:
            alike = lists.distinct(lists.pack_bits(marks).flatten(0, 1))[1].unflatten(0, marks.shape[:2])
            kind = kind * alike.numel() + alike[head, index]
            full &= marks.all(2)[head, index]

    def rule(head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (first[head, i] <= j) & (j < end[head, i]) & taken[head, i] & given[head, j]

    def pattern(length: int) -> BlockMask:
        resized = grid._replace(seqlen_q=length, seqlen_k=length)
        return by_span(span, resized, device, queries=queries, keys=keys)

    entries = Entries(head, row, column, torch.where(full, FULL, 0))
    kept = rules.from_candidates(rule, entries, grid, kind)
    return BlockMask.from_entries(*kept, grid, pattern=pattern if any_length else None)
