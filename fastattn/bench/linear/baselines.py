"""What fastattn's linear attention is set beside: as a user would write it, as fast as PyTorch can, and FLA's.

Each binder takes a `LinearProblem` and returns (kernel name, function of its inputs) or raises to say why it cannot.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn.bench.case import Attend, default_device
from fastattn.bench.linear.problem import LinearProblem
from fastattn.linear.api import problem_of
from fastattn.linear.reference import formula

CHUNKS = (64, 128, 256, 512)
# Shorter ones for what solves a system or divides by decay factors within a chunk.
SHORT_CHUNKS = (16, 32, 64, 128)
# Long enough for the best chunk and algorithm to be the best at any length.
TRIAL_LENGTH = 8192


def has_naive_form(problem: LinearProblem) -> bool:
    """Whether there is one beside softmax attention's, which is that of what approximates it by other means."""
    return not problem.step and problem.mechanism not in ("linformer", "nystrom")


def has_weights(problem: LinearProblem) -> bool:
    """Whether the weight of a key for a query is one number, so that there is a matrix of all of them."""
    return problem.mechanism not in ("gla", "delta", "gated-delta")


def bind_naive(problem: LinearProblem, *, last_head: bool = False) -> tuple[str, Attend]:
    """The matrix of weights, masked, times the values; where there is none, the recurrence step by step.

    Everything in the inputs' own dtype but the decay factors, whose logarithms are summed.
    """
    if not has_weights(problem):
        return "step by step", partial(_recurrence, problem)

    def attend(q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None = None) -> Tensor:
        k, v = _for_each_head(q, k, v)
        q, k = _features(problem, q, k)
        weights = q @ k.mT
        if problem.causal:
            constant = problem.options(q.device, last_head=last_head).get("decay")
            if constant is not None:
                decay = constant.to(torch.promote_types(q.dtype, torch.float32))[:, None].expand(-1, q.shape[2])
            if decay is not None:
                total = decay.cumsum(-1)
                weights = weights * (total[..., :, None] - total[..., None, :]).clamp(max=0).exp().to(weights.dtype)
            weights = weights.tril()
        out = weights @ v
        return out / weights.sum(-1, keepdim=True) if _normalized(problem) else out * problem.head_dim**-0.5

    return "matmul, mask, matmul", attend


def naive_bytes(problem: LinearProblem) -> int:
    """A low estimate of what it needs: the matrix and its copies, or with gradients every step's state twice."""
    backward, heads = problem.mode == "fwdbwd", problem.batch * problem.heads
    size = problem.torch_dtype.itemsize
    if has_weights(problem):
        return heads * problem.seqlen**2 * size * (4 if backward else 3)
    return heads * problem.seqlen * problem.rank * problem.values * size * 2 * backward


def naive_work(problem: LinearProblem) -> float:
    return problem.flops * (problem.seqlen if has_weights(problem) else 1)


