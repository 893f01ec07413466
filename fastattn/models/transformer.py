"""A language model in one file, decoder or encoder, with attention as the one thing that can be swapped.

Pre-norm blocks with RMSNorm (Zhang & Sennrich, 2019), rotary positions (Su et al., 2021), grouped-query attention
(Ainslie et al., 2023), SwiGLU (Shazeer, 2020) and tied embeddings (Press & Wolf, 2017). The form follows nanoGPT and
gpt-fast: a config, a block, a model, nothing else.

`TransformerConfig.attention` names an entry of `ATTENTION`. Two models that differ only in that name hold the same
parameters and compute the same function, so losses, speed and memory can be compared directly.
`TransformerConfig.mechanism` puts another function in attention's place, and with it parameters of its own (gates).

Rotary positions turn queries and keys of softmax attention and of all that estimates it, of retention, whose own
rotation they are, and of linear attention through a feature map, where products no longer tell distances alone. GLA and
the delta rule have none, as in their papers: what they forget tells distances.

Shape suffixes: B batch, S sequence, E embedding, H query heads, K key/value heads, D head size, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastattn import attention as fast_attention
from fastattn.dense.naive import naive_attention
from fastattn.nn import mechanisms
from fastattn.nn.mixers import Heads, Mechanism, Mixer

if TYPE_CHECKING:
    from fastattn.models.cache import Cache

AttentionFn = Callable[[Tensor, Tensor, Tensor, bool, int | None], Tensor]
#: Attention of one layer over its cache: (query (B, S, H, D), key and value (B, S, K, D), not yet turned by their
#: positions, and the layer's input (B, S, E)) to (B, H, S, D).
CachedAttentionFn = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def _fastattn(q_BHSD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor, causal: bool, window: int | None) -> Tensor:
    return fast_attention(q_BHSD, k_BKSD, v_BKSD, causal=causal, window=None if window is None else (window - 1, 0))


def _sdpa(q_BHSD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor, causal: bool, window: int | None) -> Tensor:
    gqa = q_BHSD.shape[1] != k_BKSD.shape[1]
    if window is None:
        return F.scaled_dot_product_attention(q_BHSD, k_BKSD, v_BKSD, is_causal=causal, enable_gqa=gqa)
    mask_SS = _band(q_BHSD, window)
    return F.scaled_dot_product_attention(q_BHSD, k_BKSD, v_BKSD, attn_mask=mask_SS, enable_gqa=gqa)


def _naive(q_BHSD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor, causal: bool, window: int | None) -> Tensor:
    if window is None:
        return naive_attention(q_BHSD, k_BKSD, v_BKSD, causal=causal)
    return naive_attention(q_BHSD, k_BKSD, v_BKSD, attn_mask=_band(q_BHSD, window))


def _band(q_BHSD: Tensor, window: int) -> Tensor:
    """Boolean (S, S): True where a query may see a key, itself and the `window` - 1 before it."""
    position_S = torch.arange(q_BHSD.shape[2], device=q_BHSD.device)
    age_SS = position_S[:, None] - position_S[None, :]
    return (age_SS >= 0) & (age_SS < window)


#: Self-attention by name: (query (B, H, S, D), key and value (B, K, S, D), causal, window) -> (B, H, S, D).
ATTENTION: dict[str, AttentionFn] = {"fastattn": _fastattn, "sdpa": _sdpa, "naive": _naive}


@dataclass(frozen=True)
class TransformerConfig:
    """Sizes of a `Transformer`.

    `num_kv_heads` (default: `num_heads`) below `num_heads` is grouped-query attention. `window` is the number of
    tokens each token sees, itself included (as in Mistral); None means all earlier ones. `attention` is a name in
    `ATTENTION`. `causal=False` makes an encoder, in which all tokens see all. `mechanism` is a name or options of
    `fastattn.nn`, as in `MultiheadAttention`; "linformer" by name has a quarter of max_seq_len as its keys. Raises
    ValueError for what does not fit together.
    """

    vocab_size: int = 256
    num_layers: int = 4
    num_heads: int = 4
    num_kv_heads: int | None = None
    embed_dim: int = 128
    max_seq_len: int = 512
    window: int | None = None
    attention: str = "fastattn"
    causal: bool = True
    mechanism: str | Mechanism = "flash"

    def __post_init__(self) -> None:
        for name in ("vocab_size", "num_layers", "num_heads", "num_kv_heads", "embed_dim", "max_seq_len", "window"):
            size = getattr(self, name)
            if size is not None and size < 1:
                raise ValueError(f"TransformerConfig: {name} must be at least 1, got {size}")
        if self.embed_dim % (2 * self.num_heads):
            raise ValueError(
                f"TransformerConfig: embed_dim must be a multiple of 2 * num_heads = {2 * self.num_heads} "
                f"(rotary positions pair up the channels of a head), got {self.embed_dim}"
            )
        if self.num_heads % self.kv_heads:
            raise ValueError(
                f"TransformerConfig: num_heads must be a multiple of num_kv_heads, "
                f"got num_heads={self.num_heads} and num_kv_heads={self.num_kv_heads}"
            )
        if self.attention not in ATTENTION:
            raise ValueError(f"TransformerConfig: attention must be one of {sorted(ATTENTION)}, got {self.attention!r}")
        options = self.options
        if options is not None:
            options.mixer.check_causal(self.causal)
            if self.attention != "fastattn":
                raise ValueError(
                    f"TransformerConfig: attention must be 'fastattn' with mechanism {options.mixer.name!r}, "
                    f"got {self.attention!r}"
                )
        if self.window is not None and (options is not None or not self.causal):
            raise ValueError(
                "TransformerConfig: window must be None but for causal attention with mechanism 'flash', "
                f"got {self.window}"
            )

    @property
    def options(self) -> Mechanism | None:
        """The mechanism's options; None for "flash"."""
        return mechanisms.resolve(self.mechanism, self.max_seq_len)

    @property
    def head_dim(self) -> int:
        return self.embed_dim // self.num_heads

    @property
    def kv_heads(self) -> int:
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def hidden_dim(self) -> int:
        # SwiGLU has three matrices where a plain MLP has two: 8/3 of the width keeps the usual parameter count.
        return 32 * math.ceil(8 * self.embed_dim / (3 * 32))


