"""fastattn under `torch.nn.functional.scaled_dot_product_attention`, for models that call it.

Two routes, both opt-in and reversible:

- `activate` puts the kernels in the place of torch's own flash attention, through torch's plug-in point for such
  kernels (`torch.nn.attention.register_flash_attention_impl`). Which calls get there torch's selector decides. It
  reaches into C++ callers and compiled code, and holds for the whole process until `deactivate`.
- `override_sdpa`, a torch function mode, takes every call made in its scope before that selector sees it: masks that
  need gradients, dropout, grouped-query heads without copies of the keys, values of another width.

What the kernels do not support runs on torch's own, and a `CallReport` counts which calls ran where and why.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import attention as torch_attention
from torch.overrides import TorchFunctionMode

from fastattn.dense import arguments as check
from fastattn.dense.api import problem_of
from fastattn.dense.op import attention_op
from fastattn.dense.philox import draw_rng
from fastattn.dense.sdpa import canonical, scaled_dot_product_attention
from fastattn.integrations.calls import CallReport, selected
from fastattn.integrations.flash_plugin import Activation

NAME = "fastattn"  # in torch's registry
_active: Activation | None = None  # the latest


def _register() -> Activation:
    """What torch's registry calls to activate; it keeps the handle and calls its `remove`."""
    global _active
    _active = Activation()
    return _active


torch_attention.register_flash_attention_impl(NAME, register_fn=_register)


def activate() -> CallReport:
    """Run fastattn's kernels wherever torch's scaled_dot_product_attention would run its own flash attention.

    For the whole process, on the CPU and, where there is one, the GPU, until `deactivate`. Where torch prefers cuDNN's
    kernels to flash attention (Hopper), flash attention, now fastattn's, changes places with it. Another provider that
    was active (FA3, FA4) is deactivated. With fastattn active already, nothing happens.

    Returns:
        The report that counts calls from here on.
    """
    if torch_attention.current_flash_attention_impl() != NAME:
        torch_attention.activate_flash_attention_impl(NAME)
    assert _active is not None
    return _active.report


def deactivate() -> CallReport:
    """Undo `activate`: torch's own kernels again. Returns the report; an empty one if fastattn was not active."""
    if torch_attention.current_flash_attention_impl() != NAME:
        return CallReport()
    assert _active is not None
    report = _active.report
    torch_attention.restore_flash_attention_impl()
    return report


@contextmanager
def activated() -> Iterator[CallReport]:
    """`activate` for a with block; afterwards the provider that was active before is active again."""
    before = torch_attention.current_flash_attention_impl()
    report = activate()
    try:
        yield report
    finally:
        if before != NAME:
            deactivate()
            if before is not None:
                torch_attention.activate_flash_attention_impl(before)


class override_sdpa(TorchFunctionMode):
    """Within it every `torch.nn.functional.scaled_dot_product_attention` runs on fastattn's kernels, where they can.

    For the current thread, forward and backward, `torch.nn.MultiheadAttention` included:

        with fastattn.override_sdpa() as report:
            model(x).sum().backward()
        print(report)
    """

    def __init__(self) -> None:
        super().__init__()
        self.report = CallReport()

    def __enter__(self) -> CallReport:
        super().__enter__()
        return self.report

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return self._attend(*args, **kwargs)
        if func in _REENTERED:
            with self:
                return _without_check(func)(*args, **kwargs)
        return func(*args, **kwargs)

    def _attend(self, *args: Any, **kwargs: Any) -> Tensor:
        if torch.compiler.is_compiling():
            self.report.add("fastattn", "in compiled code")
            return scaled_dot_product_attention(*args, **kwargs)
        try:
            query, key, value, options, leading = canonical(*args, **kwargs)
            dropout_p = check.dropout(options.pop("dropout_p"))
            problem = problem_of(query, key, value, **options)
        except (TypeError, ValueError) as error:  # torch's to compute, or to refuse in its own words
            why: str | None = str(error).removeprefix("fastattn: ")
        else:
            dropout = ["dropout"] if dropout_p > 0 else []
            why, backend = selected(problem, *problem.gradient_features(), *dropout)
        if why:
            self.report.add("torch", why)
            return F.scaled_dot_product_attention(*args, **kwargs)
        self.report.add("fastattn", backend)
        if dropout:
            problem.dropout_p, problem.rng = dropout_p, draw_rng(query.device)
        out, _ = attention_op(problem, lse_grad=False)
        return out.reshape(*leading, *out.shape[-2:])


# Python functions of torch's that attend within, the others where they recompute a checkpointed block.
_REENTERED = frozenset({F.multi_head_attention_forward, Tensor.backward, torch.autograd.backward, torch.autograd.grad})


@cache
def _without_check(func: types.FunctionType) -> Callable:
    """One of those functions as it goes on after asking for torch function modes, which it does first of all.

    Called as it is, it would ask again, for ever, with the mode active, and attend without it otherwise.
    """
    checks = {name: lambda *_: False for name in func.__globals__ if name.startswith("has_torch_function")}
    copy = types.FunctionType(func.__code__, {**func.__globals__, **checks}, func.__name__, func.__defaults__)
    copy.__kwdefaults__ = func.__kwdefaults__
    return copy
