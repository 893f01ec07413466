"""fastattn: fused attention kernels behind one PyTorch call."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from fastattn._version import __version__
from fastattn.blockmask import BlockMask
from fastattn.dense.api import attention, explain, merge_partials
from fastattn.dense.kvcache import attention_with_kvcache
from fastattn.dense.probabilities import attention_weights
from fastattn.dense.sdpa import scaled_dot_product_attention
from fastattn.dense.varlen import attention_varlen
from fastattn.errors import UnsupportedError

if TYPE_CHECKING:
    from fastattn import maps, sparse
    from fastattn.bench.profile import profile_model
    from fastattn.integrations.sdpa import activate, activated, deactivate, override_sdpa
    from fastattn.linear import (
        delta_rule,
        linear_attention,
        linear_attention_step,
        linformer_attention,
        nystrom_attention,
        performer_attention,
        random_projection,
    )
    from fastattn.nn import replace_attention, restore_attention
    from fastattn.sparse import lsh_attention, native_sparse_attention, topk_block_mask

__all__ = [
    "BlockMask",
    "UnsupportedError",
    "__version__",
    "activate",
    "activated",
    "attention",
    "attention_varlen",
    "attention_weights",
    "attention_with_kvcache",
    "deactivate",
    "delta_rule",
    "explain",
    "linear_attention",
    "linear_attention_step",
    "linformer_attention",
    "lsh_attention",
    "maps",
    "merge_partials",
    "native_sparse_attention",
    "nystrom_attention",
    "override_sdpa",
    "performer_attention",
    "profile_model",
    "random_projection",
    "replace_attention",
    "restore_attention",
    "scaled_dot_product_attention",
    "sparse",
    "topk_block_mask",
]


# Imported when first used: their modules cost time that most programs need not pay.
_LAZY = {
    "activate": "fastattn.integrations.sdpa",
    "activated": "fastattn.integrations.sdpa",
    "deactivate": "fastattn.integrations.sdpa",
    "delta_rule": "fastattn.linear",
    "linear_attention": "fastattn.linear",
    "linear_attention_step": "fastattn.linear",
    "linformer_attention": "fastattn.linear",
    "lsh_attention": "fastattn.sparse",
    "native_sparse_attention": "fastattn.sparse",
    "nystrom_attention": "fastattn.linear",
    "override_sdpa": "fastattn.integrations.sdpa",
    "performer_attention": "fastattn.linear",
    "profile_model": "fastattn.bench.profile",
    "random_projection": "fastattn.linear",
    "replace_attention": "fastattn.nn",
    "restore_attention": "fastattn.nn",
    "topk_block_mask": "fastattn.sparse",
}


def __getattr__(name: str) -> Any:
    if name in ("maps", "sparse"):
        return importlib.import_module(f"fastattn.{name}")
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'fastattn' has no attribute '{name}'")
