"""The `triton` backend: launches the Triton kernels of kernels/ (installed as fastattn.kernels)."""

from __future__ import annotations

import math
from functools import cache, lru_cache
from importlib.util import find_spec

import torch
from torch import Tensor

from fastattn.backends import FEATURES, Capability
from fastattn.dense.append import Appending, allocate_rotated
from fastattn.dense.problem import Problem, allocate_backward, allocate_forward, unit_rows
from fastattn.dense.reference import gathered
from fastattn.dense.triton_launch import (
    INTERPRETED,
    Launch,
    compute_capability,
    kernels,
    matrix,
    padded,
    run,
    tiles_of,
)

_OLDEST = 80  # compute capability of NVIDIA's first with bfloat16, and the oldest that Triton supports
_MAIN = 512  # the widest head that is one tile; what is past it is a second one, only where keys are split


def _unavailable(device: str, index: int | None) -> str | None:
    if not find_spec("triton"):
        return "Triton is not installed"
    capability = compute_capability(torch.device(device, index) if index is not None else torch.device(device))
    if 0 < capability < _OLDEST:
        return f"needs compute capability {_OLDEST / 10}, {torch.cuda.get_device_name(index)} has {capability / 10}"
    return None


CAPABILITY = Capability(
    backend="triton",
    family="dense",
    devices=frozenset({"cuda", "xpu"} | ({"cpu"} if INTERPRETED else set())),
    dtypes=frozenset({torch.float32, torch.float16} | (set() if INTERPRETED else {torch.bfloat16})),
    max_head_dim=576,  # latent attention's
    narrower=frozenset({("backward", _MAIN), ("packed", _MAIN), ("block_mask", _MAIN)}),
    features=frozenset(FEATURES["dense"]) - {"transforms"},
    unavailable=_unavailable,
)


def forward(p: Problem) -> tuple[Tensor, Tensor]:
    """Launch the forward: (out, lse)."""
    out, lse = allocate_forward(p)
    masked = p.mask_rows is not None
    launch = Launch(gathered(p) if masked else p)  # the kernel that takes block masks takes no pages
    few_rows = launch.longest_q * launch.group <= kernels().config.SPLIT_ROWS
    if not launch.packed and not masked and (few_rows or p.block_table is not None or launch.widths["D"] > _MAIN):
        _forward_split(launch, out, lse)
        return out, lse
    if launch.packed:  # rows past the last sequence belong to none
        out.zero_()
        lse.fill_(float("-inf"))
    constants = launch.masked_constants(launch.tile("FORWARD"))
    tiles = launch.tiles("rows", constants)
    programs = tiles * launch.heads * launch.sequences
    run(
        kernels().forward.forward_kernel,
        programs,
        *launch.inputs(),
        *matrix(out),
        lse,
        *lse.stride()[:2],
        p.sinks,
        *launch.listed("rows"),
        *launch.limits(),
        launch.heads,
        tiles,
        *launch.shape,
        launch.factor,
        launch.cap,
        launch.threshold,
        launch.dropout_scale,
        **constants,
    )
    return out, lse


@lru_cache(maxsize=1024)
def _splits(programs: int, slots: int, most: int) -> int:
    """Into how many parts to split the keys: the fewest that keep the device nearly as busy as the best number.

    Args:
        programs: there are without a split.
        slots: programs that run at once.
        most: parts that are worth a program.
    """

    def busy(splits: int) -> float:
        waves = programs * splits / slots
        return waves / math.ceil(waves)

    choices = range(1, max(1, most) + 1)
    best = max(map(busy, choices))
    return next(splits for splits in choices if busy(splits) >= 0.85 * best)


@cache
def _slots(device: torch.device) -> int:
    """Decoding programs that run at once: two a multiprocessor."""
    if device.type == "cpu":
        return 4
    return 2 * torch.get_device_module(device).get_device_properties(device).multi_processor_count


