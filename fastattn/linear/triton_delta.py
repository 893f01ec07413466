"""The delta rule's launches of kernels/linear_delta.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fastattn.dense.triton_launch import matrix, run, tiles_of
from fastattn.linear.triton_launch import Launch, kernels, state


@dataclass(slots=True)
class Errors:
    """What the states are corrected by, and what that was computed from; see kernels/linear_delta.py."""

    beta: Tensor
    errors: Tensor  # (B, Hq, N, Dv)
    recalled: Tensor  # (B, Hq, N, D)
    inverse: Tensor  # (B, Hq, N, chunk)
    states: Any  # before each chunk
    last: Any
    values: Any  # beta times errors, what linear attention has as values


def solve(launch: Launch) -> Errors:
    """The forward but for the outputs."""
    p = launch.p
    assert p.beta is not None
    length, beta = p.query.shape[2], p.beta.contiguous()
    errors, recalled, inverse = (
        launch.per_step(length, width, dtype=launch.operand)
        for width in (p.value.shape[3], p.key.shape[3], launch.chunk)
    )
    run(
        kernels().delta.prepare_kernel,
        launch.chunks(p.query),
        errors,
        recalled,
        inverse,
        launch.key,
        launch.values,
        beta,
        launch.prefix,
        *launch.place(p.query),
        **launch.tile("DELTA", "D", "DV"),
    )
    values = kernels().tiles.Values(*matrix(errors), 1, None, beta, None)
    found = Errors(beta, errors, recalled, inverse, None, None, values)
    found.states, found.last = _scan(launch, found, errors, launch.initial_state(), None)
    return found


def _scan(launch: Launch, found: Errors, errors: Tensor, initial: Any, grads: Any) -> tuple[Any, Any]:
    """(states before each chunk, the last), and errors in place; with grads of the output, their gradients instead."""
    p = launch.p
    states = launch.empty_states(launch.batch, launch.heads, launch.slots(p.query.shape[2]))
    last = launch.empty_states(p.num_sequences, launch.heads)
    constants = launch.tile("SCAN", "D", "BLOCK_D", "DV")
    del constants["BLOCK_M"]
    run(
        kernels().delta.scan_kernel,
        p.num_sequences * launch.heads * tiles_of(p.value.shape[3], constants["BLOCK_V"]),
        states.kv,
        last.kv,
        initial.kv,
        errors,
        found.recalled,
        found.beta,
        launch.query,
        launch.key,
        grads,
        launch.prefix,
        p.cu_seqlens,
        launch.heads,
        p.query.shape[2],
        launch.slots(p.query.shape[2]),
        REVERSE=grads is not None,
        **constants,
    )
    return states, last


def error_gradients(launch: Launch, found: Errors, grads: Any, grad_last: Any) -> tuple[Tensor, Any, Any]:
    """Gradients of (beta times errors, the states after each chunk, the state before the first)."""
    out = launch.per_step(*found.errors.shape[2:], dtype=launch.operand)
    launch.outputs(out, None, launch.key, launch.query, grads, state(None), reverse=True)
    return out, *_scan(launch, found, out, grad_last, grads)


def system_gradients(
    launch: Launch,
    found: Errors,
    grad_errors: Tensor,
    grad_key: Tensor,
    grad_value: Tensor,
    grad_beta: Tensor,
    changes: Tensor | None,
) -> None:
    """Set grad_value and grad_beta, and add to grad_key and changes what comes through the chunks' systems."""
    run(
        kernels().delta.system_gradient_kernel,
        launch.chunks(grad_value),
        *matrix(grad_value),
        *matrix(grad_key),
        grad_beta,
        changes,
        found.inverse,
        grad_errors,
        found.errors,
        found.states.kv,
        launch.key,
        found.beta,
        launch.prefix,
        *launch.place(grad_value),
        **launch.tile("DELTA", "D", "DV"),
    )
