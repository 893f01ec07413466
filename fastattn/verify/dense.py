"""The dense family's part of ``fastattn verify``: what its cases call, their plain PyTorch, and their accuracy bar."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from fastattn.verify import inputs as tensors
from fastattn.verify.bar import absolute_tolerance, accumulator_of, base, finite, largest
from fastattn.verify.cases import GRID, Case
from fastattn.verify.inputs import Inputs, join, lay_out, make_inputs, poison, problems
from fastattn.verify.naive import naive_attention

__all__ = ["GRID", "NAIVE", "allowed", "call", "disguise", "make_inputs", "zeros"]

DECODED_ROWS = 16  # decoding kernels take up to so many queries, and sum in another order than the backward
NO_GRADIENT = 1e-12  # a gradient this small in float64 is rounding: it vanishes


def disguise(case: Case, inputs: Inputs) -> Inputs:
    """The memory layout of the case, with NaN outside the key interval."""
    return lay_out(case, poison(case, inputs))


def call(case: Case, inputs: Inputs, backend: str | None) -> dict[str, Tensor]:
    """The results of the public function."""
    out, lse = tensors.call(case, inputs, backend)
    return {"out": out} if lse is None else {"out": out, "lse": lse}


def _kept(case: Case, inputs: Inputs, seed: int) -> list[Tensor] | None:
    """What the public function's dropout keeps, where torch's generator was seeded so."""
    if not case.dropout_p:
        return None
    from fastattn.dense.philox import draw_rng, dropout_keep

    torch.manual_seed(seed)
    rng = draw_rng(inputs.query.device)
    if case.packed is None:
        return [dropout_keep(rng, case.dropout_p, (case.batch, case.heads, case.q_len, case.k_len))]
    lengths = zip(*case.packed, strict=True)
    return [dropout_keep(rng, case.dropout_p, (1, case.heads, q, k), b) for b, (q, k) in enumerate(lengths)]


def naive(case: Case, inputs: Inputs, seed: int) -> dict[str, Tensor]:
    """The same results by plain PyTorch math in the inputs' dtype."""
    parts = [
        naive_attention(p, scale=case.scale, softcap=case.softcap, dropout_p=case.dropout_p)
        for p in problems(case, inputs, _kept(case, inputs, seed))
    ]
    results = {"out": join(case, [out for out, _ in parts], rows_at=2)}
    if case.lse:
        results["lse"] = join(case, [lse for _, lse in parts], rows_at=2)
    return results


NAIVE = (naive,)


def zeros(case: Case, inputs: Inputs) -> dict[str, Tensor]:
    """Where out and the gradients are zero by definition: rows that see no key, keys that no row sees."""
    rows, keys = [], []
    for p in problems(case, inputs):
        allowed = p.seen.expand(p.query.shape[0], p.query.shape[1], *p.seen.shape[2:])
        if p.mask is not None:
            allowed = allowed & (p.mask if p.mask.dtype == torch.bool else p.mask != -torch.inf)
        if p.blocks is not None:
            allowed = allowed & p.blocks
        rows.append(~allowed.any(3)[..., None])
        keys.append(~allowed.any(2).unflatten(1, (case.hkv, -1)).any(2)[..., None])
    row, key = join(case, rows, rows_at=2), join(case, keys, rows_at=2)
    return {"out": row, "grad_query": row, "grad_key": key, "grad_value": key}