def _forward_split(launch: Launch, out: Tensor, lse: Tensor) -> None:
    """The forward with the keys split between programs, and a tile's rows over the heads that share them."""
    p, config = launch.p, kernels().config
    batch, heads, seqlen_q, head_dim_v = out.shape
    tile = launch.tile("SPLIT")
    rows = seqlen_q * launch.group
    tile = tile._replace(block_m=min(tile.block_m, padded(rows)))
    tiles = tiles_of(rows, tile.block_m)
    programs = tiles * p.key.shape[1] * batch
    if not programs:
        return
    if p.deterministic:
        # Parts of a fixed size: a sequence's result then does not depend on the batch it is in.
        chunk = config.SPLIT_CHUNK
        splits = max(1, tiles_of(launch.longest_k, chunk))
    else:
        chunk = None
        splits = _splits(programs, _slots(out.device), min(tiles_of(launch.longest_k, 2 * tile.block_n), 128))

    merge = splits > 1
    part_out, part_lse = out[:, :, :, None], lse[..., None]
    if merge:
        part_out = out.new_empty((batch, heads, seqlen_q, splits, head_dim_v), dtype=lse.dtype)
        part_lse = lse.new_empty((batch, heads, seqlen_q, splits))
    key, value = launch.key, launch.value
    tail = max(launch.widths["D"] - _MAIN, 0)
    constants = launch.constants(tile) | {"TAIL": tail, "BLOCK_TAIL": padded(tail)}
    if tail:
        constants |= {"D": _MAIN, "BLOCK_D": _MAIN}
    # Latent attention (DeepSeek-V2): the values are the keys' first columns, and need no second read.
    latent = value.data_ptr() == key.data_ptr() and value.stride() == key.stride()
    latent = latent and constants["D"] == constants["DV"]
    run(
        kernels().decode.split_kernel,
        programs * splits,
        *matrix(launch.query),
        *matrix(key),
        *((None, 0, 0, 0) if latent else matrix(value)),
        *launch.mask(p.attn_mask),
        part_out,
        *part_out.stride()[:4],
        part_lse,
        *part_lse.stride(),
        None if merge else p.sinks,
        launch.slopes(),
        p.query_start,
        p.key_start,
        p.key_lengths,
        p.rng,
        p.block_table,
        0 if p.block_table is None else p.block_table.stride(0),
        key.shape[0],
        heads,
        tiles,
        splits,
        chunk,
        *launch.shape,
        launch.factor,
        launch.cap,
        launch.threshold,
        launch.dropout_scale,
        PAGE=None if p.block_table is None else key.shape[2],
        **constants,
    )
    if merge:
        run(
            kernels().decode.combine_kernel,
            batch * heads * seqlen_q,
            part_out,
            part_lse,
            *matrix(out),
            lse,
            p.sinks,
            heads,
            splits,
            seqlen_q,
            DV=head_dim_v,
            BLOCK_DV=launch.widths["BLOCK_DV"],
            BLOCK_SPLITS=16,
        )


def append(a: Appending) -> Tensor:
    """Write new keys and values into a cache, as `fastattn.dense.append.append` does."""
    rotated = allocate_rotated(a.query, a.cos)
    batch, heads, seqlen_q, head_dim = a.query.shape
    kv_heads, seqlen_new = a.key.shape[1:3]
    rows = a.key_cache.shape[2]
    new_rows = batch * kv_heads * seqlen_new
    programs = new_rows + (0 if a.cos is None else batch * heads * seqlen_q)
    query, key, value = unit_rows(a.query), unit_rows(a.key), unit_rows(a.value)
    half = 0 if a.cos is None else a.cos.shape[1]
    run(
        kernels().append.append_kernel,
        programs,
        *matrix(query),
        *(matrix(rotated) if a.cos is not None else (None, 0, 0, 0)),
        *matrix(key),
        *matrix(value),
        *matrix(a.key_cache),
        a.key_cache.stride(3),
        *matrix(a.value_cache),
        a.value_cache.stride(3),
        a.key_lengths,
        a.block_table,
        0 if a.block_table is None else a.block_table.stride(0),
        a.key_cache.shape[0],
        *((None, 0) if a.cos is None else (unit_rows(a.cos), unit_rows(a.cos).stride(0))),
        *((None, 0) if a.sin is None else (unit_rows(a.sin), unit_rows(a.sin).stride(0))),
        0 if a.cos is None else a.cos.shape[0],
        heads,
        kv_heads,
        new_rows,
        seqlen_q,
        seqlen_new,
        rows if a.block_table is None else rows * a.block_table.shape[1],
        D=head_dim,
        BLOCK_D=padded(head_dim),
        DV=value.shape[3],
        BLOCK_DV=padded(value.shape[3]),
        HALF=half,
        BLOCK_HALF=padded(half),
        INTERLEAVED=a.interleaved,
        PAGE=None if a.block_table is None else rows,
    )
    return rotated


