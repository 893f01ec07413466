"""Standard attention in plain PyTorch: what fastattn replaces, and the yardstick of accuracy, time and memory."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn.dense.problem import default_scale


def naive_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    attn_mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """softmax(scale * query @ key^T + mask) @ value, every step a PyTorch operation in the input's dtype.

    It stores the (B, Hq, Sq, Sk) attention matrix several times over. The conventions are those of
    `fastattn.attention` (causal is aligned bottom-right, bool masks keep where True), except that a row without keys
    gives NaN.

    Args:
        query: (B, Hq, Sq, D).
        key: (B, Hkv, Sk, D); Hq a multiple of Hkv.
        value: (B, Hkv, Sk, Dv).
        attn_mask: bool or float, broadcastable to (B, Hq, Sq, Sk).

    Returns:
        (B, Hq, Sq, Dv).
    """
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = (query @ key.mT) * (default_scale(query.shape[-1]) if scale is None else scale)
    if causal:
        seqlen_q, seqlen_k = scores.shape[-2:]
        future = torch.ones(seqlen_q, seqlen_k, dtype=torch.bool, device=query.device).triu(seqlen_k - seqlen_q + 1)
        scores = scores.masked_fill(future, float("-inf"))
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            scores = scores.masked_fill(~attn_mask, float("-inf"))
        else:
            scores = scores + attn_mask.to(scores.dtype)
    probs = scores.softmax(dim=-1)
    return (F.dropout(probs, dropout_p) if dropout_p else probs) @ value
