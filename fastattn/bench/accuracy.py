"""Is a timed result right? One head against float64, held to what plain PyTorch itself loses in the same dtype.

The bar is that of `fastattn verify`: at most 2 x the error of naive attention in the same dtype (3 x for gradients),
plus the roundings that plain PyTorch may be spared by luck. Errors are largest differences relative to the largest
reference value, so one number serves outputs and gradients.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fastattn.bench.suites import Problem

NAMES = ("out", "grad_query", "grad_key", "grad_value")

# Rows of the score matrix held at a time: 256 rows of 8192 keys in float64 are 16 MiB.
CHUNK = 256

# The float64 reference of a whole head costs 14 S^2 D operations: about 2 s at this length on 2 CPU cores. Longer
# problems are checked on evenly spaced query rows (out and grad_query, which need no other rows).
LONGEST_WHOLE_HEAD = 8192
SPOT_ROWS = 128

# torch multiplies float16 matrices at about 1 GFLOP/s on CPUs without float16 arithmetic: there the bar comes from a
# prefix of the head.
FLOAT16_PREFIX = 512


def naive_rows(q_RD: Tensor, k_SD: Tensor, v_SD: Tensor, positions_R: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    """(probabilities (R, S), out (R, D)) of the given query rows of one head, in the tensors' own dtype."""
    scores_RS = (q_RD @ k_SD.mT) / math.sqrt(q_RD.shape[-1])
    if causal:
        future_RS = torch.arange(k_SD.shape[0], device=q_RD.device)[None, :] > positions_R[:, None]
        scores_RS = scores_RS.masked_fill_(future_RS, -torch.inf)
    p_RS = scores_RS.softmax(-1)
    return p_RS, p_RS @ v_SD


def one_head(
    q_SD: Tensor, k_SD: Tensor, v_SD: Tensor, do_SD: Tensor | None, causal: bool, rows: Tensor | None, chunk: int
) -> dict[str, Tensor]:
    """Attention of one head and, with `do_SD`, its gradients, by their formulas, `chunk` rows at a time.

    With `rows` only these query rows are computed, and only out and grad_query are returned.
    """
    positions = torch.arange(q_SD.shape[0], device=q_SD.device) if rows is None else rows
    out, grad_q = [], []
    grad_k, grad_v = torch.zeros_like(k_SD), torch.zeros_like(v_SD)
    for index_R in positions.split(chunk):
        # With a causal mask no row of the chunk sees a key past the chunk's last row.
        keys = int(index_R[-1]) + 1 if causal else k_SD.shape[0]
        q_RD, k_KD, v_KD = q_SD[index_R], k_SD[:keys], v_SD[:keys]
        p_RK, o_RD = naive_rows(q_RD, k_KD, v_KD, index_R, causal)
        out.append(o_RD)
        if do_SD is None:
            continue
        do_RD = do_SD[index_R]
        grad_p_RK = do_RD @ v_KD.mT
        grad_s_RK = p_RK * (grad_p_RK - (do_RD * o_RD).sum(-1, keepdim=True)) / math.sqrt(q_SD.shape[-1])
        grad_q.append(grad_s_RK @ k_KD)
        if rows is None:
            grad_k[:keys] += grad_s_RK.mT @ q_RD
            grad_v[:keys] += p_RK.mT @ do_RD
    results = {"out": torch.cat(out)}
    if do_SD is not None:
        results["grad_query"] = torch.cat(grad_q)
        if rows is None:
            results |= {"grad_key": grad_k, "grad_value": grad_v}
    return results


@dataclass(frozen=True)
class Check:
    """The outcome for one implementation: errors by tensor name, relative to the largest reference value."""

    errors: dict[str, float]
    bars: dict[str, float]

    @property
    def passed(self) -> bool:
        return all(self.errors[name] <= self.bars[name] for name in self.bars)

    @property
    def worst(self) -> tuple[float, float]:
        """(error, bar) of the tensor that is closest to its bar or furthest above it."""
        name = max(self.bars, key=lambda n: self.errors[n] / self.bars[n])
        return self.errors[name], self.bars[name]


def relative_error(result: Tensor, reference: Tensor) -> float:
    """max |result - reference| / max |reference|; infinite where the result is not finite."""
    difference = (result.to(torch.float64) - reference).abs().max().item()
    return difference / reference.abs().max().item() if math.isfinite(difference) else math.inf


def spared_rounding(dtype: torch.dtype) -> float:
    """Eight roundings of the accumulator at magnitude one, which the inputs have."""
    return 8 * torch.finfo(torch.promote_types(dtype, torch.float32)).eps


class Judge:
    """The float64 reference of one problem's last query head, computed once and used for every implementation."""

    def __init__(self, problem: Problem, inputs: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
        self._problem = problem
        self._backward = problem.mode == "fwdbwd"
        # With grouped heads the last query head shares its key head's gradients with others: check out, grad_query.
        whole = problem.seqlen <= LONGEST_WHOLE_HEAD
        spots = torch.linspace(0, problem.seqlen - 1, SPOT_ROWS, device=inputs[0].device).long()
        self._rows = None if whole else spots
        self._names = NAMES[: 1 + 3 * self._backward]
        if self._backward and (not whole or problem.heads != problem.kv_heads):
            self._names = NAMES[:2]
        self._head = tuple(t[-1, -1].detach() for t in inputs)
        self._reference = self._compute(torch.float64, CHUNK)
        self._bars: dict[str, float] | None = None
        rows = "all rows" if whole else f"{SPOT_ROWS} rows"
        self.checked = f"{', '.join(self._names)}: {rows} of the last head of the last batch"

    def _compute(self, dtype: torch.dtype, chunk: int, length: int | None = None) -> dict[str, Tensor]:
        q, k, v, do = (t[:length].to(dtype) for t in self._head)
        rows = None if length else self._rows
        return one_head(q, k, v, do if self._backward else None, self._problem.causal, rows, chunk)

    def bars(self) -> dict[str, float]:
        """The largest error allowed for each tensor."""
        if self._bars is None:
            dtype = self._problem.torch_dtype
            slow = dtype == torch.float16 and self._head[0].device.type == "cpu"
            prefix = min(FLOAT16_PREFIX, self._problem.seqlen) if slow else None
            reference = self._compute(torch.float64, CHUNK, prefix) if prefix else self._reference
            # Undivided, as naive attention computes it: a low-precision sum over chunks would lose more.
            plain = self._compute(dtype, self._problem.seqlen, prefix)
            self._bars = {}
            for name in self._names:
                if dtype == torch.float64:
                    self._bars[name] = 1e-10
                    continue
                factor = 2 if name == "out" else 3
                spared = spared_rounding(dtype) / self._reference[name].abs().max().item() + torch.finfo(dtype).eps
                self._bars[name] = factor * relative_error(plain[name], reference[name]) + spared
        return self._bars

    def check(self, results: tuple[Tensor, ...]) -> Check:
        """Judge (out,) or (out, grad_query, grad_key, grad_value), whole tensors (B, H, S, D)."""
        head = {name: t[-1, -1].detach() for name, t in zip(NAMES, results, strict=False) if name in self._names}
        if self._rows is not None:
            head = {name: t[self._rows] for name, t in head.items()}
        errors = {name: relative_error(head[name], self._reference[name]) for name in self._names}
        return Check(errors, self.bars())
