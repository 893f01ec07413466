"""From padded batches to packed sequences and back: flash-attn's `bert_padding`, differentiable.

Interface: flash_attn/bert_padding.py of flash-attn 2.8, https://github.com/Dao-AILab/flash-attention.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn.dense import arguments as check


def index_first_axis(input: Tensor, indices: Tensor) -> Tensor:
    """The rows input[indices]: input (n, ...), indices (m,) int32 or int64, result (m, ...).

    The gradients of a row that is taken several times add up.
    """
    return input.index_select(0, indices)


def index_put_first_axis(values: Tensor, indices: Tensor, first_axis_dim: int) -> Tensor:
    """The inverse: (first_axis_dim, ...) zeros, with values (m, ...) in the rows indices (m,)."""
    rows = values.new_zeros(first_axis_dim, *values.shape[1:])
    return rows.index_put_((indices,), values)


def unpad_input(
    hidden_states: Tensor, attention_mask: Tensor, unused_mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, int, Tensor]:
    """Pack the tokens that a mask selects one after another.

    Args:
        hidden_states: (batch, seqlen, ...).
        attention_mask: (batch, seqlen), bool or int, 1 for a token and 0 for padding, on either side or between.
        unused_mask: (batch, seqlen), 1 where a token is packed too, but counts as unused.

    Returns:
        packed (total, ...), total the tokens of both masks.
        indices (total,) int64 of the packed tokens in the flattened batch, for `pad_input`.
        cu_seqlens (batch + 1,) int32.
        max_seqlen_in_batch, an int (read from the device).
        seqused (batch,) int32, the tokens of attention_mask alone.

    Raises:
        TypeError, ValueError: a mask is floating-point, or not of shape (batch, seqlen).
    """
    _check_mask("attention_mask", attention_mask, hidden_states)
    tokens = allocated = attention_mask != 0
    if unused_mask is not None:
        _check_mask("unused_mask", unused_mask, hidden_states)
        allocated = tokens | (unused_mask != 0)
    packed, indices = _pack(hidden_states, allocated)
    return packed, indices, *_bounds(allocated.sum(dim=-1)), tokens.sum(dim=-1, dtype=torch.int32)


def unpad_input_for_concatenated_sequences(
    hidden_states: Tensor, attention_mask_in_length: Tensor
) -> tuple[Tensor, Tensor, Tensor, int]:
    """Pack batches whose rows hold several sequences each, one after another, the padding at the end.

    Args:
        hidden_states: (batch, seqlen, ...).
        attention_mask_in_length: (batch, seqlen) ints: the lengths of the sequences in each row, the others 0. Rows
            [[2, 3, 0, 0, 0, 0], [6, 0, 0, 0, 0, 0]] hold sequences of 2 and 3 tokens, and one of 6.

    Returns:
        packed (total, ...), indices (total,) int64, cu_seqlens (sequences + 1,) int32 and max_seqlen_in_batch, as
        `unpad_input`, but by sequence, not by row.

    Raises:
        TypeError, ValueError: attention_mask_in_length is floating-point, or not of shape (batch, seqlen).
    """
    _check_mask("attention_mask_in_length", attention_mask_in_length, hidden_states)
    positions = torch.arange(attention_mask_in_length.shape[1], device=attention_mask_in_length.device)
    packed, indices = _pack(hidden_states, positions < attention_mask_in_length.sum(dim=-1, keepdim=True))
    lengths = attention_mask_in_length[attention_mask_in_length != 0]
    return packed, indices, *_bounds(lengths)


def pad_input(hidden_states: Tensor, indices: Tensor, batch: int, seqlen: int) -> Tensor:
    """Undo `unpad_input`: packed (total, ...) to (batch, seqlen, ...), zero in the padding."""
    return index_put_first_axis(hidden_states, indices, batch * seqlen).unflatten(0, (batch, seqlen))


def _check_mask(name: str, mask: Tensor, hidden_states: Tensor) -> None:
    check.tensor(name, mask, 2, "(batch, seqlen)")
    if mask.is_floating_point():
        raise TypeError(f"fastattn: {name} must be bool or integer, got {mask.dtype}")
    if mask.shape != hidden_states.shape[:2]:
        raise ValueError(
            f"fastattn: {name} must have hidden_states' batch and seqlen {tuple(hidden_states.shape[:2])}, got "
            f"{tuple(mask.shape)}"
        )


def _pack(hidden_states: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    indices = mask.flatten().nonzero().flatten()
    return index_first_axis(hidden_states.flatten(0, 1), indices), indices


def _bounds(lengths: Tensor) -> tuple[Tensor, int]:
    """(cu_seqlens, the longest)."""
    return F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0)), max(lengths.tolist(), default=0)
