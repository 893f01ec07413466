"""Block masks against the bool masks that they stand for: building, algebra, slices, other block sizes, their lists."""

from __future__ import annotations

import pickle
import random
from collections import Counter

import pytest
import torch
from torch import Tensor

import fastattn
from fastattn import sparse
from fastattn.blockmask import BlockMask, rules
from fastattn.blockmask.lists import FULL, Lists
from fastattn.blockmask.mask import BLOCK_SIZES


def random_mask(batch: int, heads: int, queries: int, keys: int) -> Tensor:
    """Nothing, everything, or both of it in places."""
    share = random.choice([0.0, 0.001, 0.5, 0.99, 1.0])
    mask = torch.rand(batch, heads, queries, keys) < share
    for _ in range(3):
        first, last = sorted(random.sample(range(queries + 1), 2))
        mask[:, :, first:last, random.randrange(keys) :] = random.random() < 0.5
    return mask


def random_block_size() -> tuple[int, int]:
    return random.choice(BLOCK_SIZES), random.choice(BLOCK_SIZES)


def random_shape() -> tuple[int, int, int, int]:
    return random.choice([1, 2]), random.choice([1, 3]), random.randrange(1, 200), random.randrange(1, 200)


def check_lists(lists: Lists, mask: Tensor) -> None:
    """Every block that keeps a pair is in both lists once, in order, and partial only where it leaves a pair out."""
    block_q, block_k = lists.block_size
    queries, keys = mask.shape[2:]
    padded = torch.nn.functional.pad(mask, (0, -keys % block_k, 0, -queries % block_q), value=True)
    blocks = padded.unflatten(2, (-1, block_q)).unflatten(4, (-1, block_k)).transpose(3, 4).flatten(4)
    within = torch.nn.functional.pad(mask, (0, -keys % block_k, 0, -queries % block_q), value=False)
    some = within.unflatten(2, (-1, block_q)).unflatten(4, (-1, block_k)).transpose(3, 4).flatten(4).any(4)
    ragged = torch.zeros(some.shape[3], dtype=torch.bool)
    ragged[-1] = keys % block_k != 0  # ends within a block, which then is partial
    full = blocks.all(4) & ~ragged
    for lines, entries, kept, whole in (
        (lists.rows, lists.row_blocks, some, full),
        (lists.columns, lists.column_blocks, some.mT, full.mT),
    ):
        assert len(entries) == int(some.sum())
        for b, h in torch.cartesian_prod(*map(torch.arange, lines.shape[:2])).tolist():
            assert sorted(lines[b, h, :, 3].tolist()) == list(range(lines.shape[2]))
            counts = (lines[b, h, :, 2] - lines[b, h, :, 0])[lines[b, h, :, 3]]
            assert (counts.diff() <= 0).all()
            for n, (first, partial, end, _) in enumerate(lines[b, h].tolist()):
                both = kept[b, h, n].nonzero()[:, 0].tolist(), whole[b, h, n].nonzero()[:, 0].tolist()
                assert entries[first:partial, 0].tolist() == both[1]
                assert entries[partial:end, 0].tolist() == [block for block in both[0] if block not in both[1]]
                assert (entries[first:partial, 1] == FULL).all()
                assert (entries[partial:end, 1] >= 0).all()
    assert len(torch.unique(lists.tiles.flatten(1), dim=0)) == len(lists.tiles)


@pytest.mark.parametrize("_", range(8))
def test_from_dense(_: int) -> None:
    """Fails if a pair is lost or added, a list holds an empty block or calls a block by the wrong kind, or equal tiles
    are stored twice."""
    mask, size = random_mask(*random_shape()), random_block_size()
    made = BlockMask.from_dense(mask, block_size=size)
    assert made.block_size == size
    assert made.shape == mask.shape
    assert torch.equal(made.to_dense(), mask)
    check_lists(made.lists, mask)


