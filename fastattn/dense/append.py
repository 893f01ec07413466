"""The registered op that writes new keys and values into a KV cache, and how it is done in plain PyTorch.

Its own op, because it changes its arguments; attention over the cache is then `fastattn::dense_forward` like any other.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastattn import backends
from fastattn.backends import Requirements
from fastattn.dense.problem import LSE_DTYPE, check_pages

_library = torch.library.Library("fastattn", "FRAGMENT")
_library.define(
    "kvcache_append(Tensor query, Tensor(a!) key_cache, Tensor(b!) value_cache, Tensor key, Tensor value, "
    "Tensor key_lengths, Tensor? block_table, Tensor? cos, Tensor? sin, bool interleaved, str? backend) -> Tensor"
)


@dataclass
class Appending:
    """New keys and values, where they go, and the rotary embedding of them and of the query."""

    query: Tensor  # (B, Hq, Sq, D), standing at the end: query i at position key_lengths[b] + S_new - Sq + i
    key_cache: Tensor  # (B, Hkv, capacity, D), or with block_table (pages, Hkv, page_size, D); written to
    value_cache: Tensor  # the same with Dv
    key: Tensor  # (B, Hkv, S_new, D), new key s at position key_lengths[b] + s
    value: Tensor  # (B, Hkv, S_new, Dv)
    key_lengths: Tensor  # (B,) int32, before the append
    block_table: Tensor | None  # (B, pages per sequence) int32
    cos: Tensor | None  # (positions, R / 2), with sin or neither
    sin: Tensor | None
    interleaved: bool  # whether columns 2c and 2c + 1 make a pair, rather than c and c + R / 2


def _kvcache_append(*args: Any) -> Tensor:
    *fields, backend = args
    a = Appending(*fields)
    launcher = backends.select("dense", _requirements(a), backend)
    _check_values(a)
    return launcher.append(a)


def _requirements(a: Appending) -> Requirements:
    """What every attention over this cache asks for, so that a backend that cannot run one does not append either."""
    shape_q, shape_k, shape_v = a.query.shape, a.key.shape, a.value.shape
    features = ["query_start", "key_lengths"]
    if a.block_table is not None:
        features.append("paged")
    if shape_q[1] != shape_k[1]:
        features.append("gqa")
    if shape_q[3] != shape_v[3]:
        features.append("value_dim")
    return Requirements(a.query.device.type, a.query.dtype, max(shape_q[3], shape_v[3]), frozenset(features))


_library.impl("kvcache_append", _kvcache_append, "CompositeExplicitAutograd")


@torch.library.register_fake("fastattn::kvcache_append", lib=_library)
def _(*args: Any) -> Tensor:
    *fields, _ = args
    a = Appending(*fields)
    return allocate_rotated(a.query, a.cos)


def allocate_rotated(query: Tensor, cos: Tensor | None) -> Tensor:
    """What the op returns: a contiguous tensor of query's shape with rotary, an empty one without."""
    return query.new_empty(query.shape if cos is not None else 0)


def _check_values(a: Appending) -> None:
    """Raise ValueError for lengths, pages or rotary positions that do not fit the tensors.

    Runs on the CPU; elsewhere only under FASTATTN_CHECK=1, because reading the values would wait for the device.
    """
    if a.query.device.type != "cpu" and os.environ.get("FASTATTN_CHECK") != "1":
        return
    seqlen_q, seqlen_new, rows = a.query.shape[2], a.key.shape[2], a.key_cache.shape[2]
    capacity = rows if a.block_table is None else rows * a.block_table.shape[1]
    lengths = a.key_lengths.tolist()
    for b, length in enumerate(lengths):
        if not 0 <= length <= capacity - seqlen_new:
            raise ValueError(
                f"fastattn: key_lengths[{b}] must be between 0 and {capacity - seqlen_new} (the cache's capacity "
                f"{capacity} less {seqlen_new} new keys), got {length}"
            )
        end = length + seqlen_new
        if a.cos is not None and not seqlen_q <= end <= a.cos.shape[0]:
            raise ValueError(
                f"fastattn: rotary has positions 0 to {a.cos.shape[0] - 1}, but the queries and new keys of sequence "
                f"{b} stand at {min(length, end - seqlen_q)} to {end - 1}"
            )
    if a.block_table is not None:
        check_pages(a.block_table, [length + seqlen_new for length in lengths], rows, a.key_cache.shape[0])


