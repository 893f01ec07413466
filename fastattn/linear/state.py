"""`LinearState`: what linear attention keeps of the steps that it has seen."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class LinearState(NamedTuple):
    """The state of a causal call after its last step; its size does not grow with the number of steps.

    Attributes:
        kv: (B, Hq, M, Dv), the decayed sum of key features times values; float32 (float64 for float64).
        normalizer: (B, Hq, M), that of the key features; None without normalize.
        log_scale: (B, Hq), with softmax features only: kv and normalizer are divided by exp(log_scale), -inf before the
            first key. Constant for gradients.

    For packed sequences B counts sequences.
    """

    kv: Tensor
    normalizer: Tensor | None = None
    log_scale: Tensor | None = None
