"""The linear family: attention whose cost grows linearly with the length."""

from fastattn.linear.api import delta_rule, explain, linear_attention, linear_attention_step, performer_attention
from fastattn.linear.features import Cosformer, FeatureMap, relu_features, softmax_features
from fastattn.linear.linformer import linformer_attention
from fastattn.linear.nystrom import nystrom_attention
from fastattn.linear.random_features import hyperbolic, oprf, oprf_parameter, oprf_statistic, random_projection
from fastattn.linear.state import LinearState

__all__ = [
    "Cosformer",
    "FeatureMap",
    "LinearState",
    "delta_rule",
    "explain",
    "hyperbolic",
    "linear_attention",
    "linear_attention_step",
    "linformer_attention",
    "nystrom_attention",
    "oprf",
    "oprf_parameter",
    "oprf_statistic",
    "performer_attention",
    "random_projection",
    "relu_features",
    "softmax_features",
]
