"""The patterns of `fastattn.sparse` against their definitions, pair by pair; each test says what makes it fail."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastattn import sparse
from fastattn.blockmask import BlockMask, rules
from fastattn.blockmask.lists import FULL, Entries

BLOCKS = (16, 32, 64, 128, 256)
ROUNDS = 15
Pairs = Callable[[Tensor, Tensor], Tensor]  # i (n, 1), j (n,) to (n, n), (H, n, n) or (B, 1, n, n)
Make = Callable[[int], BlockMask]


def block_size() -> tuple[int, int]:
    return random.choice(BLOCKS), random.choice(BLOCKS)


def drawn(name: str) -> tuple[Make, Pairs]:
    """A pattern with arguments drawn at random, as a function of the length, and its definition."""
    one_sided = random.random() < 0.5
    left, right, dilation, stride = (random.randint(*b) for b in ((0, 80), (0, 80), (1, 40), (1, 150)))
    options: dict[str, Any] = {"block_size": block_size()}
    if name not in ("causal", "streaming", "prefix_lm"):
        options["causal"] = one_sided
    tokens = random.sample(range(150), random.randint(0, 5))
    marked = torch.zeros(1000, dtype=torch.bool)
    marked[tokens] = True

    def some(pairs: Pairs) -> Pairs:
        return (lambda i, j: pairs(i, j) & (j <= i)) if one_sided else pairs

    def window(i: Tensor, j: Tensor) -> Tensor:
        steps, rest = (j - i) // dilation, (j - i) % dilation
        return (rest == 0) & (-left <= steps) & (steps <= right)

    def make(**arguments: Any) -> Make:
        return functools.partial(getattr(sparse, name), **arguments, **options)

    if name == "causal":
        return make(), lambda i, j: j <= i
    if name == "sliding_window":
        if one_sided:
            return make(window=left), lambda i, j: (i - left <= j) & (j <= i)
        return make(window=(left, right)), lambda i, j: (i - left <= j) & (j <= i + right)
    if name == "dilated_window":
        return make(window=(left, right), dilation=dilation), some(window)
    if name == "global_tokens":
        return make(tokens=tokens), some(lambda i, j: marked[i] | marked[j])
    if name == "longformer":
        first = random.randint(0, 40)
        made = make(window=(left, right), dilation=dilation, global_tokens=first)
        return made, some(lambda i, j: window(i, j) | (i < first) | (j < first))
    if name == "streaming":
        sinks = random.randint(0, 40)
        return make(window=left, sinks=sinks), lambda i, j: (j <= i) & ((j < sinks) | (i - left <= j))
    if name == "strided":
        return make(stride=stride), some(lambda i, j: ((i - j).abs() < stride) | ((i - j) % stride == 0))
    if name == "fixed":
        summary = random.randint(0, stride)
        made = make(stride=stride, summary=summary)
        return made, some(lambda i, j: (i // stride == j // stride) | (j % stride >= stride - summary))
    if name == "block_local":
        return make(size=stride), some(lambda i, j: i // stride == j // stride)
    if name == "prefix_lm":
        prefix = [random.randint(0, 350) for _ in range(random.randint(1, 3))]
        given = prefix[0] if len(prefix) == 1 else prefix
        limits = torch.tensor(prefix)[:, None, None, None]
        return make(prefix=given), lambda i, j: (j < limits) | (j <= i)
    assert name == "longnet"
    heads, parts = random.randint(1, 4), random.randint(1, 3)
    segments = [random.randint(1, 300) for _ in range(parts)]
    dilations = [random.randint(1, 40) for _ in range(parts)]
    head = torch.arange(heads)[:, None, None]

    def dilated(i: Tensor, j: Tensor) -> Tensor:
        kept = torch.zeros((), dtype=torch.bool)
        for w, r in zip(segments, dilations, strict=True):
            kept = kept | ((i // w == j // w) & (i % r == head % r) & (j % r == head % r))
        return kept

    return make(segments=segments, dilations=dilations, heads=heads), some(dilated)


ANY_LENGTH = (
    "causal",
    "sliding_window",
    "dilated_window",
    "global_tokens",
    "longformer",
    "streaming",
    "strided",
    "fixed",
    "block_local",
    "prefix_lm",
    "longnet",
)
every_pattern = pytest.mark.parametrize("name", ANY_LENGTH)


def dense(pairs: Pairs, length: int) -> Tensor:
    return pairs(torch.arange(length)[:, None], torch.arange(length))


def assert_is(mask: BlockMask, expected: Tensor) -> None:
    """The mask keeps these pairs, with no block that keeps none and a tile only where a block does not keep all."""
    found = mask.to_dense()
    torch.testing.assert_close(found, expected.expand_as(found), msg=lambda text: f"{mask}: {text}")
    kept, full = 0, 0
    for head in found.flatten(0, 1):
        for rows in head.split(mask.block_size[0]):
            for block in rows.split(mask.block_size[1], dim=1):
                kept += bool(block.any())
                full += bool(block.all()) and block.shape[1] == mask.block_size[1]
    blocks = mask.lists.row_blocks
    assert len(blocks) == kept, f"{mask}: {len(blocks)} blocks, of which {kept} keep a pair"
    assert int((blocks[:, 1] == FULL).sum()) == full, f"{mask}: {full} blocks keep all pairs"


@every_pattern
def test_pairs(name: str) -> None:
    """Fails where a pattern keeps another pair than its definition, an empty block, or a full one as partial."""
    for _ in range(ROUNDS):
        make, pairs = drawn(name)
        length = random.randint(151, 300) if name == "global_tokens" else random.randint(1, 300)
        assert_is(make(length), dense(pairs, length))


@every_pattern
def test_resize(name: str) -> None:
    """Fails where a mask that is cut, or made anew for more tokens, is not the pattern of that length."""
    for _ in range(2):
        make, pairs = drawn(name)
        mask = make(random.randint(151, 200))
        for length in (random.randint(201, 300), random.randint(1, 150), random.randint(301, 400)):
            mask = mask.resize(length)
            found = mask.to_dense()
            assert torch.equal(found, dense(pairs, length).expand_as(found)), f"{mask}"


def test_documents() -> None:
    """Fails where a query sees another document, or where lengths as a tensor mean something else."""
    for _ in range(ROUNDS):
        lengths = [random.randint(0, 90) for _ in range(random.randint(1, 6))]
        document = torch.tensor([number for number, length in enumerate(lengths) for _ in range(length)])
        one_sided = random.random() < 0.5
        size = block_size()
        mask = sparse.documents(lengths, causal=one_sided, block_size=size)
        expected = document[:, None] == document
        assert_is(mask, expected.tril() if one_sided else expected)
        given = torch.tensor(lengths, dtype=torch.int32)
        assert torch.equal(sparse.documents(given, causal=one_sided, block_size=size).to_dense(), mask.to_dense())


def test_a_block_within_a_document_is_known_without_asking(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails where pairs of blocks are looked at which documents' ends show to be full."""
    asked = []

    def from_candidates(rule: Any, entries: Entries, *rest: Any) -> tuple[Entries, Tensor]:
        asked.append(int((entries.tile != FULL).sum()))
        return made(rule, entries, *rest)

    made = rules.from_candidates
    monkeypatch.setattr(rules, "from_candidates", from_candidates)
    mask = sparse.documents([1000, 1048, 2048], causal=True, block_size=16)
    partial = int((mask.lists.row_blocks[:, 1] != FULL).sum())
    # Of each query block the diagonal; of the one that the end at 1000 cuts all before, of those after it this one.
    assert asked == [partial] == [4096 // 16 + 1000 // 16 + (2048 - 1008) // 16]


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_neighborhood(axes: int) -> None:
    """Fails where a token sees another than its kernel_size nearest of its dilation class, moved inward at borders."""
    for _ in range(4 * ROUNDS):
        shape, left = [], 400
        for _ in range(axes):
            shape.append(random.randint(1, left))
            left //= shape[-1]
        random.shuffle(shape)
        dilation = [random.randint(1, min(random.choice([1, 3, 40]), size)) for size in shape]
        most = [size // step for size, step in zip(shape, dilation, strict=True)]
        kernel = [random.randint(1, min(random.choice([9, 40, 400]), size)) for size in most]
        one_sided = [random.random() < 0.4 for _ in shape]
        expected = torch.ones(1, 1)
        for size, step, width, causal in zip(shape, dilation, kernel, one_sided, strict=True):
            seen = torch.zeros(size, size)
            for token in range(size):
                alike = [other for other in range(size) if other % step == token % step]
                place = alike.index(token)
                if causal:
                    alike = alike[max(place - width + 1, 0) : place + 1]
                else:
                    first = min(max(place - width // 2, 0), len(alike) - width)
                    alike = alike[first : first + width]
                    assert token in alike
                seen[token, alike] = 1
            expected = torch.kron(expected, seen)
        mask = sparse.neighborhood(
            tuple(shape),
            kernel_size=tuple(kernel),
            dilation=tuple(dilation),
            causal=tuple(one_sided),
            block_size=block_size(),
        )
        assert_is(mask, expected.bool())


def test_neighborhood_of_one_value_for_all_axes() -> None:
    """Fails where an int or bool does not stand for each axis, or an int shape for one axis."""
    one = sparse.neighborhood((8, 9), kernel_size=3, dilation=2, causal=True)
    assert torch.equal(
        one.to_dense(),
        sparse.neighborhood((8, 9), kernel_size=(3, 3), dilation=(2, 2), causal=(True, True)).to_dense(),
    )
    window = sparse.sliding_window(50, window=(49, 0)) & sparse.sliding_window(50, window=6)
    assert torch.equal(sparse.neighborhood(50, kernel_size=7, causal=True).to_dense(), window.to_dense())


@pytest.mark.parametrize("causal", [False, True])
def test_bigbird(causal: bool) -> None:
    """Fails where a window or global block is left out, or a query block has other than random_blocks random ones."""
    for _ in range(ROUNDS):
        size, heads, seed = random.choice(BLOCKS[:3]), random.randint(1, 3), random.randrange(100)
        length = random.randint(1, 300)
        width, ends, more = random.choice([1, 3, 5]), random.randint(0, 3), random.randint(0, 4)
        mask = sparse.bigbird(
            length,
            window_blocks=width,
            global_blocks=ends,
            random_blocks=more,
            heads=heads,
            seed=seed,
            causal=causal,
            block_size=size,
        )
        blocks = -(-length // size)
        found = mask.to_dense()
        by_block = torch.zeros(heads, blocks, blocks, dtype=torch.bool)
        for head in range(heads):
            for row in range(blocks):
                may = range(row + 1 if causal else blocks)
                sees = {column for column in may if abs(row - column) <= width // 2}
                extremes = set(range(ends)) | (set() if causal else set(range(blocks - ends, blocks)))
                sees |= set(may) if row in extremes else extremes & set(may)
                block = found[0, head, row * size : (row + 1) * size]
                kept = {column for column in range(blocks) if block[:, column * size : (column + 1) * size].any()}
                assert sees <= kept <= set(may)
                assert len(kept) == min(len(sees) + more, len(may))
                by_block[head, row, list(kept)] = True
        whole = by_block.repeat_interleave(size, 1).repeat_interleave(size, 2)[:, :length, :length]
        assert_is(mask, whole.tril() if causal else whole)


def test_bigbird_draws() -> None:
    """Fails where a free block is drawn more often than another, heads share draws, or a seed does not repeat."""
    heads, size, blocks = 3000, 16, 12
    make = functools.partial(sparse.bigbird, blocks * size, random_blocks=2, heads=heads, block_size=size)
    mask = make(seed=random.randrange(1000))
    rows = mask.lists.rows[0, :, 6]
    seen = torch.stack([mask.lists.row_blocks[first:end, 0] for first, _, end, _ in rows.tolist()])
    counts = torch.bincount(seen.flatten(), minlength=blocks)
    certain = torch.tensor([0, 5, 6, 7, 11])
    assert (counts[certain] == heads).all()
    free = torch.ones(blocks, dtype=torch.bool)
    free[certain] = False
    chance = 2 / 7
    assert ((counts[free] - heads * chance).abs() < 6 * (heads * chance * (1 - chance)) ** 0.5).all(), counts
    assert len(seen.sort(1).values.unique(dim=0)) == 21  # all pairs of 7
    assert torch.equal(make(seed=1).lists.row_blocks, make(seed=1).lists.row_blocks)
    assert not torch.equal(make(seed=1).lists.row_blocks, make(seed=2).lists.row_blocks)


def test_rows_without_keys() -> None:
    """Fails where a query that no dilation takes sees a key, or one of dilation 1 sees none."""
    mask = sparse.longnet(64, segments=[16, 64], dilations=[2, 4], heads=4, block_size=16).to_dense()
    assert mask.any(-1)[0].tolist() == [[i % 2 == h % 2 or i % 4 == h for i in range(64)] for h in range(4)]
    mask = sparse.longnet(64, segments=[16, 64], dilations=[1, 4], heads=4, block_size=16).to_dense()
    assert mask.any(-1).all()


@pytest.mark.parametrize("length", [0, 1])
def test_short_sequences(length: int) -> None:
    """Fails where a mask of no token, or of one, cannot be made."""
    made = [
        sparse.causal(length),
        sparse.sliding_window(length, window=4),
        sparse.longformer(length, window=4, global_tokens=2),
        sparse.streaming(length, window=4),
        sparse.strided(length, stride=4),
        sparse.fixed(length, stride=4),
        sparse.longnet(length, segments=[4], dilations=[1]),
        sparse.block_local(length, size=4),
        sparse.documents([length]),
        sparse.prefix_lm(length, prefix=3),
        sparse.bigbird(length),
    ]
    for mask in made:
        assert torch.equal(mask.to_dense(), torch.ones(1, 1, length, length, dtype=torch.bool))


def test_a_million_tokens() -> None:
    """Fails where a mask takes memory by more than its kept blocks, or goes wrong far from the start."""
    length, tail = 1 << 20, 8192
    i, j = torch.arange(length - 128, length)[:, None], torch.arange(length - tail, length)
    near = (i - 4096 <= j) & (j <= i)
    document = (i + 1000) // 4096 == (j + 1000) // 4096
    cases = [
        (sparse.sliding_window(length, window=4096, causal=True), 33, near),
        (sparse.streaming(length, window=4096), 34, near),
        (sparse.longformer(length, window=(4096, 0), global_tokens=1), 35, near | (j < 1)),
        (sparse.documents([3096, *[4096] * 255, 1000]), 33, document & (j <= i)),
        (sparse.bigbird(length, seed=random.randrange(1000)), 10, None),
    ]
    for mask, blocks_a_row, expected in cases:
        # 16 bytes for each line of rows and columns, 20 for each block, and 2048 for each distinct tile
        most = 2 * 8192 * 16 + 20 * 8192 * blocks_a_row + 64 * 2048
        assert sum(t.numel() * t.element_size() for t in mask.lists) < most, f"{mask}"
        if expected is not None:
            assert torch.equal(mask[0, 0, -128:, -tail:].to_dense()[0, 0], expected), f"{mask}"


ERRORS: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: sparse.causal(2.0), TypeError, "seq_len must be an int, got float"),
    (lambda: sparse.causal(-1), ValueError, "seq_len must be at least 0, got -1"),
    (lambda: sparse.causal(9, block_size=48), ValueError, "block_size must be of 16, 32, 64, 128, 256, got 48"),
    (lambda: sparse.causal(9, block_size=(16, 16, 16)), TypeError, "block_size must be an int or a pair"),
    (lambda: sparse.sliding_window(9, window=None), TypeError, "window must be an int or a pair .* got None"),
    (lambda: sparse.sliding_window(9, window=(1, 2, 3)), TypeError, "window must be an int or a pair"),
    (lambda: sparse.sliding_window(9, window=-1), ValueError, r"window\[0\] must be at least 0, got -1"),
    (lambda: sparse.sliding_window(9, window=(1, True)), TypeError, r"window\[1\] must be an int, got bool"),
    (lambda: sparse.sliding_window(9, window=1, causal=1), TypeError, "causal must be a bool, got int"),
    (lambda: sparse.dilated_window(9, window=1, dilation=0), ValueError, "dilation must be at least 1, got 0"),
    (lambda: sparse.global_tokens(9, tokens=-1), ValueError, "tokens must be at least 0, got -1"),
    (lambda: sparse.global_tokens(9, tokens=[0, -1]), ValueError, r"tokens\[1\] must be at least 0, got -1"),
    (lambda: sparse.global_tokens(9, tokens=[0, 9]), ValueError, "tokens must be below seq_len = 9, got 9"),
    (lambda: sparse.global_tokens(9, tokens="12"), TypeError, "tokens must be a sequence of ints, got str"),
    (lambda: sparse.longformer(9, window=1, global_tokens=[9]), ValueError, "global_tokens must be below seq_len = 9"),
    (lambda: sparse.streaming(9, window=(1, 0)), TypeError, "window must be an int, got tuple"),
    (lambda: sparse.streaming(9, window=1, sinks=-1), ValueError, "sinks must be at least 0, got -1"),
    (lambda: sparse.bigbird(9, window_blocks=2), ValueError, "window_blocks must be odd, got 2"),
    (lambda: sparse.bigbird(9, block_size=(16, 32)), ValueError, r"block_size must be square .* got \(16, 32\)"),
    (lambda: sparse.bigbird(9, heads=0), ValueError, "heads must be at least 1, got 0"),
    (lambda: sparse.strided(9, stride=0), ValueError, "stride must be at least 1, got 0"),
    (lambda: sparse.fixed(9, stride=4, summary=5), ValueError, "summary must be at most stride = 4, got 5"),
    (lambda: sparse.longnet(9, segments=[4], dilations=[1, 2]), ValueError, "must be as many, .* got 1 and 2"),
    (lambda: sparse.longnet(9, segments=[], dilations=[]), ValueError, "at least one, got 0 and 0"),
    (lambda: sparse.longnet(9, segments=4, dilations=[1]), TypeError, "segments must be a sequence of ints, got int"),
    (lambda: sparse.block_local(9, size=0), ValueError, "size must be at least 1, got 0"),
    (lambda: sparse.documents([3, -1]), ValueError, r"lengths\[1\] must be at least 0, got -1"),
    (lambda: sparse.documents(torch.ones(2)), TypeError, r"lengths\[0\] must be an int, got float"),
    (lambda: sparse.documents(torch.ones(2, 2, dtype=torch.int64)), TypeError, "lengths must be a sequence of ints"),
    (lambda: sparse.prefix_lm(9, prefix=[1, -2]), ValueError, r"prefix\[1\] must be at least 0, got -2"),
    (
        lambda: sparse.prefix_lm(9, prefix=[]),
        ValueError,
        "prefix must have one length for each batch element, got none",
    ),
    (lambda: sparse.neighborhood((2,) * 4, kernel_size=1), TypeError, "shape must be an int or a tuple of 1 to 3 ints"),
    (lambda: sparse.neighborhood((4, 0), kernel_size=1), ValueError, r"shape\[1\] must be at least 1, got 0"),
    (
        lambda: sparse.neighborhood((4, 4), kernel_size=(1, 2, 3)),
        ValueError,
        "kernel_size must have one value for each",
    ),
    (lambda: sparse.neighborhood(8, kernel_size=5, dilation=2), ValueError, r"not exceed shape\[0\] = 8, got 5 \* 2"),
]


@pytest.mark.parametrize(("call", "error", "message"), ERRORS)
def test_errors(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    """Fails where an argument that does not fit passes, or the error does not name it and what was given."""
    with pytest.raises(error, match=f"^fastattn: .*{message}"):
        call()


def test_patterns_that_depend_on_the_length() -> None:
    """Fails where these are made longer by a rule that does not hold, or cannot be cut."""
    made = (sparse.bigbird(100), sparse.documents([60, 40]), sparse.neighborhood((10, 10), kernel_size=3))
    for mask in made:
        assert torch.equal(mask.resize(50).to_dense(), mask.to_dense()[..., :50, :50])
        with pytest.raises(ValueError, match="no pattern to go by"):
            mask.resize(101)