@pytest.mark.parametrize("_", range(4))
def test_turns(_: int) -> None:
    """Fails if the places of a query block's key blocks are not the order in which the longest columns are taken: the
    backward would wait for ever."""
    made = BlockMask.from_dense(random_mask(*random_shape()), block_size=random_block_size())
    for columns in made.lists.columns.flatten(0, 1):
        taken: Counter[int] = Counter()
        for column in columns[:, 3].tolist():
            first, _partial, end, _nth = columns[column].tolist()
            for row, _tile, turn in made.lists.column_blocks[first:end].tolist():
                assert turn == taken[row]
                taken[row] += 1


@pytest.mark.parametrize("elements", [1, rules.ELEMENTS])
def test_from_mask_mod(elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if the rule is asked for other numbers, or goes astray in pieces."""
    monkeypatch.setattr(rules, "ELEMENTS", elements)
    batch, heads, queries, keys = random_shape()
    mask, size = random_mask(batch, heads, queries, keys), random_block_size()
    made = BlockMask.from_mask_mod(lambda b, h, i, j: mask[b, h, i, j], batch, heads, queries, keys, block_size=size)
    assert all(map(torch.equal, made.lists, BlockMask.from_dense(mask, block_size=size).lists))


@pytest.mark.parametrize("_", range(8))
def test_other_block_size(_: int) -> None:
    """Fails if cutting or joining blocks loses pairs, or leaves empty blocks and full tiles behind."""
    mask = random_mask(*random_shape())
    made = BlockMask.from_dense(mask, block_size=random_block_size())
    size = random_block_size()
    other = made.with_block_size(size)
    assert other.block_size == size
    assert torch.equal(other.to_dense(), mask)
    check_lists(other.lists, mask)


@pytest.mark.parametrize("_", range(8))
def test_algebra(_: int) -> None:
    """Fails if and, or, not differ from those of bool masks, over broadcast axes and blocks of two sizes too."""
    batch, heads, queries, keys = random_shape()
    one, two = random_mask(batch, heads, queries, keys), random_mask(1, heads, queries, keys)
    a, b = (BlockMask.from_dense(mask, block_size=random_block_size()) for mask in (one, two))
    for made, mask in ((a & b, one & two), (b & a, one & two), (a | b, one | two), (b | a, one | two), (~a, ~one)):
        assert torch.equal(made.to_dense(), mask)
        check_lists(made.lists, mask)


@pytest.mark.parametrize("_", range(8))
def test_slices(_: int) -> None:
    """Fails if a part is another part, starts within a block, or keeps what lies past its ends."""
    batch, heads, queries, keys = random_shape()
    mask, (block_q, block_k) = random_mask(batch, heads, queries, keys), random_block_size()
    made = BlockMask.from_dense(mask, block_size=(block_q, block_k))
    first_q, first_k = (random.randrange(0, length, block) for length, block in ((queries, block_q), (keys, block_k)))
    last_q, last_k = random.randint(first_q, queries), random.randint(first_k, keys)
    part = made[:, -1:, first_q:last_q, first_k:last_k]
    assert torch.equal(part.to_dense(), mask[:, -1:, first_q:last_q, first_k:last_k])
    row = random.randrange(queries)
    assert torch.equal(made[0, heads - 1, row : row + 1].to_dense(), mask[:1, heads - 1 :, row : row + 1])


def test_token_by_token() -> None:
    """Fails if a mask that grows by a token is built anew each time, or is not the pattern's."""
    built = []

    def pattern(length: int) -> BlockMask:
        built.append(length)
        return sparse.sliding_window(length, window=9, causal=True, block_size=16)

    mask = BlockMask(pattern(40).lists, 40, 40, pattern=pattern)
    for length in range(41, 200):
        mask = mask.resize(length)
        assert mask.shape == (1, 1, length, length)
        last = mask[..., length - 1 : length, :].to_dense()[0, 0, 0]
        assert last.nonzero()[:, 0].tolist() == list(range(length - 10, length))
    assert len(built) <= 4


def test_sizes_of_zero() -> None:
    """Fails if a mask without queries, keys, heads or blocks cannot be made or used."""
    for shape in ((1, 1, 0, 5), (1, 1, 5, 0), (0, 1, 5, 5), (1, 0, 5, 5)):
        mask = BlockMask.from_dense(torch.ones(shape, dtype=torch.bool))
        assert mask.to_dense().shape == shape
        assert 0 <= mask.sparsity <= 1
    q = torch.randn(1, 1, 5, 8)
    nothing = BlockMask.from_dense(torch.zeros(5, 5, dtype=torch.bool))
    assert not fastattn.attention(q, q, q, attn_mask=nothing).any()
    assert (~nothing).sparsity == 0


def test_copies() -> None:
    """Fails if a mask of a pattern cannot go to another process."""
    mask = sparse.sliding_window(100, window=5)
    copy = pickle.loads(pickle.dumps(mask))
    assert torch.equal(copy.to_dense(), mask.to_dense())
    assert mask.to("cpu") is mask
    assert mask.to("meta").device.type == "meta"


def test_what_it_says() -> None:
    """Fails if the summary, by which users judge a mask, is wrong."""
    mask = sparse.sliding_window(256, window=64, causal=True, block_size=64)
    assert mask.sparsity == 1 - 7 / 16
    assert repr(mask) == (
        "BlockMask(shape=(1, 1, 256, 256), block_size=(64, 64), 7 of 16 blocks kept (43.8%), 7 of them partial)"
    )


def test_errors() -> None:
    """Fails if a wrong argument is taken, or the message does not say what is wrong."""
    mask = sparse.causal(100, block_size=32)
    with pytest.raises(TypeError, match=r"mask must be a bool tensor, got torch\.float32"):
        BlockMask.from_dense(torch.ones(3, 3))
    with pytest.raises(ValueError, match=r"mask must have shape .* got \(3,\)"):
        BlockMask.from_dense(torch.ones(3, dtype=torch.bool))
    with pytest.raises(ValueError, match="block_size must be of 16, 32, 64, 128, 256, got 48"):
        sparse.causal(100, block_size=48)
    with pytest.raises(TypeError, match="block_size must be an int or a pair"):
        sparse.causal(100, block_size="64")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="mask_mod must be callable, got int"):
        BlockMask.from_mask_mod(3, None, None, 4, 4)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="must be flex_attention's BlockMask, got Tensor"):
        BlockMask.from_torch(torch.ones(3, 3))
    with pytest.raises(ValueError, match=r"\(1, 1, 100, 100\) and \(1, 1, 90, 90\) cannot be combined"):
        mask & sparse.causal(90)
    with pytest.raises(ValueError, match="queries must start at a multiple of 32 or lie within one block, got 5:100"):
        mask[:, :, 5:]
    with pytest.raises(ValueError, match="keys must start at a multiple of 32, got 5:100"):
        mask[:, :, :, 5:]
    with pytest.raises(ValueError, match="sliced with step 1, got 2"):
        mask[:, :, ::2]
    with pytest.raises(IndexError, match="index 1 is out of range for an axis of size 1"):
        mask[1]
    with pytest.raises(ValueError, match="no pattern to go by; it can be cut to at most 100 tokens, got 101"):
        BlockMask.from_dense(mask.to_dense()).resize(101)
    q = torch.randn(1, 2, 99, 8)
    with pytest.raises(ValueError, match=r"attn_mask, a BlockMask, must be made for .* = \(1, 2, 99, 99\)"):
        fastattn.attention(q, q, q, attn_mask=mask)
    with pytest.raises(TypeError, match=r"a pair \(BlockMask, torch\.Tensor\), got \(Tensor, BlockMask\)"):
        fastattn.attention(q, q, q, attn_mask=(torch.ones(99, 99), mask))  # type: ignore[arg-type]


def test_plot() -> None:
    """Fails if a mask cannot be drawn, small or large."""
    pytest.importorskip("matplotlib")
    for length in (100, 5000):
        image = sparse.sliding_window(length, window=16).plot().images[0].get_array()
        assert image is not None
        assert 0 < image.mean() < 0.5
