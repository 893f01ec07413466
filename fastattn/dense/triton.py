"""The `triton` backend: launches the Triton kernels of kernels/ (installed as fastattn.kernels).

Under TRITON_INTERPRET=1, Triton's interpreter runs the same kernels on CPU tensors, for tests; it cannot compute in
bfloat16.
"""

from __future__ import annotations

import math
import os
from functools import cache, lru_cache
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from fastattn.backends import FEATURES, Capability
from fastattn.dense.append import allocate_rotated
from fastattn.dense.problem import Problem, allocate_backward, allocate_forward

_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_LOG2E = 1.4426950408889634
_MAIN = 512  # the widest head that is one tile; what is past it is a second one, only where keys are split


def _unavailable() -> str | None:
    return None if find_spec("triton") else "Triton is not installed"


CAPABILITY = Capability(
    backend="triton",
    family="dense",
    devices=frozenset({"cuda", "xpu"} | ({"cpu"} if _INTERPRETED else set())),
    dtypes=frozenset({torch.float32, torch.float16} | (set() if _INTERPRETED else {torch.bfloat16})),
    max_head_dim=576,  # of latent attention; the backward keeps whole heads on the chip
    max_head_dim_trained=_MAIN,
    features=frozenset(FEATURES) - {"transforms"},
    unavailable=_unavailable,
)


@cache
def _kernels() -> SimpleNamespace:
    """The modules with the kernels; imported at the first launch, because importing Triton takes time."""
    from fastattn.kernels import dense_append, dense_backward, dense_config, dense_decode, dense_forward

    return SimpleNamespace(
        append=dense_append, backward=dense_backward, config=dense_config, decode=dense_decode, forward=dense_forward
    )


@cache
def _compute_capability(device: torch.device) -> int:
    """90 for sm_90; 0 for what is not NVIDIA's."""
    if device.type != "cuda" or torch.version.hip:
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def _padded(head_dim: int) -> int:
    """The width of the tile that holds a head; tensor cores need 16."""
    return max(16, 1 << (head_dim - 1).bit_length())


def _rows(tensor: Tensor) -> Tensor:
    """The tensor with the unit column stride that kernels rely on; a copy only where it has another."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def _matrix(tensor: Tensor) -> tuple:
    """A (B, H, S, D) tensor and the strides that kernels take."""
    return (tensor, *tensor.stride()[:3])


def _window_side(width: int | None) -> int | None:
    """A window's side, cut to what cannot overflow beside positions in int32."""
    return None if width is None else max(-(2**30), min(width, 2**30))


class _Launch:
    """What the launches of one problem share."""

    def __init__(self, p: Problem) -> None:
        self.p = p
        self.query, self.key, self.value = _rows(p.query), _rows(p.key), _rows(p.value)
        self.heads, self.packed = p.query.shape[1], p.cu_seqlens_q is not None
        self.group = self.heads // p.key.shape[1]
        self.sequences = p.query.shape[0] if p.cu_seqlens_q is None else p.cu_seqlens_q.shape[0] - 1
        self.longest_q = p.max_seqlen_q if self.packed else p.query.shape[2]
        self.longest_k = p.max_seqlen_k if self.packed else p.seqlen_k
        head_dim, head_dim_v = p.query.shape[3], p.value.shape[3]
        self.widths = {
            "D": head_dim,
            "BLOCK_D": _padded(head_dim),
            "DV": head_dim_v,
            "BLOCK_DV": _padded(head_dim_v),
        }
        # What the products q . k are multiplied by (see Scoring), and the cap.
        self.factor = p.scale / p.softcap if p.softcap is not None else p.scale * _LOG2E
        self.cap = p.softcap * _LOG2E if p.softcap is not None else None
        self.dropout_scale = 1.0 / (1.0 - p.dropout_p) if p.dropout_p < 1.0 else 0.0
        self.threshold = int(p.dropout_p * 2**32)

    @property
    def shape(self) -> tuple[int, int, int | None, int | None, int | None]:
        """seqlen_q, seqlen_k (totals when packed), query_offset, window_left, window_right."""
        p = self.p
        return (
            p.query.shape[2],
            p.seqlen_k,
            _window_side(p.query_offset),
            _window_side(p.window_left),
            _window_side(p.window_right),
        )

    def inputs(self) -> tuple:
        return (*_matrix(self.query), *_matrix(self.key), *_matrix(self.value), *self.mask(self.p.attn_mask))

    def mask(self, mask: Tensor | None) -> tuple:
        """A mask, or the gradient of one, with its strides, 0 where it broadcasts."""
        if mask is None:
            return (None, 0, 0, 0, 0)
        strides = [0 if size == 1 else stride for size, stride in zip(mask.shape, mask.stride(), strict=True)]
        return (mask.view(torch.int8) if mask.dtype == torch.bool else mask, *strides)

    def slopes(self) -> Tensor | None:
        slopes = self.p.alibi_slopes
        return None if slopes is None else slopes.expand(self.sequences, self.heads).contiguous()

    def limits(self) -> tuple[Tensor | None, ...]:
        p = self.p
        return (self.slopes(), p.query_start, p.key_start, p.key_lengths, p.cu_seqlens_q, p.cu_seqlens_k, p.rng)

    def tile(self, table: str) -> Any:
        """The `Config` of the problem in one of the tables of kernels/dense_config.py."""
        config = _kernels().config
        width = max(self.widths["BLOCK_D"], self.widths["BLOCK_DV"])
        # The interpreter pays by the operation: it takes the larger tiles of 16-bit elements.
        itemsize = 2 if _INTERPRETED else self.query.element_size()
        return config.config(getattr(config, table), width, itemsize, _compute_capability(self.query.device))

    def constants(self, tile: Any) -> dict[str, Any]:
        # Tensor cores take float32 as tf32, which is less than float32, so only where torch itself may.
        tf32 = torch.backends.cuda.matmul.fp32_precision == "tf32"
        return {
            **self.widths,
            "GROUP": self.group,
            "PRECISION": "tf32" if tf32 else "ieee",
            "BLOCK_M": tile.block_m,
            "BLOCK_N": tile.block_n,
            "num_warps": tile.num_warps,
            "num_stages": tile.num_stages,
        }


