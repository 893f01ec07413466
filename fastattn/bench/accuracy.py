"""Is a timed result right? One head against float64, held to what plain PyTorch itself loses in the same dtype.

The bar is that of `fastattn verify`: at most 2 x the error of naive attention in the same dtype (3 x for gradients),
plus the roundings that plain PyTorch may be spared by luck. Errors are largest differences relative to the largest
reference value, so one number serves outputs and gradients.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from fastattn.bench.case import Check
from fastattn.bench.suites import Problem

NAMES = ("out", "grad_query", "grad_key", "grad_value", "grad_bias")

# Rows of the score matrix held at a time: 256 rows of 8192 keys in float64 are 16 MiB.
CHUNK = 256

# The float64 reference of a whole head costs 14 S^2 D operations: about 2 s at this length on 2 CPU cores. Longer
# problems are checked on evenly spaced query rows (out and grad_query, which need no other rows).
LONGEST_WHOLE_HEAD = 8192
SPOT_ROWS = 128

# torch multiplies float16 matrices at about 1 GFLOP/s on CPUs without float16 arithmetic: there the bar comes from a
# prefix of the head.
FLOAT16_PREFIX = 512

# How far the spread that dropout causes may be from its expectation, relative to it. Chance alone makes 0.1 at 256
# rows, below which there are too few to tell; a result without dropout is off by 1.
DROPOUT_BAR = 0.5


def naive_rows(
    q_RD: Tensor,
    k_SD: Tensor,
    v_SD: Tensor,
    positions_R: Tensor,
    causal: bool,
    window: int | None = None,
    bias_RS: Tensor | None = None,
    keep_RS: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(probabilities (R, S), out (R, D)) of the given query rows of one head, in the tensors' own dtype."""
    scores_RS = (q_RD @ k_SD.mT) / math.sqrt(q_RD.shape[-1])
    if bias_RS is not None:
        scores_RS += bias_RS
    if causal:
        ahead_RS = torch.arange(k_SD.shape[0], device=q_RD.device)[None, :] - positions_R[:, None]
        hidden_RS = ahead_RS > 0 if window is None else (ahead_RS > 0) | (ahead_RS < -window)
        scores_RS = scores_RS.masked_fill_(hidden_RS, -torch.inf)
    if keep_RS is not None:
        scores_RS = scores_RS.masked_fill_(~keep_RS, -torch.inf)
    p_RS = scores_RS.softmax(-1)
    return p_RS, p_RS @ v_SD


def one_head(
    q_SD: Tensor,
    k_SD: Tensor,
    v_SD: Tensor,
    do_SD: Tensor | None,
    causal: bool,
    rows: Tensor | None,
    chunk: int,
    window: int | None = None,
    bias_SS: Tensor | None = None,
    keeps: Callable[[Tensor], Tensor | None] = lambda rows: None,
) -> dict[str, Tensor]:
    """Attention of one head and, with `do_SD`, its gradients, by their formulas, `chunk` rows at a time.

    With `rows` only these query rows are computed, and grad_key and grad_value, which need all, are not returned.
    """
    positions = torch.arange(q_SD.shape[0], device=q_SD.device) if rows is None else rows
    out, grad_q, grad_bias = [], [], []
    grad_k, grad_v = torch.zeros_like(k_SD), torch.zeros_like(v_SD)
    for index_R in positions.split(chunk):
        # With a causal mask no row of the chunk sees a key past the chunk's last row.
        keys = int(index_R[-1]) + 1 if causal else k_SD.shape[0]
        q_RD, k_KD, v_KD = q_SD[index_R], k_SD[:keys], v_SD[:keys]
        bias_RK = None if bias_SS is None else bias_SS[index_R, :keys]
        keep_RS = keeps(index_R)
        keep_RK = None if keep_RS is None else keep_RS[:, :keys]
        p_RK, o_RD = naive_rows(q_RD, k_KD, v_KD, index_R, causal, window, bias_RK, keep_RK)
        out.append(o_RD)
        if do_SD is None:
            continue
        do_RD = do_SD[index_R]
        grad_p_RK = do_RD @ v_KD.mT
        grad_s_RK = p_RK * (grad_p_RK - (do_RD * o_RD).sum(-1, keepdim=True))
        if bias_SS is not None:
            grad_bias.append(torch.nn.functional.pad(grad_s_RK, (0, k_SD.shape[0] - keys)))
        grad_s_RK = grad_s_RK / math.sqrt(q_SD.shape[-1])
        grad_q.append(grad_s_RK @ k_KD)
        if rows is None:
            grad_k[:keys] += grad_s_RK.mT @ q_RD
            grad_v[:keys] += p_RK.mT @ do_RD
    results = {"out": torch.cat(out)}
    if do_SD is not None:
        results["grad_query"] = torch.cat(grad_q)
        if bias_SS is not None:
            results["grad_bias"] = torch.cat(grad_bias)
        if rows is None:
            results |= {"grad_key": grad_k, "grad_value": grad_v}
    return results


