"""A model to profile, as a user would write it: `fastattn profile --model fastattn.bench.example:encoder`."""

import torch
from torch import nn


def encoder(seqlen: int) -> tuple[nn.Module, torch.Tensor]:
    """A transformer encoder of two layers, and its input."""
    layer = nn.TransformerEncoderLayer(256, nhead=4, dim_feedforward=512, dropout=0.1, batch_first=True)
    return nn.TransformerEncoder(layer, num_layers=2), torch.randn(1, seqlen, 256)