def backward(
    p: Problem, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None, mask_grad: bool
) -> tuple[Tensor, ...]:
    """Launch the backward: gradients as `allocate_backward` lists them."""
    results = allocate_backward(p, mask_grad)
    grad_query, grad_key, grad_value, grad_mask, grad_sinks = results
    launch = Launch(p)
    if launch.packed:  # rows and keys past the last sequence belong to none
        for grad in (grad_query, grad_key, grad_value):
            grad.zero_()
    out, grad_out, lse = unit_rows(out), unit_rows(grad_out), lse.contiguous()
    delta = _delta(launch, out, grad_out, grad_lse)
    shared = (*launch.inputs(), lse, delta, *matrix(grad_out))
    scores = (launch.factor, launch.cap, launch.threshold, launch.dropout_scale)

    constants = launch.masked_constants(launch.tile("KEY_VALUE"))
    tiles = launch.tiles("columns", constants)
    run(
        kernels().backward.key_value_kernel,
        tiles * p.key.shape[1] * launch.sequences,
        *shared,
        *matrix(grad_key),
        *matrix(grad_value),
        *launch.listed("columns"),
        *launch.limits(),
        launch.heads,
        tiles,
        *launch.shape,
        p.scale,
        *scores,
        **constants,
    )
    constants = launch.masked_constants(launch.tile("QUERY"))
    tiles = launch.tiles("rows", constants)
    run(
        kernels().backward.query_kernel,
        tiles * launch.heads * launch.sequences,
        *shared,
        *matrix(grad_query),
        *launch.listed("rows"),
        *launch.limits(),
        launch.heads,
        tiles,
        *launch.shape,
        p.scale,
        *scores,
        **constants,
    )
    if mask_grad and p.attn_mask is not None:
        _bias_gradient(launch, shared, scores, grad_mask)
    if p.sinks is not None:
        share = torch.exp(p.sinks.view(1, -1, 1) - lse)
        # A row past the last sequence has no LSE and no share.
        grad_sinks.copy_(-torch.where(lse == float("-inf"), 0.0, share * delta).sum((0, 2)))
    return results


def _delta(launch: Launch, out: Tensor, grad_out: Tensor, grad_lse: Tensor | None) -> Tensor:
    batch, heads, seqlen, _ = out.shape
    delta = out.new_empty((batch, heads, seqlen), dtype=torch.float32)
    block = 64
    tiles = tiles_of(seqlen, block)
    run(
        kernels().backward.delta_kernel,
        tiles * heads * batch,
        *matrix(out),
        *matrix(grad_out),
        grad_lse,
        *(grad_lse.stride() if grad_lse is not None else (0, 0, 0)),
        delta,
        heads,
        tiles,
        seqlen,
        DV=launch.widths["DV"],
        BLOCK_DV=launch.widths["BLOCK_DV"],
        BLOCK_M=block,
    )
    return delta


def _bias_gradient(launch: Launch, shared: tuple, scores: tuple, grad_mask: Tensor) -> None:
    constants = launch.masked_constants(launch.tile("BIAS"))
    tiles_q = tiles_of(launch.longest_q, constants["BLOCK_M"])
    tiles_k = tiles_of(launch.longest_k, constants["BLOCK_N"])
    mask_b, mask_h, mask_q, mask_k = grad_mask.shape
    programs = mask_b * mask_h * (tiles_q if mask_q > 1 else 1) * (tiles_k if mask_k > 1 else 1)
    run(
        kernels().backward.bias_kernel,
        programs,
        *shared,
        *launch.mask(grad_mask),
        *launch.listed("rows"),
        *launch.limits(),
        launch.heads,
        launch.sequences,
        *grad_mask.shape,
        tiles_q,
        tiles_k,
        *launch.shape,
        *scores,
        **constants,
    )
