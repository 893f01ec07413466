"""Is a timed result of linear attention right? One head against float64, held to what plain PyTorch loses in the dtype.

The truth is the chunkwise formula in float64, for which no length is too long and which agrees with the recurrence
(`tests/bench/test_linear.py`). The bar is that of `accuracy`: 2 x the error of the naive form in the same dtype, 3 x
for gradients, plus the roundings that it may be spared by luck.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from fastattn.bench.accuracy import relative_distance, relative_error, spared_rounding
from fastattn.bench.case import Attend, Check
from fastattn.bench.linear.baselines import bind_naive, bind_torch, has_naive_form, has_weights, loop
from fastattn.bench.linear.problem import LinearProblem

# The naive form is quadratic, or a step at a time: the bar comes from a prefix, whose sums are shorter, not from more.
QUADRATIC_PREFIX = 1024
STEPPED_PREFIX = 256


class LinearJudge:
    """The float64 truth of one problem's last head of the last batch: the output and the gradient of every input."""

    def __init__(self, problem: LinearProblem, inputs: tuple[Tensor, ...]) -> None:
        self._problem = problem
        *tensors, grad_out = inputs
        names = ["query", "key", "value", *(() if problem.step else problem.kind.extras)]
        # What belongs to no one head (a projection) takes part whole, and its gradient is not judged.
        self._of_a_head = [t.dim() > 2 for t in tensors]
        self._tensors = [t[-1:, -1:] if mine else t for t, mine in zip(tensors, self._of_a_head, strict=True)]
        self._grad_out = grad_out[-1:, -1:].detach()
        backward = problem.mode == "fwdbwd" and problem.heads == problem.kv_heads
        judged = [f"grad_{n}" for n, mine in zip(names, self._of_a_head, strict=False) if mine]
        self._names = ["out", *(judged if backward else ())]
        self.checked = f"{', '.join(self._names)}: all rows of the last head of the last batch"
        self._reference = self._compute(self._exactly(), torch.float64)
        self._bars: dict[str, float] | None = None

    def _exactly(self) -> Attend:
        return self._problem.call(last_head=True, backend="reference")

    def _plainly(self, steps: int) -> list[Attend]:
        """What sets the bar: the naive form, or, where there is none, the reference formulas in the inputs' dtype.

        Of the delta rule two forms, of which the worse counts: chunkwise algorithms solve a system of so many steps.
        """
        if self._problem.step:
            return [bind_torch(self._problem)[1]]
        if not has_naive_form(self._problem):
            return [self._exactly()]
        forms = [bind_naive(self._problem, last_head=True)[1]]
        return forms + ([partial(loop, steps, self._problem)] if "beta" in self._problem.kind.extras else [])

    def _compute(self, attend: Attend, dtype: torch.dtype, prefix: int | None = None) -> dict[str, Tensor]:
        """Results of the first so many steps with inputs of that dtype (gates of at least float32)."""
        backward = len(self._names) > 1
        least = torch.promote_types(dtype, torch.float32)
        own = self._problem.torch_dtype
        tensors = [cut(t.detach(), prefix).to(dtype if t.dtype == own else least) for t in self._tensors]
        tensors = [t.requires_grad_(backward) for t in tensors]
        out = attend(*tensors)
        found = {"out": out.detach()}
        if backward:
            gradients = torch.autograd.grad(out, tensors, cut(self._grad_out, prefix).to(dtype))
            found |= dict(zip(self._names[1:], self._judged(gradients), strict=True))
        return found

    def _judged(self, gradients: Sequence[Tensor]) -> list[Tensor]:
        return [g for g, of_a_head in zip(gradients, self._of_a_head, strict=False) if of_a_head]

    def bars(self) -> dict[str, float]:
        """The largest error allowed for each tensor."""
        if self._bars is None:
            problem = self._problem
            dtype = problem.torch_dtype
            if dtype == torch.float64:
                self._bars = dict.fromkeys(self._names, 1e-10)
                return self._bars
            prefix = None
            if has_naive_form(problem):
                prefix = min(problem.seqlen, QUADRATIC_PREFIX if has_weights(problem) else STEPPED_PREFIX)
            exact = self._compute(self._exactly(), torch.float64, prefix) if prefix else self._reference
            plain = [self._compute(form, dtype, prefix) for form in self._plainly(prefix or problem.seqlen)]
            self._bars = {
                name: (2 if name == "out" else 3) * max(relative_error(found[name], exact[name]) for found in plain)
                + spared_rounding(dtype) / self._reference[name].abs().max().item()
                + torch.finfo(dtype).eps
                for name in self._names
            }
        return self._bars

    def check(self, results: tuple[Tensor, ...]) -> Check:
        """Judge (out,) or (out, the gradient of every input)."""
        out, *gradients = results
        found = dict(zip(self._names, (t[-1:, -1:].detach() for t in (out, *self._judged(gradients))), strict=False))
        errors = {name: relative_error(found[name], self._reference[name]) for name in self._names}
        return Check(errors, self.bars())

    def distance(self, out: Tensor) -> float:
        return relative_distance(out[-1:, -1:].detach(), self._reference["out"])


def cut(x: Tensor, length: int | None) -> Tensor:
    """The first steps of what has steps."""
    return x if length is None or x.dim() < 3 else x[:, :, :length]
