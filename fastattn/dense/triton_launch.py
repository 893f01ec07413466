"""What every launch of a Triton kernel shares: the arguments and constants of a problem, and how a kernel is run.

Under TRITON_INTERPRET=1, Triton's interpreter runs the same kernels on CPU tensors, for tests; it cannot compute in
bfloat16.
"""

from __future__ import annotations

import os
from contextlib import nullcontext
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from fastattn.dense.problem import Problem, unit_rows

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_LOG2E = 1.4426950408889634


@cache
def kernels() -> SimpleNamespace:
    """The modules with the kernels; imported at the first launch, because importing Triton takes time."""
    from fastattn.kernels import dense_append, dense_backward, dense_config, dense_decode, dense_forward

    return SimpleNamespace(
        append=dense_append, backward=dense_backward, config=dense_config, decode=dense_decode, forward=dense_forward
    )


@cache
def compute_capability(device: torch.device) -> int:
    """90 for sm_90; 0 for what is not NVIDIA's."""
    if device.type != "cuda" or torch.version.cuda is None:
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def padded(head_dim: int) -> int:
    """The width of the tile that holds a head; tensor cores need 16."""
    return max(16, 1 << (head_dim - 1).bit_length())


def matrix(tensor: Tensor) -> tuple:
    """A (B, H, S, D) tensor and the strides that kernels take."""
    return (tensor, *tensor.stride()[:3])


def _window_side(width: int | None) -> int | None:
    """A window's side, cut to what cannot overflow beside positions in int32."""
    return None if width is None else max(-(2**30), min(width, 2**30))


def tiles_of(length: int, block: int) -> int:
    return -(-length // block)


def run(kernel: Any, programs: int, *arguments: Any, **constants: Any) -> None:
    """Launch so many programs on the device of the first argument; Triton itself takes torch's current device."""
    if programs:
        device = arguments[0].device
        with nullcontext() if device.type == "cpu" else torch.get_device_module(device).device(device):
            kernel[(programs,)](*arguments, **constants)


class Launch:
    """What the launches of one problem share."""

    def __init__(self, p: Problem) -> None:
        self.p = p
        self.query, self.key, self.value = unit_rows(p.query), unit_rows(p.key), unit_rows(p.value)
        self.heads, self.packed = p.query.shape[1], p.cu_seqlens_q is not None
        self.group = self.heads // p.key.shape[1]
        self.sequences = p.query.shape[0] if p.cu_seqlens_q is None else p.cu_seqlens_q.shape[0] - 1
        self.longest_q = p.max_seqlen_q if self.packed else p.query.shape[2]
        self.longest_k = p.max_seqlen_k if self.packed else p.seqlen_k
        head_dim, head_dim_v = p.query.shape[3], p.value.shape[3]
        self.widths = {
            "D": head_dim,
            "BLOCK_D": padded(head_dim),
            "DV": head_dim_v,
            "BLOCK_DV": padded(head_dim_v),
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
        return (*matrix(self.query), *matrix(self.key), *matrix(self.value), *self.mask(self.p.attn_mask))

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

    def listed(self, by: str) -> tuple[Tensor | int | None, ...]:
        """A block mask's lines by "rows" or "columns", with strides, their blocks, and the tiles."""
        lists = self.p.mask_lists
        if lists is None:
            return (None, 0, 0, None, None)
        lines, blocks = (lists.rows, lists.row_blocks) if by == "rows" else (lists.columns, lists.column_blocks)
        strides = [0 if lines.shape[axis] == 1 else lines.stride(axis) for axis in (0, 1)]
        return (lines, *strides, blocks, lists.tiles)

    def tile(self, table: str) -> Any:
        """The `Config` of the problem in one of the tables of kernels/dense_config.py."""
        config = kernels().config
        width = max(self.widths["BLOCK_D"], self.widths["BLOCK_DV"])
        # The interpreter pays by the operation: it takes the larger tiles of 16-bit elements.
        itemsize = 2 if INTERPRETED else self.query.element_size()
        return config.config(getattr(config, table), width, itemsize, compute_capability(self.query.device))

    def tiles(self, by: str, constants: dict[str, Any]) -> int:
        """Tiles of rows, or of keys for "columns": with a block mask whole blocks, since they come in its order."""
        length, block = (self.longest_q, "BLOCK_M") if by == "rows" else (self.longest_k, "BLOCK_N")
        lists = self.p.mask_lists
        if lists is None:
            return tiles_of(length, constants[block])
        lines, size = (lists.rows, "MASK_Q") if by == "rows" else (lists.columns, "MASK_K")
        return lines.shape[2] * (constants[size] // constants[block])

    def masked_constants(self, tile: Any) -> dict[str, Any]:
        """`constants` of the kernels that take packed sequences and block masks: a tile lies within a mask's block."""
        p, lists = self.p, self.p.mask_lists
        mask_q, mask_k = (0, 0) if lists is None else lists.block_size
        if lists is not None:
            tile = tile._replace(block_m=min(tile.block_m, mask_q), block_n=min(tile.block_n, mask_k))
        limits = (p.window_left, p.window_right, p.key_start, p.key_lengths, p.cu_seqlens_k)
        limited = lists is not None and any(limit is not None for limit in limits)
        constants = {"PACKED": self.packed, "MASK_Q": mask_q, "MASK_K": mask_k, "LIMITED": limited}
        return self.constants(tile) | constants

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
