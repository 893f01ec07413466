"""Native sparse attention: compressed keys, the blocks that these point to, and a window."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn.blockmask import BlockMask, lists, rules
from fastattn.blockmask.lists import Entries, Grid
from fastattn.blockmask.mask import BLOCK_SIZES
from fastattn.dense import arguments as check
from fastattn.dense.api import attention
from fastattn.dense.problem import default_scale
from fastattn.linear import lowrank
from fastattn.sparse.builders import by_span, count

Compress = Callable[[Tensor], Tensor]

ROWS = 64  # queries, or heads of queries, of a block: what the C++ kernels take unchanged
PIECE = 1 << 22  # weights of compressed keys held at a time, a few MiB


class _Blocks(NamedTuple):
    """Sizes in tokens."""

    compress: int
    stride: int
    select: int

    def finished(self, i: Any) -> Any:
        """How many compressed keys end at or before position i, an int or tensor; none where that is not positive."""
        return (i + 1 + self.stride - self.compress) // self.stride


def native_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gates: Tensor,
    *,
    compress_block: int = 32,
    compress_stride: int = 16,
    select_block: int = 64,
    selected: int = 16,
    window: int = 512,
    compress: Compress | tuple[Compress, Compress] | None = None,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    r"""The gated sum of three causal attentions (NSA, Yuan et al. 2025, arXiv:2502.11089).

    Compressed: keys and values of every stretch of compress_block tokens, compress_stride apart, become one; a query
    sees those whose last token is not after it. Selected: each query sees the tokens up to itself of `selected` blocks:
    the first one, its own and the one before, and those of most weight in the compressed attention. All query heads of
    a key head see the same ones: weights are summed over these heads, and a compressed key gives its weight to the
    selection blocks that it overlaps, once for each stride of tokens in common (equations 9 and 10). Window: each query
    sees the last `window` tokens, itself included.

    The choice of blocks has no gradient. It takes S ** 2 / compress_stride products for each head, a piece at a time:
    nothing of that size is stored. The mask of the selected blocks takes memory by S * selected.

    Args:
        query: (B, Hq, S, D), float32, bfloat16, float16 or float64, any strides.
        key: (B, Hkv, S, D), Hq a multiple of Hkv (grouped-query attention). Kernels go by 64 rows, which are the heads
            of a group at 64 / (Hq / Hkv) positions, and compute each block that any of these rows selects. So time is
            saved where many heads share a key head, or neighbouring queries select much the same.
        value: (B, Hkv, S, Dv).
        gates: (B, Hq, S, 3) floating point: factors of the compressed, the selected and the window attention.
        compress_block: tokens that become one, a multiple of compress_stride, at most select_block.
        compress_stride: tokens from one such stretch to the next.
        select_block: tokens of a block to select, 16, 32, 64, 128 or 256, a multiple of compress_stride.
        selected: blocks that a query sees, at least the 3 that it always does; fewer where there are fewer.
        window: tokens, at least 1.
        compress: None takes means. A function of stretches (B, Hkv, stretches, compress_block, D) that returns
            (B, Hkv, stretches, D) in the same dtype; a pair is one for keys and one for values (of Dv). Gradients go
            through it. It is not called where S is below compress_block: then there is no stretch.
        scale: factor on the scores; default 1 / sqrt(D).
        backend: the dense backend to use, by name; None takes the first that supports the calls.

    Returns:
        (B, Hq, S, Dv) over (B, S, Hq, Dv) memory. The compressed attention of a query before the end of the first
        stretch is 0.

    Raises:
        TypeError, ValueError: an argument is of the wrong type, dtype, shape, device or range.
        UnsupportedError: the named backend cannot run the calls.
    """
    query, key, value = lowrank.inputs(query, key, value, scale=scale, backend=backend)
    heads, length = query.shape[1:3]
    if key.shape[2] != length:
        raise ValueError(f"fastattn: query and key must be of one length, got {length} and {key.shape[2]}")
    _check_gates(gates, query)
    blocks = _Blocks(compress_block, compress_stride, select_block)
    _check_blocks(blocks)
    count("selected", selected, 3)
    count("window", window, 1)
    for_key, for_value = _check_compress(compress)
    scale = default_scale(query.shape[-1]) if scale is None else scale

    short_key, short_value = _compressed(key, blocks, for_key), _compressed(value, blocks, for_value)
    grid = Grid(1, 1, length, short_key.shape[2], ROWS, 64)

    def visible(i: Tensor) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(i), blocks.finished(i).clamp(min=0)

    compressed, lse = attention(
        query,
        short_key,
        short_value,
        attn_mask=by_span(visible, grid, query.device, any_length=False),
        scale=scale,
        return_lse=True,
        backend=backend,
    )

    # With the heads of a group next to each other as queries of one head, blocks of the mask are few and shared.
    groups, shared = key.shape[1], heads // key.shape[1]
    by_group, lse_by_group = (t.unflatten(1, (groups, shared)).transpose(2, 3).flatten(2, 3) for t in (query, lse))
    mask = _selection(by_group, short_key, lse_by_group, shared, scale, blocks, selected)
    chosen = attention(by_group, key, value, attn_mask=mask, scale=scale, backend=backend)
    chosen = chosen.unflatten(2, (length, shared)).transpose(2, 3).flatten(1, 2)

    near = attention(query, key, value, window=(window - 1, 0), scale=scale, backend=backend)
    parts = (compressed, chosen, near)
    weighted = [part * gate[..., None] for part, gate in zip(parts, gates.to(query.dtype).unbind(-1), strict=True)]
    return weighted[0] + weighted[1] + weighted[2]


def _check_gates(gates: Any, query: Tensor) -> None:
    shape = (*query.shape[:3], 3)
    check.tensor("gates", gates, 4, f"(B, Hq, S, 3) = {shape}")
    if not gates.is_floating_point():
        raise TypeError(f"fastattn: gates must be a floating-point tensor, got {gates.dtype}")
    if gates.shape != shape:
        raise ValueError(f"fastattn: gates must have shape (B, Hq, S, 3) = {shape}, got {tuple(gates.shape)}")
    if gates.device != query.device:
        raise ValueError(f"fastattn: gates must be on query's device {query.device}, got {gates.device}")


def _check_blocks(blocks: _Blocks) -> None:
    block, stride, select = blocks
    count("compress_block", block, 1)
    count("compress_stride", stride, 1)
    count("select_block", select, 1)
    if select not in BLOCK_SIZES:
        raise ValueError(f"fastattn: select_block must be of {', '.join(map(str, BLOCK_SIZES))}, got {select}")
    for name, size in (("compress_block", block), ("select_block", select)):
        if size % stride:
            raise ValueError(f"fastattn: {name} must be a multiple of compress_stride = {stride}, got {size}")
    if block > select:
        raise ValueError(f"fastattn: compress_block must be at most select_block = {select}, got {block}")


def _check_compress(value: Any) -> tuple[Compress | None, Compress | None]:
    pair = value if isinstance(value, tuple | list) else (value, value)
    if len(pair) != 2 or not all(one is None or callable(one) for one in pair):
        raise TypeError(f"fastattn: compress must be None, a callable or a pair of callables, got {value!r}")
    return pair[0], pair[1]


def _compressed(x: Tensor, blocks: _Blocks, compress: Compress | None) -> Tensor:
    """(B, H, S, D) to (B, H, stretches, D)."""
    if x.shape[2] < blocks.compress:
        return x[:, :, :0]
    stretches = x.unfold(2, blocks.compress, blocks.stride).transpose(3, 4)
    if compress is None:
        return stretches.mean(3)
    made = compress(stretches)
    wanted = (*stretches.shape[:3], x.shape[3])
    if not isinstance(made, Tensor) or made.shape != wanted or made.dtype != x.dtype:
        given = f"{tuple(made.shape)}, {made.dtype}" if isinstance(made, Tensor) else type(made).__name__
        raise ValueError(f"fastattn: compress must return a tensor of shape {wanted}, {x.dtype}, got {given}")
    return made


@torch.no_grad()
def _selection(
    query: Tensor,
    short_key: Tensor,
    lse: Tensor,
    shared: int,
    scale: float,
    blocks: _Blocks,
    selected: int,
) -> BlockMask:
    """The mask (B, Hkv, S * shared, S) of the selected blocks; query i * shared + h is at position i.

    lse, (B, Hkv, S * shared), is that of the compressed attention.
    """
    batch, groups = query.shape[:2]
    length = query.shape[2] // shared
    select = blocks.select
    grid = Grid(batch, groups, length * shared, length, ROWS, select)
    if length == 0:
        none = torch.empty((0, ROWS, select // 8), dtype=torch.uint8, device=query.device)
        return BlockMask.from_entries(rules.empty(query.device), none, grid)
    lines = batch * groups * shared
    at_once = max(ROWS, PIECE // max(1, lines * max(short_key.shape[2], grid.columns)) // ROWS * ROWS)
    found, tables = [], []
    for first in range(0, length, at_once):
        end = min(first + at_once, length)
        i = torch.arange(first, end, device=query.device)
        some = slice(first * shared, end * shared)
        finished = short_key[:, :, : max(blocks.finished(end - 1), 0)]
        # A key that ends after a query gets a weight too, but overlaps only blocks that are seen, or not, in any case.
        weight = _weights(query[:, :, some], finished, lse[:, :, some], scale).unflatten(2, (len(i), shared)).sum(3)
        weight = _by_selection_block(weight, blocks, grid.columns)
        seen = _seen(weight.flatten(0, 1), i, select, selected).repeat_interleave(shared, 1)
        seen = F.pad(seen, (0, 0, 0, -seen.shape[1] % ROWS)).unflatten(1, (-1, ROWS)).transpose(2, 3)
        head, row, column = seen.any(3).nonzero().unbind(1)
        found.append((head, row + first * shared // ROWS, column))
        tables.append(seen[head, row, column])
    head, row, column = map(torch.cat, zip(*found, strict=True))
    table = torch.cat(tables)
    one, tile = lists.distinct(table)
    # A byte of a tile is 8 keys, of which a row sees some first ones.
    bits = (table[one, :, None] - 8 * torch.arange(select // 8, dtype=torch.int16, device=table.device)).clamp_(0, 8)
    return BlockMask.from_entries(Entries(head, row, column, tile), ((1 << bits) - 1).to(torch.uint8), grid)


def _weights(query: Tensor, short_key: Tensor, lse: Tensor, scale: float) -> Tensor:
    """Softmax weights of compressed keys (..., C, D) for queries (..., n, D), (..., n, C)."""
    with lowrank.without_autocast(query.device):
        scores = lowrank.accumulable(query) @ lowrank.accumulable(short_key).mT
    return scores.mul_(scale).sub_(lse[..., None]).exp_()


def _by_selection_block(weight: Tensor, blocks: _Blocks, columns: int) -> Tensor:
    """Weights of compressed keys (..., C) as weights of selection blocks (..., columns).

    Counted in strides, selection block j is from j * select to (j + 1) * select - 1, compressed key c from c to
    c + block - 1.
    """
    block, select = blocks.compress // blocks.stride, blocks.select // blocks.stride
    width = select + block - 1
    overlap = torch.arange(1, width + 1, device=weight.device)
    overlap = torch.minimum(overlap, overlap.flip(0)).clamp(max=block).to(weight.dtype)
    padded = F.pad(weight, (block - 1, columns * select - weight.shape[-1]))
    return (padded.unfold(-1, width, select) * overlap).sum(-1)


def _seen(weight: Tensor, i: Tensor, select: int, selected: int) -> Tensor:
    """How many first keys of each block a query sees, (heads, queries, columns) int16, from its weights."""
    column = torch.arange(weight.shape[2], device=i.device)
    own = (i // select)[:, None]
    weight = weight.masked_fill((column == 0) | (column == own) | (column == own - 1), math.inf)
    weight = weight.masked_fill_(column > own, -math.inf)
    chosen = weight.topk(min(selected, len(column)), sorted=False).indices
    keys = (i[:, None] + 1 - select * column).clamp_(0, select).to(torch.int16)  # up to the query
    return torch.zeros_like(weight, dtype=torch.int16).scatter_(2, chosen, keys.expand(weight.shape).gather(2, chosen))
