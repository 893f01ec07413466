"""Mixers of the sparse family. Some are softmax attention under a block mask, and leave attending to the layer."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastattn import sparse
from fastattn.blockmask import BlockMask, Lists
from fastattn.blockmask.lists import to_dense
from fastattn.blockmask.mask import CPU_BLOCK
from fastattn.dense.api import attention
from fastattn.linear.lowrank import accumulable, without_masked
from fastattn.nn.mixers import Heads, Mixer, carries_state

if TYPE_CHECKING:
    from fastattn.nn.sparse_mechanisms import LSH, NSA, BigBird, Fixed, Longformer, Pattern, Strided, TopK, Window


class SparseMixer(Mixer):
    """A mixer without a state, that runs on the dense backends."""

    family = "dense"

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, x: Tensor | None, *, causal: bool, **options: Any
    ) -> Any:
        if carries_state(options):
            raise ValueError(f"fastattn: initial_state and return_state must be off with {self.name}: it has no state")
        options = {name: option for name, option in options.items() if name in ("key_mask", "backend")}
        return super().forward(query, key, value, x, causal=causal, **options)


class MaskMixer(SparseMixer):
    """Softmax attention to the pairs that `block_mask` keeps.

    `MultiheadAttention` takes that mask into its own softmax attention, with all that this can do.
    """

    #: Whether the causal mask of a sequence is part of that of a longer one, so that a cache of keys can serve it.
    grows: ClassVar[bool] = False

    def block_mask(self, query: Tensor, key: Tensor, *, causal: bool, key_mask: Tensor | None = None) -> BlockMask:
        """For heads (B, Hq, S, D) and (B, Hkv, S, D): (B or 1, Hq or 1, S, S); key_mask is (B, S), True keeps."""
        raise NotImplementedError

    def mix(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        x: Any,
        *,
        causal: bool,
        key_mask: Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        self.check_lengths(query.shape[2], key.shape[2])
        mask = self.block_mask(query, key, causal=causal, key_mask=key_mask)
        both = mask if key_mask is None else (mask, key_mask[:, None, None])
        return attention(query, key, value, attn_mask=both, **options)

    @classmethod
    def check_lengths(cls, query: Any, key: Any) -> None:
        """Raise ValueError unless they are equal: the length of query and of key, or lists of such."""
        if query != key:
            raise ValueError(
                f"fastattn: query and key must be of one length with {cls.name}, which is for self-attention, "
                f"got {query} and {key}"
            )


class PatternMixer(MaskMixer):
    """A mask that goes by positions alone."""

    options: Pattern
    grows = True

    def __init__(self, options: Pattern, heads: Heads, **_: Any) -> None:
        super().__init__(options, heads)

    @staticmethod
    def pattern(options: Any, length: int, *, heads: int, causal: bool, **grid: Any) -> BlockMask:
        """The mask (1, heads or 1, length, length); grid is block_size and device, as `fastattn.sparse` takes them."""
        raise NotImplementedError

    def block_mask(self, query: Tensor, key: Tensor, *, causal: bool, key_mask: Tensor | None = None) -> BlockMask:
        return pattern_mask(self.options, query.shape[2], self.heads.num_heads, causal, query.device)

    def rows(self, starts: Sequence[int], number: int, length: int, device: torch.device) -> BlockMask:
        """The causal mask (B or 1, H or 1, number, length) of so many queries of each sequence, from starts[b] on."""
        starts = starts[:1] if len(set(starts)) == 1 else starts
        whole = pattern_mask(self.options, length, self.heads.num_heads, True, device)
        parts = [to_dense(whole.lists, (start, start + number), length) for start in starts]
        return BlockMask.from_dense(torch.cat(parts), block_size=CPU_BLOCK)


def pattern_mask(options: Pattern, length: int, heads: int, causal: bool, device: torch.device) -> BlockMask:
    """The mask of such a pattern, one object for all layers and calls that need the same."""
    if torch.compiler.is_compiling():
        length = range(length).stop  # a number, where the compiler has a symbol
        return BlockMask(Lists(*_constant_lists(options, length, heads, causal, device)), length, length)
    return _pattern_mask(options, length, heads, causal, device)


@torch.compiler.assume_constant_result
def _constant_lists(
    options: Pattern, length: int, heads: int, causal: bool, device: torch.device
) -> tuple[Tensor, ...]:
    # Of a compiled graph tensors can be constants, but not the mask.
    return tuple(_pattern_mask(options, length, heads, causal, device).kernel_lists(None))


@functools.lru_cache(maxsize=32)
def _pattern_mask(options: Pattern, length: int, heads: int, causal: bool, device: torch.device) -> BlockMask:
    # Blocks that the device's kernels take as they are. A tensor made in inference mode could not be used in training.
    block = CPU_BLOCK if device.type == "cpu" else (128, 128)
    with torch.inference_mode(False):
        mask = options.mixer.pattern(options, length, heads=heads, causal=causal, block_size=block, device=device)
        mask.kernel_lists(None)  # which the mask keeps too
    return mask


class WindowMixer(PatternMixer):
    name = "window"

    @staticmethod
    def pattern(options: Window, length: int, *, heads: int, causal: bool, **grid: Any) -> BlockMask:
        return sparse.sliding_window(length, window=options.window, causal=causal, **grid)


class LongformerMixer(PatternMixer):
    name = "longformer"

    @staticmethod
    def pattern(options: Longformer, length: int, *, heads: int, causal: bool, **grid: Any) -> BlockMask:
        tokens = options.global_tokens
        if isinstance(tokens, tuple):
            tokens = tuple(token for token in tokens if token < length)
        return sparse.longformer(
            length, window=options.window, global_tokens=tokens, dilation=options.dilation, causal=causal, **grid
        )


class BigBirdMixer(PatternMixer):
    name = "bigbird"
    grows = False  # other random blocks for other lengths

    @staticmethod
    def pattern(options: BigBird, length: int, *, heads: int, causal: bool, **grid: Any) -> BlockMask:
        return sparse.bigbird(
            length,
            window_blocks=options.window_blocks,
            global_blocks=options.global_blocks,
            random_blocks=options.random_blocks,
            heads=heads,
            seed=options.seed,
            causal=causal,
            block_size=options.block_size,
            device=grid["device"],
        )


class StridedMixer(PatternMixer):
    name = "strided"

    @staticmethod
    def pattern(options: Strided, length: int, *, heads: int, causal: bool, **grid: Any) -> BlockMask:
        return sparse.strided(length, stride=options.stride, causal=causal, **grid)


class FixedMixer(PatternMixer):
    name = "fixed"

    @staticmethod
    def pattern(options: Fixed, length: int, *, heads: int, causal: bool, **grid: Any) -> BlockMask:
        return sparse.fixed(length, stride=options.stride, summary=options.summary, causal=causal, **grid)


class TopKMixer(MaskMixer):
    name = "topk"
    options: TopK

    def __init__(self, options: TopK, heads: Heads, **_: Any) -> None:
        super().__init__(options, heads)

    @torch.compiler.disable
    @torch.no_grad()
    def block_mask(self, query: Tensor, key: Tensor, *, causal: bool, key_mask: Tensor | None = None) -> BlockMask:
        size = self.options.block_size
        if key_mask is not None:
            query, key = self._without_padding(query, key, key_mask)
        return sparse.topk_block_mask(query, key, k=self.options.k, block_size=size, causal=causal)

    def _without_padding(self, query: Tensor, key: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys whose blocks have the means of the tokens that are kept; products with others are lowest."""
        length, size = keep.shape[1], self.options.block_size
        kept = F.pad(keep, (0, -length % size)).unflatten(1, (-1, size)).sum(2)
        tokens = (length - size * torch.arange(kept.shape[1], device=keep.device)).clamp(max=size)
        query, key = (accumulable(without_masked(t, keep)) for t in (query, key))
        factor = tokens / kept.clamp(min=1).to(key.dtype)
        # One more channel, of which all queries have 1.
        offset = factor.new_zeros(factor.shape).masked_fill(kept == 0, torch.finfo(key.dtype).min / size)
        factor, offset = (t.repeat_interleave(size, 1)[:, None, :length, None] for t in (factor, offset))
        key = torch.cat([key * factor, offset.expand(*key.shape[:3], 1)], 3)
        return F.pad(query * factor, (0, 1), value=1.0), key


