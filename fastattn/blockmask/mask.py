"""`BlockMask`: which blocks of keys each block of queries sees, and within some of them which keys."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import EllipsisType
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from fastattn.blockmask import flex, lists, rules
from fastattn.blockmask.lists import ABSENT, FULL, Entries, Grid, Lists

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BLOCK_SIZES = (16, 32, 64, 128, 256)
#: The grid of the C++ kernels' panels; a mask in other blocks is brought to it once.
CPU_BLOCK = (64, 64)

Index = int | slice | EllipsisType


class BlockMask:
    """A mask over (B or 1, H or 1, Sq, Sk), True where a query sees a key, as lists of the blocks that hold such pairs.

    Passed as `attn_mask` of `attention`, it makes the kernels visit those blocks only. A block in which all pairs are
    kept is full and is computed without a test; the others carry a bit for each pair, so that results are those of the
    token-level mask exactly. Made by the functions of `fastattn.sparse`, by `from_mask_mod`, `from_dense`,
    `from_torch`, and from other masks by `&`, `|`, `~` and slicing; never changed.

    Attributes:
        shape: (B or 1, H or 1, Sq, Sk).
        block_size: (queries, keys) of a block, each 16, 32, 64, 128 or 256.
        lists: the lists, as kernels take them.
    """

    def __init__(self, made: Lists, seqlen_q: int, seqlen_k: int, *, pattern: Callable[[int], BlockMask] | None = None):
        self.lists = made
        batch, heads = made.rows.shape[:2]
        self.shape = (batch, heads, seqlen_q, seqlen_k)
        self.block_size = made.block_size
        self._pattern = pattern  # makes the same mask for another length
        self._longer: BlockMask | None = None  # that this one was cut from
        self._on_cpu_grid: Lists | None = None

    def __getstate__(self) -> dict[str, Any]:
        # A pattern is a function made on the spot, which cannot be pickled; a copy cannot grow.
        return self.__dict__ | {"_pattern": None, "_longer": None}

    @classmethod
    def from_entries(
        cls, entries: Entries, tiles: Tensor, grid: Grid, *, pattern: Callable[[int], BlockMask] | None = None
    ) -> BlockMask:
        """The mask of these kept blocks, each of which is named once."""
        return cls(lists.build(entries, tiles, grid), grid.seqlen_q, grid.seqlen_k, pattern=pattern)

    @classmethod
    def from_dense(cls, mask: Tensor, *, block_size: int | tuple[int, int] = 128) -> BlockMask:
        """From a bool tensor (..., Sq, Sk) of up to four axes, True keeps."""
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            found = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
            raise TypeError(f"fastattn: mask must be a bool tensor, got {found}")
        if not 2 <= mask.dim() <= 4:
            raise ValueError(f"fastattn: mask must have shape ([B or 1,] [H or 1,] Sq, Sk), got {tuple(mask.shape)}")
        mask = mask[(None,) * (4 - mask.dim())]
        batch, heads, seqlen_q, seqlen_k = mask.shape
        grid = Grid(batch, heads, seqlen_q, seqlen_k, *check_block_size(block_size))
        return cls.from_entries(*rules.from_dense(mask, grid), grid)

    @classmethod
    def from_mask_mod(
        cls,
        mask_mod: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor],
        batch: int | None,
        heads: int | None,
        seqlen_q: int,
        seqlen_k: int,
        *,
        block_size: int | tuple[int, int] = 128,
        device: torch.device | str = "cpu",
    ) -> BlockMask:
        """From a rule (batch, head, query, key) -> bool, as flex_attention takes it; None where it ignores an axis.

        The rule is asked once for each pair, a few rows at a time: time goes by Sq * Sk, memory does not.
        """
        if not callable(mask_mod):
            raise TypeError(f"fastattn: mask_mod must be callable, got {type(mask_mod).__name__}")
        grid = Grid(batch or 1, heads or 1, seqlen_q, seqlen_k, *check_block_size(block_size))
        return cls.from_entries(*rules.from_mask_mod(mask_mod, grid, torch.device(device)), grid)

    @classmethod
    def from_torch(cls, block_mask: Any) -> BlockMask:
        """From a BlockMask of torch.nn.attention.flex_attention; its rule is asked for the pairs of partial blocks.

        One in blocks of other sizes than these (`BLOCK_SIZES`) is expanded, and cut into blocks of 128.
        """
        if not flex.is_block_mask(block_mask):
            raise TypeError(f"fastattn: block_mask must be flex_attention's BlockMask, got {type(block_mask).__name__}")
        if any(side not in BLOCK_SIZES for side in block_mask.BLOCK_SIZE):
            return cls.from_dense(flex.dense_mask(block_mask))
        grid = Grid(*flex.shape_of(block_mask), *block_mask.BLOCK_SIZE)
        return cls.from_entries(*flex.entries_of(block_mask), grid)

    @property
    def device(self) -> torch.device:
        return self.lists.rows.device

    @property
    def grid(self) -> Grid:
        batch, heads, seqlen_q, seqlen_k = self.shape
        return Grid(batch, heads, seqlen_q, seqlen_k, *self.block_size)

    @property
    def sparsity(self) -> float:
        """The share of blocks that are left out, 0 to 1."""
        grid = self.grid
        blocks = grid.batch * grid.heads * grid.rows * grid.columns
        return 1 - len(self.lists.row_blocks) / blocks if blocks else 0.0

    def __repr__(self) -> str:
        grid = self.grid
        blocks = grid.batch * grid.heads * grid.rows * grid.columns
        kept, partial = len(self.lists.row_blocks), int((self.lists.row_blocks[:, 1] != FULL).sum())
        where = "" if self.device.type == "cpu" else f", device='{self.device}'"
        return (
            f"BlockMask(shape={tuple(self.shape)}, block_size={tuple(self.block_size)}, "
            f"{kept:,} of {blocks:,} blocks kept ({1 - self.sparsity:.1%}), {partial:,} of them partial{where})"
        )

    def to(self, device: torch.device | str) -> BlockMask:
        """The mask on another device."""
        if torch.device(device) == self.device:
            return self
        moved = BlockMask(Lists(*(t.to(device) for t in self.lists)), *self.shape[2:])
        if self._pattern is not None:
            pattern = self._pattern
            moved._pattern = lambda length: pattern(length).to(device)
        return moved

    def to_dense(self) -> Tensor:
        """The bool mask (B or 1, H or 1, Sq, Sk) that it stands for."""
        return lists.to_dense(self.lists, (0, self.shape[2]), self.shape[3])

    def with_block_size(self, block_size: int | tuple[int, int]) -> BlockMask:
        """The same mask in blocks of another size."""
        size = check_block_size(block_size)
        if size == self.block_size:
            return self
        return BlockMask(lists.regrid(self.lists, self.grid, *size), *self.shape[2:])

    def kernel_lists(self, backend: str | None) -> Lists:
        """The lists in the blocks that the kernels for this device, or of the backend of that name, take."""
        if self.device.type != "cpu" or backend == "triton" or self.block_size == CPU_BLOCK:
            return self.lists
        return self._bring_to_cpu_grid() if self._on_cpu_grid is None else self._on_cpu_grid

    def _bring_to_cpu_grid(self) -> Lists:
        self._on_cpu_grid = lists.regrid(self.lists, self.grid, *CPU_BLOCK)
        return self._on_cpu_grid

    # How many blocks that makes depends on values: compiled code has it done while it is compiled. This is what
    # torch.compiler.assume_constant_result sets, which would import the compiler, and Triton with it.
    _bring_to_cpu_grid._dynamo_marked_constant = True  # type: ignore[attr-defined]

    def __and__(self, other: BlockMask) -> BlockMask:
        """Pairs that both keep. Axes of size 1 broadcast; blocks are of the left one's size."""
        return self._combine(other, union=False)

    def __or__(self, other: BlockMask) -> BlockMask:
        """Pairs that either keeps."""
        return self._combine(other, union=True)

    def _combine(self, other: Any, union: bool) -> BlockMask:
        if not isinstance(other, BlockMask):
            return NotImplemented
        if other.shape[2:] != self.shape[2:] or any(
            1 not in (a, b) and a != b for a, b in zip(self.shape[:2], other.shape[:2], strict=True)
        ):
            raise ValueError(f"fastattn: masks of shapes {self.shape} and {other.shape} cannot be combined")
        if other.device != self.device:
            raise ValueError(f"fastattn: masks on {self.device} and {other.device} cannot be combined")
        other = other.with_block_size(self.block_size)
        batch, heads = (
            max(a, b) if 0 not in (a, b) else 0 for a, b in zip(self.shape[:2], other.shape[:2], strict=True)
        )
        grid = self.grid._replace(batch=batch, heads=heads)
        sides = [rules.broadcast(lists.entries_of(m.lists), m.grid, grid) for m in (self, other)]
        tables = [m.lists.tiles for m in (self, other)]
        places = [(e.head * grid.rows + e.row) * grid.columns + e.column for e in sides]
        all_places, which = torch.unique(torch.cat(places), return_inverse=True)
        pairs = torch.full((len(all_places), 2), ABSENT, device=self.device)
        first, second = which.split([len(places[0]), len(places[1])])
        pairs[first, 0], pairs[second, 1] = sides[0].tile, sides[1].tile
        some, kind = lists.distinct(pairs)
        one, two = (lists.tile_bytes(table, pairs[some, side]) for side, table in enumerate(tables))
        line = all_places // grid.columns
        entries = Entries(line // grid.rows, line % grid.rows, all_places % grid.columns, kind)
        pattern = None
        mine, others = self._pattern, other._pattern
        if mine is not None and others is not None:
            pattern = lambda length: mine(length)._combine(others(length), union)  # noqa: E731
        return BlockMask.from_entries(entries, one | two if union else one & two, grid, pattern=pattern)

    def __invert__(self) -> BlockMask:
        """Pairs that it does not keep."""
        grid = self.grid
        entries = lists.entries_of(self.lists)
        heads = grid.batch * grid.heads
        tile = torch.full((heads, grid.rows, grid.columns), FULL, device=self.device)
        tile[entries[:3]] = torch.where(entries.tile == FULL, ABSENT, entries.tile)
        head, row, column = (tile != ABSENT).nonzero().unbind(1)
        inverse = Entries(head, row, column, tile[head, row, column])
        pattern = self._pattern
        return BlockMask.from_entries(
            inverse, ~self.lists.tiles, grid, pattern=None if pattern is None else lambda length: ~pattern(length)
        )

    def __getitem__(self, index: Index | tuple[Index, ...]) -> BlockMask:
        """Part of the mask: mask[b, h, queries, keys], each a slice of step 1; b and h may be numbers, and stay axes.

        Queries and keys must start at a multiple of the block size, or the queries lie within one block: so the last
        query of a sequence, which decoding needs, can be had alone.
        """
        parts = list(index) if isinstance(index, tuple) else [index]
        if Ellipsis in parts:
            at = parts.index(Ellipsis)
            parts[at : at + 1] = [slice(None)] * (5 - len(parts))
        if len(parts) > 4:
            raise IndexError(f"fastattn: a BlockMask has 4 axes, got {len(parts)} indices")
        parts += [slice(None)] * (4 - len(parts))
        bounds = [_bounds(part, size) for part, size in zip(parts, self.shape, strict=True)]
        return self._part(bounds)

    def _part(self, bounds: Sequence[tuple[int, int]]) -> BlockMask:
        grid, tiles = self.grid, self.lists.tiles
        (b0, b1), (h0, h1), (q0, q1), (k0, k1) = bounds
        shift = q0 % grid.block_q
        if shift and q1 > q0 - shift + grid.block_q:
            raise ValueError(
                f"fastattn: queries must start at a multiple of {grid.block_q} or lie within one block, got {q0}:{q1}"
            )
        if k0 % grid.block_k:
            raise ValueError(f"fastattn: keys must start at a multiple of {grid.block_k}, got {k0}:{k1}")
        part = grid._replace(batch=b1 - b0, heads=h1 - h0, seqlen_q=max(q1 - q0, 0), seqlen_k=max(k1 - k0, 0))
        entries = lists.entries_of(self.lists)
        b, h = entries.head // grid.heads - b0, entries.head % grid.heads - h0
        row, column = entries.row - q0 // grid.block_q, entries.column - k0 // grid.block_k
        inside = (b >= 0) & (b < part.batch) & (h >= 0) & (h < part.heads)
        inside &= (row >= 0) & (row < part.rows) & (column >= 0) & (column < part.columns)
        entries = Entries(b * part.heads + h, row, column, entries.tile).select(inside)
        return BlockMask.from_entries(entries, tiles.roll(-shift, 1) if shift else tiles, part)

    def resize(self, seq_len: int) -> BlockMask:
        """The mask of the same pattern for sequences of another length, Sq = Sk = seq_len.

        A shorter mask is cut from this one. A longer one needs a mask that one of `fastattn.sparse`'s functions made
        (or that `&`, `|`, `~` made of such): it is made for twice the length asked for, and cut; the next lengths are
        then cut from that one, so that growing token by token builds few masks.
        """
        if seq_len == self.shape[2] == self.shape[3]:
            return self
        source = self
        if seq_len > min(self.shape[2:]):
            source = self._longer if self._longer is not None and self._longer.shape[2] >= seq_len else None  # type: ignore[assignment]
            if source is None:
                if self._pattern is None:
                    raise ValueError(
                        f"fastattn: this mask has no pattern to go by; it can be cut to at most {min(self.shape[2:])} "
                        f"tokens, got {seq_len}"
                    )
                source = self._pattern(2 * seq_len)
            self._longer = source
        cut = source._part([(0, self.shape[0]), (0, self.shape[1]), (0, seq_len), (0, seq_len)])
        cut._pattern, cut._longer = self._pattern, source
        return cut

    def plot(self, ax: Axes | None = None, *, batch: int = 0, head: int = 0) -> Axes:
        """Draw the blocks of one head: full ones dark, partial ones by the share of pairs that they keep."""
        from fastattn.blockmask.plot import plot

        return plot(self, ax, batch, head)


_of_flex: WeakKeyDictionary[Any, BlockMask] = WeakKeyDictionary()


def of_flex(block_mask: Any) -> BlockMask | None:
    """flex_attention's BlockMask, converted when it is first seen.

    None where it has to be expanded instead: in compiled code, and where its blocks are not of our `BLOCK_SIZES`.
    """
    if torch.compiler.is_compiling() or any(side not in BLOCK_SIZES for side in block_mask.BLOCK_SIZE):
        return None
    found = _of_flex.get(block_mask)
    if found is None:
        found = _of_flex[block_mask] = BlockMask.from_torch(block_mask)
    return found


def check_block_size(value: Any) -> tuple[int, int]:
    """(queries, keys) of a block."""
    size = (value, value) if isinstance(value, int) else value
    if not isinstance(size, tuple | list) or len(size) != 2:
        raise TypeError(f"fastattn: block_size must be an int or a pair (queries, keys), got {value!r}")
    if any(side not in BLOCK_SIZES for side in size):
        raise ValueError(f"fastattn: block_size must be of {', '.join(map(str, BLOCK_SIZES))}, got {value!r}")
    return size[0], size[1]


def _bounds(index: Any, size: int) -> tuple[int, int]:
    if isinstance(index, slice):
        begin, end, step = index.indices(size)
        if step != 1:
            raise ValueError(f"fastattn: a BlockMask is sliced with step 1, got {step}")
        return begin, max(begin, end)
    if not isinstance(index, int):
        raise TypeError(f"fastattn: a BlockMask takes ints and slices, got {type(index).__name__}")
    if not -size <= index < size:
        raise IndexError(f"fastattn: index {index} is out of range for an axis of size {size}")
    return index % size, index % size + 1
