"""The accuracy bar: how far from the float64 truth a result may be.

Twice the error of plain PyTorch math in the same dtype, three times for gradients (1e-10 relative for float64), plus
the little that plain PyTorch is spared by luck or by keeping the attention matrix; each such term says its cause.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fastattn.verify.cases import Case
from fastattn.verify.inputs import Inputs

FACTOR = 2.0  # of the error of plain PyTorch math in the same dtype
GRADIENT_FACTOR = 3.0
FLOAT64_RELATIVE = 1e-10
DECODED_ROWS = 16  # decoding kernels take up to so many queries, and sum in another order than the backward
NO_GRADIENT = 1e-12  # a gradient this small in float64 is rounding: it vanishes


def accumulator_of(dtype: torch.dtype) -> torch.dtype:
    """What kernels for that dtype sum in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def absolute_tolerance(truth: Tensor, dtype: torch.dtype, terms: int = 1) -> float:
    """What a result may be off where plain PyTorch happens to be exact.

    One unit in the last place of the largest element (the final rounding costs half of it, and plain PyTorch's may fall
    the lucky way), plus eight roundings of the accumulator at magnitude one. Where each element is a sum of ``terms``
    of that magnitude (the gradients of a broadcast bias and of sinks), the roundings add up as a random walk.
    """
    return torch.finfo(dtype).eps * largest(truth) + 8 * torch.finfo(accumulator_of(dtype)).eps * terms**0.5


def largest_error(result: Tensor, truth: Tensor) -> float:
    """max |result - truth|; infinite where one is not finite and the other differs."""
    if not truth.numel():
        return 0.0
    result = result.double()
    difference = torch.where(result == truth, 0.0, (result - truth).abs())
    return torch.nan_to_num(difference, nan=torch.inf).max().item()


def largest(tensor: Tensor) -> float:
    return tensor.abs().max().item() if tensor.numel() else 0.0


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


def finite(tensor: Tensor) -> Tensor:
    """The tensor with 0 for -inf, the LSE of rows without keys."""
    return tensor.masked_fill(tensor == -torch.inf, 0.0)


def allowed(
    case: Case,
    inputs: Inputs,
    truth: Mapping[str, Tensor],
    lse: Tensor,
    name: str,
    naive_errors: Mapping[str, float] | None,
    delegate: bool,
) -> float:
    """The largest error that the result called ``name`` may have.

    Args:
        inputs: in the dtype under test.
        truth: every result in float64, by name.
        lse: the LSE in float64, whether the case returns it or not.
        naive_errors: of plain PyTorch math in that dtype, by name; None for float64.
        delegate: of PyTorch's own kernels, whose forward and backward sum in different orders.
    """
    dtype = inputs.query.dtype
    exact = finite(truth[name])
    is_gradient = name.startswith("grad_")
    if naive_errors is None:
        bar = FLOAT64_RELATIVE * largest(exact)
    else:
        bar = (GRADIENT_FACTOR if is_gradient else FACTOR) * naive_errors[name]
    rows = case.sequences * case.heads * case.longest[0]
    summed = {"grad_attn_mask": rows * case.longest[1], "grad_sinks": rows}.get(name, 0)
    rounded_to = accumulator_of(dtype) if name == "lse" else dtype
    bar += absolute_tolerance(exact, rounded_to, max(summed // max(exact.numel(), 1), 1))
    if is_gradient:
        bar += recomputation_error(case, inputs, lse, exact, delegate or case.longest[0] <= DECODED_ROWS)
    if name in ("grad_query", "grad_key", "grad_attn_mask"):
        bar += cancellation_error(case, inputs, name)
    if name == "grad_attn_mask" and largest(exact) < NO_GRADIENT:
        bar += stored_output_error(case, inputs, truth)
    return bar
