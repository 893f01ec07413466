"""The masks of `torch.nn.MultiheadAttention`, where True hides, as fastattn takes them."""

from __future__ import annotations

import operator
import os

import torch
import torch.nn.functional as F
from torch import Tensor


def check(name: str, mask: Tensor | None, shapes: tuple[tuple[int, ...], ...]) -> None:
    if mask is None:
        return
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise TypeError(f"fastattn: {name} must be bool or floating point, got {mask.dtype}")
    # Size by size: compiled code with dynamic sizes finds no tuple of them equal to another.
    if not any(mask.dim() == len(shape) and all(map(operator.eq, mask.shape, shape)) for shape in shapes):
        raise ValueError(f"fastattn: {name} must have shape {' or '.join(map(str, shapes))}, got {tuple(mask.shape)}")


def in_four_dims(mask: Tensor | None, batch_heads: tuple[int, int] | None, learned: int) -> Tensor | None:
    """A mask that broadcasts to (N, num_heads, L, learned + S), the learned keys visible, still True where hidden.

    batch_heads is (N, num_heads) for an attn_mask, None for a key_padding_mask.
    """
    if mask is None:
        return None
    if batch_heads is None:
        mask = mask.view(-1, 1, 1, mask.shape[-1])
    else:
        mask = mask[None, None] if mask.dim() == 2 else mask.unflatten(0, batch_heads)
    return F.pad(mask, (learned, 0)) if learned else mask


def merge(attn_mask: Tensor | None, padding: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Two masks in torch's sense as one in `fastattn.attention`'s (True keeps, or float), by types alone.

    torch.nn.TransformerEncoder hands bool masks on as floats of 0 and -inf. Looking at the values to undo that would
    wait for the device.
    """
    if attn_mask is None or padding is None:
        mask = padding if attn_mask is None else attn_mask
    elif attn_mask.dtype == padding.dtype == torch.bool:
        mask = attn_mask | padding
    elif padding.dtype == torch.bool:
        mask = attn_mask.masked_fill(padding, float("-inf"))
    elif attn_mask.dtype == torch.bool:
        mask = padding.masked_fill(attn_mask, float("-inf"))
    else:
        mask = attn_mask + padding
    if mask is None:
        return None
    if mask.dtype == torch.bool:
        return ~mask
    return mask if mask.dtype in (dtype, torch.float32) else mask.to(dtype)


def present_keys(padding: Tensor | None) -> Tensor | None:
    """The keys (N, S) that a key_padding_mask (N, S) or (S,) of any kind leaves, True for these."""
    if padding is None:
        return None
    return torch.atleast_2d(~padding if padding.dtype == torch.bool else padding > float("-inf"))


def kept_keys(padding: Tensor | None) -> Tensor | None:
    """A key_padding_mask (N, S) or (S,) as (N, S) bool, True keeps.

    A float one may hold 0 and -inf only, which is what torch's encoders make of bool ones. Its values are read on the
    CPU, and elsewhere under FASTATTN_CHECK=1, because reading them waits for the device.
    """
    if padding is None:
        return None
    keep = torch.atleast_2d(padding == 0)
    checked = padding.device.type == "cpu" or os.environ.get("FASTATTN_CHECK") == "1"
    if padding.dtype == torch.bool or not checked or torch.compiler.is_compiling():
        return keep
    if not (keep | torch.atleast_2d(padding == float("-inf"))).all():
        raise ValueError("fastattn: key_padding_mask must be bool, or hold 0 and -inf only, with this mechanism")
    return keep
