"""The registered ops of dense attention, their autograd and fakes.

An op selects a backend and launches it. Gradients go through an `autograd.Function`, entered only where something needs
one: registering autograd on the op itself would cost several times as much per call.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fastattn import backends
from fastattn.dense import reference
from fastattn.dense.flops import register_when_imported
from fastattn.dense.problem import ARGUMENTS, TENSORS, Problem, allocate_backward, allocate_forward
from fastattn.errors import UnsupportedError

_ARGUMENTS = (
    "Tensor query, Tensor key, Tensor value, Tensor? attn_mask, Tensor? sinks, Tensor? alibi_slopes, "
    "Tensor? query_start, Tensor? key_start, Tensor? key_lengths, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, "
    "Tensor? block_table, Tensor? mask_rows, Tensor? mask_row_blocks, Tensor? mask_columns, "
    "Tensor? mask_column_blocks, Tensor? mask_tiles, Tensor? rng, SymInt max_seqlen_q, SymInt max_seqlen_k, "
    "SymInt? query_offset, SymInt? window_left, SymInt? window_right, float scale, float? softcap, float dropout_p, "
    "bool deterministic, str? backend"
)
_library = torch.library.Library("fastattn", "DEF")
_library.define(f"dense_forward({_ARGUMENTS}) -> (Tensor out, Tensor lse)")
_library.define(
    f"dense_backward(Tensor out, Tensor lse, Tensor grad_out, Tensor? grad_lse, bool mask_grad, {_ARGUMENTS}) -> "
    "(Tensor grad_query, Tensor grad_key, Tensor grad_value, Tensor grad_mask, Tensor grad_sinks)"
)


def _forward(*args: Any) -> tuple[Tensor, Tensor]:
    p = Problem(*args)
    launcher = backends.select("dense", p.requirements(), p.backend)
    p.check_values()
    return launcher.forward(p)


def _backward(
    out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None, mask_grad: bool, *args: Any
) -> tuple[Tensor, ...]:
    p = Problem(*args)
    extra = [name for name, needed in (("bias_grad", mask_grad), ("lse_grad", grad_lse is not None)) if needed]
    needs = p.requirements("backward", *extra)
    launcher = backends.select("dense", needs, p.backend)
    return launcher.backward(p, out, lse, grad_out, grad_lse, mask_grad)


_library.impl("dense_forward", _forward, "CompositeExplicitAutograd")
_library.impl("dense_backward", _backward, "CompositeExplicitAutograd")


@torch.library.register_fake("fastattn::dense_forward", lib=_library)
def _(*args: Any) -> tuple[Tensor, Tensor]:
    return allocate_forward(Problem(*args))


@torch.library.register_fake("fastattn::dense_backward", lib=_library)
def _(
    out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None, mask_grad: bool, *args: Any
) -> tuple[Tensor, ...]:
    return allocate_backward(Problem(*args), mask_grad)


register_when_imported()


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor]:
        return _run_and_save(ctx, args)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        return _gradients(ctx, grad_out, grad_lse)


class _AttentionWithoutLSE(torch.autograd.Function):
    """For callers that drop the LSE: compiled code would hand its backward a gradient of zeros, which costs as much as
    any other and keeps it from backends that take none."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor]:
        out, lse = _run_and_save(ctx, args)
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
        return _gradients(ctx, grad_out, None)


def _run_and_save(ctx: Any, args: tuple) -> tuple[Tensor, Tensor]:
    out, lse = torch.ops.fastattn.dense_forward(*args)
    ctx.save_for_backward(out, lse, *args[: len(TENSORS)])
    ctx.scalars = args[len(TENSORS) :]
    ctx.set_materialize_grads(False)
    return out, lse


def _gradients(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    out, lse, *tensors = ctx.saved_tensors
    args = (*tensors, *ctx.scalars)
    needed = dict(zip(ARGUMENTS, ctx.needs_input_grad, strict=True))
    if torch.is_grad_enabled():  # create_graph: gradients that can be differentiated again
        found = reference.differentiable_gradients(Problem(*args), grad_out, grad_lse)
    else:
        grads = torch.ops.fastattn.dense_backward(
            out,
            lse,
            torch.zeros_like(out) if grad_out is None else grad_out,
            grad_lse,
            needed["attn_mask"],
            *args,
        )
        found = dict(zip(("query", "key", "value", "attn_mask", "sinks"), grads, strict=True))
    return tuple(found.get(name) if needed[name] else None for name in ARGUMENTS)


def transformed() -> bool:
    """Whether a torch.func transform or forward-mode AD is active, which the ops do not see through."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._functorch.peek_interpreter_stack() is not None or torch.autograd.forward_ad._current_level >= 0


def distinct(args: tuple) -> tuple:
    """The arguments with views in place of repeated tensors, which compiled autograd Functions do not accept."""
    distinct: list[Any] = []
    for arg in args:
        repeated = isinstance(arg, Tensor) and any(arg is earlier for earlier in distinct)
        distinct.append(arg.view_as(arg) if repeated else arg)
    return tuple(distinct)


#: Where `fastattn.maps.capture` wants every call's (problem, lse). A plain list: compiled code can guard on it.
recordings: list[list[tuple[Problem, Tensor]]] = []


def attention_op(p: Problem, lse_grad: bool = True) -> tuple[Tensor, Tensor]:
    """(out, lse) of a validated problem, differentiable in query, key, value, attn_mask and sinks.

    Without `lse_grad` no gradient flows through the LSE.
    """
    out, lse = _attend(p, lse_grad)
    record(p, lse)
    return out, lse


def record(p: Problem, lse: Tensor) -> None:
    """Append to the `recordings` what the weights of a call depend on: nothing of its value or its graph."""
    for recording in recordings:
        key = p.key.detach()
        kept = replace(
            p,
            query=p.query.detach(),
            key=key,
            value=key,
            attn_mask=None if p.attn_mask is None else p.attn_mask.detach(),
            sinks=None if p.sinks is None else p.sinks.detach(),
        )
        recording.append((kept, lse.detach()))


def _attend(p: Problem, lse_grad: bool) -> tuple[Tensor, Tensor]:
    if transformed():
        if recordings:
            raise UnsupportedError(
                "fastattn: maps.capture does not see through torch.func transforms and forward-mode AD"
            )
        backends.select("dense", p.requirements("transforms"), p.backend)
        return reference.formula(p)
    args = p.args()
    if torch.compiler.is_compiling():
        args = distinct(args)
    differentiable = (p.query, p.key, p.value, p.attn_mask, p.sinks)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in differentiable):
        if p.backend is not None and not torch.compiler.is_compiling():
            # One that lacks the backward refuses before the forward runs.
            mask_grad = p.attn_mask is not None and p.attn_mask.requires_grad
            backends.select("dense", p.requirements("backward", *(["bias_grad"] if mask_grad else [])), p.backend)
        return (_Attention if lse_grad else _AttentionWithoutLSE).apply(*args)
    return torch.ops.fastattn.dense_forward(*args)