def _tiles(length: int, block: int) -> int:
    return -(-length // block)


def forward(p: Problem) -> tuple[Tensor, Tensor]:
    """Launch the forward: (out, lse)."""
    out, lse = allocate_forward(p)
    launch = _Launch(p)
    few_rows = launch.longest_q * launch.group <= _kernels().config.SPLIT_ROWS
    if not launch.packed and (few_rows or p.block_table is not None or launch.widths["D"] > _MAIN):
        _forward_split(launch, out, lse)
        return out, lse
    if launch.packed:  # rows past the last sequence belong to none
        out.zero_()
        lse.fill_(float("-inf"))
    constants = launch.constants(launch.tile("FORWARD"))
    tiles = _tiles(launch.longest_q, constants["BLOCK_M"])
    programs = tiles * launch.heads * launch.sequences
    if programs:
        _kernels().forward.forward_kernel[(programs,)](
            *launch.inputs(),
            *_matrix(out),
            lse,
            *lse.stride()[:2],
            p.sinks,
            *launch.limits(),
            launch.heads,
            tiles,
            *launch.shape,
            launch.factor,
            launch.cap,
            launch.threshold,
            launch.dropout_scale,
            PACKED=launch.packed,
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


def _forward_split(launch: _Launch, out: Tensor, lse: Tensor) -> None:
    """The forward with the keys split between programs, and a tile's rows over the heads that share them."""
    p, config = launch.p, _kernels().config
    batch, heads, seqlen_q, head_dim_v = out.shape
    tile = launch.tile("SPLIT")
    rows = seqlen_q * launch.group
    tile = tile._replace(block_m=min(tile.block_m, _padded(rows)))
    tiles = _tiles(rows, tile.block_m)
    programs = tiles * p.key.shape[1] * batch
    if not programs:
        return
    if p.deterministic:
        # Parts of a fixed size: a sequence's result then does not depend on the batch it is in.
        chunk = config.SPLIT_CHUNK
        splits = max(1, _tiles(launch.longest_k, chunk))
    else:
        chunk = None
        splits = _splits(programs, _slots(out.device), min(_tiles(launch.longest_k, 2 * tile.block_n), 128))

    merge = splits > 1
    part_out, part_lse = out[:, :, :, None], lse[..., None]
    if merge:
        part_out = out.new_empty((batch, heads, seqlen_q, splits, head_dim_v), dtype=lse.dtype)
        part_lse = lse.new_empty((batch, heads, seqlen_q, splits))
    key, value = launch.key, launch.value
    tail = max(launch.widths["D"] - _MAIN, 0)
    constants = launch.constants(tile) | {"TAIL": tail, "BLOCK_TAIL": _padded(tail)}
    if tail:
        constants |= {"D": _MAIN, "BLOCK_D": _MAIN}
    # Latent attention (DeepSeek-V2): the values are the keys' first columns, and need no second read.
    latent = value.data_ptr() == key.data_ptr() and value.stride() == key.stride()
    latent = latent and constants["D"] == constants["DV"]
    _kernels().decode.split_kernel[(programs * splits,)](
        *_matrix(launch.query),
        *_matrix(key),
        *((None, 0, 0, 0) if latent else _matrix(value)),
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
        _kernels().decode.combine_kernel[(batch * heads * seqlen_q,)](
            part_out,
            part_lse,
            *_matrix(out),
            lse,
            p.sinks,
            heads,
            splits,
            seqlen_q,
            DV=head_dim_v,
            BLOCK_DV=launch.widths["BLOCK_DV"],
            BLOCK_SPLITS=16,
        )


def append(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    key: Tensor,
    value: Tensor,
    key_lengths: Tensor,
    block_table: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    interleaved: bool,
) -> Tensor:
    """Write new keys and values into a cache; arguments and result as `fastattn.dense.append.append`."""
    rotated = allocate_rotated(query, cos)
    batch, heads, seqlen_q, head_dim = query.shape
    kv_heads, seqlen_new = key.shape[1:3]
    rows = key_cache.shape[2]
    new_rows = batch * kv_heads * seqlen_new
    programs = new_rows + (0 if cos is None else batch * heads * seqlen_q)
    query, key, value = _rows(query), _rows(key), _rows(value)
    half = 0 if cos is None else cos.shape[1]
    if programs:
        _kernels().append.append_kernel[(programs,)](
            *_matrix(query),
            *(_matrix(rotated) if cos is not None else (None, 0, 0, 0)),
            *_matrix(key),
            *_matrix(value),
            *_matrix(key_cache),
            key_cache.stride(3),
            *_matrix(value_cache),
            value_cache.stride(3),
            key_lengths,
            block_table,
            0 if block_table is None else block_table.stride(0),
            key_cache.shape[0],
            *((None, 0) if cos is None else (_rows(cos), _rows(cos).stride(0))),
            *((None, 0) if sin is None else (_rows(sin), _rows(sin).stride(0))),
            0 if cos is None else cos.shape[0],
            heads,
            kv_heads,
            new_rows,
            seqlen_q,
            seqlen_new,
            rows if block_table is None else rows * block_table.shape[1],
            D=head_dim,
            BLOCK_D=_padded(head_dim),
            DV=value.shape[3],
            BLOCK_DV=_padded(value.shape[3]),
            HALF=half,
            BLOCK_HALF=_padded(half),
            INTERLEAVED=interleaved,
            PAGE=None if block_table is None else rows,
        )
    return rotated


def backward(
    p: Problem, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None, mask_grad: bool
) -> tuple[Tensor, ...]:
    """Launch the backward: gradients as `allocate_backward` lists them."""
    results = allocate_backward(p, mask_grad)
    grad_query, grad_key, grad_value, grad_mask, grad_sinks = results
    launch = _Launch(p)
    if launch.packed:  # rows and keys past the last sequence belong to none
        for grad in (grad_query, grad_key, grad_value):
            grad.zero_()
    out, grad_out, lse = _rows(out), _rows(grad_out), lse.contiguous()
    delta = _delta(launch, out, grad_out, grad_lse)
    shared = (*launch.inputs(), lse, delta, *_matrix(grad_out))
    scores = (launch.factor, launch.cap, launch.threshold, launch.dropout_scale)
    kernels = _kernels().backward

    constants = launch.constants(launch.tile("KEY_VALUE")) | {"PACKED": launch.packed}
    tiles = _tiles(launch.longest_k, constants["BLOCK_N"])
    if programs := tiles * p.key.shape[1] * launch.sequences:
        kernels.key_value_kernel[(programs,)](
            *shared,
            *_matrix(grad_key),
            *_matrix(grad_value),
            *launch.limits(),
            launch.heads,
            tiles,
            *launch.shape,
            p.scale,
            *scores,
            **constants,
        )
    constants = launch.constants(launch.tile("QUERY")) | {"PACKED": launch.packed}
    tiles = _tiles(launch.longest_q, constants["BLOCK_M"])
    if programs := tiles * launch.heads * launch.sequences:
        kernels.query_kernel[(programs,)](
            *shared,
            *_matrix(grad_query),
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


def _delta(launch: _Launch, out: Tensor, grad_out: Tensor, grad_lse: Tensor | None) -> Tensor:
    batch, heads, seqlen, _ = out.shape
    delta = out.new_empty((batch, heads, seqlen), dtype=torch.float32)
    block = 64
    tiles = _tiles(seqlen, block)
    if programs := tiles * heads * batch:
        _kernels().backward.delta_kernel[(programs,)](
            *_matrix(out),
            *_matrix(grad_out),
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


def _bias_gradient(launch: _Launch, shared: tuple, scores: tuple, grad_mask: Tensor) -> None:
    constants = launch.constants(launch.tile("BIAS")) | {"PACKED": launch.packed}
    tiles_q = _tiles(launch.longest_q, constants["BLOCK_M"])
    tiles_k = _tiles(launch.longest_k, constants["BLOCK_N"])
    mask_b, mask_h, mask_q, mask_k = grad_mask.shape
    programs = mask_b * mask_h * (tiles_q if mask_q > 1 else 1) * (tiles_k if mask_k > 1 else 1)
    if programs:
        _kernels().backward.bias_kernel[(programs,)](
            *shared,
            *launch.mask(grad_mask),
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
