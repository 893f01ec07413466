"""Sparse patterns as block masks, by arithmetic on blocks: none is ever laid out pair by pair.

Two mechanisms make all but one of them. Some patterns keep a pair by its distance i - j alone (`_by_distance`): blocks as
far from the diagonal are alike. In the others each query sees one run of keys, perhaps only marked ones of it
(`_by_span`): the ends of the runs tell which blocks are kept, and which of these are full. The rest are unions.

Sequences are of one length, Sq = Sk = seq_len; i numbers queries and j keys. All functions take `block_size`, (queries,
keys) or one number for both, of 16, 32, 64, 128, 256, and the `device` that the mask lies on. Masks are of shape
(1, 1, seq_len, seq_len) unless a function says otherwise; `resize` takes those to any length whose pairs do not
depend on it. Arguments that do not fit raise TypeError or ValueError before any work.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastattn.blockmask import BlockMask, lists, rules
from fastattn.blockmask.lists import FULL, Entries, Grid
from fastattn.blockmask.mask import check_block_size
from fastattn.dense import arguments as check

Device = torch.device | str
BlockSize = int | tuple[int, int]
Positions = Callable[[Tensor], Tensor]
Span = Callable[[Tensor], tuple[Tensor, Tensor]]

ENDLESS = 1 << 40  # beyond any position


def causal(seq_len: int, *, block_size: BlockSize = 128, device: Device = "cpu") -> BlockMask:
    """Each query sees the keys up to its own position: j <= i."""
    return _by_distance(lambda distance: distance >= 0, 0, ENDLESS, _grid(seq_len, block_size), torch.device(device))


def sliding_window(
    seq_len: int,
    *,
    window: int | tuple[int, int],
    causal: bool = False,
    block_size: BlockSize = 128,
    device: Device = "cpu",
) -> BlockMask:
    """Each query sees the keys around it: i - left <= j <= i + right.

    Args:
        window: (left, right), the keys seen on each side besides the query's own position; one number for both.
        causal: right is 0. So `window=4096, causal=True` sees 4097 keys, the window of 4097 of Hugging Face's models.

    Source: Beltagy et al. 2020, "Longformer", arXiv:2004.05150; Child et al. 2019, arXiv:1904.10509.
    """
    return dilated_window(seq_len, window=window, dilation=1, causal=causal, block_size=block_size, device=device)


def dilated_window(
    seq_len: int,
    *,
    window: int | tuple[int, int],
    dilation: int,
    causal: bool = False,
    block_size: BlockSize = 128,
    device: Device = "cpu",
) -> BlockMask:
    """Each query sees every `dilation`-th key around it: j = i + m * dilation with -left <= m <= right.

    Args:
        window: (left, right), in keys seen, not in positions; one number for both.
        dilation: positions from one such key to the next, at least 1.
        causal: right is 0.

    Source: Beltagy et al. 2020, "Longformer: The Long-Document Transformer", arXiv:2004.05150, section 3.1.
    """
    left, right = _window(window, causal)
    step = count("dilation", dilation, 1)

    def keep(distance: Tensor) -> Tensor:
        return (distance % step == 0) & (distance >= -right * step) & (distance <= left * step)

    return _by_distance(keep, -right * step, left * step, _grid(seq_len, block_size), torch.device(device))


def global_tokens(
    seq_len: int,
    *,
    tokens: int | Sequence[int],
    causal: bool = False,
    block_size: BlockSize = 128,
    device: Device = "cpu",
) -> BlockMask:
    """Global tokens see all tokens and are seen by all; no other pair is kept.

    Args:
        tokens: their positions, each from 0 to seq_len - 1, or how many first ones there are.
        causal: only of keys j <= i.

    Source: Beltagy et al. 2020, "Longformer: The Long-Document Transformer", arXiv:2004.05150, section 3.1.
    """
    return _global_tokens("tokens", tokens, causal, _grid(seq_len, block_size), torch.device(device))


def longformer(
    seq_len: int,
    *,
    window: int | tuple[int, int],
    global_tokens: int | Sequence[int],
    dilation: int = 1,
    causal: bool = False,
    block_size: BlockSize = 128,
    device: Device = "cpu",
) -> BlockMask:
    """A (dilated) window and global tokens: `dilated_window(...) | global_tokens(...)`.

    Longformer's own window of w tokens is `window=w // 2`.

    Source: Beltagy et al. 2020, "Longformer: The Long-Document Transformer", arXiv:2004.05150.
    """
    everywhere = _global_tokens(
        "global_tokens", global_tokens, causal, _grid(seq_len, block_size), torch.device(device)
    )
    near = dilated_window(
        seq_len, window=window, dilation=dilation, causal=causal, block_size=block_size, device=device
    )
    return near | everywhere


def streaming(
    seq_len: int, *, window: int, sinks: int = 4, block_size: BlockSize = 128, device: Device = "cpu"
) -> BlockMask:
    """The first keys, to which attention drains, and a causal window: j <= i, and j < sinks or i - j <= window.

    Positions are not renumbered within the window, as StreamingLLM's cache does.

    Source: Xiao et al. 2023, "Efficient Streaming Language Models with Attention Sinks", arXiv:2309.17453.
    """
    number = count("sinks", sinks)
    near = sliding_window(seq_len, window=count("window", window), causal=True, block_size=block_size, device=device)
    return near | _by_span(_all_keys(True), near.grid, near.device, keys=lambda j: j < number)


def bigbird(
    seq_len: int,
    *,
    window_blocks: int = 3,
    global_blocks: int = 1,
    random_blocks: int = 3,
    heads: int = 1,
    seed: int = 0,
    causal: bool = False,
    block_size: BlockSize = 128,
    device: Device = "cpu",
) -> BlockMask:
    """Whole blocks: a window around the diagonal, the first and last ones of rows and columns, and random ones.

    Args:
        window_blocks: blocks of the window, odd; `causal` keeps those up to the diagonal.
        global_blocks: first and as many last blocks whose tokens see and are seen by all; first ones only if `causal`.
        random_blocks: further blocks that each query block sees, fewer where there are no more; other ones in each head.
        heads: H of the mask's shape (1, H, seq_len, seq_len).
        seed: of the random blocks, which are the same on every device.
        causal: only keys j <= i.
        block_size: also the unit of the pattern, hence square.

    Source: Zaheer et al. 2020, "Big Bird: Transformers for Longer Sequences", arXiv:2007.14062, appendix D.
    """
    width, random = count("window_blocks", window_blocks, 1), count("random_blocks", random_blocks)
    grid = _grid(seq_len, block_size, heads=count("heads", heads, 1))
    if width % 2 == 0:
        raise ValueError(f"fastattn: window_blocks must be odd, got {width}")
    if grid.block_q != grid.block_k:
        raise ValueError(f"fastattn: block_size must be square for bigbird, got {(grid.block_q, grid.block_k)}")
    blocks = grid.rows
    first = min(count("global_blocks", global_blocks), blocks)
    last = blocks if check.flag("causal", causal) else max(blocks - first, first)

    # Three ranges of key blocks for each query block, in order: global, window, global.
    row = torch.arange(blocks)
    limit = row + 1 if causal else torch.full_like(row, blocks)
    low = (row - width // 2).clamp(min=first)
    high = torch.minimum(row + width // 2 + 1, limit.clamp(max=last))
    begin = torch.stack([torch.zeros_like(row), low, limit.clamp(min=last)], 1)
    end = torch.stack([limit.clamp(max=first), torch.maximum(low, high), limit.clamp(min=last)], 1)
    if not causal:
        begin[:, 2] = last
    everything = (row < first) | (row >= last)
    begin[everything, 1:] = end[everything] = limit[everything, None]
    size = end - begin

    # Each random block is drawn as a number among those not taken yet, and moved past the taken ones before it.
    generator = torch.Generator().manual_seed(count("seed", seed))
    free = limit - size.sum(1)
    drawn = torch.empty((grid.heads, blocks, 0), dtype=torch.int64)
    for done in range(min(random, blocks)):
        fraction = torch.rand((grid.heads, blocks), generator=generator, dtype=torch.float64)
        number = (fraction * (free - done)).long()
        for taken in drawn.unbind(-1):
            number += number >= taken
        number[:, free <= done] = ENDLESS
        drawn = torch.cat([drawn, number[..., None]], -1).sort(-1).values
    some = drawn < ENDLESS
    for part in range(3):
        drawn = drawn + torch.where(drawn >= begin[:, part, None], size[:, part, None], 0)

    line, column = ranges(begin.flatten(), end.flatten())
    head = torch.arange(grid.heads)[:, None].expand(-1, len(line))
    head_r, row_r, _ = some.nonzero().unbind(1)
    head = torch.cat([head.flatten(), head_r])
    row = torch.cat([(line // 3).repeat(grid.heads), row_r])
    column = torch.cat([column.repeat(grid.heads), drawn[some]])
    on_diagonal = (row == column) if causal else torch.zeros_like(row, dtype=torch.bool)
    tiles = lists.pack_bits(torch.ones(grid.block_q, grid.block_k, dtype=torch.bool).tril())[None]
    entries = Entries(head, row, column, torch.where(on_diagonal, 0, FULL))
    return BlockMask.from_entries(Entries(*(t.to(device) for t in entries)), tiles.to(device), grid)


def strided(
    seq_len: int, *, stride: int, causal: bool = True, block_size: BlockSize = 128, device: Device = "cpu"
) -> BlockMask:
    """Each query sees the last `stride` positions and every `stride`-th before: i - j < stride, or (i - j) % stride == 0.

    The paper's two heads in one. Without `causal`, to both sides: |i - j| < stride, or |i - j| % stride == 0.

    Source: Child et al. 2019, "Generating Long Sequences with Sparse Transformers", arXiv:1904.10509, section 4.2.
    """
    step, one_sided = count("stride", stride, 1), check.flag("causal", causal)

    def keep(distance: Tensor) -> Tensor:
        kept = (distance.abs() < step) | (distance % step == 0)
        return kept & (distance >= 0) if one_sided else kept

    low = 0 if one_sided else -ENDLESS
    return _by_distance(keep, low, ENDLESS, _grid(seq_len, block_size), torch.device(device))


def fixed(
    seq_len: int,
    *,
    stride: int,
    summary: int = 1,
    causal: bool = True,
    block_size: BlockSize = 128,
    device: Device = "cpu",
) -> BlockMask:
    """Each query sees its own stretch of `stride` positions, and the last `summary` ones of every stretch.

    i // stride == j // stride, or j % stride >= stride - summary; of these j <= i if `causal`.

    Source: Child et al. 2019, "Generating Long Sequences with Sparse Transformers", arXiv:1904.10509, section 4.2,
    where stride is l and summary is c.
    """
    step = count("stride", stride, 1)
    if count("summary", summary) > step:
        raise ValueError(f"fastattn: summary must be at most stride = {step}, got {summary}")
    own = block_local(seq_len, size=step, causal=causal, block_size=block_size, device=device)
    return own | _by_span(_all_keys(causal), own.grid, own.device, keys=lambda j: j % step >= step - summary)


def longnet(
    seq_len: int,
    *,
    segments: Sequence[int],
    dilations: Sequence[int],
    heads: int = 1,
    causal: bool = True,
    block_size: BlockSize = 128,
    device: Device = "cpu",
) -> BlockMask:
    """Segments of several lengths w, each thinned by its own dilation r: every r-th position sees every r-th one.

    Head h keeps i, j where, for some pair (w, r), i // w == j // w and i % r == j % r == h % r. A pair of positions that
    several (w, r) keep counts once, in one softmax; the paper adds up softmaxes of each (w, r), weighted by their
    denominators, in which it counts as often. A query that no (w, r) takes sees no key, and its output is 0: with a dilation
    of 1 there is none.

    Args:
        segments: the lengths w; the paper's are multiples of their dilations and grow geometrically with them.
        dilations: r for each of them.
        heads: H of the mask's shape (1, H, seq_len, seq_len).
        causal: only keys j <= i.

    Source: Ding et al. 2023, "LongNet: Scaling Transformers to 1,000,000,000 Tokens", arXiv:2307.02486, section 2.
    """
    lengths, steps = integers("segments", segments, 1), integers("dilations", dilations, 1)
    if len(lengths) != len(steps) or not lengths:
        raise ValueError(
            f"fastattn: segments and dilations must be as many, at least one, got {len(lengths)} and {len(steps)}"
        )
    check.flag("causal", causal)
    grid = _grid(seq_len, block_size, heads=count("heads", heads, 1))
    head = torch.arange(grid.heads, device=device)[:, None]

    def part(length: int, step: int) -> BlockMask:
        def taken(i: Tensor) -> Tensor:
            return i % step == head % step

        return _by_span(_segments(length, causal), grid, torch.device(device), queries=taken, keys=taken)

    mask, *others = map(part, lengths, steps)
    for other in others:
        mask = mask | other
    return mask


def block_local(
    seq_len: int, *, size: int, causal: bool = False, block_size: BlockSize = 128, device: Device = "cpu"
) -> BlockMask:
    """The sequence is cut into stretches of `size` tokens that see only themselves: i // size == j // size.

    `size` has nothing to do with block_size. Of these pairs `causal` keeps j <= i.

    Source: Qiu et al. 2020, "Blockwise Self-Attention for Long Document Understanding", arXiv:1911.02972.
    """
    span = _segments(count("size", size, 1), check.flag("causal", causal))
    return _by_span(span, _grid(seq_len, block_size), torch.device(device))


def documents(
    lengths: Sequence[int] | Tensor, *, causal: bool = True, block_size: BlockSize = 128, device: Device = "cpu"
) -> BlockMask:
    """Documents packed one after another into one sequence see only themselves.

    Args:
        lengths: of the documents, (documents,); seq_len is their sum.
        causal: of these pairs, only j <= i.
    """
    sizes = torch.tensor(integers("lengths", lengths), device=device, dtype=torch.int64)
    ends = sizes.cumsum(0)
    one_sided = check.flag("causal", causal)

    def span(i: Tensor) -> tuple[Tensor, Tensor]:
        document = torch.searchsorted(ends, i, right=True)
        return (ends - sizes)[document], i + 1 if one_sided else ends[document]

    return _by_span(span, _grid(int(sizes.sum()), block_size), torch.device(device), any_length=False)


def prefix_lm(
    seq_len: int, *, prefix: int | Sequence[int], block_size: BlockSize = 128, device: Device = "cpu"
) -> BlockMask:
    """All tokens see the first `prefix` ones; beyond these the mask is causal: j < prefix or j <= i.

    Args:
        prefix: its length, or one for each batch element: then the mask is of shape (B, 1, seq_len, seq_len).

    Source: Raffel et al. 2020, "Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer",
    arXiv:1910.10683, section 3.2.1.
    """
    given = [count("prefix", prefix)] if check.is_integer(prefix) else integers("prefix", prefix)
    grid = _grid(seq_len, block_size, batch=len(given))
    lengths = torch.tensor(given, device=device, dtype=torch.int64)[:, None]

    def span(i: Tensor) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(i), torch.maximum(lengths, i + 1)

    return _by_span(span, grid, torch.device(device))


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


def _window(value: Any, causal: bool) -> tuple[int, int]:
    if check.is_integer(value):
        value = (value, value)
    if not isinstance(value, tuple | list) or len(value) != 2:
        raise TypeError(f"fastattn: window must be an int or a pair (left, right) of ints, got {value!r}")
    left, right = integers("window", value)
    return left, 0 if check.flag("causal", causal) else right


def _grid(seq_len: Any, block_size: Any, batch: int = 1, heads: int = 1) -> Grid:
    length = count("seq_len", seq_len)
    return Grid(batch, heads, length, length, *check_block_size(block_size))


def _all_keys(causal: bool) -> Span:
    one_sided = check.flag("causal", causal)

    def span(i: Tensor) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(i), i + 1 if one_sided else torch.full_like(i, ENDLESS)

    return span


def _segments(size: int, causal: bool) -> Span:
    def span(i: Tensor) -> tuple[Tensor, Tensor]:
        first = i - i % size
        return first, i + 1 if causal else first + size

    return span


def _global_tokens(name: str, value: Any, causal: bool, grid: Grid, device: torch.device) -> BlockMask:
    span = _all_keys(causal)
    if check.is_integer(value):
        number = count(name, value)
        marked: Positions = lambda i: i < number  # noqa: E731
    else:
        given = integers(name, value)
        if given and max(given) >= grid.seqlen_k:
            raise ValueError(f"fastattn: {name} must be below seq_len = {grid.seqlen_k}, got {max(given)}")
        tokens = torch.tensor(given, device=device, dtype=torch.int64)
        marked = lambda i: torch.isin(i, tokens)  # noqa: E731
    return _by_span(span, grid, device, keys=marked) | _by_span(span, grid, device, queries=marked)


def ranges(begin: Tensor, end: Tensor) -> tuple[Tensor, Tensor]:
    """(which range, number) for all numbers of the ranges begin <= number < end, each int64 (n,), one after another."""
    sizes = (end - begin).clamp(min=0)
    which = torch.repeat_interleave(sizes)
    return which, torch.arange(len(which), device=which.device) + (begin + sizes - sizes.cumsum(0))[which]


def _by_distance(keep: Positions, low: int, high: int, grid: Grid, device: torch.device) -> BlockMask:
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

    # Along the longer side, block number `line` is followed by the other side's block number line * ratio + shift.
    if by_row := block_q >= block_k:
        count, others, shift, tile = grid.rows, grid.columns, -apart.flip(0), tile.flip(0)
    else:
        count, others, shift = grid.columns, grid.rows, apart
    start = torch.arange(count, device=device) * (max(block_q, block_k) // unit)
    line, place = ranges(torch.searchsorted(shift, -start), torch.searchsorted(shift, others - start))
    other = start[line] + shift[place]
    row, column = (line, other) if by_row else (other, line)

    def pattern(length: int) -> BlockMask:
        return _by_distance(keep, low, high, grid._replace(seqlen_q=length, seqlen_k=length), device)

    return BlockMask.from_entries(
        Entries(torch.zeros_like(row), row, column, tile[place]), tiles, grid, pattern=pattern
    )


def _by_span(
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
        span: positions (n,) to (first, end), each (n,) or (batch * heads, n). Neither falls from one position to the next.
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
        return _by_span(span, resized, device, queries=queries, keys=keys)

    entries = Entries(head, row, column, torch.where(full, FULL, 0))
    kept = rules.from_candidates(rule, entries, grid, kind)
    return BlockMask.from_entries(*kept, grid, pattern=pattern if any_length else None)
