"""LSH attention: softmax attention of each token to the few that random hashes find similar to it."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn.dense import arguments as check
from fastattn.dense.api import attention, merge_partials
from fastattn.dense.problem import LSE_DTYPE
from fastattn.linear import lowrank
from fastattn.sparse.builders import count

NOWHERE = -4  # a key's place that is next to no query's
PIECE = 1 << 22  # projections held at a time, a few MiB


def hash_rotations(
    rounds: int,
    heads: int,
    head_dim: int,
    buckets: int,
    *,
    generator: torch.Generator | None = None,
    device: torch.device | str | int | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Gaussian directions for the hashes of `lsh_attention` (Andoni et al. 2015, arXiv:1509.02897).

    Args:
        rounds: independent hashes. Each further one finds more of the similar tokens, and costs as much as the first.
        heads: H.
        head_dim: D.
        buckets: that a round sorts tokens into, even; about the sequence length over lsh_attention's `bucket_size`.
        generator: what they are drawn from, on its device; None is torch's own for the device.
        device: default the generator's, else torch's default device.
        dtype: default torch's default dtype.

    Returns:
        (rounds, heads, head_dim, buckets / 2).

    Raises:
        TypeError, ValueError: sizes that are no positive integers, odd buckets, a dtype that is not floating point.
    """
    sizes = {"rounds": rounds, "heads": heads, "head_dim": head_dim, "buckets": buckets}
    for name, size in sizes.items():
        count(name, size, 1)
    if buckets % 2:
        raise ValueError(f"fastattn: buckets must be even, got {buckets}")
    dtype = torch.get_default_dtype() if dtype is None else dtype
    if not dtype.is_floating_point:
        raise TypeError(f"fastattn: dtype must be floating point, got {dtype}")
    if device is None and generator is not None:
        device = generator.device
    return torch.randn((rounds, heads, head_dim, buckets // 2), generator=generator, device=device, dtype=dtype)


def lsh_attention(
    query_key: Tensor,
    value: Tensor,
    *,
    rotations: Tensor,
    bucket_size: int = 64,
    causal: bool = True,
    key_mask: Tensor | None = None,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    r"""Reformer's attention with shared queries and keys (Kitaev et al. 2020, arXiv:2001.04451).

    Keys are the queries brought to unit length. In each round a token x falls into bucket argmax [x R; -x R]; tokens
    are sorted by bucket, within one by position, and cut into chunks of bucket_size. A token sees the tokens of its own
    bucket that lie in its chunk or the one before (the first chunk has none before), causally by original position.
    Its result is one softmax over all keys that it sees in any round, each counted once. It sees itself only where it
    sees no other key.

    Memory is linear in rounds * S * bucket_size. So is time, but for hashing, which takes S * buckets / 2 products of D
    numbers a round, and a small part that grows as rounds ** 2. Hashing has no gradient; to repeat a call (a reference,
    checkpointing) pass the same rotations.

    Args:
        query_key: (B, H, S, D), float32, bfloat16, float16 or float64, any strides.
        value: (B, H, S, Dv).
        rotations: R, (rounds, H, D, buckets / 2) floating point, from `hash_rotations`.
        bucket_size: tokens of a chunk, which need not divide S.
        causal: a token sees no later one.
        key_mask: (B, S) bool, False where there is no token: it takes no place in a chunk, is not seen, and its result
            is 0.
        scale: factor on the scores; default 1 / sqrt(D).
        backend: the dense backend to use, by name; None takes the first that supports the call.

    Returns:
        (B, H, S, Dv) over (B, S, H, Dv) memory.

    Raises:
        TypeError, ValueError: an argument is of the wrong type, dtype, shape, device or range.
        UnsupportedError: the named backend cannot run the call.
    """
    check.tensor("query_key", query_key, 4, "(batch, heads, seqlen, head_dim)")
    query, _, value = lowrank.inputs(query_key, query_key, value, key_mask=key_mask, scale=scale, backend=backend)
    _check_rotations(rotations, query)
    count("bucket_size", bucket_size, 1)
    check.flag("causal", causal)
    length = query.shape[2]
    rest = -length % bucket_size
    present = query.new_ones((query.shape[0], length), dtype=torch.bool) if key_mask is None else key_mask
    query, value = (F.pad(lowrank.without_masked(t, key_mask), (0, 0, 0, rest)) for t in (query, value))
    present = F.pad(present, (0, rest))
    key = F.normalize(lowrank.accumulable(query), dim=-1).to(query.dtype)

    buckets = _buckets(query.detach(), rotations, present)
    order = torch.sort(buckets, dim=-1, stable=True).indices
    inverse = torch.argsort(order, dim=-1)
    accumulate = LSE_DTYPE.get(query.dtype, torch.float32)
    bias = _bias(buckets, 2 * rotations.shape[3], order, inverse, bucket_size, causal, accumulate)
    sorted_query, sorted_key, sorted_value = (_chunks(t, order, bucket_size) for t in (query, key, value))
    # Every chunk is a sequence of its own: (rounds * B * H * chunks, 1, bucket_size or twice that, D).
    out, lse = attention(
        sorted_query.flatten(0, 3)[:, None],
        _and_before(sorted_key, 0.0).flatten(0, 3)[:, None],
        _and_before(sorted_value, 0.0).flatten(0, 3)[:, None],
        attn_mask=bias.flatten(0, 3)[:, None],
        scale=scale,
        return_lse=True,
        backend=backend,
    )
    # Merged as (B, S, H), the order in memory that `attention` returns.
    place = _rows(inverse, 0)[..., :length].transpose(2, 3).contiguous()
    outs, lses = (t.flatten(0, 2)[place].unbind(0) for t in (lowrank.accumulable(out), lse))
    merged = functools.reduce(lambda a, b: merge_partials(*a, *b), zip(outs, lses, strict=True))
    return merged[0].transpose(1, 2).to(query.dtype)


def _check_rotations(value: Any, query: Tensor) -> None:
    heads, width = query.shape[1], query.shape[3]
    wanted = f"(rounds, H, D, buckets / 2) = (rounds, {heads}, {width}, buckets / 2)"
    check.tensor("rotations", value, 4, wanted)
    if not value.is_floating_point():
        raise TypeError(f"fastattn: rotations must be a floating-point tensor, got {value.dtype}")
    if value.device != query.device:
        raise ValueError(f"fastattn: rotations must be on query_key's device {query.device}, got {value.device}")
    if value.shape[1:3] != (heads, width) or 0 in (value.shape[0], value.shape[3]):
        raise ValueError(f"fastattn: rotations must have shape {wanted}, got {tuple(value.shape)}")
    if value.requires_grad:
        raise ValueError("fastattn: rotations have no gradient; pass rotations.detach()")


def _buckets(x: Tensor, rotations: Tensor, present: Tensor) -> Tensor:
    """(rounds, B, H, S) int64; tokens that are not present have a last bucket of their own, and see only each other."""
    x = lowrank.accumulable(x)
    rotations = rotations[:, None].to(x.dtype)
    rounds, half = rotations.shape[0], rotations.shape[4]
    found = []
    with lowrank.without_autocast(x.device):
        for some in x.split(max(1, PIECE // max(1, rounds * half * x.shape[:2].numel())), 2):
            rotated = some @ rotations
            high, low = rotated.max(-1), rotated.min(-1)
            found.append(torch.where(high.values >= -low.values, high.indices, half + low.indices))
    return torch.cat(found, -1).masked_fill(~present[:, None], 2 * half)


def _rows(places: Tensor, shared: int) -> Tensor:
    """Places (..., S) within sequences as row numbers over all sequences, the same along the first `shared` axes."""
    lines, length = places.shape[shared:-1], places.shape[-1]
    return places + length * torch.arange(lines.numel(), device=places.device).view(*lines, 1)


def _chunks(x: Tensor, order: Tensor, size: int) -> Tensor:
    """(B, H, S, ...) in the order (rounds, B, H, S) of each round as (rounds, B, H, chunks, size, ...)."""
    return x.flatten(0, 2)[_rows(order, 1)].unflatten(3, (-1, size))


def _and_before(chunks: Tensor, first: float) -> Tensor:
    """Each chunk (rounds, B, H, chunks, size, ...) after the one before it, which for the first is filled."""
    before = torch.cat([torch.full_like(chunks[:, :, :, :1], first), chunks[:, :, :, :-1]], 3)
    return torch.cat([before, chunks], 4)


@torch.no_grad()
def _bias(
    buckets: Tensor,
    num_buckets: int,
    order: Tensor,
    inverse: Tensor,
    size: int,
    causal: bool,
    dtype: torch.dtype,
) -> Tensor:
    """(rounds, B, H, chunks, size, 2 * size): -inf where a key is not seen, else minus the log of how often it is.

    That a lone token sees itself is decided here: the paper's finite penalty of 1e5 would cost LSE all its digits.
    """
    rounds, length = buckets.shape[0], buckets.shape[-1]
    # Chunk numbers rise with bucket numbers. So places differ by 0 or 1 exactly where two tokens are of one bucket, and
    # of one chunk or the second of the chunk before.
    place = 2 * buckets + inverse // size
    most = 2 * (num_buckets + 1) + length // size
    place = place.to(torch.int16 if most < 1 << 15 else torch.int32)  # a smaller type is faster
    token = torch.arange(length, dtype=torch.int32, device=buckets.device).expand(buckets.shape[1:])
    token = _chunks(token, order, size)

    seen = torch.empty((*token.shape, 2 * size), dtype=torch.bool, device=buckets.device)
    times = torch.zeros_like(seen, dtype=torch.uint8 if rounds < 256 else torch.int32)
    for number in range(rounds):
        one = _chunks(place[number], order, size)
        found = ((one[..., None] - _and_before(one, NOWHERE)[..., None, :]) >> 1) == 0
        seen[number] = found[number]
        times += found.view(torch.uint8)
    itself = seen.diagonal(size, -2, -1)
    itself.zero_()
    if causal:
        seen &= _and_before(token, 0)[..., None, :] < token[..., None]
    lone = ~seen.any(-1).flatten(3).gather(3, inverse).any(0)
    itself.copy_(_chunks(lone, order, size))
    return times.to(dtype).clamp_(min=1).reciprocal_().log_().masked_fill_(~seen, -math.inf)