def rotary_table(seq_len: int, head_dim: int, base: float = 10_000.0) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotary angles, each float64 (seq_len, head_dim / 2)."""
    frequency = base ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    angle = torch.arange(seq_len, dtype=torch.float64)[:, None] * frequency
    return angle.cos(), angle.sin()


def apply_rotary(x_BSHD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate channel pairs (i, i + D/2) of `x_BSHD` by the angles of its positions.

    `cos` and `sin` are (S, D / 2), or (B, S, D / 2) where sequences stand at positions of their own.
    """
    left, right = x_BSHD.chunk(2, dim=-1)
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    return torch.cat((left * cos - right * sin, right * cos + left * sin), dim=-1).to(x_BSHD.dtype)


class SelfAttention(nn.Module):
    """Self-attention with rotary positions, (B, S, E) to (B, S, E); over a cache where `cached` is given.

    Attributes:
        mixer: what attends in place of softmax attention, if anything.
    """

    mixer: Mixer | None

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.heads = (config.num_heads, config.kv_heads, config.kv_heads)
        self.head_dim = config.head_dim
        self.causal, self.window = config.causal, config.window
        self.mixer = None
        self.attend = ATTENTION[config.attention]
        self.qkv = nn.Linear(config.embed_dim, sum(self.heads) * config.head_dim, bias=False)
        self.out = nn.Linear(config.embed_dim, config.embed_dim, bias=False)

    def forward(self, x_BSE: Tensor, cos: Tensor, sin: Tensor, cached: CachedAttentionFn | None = None) -> Tensor:
        q_BSHD, k_BSKD, v_BSKD = self.qkv(x_BSE).unflatten(-1, (-1, self.head_dim)).split(self.heads, dim=2)
        if cached is not None:
            y_BHSD = cached(q_BSHD, k_BSKD, v_BSKD, x_BSE)
        else:
            if self.mixer is None or self.mixer.rotary:
                q_BSHD, k_BSKD = apply_rotary(q_BSHD, cos, sin), apply_rotary(k_BSKD, cos, sin)
            q_BHSD, k_BKSD, v_BKSD = (t.transpose(1, 2) for t in (q_BSHD, k_BSKD, v_BSKD))
            if self.mixer is None:
                y_BHSD = self.attend(q_BHSD, k_BKSD, v_BKSD, self.causal, self.window)
            else:
                y_BHSD = self.mixer(q_BHSD, k_BKSD, v_BKSD, x_BSE, causal=self.causal)
        return self.out(y_BHSD.transpose(1, 2).flatten(2))


