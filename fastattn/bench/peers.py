"""Other libraries' attention, set beside ours where it is installed."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastattn.bench.case import Attend, default_device

if TYPE_CHECKING:
    from fastattn.bench.suites import Problem


def bind_flex(problem: Problem) -> tuple[str, Attend]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    if problem.dropout:
        raise NotImplementedError("flex_attention has no dropout")
    # torch compiles one function for a few shapes only, then runs it uncompiled: every problem starts afresh.
    torch.compiler.reset()
    compiled = torch.compile(flex_attention, dynamic=False)
    gqa = problem.heads != problem.kv_heads
    reach = problem.seqlen if problem.window is None else problem.window
    mask = None
    if problem.causal:
        mask = create_block_mask(
            lambda b, h, i, j: (i >= j) & (i - j <= reach),
            *(None, None, problem.seqlen, problem.seqlen),
            device=default_device().type,
        )

    def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
        add = None if bias is None else lambda score, b, h, i, j: score + bias[0, h, i, j]
        out = compiled(q, k, v, score_mod=add, block_mask=mask, enable_gqa=gqa)
        assert isinstance(out, Tensor)
        return out

    return "compiled", attend


def _bind_flash_attn_4(problem: Problem) -> tuple[str, Attend]:
    flash_attn_func = importlib.import_module("flash_attn.cute").flash_attn_func
    if problem.bias or problem.dropout:
        raise NotImplementedError("flash-attn 4 has neither a bias with a gradient nor dropout")
    window = (None, None) if problem.window is None else (problem.window, 0)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return flash_attn_func(q, k, v, causal=problem.causal, window_size=window)[0].transpose(1, 2)

    return "flash_attn.cute", attend


def _bind_xformers(problem: Problem) -> tuple[str, Attend]:
    ops = importlib.import_module("xformers.ops")
    mask = ops.LowerTriangularMask() if problem.causal else None
    if problem.window is not None:
        biases = importlib.import_module("xformers.ops.fmha.attn_bias")
        mask = biases.LowerTriangularFromBottomRightMask().make_local_attention(problem.window + 1)
    groups = problem.heads // problem.kv_heads

    def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        if groups > 1:  # (B, S, Hkv, groups, D): grouped heads are an axis of their own
            q = q.unflatten(2, (problem.kv_heads, groups))
            k, v = (t.unsqueeze(3).expand(-1, -1, -1, groups, -1) for t in (k, v))
        added = mask if bias is None else bias.expand(problem.batch, -1, -1, -1)
        out = ops.memory_efficient_attention(q, k, v, attn_bias=added, p=problem.dropout)
        return (out.flatten(2, 3) if groups > 1 else out).transpose(1, 2)

    return "memory_efficient_attention", attend


def _bind_flash_linear_attention(problem: Problem) -> tuple[str, Attend]:
    parallel_attn = importlib.import_module("fla.ops.attn").parallel_attn
    if not problem.causal or problem.bias or problem.dropout or problem.q_len:
        raise NotImplementedError("flash-linear-attention's softmax attention is causal, with equal lengths, and plain")
    width = None if problem.window is None else problem.window + 1

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return parallel_attn(q, k, v, window_size=width).transpose(1, 2)

    return "fla.ops.attn.parallel_attn", attend


@dataclass(frozen=True)
class Peer:
    """A library that is measured where it is installed: the module that must be importable, and how it is bound."""

    module: str
    bind: Callable[[Problem], tuple[str, Attend]]


PEERS = {
    "flash-attn-4": Peer("flash_attn.cute", _bind_flash_attn_4),
    "flash-linear-attention": Peer("fla.ops.attn", _bind_flash_linear_attention),
    "xformers": Peer("xformers.ops", _bind_xformers),
}
