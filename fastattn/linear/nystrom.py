"""Nystrom attention: softmax attention from what a few landmarks see and are seen by."""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn.dense.api import attention
from fastattn.dense.problem import default_scale
from fastattn.linear import lowrank


def nystrom_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    num_landmarks: int = 64,
    key_mask: Tensor | None = None,
    query_mask: Tensor | None = None,
    iterations: int = 6,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    r"""softmax(scale Q K~^T) softmax(scale Q~ K~^T)^+ softmax(scale Q~ K^T) V (Xiong et al. 2021, arXiv:2102.03902).

    Q~ and K~ are the landmarks, means of the queries and keys over M segments of equal length (to within one position)
    of the positions that take part. So padding changes nothing: a sequence gives what it gives without it. The first
    and the last factor are calls of `fastattn.attention`; nothing of size Nq x Nk or N x M is stored. With as many
    landmarks as positions it is softmax attention, as far as the inverse converges.

    Every result depends on all queries and all keys: there is no causal form.

    Args:
        query: (B, Hq, Nq, D), float32, bfloat16, float16 or float64, any strides.
        key: (B, Hkv, Nk, D), Hq a multiple of Hkv (grouped-query attention).
        value: (B, Hkv, Nk, Dv).
        num_landmarks: M, the rank; of queries and of keys, or as many as there are where that is fewer.
        key_mask: (B, Nk) bool, False where there is no key.
        query_mask: (B, Nq) bool, False where there is no query; in self-attention on padded sequences the same as
            key_mask. The result of such a query is 0.
        iterations: steps of the cubic iteration towards the Moore-Penrose inverse. Each makes what is inverted reach
            singular values about 1.8 times as small; in float32 more than about 15 also multiply rounding errors where
            landmarks nearly coincide.
        scale: factor on the scores; default 1 / sqrt(D).
        backend: the dense backend to use, by name; None takes the first that supports the calls.

    Returns:
        (B, Hq, Nq, Dv) over (B, Nq, Hq, Dv) memory. Where no key takes part it is 0.

    Raises:
        TypeError, ValueError: an argument is of the wrong type, dtype, shape, device or range.
        UnsupportedError: the named backend cannot run the calls.
    """
    query, key, value = lowrank.inputs(query, key, value, key_mask=key_mask, scale=scale, backend=backend)
    lowrank.sequence_mask("query_mask", query_mask, query)
    lowrank.positive("num_landmarks", num_landmarks)
    lowrank.positive("iterations", iterations)
    scale = default_scale(query.shape[-1]) if scale is None else scale
    query = lowrank.without_masked(query, query_mask)
    key, value = (lowrank.without_masked(t, key_mask) for t in (key, value))
    with lowrank.without_autocast(query.device):  # the inverse needs float32
        q_landmarks, q_present = _landmarks(query, num_landmarks, query_mask)
        k_landmarks, k_present = _landmarks(key, num_landmarks, key_mask)
        k_landmarks = k_landmarks.repeat_interleave(query.shape[1] // key.shape[1], 1)
        core = _weights(q_landmarks, k_landmarks, q_present, k_present, scale)
        seen = attention(q_landmarks, key, value, attn_mask=_four_axes(key_mask), scale=scale, backend=backend)
        mixed = (_pseudo_inverse(core, iterations) @ lowrank.accumulable(seen)).to(value.dtype)
        out = attention(query, k_landmarks, mixed, attn_mask=_four_axes(k_present), scale=scale, backend=backend)
        return lowrank.without_masked(out, query_mask)


def _four_axes(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask[:, None, None, :]


def _landmarks(x: Tensor, count: int, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Segment means (B, H, M, D) of x (B, H, N, D) in its dtype, and which of them there are, (B, M), with a mask.

    M is count, or N where that is less. Positions that the mask excludes must be 0 in x.
    """
    batch, heads, length, width = x.shape
    count = max(1, min(count, length))
    # Segments divide the positions that take part, by their rank: where the others lie makes no difference.
    if mask is None:
        segment = (torch.arange(length, device=x.device) * count // max(1, length)).expand(batch, length)
    else:
        rank = (mask.cumsum(1) - 1).clamp(min=0)
        segment = rank * count // mask.sum(1, keepdim=True).clamp(min=1)
    rows = (segment + count * torch.arange(batch, device=x.device)[:, None]).flatten()
    values = lowrank.accumulable(x.transpose(1, 2).reshape(batch * length, heads * width))
    weights = values.new_ones(batch * length) if mask is None else mask.flatten().to(values.dtype)
    sums = values.new_zeros(batch * count, heads * width).index_add(0, rows, values)
    sizes = values.new_zeros(batch * count).index_add(0, rows, weights)
    means = (sums / sizes.clamp(min=1)[:, None]).view(batch, count, heads, width).transpose(1, 2)
    return means.to(x.dtype), None if mask is None else sizes.view(batch, count) > 0


def _weights(
    query: Tensor, key: Tensor, query_present: Tensor | None, key_present: Tensor | None, scale: float
) -> Tensor:
    """softmax(scale query key^T), float32 or float64, with zeros in the rows and columns of absent landmarks.

    Rows are uniform where there is no key at all: finite, and nothing comes of them.
    """
    scores = scale * lowrank.accumulable(query) @ lowrank.accumulable(key).mT
    if key_present is not None:
        scores = scores.masked_fill(~key_present[:, None, None, :], torch.finfo(scores.dtype).min)
    weights = torch.softmax(scores, -1)
    return weights if query_present is None else weights * query_present[:, None, :, None]


def _pseudo_inverse(a: Tensor, iterations: int) -> Tensor:
    """The Moore-Penrose inverse of matrices >= 0 by the paper's cubic iteration.

    Each matrix starts from its own norms: with the largest of the batch, one sequence's result would depend on another.
    """
    norm = a.sum(-1).amax(-1) * a.sum(-2).amax(-1)
    z = a.mT / norm.clamp(min=torch.finfo(a.dtype).tiny)[..., None, None]
    for _ in range(iterations):
        az = a @ z
        z = (13 * z - (15 * z - (7 * z - z @ az) @ az) @ az) / 4
    return z
