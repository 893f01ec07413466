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
from fastattn.sparse.patterns import BlockSize, Device, count, ranges


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

    Along an axis a token sees exactly kernel_size positions `dilation` apart, itself among them: as many on each side (of
    an even number one more before it), or, near a border, the window moved inward. Where the axis is causal, it sees the
    last kernel_size of these up to itself, fewer at the start. kernel_size, dilation and causal are one value for all axes
    or one for each.

    Args:
        shape: tokens along each of 1 to 3 axes, flattened with the last axis fastest; the mask is (1, 1, n, n), n their
            product.
        kernel_size: at least 1; kernel_size * dilation must not exceed the axis.
        dilation: at least 1.
        block_size: (queries, keys) or one number for both, of 16, 32, 64, 128, 256.

    Raises:
        TypeError, ValueError: an argument does not fit, before any work.

    Source: Hassani et al. 2023, "Neighborhood Attention Transformer", arXiv:2204.07143; Hassani and Shi 2022, "Dilated
    Neighborhood Attention Transformer", arXiv:2209.15001.
    """
    sizes = (shape,) if check.is_integer(shape) else shape
    if not isinstance(sizes, tuple | list) or not 1 <= len(sizes) <= 3:
        raise TypeError(f"fastattn: shape must be an int or a tuple of 1 to 3 ints, got {shape!r}")
    axes = []
    for number, (size, kernel, step, one_sided) in enumerate(
        zip(
            sizes,
            *(
                _per_axis(*given, len(sizes))
                for given in (("kernel_size", kernel_size), ("dilation", dilation), ("causal", causal))
            ),
            strict=True,
        )
    ):
        size = count(f"shape[{number}]", size, 1)
        kernel, step = count("kernel_size", kernel, 1), count("dilation", step, 1)
        if kernel * step > size:
            raise ValueError(
                f"fastattn: kernel_size * dilation must not exceed axis {number} of {size}, got {kernel} * {step}"
            )
        axes.append(_axis(size, kernel, step, check.flag("causal", one_sided), torch.device(device)))
    tokens = math.prod(axis.length for axis in axes)
    grid = Grid(1, 1, tokens, tokens, *check_block_size(block_size))
    return _build(axes[:-1], axes[-1], grid, torch.device(device))


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
        return (self.first[x] <= y) & (y <= self.last[x]) & ((y - x) % self.dilation == 0)


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


def _build(leading: list[_Axis], along: _Axis, grid: Grid, device: torch.device) -> BlockMask:
    """The mask over lines of tokens along the last axis, which the leading axes number."""
    length, lines = along.length, grid.seqlen_q // along.length

    def seen_lines(line: Tensor, other: Tensor) -> Tensor:
        seen = torch.ones((), dtype=torch.bool, device=device)
        for axis in reversed(leading):
            seen = seen & axis.sees(line % axis.length, other % axis.length)
            line, other = line // axis.length, other // axis.length
        return seen.expand(torch.broadcast_shapes(line.shape, other.shape))

    def line_of(token: Tensor) -> Tensor:  # tokens past the last are in the last line
        return (token // length).clamp(max=lines - 1)

    def rule(head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return seen_lines(line_of(i), line_of(j)) & along.sees(i % length, j % length)

    row, column = _candidates(leading, along, grid, device)
    kind = _kinds(row, column, along, grid, line_of, seen_lines)
    entries = Entries(torch.zeros_like(row), row, column, torch.zeros_like(row))
    return BlockMask.from_entries(*rules.from_candidates(rule, entries, grid, kind), grid)


def _candidates(leading: list[_Axis], along: _Axis, grid: Grid, device: torch.device) -> tuple[Tensor, Tensor]:
    """Blocks, (row, column), of which some query's first to last key of a line lies in them.

    Query blocks are cut where lines end. A piece sees the same lines throughout, and of each a stretch.
    """
    length = along.length
    begin = torch.cat([torch.arange(0, grid.seqlen_q, step, device=device) for step in (length, grid.block_q)]).unique()
    last = torch.cat([begin[1:], begin.new_tensor([grid.seqlen_q])]) - 1
    # A window that meets the end of the axis may begin before that of an earlier token of another phase.
    lowest = along.first.flip(0).cummin(0).values.flip(0)[begin % length]
    highest = along.last.cummax(0).values[last % length]
    lines, line = begin.new_zeros((len(begin), 1)), begin // length
    some = torch.ones_like(lines, dtype=torch.bool)
    size = grid.seqlen_q // length
    for axis in leading:
        size //= axis.length
        x = line // size % axis.length
        seen = axis.first[x, None] + axis.dilation * torch.arange(axis.kernel, device=device)
        some = (some[..., None] & (seen <= axis.last[x, None])[:, None]).flatten(1)
        lines = (lines[..., None] * axis.length + seen[:, None]).flatten(1)
    piece, which = some.nonzero().unbind(1)
    start = lines[piece, which] * length
    block, column = ranges((start + lowest[piece]) // grid.block_k, (start + highest[piece]) // grid.block_k + 1)
    places = torch.unique(begin[piece[block]] // grid.block_q * grid.columns + column)
    return places // grid.columns, places % grid.columns


def _kinds(row: Tensor, column: Tensor, along: _Axis, grid: Grid, line_of: Any, seen_lines: Any) -> Tensor:
    """A number for each block; blocks of one number keep the same pairs.

    They do if lines end at the same places in them, the same ones of these lines see each other, and along the last
    axis the queries' windows and the keys lie the same relative to the queries.
    """
    length, device = along.length, row.device
    x = torch.arange(grid.rows * grid.block_q, device=device) % length
    relative = [(t[x] - x).unflatten(0, (grid.rows, grid.block_q)) for t in (along.first, along.last)]
    starts = []
    ending = []
    of_block = []
    for blocks, block in ((grid.rows, grid.block_q), (grid.columns, grid.block_k)):
        token = torch.arange(blocks, device=device) * block
        starts.append(token % length)
        ending.append(torch.where(starts[-1] + block > length, starts[-1], -1))
        most = (block + length - 2) // length + 1
        of_block.append(line_of(token[:, None] + torch.arange(most, device=device) * length))
    windows = lists.distinct(torch.cat([*relative, ending[0][:, None]], 1))[1]
    across = of_block[0].shape[1] * of_block[1].shape[1]
    seen = []
    for some in torch.arange(len(row), device=device).split(max(1, rules.ELEMENTS // across)):
        pairs = seen_lines(of_block[0][row[some], :, None], of_block[1][column[some], None])
        seen.append(lists.pack_bits(torch.nn.functional.pad(pairs.flatten(1), (0, -across % 8))))
    columns = [windows[row], ending[1][column], starts[1][column] - starts[0][row]]
    return lists.distinct(torch.cat([torch.stack(columns, 1), torch.cat(seen)], 1))[1]
