"""From a token-level rule to kept blocks."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastattn.blockmask.lists import FULL, Entries, Grid, pack_bits

ELEMENTS = 1 << 24  # pairs looked at in one piece: a rule has temporaries of eight bytes for each
Rule = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def elementwise(rule: Rule) -> Rule:
    """A rule on single numbers as one on tensors: (n,), (n,), (n, queries), (n, keys) -> (n, queries, keys)."""
    over_keys = torch.vmap(rule, in_dims=(None, None, None, 0))
    over_queries = torch.vmap(over_keys, in_dims=(None, None, 0, None))
    return torch.vmap(over_queries)


def from_dense(mask: Tensor, grid: Grid) -> tuple[Entries, Tensor]:
    """Kept blocks of a bool mask (B, H, Sq, Sk)."""

    def strip(head: Tensor, first: int, last: int) -> Tensor:
        return mask.flatten(0, 1)[head, first:last]

    return _by_strips(strip, grid, mask.device)


def from_mask_mod(mask_mod: Rule, grid: Grid, device: torch.device) -> tuple[Entries, Tensor]:
    """Kept blocks of a rule on (batch, head, query, key)."""
    rule = elementwise(mask_mod)
    keys = torch.arange(grid.seqlen_k, device=device)

    def strip(head: Tensor, first: int, last: int) -> Tensor:
        queries = torch.arange(first, last, device=device)
        some = (len(head), -1)
        return rule(head // grid.heads, head % grid.heads, queries.expand(some), keys.expand(some)).bool()

    return _by_strips(strip, grid, device)


def _by_strips(strip: Callable[[Tensor, int, int], Tensor], grid: Grid, device: torch.device) -> tuple[Entries, Tensor]:
    """Kept blocks, from strip(heads, first, last) -> (heads, last - first, Sk) for a row of blocks at a time."""
    found: list[Entries] = []
    tables: list[Tensor] = []
    count = 0
    all_heads = torch.arange(grid.batch * grid.heads, device=device)
    at_once = max(1, ELEMENTS // max(1, grid.block_q * grid.seqlen_k))
    rest_k = grid.columns * grid.block_k - grid.seqlen_k
    for row in range(grid.rows):
        first, last = row * grid.block_q, min((row + 1) * grid.block_q, grid.seqlen_q)
        for heads in all_heads.split(at_once):
            keep = strip(heads, first, last)
            rest_q = grid.block_q - (last - first)
            keep = torch.nn.functional.pad(keep, (0, rest_k, 0, rest_q))
            blocks = keep.unflatten(2, (grid.columns, grid.block_k)).transpose(1, 2)
            head, column = blocks.flatten(2).any(2).nonzero().unbind(1)
            tiles = pack_bits(blocks[head, column])
            number = count + torch.arange(len(tiles), device=device)
            full = (tiles[:, : last - first] == 255).flatten(1).all(1)
            tables.append(tiles[~full])
            number = torch.where(full, FULL, count + (~full).long().cumsum(0) - 1)
            count += len(tables[-1])
            found.append(Entries(heads[head], torch.full_like(head, row), column, number))
    if not found:
        return empty(device), torch.empty((0, grid.block_q, grid.block_k // 8), dtype=torch.uint8, device=device)
    return Entries(*map(torch.cat, zip(*found, strict=True))), torch.cat(tables)


def empty(device: torch.device) -> Entries:
    nothing = torch.empty(0, dtype=torch.int64, device=device)
    return Entries(nothing, nothing, nothing, nothing)


def broadcast(entries: Entries, grid: Grid, target: Grid) -> Entries:
    """The entries of a mask whose axes of size 1 are spread to the sizes of the target."""
    if (grid.batch, grid.heads) == (target.batch, target.heads):
        return entries
    b, h = entries.head // grid.heads, entries.head % grid.heads
    copies_b, copies_h = target.batch // grid.batch, target.heads // grid.heads
    more_b = torch.arange(copies_b, device=b.device)[:, None, None]
    more_h = torch.arange(copies_h, device=b.device)[None, :, None]
    head = (b + more_b) * target.heads + h + more_h
    return Entries(head.flatten(), *(t.expand(copies_b, copies_h, -1).flatten() for t in entries[1:]))


def from_candidates(
    rule: Callable[[Tensor, Tensor, Tensor], Tensor],
    entries: Entries,
    grid: Grid,
    kind: Tensor | None = None,
) -> tuple[Entries, Tensor]:
    """Kept blocks among candidates, whose `tile` is FULL where that is known and anything else where it is not.

    Args:
        rule: (head, queries, keys) -> bool, of tensors that broadcast.
        kind: a number for each candidate; those of one number are alike, and the rule is asked for one of them.
    """
    unknown = (entries.tile != FULL).nonzero()[:, 0]
    asked = entries.select(unknown)
    which = torch.arange(len(unknown), device=unknown.device)
    if kind is not None:
        kinds, which = torch.unique(kind[unknown], return_inverse=True)
        one = torch.empty_like(kinds).scatter_(0, which, torch.arange(len(unknown), device=unknown.device))
        asked = asked.select(one)
    rows = torch.arange(grid.block_q, device=unknown.device)[:, None]
    keys = torch.arange(grid.block_k, device=unknown.device)
    tiles = []
    for some in torch.arange(len(asked.row), device=unknown.device).split(
        max(1, ELEMENTS // (grid.block_q * grid.block_k))
    ):
        head, row, column = (t[some, None, None] for t in asked[:3])
        keep = rule(head, row * grid.block_q + rows, column * grid.block_k + keys)
        tiles.append(pack_bits(keep.expand(len(some), grid.block_q, grid.block_k)))
    shape = (0, grid.block_q, grid.block_k // 8)
    table = torch.cat(tiles) if tiles else torch.empty(shape, dtype=torch.uint8, device=unknown.device)
    tile = entries.tile.clone()
    tile[unknown] = which
    return entries._replace(tile=tile), table
