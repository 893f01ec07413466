"""The sparse family: block masks of known patterns, made by arithmetic on blocks, and attention sparse by content."""

from fastattn.sparse.lsh import hash_rotations, lsh_attention
from fastattn.sparse.neighborhood import neighborhood
from fastattn.sparse.nsa import native_sparse_attention
from fastattn.sparse.patterns import (
    bigbird,
    block_local,
    causal,
    dilated_window,
    documents,
    fixed,
    global_tokens,
    longformer,
    longnet,
    prefix_lm,
    sliding_window,
    streaming,
    strided,
)
from fastattn.sparse.topk import topk_block_mask

__all__ = [
    "bigbird",
    "block_local",
    "causal",
    "dilated_window",
    "documents",
    "fixed",
    "global_tokens",
    "hash_rotations",
    "longformer",
    "longnet",
    "lsh_attention",
    "native_sparse_attention",
    "neighborhood",
    "prefix_lm",
    "sliding_window",
    "streaming",
    "strided",
    "topk_block_mask",
]
