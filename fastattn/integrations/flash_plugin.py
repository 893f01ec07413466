"""fastattn's kernels in the place of torch's flash attention, by torch's plug-in point for such kernels.

The operators under `scaled_dot_product_attention` are registered anew in torch's dispatcher, below autograd and below
torch's selector. Each runs the kernels, or torch's own where they do not support the call, so that either's backward
can follow either's forward: outputs, LSE and layouts are as torch's.

On CUDA this has been checked against the operators' schemas only; it has not run on hardware.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from fastattn.dense.api import normalise
from fastattn.dense.op import record
from fastattn.dense.problem import Problem
from fastattn.integrations.calls import CallReport, Place, selected

MATH = "_scaled_dot_product_attention_math"


class Activation:
    """The operators in place of torch's own, from construction to `remove`."""

    def __init__(self) -> None:
        self.report = CallReport()
        self._lock = threading.Lock()  # calls come from many threads
        self._library: torch.library.Library | None = torch.library.Library("aten", "IMPL")
        self._native: dict[str, Any] = {}
        self._priority: tuple[list[int], list[int]] | None = None
        devices = {"CPU": _cpu_operators(self)}
        if torch.cuda.is_available():
            devices["CUDA"] = _cuda_operators(self)
            self._priority = _prefer_flash()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "(?s).*[Oo]verrid", UserWarning)
            for device, operators in devices.items():
                for name, kernel in operators.items():
                    self._native[name] = torch.library.get_kernel(f"aten::{name}", device)
                    self._library.impl(name, kernel, device, with_keyset=True)
            # Every device's, and above autograd.
            self._native[MATH] = torch.library.get_kernel(f"aten::{MATH}", "CPU")
            self._library.impl(MATH, self.counted(MATH), "CompositeImplicitAutograd", with_keyset=True)

    def remove(self) -> None:
        """Put torch's own back."""
        if self._library is not None:
            self._library._destroy()
            self._library = None
        if self._priority is not None:
            before, ours = self._priority
            if torch._C._get_sdp_priority_order() == ours:  # else it was changed since, by somebody else
                torch._C._set_sdp_priority_order(before)

    def native(self, name: str, keys: Any, *args: Any, **kwargs: Any) -> Any:
        """torch's own kernel."""
        return self._native[name].call_boxed(keys, *args, **kwargs)

    def counted(self, name: str) -> Callable:
        """torch's own kernel, counted: what its selector prefers to flash attention."""
        path = name.removeprefix("_scaled_dot_product_").replace("attention_math", "math").removesuffix("_attention")

        def run(keys: Any, *args: Any, **kwargs: Any) -> Any:
            self._count("torch", f"its selector chose {path}: {_described(*args, **kwargs)}")
            return self.native(name, keys, *args, **kwargs)

        return run

    def choose(self, p: Problem | str) -> str | None:
        """Why a forward should run on torch's own kernel, or None; counted either way."""
        why, backend = (p, "") if isinstance(p, str) else selected(p)
        self._count("torch" if why else "fastattn", why or backend)
        return why

    def _count(self, place: Place, why: str) -> None:
        with self._lock:
            self.report.add(place, why)


def _problem(query: Tensor, key: Tensor, value: Tensor, causal: bool, mask: Tensor | None, scale: Any) -> Problem:
    shape = (query.shape[0], query.shape[1], query.shape[2], key.shape[2])
    return normalise(query, key, value, shape, attn_mask=mask, causal=causal, query_start=0, scale=scale)


def _cpu_operators(plugin: Activation) -> dict[str, Callable]:
    """torch's flash attention on the CPU, which takes masks; causal is top-left."""
    name = "_scaled_dot_product_flash_attention_for_cpu"

    def problem(query: Tensor, key: Tensor, value: Tensor, dropout_p: float, causal: bool, options: Any) -> Any:
        if dropout_p:
            return "dropout_p"
        return _problem(query, key, value, causal, options.get("attn_mask"), options.get("scale"))

    def forward(
        keys: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        **options: Any,
    ) -> Any:
        p = problem(query, key, value, dropout_p, is_causal, options)
        if plugin.choose(p):
            return plugin.native(name, keys, query, key, value, dropout_p, is_causal, **options)
        out, lse = torch.ops.fastattn.dense_forward(*p.args())
        record(p, lse)
        if p.attn_mask is not None:
            lse = lse.masked_fill(lse == -torch.inf, 0.0)
        return _like(query, out), lse.transpose(1, 2).contiguous().transpose(1, 2)

    def backward(
        keys: Any,
        grad_out: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        lse: Tensor,
        dropout_p: float,
        is_causal: bool,
        **options: Any,
    ) -> Any:
        p = problem(query, key, value, dropout_p, is_causal, options)
        # torch 2.11 compiles float64 with an LSE in float32, which its own kernel refuses.
        if isinstance(p, str) or lse.dtype != p.accumulate_dtype or selected(p, "backward")[0]:
            args = (grad_out, query, key, value, out, lse, dropout_p, is_causal)
            return plugin.native(f"{name}_backward", keys, *args, **options)
        return tuple(g.transpose(1, 2).contiguous().transpose(1, 2) for g in _gradients(p, grad_out, out, lse))

    return {name: forward, f"{name}_backward": backward}


