"""flash-attn's attention by the letter of its documentation, for the tests to judge by."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor


def documented_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    kept: Tensor | None = None,
    dropout_p: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """(out, softmax_lse, softmax) of one sequence, without any of the package's code.

    q (seqlen_q, nheads, headdim), k and v (seqlen_k, nheads_k, headdim), alibi_slopes (nheads,), kept (nheads,
    seqlen_q, seqlen_k): the weights that dropout leaves.
    """
    (seqlen_q, nheads, headdim), seqlen_k, nheads_k = q.shape, k.shape[0], k.shape[1]
    scale = 1 / math.sqrt(headdim) if softmax_scale is None else softmax_scale
    outs, lses, weights = [], [], []
    for h in range(nheads):
        group = h // (nheads // nheads_k)
        scores = scale * q[:, h] @ k[:, group].T
        if softcap > 0:
            scores = softcap * torch.tanh(scores / softcap)
        sees = torch.zeros(seqlen_q, seqlen_k, dtype=torch.bool)
        distance = torch.zeros(seqlen_q, seqlen_k, dtype=q.dtype)
        for i in range(seqlen_q):
            for j in range(seqlen_k):
                place = i + seqlen_k - seqlen_q
                distance[i, j] = abs(place - j)
                left = window_size[0] < 0 or j >= place - window_size[0]
                right = window_size[1] < 0 or j <= place + window_size[1]
                sees[i, j] = left and right and (not causal or j <= place)
        if alibi_slopes is not None:
            scores = scores - alibi_slopes[h].to(q.dtype) * distance
        some = sees.any(1)
        lse = torch.full((seqlen_q,), -math.inf, dtype=q.dtype)
        lse[some] = scores.masked_fill(~sees, -math.inf)[some].logsumexp(1)
        softmax = torch.where(sees, torch.exp(scores - lse.masked_fill(~some, 0.0)[:, None]), 0.0)
        dropped = softmax if kept is None else softmax * kept[h] / (1 - dropout_p)
        outs.append(dropped @ v[:, group])
        lses.append(lse)
        weights.append(softmax)
    return torch.stack(outs, 1), torch.stack(lses), torch.stack(weights)


@pytest.fixture(scope="session")
def documented() -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """`documented_attention`."""
    return documented_attention
