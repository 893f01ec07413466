"""The `sdpa` backend: PyTorch's own fused attention, for plain problems.

Selection takes it where the hardware ledger records it as faster on the device at hand (`backends.delegated`). It calls
the operators under `scaled_dot_product_attention` rather than the function, because they return the LSE; so the layout,
the LSE and double backward are as with every other backend.

On CUDA this has been checked against the operators' schemas only; it has not run on hardware.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn.backends import DELEGATE, Capability
from fastattn.dense.append import append as append
from fastattn.dense.problem import Problem, allocate_backward, allocate_forward, unit_rows

CAPABILITY = Capability(
    backend=DELEGATE,
    family="dense",
    devices=frozenset({"cpu", "cuda"}),
    dtypes=frozenset({torch.float32, torch.bfloat16, torch.float16, torch.float64}),
    max_head_dim=256,
    features=frozenset({"backward", "causal"}),
    not_on=frozenset({("cuda", torch.float32), ("cuda", torch.float64)}),
)

_aten = torch.ops.aten
_thread = threading.local()


def calling() -> bool:
    """Whether this thread is in one of the operators for this backend, which means torch's own, whoever replaced it."""
    return getattr(_thread, "calling", False)


@contextmanager
def _own_operators() -> Iterator[None]:
    _thread.calling = True
    try:
        yield
    finally:
        _thread.calling = False


def _sign(p: Problem) -> float:
    """What the query is multiplied by, so that the operators get a positive scale.

    The CPU operator scales its causal mask too: 0 times -inf is NaN, and a negative scale makes +inf of it.
    """
    return float((p.scale > 0) - (p.scale < 0))


def _inputs(p: Problem) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value as the operators want them."""
    query = p.query if p.scale > 0 else p.query * _sign(p)
    return _rows(query), _rows(p.key), _rows(p.value)


def _rows(tensor: Tensor) -> Tensor:
    """With the unit column stride that the operators rely on and, on CUDA, whole groups of 8 columns."""
    if tensor.device.type == "cuda" and tensor.shape[3] % 8:
        return F.pad(tensor, (0, -tensor.shape[3] % 8))
    return unit_rows(tensor)


def _empty(p: Problem) -> bool:
    """Whether there is nothing to sum; the CPU operator divides by these lengths."""
    return 0 in (*p.query.shape[:3], p.key.shape[2])


@cache
def _has_cudnn(device: torch.device) -> bool:
    """Whether the device is one on which cuDNN's kernels are ahead of flash-attention 2: Hopper and newer."""
    return torch.version.hip is None and torch.cuda.get_device_capability(device) >= (9, 0)


def _takes_cudnn(p: Problem) -> bool:
    """cuDNN's own limits: heads of at most 128 for the backward, and more than one query and key."""
    head_dim, longer_than_one = p.query.shape[3], min(p.query.shape[2], p.key.shape[2]) > 1
    return head_dim <= 128 and longer_than_one and _has_cudnn(p.query.device)


def forward(p: Problem) -> tuple[Tensor, Tensor]:
    """Launch the forward: (out, lse)."""
    if _empty(p):
        out, lse = allocate_forward(p)
        return out.zero_(), lse.fill_(float("-inf"))
    query, key, value = _inputs(p)
    causal, options = p.window_right == 0, {"scale": abs(p.scale) or 1.0}
    results: Any
    with _own_operators():
        if p.query.device.type == "cpu":
            results = _aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, 0.0, causal, **options)
        elif _takes_cudnn(p):
            results = _aten._scaled_dot_product_cudnn_attention(query, key, value, None, True, 0.0, causal, **options)
        else:
            results = _aten._scaled_dot_product_flash_attention(query, key, value, 0.0, causal, **options)
    out, lse = results[0][..., : p.value.shape[3]], results[1].reshape(p.query.shape[:3])
    # Copies only where the operator chose another layout: it follows query's.
    return out.transpose(1, 2).contiguous().transpose(1, 2), lse.contiguous()


def backward(
    p: Problem, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None, mask_grad: bool
) -> tuple[Tensor, ...]:
    """Launch the backward: gradients as `allocate_backward` lists them."""
    assert grad_lse is None  # the table lacks "lse_grad"
    places = allocate_backward(p, mask_grad)
    if _empty(p):
        for place in places:
            place.zero_()
        return places
    tensors = (_rows(grad_out), *_inputs(p), _rows(out))
    causal, options = p.window_right == 0, {"scale": abs(p.scale) or 1.0}
    lengths = (p.query.shape[2], p.key.shape[2])
    grads: tuple[Tensor, Tensor, Tensor]
    with _own_operators():
        if p.query.device.type == "cpu":
            grads = _aten._scaled_dot_product_flash_attention_for_cpu_backward(*tensors, lse, 0.0, causal, **options)
        elif _takes_cudnn(p):
            # The seed and offset of a dropout that there is not; no bias, no packed sequences.
            rng = p.query.new_zeros((), dtype=torch.int64)
            grads = _aten._scaled_dot_product_cudnn_attention_backward(
                *tensors, lse[..., None], rng, rng, None, None, None, *lengths, 0.0, causal, **options
            )
        else:
            rng = p.query.new_zeros(2, dtype=torch.int64 if torch.version.hip else torch.uint64)
            grads = _aten._scaled_dot_product_flash_attention_backward(
                *tensors, lse, None, None, *lengths, 0.0, causal, rng, rng[:1], **options
            )
    found = [grad[..., : p.query.shape[3]] for grad in grads]
    if p.scale <= 0:
        found[0] = found[0] * _sign(p)
    laid_out = [
        grad if grad.stride() == place.stride() else place.copy_(grad)
        for grad, place in zip(found, places[:3], strict=True)
    ]
    return (*laid_out, *places[3:])
