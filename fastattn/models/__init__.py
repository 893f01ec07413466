"""Reference models: small, readable networks whose attention can be swapped by name."""

from fastattn.models.cache import KVCache, TorchCache
from fastattn.models.generate import generate, sample
from fastattn.models.state_cache import StateCache
from fastattn.models.transformer import ATTENTION, Transformer, TransformerConfig

__all__ = ["ATTENTION", "KVCache", "StateCache", "TorchCache", "Transformer", "TransformerConfig", "generate", "sample"]
