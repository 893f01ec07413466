"""FLOP formulas of the registered ops, for `torch.utils.flop_counter.FlopCounterMode`.

That module imports Triton (and warns where there is none), so it is not imported here: the formulas are registered
once somebody else imports it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch

from fastattn.blockmask.lists import kept_share
from fastattn.dense.problem import Problem

_COUNTER = "torch.utils.flop_counter"


def _matmul_flops(args: tuple, products: tuple[str, ...]) -> int:
    """FLOPs of the named (Sq, Sk) x head_dim products, over all keys as torch counts its own attention; with a block
    mask over the pairs that it keeps."""
    p = Problem(*args)
    batch, heads, seqlen_q, head_dim = p.query.shape
    pairs: float = batch * seqlen_q * p.seqlen_k
    if p.cu_seqlens_q is not None and p.cu_seqlens_q.device.type != "meta":
        assert p.cu_seqlens_k is not None
        pairs = int((p.cu_seqlens_q.diff() * p.cu_seqlens_k.diff()).sum())
    lists = p.mask_lists
    if lists is not None and lists.rows.device.type != "meta":
        pairs *= kept_share(lists, p.max_seqlen_q, p.max_seqlen_k)
    width = {"query": head_dim, "value": p.value.shape[3]}
    return int(sum(2 * heads * pairs * width[product] for product in products))


def _forward_flops(*args: Any, out_val: Any = None, **_: Any) -> int:
    return _matmul_flops(args, ("query", "value"))


def _backward_flops(out: Any, lse: Any, grad_out: Any, grad_lse: Any, mask_grad: Any, *args: Any, **_: Any) -> int:
    # The scores again, then the gradients of probabilities, values, queries and keys.
    return _matmul_flops(args, ("query", "value", "value", "query", "query"))


def _register(counter: ModuleType) -> None:
    counter.register_flop_formula(torch.ops.fastattn.dense_forward, get_raw=True)(_forward_flops)
    counter.register_flop_formula(torch.ops.fastattn.dense_backward, get_raw=True)(_backward_flops)


class _WhenImported(MetaPathFinder):
    """Finds the counter's module as ever, once, and registers the formulas after it has run."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != _COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _Registering(spec.loader)
        return spec


class _Registering(Loader):
    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        _register(module)


def register_when_imported() -> None:
    """Have the formulas registered, now or when `torch.utils.flop_counter` is imported."""
    if _COUNTER in sys.modules:
        _register(sys.modules[_COUNTER])
    else:
        sys.meta_path.insert(0, _WhenImported())
