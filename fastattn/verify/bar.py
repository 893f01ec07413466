"""The accuracy bar: how far from the float64 truth a result may be.

Twice the error of plain PyTorch math in the same dtype, three times for gradients (1e-10 relative for float64), plus
the little that plain PyTorch is spared by luck or by keeping the attention matrix; each such term says its cause.
"""

from __future__ import annotations

import torch
from torch import Tensor

FACTOR = 2.0  # of the error of plain PyTorch math in the same dtype
GRADIENT_FACTOR = 3.0
FLOAT64_RELATIVE = 1e-10


def accumulator_of(dtype: torch.dtype) -> torch.dtype:
    """What kernels for that dtype sum in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def base(name: str, truth: Tensor, dtype: torch.dtype, naive_error: float) -> float:
    """What plain PyTorch's own error allows the result called ``name``."""
    error = (GRADIENT_FACTOR if name.startswith("grad_") else FACTOR) * naive_error
    return error + FLOAT64_RELATIVE * largest(truth) if dtype == torch.float64 else error


def absolute_tolerance(truth: Tensor, dtype: torch.dtype, terms: int = 1) -> float:
    """What a result may be off where plain PyTorch happens to be exact.

    One unit in the last place of the largest element (the final rounding costs half of it, and plain PyTorch's may fall
    the lucky way), plus eight roundings of the accumulator at magnitude one. Where each element is a sum of ``terms``
    of that magnitude (gradients of a broadcast bias, of sinks, of an initial state), they add up as a random walk.
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


def finite(tensor: Tensor) -> Tensor:
    """The tensor with 0 for -inf, the LSE of rows without keys."""
    return tensor.masked_fill(tensor == -torch.inf, 0.0)
