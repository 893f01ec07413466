"""Modules with parameters: drop-in replacements for layers of `torch.nn`, and what attends in them."""

from fastattn.nn.linformer import LinformerProjection
from fastattn.nn.mechanisms import GLA, Delta, Linear, Linformer, Nystrom, Performer, Retention
from fastattn.nn.mixers import Mechanism
from fastattn.nn.multihead_attention import MultiheadAttention
from fastattn.nn.replace import LayerReport, Report, replace_attention, restore_attention
from fastattn.nn.sparse_mechanisms import LSH, NSA, BigBird, Fixed, Longformer, Strided, TopK, Window

__all__ = [
    "GLA",
    "LSH",
    "NSA",
    "BigBird",
    "Delta",
    "Fixed",
    "LayerReport",
    "Linear",
    "Linformer",
    "LinformerProjection",
    "Longformer",
    "Mechanism",
    "MultiheadAttention",
    "Nystrom",
    "Performer",
    "Report",
    "Retention",
    "Strided",
    "TopK",
    "Window",
    "replace_attention",
    "restore_attention",
]
