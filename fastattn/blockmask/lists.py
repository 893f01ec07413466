"""The lists of kept blocks that kernels walk, and how they are made.

A mask over (batch or 1, heads or 1, queries, keys) is cut into blocks. A block is left out, full (every pair is kept),
or partial: then the bits of a tile say which pairs are. Equal tiles are stored once, so a mask takes memory by its kept
blocks and its distinct tiles, never by queries times keys.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

FULL = -1  # in place of a tile's number
ABSENT = -2


class Lists(NamedTuple):
    """Kept blocks by query block and by key block. Masks of equal heads or batches have one line for all.

    A line of `rows` or `columns` is (first, first partial, end, n-th): where its entries are, full blocks first and
    both kinds in ascending order; and, unrelated, the line that comes n-th when the longest come first.
    """

    rows: Tensor  # (B or 1, H or 1, query blocks, 4) int32
    row_blocks: Tensor  # (N, 2) int32: key block, tile or FULL
    columns: Tensor  # (B or 1, H or 1, key blocks, 4) int32
    column_blocks: Tensor  # (N, 3) int32: query block, tile or FULL, place in that query block's order of key blocks
    tiles: Tensor  # (T, block_q, block_k / 8) uint8; bit j % 8 of byte j // 8 is key j

    @property
    def block_size(self) -> tuple[int, int]:
        return self.tiles.shape[1], 8 * self.tiles.shape[2]


class Entries(NamedTuple):
    """Kept blocks in any order, int64: `head` is b * heads + h, tile is a number or FULL."""

    head: Tensor
    row: Tensor
    column: Tensor
    tile: Tensor

    def select(self, index: Tensor) -> Entries:
        return Entries(*(t[index] for t in self))


class Grid(NamedTuple):
    """What a mask spans."""

    batch: int  # or 1
    heads: int  # or 1
    seqlen_q: int
    seqlen_k: int
    block_q: int
    block_k: int

    @property
    def rows(self) -> int:
        return -(-self.seqlen_q // self.block_q)

    @property
    def columns(self) -> int:
        return -(-self.seqlen_k // self.block_k)


def pack_bits(keep: Tensor) -> Tensor:
    """(..., n) bool to (..., n / 8) uint8."""
    weights = 1 << torch.arange(8, dtype=torch.uint8, device=keep.device)
    return (keep.unflatten(-1, (-1, 8)).to(torch.uint8) * weights).sum(-1, dtype=torch.uint8)


def unpack_bits(tiles: Tensor) -> Tensor:
    """(..., n) uint8 to (..., 8 n) bool."""
    shifts = torch.arange(8, dtype=torch.uint8, device=tiles.device)
    return ((tiles[..., None] >> shifts) & 1).bool().flatten(-2)


def distinct(rows: Tensor) -> tuple[Tensor, Tensor]:
    """(numbers of rows that are all different, which of them each row equals), of a matrix of integers.

    Rows are told apart by a 64-bit hash. Should two rows with one hash ever differ, every row counts as different.
    """
    count = rows.shape[0]
    numbers = torch.arange(count, device=rows.device)
    if count == 0:
        return numbers, numbers
    bounds = torch.iinfo(torch.int64)
    generator = torch.Generator().manual_seed(0)
    factors = torch.randint(bounds.min, bounds.max, (rows.shape[1],), generator=generator).to(rows.device)
    step = max(1, (1 << 22) // rows.shape[1])
    hashes = torch.cat([(some.to(torch.int64) * factors).sum(1) for some in rows.split(step)])
    values, which = torch.unique(hashes, return_inverse=True)
    first = torch.full_like(values, count).scatter_reduce(0, which, numbers, "amin")
    return (first, which) if torch.equal(rows[first][which], rows) else (numbers, numbers)


def build(entries: Entries, tiles: Tensor, grid: Grid) -> Lists:
    """The lists of these blocks, each of which is named once; those that turn out empty or full are taken as such."""
    entries, tiles = _canonical(*_within(entries, tiles, grid))
    heads, rows, columns = grid.batch * grid.heads, grid.rows, grid.columns
    # What is sorted takes half the time in 32 bits.
    dtype = torch.int32 if 2 * heads * rows * columns <= 1 << 31 else torch.int64
    head, row, column, tile = (t.to(dtype) for t in entries)
    row_line, column_line = head * rows + row, head * columns + column
    partial = tile != FULL
    row_half, column_half = 2 * row_line + partial, 2 * column_line + partial
    row_order = torch.argsort(row_half * columns + column)
    column_order = torch.argsort(column_half * rows + row)
    row_table = _table(row_half, heads, rows)
    column_table = _table(column_half, heads, columns)

    # Whoever adds up a query block's gradient over key blocks does so in the order in which key blocks are begun.
    begun = torch.empty_like(column_table[..., 3], dtype=dtype)
    begun.scatter_(1, column_table[..., 3], torch.arange(columns, dtype=dtype, device=begun.device).expand_as(begun))
    in_turn = torch.argsort(row_line * columns + begun.flatten()[column_line])
    turn = torch.empty_like(row)
    turn[in_turn] = torch.arange(len(turn), dtype=dtype, device=turn.device)
    turn -= row_table[..., 0].to(dtype).flatten()[row_line]

    size = (grid.batch, grid.heads)
    return Lists(
        rows=row_table.int().unflatten(0, size),
        row_blocks=torch.stack([t[row_order] for t in (column, tile)], 1).int(),
        columns=column_table.int().unflatten(0, size),
        column_blocks=torch.stack([t[column_order] for t in (row, tile, turn)], 1).int(),
        tiles=tiles,
    )


def _table(half: Tensor, heads: int, lines: int) -> Tensor:
    """(heads, lines, 4) of `Lists`, of blocks of which each is in half 2 * line, or 2 * line + 1 if it is partial."""
    counts = torch.bincount(half, minlength=2 * heads * lines).view(heads, lines, 2)
    ends = counts.flatten().cumsum(0).view(heads, lines, 2)
    longest = torch.argsort(counts.sum(-1), dim=1, descending=True, stable=True)
    return torch.stack([ends[..., 0] - counts[..., 0], ends[..., 0], ends[..., 1], longest], -1)


def _within(entries: Entries, tiles: Tensor, grid: Grid) -> tuple[Entries, Tensor]:
    """Bits past the last key or query are cleared: the last column's blocks are partial where keys end within them."""
    tile = entries.tile
    for axis, index, length in ((2, entries.column, grid.seqlen_k), (1, entries.row, grid.seqlen_q)):
        block = (0, grid.block_q, grid.block_k)[axis]
        rest = length % block
        if not rest:
            continue
        cut = index == length // block
        if axis == 1:  # rows past the last are never computed: a full block stays one
            cut = cut & (tile != FULL)
        numbers, which = torch.unique(tile[cut], return_inverse=True)
        limit = torch.arange(grid.block_k if axis == 2 else grid.block_q, device=tile.device) < rest
        limit = pack_bits(limit)[None, None] if axis == 2 else (255 * limit.to(torch.uint8))[None, :, None]
        full = torch.full((1, *tiles.shape[1:]), 255, dtype=torch.uint8, device=tile.device)
        some = torch.cat([tiles, full])[numbers] & limit  # FULL, which is -1, is the last
        if axis == 1:  # and one that keeps all pairs of the rows before becomes one
            some[(some == limit).flatten(1).all(1)] = 255
        tile = tile.clone()
        tile[cut] = len(tiles) + which
        tiles = torch.cat([tiles, some])
    return entries._replace(tile=tile), tiles


