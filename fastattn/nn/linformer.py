"""`LinformerProjection`: the learned or pooling step that makes Linformer's few keys and values of many."""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastattn.dense import arguments as check
from fastattn.dense.api import attention
from fastattn.linear import linformer, lowrank

Kind = Literal["linear", "mean", "max", "conv"]
Share = Literal["none", "heads", "key_value"]


class LinformerProjection(nn.Module):
    """Keys and values of up to seq_len positions to num_keys, and attention to those (Wang et al. 2020, 2006.04768).

    `layer(query, key, value)` is the attention, `layer.project(key, value)` the projection alone. One object given to
    several layers of a model is the paper's layer-wise sharing.

    Kinds other than "linear" divide the seq_len positions into num_keys windows, of equal length to within one
    position, whatever the length of the input. A window in which no key takes part is not attended to.

    Args:
        seq_len: n, the most keys that an input may have.
        num_keys: K, at most seq_len.
        num_heads: key heads, where each has projections of its own (share="none").
        kind: "linear", learned matrices (K, n); "mean" or "max" over each window's present keys, without parameters;
            "conv", a learned kernel over each window, with stride as long as the window, the same for all channels (a
            shorter window has the kernel's first elements).
        share: "heads", one projection for the keys of all heads and one for their values; "key_value", one for both;
            "none", two for each head.
        device, dtype: of the parameters.

    Attributes:
        key_weight, value_weight: linear (K, n), conv (kernel,), with the axis num_heads in front for share="none". None
            where there are no such parameters; with share="key_value", value_weight is None.

    Matrices start as the authors' do (fairseq, examples/linformer): uniform Xavier with gain 1 / sqrt(2). The paper
    leaves the start of a convolution open; here it starts as the mean.

    Raises:
        TypeError, ValueError: sizes that are no positive integers, num_keys above seq_len, an unknown kind or share.
    """

    key_weight: nn.Parameter | None
    value_weight: nn.Parameter | None

    def __init__(
        self,
        seq_len: int,
        num_keys: int,
        *,
        num_heads: int = 1,
        kind: Kind = "linear",
        share: Share = "heads",
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        for name, size in (("seq_len", seq_len), ("num_keys", num_keys), ("num_heads", num_heads)):
            lowrank.positive(name, size)
        if num_keys > seq_len:
            raise ValueError(f"fastattn: num_keys must be at most seq_len = {seq_len}, got {num_keys}")
        for name, choice, choices in (("kind", kind, get_args(Kind)), ("share", share, get_args(Share))):
            if choice not in choices:
                raise ValueError(f"fastattn: {name} must be one of {', '.join(choices)}, got {choice!r}")
        super().__init__()
        self.seq_len, self.num_keys, self.num_heads = seq_len, num_keys, num_heads
        self.kind, self.share = kind, share
        shapes = {"linear": (num_keys, seq_len), "conv": (-(-seq_len // num_keys),)}
        for name in ("key_weight", "value_weight"):
            weight = None
            if kind in shapes and not (name == "value_weight" and share == "key_value"):
                heads = (num_heads,) if share == "none" else ()
                weight = nn.Parameter(torch.empty(heads + shapes[kind], device=device, dtype=dtype))
            self.register_parameter(name, weight)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for weight in self.parameters():
            if self.kind == "linear":
                # Of each head's matrix: torch's Xavier would count the heads as part of the fan.
                bound = math.sqrt(3 / (self.num_keys + self.seq_len))
                nn.init.uniform_(weight, -bound, bound)
            else:
                nn.init.constant_(weight, 1 / weight.shape[-1])

    def extra_repr(self) -> str:
        return f"{self.seq_len}, {self.num_keys}, num_heads={self.num_heads}, kind={self.kind!r}, share={self.share!r}"

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        key_mask: Tensor | None = None,
        scale: float | None = None,
        backend: str | None = None,
    ) -> Tensor:
        """Attention to the projected keys and values; see `linformer_attention`.

        Args:
            query: (B, Hq, Nq, D).
            key: (B, Hkv, Nk, D), Nk <= seq_len.
            value: (B, Hkv, Nk, Dv).
            key_mask: (B, Nk) bool, False where there is no key.
            scale: default 1 / sqrt(D).
            backend: the dense backend to use, by name.

        Returns:
            (B, Hq, Nq, Dv). Where no key takes part it is 0.

        Raises:
            TypeError, ValueError: inputs that do not fit each other or this layer.
            UnsupportedError: the named backend cannot run this call.
        """
        query, key, value = lowrank.inputs(query, key, value, key_mask=key_mask, scale=scale, backend=backend)
        key, value, mask = self._project(key, value, key_mask)
        mask = None if mask is None else mask[:, None, None, :]
        return attention(query, key, value, attn_mask=mask, scale=scale, backend=backend)

    def project(
        self, key: Tensor, value: Tensor, key_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """The projected keys (B, Hkv, K, D) and values (B, Hkv, K, Dv), and which of them there are.

        That is a bool mask (B or 1, K), or None for all of them.
        """
        _, key, value = lowrank.inputs(key, key, value, key_mask=key_mask)
        return self._project(key, value, key_mask)

    def _project(self, key: Tensor, value: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        length = key.shape[2]
        if length > self.seq_len:
            raise ValueError(f"fastattn: key must have at most seq_len = {self.seq_len} positions, got {length}")
        e, f = self._weights(key)
        if self.kind == "linear":
            assert e is not None
            assert f is not None
            return linformer.project(key, e, mask), linformer.project(value, f, mask), None
        present = key.new_ones(1, length, dtype=torch.bool) if mask is None else mask
        present_windows = self._windows(present[:, None, :, None])
        exists = present_windows.any(3)
        key, value = (
            self._pool(self._windows(lowrank.without_masked(x, mask)), weight, present_windows, exists)
            for x, weight in ((key, e), (value, f))
        )
        return key, value, None if mask is None and length == self.seq_len else exists.flatten(1)

    def _weights(self, key: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """The parameters for key and value as a call with these keys (B, Hkv, Nk, D) has them, under autocast too."""
        if self.key_weight is None:
            return None, None
        shared = self.key_weight if self.value_weight is None else self.value_weight
        _, e, f = check.autocast(key, self.key_weight, shared)
        if e.dtype != key.dtype:
            raise TypeError(f"fastattn: key must have this layer's dtype {e.dtype}, got {key.dtype}")
        if e.device != key.device:
            raise ValueError(f"fastattn: key must be on this layer's device {e.device}, got {key.device}")
        if self.share == "none" and self.num_heads != key.shape[1]:
            raise ValueError(f"fastattn: key must have this layer's {self.num_heads} heads, got {key.shape[1]}")
        return e, f

    def _windows(self, x: Tensor) -> Tensor:
        """(B, H, N, D) to (B, H, K, W, D): the windows, filled up with zeros to the longest, W."""
        x = F.pad(x, (0, 0, 0, self.seq_len - x.shape[2]))
        shorter, longer = divmod(self.seq_len, self.num_keys)  # so many positions; so many windows have one more
        if longer == 0:
            return x.unflatten(2, (self.num_keys, shorter))
        head, tail = x.split([longer * (shorter + 1), (self.num_keys - longer) * shorter], 2)
        tail = F.pad(tail.unflatten(2, (self.num_keys - longer, shorter)), (0, 0, 0, 1))
        return torch.cat([head.unflatten(2, (longer, shorter + 1)), tail], 2)

    def _pool(self, windows: Tensor, weight: Tensor | None, present: Tensor, exists: Tensor) -> Tensor:
        """(B, H, K, W, D) to (B, H, K, D); present (B or 1, 1, K, W, 1) says where there are keys, exists in which."""
        if weight is not None:
            return (weight[..., None, None, :] @ windows).squeeze(3)
        if self.kind == "mean":
            return windows.sum(3) / present.sum(3).clamp(min=1)
        return windows.masked_fill(~present, -math.inf).amax(3).masked_fill(~exists, 0)
