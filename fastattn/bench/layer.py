"""A whole attention layer as something to measure: fastattn's beside torch's, both on the same weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import fastattn.nn
from fastattn.bench.accuracy import CHUNK, one_head, relative_distance, relative_error, spared_rounding
from fastattn.bench.case import Attend, Check, default_device
from fastattn.bench.suites import Problem

PARAMETERS = ("in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias")
NAMES = ("out", "grad_x", *(f"grad_{name}" for name in PARAMETERS))


def options(layer: torch.nn.MultiheadAttention, causal: bool, weights: bool, mask: Tensor | None) -> dict[str, Any]:
    """Keyword arguments with which a layer attends to its own input.

    torch's layer wants the causal mask as a tensor; fastattn's needs none.
    """
    if isinstance(layer, fastattn.nn.MultiheadAttention):
        return {"need_weights": weights, "is_causal": causal}
    return {"need_weights": weights, "attn_mask": mask, "is_causal": causal and not weights}


def draw(problem: Problem, draw_normal: Callable[..., Tensor]) -> tuple[Tensor, ...]:
    """x (batch, seqlen, embed_dim), the layer's parameters and the output's gradient."""
    width = problem.heads * problem.head_dim
    x, grad_out = (draw_normal(problem.batch, problem.seqlen, width) for _ in range(2))
    weights = [draw_normal(rows, width) / width**0.5 for rows in (3 * width, width)]
    biases = [draw_normal(rows) / width**0.5 for rows in (3 * width, width)]
    return x, weights[0], biases[0], weights[1], biases[1], grad_out


def bind(problem: Problem, kind: type[torch.nn.MultiheadAttention]) -> tuple[str, Attend]:
    """The layer as a function of x and its parameters; its output alone, also where it computes weights."""
    device = default_device()
    layer = kind(problem.heads * problem.head_dim, problem.heads, batch_first=True, device=device)
    mask = torch.ones(problem.seqlen, problem.seqlen, dtype=torch.bool, device=device).triu_(1)
    chosen = options(layer, problem.causal, problem.layer == "with weights", mask if problem.causal else None)

    def attend(x: Tensor, *parameters: Tensor) -> Tensor:
        named = dict(zip(PARAMETERS, parameters, strict=True))
        return torch.func.functional_call(layer, named, (x, x, x), chosen)[0]

    return f"{kind.__module__.partition('.')[0]}.nn", attend


class LayerJudge:
    """The float64 reference of a layer's output and of all its gradients, from `accuracy.one_head`."""

    def __init__(self, problem: Problem, inputs: tuple[Tensor, ...]) -> None:
        self._problem, self._inputs = problem, inputs
        self._names = NAMES if problem.mode == "fwdbwd" else NAMES[:1]
        self.checked = ", ".join(self._names)
        self._reference = self._compute(torch.float64)
        plain = self._compute(problem.torch_dtype)
        self._bars = {
            name: (2 if name == "out" else 3) * relative_error(plain[name], exact)
            + spared_rounding(problem.torch_dtype) / exact.abs().max().item()
            + torch.finfo(problem.torch_dtype).eps
            for name, exact in self._reference.items()
        }

    def _compute(self, dtype: torch.dtype) -> dict[str, Tensor]:
        x_BLE, w_in, b_in, w_out, b_out, grad_out_BLE = (t.detach().to(dtype) for t in self._inputs)
        backward = self._problem.mode == "fwdbwd"
        out, grad_x = torch.empty_like(x_BLE), torch.empty_like(x_BLE)
        grads = [torch.zeros_like(t) for t in (w_in, b_in, w_out, b_out)]
        for b, (x_LE, grad_out_LE) in enumerate(zip(x_BLE, grad_out_BLE, strict=True)):
            heads = self._problem.heads
            q, k, v = ((x_LE @ w_in.mT + b_in).chunk(3, -1)[i].chunk(heads, -1) for i in range(3))
            grad_heads = (grad_out_LE @ w_out).chunk(heads, -1)
            found = [
                one_head(q[h], k[h], v[h], grad_heads[h] if backward else None, self._problem.causal, None, CHUNK)
                for h in range(heads)
            ]
            joined_LE = torch.cat([f["out"] for f in found], -1)
            out[b] = joined_LE @ w_out.mT + b_out
            if not backward:
                continue
            grad_LF = torch.cat([f[f"grad_{name}"] for name in ("query", "key", "value") for f in found], -1)
            grad_x[b] = grad_LF @ w_in
            parts = (grad_LF.mT @ x_LE, grad_LF.sum(0), grad_out_LE.mT @ joined_LE, grad_out_LE.sum(0))
            for grad, part in zip(grads, parts, strict=True):
                grad += part
        return dict(zip(self._names, (out, grad_x, *grads), strict=False))

    def check(self, results: tuple[Tensor, ...]) -> Check:
        """Judge (out,) or (out, the gradients of x and of the parameters)."""
        found = dict(zip(self._names, results, strict=True))
        return Check({n: relative_error(found[n].detach(), self._reference[n]) for n in self._names}, self._bars)

    def distance(self, out: Tensor) -> float:
        return relative_distance(out.detach(), self._reference["out"])
