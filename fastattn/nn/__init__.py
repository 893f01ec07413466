"""Modules with parameters: drop-in replacements for layers of `torch.nn`."""

from fastattn.nn.multihead_attention import MultiheadAttention
from fastattn.nn.replace import LayerReport, Report, replace_attention, restore_attention

__all__ = ["LayerReport", "MultiheadAttention", "Report", "replace_attention", "restore_attention"]
