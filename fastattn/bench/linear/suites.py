"""The implementations set beside each other in measuring linear attention."""

from __future__ import annotations

import torch

from fastattn.bench.case import Implementation
from fastattn.bench.linear.baselines import bind_fla, bind_naive, bind_torch, has_naive_form, naive_bytes, naive_work
from fastattn.bench.linear.problem import LinearProblem, bind_fastattn
from fastattn.bench.suites import Problem, bind_sdpa
from fastattn.bench.suites import bind_fastattn as bind_softmax

NAMES = ("naive", "torch", "sdpa", "flash", "fla", "fastattn", "fastattn:<backend>")


def implementation(name: str) -> Implementation:
    """Look up `naive`, `torch` (chunkwise), `fla`, `fastattn`, `fastattn:<backend>`; `sdpa` and `flash` are softmax.

    Raises:
        ValueError: no such implementation.
    """
    kind, _, backend = name.partition(":")
    if name == "naive":
        return Implementation(name, bind_naive, naive_bytes, subject=has_naive_form, work=naive_work)
    if name == "torch":
        return Implementation(name, bind_torch, subject=lambda p: p.step or has_naive_form(p))
    if name == "sdpa":
        return Implementation(name, bind_sdpa, solves=softmax)
    if name == "flash":
        return Implementation(name, bind_softmax, solves=softmax)
    if name == "fla":
        return Implementation(name, bind_fla, compiles=True, module="fla.ops")
    if kind == "fastattn":
        return Implementation(name, lambda p: bind_fastattn(p, backend or None))
    raise ValueError(f"no implementation {name!r}; there are {', '.join(NAMES)}")


def softmax(problem: LinearProblem) -> Problem:
    """Softmax attention of the same shape, in decoding over a KV cache; of values' size where features are more."""
    decoding = {"q_len": 1, "causal": False} if problem.step else {}
    return Problem(**problem.shape() | {"head_dim": problem.values} | decoding)


def default_implementations(device: torch.device) -> tuple[str, ...]:
    """Naive, PyTorch's chunkwise form, fastattn, and softmax attention; on a GPU flash-linear-attention too."""
    return ("naive", "torch", "sdpa", "flash", *(["fla"] if device.type == "cuda" else []), "fastattn")
