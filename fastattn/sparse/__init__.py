"""The sparse family: block masks of known patterns, made by arithmetic on blocks."""

from fastattn.sparse.neighborhood import neighborhood
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

__all__ = [
    "bigbird",
    "block_local",
    "causal",
    "dilated_window",
    "documents",
    "fixed",
    "global_tokens",
    "longformer",
    "longnet",
    "neighborhood",
    "prefix_lm",
    "sliding_window",
    "streaming",
    "strided",
]
