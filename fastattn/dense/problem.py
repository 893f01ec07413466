"""`Problem`: one dense attention call, validated and normalised. Its fields are the arguments of the registered ops."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from itertools import compress, pairwise

import torch
from torch import Tensor

from fastattn.backends import Requirements
from fastattn.blockmask import Lists

_OPTIONAL_FEATURES = (
    *("query_start", "key_start", "key_lengths", "packed", "paged"),
    *("softcap", "alibi", "sinks", "dropout", "block_mask"),
)
LSE_DTYPE = {torch.float64: torch.float64}  # float32 for every other dtype


@dataclass(slots=True)
class Problem:
    """Dense attention over query (B, Hq, Sq, D), key (B, Hkv, Sk, D), value (B, Hkv, Sk, Dv).

    Query i stands at key position p = i + query_offset + query_start[b] and sees the keys j with
    max(key_start[b], p - window_left) <= j <= min(key_lengths[b] - 1, p + window_right); None leaves a side open, and
    causal is window_right <= 0. Packed sequences have B = 1 and S = the total length; each is aligned by its own
    lengths, and the (B,)-shaped tensors then count sequences. Paged keys are (pages, Hkv, page_size, D): key j of
    sequence b is row j % page_size of page block_table[b, j // page_size].
    """

    query: Tensor
    key: Tensor
    value: Tensor
    attn_mask: Tensor | None  # 4-D, each axis 1 or full: bool (True keeps) or float (added)
    sinks: Tensor | None  # (Hq,), float32 (float64 for float64)
    alibi_slopes: Tensor | None  # (B, Hq), float32 (float64 for float64)
    query_start: Tensor | None  # (B,) int32, with query_offset 0
    key_start: Tensor | None  # (B,) int32
    key_lengths: Tensor | None  # (B,) int32
    cu_seqlens_q: Tensor | None  # (B + 1,) int32
    cu_seqlens_k: Tensor | None  # (B + 1,) int32
    block_table: Tensor | None  # (B, pages per sequence) int32; not packed
    mask_rows: Tensor | None  # this and the next four: a block mask's `Lists`, or None; a pair must pass both masks
    mask_row_blocks: Tensor | None
    mask_columns: Tensor | None
    mask_column_blocks: Tensor | None
    mask_tiles: Tensor | None
    rng: Tensor | None  # int64 [seed, offset], with dropout_p > 0
    max_seqlen_q: int
    max_seqlen_k: int
    query_offset: int | None  # None: seqlen_k - seqlen_q (bottom-right alignment)
    window_left: int | None
    window_right: int | None
    scale: float
    softcap: float | None
    dropout_p: float
    deterministic: bool
    backend: str | None
    first_sequence: int = 0  # the batch index of this problem's first sequence, for dropout; not an op argument

    def args(self) -> tuple:
        """The arguments of `fastattn::dense_forward`, in schema order."""
        return tuple([getattr(self, name) for name in ARGUMENTS])

    @property
    def seqlen_k(self) -> int:
        """Sk; of packed sequences the total length, of pages what a row of the block table holds."""
        rows = self.key.shape[2]
        return rows if self.block_table is None else rows * self.block_table.shape[1]

    @property
    def mask_lists(self) -> Lists | None:
        """The block mask, if there is one."""
        lists = (self.mask_rows, self.mask_row_blocks, self.mask_columns, self.mask_column_blocks, self.mask_tiles)
        return None if self.mask_rows is None else Lists(*lists)  # type: ignore[arg-type]

    @property
    def offset(self) -> int:
        """query_offset with its default resolved; not for packed problems, whose sequences each have their own."""
        return self.seqlen_k - self.query.shape[2] if self.query_offset is None else self.query_offset

    @property
    def accumulate_dtype(self) -> torch.dtype:
        return LSE_DTYPE.get(self.query.dtype, torch.float32)

    def requirements(self, *extra: str) -> Requirements:
        q, mask = self.query, self.attn_mask
        shape_q, shape_k, shape_v = q.shape, self.key.shape, self.value.shape
        seqlen_q, seqlen_k = shape_q[2], self.seqlen_k
        features = [*extra]
        if self.window_right == 0:
            features.append("causal")
        if self.window_left is not None or self.window_right not in (None, 0):
            features.append("window")
        if len(features) > len(extra) and (seqlen_q != seqlen_k or self.query_offset):
            features.append("alignment")
        if mask is not None:
            features.append("bool_mask" if mask.dtype == torch.bool else "float_bias")
        if shape_q[1] != shape_k[1]:
            features.append("gqa")
        if shape_q[3] != shape_v[3]:
            features.append("value_dim")
        optional = (
            self.query_start,
            self.key_start,
            self.key_lengths,
            self.cu_seqlens_q,
            self.block_table,
            self.softcap,
            self.alibi_slopes,
            self.sinks,
            self.rng,
            self.mask_rows,
        )
        features += compress(_OPTIONAL_FEATURES, [value is not None for value in optional])
        if self.deterministic:
            features.append("deterministic")
        # Nearly square problems only: those are what the ledger records times of.
        bits_q, bits_k = (seqlen_q - 1).bit_length(), (seqlen_k - 1).bit_length()
        return Requirements(
            q.device.type,
            q.dtype,
            max(shape_q[3], shape_v[3]),
            frozenset(features),
            q.device.index,
            1 << bits_q if bits_q == bits_k else 0,
        )

    def gradient_features(self) -> list[str]:
        """What a call that starts now will ask of the backward."""
        if not torch.is_grad_enabled():
            return []
        mask_grad = self.attn_mask is not None and self.attn_mask.requires_grad
        others = (self.query, self.key, self.value, self.sinks)
        some = mask_grad or any(t is not None and t.requires_grad for t in others)
        return [name for name, needed in (("backward", some), ("bias_grad", mask_grad)) if needed]

    def check_values(self) -> None:
        """Raise ValueError for lengths or boundaries that do not fit the tensors.

        Runs on the CPU; elsewhere only under FASTATTN_CHECK=1, because reading the values would wait for the device.
        """
        if self.cu_seqlens_q is self.key_start is self.key_lengths is self.block_table is None:
            return
        if self.query.device.type != "cpu" and os.environ.get("FASTATTN_CHECK") != "1":
            return
        seqlens_k = [self.seqlen_k] * self.query.shape[0]
        if self.cu_seqlens_q is not None and self.cu_seqlens_k is not None:
            _check_boundaries("q", self.cu_seqlens_q, self.query.shape[2], self.max_seqlen_q)
            seqlens_k = _check_boundaries("k", self.cu_seqlens_k, self.key.shape[2], self.max_seqlen_k)
        if self.key_start is not None:
            for b, start in enumerate(self.key_start.tolist()):
                if start < 0:
                    raise ValueError(f"fastattn: key_start[{b}] must not be negative, got {start}")
        if self.key_lengths is not None:
            for b, length in enumerate(self.key_lengths.tolist()):
                if not 0 <= length <= seqlens_k[b]:
                    raise ValueError(
                        f"fastattn: key_lengths[{b}] must be between 0 and the key length {seqlens_k[b]}, got {length}"
                    )
                seqlens_k[b] = length
        if self.block_table is not None:
            check_pages(self.block_table, seqlens_k, self.key.shape[2], self.key.shape[0])

    def sequences(self) -> Iterator[tuple[slice, slice, Problem]]:
        """A packed problem's sequences, each as (its query rows, its key rows, a problem of batch size 1 on views)."""
        assert self.cu_seqlens_q is not None
        assert self.cu_seqlens_k is not None
        bounds_q, bounds_k = self.cu_seqlens_q.tolist(), self.cu_seqlens_k.tolist()
        for b in range(len(bounds_q) - 1):
            rows, keys = slice(bounds_q[b], bounds_q[b + 1]), slice(bounds_k[b], bounds_k[b + 1])
            seqlen_q, seqlen_k = rows.stop - rows.start, keys.stop - keys.start
            yield (
                rows,
                keys,
                replace(
                    self,
                    query=self.query[:, :, rows],
                    key=self.key[:, :, keys],
                    value=self.value[:, :, keys],
                    attn_mask=self.mask_of_sequence(self.attn_mask, b, seqlen_q, seqlen_k),
                    mask_rows=_of_sequence(self.mask_rows, b),
                    mask_columns=_of_sequence(self.mask_columns, b),
                    alibi_slopes=None if self.alibi_slopes is None else self.alibi_slopes[b : b + 1],
                    query_start=None if self.query_start is None else self.query_start[b : b + 1],
                    key_start=None if self.key_start is None else self.key_start[b : b + 1],
                    key_lengths=None if self.key_lengths is None else self.key_lengths[b : b + 1],
                    cu_seqlens_q=None,
                    cu_seqlens_k=None,
                    max_seqlen_q=seqlen_q,
                    max_seqlen_k=seqlen_k,
                    first_sequence=b,
                ),
            )

    @staticmethod
    def mask_of_sequence(mask: Tensor | None, b: int, seqlen_q: int, seqlen_k: int) -> Tensor | None:
        """The part of a (B or 1, Hq or 1, max_q or 1, max_k or 1) mask that belongs to packed sequence b."""
        if mask is None:
            return None
        part = mask[b : b + 1] if mask.shape[0] > 1 else mask
        part = part[:, :, :seqlen_q] if mask.shape[2] > 1 else part
        return part[..., :seqlen_k] if mask.shape[3] > 1 else part


ARGUMENTS = tuple(field.name for field in fields(Problem))[:-1]
TENSORS = ARGUMENTS[: ARGUMENTS.index("rng") + 1]


def _of_sequence(lines: Tensor | None, b: int) -> Tensor | None:
    return lines if lines is None or lines.shape[0] == 1 else lines[b : b + 1]


def check_pages(block_table: Tensor, lengths: list[int], page_size: int, pages: int) -> None:
    """Raise ValueError where a sequence of these lengths uses a page that there is not; other entries are free."""
    used = block_table[:, : -(-max(lengths, default=0) // page_size)]
    # Looking at the entries of a large table one by one takes longer than attending. Almost always all are pages.
    if used.numel() > 128:
        least, most = (bound.item() for bound in used.aminmax())
        if least >= 0 and most < pages:
            return
    for b, (row, length) in enumerate(zip(block_table.tolist(), lengths, strict=True)):
        for slot in range(-(-length // page_size)):
            if not 0 <= row[slot] < pages:
                raise ValueError(
                    f"fastattn: block_table[{b}, {slot}] must be a page from 0 to {pages - 1}, got {row[slot]}"
                )


def _check_boundaries(side: str, cu_seqlens: Tensor, total: int, longest: int) -> list[int]:
    """The lengths of the packed sequences of one side, or ValueError."""
    bounds = cu_seqlens.tolist()
    lengths = [b - a for a, b in pairwise(bounds)]
    if bounds[0] != 0 or bounds[-1] > total or min(lengths, default=0) < 0:
        raise ValueError(f"fastattn: cu_seqlens_{side} must rise from 0 and end at most at {total}, got {bounds}")
    if max(lengths, default=0) > longest:
        raise ValueError(
            f"fastattn: max_seqlen_{side} must be at least the longest sequence of cu_seqlens_{side}, "
            f"{max(lengths)}, got {longest}"
        )
    return lengths


def default_scale(head_dim: int) -> float:
    return 1.0 / math.sqrt(head_dim)


def unit_rows(tensor: Tensor) -> Tensor:
    """The tensor with the unit column stride that kernels rely on; a copy only where it has another."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def allocate_forward(p: Problem) -> tuple[Tensor, Tensor]:
    """(out, lse): out (B, Hq, Sq, Dv) over (B, Sq, Hq, Dv) memory, so that merging the heads is a view."""
    batch, heads, seqlen, _ = p.query.shape
    width = p.value.shape[3]
    strides = (seqlen * heads * width, width, heads * width, 1)
    out = p.query.new_empty_strided((batch, heads, seqlen, width), strides)
    return out, p.query.new_empty((batch, heads, seqlen), dtype=p.accumulate_dtype)


def _empty_rows_like(tensor: Tensor) -> Tensor:
    """Memory for a tensor's gradient, with its strides where these have the unit column stride that kernels rely on."""
    rows = tensor.stride(-1) == 1 or tensor.shape[-1] == 1
    return torch.empty_like(tensor, memory_format=torch.preserve_format if rows else torch.contiguous_format)


def allocate_backward(p: Problem, mask_grad: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value, attn_mask and sinks; an empty tensor where one is not wanted."""
    return (
        _empty_rows_like(p.query),
        _empty_rows_like(p.key),
        _empty_rows_like(p.value),
        torch.empty_like(p.attn_mask) if mask_grad and p.attn_mask is not None else p.query.new_empty(0),
        torch.empty_like(p.sinks) if p.sinks is not None else p.query.new_empty(0),
    )
