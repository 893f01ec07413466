"""fastattn: fused attention kernels behind one PyTorch call."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastattn._version import __version__
from fastattn.dense.api import attention, explain, merge_partials
from fastattn.dense.kvcache import attention_with_kvcache
from fastattn.dense.sdpa import scaled_dot_product_attention
from fastattn.dense.varlen import attention_varlen
from fastattn.errors import UnsupportedError

if TYPE_CHECKING:
    from fastattn.nn import replace_attention, restore_attention

__all__ = [
    "UnsupportedError",
    "__version__",
    "attention",
    "attention_varlen",
    "attention_with_kvcache",
    "explain",
    "merge_partials",
    "replace_attention",
    "restore_attention",
    "scaled_dot_product_attention",
]


def __getattr__(name: str) -> Any:
    if name in ("replace_attention", "restore_attention"):
        from fastattn import nn

        return getattr(nn, name)
    raise AttributeError(f"module 'fastattn' has no attribute '{name}'")