def _for_each_head(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    group = q.shape[1] // k.shape[1]
    return (k, v) if group == 1 else (k.repeat_interleave(group, 1), v.repeat_interleave(group, 1))


def _normalized(problem: LinearProblem) -> bool:
    return problem.mechanism in ("linear", "performer", "mean")


def _features(problem: LinearProblem, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Query and key features; a Performer's with one maximum over all keys, which cancels in the quotient."""
    if problem.mechanism == "mean":
        return torch.ones_like(q[..., :1]), torch.ones_like(k[..., :1])
    if problem.mechanism != "performer":
        return q, k
    scale = problem.head_dim**-0.25
    q, k = q * scale, k * scale
    w = problem.projection(q.device).to(q.dtype)
    of_q, of_k = q @ w.mT, k @ w.mT - k.square().sum(-1, keepdim=True) / 2
    return (of_q - of_q.amax(-1, keepdim=True)).exp(), (of_k - of_k.amax((-2, -1), keepdim=True)).exp()


def _recurrence(problem: LinearProblem, q: Tensor, k: Tensor, v: Tensor, *extras: Tensor) -> Tensor:
    k, v = _for_each_head(q, k, v)
    named = problem.named(extras)
    beta = named["beta"].to(q.dtype)[..., None] if "beta" in named else None
    keep = named["decay"].exp().to(q.dtype) if "decay" in named else None  # (B, H, N) or (B, H, N, M)
    if keep is not None and keep.dim() == 3:
        keep = keep[..., None]
    state, outs = q.new_zeros(*q.shape[:2], q.shape[3], v.shape[3]), []
    for t in range(q.shape[2]):
        if keep is not None:
            state = keep[:, :, t, :, None] * state
        written = v[:, :, t]
        if beta is not None:
            written = beta[:, :, t] * (written - (k[:, :, t, None] @ state).squeeze(2))
        state = state + k[:, :, t, :, None] * written[:, :, None]
        outs.append((q[:, :, t, None] @ state).squeeze(2))
    return torch.stack(outs, 2) * problem.head_dim**-0.5


def bind_torch(problem: LinearProblem) -> tuple[str, Attend]:
    """The chunkwise algorithm in PyTorch operations, as the fastest of its forms here; gradients by autograd."""
    if problem.step:
        return "two products", _torch_step
    name, algorithm = _fastest(replace(problem, seqlen=min(problem.seqlen, TRIAL_LENGTH)))
    return name, partial(algorithm, problem)


def _torch_step(q: Tensor, k: Tensor, v: Tensor, kv: Tensor, z: Tensor) -> Tensor:
    kv, z = kv + k.mT @ v, z[:, :, None] + k
    return q @ kv / (q @ z.mT)


@cache
def _fastest(problem: LinearProblem) -> tuple[str, Callable[..., Tensor]]:
    """Name and function, of a problem and its inputs, of the form whose call, gradients included, is fastest here."""
    from fastattn.bench.run import make_step
    from fastattn.bench.timing import Timing, clock_for, interleave

    forms = {"loop over chunks": loop}
    if "beta" not in problem.kind.extras:
        forms["all chunks at once"] = _batched
    chunks = CHUNKS if has_weights(problem) else SHORT_CHUNKS
    found = {
        f"{name}, chunk {chunk}": partial(form, chunk)
        for name, form in forms.items()
        for chunk in chunks
        if chunk <= max(problem.seqlen, chunks[0])
    }
    device = default_device()
    inputs = problem.inputs(device)
    steps = {name: make_step(problem, partial(form, problem), inputs) for name, form in found.items()}
    timings = interleave(steps, clock_for(device), budget_s=0.0, min_samples=2)
    seconds = {name: timing.median for name, timing in timings.items() if isinstance(timing, Timing)}
    if not seconds:
        raise next(timing for timing in timings.values() if isinstance(timing, Exception))
    best = min(seconds, key=lambda name: seconds[name])
    return best, found[best]


def loop(chunk: int, problem: LinearProblem, q: Tensor, k: Tensor, v: Tensor, *extras: Tensor) -> Tensor:
    """Chunk after chunk, carrying the state; not causal, one product for the state and one for the output."""
    asked = problem_of(q, k, v, **problem.options(q.device), **problem.named(extras))
    return formula(asked, chunk).out


def _batched(chunk: int, problem: LinearProblem, q: Tensor, k: Tensor, v: Tensor, *extras: Tensor) -> Tensor:
    """The states of all chunks first, by a running sum or a loop where they decay, then every chunk in one product."""
    k, v = _for_each_head(q, k, v)
    q, k = _features(problem, q, k)
    if not problem.causal:
        out = q @ (k.mT @ v)
        return out / (q @ k.sum(2)[..., None]) if _normalized(problem) else out * problem.head_dim**-0.5
    length, padding = q.shape[2], -q.shape[2] % chunk
    constant = problem.options(q.device).get("decay")
    decay = extras[0] if extras else None
    if constant is not None:
        decay = constant.to(torch.promote_types(q.dtype, torch.float32))[None, :, None].expand(1, -1, length)

    def chunks(x: Tensor) -> Tensor:  # (B, H, T, C, ...)
        return F.pad(x, (0, 0, 0, padding)).unflatten(2, (-1, chunk))

    q, k, v = chunks(q), chunks(k), chunks(v)
    q_start, k_end, scores, kept = q, k, None, None
    if decay is not None:
        total = chunks(decay if decay.dim() == 4 else decay[..., None]).cumsum(3)
        last = total[..., -1:, :]
        q_start, k_end = q * total.exp().to(q.dtype), k * (last - total).exp().to(q.dtype)
        kept = last.exp().mT.to(q.dtype)  # (B, H, T, M or 1, 1)
        if total.shape[4] > 1:  # as in each chunk's middle, so that neither factor leaves the range of its dtype
            middle = total[..., chunk // 2, None, :]
            scores = (q * (total - middle).exp().to(q.dtype)) @ (k * (middle - total).exp().to(q.dtype)).mT
        else:
            scores = q @ k.mT * (total - total.mT).clamp(max=0).exp().to(q.dtype)
    weights = (q @ k.mT if scores is None else scores).tril()
    added = k_end.mT @ v
    if kept is None:
        before = F.pad(added.cumsum(2)[:, :, :-1], (0, 0, 0, 0, 1, 0))
    else:
        states = [torch.zeros_like(added[:, :, 0])]
        for t in range(added.shape[2] - 1):
            states.append(kept[:, :, t] * states[-1] + added[:, :, t])
        before = torch.stack(states, 2)
    out = (weights @ v + q_start @ before).flatten(2, 3)[:, :, :length]
    if not _normalized(problem):
        return out * problem.head_dim**-0.5
    sums = F.pad(k.sum(3).cumsum(2)[:, :, :-1], (0, 0, 1, 0))
    denominator = (weights.sum(-1, keepdim=True) + q @ sums[..., None]).flatten(2, 3)[:, :, :length]
    return out / denominator


# mechanism -> (module, function, the argument of each further input, further arguments)
FLA: dict[str, tuple[str, str, dict[str, str], dict[str, Any]]] = {
    "linear": ("fla.ops.linear_attn", "chunk_linear_attn", {}, {"normalize": True}),
    "linear-sum": ("fla.ops.linear_attn", "chunk_linear_attn", {}, {"normalize": False}),
    "retention": ("fla.ops.retention", "chunk_retention", {}, {}),
    "simple-gla": ("fla.ops.simple_gla", "chunk_simple_gla", {"decay": "g"}, {}),
    "gla": ("fla.ops.gla", "chunk_gla", {"decay": "g"}, {}),
    "delta": ("fla.ops.delta_rule", "chunk_delta_rule", {"beta": "beta"}, {}),
    "gated-delta": ("fla.ops.gated_delta_rule", "chunk_gated_delta_rule", {"beta": "beta", "decay": "g"}, {}),
}


def bind_fla(problem: LinearProblem) -> tuple[str, Attend]:
    """flash-linear-attention's chunkwise kernels, whose tensors are (batch, seqlen, heads, head_dim)."""
    if problem.mechanism not in FLA or not problem.causal or problem.step or problem.heads != problem.kv_heads:
        raise NotImplementedError("flash-linear-attention has no such kernel")
    module, name, arguments, options = FLA[problem.mechanism]
    function = getattr(importlib.import_module(module), name)

    def attend(q: Tensor, k: Tensor, v: Tensor, *extras: Tensor) -> Tensor:
        named = {arguments[name]: x.transpose(1, 2) for name, x in problem.named(extras).items()}
        out, _ = function(*(x.transpose(1, 2) for x in (q, k, v)), **named, **options)
        return out.transpose(1, 2)

    return f"{module}.{name}", attend