class SwiGLU(nn.Module):
    """Gated feed-forward layer, (B, S, E) to (B, S, E)."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.gate_up = nn.Linear(config.embed_dim, 2 * config.hidden_dim, bias=False)
        self.out = nn.Linear(config.hidden_dim, config.embed_dim, bias=False)

    def forward(self, x_BSE: Tensor) -> Tensor:
        gate, up = self.gate_up(x_BSE).chunk(2, dim=-1)
        return self.out(F.silu(gate) * up)


class Block(nn.Module):
    """One pre-norm layer: attention, then feed-forward, each added to the residual stream."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.embed_dim, eps=1e-6)
        self.attention = SelfAttention(config)
        self.feed_forward_norm = nn.RMSNorm(config.embed_dim, eps=1e-6)
        self.feed_forward = SwiGLU(config)

    def forward(self, x_BSE: Tensor, cos: Tensor, sin: Tensor, cached: CachedAttentionFn | None = None) -> Tensor:
        x_BSE = x_BSE + self.attention(self.attention_norm(x_BSE), cos, sin, cached)
        return x_BSE + self.feed_forward(self.feed_forward_norm(x_BSE))


class Transformer(nn.Module):
    """Language model over integer tokens, decoder-only or, with `causal=False`, an encoder.

    The random state of torch at construction fixes the initial weights, whatever `config.attention` is. What
    `config.mechanism` adds is drawn after them.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.embed_dim)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = nn.RMSNorm(config.embed_dim, eps=1e-6)
        cos, sin = rotary_table(config.max_seq_len, config.head_dim)
        self.register_buffer("cos", cos.float(), persistent=False)
        self.register_buffer("sin", sin.float(), persistent=False)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                # Two additions a layer to the residual stream: smaller last matrices bound its variance.
                std = 0.02 / math.sqrt(2 * config.num_layers) if name.endswith("out.weight") else 0.02
                nn.init.normal_(parameter, std=std)
        options = config.options
        if options is not None:
            heads = Heads(config.embed_dim, config.num_heads, config.kv_heads, config.head_dim)
            for module in self.modules():
                if isinstance(module, SelfAttention):
                    module.mixer = options.build(heads)

    def forward(self, tokens_BS: Tensor, targets_BS: Tensor | None = None, *, cache: Cache | None = None) -> Tensor:
        """Logits (B, S, V), or with `targets_BS` the mean cross-entropy in nats per token, a scalar.

        `tokens_BS` and `targets_BS` are int64 (B, S) with S up to `config.max_seq_len`; targets of -100 do not count.
        With `cache`, `tokens_BS` continues the sequences in it, as `hidden` says. Raises ValueError for other shapes.
        """
        if targets_BS is not None and targets_BS.shape != tokens_BS.shape:
            raise ValueError(
                f"Transformer: targets must have the shape of tokens, {tuple(tokens_BS.shape)}, "
                f"got {tuple(targets_BS.shape)}"
            )
        logits_BSV = self.logits(self.hidden(tokens_BS, cache))
        if targets_BS is None:
            return logits_BSV
        return F.cross_entropy(logits_BSV.flatten(0, 1), targets_BS.flatten())

    def hidden(self, tokens_BS: Tensor, cache: Cache | None = None, counts: Sequence[int] | None = None) -> Tensor:
        """The last layer's normalised output (B, S, E), of which `logits` makes logits.

        With `cache`, which then holds their keys and values too, the S tokens of a row continue that sequence. Where
        the cache is empty, `counts` may say how many tokens of each row are real; the padding after them is not cached
        and its output has no meaning. Raises ValueError for tokens of other shapes or that the cache has no room for.
        """
        if tokens_BS.ndim != 2 or tokens_BS.shape[1] > self.config.max_seq_len:
            raise ValueError(
                f"Transformer: tokens must be (batch, sequence) with at most max_seq_len={self.config.max_seq_len} "
                f"tokens a sequence, got shape {tuple(tokens_BS.shape)}"
            )
        if counts is not None and cache is None:
            raise ValueError("Transformer: counts must come with cache, got cache=None")
        batch, seq_len = tokens_BS.shape
        if cache is not None:
            cache.begin(self, batch, seq_len, counts)
        x_BSE = self.embedding(tokens_BS)
        for layer, block in enumerate(self.blocks):
            cached = None if cache is None else partial(cache.attend, layer)
            x_BSE = block(x_BSE, self.cos[:seq_len], self.sin[:seq_len], cached)
        if cache is not None:
            cache.end()
        return self.norm(x_BSE)

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits (..., V) of outputs (..., E) of `hidden`."""
        return F.linear(hidden, self.embedding.weight)
