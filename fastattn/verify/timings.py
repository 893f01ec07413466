"""A few timings for the hardware ledger: fastattn beside PyTorch's own attention, interleaved."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn.backends import DELEGATE

REPEATS = 5


@dataclass(frozen=True)
class Shapes:
    """What is timed on a type of device: every length, head size and dtype, full and causal."""

    lengths: tuple[int, ...]
    head_dims: tuple[int, ...]
    heads: int
    dtypes: tuple[torch.dtype, ...]
    tokens: int | None = None  # in all, so that short lengths fill the device too; None: a batch of 1


SHAPES = {
    "cpu": Shapes((512, 2048), (64, 128), 4, (torch.float32, torch.bfloat16)),
    "cuda": Shapes((512, 2048, 8192), (64, 128, 256), 16, (torch.bfloat16,), tokens=16384),
}


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
    backend: str,
    device: str,
    dtypes: Iterable[torch.dtype] | None = None,
    lengths: Iterable[int] | None = None,
) -> Iterator[dict]:
    """Rows of the record's ``timings``, forward and forward with backward, of `SHAPES` or of other dtypes and lengths.

    The backend is named, so that no row compares PyTorch's attention, to which calls may be delegated, with itself.
    """
    import fastattn

    kind = torch.device(device).type
    shapes = SHAPES[kind]
    synchronise = torch.cuda.synchronize if kind == "cuda" else lambda: None
    for dtype, length, dim, causal in product(
        dtypes or shapes.dtypes, lengths or shapes.lengths, shapes.head_dims, (False, True)
    ):
        shape = (max(1, (shapes.tokens or 0) // length), shapes.heads, length, dim)
        q, k, v, grad = (torch.randn(shape, device=device, dtype=dtype) for _ in range(4))
        for tensor in (q, k, v):
            tensor.requires_grad_()
        ours: Callable[..., Any] = partial(fastattn.attention, causal=causal, backend=backend)
        theirs: Callable[..., Any] = partial(F.scaled_dot_product_attention, is_causal=causal)
        delegated: Callable[..., Any] = partial(fastattn.attention, causal=causal, backend=DELEGATE)
        able = any(v.selected for v in fastattn.explain(q, k, v, causal=causal, backend=DELEGATE))
        for name, run in (("forward", _forward), ("forward+backward", _forward_backward)):
            functions = (ours, theirs, delegated) if able else (ours, theirs)
            calls = [partial(run, function, q, k, v, grad) for function in functions]
            mine, sdpa, *detour = interleaved_medians(calls, synchronise)
            yield {
                "shape": list(shape),
                "dtype": str(dtype).removeprefix("torch."),
                "causal": causal,
                "pass": name,
                "fastattn_ms": round(mine, 3),
                "sdpa_ms": round(sdpa, 3),
                "speedup": round(sdpa / mine, 2),
                "delegated_ms": round(detour[0], 3) if detour else None,
            }