def append(a: Appending) -> Tensor:
    """Rotate the new keys and write them and their values into the caches, in place.

    Returns:
        the rotated query, contiguous; an empty tensor where cos is None.
    """
    seqlen_q, seqlen_new = a.query.shape[2], a.key.shape[2]
    starts = a.key_lengths.long()[:, None]
    positions = starts + torch.arange(seqlen_new, device=a.query.device)
    rotated, key = allocate_rotated(a.query, a.cos), a.key
    if a.cos is not None and a.sin is not None:
        key = rotate(key, a.cos, a.sin, positions, a.interleaved)
        ends = starts + (seqlen_new - seqlen_q)
        positions_q = ends + torch.arange(seqlen_q, device=a.query.device)
        rotated.copy_(rotate(a.query, a.cos, a.sin, positions_q, a.interleaved))
    _write((a.key_cache, a.value_cache), (key, a.value), positions, a.block_table)
    return rotated


def rotate(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, interleaved: bool) -> Tensor:
    """The first R columns of x (B, H, S, D) turned by the angles of positions (B, S), the others as they are.

    Su et al., "RoFormer", arXiv:2104.09864; in float32 (float64 for float64), rounded once.
    """
    wide = LSE_DTYPE.get(x.dtype, torch.float32)
    if x.device.type != "cpu":  # unchecked there, and no device reads beyond the tables
        positions = positions.clamp(0, cos.shape[0] - 1)
    cos, sin = (table[positions].to(wide)[:, None] for table in (cos, sin))  # (B, 1, S, R / 2)
    width = 2 * cos.shape[-1]
    turning = x[..., :width].to(wide)
    first, second = (turning[..., ::2], turning[..., 1::2]) if interleaved else turning.chunk(2, dim=-1)
    turned = (first * cos - second * sin, second * cos + first * sin)
    joined = torch.stack(turned, dim=-1).flatten(-2) if interleaved else torch.cat(turned, dim=-1)
    return torch.cat((joined.to(x.dtype), x[..., width:]), dim=-1)


def _write(
    caches: tuple[Tensor, Tensor], new: tuple[Tensor, Tensor], positions: Tensor, block_table: Tensor | None
) -> None:
    """Write new rows (B, Hkv, S_new, width) at positions (B, S_new) of the caches."""
    count, _, rows, _ = caches[0].shape
    if not positions.numel() or not caches[0].numel():
        return
    if block_table is None:
        page = torch.arange(count, device=positions.device)[:, None].expand_as(positions)
        row = positions
    else:
        slot = positions // rows
        page = block_table.long().gather(1, slot.clamp(0, block_table.shape[1] - 1))
        row = positions % rows
    new_BSHD = [t.transpose(1, 2) for t in new]
    places = [cache.transpose(1, 2) for cache in caches]  # (pages, rows, Hkv, width)
    if positions.device.type != "cpu":  # unchecked there
        capacity = rows if block_table is None else rows * block_table.shape[1]
        fits = (positions >= 0) & (positions < capacity) & (page >= 0) & (page < count)
        page, row, new_BSHD = _only_those_that_fit(places, page, row, new_BSHD, fits)
    for place, values in zip(places, new_BSHD, strict=True):
        place.index_put_((page, row), values)


def _only_those_that_fit(
    places: list[Tensor], page: Tensor, row: Tensor, new: list[Tensor], fits: Tensor
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """The same writes without those outside the cache, and without reading a value back from the device.

    A row that does not fit repeats one that does: two equal writes to one place are harmless, where writing back what
    was there could undo another write. Where no row fits, all write back one old row.
    """
    count, rows = places[0].shape[:2]
    fits = fits.flatten()
    anchor = fits.int().argmax()
    source = torch.where(fits, torch.arange(fits.numel(), device=fits.device), anchor)
    page = page.flatten()[source].clamp(0, count - 1)
    row = row.flatten()[source].clamp(0, rows - 1)
    some = fits.any()
    kept = [
        torch.where(some, values.flatten(0, 1)[source], place[page, row])
        for place, values in zip(places, new, strict=True)
    ]
    return page, row, kept
