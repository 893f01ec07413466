"""The attention weights themselves, which fused attention never holds, for callers who ask to see them.

They are made from the log-sum-exp, a few rows at a time: nothing but the result has the size of the score matrix, and
of a causal problem only the half that is not zero is computed. Gradients, which callers rarely take, go through the
reference's formula for the whole matrix.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fastattn.dense import reference
from fastattn.dense.op import transformed
from fastattn.dense.problem import TENSORS, Problem

# Scores at one time. On a CPU they should stay in its caches (2^19 to 2^21 measured best); a GPU needs more to be busy.
BLOCK = {"cpu": 1 << 21, "cuda": 1 << 26}


def attention_weights(p: Problem, lse: Tensor, average: bool) -> Tensor:
    """The probabilities that a problem's output was weighted with, after dropout, differentiable: exp(scores - lse).

    Args:
        p: not packed.
        lse: (B, Hq, Sq), as the forward returned it; part of the gradient flows through it.
        average: over the heads.

    Returns:
        (B, Hq, Sq, Sk), or (B, Sq, Sk) averaged, in query's dtype; a row that sees no key is zero.
    """
    if torch.compiler.is_compiling() or transformed():
        return _whole(p, lse, average)
    return _Weights.apply(average, p.first_sequence, lse, *p.args())


def _whole(p: Problem, lse: Tensor, average: bool) -> Tensor:
    weights = reference.attention_weights(p, lse)
    return weights.mean(dim=1) if average else weights


class _Weights(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, average: bool, first_sequence: int, lse: Tensor, *args: Any) -> Tensor:
        ctx.save_for_backward(lse, *args[: len(TENSORS)])
        ctx.scalars, ctx.average, ctx.first_sequence = args[len(TENSORS) :], average, first_sequence
        return _blockwise(replace(Problem(*args), first_sequence=first_sequence), lse, average)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad[2:]
        again = torch.is_grad_enabled()  # create_graph
        with torch.enable_grad():
            # The tensors themselves, or leaves in their place.
            tensors = [
                t.detach().requires_grad_() if wanted and not again else t
                for t, wanted in zip(ctx.saved_tensors, needed, strict=False)
            ]
            lse, *others = tensors
            problem = replace(Problem(*others, *ctx.scalars), first_sequence=ctx.first_sequence)
            weights = _whole(problem, lse, ctx.average)
            wanted = [t for t, needs in zip(tensors, needed, strict=False) if needs]
            found = iter(torch.autograd.grad(weights, wanted, grad, create_graph=again, allow_unused=True))
        return None, None, *(next(found) if needs else None for needs in needed)


def _blockwise(p: Problem, lse: Tensor, average: bool) -> Tensor:
    (batch, heads, rows, _), keys = p.query.shape, p.key.shape[2]
    weights = p.query.new_zeros((batch, rows, keys) if average else (batch, heads, rows, keys))
    block = BLOCK.get(p.query.device.type, BLOCK["cuda"])
    # Dropout is drawn for whole problems.
    step = rows if p.rng is not None else max(1, block // max(1, batch * heads * keys))
    query, key = p.query.to(lse.dtype), p.key.to(lse.dtype)
    for first in range(0, rows, step):
        last = min(first + step, rows)
        seen = keys
        if p.window_right is not None and p.query_start is None and p.rng is None:
            seen = min(max(p.offset + last + p.window_right, 0), keys)
        mask = p.attn_mask
        if mask is not None:
            mask = mask[:, :, first:last] if mask.shape[2] > 1 else mask
            mask = mask[..., :seen] if mask.shape[3] > 1 else mask
        part = replace(
            p, query=query[:, :, first:last], key=key[:, :, :seen], attn_mask=mask, query_offset=p.offset + first
        )
        weights[..., first:last, :seen] = _whole(part, lse[:, :, first:last], average)
    return weights
