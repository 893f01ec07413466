"""Options of the sparse mechanisms: softmax attention to some of the keys, for queries and keys of one sequence.

A layer with one of the patterns, or with top-k blocks, keeps attn_mask, key_padding_mask, dropout and attention
weights: masks hide pairs besides those that the mechanism leaves out. Of `is_causal` patterns take their causal form.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fastattn.blockmask.mask import check_block_size
from fastattn.dense import arguments as check
from fastattn.nn import sparse_mixers as mixers
from fastattn.nn.mixers import Mechanism
from fastattn.sparse.builders import count


@dataclass(frozen=True)
class Pattern(Mechanism):
    """A block mask that goes by positions, made once for all layers with equal options (`pattern_mask`)."""

    def __post_init__(self) -> None:
        # The pattern's function knows what is valid.
        self.mixer.pattern(self, 1, heads=1, causal=True, block_size=64, device=torch.device("cpu"))


@dataclass(frozen=True)
class Window(Pattern):
    """Attention to the tokens around each one (arXiv:2004.05150, section 3.1).

    Attributes:
        window: (left, right) tokens seen on each side besides the own one, or one number for both; causally only the
            left ones. As in `fastattn.sparse.sliding_window`.
    """

    mixer = mixers.WindowMixer
    window: int | tuple[int, int] = 256

    def __post_init__(self) -> None:
        _freeze(self, "window")
        super().__post_init__()


@dataclass(frozen=True)
class Longformer(Pattern):
    """A window, and global tokens that see all and are seen by all (arXiv:2004.05150).

    The paper gives global tokens projections of their own; here all tokens have the same.

    Attributes:
        window: as in `Window`; the paper's window of w tokens is w // 2.
        global_tokens: how many first ones, or positions; of a shorter sequence those that it has.
        dilation: positions from one key of the window to the next.
    """

    mixer = mixers.LongformerMixer
    window: int | tuple[int, int] = 256
    global_tokens: int | tuple[int, ...] = 1
    dilation: int = 1

    def __post_init__(self) -> None:
        _freeze(self, "window")
        _freeze(self, "global_tokens")
        if isinstance(self.global_tokens, tuple):
            for place, token in enumerate(self.global_tokens):
                count(f"global_tokens[{place}]", token)
        super().__post_init__()


@dataclass(frozen=True)
class BigBird(Pattern):
    """Blocks of tokens that see a window of blocks, the first and last ones, and random ones (arXiv:2007.14062).

    What is random depends on the length of the sequence, with its padding, too. Causally only first blocks are global.

    Attributes:
        window_blocks: of the window, odd.
        global_blocks: first and as many last blocks that see all and are seen by all.
        random_blocks: further blocks that each block sees, others in each head.
        block_size: tokens of a block: 16, 32, 64, 128 or 256.
        seed: of the random blocks. Layers with equal options have the same ones.
    """

    mixer = mixers.BigBirdMixer
    window_blocks: int = 3
    global_blocks: int = 1
    random_blocks: int = 3
    block_size: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        check_block_size(count("block_size", self.block_size))
        super().__post_init__()


@dataclass(frozen=True)
class Strided(Pattern):
    """The strided pattern of Sparse Transformers (arXiv:1904.10509), its two heads' pairs in every head.

    Attributes:
        stride: each token sees the last `stride` ones and every `stride`-th before; without causality likewise after.
    """

    mixer = mixers.StridedMixer
    stride: int = 128


@dataclass(frozen=True)
class Fixed(Pattern):
    """The fixed pattern of Sparse Transformers (arXiv:1904.10509), its two heads' pairs in every head.

    Attributes:
        stride: tokens of a stretch, which see each other.
        summary: last tokens of every stretch, which all see.
    """

    mixer = mixers.FixedMixer
    stride: int = 128
    summary: int = 8


@dataclass(frozen=True)
class LSH(Mechanism):
    """Attention to tokens of the same hash bucket (Reformer, arXiv:2001.04451), causal or not. Self-attention.

    Queries are the keys too, as in the paper: the layer's query projection makes both and its key projection is not
    used. The hashes are drawn once, where the paper draws them in every call. Which earlier tokens a token sees may
    depend on later ones, as in the paper, through where the sorted tokens are cut into chunks.

    Attributes:
        rounds: independent hashes.
        bucket_size: tokens of a chunk, as in `lsh_attention`.
        buckets: the most that tokens are sorted into, even; a call uses as many as its length over bucket_size.
        seed: of the hashes. None takes one from torch's generator, so that layers differ and `torch.manual_seed` fixes
            them all.
    """

    mixer = mixers.LSHMixer
    rounds: int = 4
    bucket_size: int = 64
    buckets: int = 128
    seed: int | None = None

    def __post_init__(self) -> None:
        count("rounds", self.rounds, 1)
        count("bucket_size", self.bucket_size, 1)
        if count("buckets", self.buckets, 2) % 2:
            raise ValueError(f"fastattn: buckets must be even, got {self.buckets}")
        if self.seed is not None and not (check.is_integer(self.seed) and 0 <= self.seed < 2**62):
            raise ValueError(f"fastattn: seed must be None or an int from 0 to 2**62 - 1, got {self.seed!r}")


@dataclass(frozen=True)
class TopK(Mechanism):
    """Attention to the k blocks of keys whose means fit a block of queries best (MoBA, arXiv:2502.13189).

    The choice has no gradient, and is one for all queries of a block: which earlier blocks a token sees depends on
    later tokens of its own block. A block that is padding alone is taken last; attn_mask has no part in the choice.

    Attributes:
        k: blocks seen, the own one included.
        block_size: tokens of a block: 16, 32, 64, 128 or 256.
    """

    mixer = mixers.TopKMixer
    k: int = 8
    block_size: int = 64

    def __post_init__(self) -> None:
        count("k", self.k, 1)
        check_block_size(count("block_size", self.block_size))


@dataclass(frozen=True)
class NSA(Mechanism):
    """Native sparse attention (arXiv:2502.11089): compressed keys, selected blocks, a window. Causal, self-attention.

    The three results are weighted by sigmoid(W x + b) for each head. Compressed keys and values are means; the paper's
    learned compression is not part of it. Padding takes no place, wherever it stands.

    Attributes:
        compress_block, compress_stride, select_block, selected, window: as in `native_sparse_attention`.
    """

    mixer = mixers.NSAMixer
    compress_block: int = 32
    compress_stride: int = 16
    select_block: int = 64
    selected: int = 16
    window: int = 512

    def __post_init__(self) -> None:
        stride = count("compress_stride", self.compress_stride, 1)
        check_block_size(count("select_block", self.select_block))
        for name in ("compress_block", "select_block"):
            size = count(name, getattr(self, name), 1)
            if size % stride:
                raise ValueError(f"fastattn: {name} must be a multiple of compress_stride = {stride}, got {size}")
        if self.compress_block > self.select_block:
            raise ValueError(
                f"fastattn: compress_block must be at most select_block = {self.select_block}, "
                f"got {self.compress_block}"
            )
        count("selected", self.selected, 3)
        count("window", self.window, 1)


def _freeze(options: Pattern, name: str) -> None:
    """A sequence among the options as a tuple: they must have a hash."""
    value = getattr(options, name)
    if isinstance(value, Sequence) and not isinstance(value, str):
        object.__setattr__(options, name, tuple(value))
