"""Attention by the letter of its contract, one query token at a time, for the tests to judge by.

Each row collects its keys with Python integers, one `if` per clause of the contract, and takes a softmax over exactly
those. It shares no code with the package.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

# keep(b, h, i, j) -> whether dropout keeps that weight
Keep = Callable[[int, int, int, int], bool]


def brute_force_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    attn_mask: Tensor | None = None,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    query_start: int | Tensor | None = None,
    key_start: Tensor | None = None,
    key_lengths: Tensor | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    keep: Keep | None = None,
) -> tuple[Tensor, Tensor]:
    """(out, lse) of (B, H, S, D) tensors; float64 in, float64 out; differentiable."""
    batch, heads, q_len, dim = query.shape
    kv_heads, k_len = key.shape[1:3]
    scale = 1.0 / math.sqrt(dim) if scale is None else scale
    mask = None if attn_mask is None else attn_mask.expand(batch, heads, q_len, k_len)
    left, right = window if window is not None else (None, None)
    outs, lses = [], []
    for b in range(batch):
        if isinstance(query_start, Tensor):
            start = int(query_start[b])
        else:
            start = k_len - q_len if query_start is None else query_start
        for h in range(heads):
            shared = h // (heads // kv_heads)
            for i in range(q_len):
                position = i + start
                seen: list[int] = []
                for j in range(k_len):
                    if key_start is not None and j < int(key_start[b]):
                        continue
                    if key_lengths is not None and j >= int(key_lengths[b]):
                        continue
                    if causal and j > position:
                        continue
                    if left is not None and j < position - left:
                        continue
                    if right is not None and j > position + right:
                        continue
                    if mask is not None and mask.dtype == torch.bool and not mask[b, h, i, j]:
                        continue
                    if mask is not None and mask.dtype != torch.bool and mask[b, h, i, j] == -math.inf:
                        continue
                    seen.append(j)
                scores = scale * (key[b, shared, seen] @ query[b, h, i])
                if softcap is not None:
                    scores = softcap * torch.tanh(scores / softcap)
                if alibi_slopes is not None:
                    slope = alibi_slopes[b, h] if alibi_slopes.ndim == 2 else alibi_slopes[h]
                    scores = scores - slope.double() * torch.tensor([abs(position - j) for j in seen]).double()
                if mask is not None and mask.dtype != torch.bool:
                    scores = scores + mask[b, h, i, seen]
                if sinks is not None:
                    scores = torch.cat([scores, sinks[h].view(1)])
                if not len(scores):
                    outs.append(query.new_zeros(value.shape[-1]))
                    lses.append(query.new_tensor(-math.inf))
                    continue
                lse = torch.logsumexp(scores, 0)
                weights = torch.exp(scores - lse)[: len(seen)]
                if keep is not None:
                    kept = torch.tensor([keep(b, h, i, j) for j in seen], dtype=torch.float64)
                    weights = weights * kept / (1.0 - dropout_p)
                outs.append(weights @ value[b, shared, seen])
                lses.append(lse)
    shape = (batch, heads, q_len)
    if not outs:
        return query.new_zeros(*shape, value.shape[-1]), query.new_zeros(shape)
    return torch.stack(outs).view(*shape, value.shape[-1]), torch.stack(lses).view(shape)


@pytest.fixture(scope="session")
def brute_force() -> Callable[..., tuple[Tensor, Tensor]]:
    """`brute_force_attention`."""
    return brute_force_attention
