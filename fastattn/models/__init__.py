"""Reference models: small, readable networks whose attention can be swapped by name."""

from fastattn.models.transformer import ATTENTION, Transformer, TransformerConfig

__all__ = ["ATTENTION", "Transformer", "TransformerConfig"]
