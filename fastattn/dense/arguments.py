"""Validation shared by the dense family's public functions: every check happens here, before any work is done."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, TypedDict

import torch
from torch import Tensor

from fastattn import backends
from fastattn.blockmask import BlockMask, Lists, flex, of_flex

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask as FlexBlockMask

    Mask = Tensor | BlockMask | FlexBlockMask | tuple[BlockMask | FlexBlockMask, Tensor]


class Options(TypedDict, total=False):
    """The keyword arguments of `attention` and `attention_varlen`, but for return_lse, which decides their result."""

    attn_mask: Mask | None
    causal: bool
    window: tuple[int | None, int | None] | None
    query_start: int | Tensor | None
    key_start: Tensor | None
    key_lengths: Tensor | None
    softcap: float | None
    alibi_slopes: Tensor | None
    sinks: Tensor | None
    dropout_p: float
    scale: float | None
    deterministic: bool
    backend: str | None


DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_INTEGERS = (torch.int32, torch.int64)


def tensor(name: str, value: Any, dims: int, layout: str) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"fastattn: {name} must be a torch.Tensor of shape {layout}, got {type(value).__name__}")
    if value.dim() != dims:
        raise ValueError(f"fastattn: {name} must have shape {layout}, got {tuple(value.shape)}")


def qkv(query: Tensor, key: Tensor, value: Tensor) -> None:
    """Check what query, key and value, (B, H, S, D) or packed (total, H, D), must have in common."""
    if query.dtype not in DTYPES:
        names = ", ".join(str(d).removeprefix("torch.") for d in DTYPES)
        raise TypeError(f"fastattn: query must be one of {names}, got {query.dtype}")
    for name, other in (("key", key), ("value", value)):
        if other.dtype != query.dtype:
            raise TypeError(f"fastattn: {name} must have query's dtype {query.dtype}, got {other.dtype}")
        if other.device != query.device:
            raise ValueError(f"fastattn: {name} must be on query's device {query.device}, got {other.device}")
    # Shapes are fetched once: this runs on every call.
    shape_q, shape_k, shape_v = query.shape, key.shape, value.shape
    if len(shape_q) == 4 and not shape_q[0] == shape_k[0] == shape_v[0]:
        raise ValueError(
            "fastattn: query, key and value must have the same batch size, got "
            f"{shape_q[0]}, {shape_k[0]} and {shape_v[0]}"
        )
    if shape_k[:-1] != shape_v[:-1]:
        raise ValueError(
            f"fastattn: key and value must agree in all but head_dim, got {tuple(shape_k)} and {tuple(shape_v)}"
        )
    if shape_q[-1] != shape_k[-1]:
        raise ValueError(
            f"fastattn: key must have query's head_dim {shape_q[-1]}, got {shape_k[-1]} "
            f"(query {tuple(shape_q)}, key {tuple(shape_k)})"
        )
    if shape_q[-1] == 0 or shape_v[-1] == 0:
        raise ValueError(f"fastattn: head_dim must be at least 1, got query {tuple(shape_q)}, value {tuple(shape_v)}")
    heads_q, heads_kv = shape_q[1], shape_k[1]
    if heads_kv == 0 or heads_q % heads_kv != 0:
        raise ValueError(f"fastattn: query's heads must be a multiple of key's heads, got {heads_q} and {heads_kv}")


def autocast(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Cast query, key and value as torch's autocast would: its own dtype on this device, float64 left alone."""
    device = query.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return query, key, value
    dtype = torch.get_autocast_dtype(device)
    query, key, value = (t if t.dtype == torch.float64 else t.to(dtype) for t in (query, key, value))
    return query, key, value


def flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"fastattn: {name} must be a bool, got {type(value).__name__}")
    return value


def number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float | torch.SymInt | torch.SymFloat):
        raise TypeError(f"fastattn: {name} must be a number, got {type(value).__name__}")
    if not -math.inf < value < math.inf:
        raise ValueError(f"fastattn: {name} must be finite, got {value}")
    return float(value)


def is_integer(value: Any) -> bool:
    return isinstance(value, int | torch.SymInt) and not isinstance(value, bool)


def softcap(value: Any) -> float | None:
    if value is None:
        return None
    cap = number("softcap", value)
    if cap <= 0:
        raise ValueError(f"fastattn: softcap must be positive (None switches it off), got {value}")
    return cap


def dropout(value: Any) -> float:
    p = number("dropout_p", value)
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"fastattn: dropout_p must be between 0 and 1, got {value}")
    return p


def window(value: Any, causal: bool) -> tuple[int | None, int | None]:
    """(left, right) with causal folded in as right = 0; None leaves a side open."""
    if value is None:
        return None, 0 if causal else None
    if not isinstance(value, tuple | list) or len(value) != 2:
        raise TypeError(f"fastattn: window must be a pair (left, right) of ints or None, got {value!r}")
    for side in value:
        if side is not None and not is_integer(side):
            raise TypeError(f"fastattn: window must be a pair (left, right) of ints or None, got {value!r}")
        if side is not None and side < 0:
            raise ValueError(f"fastattn: window sides must not be negative (None means unlimited), got {tuple(value)}")
    left, right = value
    return left, 0 if causal else right