def dropout_spread(
    q_SD: Tensor, k_SD: Tensor, v_SD: Tensor, causal: bool, rows: Tensor, dropout: float
) -> tuple[Tensor, Tensor]:
    """(out without dropout (R, D), expected squared distance (R,) of a row with dropout from it), in float64."""
    out, spread = [], []
    for index_R in rows.split(CHUNK):
        p_RS, o_RD = naive_rows(q_SD[index_R], k_SD, v_SD, index_R, causal)
        out.append(o_RD)
        spread.append(dropout / (1 - dropout) * (p_RS**2 @ v_SD.square().sum(-1)))
    return torch.cat(out), torch.cat(spread)


def relative_error(result: Tensor, reference: Tensor) -> float:
    """max |result - reference| / max |reference|; infinite where the result is not finite."""
    difference = (result.to(torch.float64) - reference).abs().max().item()
    return difference / reference.abs().max().item() if math.isfinite(difference) else math.inf


def relative_distance(result: Tensor, reference: Tensor) -> float:
    """|result - reference| / |reference|, of all elements together; infinite where the result is not finite."""
    distance = torch.linalg.vector_norm(result.to(torch.float64) - reference).item()
    return distance / torch.linalg.vector_norm(reference).item() if math.isfinite(distance) else math.inf


def spared_rounding(dtype: torch.dtype) -> float:
    """Eight roundings of the accumulator at magnitude one, which the inputs have."""
    return 8 * torch.finfo(torch.promote_types(dtype, torch.float32)).eps


class DenseJudge:
    """The float64 reference of one problem's last query head, computed once and used for every implementation.

    With dropout there is no one right result: out is held to the distance from attention without dropout that dropout
    makes it have on average, and gradients are not judged.
    """

    def __init__(self, problem: Problem, inputs: tuple[Tensor, ...]) -> None:
        self._problem = problem
        self._backward = problem.mode == "fwdbwd" and not problem.dropout
        # With grouped heads the last query head shares its key head's gradients with others: check out, grad_query.
        whole = problem.seqlen <= LONGEST_WHOLE_HEAD
        spots = torch.linspace(0, problem.queries - 1, SPOT_ROWS, device=inputs[0].device).long()
        self._rows = None if whole or problem.q_len else spots
        self._names = NAMES[: 1 + 3 * self._backward]
        if self._backward and (not whole or problem.heads != problem.kv_heads):
            self._names = NAMES[:2]
        if self._backward and problem.bias:
            self._names += NAMES[4:]
        query, key, value, *bias, grad_out = inputs
        # Every batch's, since a bias that they share collects the gradients of all.
        self._heads = tuple(t[:, -1].detach() for t in (query, key, value, grad_out))
        self._bias = bias[0][0, -1].detach() if bias else None
        self._reference = {} if problem.dropout else self._compute(torch.float64, CHUNK)
        self._bars: dict[str, float] | None = None
        rows = "all rows" if self._rows is None else f"{SPOT_ROWS} rows"
        self.checked = f"{', '.join(self._names)}: {rows} of the last head of the last batch"
        if problem.dropout:
            q, k, v = (t[-1].to(torch.float64) for t in self._heads[:3])
            rows_R = torch.arange(problem.queries, device=q.device) if self._rows is None else self._rows
            self._spread = dropout_spread(q, k, v, problem.causal, rows_R, problem.dropout)
            self.checked = f"out's distance from attention without dropout: {self.checked}"

    def _compute(self, dtype: torch.dtype, chunk: int, length: int | None = None) -> dict[str, Tensor]:
        rows = None if length else self._rows
        bias = None if self._bias is None else self._bias[:length, :length].to(dtype)
        mask = (self._problem.causal, rows, chunk, self._problem.window, bias, self._problem.keeps)
        grad_bias = []
        # A bias makes every batch count; else the last one alone is looked at.
        for heads in zip(*(t if self._bias is not None else t[-1:] for t in self._heads), strict=True):
            q, k, v, do = (t[:length].to(dtype) for t in heads)
            results = one_head(q, k, v, do if self._backward else None, *mask)
            if "grad_bias" in results:
                grad_bias.append(results["grad_bias"])
        if grad_bias:
            results["grad_bias"] = torch.stack(grad_bias).sum(0)
        return results

    def bars(self) -> dict[str, float]:
        """The largest error allowed for each tensor."""
        if self._bars is None:
            dtype = self._problem.torch_dtype
            slow = dtype == torch.float16 and self._heads[0].device.type == "cpu"
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
        """Judge (out,) or (out, grad_query, grad_key, grad_value, grad_bias if any), whole tensors (B, H, S, D)."""
        head = {name: t[-1, -1].detach() for name, t in zip(NAMES, results, strict=False) if name in self._names}
        if self._rows is not None:
            head = {name: t[self._rows] for name, t in head.items()}
        if self._problem.dropout:
            exact, expected = self._spread
            ratio = ((head["out"] - exact).square().sum(-1) / expected).mean().item()
            error = abs(ratio - 1) if math.isfinite(ratio) else math.inf
            return Check({"out": error}, {"out": DROPOUT_BAR})
        errors = {name: relative_error(head[name], self._reference[name]) for name in self._names}
        return Check(errors, self.bars())

    def distance(self, out: Tensor) -> float:
        """How far the output of another kind of attention is from this one's, on the rows that are judged."""
        head = out[-1, -1].detach()
        return relative_distance(head if self._rows is None else head[self._rows], self._reference["out"])
