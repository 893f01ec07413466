"""The attention weights of a fused call: the one matrix that it avoids, for callers that ask for it."""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn.dense.philox import dropout_keep
from fastattn.dense.problem import Problem


def attention_weights(problem: Problem, lse: Tensor) -> Tensor:
    """The probabilities that `attention_op(problem)` applied: exp(scale * q k^T + bias - lse), then its dropout.

    One more query-key product, and no softmax: the log-sum-exp of the fused call is there. Differentiable. Works in
    float32 (float64 for float64), because scores rounded to half precision would not agree with that log-sum-exp.

    Args:
        problem: not packed; Hq = Hkv; masks and causal as they come, no window, limits, softcap, ALiBi or sinks.
        lse: (B, H, Sq), the one that the call returned; part of the gradient flows through it.

    Returns:
        (B, H, Sq, Sk) in query's dtype; a row that sees no key is zero.
    """
    query, key, mask = problem.query, problem.key, problem.attn_mask
    with torch.autocast(query.device.type, enabled=False):
        scores = (query.to(lse.dtype) * problem.scale) @ key.to(lse.dtype).mT
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, float("-inf"))
    elif mask is not None:
        scores = scores + mask.to(scores.dtype)
    if problem.window_right is not None:
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=query.device).tril(problem.offset)
        scores = scores.masked_fill(~seen, float("-inf"))
    # -inf minus -inf is NaN: a row without keys keeps its -inf scores, whose exponential is the zero wanted.
    weights = torch.exp(scores - lse.masked_fill(lse == float("-inf"), 0.0)[..., None])
    if problem.rng is not None:
        shape = (query.shape[0], query.shape[1], query.shape[2], key.shape[2])
        keep = dropout_keep(problem.rng, problem.dropout_p, shape, problem.first_sequence)
        # At p = 1 nothing is kept, and the factor must not be infinite.
        kept = 1.0 / (1.0 - problem.dropout_p) if problem.dropout_p < 1.0 else 0.0
        weights = torch.where(keep, weights * kept, 0.0)
    return weights.to(query.dtype)