def _cuda_operators(plugin: Activation) -> dict[str, Callable]:
    """torch's flash attention on CUDA, and the other fused kernels counted; causal problems are square."""
    name = "_scaled_dot_product_flash_attention"

    def problem(query: Tensor, key: Tensor, value: Tensor, dropout_p: float, causal: bool, scale: Any) -> Any:
        if dropout_p:
            return "dropout_p"
        if causal and query.shape[2] != key.shape[2]:
            return "is_causal with different lengths"
        return _problem(query, key, value, causal, None, scale)

    def forward(
        keys: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        return_debug_mask: bool = False,
        *,
        scale: float | None = None,
    ) -> Any:
        p: Any = "return_debug_mask" if return_debug_mask else problem(query, key, value, dropout_p, is_causal, scale)
        if plugin.choose(p):
            args = (query, key, value, dropout_p, is_causal, return_debug_mask)
            return plugin.native(name, keys, *args, scale=scale)
        out, lse = torch.ops.fastattn.dense_forward(*p.args())
        record(p, lse)
        rng = query.new_zeros(2, dtype=torch.int64 if torch.version.hip else torch.uint64)
        return (
            _like(query, out),
            lse,
            None,
            None,
            query.shape[2],
            key.shape[2],
            rng,
            rng.new_zeros(()),
            query.new_empty(0),
        )

    def backward(
        keys: Any,
        grad_out: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        lse: Tensor,
        cum_seq_q: Any,
        cum_seq_k: Any,
        max_q: int,
        max_k: int,
        dropout_p: float,
        is_causal: bool,
        *rng: Any,
        scale: float | None = None,
    ) -> Any:
        p = problem(query, key, value, dropout_p, is_causal, scale)
        if isinstance(p, str) or selected(p, "backward")[0]:
            args = (grad_out, query, key, value, out, lse, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal)
            return plugin.native(f"{name}_backward", keys, *args, *rng, scale=scale)
        return _gradients(p, grad_out, out, lse)

    others = ("_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention")
    return {name: forward, f"{name}_backward": backward, **{other: plugin.counted(other) for other in others}}


def _like(query: Tensor, out: Tensor) -> Tensor:
    """The output in query's layout, which compiled code counts on; a copy only where that is another."""
    place = torch.empty_like(query)
    return out if out.stride() == place.stride() else place.copy_(out)


def _gradients(p: Problem, grad_out: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, ...]:
    """Gradients of query, key and value, below autograd."""
    return tuple(torch.ops.fastattn.dense_backward(out, lse, grad_out, None, False, *p.args())[:3])


def _described(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *args: Any, **options: Any
) -> str:
    """What stands out in a call that torch's selector sent elsewhere than to flash attention."""
    found = [str(query.dtype).removeprefix("torch."), f"head_dim {query.shape[-1]}"]
    if value.shape[-1] != query.shape[-1]:
        found.append(f"value head_dim {value.shape[-1]}")
    if attn_mask is not None:
        found.append("attn_mask" + (" that requires a gradient" if attn_mask.requires_grad else ""))
    # Of math it follows the mask, of the fused kernels compute_log_sumexp.
    dropout_p = options.get("dropout_p", next((a for a in args if isinstance(a, float)), 0.0))
    if dropout_p:
        found.append("dropout_p")
    if query.dim() != 4:
        found.append(f"{query.dim()} axes")
    if query.numel() == 0 or key.numel() == 0:
        found.append("nothing to attend to")
    return ", ".join(found)


def flash_before_cudnn(order: list[int]) -> list[int]:
    """An order in which torch's selector asks its backends, with flash attention before cuDNN's."""
    order = list(order)
    i, j = order.index(SDPBackend.FLASH_ATTENTION.value), order.index(SDPBackend.CUDNN_ATTENTION.value)
    if j < i:
        order[i], order[j] = order[j], order[i]
    return order


def _prefer_flash() -> tuple[list[int], list[int]]:
    """(torch's order before, the order now)."""
    # Its first choice on CUDA sets its default order, which depends on the device.
    probe = torch.empty(1, 1, 8, 64, dtype=torch.float16, device="cuda")
    torch._fused_sdp_choice(probe, probe, probe)
    before = torch._C._get_sdp_priority_order()
    order = flash_before_cudnn(before)
    torch._C._set_sdp_priority_order(order)
    return before, order
