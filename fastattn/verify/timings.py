"""A few timings for the hardware ledger: fastattn beside PyTorch's own attention, interleaved."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

LENGTHS, HEAD_DIMS, HEADS = (512, 2048), (64, 128), 4
REPEATS = 5


def _forward(attention: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> None:
    with torch.no_grad():
        attention(q, k, v)


def _forward_backward(attention: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> None:
    torch.autograd.grad(attention(q, k, v), (q, k, v), grad)


def interleaved_medians(
    functions: Iterable[Callable[[], Any]], synchronise: Callable[[], None], repeats: int = REPEATS
) -> list[float]:
    """Median milliseconds of each function, called in turn ``repeats`` times after one warm-up call."""
    calls = list(functions)
    times: list[list[float]] = [[] for _ in calls]
    for function in calls:
        function()
    for _ in range(repeats):
        for function, found in zip(calls, times, strict=True):
            synchronise()
            start = time.perf_counter()
            function()
            synchronise()
            found.append((time.perf_counter() - start) * 1e3)
    return [statistics.median(found) for found in times]


def timings(
    backend: str, device: str, dtypes: Iterable[torch.dtype], lengths: Iterable[int] = LENGTHS
) -> Iterator[dict]:
    """Rows of the record's ``timings``: batch 1, 4 heads, forward and forward with backward, full and causal."""
    import fastattn

    synchronise = torch.cuda.synchronize if torch.device(device).type == "cuda" else lambda: None
    for dtype, length, dim, causal in product(dtypes, lengths, HEAD_DIMS, (False, True)):
        q, k, v, grad = (torch.randn(1, HEADS, length, dim, device=device, dtype=dtype) for _ in range(4))
        for tensor in (q, k, v):
            tensor.requires_grad_()
        ours: Callable[..., Any] = partial(fastattn.attention, causal=causal, backend=backend)
        theirs: Callable[..., Any] = partial(F.scaled_dot_product_attention, is_causal=causal)
        for name, run in (("forward", _forward), ("forward+backward", _forward_backward)):
            calls = [partial(run, function, q, k, v, grad) for function in (ours, theirs)]
            mine, sdpa = interleaved_medians(calls, synchronise)
            yield {
                "shape": [1, HEADS, length, dim],
                "dtype": str(dtype).removeprefix("torch."),
                "causal": causal,
                "pass": name,
                "fastattn_ms": round(mine, 3),
                "sdpa_ms": round(sdpa, 3),
                "speedup": round(sdpa / mine, 2),
            }
