"""Philox4x32-10, the counter-based random numbers of dropout (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2,
3", SC 2011), in torch integer arithmetic. Every backend draws these very bits, so dropout is the same on all of them.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW = 0xFFFFFFFF


def philox4x32(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Ten rounds of Philox4x32 on broadcastable int64 tensors that hold unsigned 32-bit words; returns four such."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # The 64-bit products wrap in int64; shift and mask recover both unsigned halves all the same.
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        high0, low0 = (product0 >> 32) & _LOW, product0 & _LOW
        high1, low1 = (product1 >> 32) & _LOW, product1 & _LOW
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _LOW, (k1 + _WEYL[1]) & _LOW
    return c0, c1, c2, c3


def dropout_keep(rng: Tensor, dropout_p: float, shape: tuple[int, int, int, int], first_sequence: int = 0) -> Tensor:
    """Which elements of a (B, Hq, Sq, Sk) attention matrix dropout keeps, as a bool tensor of that shape.

    Key = the seed `rng[0]`, low word first; counter = (j // 4, i, b * Hq + h, low word of the offset `rng[1]`); word
    j % 4 belongs to key j, and an element is kept where its word is at least floor(p * 2**32). `first_sequence` is
    added to b.
    """
    batch, heads, seqlen_q, seqlen_k = shape
    device = rng.device
    seed, offset = rng[0], rng[1]
    quads = torch.arange((seqlen_k + 3) // 4, device=device).view(1, 1, -1)
    rows = torch.arange(seqlen_q, device=device).view(1, -1, 1)
    heads_index = torch.arange(batch * heads, device=device).view(-1, 1, 1) + first_sequence * heads
    counter = (quads, rows, heads_index, offset & _LOW)
    words = torch.stack(torch.broadcast_tensors(*philox4x32(counter, (seed & _LOW, (seed >> 32) & _LOW))), dim=-1)
    keep = words.flatten(-2) >= int(dropout_p * 2**32)
    return keep[..., :seqlen_k].view(batch, heads, seqlen_q, seqlen_k)


def draw_rng(device: torch.device) -> Tensor:
    """A fresh [seed, offset] from torch's generator, so that manual_seed, CUDA graphs and checkpoint replays hold."""
    return torch.randint(-(2**63), 2**63 - 1, (2,), dtype=torch.int64, device=device)
