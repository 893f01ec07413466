"""Neighborhood attention over 1, 2 or 3 axes as a block mask."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastattn.blockmask import BlockMask, lists, rules
from fastattn.blockmask.lists import Entries, Grid
from fastattn.blockmask.mask import check_block_size
from fastattn.dense import arguments as check
from fastattn.sparse.builders import count, ranges
from fastattn.sparse.patterns import BlockSize, Device


def neighborhood(
    shape: int | tuple[int, ...],
    *,
    kernel_size: int | tuple[int, ...],
    dilation: int | tuple[int, ...] = 1,
    causal: bool | tuple[bool, ...] = False,
    block_size: BlockSize = 128,
    device: Device = "cpu",
) -> BlockMask:
    """Each token sees the tokens nearest to it along every axis, as NATTEN defines it.

    Along an axis a token sees exactly kernel_size positions `dilation` apart, itself among them: as many on each side
    (of an even number one more before it), or, near a border, the window moved inward. Where the axis is causal, it
    sees the last kernel_size of them up to itself, fewer at the start. kernel_size, dilation and causal are one value
    for all axes or one for each. The mask cannot be resized to a longer sequence.

    Args:
        shape: tokens along each of 1 to 3 axes, flattened with the last axis fastest; the mask is (1, 1, n, n), n their
            product.
        kernel_size: at least 1; kernel_size * dilation must not exceed the axis.
        dilation: at least 1.
        causal: along which axes no later token is seen.
        block_size: (queries, keys) or one number for both, of 16, 32, 64, 128, 256.
        device: that the mask lies on.

    Raises:
        TypeError, ValueError: an argument does not fit, before any work.

    Source: Hassani et al. 2023, "Neighborhood Attention Transformer", arXiv:2204.07143; Hassani and Shi 2022, "Dilated
    Neighborhood Attention Transformer", arXiv:2209.15001.
    """
    sizes = (shape,) if check.is_integer(shape) else shape
    if not isinstance(sizes, tuple | list) or not 1 <= len(sizes) <= 3:
        raise TypeError(f"fastattn: shape must be an int or a tuple of 1 to 3 ints, got {shape!r}")
    kernels = _per_axis("kernel_size", kernel_size, len(sizes))
    dilations = _per_axis("dilation", dilation, len(sizes))
    causals = _per_axis("causal", causal, len(sizes))
    axes = []
    for number, size in enumerate(sizes):
        size = count(f"shape[{number}]", size, 1)
        kernel, step = count("kernel_size", kernels[number], 1), count("dilation", dilations[number], 1)
        if kernel * step > size:
            raise ValueError(
                f"fastattn: kernel_size * dilation must not exceed shape[{number}] = {size}, got {kernel} * {step}"
            )
        axes.append(_axis(size, kernel, step, check.flag("causal", causals[number]), torch.device(device)))
    tokens = _Tokens(axes[:-1], axes[-1], math.prod(axis.length for axis in axes[:-1]))
    number = tokens.lines * tokens.along.length
    grid = Grid(1, 1, number, number, *check_block_size(block_size))
    row, column = _candidates(tokens, grid, torch.device(device))
    entries = Entries(torch.zeros_like(row), row, column, torch.zeros_like(row))
    kept = rules.from_candidates(tokens.sees, entries, grid, _kinds(row, column, tokens, grid))
    return BlockMask.from_entries(*kept, grid)


def _per_axis(name: str, value: Any, axes: int) -> tuple[Any, ...]:
    if not isinstance(value, tuple | list):
        return (value,) * axes
    if len(value) != axes:
        raise ValueError(f"fastattn: {name} must have one value for each of {axes} axes, got {value!r}")
    return tuple(value)


class _Axis(NamedTuple):
    """What the tokens along one axis see: from first[x] to last[x] in steps of the dilation."""

    length: int
    kernel: int
    dilation: int
    first: Tensor
    last: Tensor

    def sees(self, x: Tensor, y: Tensor) -> Tensor:
        seen = (self.first[x] <= y) & (y <= self.last[x])
        return seen if self.dilation == 1 else seen & ((y - x) % self.dilation == 0)


def _axis(length: int, kernel: int, dilation: int, causal: bool, device: torch.device) -> _Axis:
    x = torch.arange(length, device=device)
    phase, place = x % dilation, x // dilation
    if causal:
        begin, end = (place - kernel + 1).clamp(min=0), place
    else:
        places = (length - 1 - phase) // dilation + 1  # of tokens with this phase
        begin = torch.minimum((place - kernel // 2).clamp(min=0), places - kernel)
        end = begin + kernel - 1
    return _Axis(length, kernel, dilation, begin * dilation + phase, end * dilation + phase)


class _Tokens(NamedTuple):
    """The tokens, in lines along the last axis that the leading axes number."""

    leading: list[_Axis]
    along: _Axis
    lines: int

    def line(self, token: Tensor) -> Tensor:
        """Tokens past the last are in the last line."""
        return (token // self.along.length).clamp(max=self.lines - 1)

    def line_sees(self, line: Tensor, other: Tensor) -> Tensor:
        seen = torch.ones(torch.broadcast_shapes(line.shape, other.shape), dtype=torch.bool, device=line.device)
        for axis in reversed(self.leading):
            seen &= axis.sees(line % axis.length, other % axis.length)
            line, other = line // axis.length, other // axis.length
        return seen

    def sees(self, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        along = self.along.sees(i % self.along.length, j % self.along.length)
        return along & self.line_sees(self.line(i), self.line(j))


def _candidates(tokens: _Tokens, grid: Grid, device: torch.device) -> tuple[Tensor, Tensor]:
    """(row, column) of blocks, among them all that keep any pair.

    Query blocks are cut where lines end. A piece sees the same lines throughout, and of each of them one stretch.
    """
    along, length = tokens.along, tokens.along.length
    begin = torch.cat([torch.arange(0, grid.seqlen_q, step, device=device) for step in (length, grid.block_q)]).unique()
    last = torch.cat([begin[1:], begin.new_tensor([grid.seqlen_q])]) - 1
    # With a dilation, a window at the end of the axis may begin before that of an earlier token.
    lowest = along.first.flip(0).cummin(0).values.flip(0)[begin % length]
    highest = along.last.cummax(0).values[last % length]
    seen = begin.new_zeros((len(begin), 1))
    some = torch.ones_like(seen, dtype=torch.bool)
    inner = tokens.lines
    for axis in tokens.leading:
        inner //= axis.length
        x = begin // length // inner % axis.length
        others = axis.first[x, None] + axis.dilation * torch.arange(axis.kernel, device=device)
        some = (some[..., None] & (others <= axis.last[x, None])[:, None]).flatten(1)
        seen = (seen[..., None] * axis.length + others[:, None]).flatten(1)
    piece, which = some.nonzero().unbind(1)
    start = seen[piece, which] * length
    line, column = ranges((start + lowest[piece]) // grid.block_k, (start + highest[piece]) // grid.block_k + 1)
    places = torch.unique(begin[piece[line]] // grid.block_q * grid.columns + column)
    return places // grid.columns, places % grid.columns


def _kinds(row: Tensor, column: Tensor, tokens: _Tokens, grid: Grid) -> Tensor:
    """A number for each block; blocks of one number keep the same pairs.

    They do if lines end at the same places within them, the same ones of these lines see each other, and along the last
    axis windows and keys lie the same relative to the queries.
    """
    along, length, device = tokens.along, tokens.along.length, row.device

    def cut(blocks: int, block: int) -> tuple[Tensor, Tensor, Tensor]:
        """Where on its line a block begins, that again if it goes on to another line, and its lines."""
        begin = torch.arange(blocks, device=device) * block
        x = begin % length
        steps = torch.arange((block + length - 2) // length + 1, device=device) * length
        return x, torch.where(x + block > length, x, -1), tokens.line(begin[:, None] + steps)

    x_q, ends_q, lines_q = cut(grid.rows, grid.block_q)
    x_k, ends_k, lines_k = cut(grid.columns, grid.block_k)
    x = torch.arange(grid.rows * grid.block_q, device=device) % length
    windows = [(bound[x] - x).unflatten(0, (grid.rows, grid.block_q)) for bound in (along.first, along.last)]
    queries = lists.distinct(torch.cat([*windows, ends_q[:, None]], 1))[1]
    relative = torch.stack([queries[row], ends_k[column], x_k[column] - x_q[row]], 1)
    pairs = lines_q.shape[1] * lines_k.shape[1]
    seen = []
    for some in torch.arange(len(row), device=device).split(max(1, rules.ELEMENTS // pairs)):
        bits = tokens.line_sees(lines_q[row[some], :, None], lines_k[column[some], None]).flatten(1)
        seen.append(lists.pack_bits(torch.nn.functional.pad(bits, (0, -pairs % 8))))
    return lists.distinct(torch.cat([relative, torch.cat(seen)], 1))[1]
