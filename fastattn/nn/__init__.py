"""Modules with parameters: drop-in replacements for layers of `torch.nn`, and what attends in them."""

from fastattn.nn.linformer import LinformerProjection
from fastattn.nn.mechanisms import GLA, Delta, Linear, Linformer, Mechanism, Nystrom, Performer, Retention
from fastattn.nn.multihead_attention import MultiheadAttention
from fastattn.nn.replace import LayerReport, Report, replace_attention, restore_attention

__all__ = [
    "GLA",
    "Delta",
    "LayerReport",
    "Linear",
    "Linformer",
    "LinformerProjection",
    "Mechanism",
    "MultiheadAttention",
    "Nystrom",
    "Performer",
    "Report",
    "Retention",
    "replace_attention",
    "restore_attention",
]
