"""The registered ops of linear attention, their autograd and fakes.

An op selects a backend and launches it. Gradients go through an `autograd.Function`, entered only where something needs
one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastattn import backends
from fastattn.dense.op import distinct, transformed
from fastattn.linear import reference
from fastattn.linear.problem import (
    ARGUMENTS,
    TENSORS,
    Gradients,
    Problem,
    Results,
    allocate_backward,
    allocate_forward,
)

_ARGUMENTS = (
    "Tensor query, Tensor key, Tensor value, Tensor? decay, Tensor? beta, Tensor? key_mask, Tensor? projection, "
    "Tensor? feature_bias, Tensor? cu_seqlens, Tensor? initial_kv, Tensor? initial_normalizer, "
    "Tensor? initial_log_scale, str feature, float feature_eps, bool causal, bool normalize, float scale, "
    "bool return_state, str? backend"
)
_library = torch.library.Library("fastattn", "FRAGMENT")
_library.define(
    f"linear_forward({_ARGUMENTS}) -> (Tensor out, Tensor denominator, Tensor kv, Tensor normalizer, Tensor log_scale)"
)
_library.define(
    "linear_backward(Tensor out, Tensor denominator, Tensor grad_out, Tensor? grad_kv, Tensor? grad_normalizer, "
    f"{_ARGUMENTS}) -> (Tensor grad_query, Tensor grad_key, Tensor grad_value, Tensor grad_decay, Tensor grad_beta, "
    "Tensor grad_initial_kv, Tensor grad_initial_normalizer)"
)


def _forward(*args: Any) -> Results:
    p = Problem(*args)
    launcher = backends.select("linear", p.requirements(), p.backend)
    p.check_values()
    return launcher.forward(p)


def _backward(
    out: Tensor,
    denominator: Tensor,
    grad_out: Tensor,
    grad_kv: Tensor | None,
    grad_normalizer: Tensor | None,
    *args: Any,
) -> Gradients:
    p = Problem(*args)
    launcher = backends.select("linear", p.requirements("backward"), p.backend)
    return launcher.backward(p, out, denominator, grad_out, grad_kv, grad_normalizer)


_library.impl("linear_forward", _forward, "CompositeExplicitAutograd")
_library.impl("linear_backward", _backward, "CompositeExplicitAutograd")


@torch.library.register_fake("fastattn::linear_forward", lib=_library)
def _(*args: Any) -> Results:
    return allocate_forward(Problem(*args))


@torch.library.register_fake("fastattn::linear_backward", lib=_library)
def _(
    out: Tensor,
    denominator: Tensor,
    grad_out: Tensor,
    grad_kv: Tensor | None,
    grad_normalizer: Tensor | None,
    *args: Any,
) -> Gradients:
    return allocate_backward(Problem(*args))


class _LinearAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> Results:
        results = Results(*torch.ops.fastattn.linear_forward(*args))
        ctx.save_for_backward(results.out, results.denominator, *args[: len(TENSORS)])
        ctx.scalars = args[len(TENSORS) :]
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(results.denominator, results.log_scale)
        return results

    @staticmethod
    def backward(
        ctx: Any, grad_out: Tensor | None, _: Any, grad_kv: Tensor | None, grad_normalizer: Tensor | None, __: Any
    ) -> tuple[Tensor | None, ...]:
        out, denominator, *tensors = ctx.saved_tensors
        args = (*tensors, *ctx.scalars)
        needed = dict(zip(ARGUMENTS, ctx.needs_input_grad, strict=True))
        if torch.is_grad_enabled():  # create_graph: gradients that can be differentiated again
            found = reference.differentiable_gradients(Problem(*args), grad_out, grad_kv, grad_normalizer)
        else:
            grad_out = torch.zeros_like(out) if grad_out is None else grad_out
            grads = torch.ops.fastattn.linear_backward(out, denominator, grad_out, grad_kv, grad_normalizer, *args)
            found = dict(zip(Gradients._fields, grads, strict=True))
        return tuple(found.get(name) if needed[name] else None for name in ARGUMENTS)


def linear_attention_op(p: Problem) -> Results:
    """The results of a validated problem, differentiable in `Gradients._fields` through out, kv and normalizer."""
    if transformed():
        backends.select("linear", p.requirements("transforms"), p.backend)
        return reference.formula(p)
    args = p.args()
    if torch.compiler.is_compiling():
        args = distinct(args)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in p.differentiable()):
        if p.backend is not None and not torch.compiler.is_compiling():
            # One that lacks the backward refuses before the forward runs.
            backends.select("linear", p.requirements("backward"), p.backend)
        return Results(*_LinearAttention.apply(*args))
    return Results(*torch.ops.fastattn.linear_forward(*args))
