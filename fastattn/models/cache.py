"""The keys and values that a `Transformer` keeps while it generates, so that a new token costs one token's work.

One mechanism serves three kinds. Keys and values lie in pages of `page_size` tokens, and each sequence has a row in a
block table that says which page holds which of its tokens (PagedAttention, Kwon et al., arXiv:2309.06180):

- static: one page a sequence, as long as the sequence may become. In their first order they are a contiguous cache.
- paged: small pages from a common pool, taken as sequences grow and given back when they end or are cropped.
- rolling: one page a sequence, a little longer than the model's window, named in every column of its row. A token then
  overwrites one that no query sees any more, and the kernel, which reads a window's keys by their positions, neither
  knows nor cares.

`Transformer.hidden` uses a cache in three calls: `begin` makes room, `attend` is each layer's attention, `end` counts
the tokens. Tokens for an empty cache (a prompt) go through the dense kernel and are stored after; later ones are turned
by their positions, appended and attended to in one `attention_with_kvcache`.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn.dense.kvcache import attention_with_kvcache
from fastattn.dense.naive import naive_attention
from fastattn.models.transformer import ATTENTION, Transformer, TransformerConfig, apply_rotary
from fastattn.nn.sparse_mixers import PatternMixer

PAGE_SIZE = 64  # steps over pages of 16 measured up to a fifth slower on a CPU; larger ones bring little


class Cache:
    """What a `Transformer` keeps of a batch of sequences of different lengths while they grow; inference only.

    Attributes:
        config: of the model that it is for.
        capacity: the most tokens a sequence may have.
        lengths: tokens of each sequence, a list of ints; empty where there are no sequences.
    """

    config: TransformerConfig
    capacity: int
    lengths: list[int]

    def clear(self) -> None:
        """Forget every sequence."""
        raise NotImplementedError

    def begin(self, model: Transformer, batch: int, seq_len: int, counts: Sequence[int] | None = None) -> None:
        """Make room for `seq_len` tokens more of each of `batch` sequences: what `Transformer.hidden` says."""
        raise NotImplementedError

    def attend(self, layer: int, q_BSHD: Tensor, k_BSKD: Tensor, v_BSKD: Tensor, x_BSE: Tensor) -> Tensor:
        """Causal attention (B, H, S, D) of one layer's new tokens, not yet turned by their positions, over all tokens.

        x_BSE is that layer's input. `lengths` do not change before `end`.
        """
        raise NotImplementedError

    def reorder(self, index: Sequence[int]) -> None:
        """Let sequence index[i] be the i-th from now on."""
        raise NotImplementedError

    def check_room(self, lengths: Sequence[int]) -> None:
        """Raise ValueError unless the sequences, or new ones where there are none, may grow to these lengths (B,)."""
        for b, length in enumerate(lengths):
            if length > self.capacity:
                raise ValueError(
                    f"fastattn: sequence {b} must have at most {self.capacity} tokens, the cache's capacity, "
                    f"got {length}"
                )

    def end(self) -> None:
        """Count the tokens of the last `begin`, which every layer has now stored."""
        self.lengths = [n + new for n, new in zip(self.lengths, self._counts, strict=True)]

    def _lengths_after(self, model: Transformer, batch: int, seq_len: int, counts: Sequence[int] | None) -> list[int]:
        """The lengths that such a `begin` leads to, checked, its prefill and counts kept."""
        if torch.is_grad_enabled():
            raise ValueError("fastattn: a cache must be used under torch.no_grad(), because it has no gradient")
        if model.config != self.config:
            raise ValueError(f"fastattn: cache must be made for this model, {model.config}, got {self.config}")
        if self.lengths and batch != len(self.lengths):
            raise ValueError(
                f"fastattn: tokens must have a row for each of the cache's {len(self.lengths)} sequences, got {batch}"
            )
        self._prefill = not any(self.lengths)
        self._counts = [seq_len] * batch if counts is None else [operator.index(n) for n in counts]
        if len(self._counts) != batch or not all(0 <= n <= seq_len for n in self._counts):
            raise ValueError(f"fastattn: counts must be {batch} numbers from 0 to {seq_len}, got {counts}")
        if not self._prefill and min(self._counts) < seq_len:
            raise ValueError(
                f"fastattn: counts must all be {seq_len} where the cache is not empty, got {self._counts}: only "
                "a prompt may be padded"
            )
        lengths = [n + new for n, new in zip(self.lengths or [0] * batch, self._counts, strict=True)]
        self.check_room(lengths)
        return lengths


class KVCache(Cache):
    """Keys and values of every layer.

    Made by `static`, `rolling` or `paged`. An empty one takes its sequences from the first tokens that the model is
    called with, and `clear` empties it again.

    Attributes:
        page_size: tokens a page.
        free_pages: pages that no sequence has.
        key, value: a tensor (pages, Hkv, page_size, D) for each layer, uninitialised where nothing was stored.
    """

    attentions: tuple[str, ...] = ("fastattn",)  # the values of TransformerConfig.attention that this class serves

    def __init__(self, model: Transformer, *, pages: int, page_size: int, capacity: int, pages_each: int) -> None:
        config, weight = model.config, model.embedding.weight
        if config.attention not in self.attentions:
            raise ValueError(
                f"fastattn: model must have attention {' or '.join(map(repr, self.attentions))} for a "
                f"{type(self).__name__}, got {config.attention!r}"
            )
        options = config.options
        pattern = options is not None and issubclass(options.mixer, PatternMixer) and options.mixer.grows
        if not (options is None or pattern) or not config.causal:
            raise ValueError(
                "fastattn: model must be causal with mechanism 'flash' to have keys and values cached, or with window, "
                f"longformer, strided or fixed, got causal={config.causal}, mechanism={config.mechanism!r}"
            )
        self._mixers = [module for module in model.modules() if isinstance(module, PatternMixer)]  # of the layers
        for name, size in (("pages", pages), ("page_size", page_size), ("capacity", capacity)):
            if size < 1:
                raise ValueError(f"fastattn: {name} must be at least 1, got {size}")
        if capacity > config.max_seq_len:
            raise ValueError(
                f"fastattn: capacity must be at most the model's max_seq_len {config.max_seq_len}, got {capacity}"
            )
        device, dtype = weight.device, weight.dtype
        if torch.is_autocast_enabled(device.type) and dtype != torch.float64:
            dtype = torch.get_autocast_dtype(device.type)
        shape = (pages, config.kv_heads, page_size, config.head_dim)
        self.config = config
        self.capacity = capacity
        self.page_size = page_size
        self.key = [torch.empty(shape, dtype=dtype, device=device) for _ in range(config.num_layers)]
        self.value = [torch.empty(shape, dtype=dtype, device=device) for _ in range(config.num_layers)]
        self._columns = -(-capacity // page_size)
        self._pages_each = min(pages_each, self._columns)  # the most that a sequence has; then it overwrites its own
        self.clear()

    @classmethod
    def static(cls, model: Transformer, batch_size: int, capacity: int | None = None) -> Self:
        """Room for `capacity` tokens (default: the model's max_seq_len) of each of `batch_size` sequences."""
        capacity = model.config.max_seq_len if capacity is None else capacity
        return cls(model, pages=batch_size, page_size=_rounded(capacity), capacity=capacity, pages_each=1)

    @classmethod
    def rolling(cls, model: Transformer, batch_size: int, append: int = 1) -> Self:
        """Room for the model's window and `append` tokens at once, whatever the length. A prompt may be longer."""
        window = model.config.window
        if window is None:
            raise ValueError("fastattn: model must have a window for a rolling cache, got window=None")
        if append < 1:
            raise ValueError(f"fastattn: append must be at least 1, got {append}")
        capacity, rows = model.config.max_seq_len, _rounded(window - 1 + append)
        return cls(model, pages=batch_size, page_size=rows, capacity=capacity, pages_each=1)

    @classmethod
    def paged(cls, model: Transformer, pages: int, page_size: int = PAGE_SIZE) -> Self:
        """A pool of `pages` pages for `page_size` tokens each, shared by as many sequences as fit."""
        capacity = model.config.max_seq_len
        return cls(model, pages=pages, page_size=page_size, capacity=capacity, pages_each=capacity)

    @property
    def free_pages(self) -> int:
        return len(self._free)

    @property
    def nbytes(self) -> int:
        """Bytes of the keys and values of all layers."""
        return sum(t.nbytes for t in (*self.key, *self.value))

    def clear(self) -> None:
        """Forget every sequence and free its pages."""
        self.lengths = []
        self._written: list[int] = []  # the longest that each sequence has been since it was empty
        self._pages: list[list[int]] = []
        self._free = list(reversed(range(len(self.key[0]))))  # from its end, so that first come pages 0, 1, ...
        self._tabulate()

    def check_room(self, lengths: Sequence[int]) -> None:
        super().check_room(lengths)
        owned = map(len, self._pages) if self._pages else [0] * len(lengths)
        pages = sum(max(0, self._needed(n) - own) for n, own in zip(lengths, owned, strict=True))
        self._check_free(pages, self.free_pages)

    def begin(self, model: Transformer, batch: int, seq_len: int, counts: Sequence[int] | None = None) -> None:
        lengths = self._lengths_after(model, batch, seq_len, counts)
        if not self._prefill:
            for b, length in enumerate(self.lengths):
                if self._lost(b, length + seq_len) > self._seen_from(length):
                    raise ValueError(
                        f"fastattn: a rolling cache for {self._rows} tokens must be given at most "
                        f"{self._rows - length + self._seen_from(length)} at once after {length}, got {seq_len}"
                    )
        if not self.lengths:
            self.lengths, self._written, self._pages = [0] * batch, [0] * batch, [[] for _ in range(batch)]
            self._tabulate()
        for b, length in enumerate(lengths):
            while len(self._pages[b]) < self._needed(length):
                self._take_page(b)
        self._prepare(model, seq_len)

    def _prepare(self, model: Transformer, seq_len: int) -> None:
        """Compute what the layers have in common."""
        device = self.key[0].device
        self._cos, self._sin = model.cos, model.sin
        if self._prefill:
            self._cos, self._sin = model.cos[:seq_len], model.sin[:seq_len]
            count_B1 = torch.tensor(self._counts, device=device)[:, None]
            position_S = torch.arange(seq_len, device=device)
            kept_BS = (position_S < count_B1) & (position_S >= count_B1 - self._rows)
            sequence, position = kept_BS.nonzero(as_tuple=True)
            page = self._table[sequence, position // self.page_size].long()
            self._source, self._target = (sequence, position), (page, slice(None), position % self.page_size)
        else:
            self._starts = torch.tensor(self.lengths, dtype=torch.int32, device=device)
            in_order = self._columns == 1 and all(pages == [b] for b, pages in enumerate(self._pages))
            self._block_table = None if in_order else self._table
            self._pattern = None
            if self._mixers:  # all of one pattern
                held = self._columns * self.page_size
                self._pattern = self._mixers[0].rows(self.lengths, seq_len, held, device)

    def attend(self, layer: int, q_BSHD: Tensor, k_BSKD: Tensor, v_BSKD: Tensor, x_BSE: Tensor) -> Tensor:
        if not self._prefill:
            return self._step(layer, q_BSHD, k_BSKD, v_BSKD)
        q_BSHD, k_BSKD = (apply_rotary(x, self._cos, self._sin) for x in (q_BSHD, k_BSKD))
        self.key[layer][self._target] = k_BSKD[self._source]
        self.value[layer][self._target] = v_BSKD[self._source]
        q_BHSD, k_BKSD, v_BKSD = (x.transpose(1, 2) for x in (q_BSHD, k_BSKD, v_BSKD))
        if self._mixers:
            return self._mixers[layer](q_BHSD, k_BKSD, v_BKSD, x_BSE, causal=True)
        return ATTENTION[self.config.attention](q_BHSD, k_BKSD, v_BKSD, True, self.config.window)

    def _step(self, layer: int, q_BSHD: Tensor, k_BSKD: Tensor, v_BSKD: Tensor) -> Tensor:
        key, value, window = self.key[layer], self.value[layer], self.config.window
        if self._block_table is None:
            key, value = key[: len(self.lengths)], value[: len(self.lengths)]
        return attention_with_kvcache(
            q_BSHD.transpose(1, 2),
            key,
            value,
            key=k_BSKD.transpose(1, 2),
            value=v_BSKD.transpose(1, 2),
            key_lengths=self._starts,
            block_table=self._block_table,
            rotary=(self._cos, self._sin),
            attn_mask=self._pattern,
            causal=True,
            window=None if window is None else (window - 1, 0),
        )

    def end(self) -> None:
        super().end()
        self._written = list(map(max, self._written, self.lengths))

    def crop(self, lengths: Sequence[int]) -> None:
        """Forget the last tokens of each sequence, so that these lengths (B,) are left; pages then unused are free.

        Raises ValueError for a length that is not between 0 and the sequence's own, or where a rolling cache has
        already overwritten tokens that the next one would see.
        """
        lengths = [operator.index(n) for n in lengths]
        if len(lengths) != len(self.lengths) or any(n < 0 or n > m for n, m in zip(lengths, self.lengths, strict=True)):
            raise ValueError(f"fastattn: lengths must be from 0 to the sequences' own, {self.lengths}, got {lengths}")
        for b, length in enumerate(lengths):
            lost = self._lost(b, length)
            if length and lost > self._seen_from(length):
                raise ValueError(
                    f"fastattn: lengths[{b}] must be 0 or at least {lost + (self.config.window or 0) - 1}, because the "
                    f"rolling cache has overwritten the first {lost} tokens, got {length}"
                )
        for b, length in enumerate(lengths):
            while len(self._pages[b]) > self._needed(length):
                self._free.append(self._pages[b].pop())
        self.lengths = lengths
        self._written = [w if n else 0 for n, w in zip(lengths, self._written, strict=True)]

    def reorder(self, index: Sequence[int]) -> None:
        """Let sequence index[i] be the i-th from now on: some of them, in any order, repeated ones (beams) as copies.

        The pages of those not named are free afterwards. Raises ValueError, before any change, for an index that is no
        sequence or where the free pages are too few for the copies.
        """
        index = [operator.index(b) for b in index]
        if not all(0 <= b < len(self.lengths) for b in index):
            raise ValueError(f"fastattn: index must name sequences 0 to {len(self.lengths) - 1}, got {index}")
        kept = set(index)
        dropped = [page for b, pages in enumerate(self._pages) if b not in kept for page in pages]
        copied = sum(len(self._pages[b]) for b in index) - sum(len(self._pages[b]) for b in kept)
        self._check_free(copied, self.free_pages + len(dropped))
        self._free += dropped
        pages: list[list[int]] = []
        for b in index:
            own = self._pages[b]
            if b not in kept:
                own = [self._free.pop() for _ in own]
                for t in (*self.key, *self.value):
                    t[own] = t[self._pages[b]]
            kept.discard(b)
            pages.append(own)
        self._pages = pages
        self.lengths = [self.lengths[b] for b in index]
        self._written = [self._written[b] for b in index]
        self._tabulate()

    @property
    def _rows(self) -> int:
        """Tokens that a sequence's pages hold: a position overwrites the one that many before it."""
        return self._pages_each * self.page_size

    def _needed(self, length: int) -> int:
        """Pages of a sequence of this length."""
        return min(-(-length // self.page_size), self._pages_each)

    def _lost(self, b: int, length: int) -> int:
        """How many of the first tokens of sequence b are overwritten once it has had this length."""
        return max(0, max(self._written[b], length) - self._rows)

    def _seen_from(self, length: int) -> int:
        """The first position that a token at position `length`, or one after it, sees."""
        return 0 if self.config.window is None else max(0, length - self.config.window + 1)

    def _check_free(self, pages: int, free: int) -> None:
        if pages > free:
            raise ValueError(
                f"fastattn: cache must have {pages} free pages of {self.page_size} tokens for this, got {free} of "
                f"{len(self.key[0])}"
            )

    def _take_page(self, b: int) -> None:
        slot = len(self._pages[b])
        self._pages[b].append(self._free.pop())
        self._table[b, slot :: self._pages_each] = self._pages[b][slot]

    def _tabulate(self) -> None:
        """Write the block table (B, columns) anew; entries without a page are never read."""
        table = torch.zeros(len(self._pages), self._columns, dtype=torch.int32)
        for b, pages in enumerate(self._pages):
            for slot, page in enumerate(pages):
                table[b, slot :: self._pages_each] = page
        self._table = table.to(self.key[0].device)


def _sdpa(q_BHSD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor, mask: Tensor | None) -> Tensor:
    gqa = q_BHSD.shape[1] != k_BKSD.shape[1]
    return F.scaled_dot_product_attention(q_BHSD, k_BKSD, v_BKSD, attn_mask=mask, enable_gqa=gqa)


def _naive(q_BHSD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor, mask: Tensor | None) -> Tensor:
    return naive_attention(q_BHSD, k_BKSD, v_BKSD, attn_mask=mask)


_MASKED: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]] = {"sdpa": _sdpa, "naive": _naive}


class TorchCache(KVCache):
    """The static cache of a model whose attention is PyTorch's: the yardstick of speed and accuracy.

    It is used as well as PyTorch allows: keys are written in place, attention reads a view up to the longest sequence,
    and there is a mask only where lengths differ, there is a window, or several tokens come at once. After a `reorder`
    the sequences are no longer in order, and every step gathers them.
    """

    attentions = ("sdpa", "naive")

    def __init__(self, model: Transformer, *, pages: int, page_size: int, capacity: int, pages_each: int) -> None:
        if page_size < capacity:
            raise ValueError(f"fastattn: cache must be static for attention {model.config.attention!r}")
        super().__init__(model, pages=pages, page_size=page_size, capacity=capacity, pages_each=pages_each)
        for t in (*self.key, *self.value):
            t.zero_()  # masked keys have weight 0, but 0 times an uninitialised NaN is NaN

    def _prepare(self, model: Transformer, seq_len: int) -> None:
        super()._prepare(model, seq_len)
        if self._prefill:
            return
        device, window = self.key[0].device, self.config.window
        position_BS = self._starts.long()[:, None] + torch.arange(seq_len, device=device)
        self._cos, self._sin = model.cos[position_BS], model.sin[position_BS]
        page_B = self._table[:, 0].long()
        self._target = (page_B[:, None], slice(None), position_BS)
        self._sequences = slice(len(page_B)) if self._block_table is None else page_B
        self._longest = max(self.lengths) + seq_len
        self._mask: Tensor | None = None
        if seq_len > 1 or window is not None or min(self.lengths) < max(self.lengths):
            age_BSL = position_BS[..., None] - torch.arange(self._longest, device=device)
            seen_BSL = (age_BSL >= 0) if window is None else (age_BSL >= 0) & (age_BSL < window)
            self._mask = seen_BSL[:, None]

    def _step(self, layer: int, q_BSHD: Tensor, k_BSKD: Tensor, v_BSKD: Tensor) -> Tensor:
        q_BSHD, k_BSKD = (apply_rotary(x, self._cos, self._sin) for x in (q_BSHD, k_BSKD))
        self.key[layer][self._target] = k_BSKD
        self.value[layer][self._target] = v_BSKD
        key, value = (t[layer][self._sequences][:, :, : self._longest] for t in (self.key, self.value))
        return _MASKED[self.config.attention](q_BSHD.transpose(1, 2), key, value, self._mask)


def _rounded(rows: int) -> int:
    # The Triton kernels are compiled for a page size: few sizes, few compilations.
    return 64 * -(-rows // 64)
