"""Attention in a few lines of plain PyTorch, with autograd: the yardstick of the accuracy bar.

It materialises every score, in the inputs' own dtype, the way a model would write it by hand. In float64 it is also a
second opinion on the reference backend, with which it shares nothing but the seed of the dropout.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastattn.verify.cases import Case


def visible_keys(case: Case, b: int, q_len: int, k_len: int) -> Tensor:
    """Which keys each query of sequence ``b`` may see by position alone, (q_len, k_len) bool, one pair at a time."""

    def of_sequence(value: int | tuple[int, ...] | None, default: int) -> int:
        if value is None:
            return default
        return value[b] if isinstance(value, tuple) else value

    start = of_sequence(case.query_start, k_len - q_len)
    first, end = of_sequence(case.key_start, 0), of_sequence(case.key_lengths, k_len)
    left, right = case.window or (None, None)
    distance = torch.arange(k_len)[None, :] - (torch.arange(q_len)[:, None] + start)  # key minus query
    seen = ((torch.arange(k_len) >= first) & (torch.arange(k_len) < end)).expand(q_len, k_len).clone()
    if case.causal:
        seen &= distance <= 0
    if left is not None:
        seen &= distance >= -left
    if right is not None:
        seen &= distance <= right
    return seen


def distances(case: Case, b: int, q_len: int, k_len: int) -> Tensor:
    """|i + query_start - j|, (q_len, k_len) int64."""
    start = case.query_start[b] if isinstance(case.query_start, tuple) else case.query_start
    start = k_len - q_len if start is None else start
    return (torch.arange(q_len)[:, None] + start - torch.arange(k_len)[None, :]).abs()


@dataclass
class Dense:
    """The tensors of one dense problem, all explicit.

    query (B, Hq, Sq, D), key (B, Hkv, Sk, D), value (B, Hkv, Sk, Dv); seen (B, 1, Sq, Sk) bool; mask: bool or float,
    broadcasting to (B, Hq, Sq, Sk); blocks: bool, likewise, what a block mask keeps; slopes (B, Hq); distance
    (B, 1, Sq, Sk); sinks (Hq,); kept: the dropout's (B, Hq, Sq, Sk) bool.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    seen: Tensor
    mask: Tensor | None = None
    blocks: Tensor | None = None
    slopes: Tensor | None = None
    distance: Tensor | None = None
    sinks: Tensor | None = None
    kept: Tensor | None = None


def naive_attention(
    p: Dense, *, scale: float | None = None, softcap: float | None = None, dropout_p: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Output (B, Hq, Sq, Dv) and LSE (B, Hq, Sq), both in the inputs' dtype; differentiable by autograd."""
    q_BHSD = p.query
    group = q_BHSD.shape[1] // max(p.key.shape[1], 1)
    k_BHSD, v_BHSD = p.key.repeat_interleave(group, 1), p.value.repeat_interleave(group, 1)
    scores = q_BHSD @ k_BHSD.mT * (q_BHSD.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if p.slopes is not None and p.distance is not None:
        scores = scores - p.slopes.to(scores.dtype)[:, :, None, None] * p.distance.to(scores.dtype)
    seen = p.seen
    if p.mask is not None and p.mask.dtype == torch.bool:
        seen = seen & p.mask
    elif p.mask is not None:
        scores = scores + p.mask
        seen = seen & (p.mask.detach() != -torch.inf)
    if p.blocks is not None:
        seen = seen & p.blocks
    seen = seen.expand(scores.shape)
    if p.sinks is not None:
        sinks = p.sinks.to(scores.dtype)[None, :, None, None].expand(*scores.shape[:3], 1)
        scores, seen = torch.cat([scores, sinks], -1), torch.cat([seen, torch.ones_like(sinks, dtype=torch.bool)], -1)
    empty = ~seen.any(-1, keepdim=True)
    # A row of -inf has no softmax, and autograd would turn its NaN into NaN gradients of everything before it.
    scores = scores.masked_fill(~seen, -torch.inf).masked_fill(empty, 0.0)
    if scores.shape[-1] == 0:  # torch.logsumexp has no value to reduce
        lse = scores.new_full(scores.shape[:-1], -torch.inf)
    else:
        lse = torch.logsumexp(scores, -1).masked_fill(empty[..., 0], -torch.inf)
    probs = torch.softmax(scores, -1).masked_fill(empty, 0.0)
    if p.sinks is not None:
        probs = probs[..., :-1]
    if p.kept is not None:
        probs = probs * p.kept / (1.0 - dropout_p)
    return probs.to(v_BHSD.dtype) @ v_BHSD, lse
