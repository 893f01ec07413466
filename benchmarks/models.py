"""Small models of the kinds that people bring, for `fastattn profile --model benchmarks/models.py:NAME`.

    fastattn profile --model benchmarks/models.py:mistral --impl original,transformers --seqlen 512..4k
    fastattn profile --model benchmarks/models.py:encoder --seqlen 512..4k

A training step each, in float32, batch 1, 8 heads of 64, two layers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def encoder(seqlen: int) -> tuple[nn.Module, Tensor]:
    """torch's own encoder, with its default dropout of 0.1."""
    layer = nn.TransformerEncoderLayer(512, 8, 1024, batch_first=True)
    return nn.TransformerEncoder(layer, 2), torch.randn(1, seqlen, 512)


def mistral(seqlen: int) -> tuple[nn.Module, dict[str, Any]]:
    """Hugging Face's Mistral with 2 key heads and a window of 1024; transformers runs it on SDPA where left alone."""
    from transformers import MistralConfig, MistralForCausalLM

    config = MistralConfig(
        vocab_size=1024,
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=2,
        sliding_window=1024,
        max_position_embeddings=1 << 16,
    )
    tokens = torch.randint(3, 1024, (1, seqlen))
    return MistralForCausalLM(config).train(), {"input_ids": tokens, "labels": tokens, "use_cache": False}