def recomputation_error(case: Case, inputs: Inputs, lse: Tensor, truth: Tensor, reordered: bool) -> float:
    """What a gradient may be off because P is recomputed as exp(score - LSE) from the stored LSE.

    The rounding of LSE, half a unit at |LSE|, is a relative error of P that all keys of the row share, where the
    rounding of plain PyTorch's scores averages out over the keys. In a row that one key dominates, LSE is its score.
    Where the forward sums that score in another order than the backward, its own rounding remains too, and the
    roundings of the D partial sums, a random walk.
    """
    eps = torch.finfo(accumulator_of(inputs.query.dtype)).eps
    error = eps / 2 * largest(finite(lse))
    if reordered and inputs.query.numel() and inputs.key.numel():
        query, key = inputs.query.double(), inputs.key.double()
        if case.packed is not None:
            query, key = query.transpose(0, 1), key.transpose(0, 1)
        key = key.repeat_interleave(case.heads // case.hkv, -3)
        products = largest((query.square() @ key.square().mT).sqrt())  # norms of the terms that a score sums
        error += error + eps / 2 * case.head_dim**0.5 * scale_of(case) * products
    return error * largest(truth)


def scale_of(case: Case) -> float:
    return case.head_dim**-0.5 if case.scale is None else abs(case.scale)


def cancellation_error(case: Case, inputs: Inputs, name: str) -> float:
    """What a gradient may be off in rows where one key takes nearly all of P (the first row of a causal problem).

    The gradient of a score is P * (dO . V - dO . O). With P = 1, V = O, and kernels that keep no attention matrix
    subtract two equal sums that they rounded in different orders, where plain PyTorch subtracts a number from itself.
    Two units of the largest such sum (its partial sums reach twice the square root of its length, whatever they end
    at), carried on to query and key by the scale and the other operand.
    """
    if not inputs.query.numel() or not inputs.key.numel():
        return 0.0
    grad_out, value = inputs.grad_out.double(), inputs.value.double()
    if case.packed is not None:
        grad_out, value = grad_out.transpose(0, 1), value.transpose(0, 1)
    sums = grad_out @ value.repeat_interleave(case.heads // case.hkv, -3).mT
    size = max(largest(sums), 2 * case.dv**0.5)
    error = 2 * torch.finfo(accumulator_of(inputs.query.dtype)).eps * size
    if name == "grad_attn_mask":
        return error
    return error * scale_of(case) * largest((inputs.key if name == "grad_query" else inputs.query).double())


def stored_output_error(case: Case, inputs: Inputs, truth: Mapping[str, Tensor]) -> float:
    """How far from zero the gradient of a bias may be that is constant over the keys, so that its gradient vanishes.

    The gradients of a row's scores sum to zero, but a kernel takes dO . O from the output that it stored, rounded:
    half a unit of the output for each row, adding up as a random walk.
    """
    rows = case.sequences * case.heads * case.longest[0] / max(truth["grad_attn_mask"].numel(), 1)
    grad_out = largest(inputs.grad_out.double().norm(dim=-1))
    return torch.finfo(inputs.query.dtype).eps / 2 * grad_out * largest(truth["out"]) * max(rows, 1.0) ** 0.5


def allowed(
    case: Case,
    inputs: Inputs,
    truth: Mapping[str, Tensor],
    naive_errors: Mapping[str, float],
    reordered: bool,
) -> dict[str, float]:
    """The largest error that each result and gradient may have; see `fastattn.verify.family.Family.allowed`."""
    dtype = inputs.query.dtype
    with torch.no_grad():
        lse = naive(replace(case, lse=True), inputs.to(torch.float64), seed=0)["lse"]
    reordered = reordered or case.longest[0] <= DECODED_ROWS
    rows = case.sequences * case.heads * case.longest[0]
    summed = {"grad_attn_mask": rows * case.longest[1], "grad_sinks": rows}
    bars = {}
    for name, result in truth.items():
        exact = finite(result)
        terms = max(summed.get(name, 0) // max(exact.numel(), 1), 1)
        bar = base(name, exact, dtype, naive_errors[name])
        bar += absolute_tolerance(exact, accumulator_of(dtype) if name == "lse" else dtype, terms)
        if name.startswith("grad_"):
            bar += recomputation_error(case, inputs, lse, exact, reordered)
        if name in ("grad_query", "grad_key", "grad_attn_mask"):
            bar += cancellation_error(case, inputs, name)
        if name == "grad_attn_mask" and largest(exact) < NO_GRADIENT:
            bar += stored_output_error(case, inputs, truth)
        bars[name] = bar
    return bars
