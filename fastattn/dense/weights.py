"""The attention weights themselves, which fused attention never holds, for callers who ask to see them.

They are made a few rows and heads at a time: nothing but the result has the size of the score matrix, and of a causal
or windowed problem only the part that is not zero is computed. Gradients, which callers rarely take, go through the
reference's formula for the whole matrix.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from fastattn.blockmask.lists import to_dense
from fastattn.dense import reference
from fastattn.dense.op import transformed
from fastattn.dense.problem import TENSORS, Problem

# Scores at one time. On a CPU they should stay in its caches (2^19 to 2^21 measured best); a GPU needs more to be busy.
BLOCK = {"cpu": 1 << 21, "cuda": 1 << 26}
# Enough rows for fast matrix products, few enough to leave out most of what a causal mask hides.
ROWS = 128

Average = Literal["heads", "rows"]


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
        p = replace(Problem(*args), first_sequence=first_sequence)
        if p.rng is not None:  # dropout is drawn for whole problems
            return _whole(p, lse, average)
        return chosen_weights(p, range(p.query.shape[2]), range(p.query.shape[1]), lse, "heads" if average else None)

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


def chosen_weights(
    p: Problem, rows: Sequence[int], heads: Sequence[int], lse: Tensor | None, average: Average | None
) -> Tensor:
    """The probabilities of some rows and heads, in the order given, without gradients.

    Args:
        p: neither packed nor paged; its dropout does not count.
        rows, heads: indices from 0; they may repeat.
        lse: (B, Hq, Sq) of all rows and heads; None finds what is needed from the scores.
        average: what the result is the mean over.

    Returns:
        (B, heads, rows, Sk), or (B, rows, Sk), the mean over the heads, or (B, heads, Sk), over the rows, in query's
        dtype.
    """
    batch, keys = p.query.shape[0], p.key.shape[2]
    with torch.no_grad(), torch.autocast(p.query.device.type, enabled=False):
        if average == "rows":
            total = p.query.new_zeros((batch, len(heads), keys), dtype=p.accumulate_dtype)
            for (_, some, _, seen), weights in blocks(p, rows, heads, lse):
                total[:, some, seen] += weights.sum(dim=2)
            return total.div_(max(1, len(rows))).to(p.query.dtype)
        merged = average == "heads"
        shape = (batch, len(rows), keys) if merged else (batch, len(heads), len(rows), keys)
        result = p.query.new_zeros(shape)
        for place, weights in blocks(p, rows, heads, lse, merged):
            result[place] = weights
        return result


def blocks(
    p: Problem, rows: Sequence[int], heads: Sequence[int], lse: Tensor | None, average: bool = False
) -> Iterator[tuple[tuple[slice, ...], Tensor]]:
    """`chosen_weights` in parts, each with its place in the whole; `average` is over the heads. The rest is zero.

    The parts are in the accumulation dtype, and a row's seen keys are always in one part.
    """
    (batch, _, _, width), keys = p.query.shape, p.key.shape[2]
    block = BLOCK.get(p.query.device.type, BLOCK["cuda"]) // max(1, batch * keys)
    # As many heads as fit with a fair number of rows, and with the copy that their keys may need; then more rows.
    at_once = max(1, min(block // max(min(len(rows), ROWS), width), len(heads)))
    for start, first, last in _runs(rows, max(1, block // at_once)):
        place, seen = slice(start, start + last - first), _span(p, first, last)
        total: Tensor | None = None
        for h in range(0, len(heads), at_once):
            some = heads[h : h + at_once]
            part_lse = None if lse is None else _pick(lse[:, :, first:last], some)
            weights = _block(_part(p, some, first, last, seen), part_lse)
            if average:
                weights = weights.sum(dim=1)
                total = weights if total is None else total.add_(weights)
            else:
                yield (slice(None), slice(h, h + len(some)), place, seen), weights
        if total is not None:
            yield (slice(None), place, seen), total.div_(len(heads))


def _runs(indices: Sequence[int], longest: int) -> Iterator[tuple[int, int, int]]:
    """Consecutive indices, at most `longest` together: (place in the sequence, first index, last index + 1)."""
    start = 0
    for i in range(1, len(indices) + 1):
        if i == len(indices) or i - start == longest or indices[i] != indices[i - 1] + 1:
            yield start, indices[start], indices[i - 1] + 1
            start = i


def _span(p: Problem, first: int, last: int) -> slice:
    """The keys that these rows may see by position; all of them where each sequence has a start of its own."""
    keys = p.key.shape[2]
    if p.query_start is not None:
        return slice(0, keys)
    left = 0 if p.window_left is None else min(max(p.offset + first - p.window_left, 0), keys)
    right = keys if p.window_right is None else min(max(p.offset + last + p.window_right, left), keys)
    return slice(left, right)


def _part(p: Problem, heads: Sequence[int], first: int, last: int, seen: slice) -> Problem:
    """The problem of some heads, each with a key head of its own, of rows first to last - 1 and the keys they see."""
    groups = p.query.shape[1] // p.key.shape[1]
    mask = p.attn_mask
    if mask is not None:
        mask = mask[:, :, first:last] if mask.shape[2] > 1 else mask
        mask = mask[..., seen] if mask.shape[3] > 1 else mask
        mask = _pick(mask, heads) if mask.shape[1] > 1 else mask
    lists = p.mask_lists
    if lists is not None:
        keep = to_dense(lists, (first, last), p.key.shape[2])[..., seen]
        keep = _pick(keep, heads) if keep.shape[1] > 1 else keep
        mask = keep if mask is None else mask & keep if mask.dtype == torch.bool else mask.where(keep, float("-inf"))
    return replace(
        p,
        mask_rows=None,
        query=_pick(p.query[:, :, first:last], heads),
        key=_pick(p.key[:, :, seen], [h // groups for h in heads]),
        attn_mask=mask,
        sinks=None if p.sinks is None else p.sinks[list(heads)],
        alibi_slopes=None if p.alibi_slopes is None else _pick(p.alibi_slopes, heads),
        # The keys count from the first one seen.
        query_offset=p.offset + first - seen.start,
        key_start=None if p.key_start is None else p.key_start - seen.start,
        key_lengths=None if p.key_lengths is None else p.key_lengths - seen.start,
    )


def _pick(tensor: Tensor, indices: Sequence[int]) -> Tensor:
    """tensor[:, indices]; a view where they are consecutive."""
    first = indices[0]
    consecutive = all(index == first + i for i, index in enumerate(indices))
    return tensor[:, first : first + len(indices)] if consecutive else tensor[:, list(indices)]


def _block(p: Problem, lse: Tensor | None) -> Tensor:
    """The probabilities of a problem with as many key heads as query heads, in the accumulation dtype."""
    dtype = p.accumulate_dtype
    scores, _ = reference.masked_scores(p, p.query.to(dtype), p.key.to(dtype), reference.reach(p))
    if lse is None:
        lse = torch.logsumexp(scores, dim=-1)
        lse = lse if p.sinks is None else torch.logaddexp(lse, p.sinks[:, None])
    # -inf minus -inf is NaN: a row without keys keeps its -inf scores, whose exponential is the zero wanted.
    return scores.sub_(lse.masked_fill(lse == float("-inf"), 0.0)[..., None]).exp_()
