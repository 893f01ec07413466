"""Sparse patterns as block masks, by arithmetic on blocks: none is ever laid out pair by pair.

Sequences are of one length, Sq = Sk = seq_len; i numbers queries and j keys. All functions take `block_size`, (queries,
keys) or one number for both, of 16, 32, 64, 128, 256, and the `device` that the mask lies on. Masks are of shape
(1, 1, seq_len, seq_len) unless a function says otherwise, and can be resized unless it says so. Arguments that do not
fit raise TypeError or ValueError before any work.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastattn.blockmask import BlockMask, lists
from fastattn.blockmask.lists import FULL, Entries, Grid
from fastattn.blockmask.mask import check_block_size
from fastattn.dense import arguments as check
from fastattn.sparse.builders import ENDLESS, Span, by_distance, by_span, count, integers, ranges

Device = torch.device | str
BlockSize = int | tuple[int, int]


def causal(seq_len: int, *, block_size: BlockSize = 128, device: Device = "cpu") -> BlockMask:
    """Each query sees the keys up to its own position: j <= i."""
    return by_distance(lambda distance: distance >= 0, 0, ENDLESS, _grid(seq_len, block_size), torch.device(device))


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
        causal: right is 0. So `window=4096, causal=True` sees 4097 keys, the sliding_window=4097 of Hugging Face.

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

    return by_distance(keep, -right * step, left * step, _grid(seq_len, block_size), torch.device(device))


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
    return near | by_span(_all_keys(True), near.grid, near.device, keys=lambda j: j < number)


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

    Cannot be resized to a longer sequence.

    Args:
        window_blocks: blocks of the window, odd; `causal` keeps those up to the diagonal.
        global_blocks: first and as many last blocks whose tokens see and are seen by all; only first ones if `causal`.
        random_blocks: further blocks that each query block sees, fewer where there are no more; others in each head.
        heads: H of the mask's shape (1, H, seq_len, seq_len).
        seed: of the random blocks, which are the same on every device.
        causal: only keys j <= i.
        block_size: also the unit of the pattern, hence square.

    Source: Zaheer et al. 2020, "Big Bird: Transformers for Longer Sequences", arXiv:2007.14062, section 2.
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
    generator = torch.Generator().manual_seed(count("seed", seed))

    # What is not random of a query block is three ranges of key blocks: the first ones, the window, the last ones.
    row = torch.arange(blocks)
    limit = row + 1 if causal else torch.full_like(row, blocks)
    low, high = (row - width // 2).clamp(min=first), torch.minimum(row + width // 2 + 1, limit.clamp(max=last))
    begin = torch.stack([torch.zeros_like(row), low, torch.full_like(row, last)], 1)
    end = torch.stack([limit.clamp(max=first), high, limit], 1)
    sees_all = (row < first) | (row >= last)
    begin[sees_all, 1:], end[sees_all, 0] = blocks, limit[sees_all]
    size = (end - begin).clamp(min=0)

    # Random blocks are drawn as numbers among those that are left, without the ones drawn before and the three ranges.
    left = limit - size.sum(1)
    drawn = torch.empty((grid.heads, blocks, 0), dtype=torch.int64)
    for before in range(min(random, blocks)):
        fraction = torch.rand((grid.heads, blocks), generator=generator, dtype=torch.float64)
        number = (fraction * (left - before)).long()
        for taken in drawn.unbind(-1):  # in ascending order
            number += number >= taken
        number[:, left <= before] = ENDLESS
        drawn = torch.cat([drawn, number[..., None]], -1).sort(-1).values
    some = drawn < ENDLESS
    for part in range(3):
        drawn = drawn + torch.where(drawn >= begin[:, part, None], size[:, part, None], 0)

    line, certain = ranges(begin.flatten(), end.flatten())
    head = torch.cat([torch.arange(grid.heads).repeat_interleave(len(line)), some.nonzero()[:, 0]])
    row = torch.cat([(line // 3).repeat(grid.heads), some.nonzero()[:, 1]])
    column = torch.cat([certain.repeat(grid.heads), drawn[some]])
    cut = (row == column) & causal
    tiles = lists.pack_bits(torch.ones(grid.block_q, grid.block_k, dtype=torch.bool).tril())[None]
    entries = Entries(head, row, column, torch.where(cut, 0, FULL))
    return BlockMask.from_entries(Entries(*(t.to(device) for t in entries)), tiles.to(device), grid)


def strided(
    seq_len: int, *, stride: int, causal: bool = True, block_size: BlockSize = 128, device: Device = "cpu"
) -> BlockMask:
    """Each query sees the last `stride` positions and every `stride`-th one before.

    i - j < stride, or (i - j) % stride == 0, the paper's two heads in one; |i - j| in place of i - j without `causal`.

    Source: Child et al. 2019, "Generating Long Sequences with Sparse Transformers", arXiv:1904.10509, section 4.2.
    """
    step, one_sided = count("stride", stride, 1), check.flag("causal", causal)

    def keep(distance: Tensor) -> Tensor:
        kept = (distance.abs() < step) | (distance % step == 0)
        return kept & (distance >= 0) if one_sided else kept

    low = 0 if one_sided else -ENDLESS
    return by_distance(keep, low, ENDLESS, _grid(seq_len, block_size), torch.device(device))


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
    return own | by_span(_all_keys(causal), own.grid, own.device, keys=lambda j: j % step >= step - summary)


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

    Head h keeps i, j where, for some (w, r), i // w == j // w and i % r == j % r == h % r. (Where w is a multiple of r,
    as in the paper, positions might as well be counted from the segment's start.) A pair i, j that several (w, r) keep
    counts once, in one softmax; the paper takes a softmax for each (w, r) and adds them up, weighted by their
    denominators, so that there it counts as often. A query that no (w, r) takes sees no key and its output is 0; with a
    dilation of 1 among them there is none, as each query sees at least itself.

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

        return by_span(_segments(length, causal), grid, torch.device(device), queries=taken, keys=taken)

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
    return by_span(span, _grid(seq_len, block_size), torch.device(device))


def documents(
    lengths: Sequence[int] | Tensor, *, causal: bool = True, block_size: BlockSize = 128, device: Device = "cpu"
) -> BlockMask:
    """Documents packed one after another into one sequence see only themselves.

    Cannot be resized to a longer sequence.

    Args:
        lengths: of the documents, (documents,); seq_len is their sum.
        causal: of these pairs, only j <= i.
    """
    given = integers("lengths", lengths)
    sizes = torch.tensor(given, device=device, dtype=torch.int64)
    ends = sizes.cumsum(0)
    one_sided = check.flag("causal", causal)

    def span(i: Tensor) -> tuple[Tensor, Tensor]:
        document = torch.searchsorted(ends, i, right=True)
        return (ends - sizes)[document], i + 1 if one_sided else ends[document]

    return by_span(span, _grid(sum(given), block_size), torch.device(device), any_length=False)


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
    if not given:
        raise ValueError("fastattn: prefix must have one length for each batch element, got none")
    grid = _grid(seq_len, block_size, batch=len(given))
    lengths = torch.tensor(given, device=device, dtype=torch.int64)[:, None]

    def span(i: Tensor) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(i), torch.maximum(lengths, i + 1)

    return by_span(span, grid, torch.device(device))


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
    first, given = (count(name, value), []) if check.is_integer(value) else (0, integers(name, value))
    if given and max(given) >= grid.seqlen_k:
        raise ValueError(f"fastattn: {name} must be below seq_len = {grid.seqlen_k}, got {max(given)}")
    tokens = torch.tensor(given, device=device, dtype=torch.int64)
    span = _all_keys(causal)

    def marked(i: Tensor) -> Tensor:
        return (i < first) | torch.isin(i, tokens)

    return by_span(span, grid, device, keys=marked) | by_span(span, grid, device, queries=marked)