def _canonical(entries: Entries, tiles: Tensor) -> tuple[Entries, Tensor]:
    """Tiles stored once and only where used; none that is empty, none that is full."""
    used = torch.zeros(len(tiles) + 1, dtype=torch.bool, device=tiles.device)
    used[entries.tile] = True  # FULL marks the one past the end
    used = used[:-1]
    kept = tiles[used]
    first, which = distinct(kept.flatten(1))
    kept = kept[first]
    empty, full = ((kept.flatten(1) == value).all(1) for value in (0, 255))
    number = (~(empty | full)).long().cumsum(0) - 1
    number = torch.where(full, FULL, torch.where(empty, ABSENT, number))
    renumbered = torch.full((len(tiles) + 1,), FULL, device=tiles.device)
    renumbered[:-1][used] = number[which]
    entries = entries._replace(tile=renumbered[entries.tile])
    if bool(empty.any()):
        entries = entries.select(entries.tile != ABSENT)
    return entries, kept[~(empty | full)].contiguous()


def entries_of(lists: Lists) -> Entries:
    """The blocks of lists, by query block."""
    table = lists.rows.flatten(0, 1).long()
    heads, rows = table.shape[:2]
    counts = (table[..., 2] - table[..., 0]).flatten()
    line = torch.repeat_interleave(torch.arange(heads * rows, device=counts.device), counts)
    # Of some lines of a mask, entries need not lie one after another.
    skipped = table[..., 0].flatten() - (counts.cumsum(0) - counts)
    place = torch.arange(len(line), device=line.device) + skipped[line]
    column, tile = lists.row_blocks[place].long().unbind(1)
    return Entries(line // rows, line % rows, column, tile)


def kept_share(lists: Lists, seqlen_q: int, seqlen_k: int) -> float:
    """Of all (query, key) pairs, the share that is kept."""
    entries, (block_q, block_k) = entries_of(lists), lists.block_size
    pairs = unpack_bits(lists.tiles).flatten(1).sum(1)
    of_full = (seqlen_q - entries.row * block_q).clamp(max=block_q) * block_k  # the last rows may be fewer
    kept = torch.where(entries.tile == FULL, of_full, torch.cat([pairs, pairs.new_zeros(1)])[entries.tile]).sum()
    batch, heads = lists.rows.shape[:2]
    return int(kept) / max(batch * heads * seqlen_q * seqlen_k, 1)


def to_dense(lists: Lists, queries: tuple[int, int], seqlen_k: int) -> Tensor:
    """The bool mask (B or 1, H or 1, queries, Sk) of queries first to last - 1."""
    (first, last), (block_q, block_k) = queries, lists.block_size
    lists = lists._replace(rows=lists.rows[:, :, first // block_q : -(-last // block_q)])
    batch, heads, rows = lists.rows.shape[:3]
    columns = lists.columns.shape[2]
    keep = torch.zeros((batch * heads, rows, columns, block_q, block_k), dtype=torch.bool, device=lists.rows.device)
    entries = entries_of(lists)
    full = torch.ones((1, block_q, block_k), dtype=torch.bool, device=keep.device)
    keep[entries[:3]] = torch.cat([unpack_bits(lists.tiles), full])[entries.tile]
    mask = keep.transpose(2, 3).reshape(batch, heads, rows * block_q, columns * block_k)
    return mask[:, :, first % block_q :][:, :, : last - first, :seqlen_k]


def regrid(lists: Lists, grid: Grid, block_q: int, block_k: int) -> Lists:
    """The same mask in blocks of another size; grid is its own."""
    finest = grid._replace(block_q=min(block_q, grid.block_q), block_k=min(block_k, grid.block_k))
    entries, tiles = _split(entries_of(lists), lists.tiles, finest.block_q, finest.block_k)
    entries = entries.select((entries.row < finest.rows) & (entries.column < finest.columns))
    entries, tiles = _merge(entries, tiles, grid, block_q, block_k)
    return build(entries, tiles, grid._replace(block_q=block_q, block_k=block_k))


def _split(entries: Entries, tiles: Tensor, block_q: int, block_k: int) -> tuple[Entries, Tensor]:
    """Blocks cut into several of at most that size."""
    down, across = tiles.shape[1] // block_q, 8 * tiles.shape[2] // block_k
    if down == across == 1:
        return entries, tiles
    parts = tiles.unflatten(1, (down, block_q)).unflatten(3, (across, block_k // 8)).transpose(2, 3)
    i = torch.arange(down, device=tiles.device)[:, None].expand(down, across).flatten()
    j = torch.arange(across, device=tiles.device).expand(down, across).flatten()
    tile = torch.where(entries.tile[:, None] == FULL, FULL, entries.tile[:, None] * (down * across) + (i * across + j))
    head = entries.head[:, None].expand(-1, down * across)
    finer = Entries(head, entries.row[:, None] * down + i, entries.column[:, None] * across + j, tile)
    return Entries(*(t.flatten() for t in finer)), parts.flatten(0, 2)


def _merge(entries: Entries, tiles: Tensor, grid: Grid, block_q: int, block_k: int) -> tuple[Entries, Tensor]:
    """Blocks put together to larger ones."""
    down, across = block_q // tiles.shape[1], block_k // (8 * tiles.shape[2])
    if down == across == 1:
        return entries, tiles
    rows, columns = -(-grid.seqlen_q // block_q), -(-grid.seqlen_k // block_k)
    place = (entries.head * rows + entries.row // down) * columns + entries.column // across
    places, which = torch.unique(place, return_inverse=True)
    made_of = torch.full((len(places), down * across), ABSENT, device=place.device)
    made_of[which, entries.row % down * across + entries.column % across] = entries.tile
    first, tile = distinct(made_of)
    parts = tile_bytes(tiles, made_of[first]).unflatten(1, (down, across))  # (kinds, down, across, rows, bytes)
    merged = parts.transpose(2, 3).flatten(3, 4).flatten(1, 2)
    line = places // columns
    return Entries(line // rows, line % rows, places % columns, tile), merged


def tile_bytes(tiles: Tensor, numbers: Tensor) -> Tensor:
    """The tiles of these numbers, FULL and ABSENT among them."""
    ends = [torch.full((1, *tiles.shape[1:]), value, dtype=torch.uint8, device=tiles.device) for value in (0, 255)]
    return torch.cat([tiles, *ends])[numbers]  # ABSENT is -2, FULL is -1