class LSHMixer(SparseMixer):
    """Reformer's hashes and attention.

    Attributes:
        rotations: (rounds, num_heads, head_dim, buckets / 2), a buffer, of which a call on shorter sequences uses the
            first directions. The state dict has it.
    """

    name = "lsh"
    options: LSH
    rotations: Tensor

    def __init__(self, options: LSH, heads: Heads, **factory: Any) -> None:
        super().__init__(options, heads)
        shape = (options.rounds, heads.num_heads, heads.head_dim, options.buckets // 2)
        self.register_buffer("rotations", torch.empty(shape, **factory))
        self.seed = int(torch.randint(2**31, ())) if options.seed is None else options.seed
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the directions of the seed, the same on every device."""
        rounds, heads, head_dim, half = self.rotations.shape
        generator = torch.Generator().manual_seed(self.seed)
        drawn = sparse.hash_rotations(rounds, heads, head_dim, 2 * half, generator=generator, dtype=torch.float32)
        self.rotations.copy_(drawn)

    def mix(self, query: Tensor, key: Tensor, value: Tensor, x: Any, *, causal: bool, **options: Any) -> Tensor:
        if x is None:
            raise ValueError("fastattn: query and key must be the same tensor with lsh: one projection makes both")
        size = self.options.bucket_size
        half = min(max(1, -(-query.shape[2] // (2 * size))), self.rotations.shape[3])
        group = self.heads.num_heads // self.heads.kv_heads
        return sparse.lsh_attention(
            query,
            value.repeat_interleave(group, 1) if group > 1 else value,
            rotations=self.rotations[..., :half],
            bucket_size=size,
            causal=causal,
            **options,
        )


class NSAMixer(SparseMixer):
    name = "nsa"
    recurrent = True
    options: NSA

    def __init__(self, options: NSA, heads: Heads, **factory: Any) -> None:
        super().__init__(options, heads)
        self.gate = nn.Linear(heads.embed_dim, 3 * heads.num_heads, **factory)

    def mix(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        x: Any,
        *,
        causal: bool,
        key_mask: Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        gates = torch.sigmoid(self.gate(x)).unflatten(-1, (self.heads.num_heads, 3)).transpose(1, 2)
        order = None
        if key_mask is not None:
            # Padding goes behind all tokens, which then do not see it.
            order = torch.argsort(~key_mask, dim=1, stable=True)
            query, key, value = (_take(without_masked(t, key_mask), order) for t in (query, key, value))
            gates = _take(gates, order)
        out = sparse.native_sparse_attention(
            query,
            key,
            value,
            gates,
            compress_block=self.options.compress_block,
            compress_stride=self.options.compress_stride,
            select_block=self.options.select_block,
            selected=self.options.selected,
            window=self.options.window,
            **options,
        )
        return out if order is None else _take(out, torch.argsort(order, dim=1))


def _take(x: Tensor, order: Tensor) -> Tensor:
    """x (B, H, S, D) with the tokens of each sequence in the order (B, S)."""
    return x.gather(2, order[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))