def per_sequence(name: str, value: Any, batch: int, like: Tensor) -> Tensor | None:
    """An integer tensor of shape (B,) as int32."""
    if value is None:
        return None
    tensor(name, value, 1, f"({batch},)")
    if value.dtype not in _INTEGERS:
        raise TypeError(f"fastattn: {name} must be int32 or int64, got {value.dtype}")
    if value.shape[0] != batch:
        raise ValueError(f"fastattn: {name} must have shape ({batch},), one per sequence, got {tuple(value.shape)}")
    if value.device != like.device:
        raise ValueError(f"fastattn: {name} must be on query's device {like.device}, got {value.device}")
    # Clamped, so that what does not fit stays recognisably wrong.
    fitting = value.clamp(-(2**31), 2**31 - 1) if value.dtype == torch.int64 else value
    return fitting.to(torch.int32).contiguous()


def query_start(value: Any, batch: int, like: Tensor) -> tuple[int | None, Tensor | None]:
    """(offset, None) for an int or the default, (0, tensor) for one start per sequence."""
    if value is None:
        return None, None
    if is_integer(value):
        return value, None
    if not isinstance(value, Tensor):
        raise TypeError(
            f"fastattn: query_start must be an int or an integer tensor ({batch},), got {type(value).__name__}"
        )
    return 0, per_sequence("query_start", value, batch, like)


def attn_mask(
    value: Any, shape: tuple[int, int, int, int], like: Tensor, backend: str | None
) -> tuple[Tensor | None, Lists | None]:
    """A mask of any kind as a tensor with four axes, each of size 1 or full, and the lists of a block mask."""
    if value is None or isinstance(value, Tensor):
        return _mask_tensor(value, shape, like), None
    blocks, tensor = value if isinstance(value, tuple | list) and len(value) == 2 else (value, None)
    if not (isinstance(blocks, BlockMask) or flex.is_block_mask(blocks)) or not isinstance(tensor, Tensor | None):
        found = (
            f"({', '.join(type(v).__name__ for v in value)})"
            if isinstance(value, tuple | list)
            else type(value).__name__
        )
        raise TypeError(
            f"fastattn: attn_mask must be a torch.Tensor, a BlockMask or a pair (BlockMask, torch.Tensor), got {found}"
        )
    mask = _mask_tensor(tensor, shape, like)
    _block_mask_shape(tuple(blocks.shape), shape)
    if not isinstance(blocks, BlockMask):
        own = of_flex(blocks)
        if own is None:
            dense = _mask_tensor(flex.dense_mask(blocks), shape, like)
            if mask is None or dense is None:
                return dense, None
            return (mask & dense if mask.dtype == torch.bool else mask.masked_fill(~dense, -math.inf)), None
        blocks = own
    if blocks.device != like.device:
        raise ValueError(f"fastattn: attn_mask must be on query's device {like.device}, got {blocks.device}")
    return mask, blocks.kernel_lists(backend)


def _block_mask_shape(shape: tuple[int, ...], wanted: tuple[int, int, int, int]) -> None:
    """Raise ValueError where a mask of a shape is not for a call with (B, Hq, Sq, Sk) = wanted."""
    if shape[2:] != wanted[2:] or any(m not in (1, s) for m, s in zip(shape[:2], wanted, strict=False)):
        raise ValueError(
            f"fastattn: attn_mask, a BlockMask, must be made for (B, Hq, Sq, Sk) = {tuple(wanted)} "
            f"(1 for B or Hq too), got one for {tuple(shape)}"
        )


def _mask_tensor(value: Tensor | None, shape: tuple[int, int, int, int], like: Tensor) -> Tensor | None:
    if value is None:
        return None
    if value.dtype not in (torch.bool, torch.float32, like.dtype):
        raise TypeError(f"fastattn: attn_mask must be bool, float32 or query's dtype {like.dtype}, got {value.dtype}")
    if value.device != like.device:
        raise ValueError(f"fastattn: attn_mask must be on query's device {like.device}, got {value.device}")
    mask = value[(None,) * (4 - value.dim())] if value.dim() < 4 else value
    if mask.dim() != 4 or any(m not in (1, s) for m, s in zip(mask.shape, shape, strict=True)):
        raise ValueError(
            f"fastattn: attn_mask must broadcast to (B, Hq, Sq, Sk) = {tuple(shape)}, got {tuple(value.shape)}"
        )
    return mask


def _per_head(name: str, value: Any, like: Tensor) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"fastattn: {name} must be a torch.Tensor, got {type(value).__name__}")
    if not value.is_floating_point():
        raise TypeError(f"fastattn: {name} must be a floating-point tensor, got {value.dtype}")
    if value.device != like.device:
        raise ValueError(f"fastattn: {name} must be on query's device {like.device}, got {value.device}")


def alibi_slopes(value: Any, batch: int, heads: int, like: Tensor, accumulate: torch.dtype) -> Tensor | None:
    if value is None:
        return None
    _per_head("alibi_slopes", value, like)
    if value.shape not in ((heads,), (batch, heads)):
        raise ValueError(
            f"fastattn: alibi_slopes must have shape ({heads},) or ({batch}, {heads}), got {tuple(value.shape)}"
        )
    if value.requires_grad:
        raise ValueError("fastattn: alibi_slopes has no gradient; pass alibi_slopes.detach(), or a bias as attn_mask")
    return value.to(accumulate).expand(batch, heads)


def sinks(value: Any, heads: int, like: Tensor, accumulate: torch.dtype) -> Tensor | None:
    if value is None:
        return None
    _per_head("sinks", value, like)
    if value.shape != (heads,):
        raise ValueError(f"fastattn: sinks must have shape ({heads},), one per query head, got {tuple(value.shape)}")
    return value.to(accumulate)


def backend(value: Any) -> str | None:
    names = backends.backend_names("dense")
    if value is not None and value not in names:
        raise ValueError(f"fastattn: backend must be None or one of {', '.join(names)}, got {value!r}")
    return value
