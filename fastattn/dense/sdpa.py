"""`scaled_dot_product_attention`: torch's function of that name, on fastattn's kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn.dense import arguments as check
from fastattn.dense.api import attention
from fastattn.dense.arguments import Options


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`torch.nn.functional.scaled_dot_product_attention`, same signature and semantics.

    Two things differ from `attention`: is_causal is aligned top-left (query i sees keys 0..i whatever the lengths), and
    leading axes broadcast as torch's do.

    Args:
        query: (N, ..., Hq, L, E); two and three axes work too.
        key: (N, ..., H, S, E).
        value: (N, ..., H, S, Ev).
        attn_mask: bool (True keeps) or float (added), broadcastable to the scores; not together with is_causal.
        dropout_p: applied whenever positive.
        enable_gqa: lets Hq be a multiple of H.

    Returns:
        (N, ..., Hq, L, Ev).
    """
    q, k, v, options, leading = canonical(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    out = attention(q, k, v, **options)
    return out.reshape(*leading, *out.shape[-2:]) if len(leading) != 2 else out


def canonical(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Options, tuple[int, ...]]:
    """A call as `attention` takes it: query, key and value with four axes, its options, and the result's leading axes.

    Raises:
        TypeError, ValueError: as `scaled_dot_product_attention`.
    """
    for name, t in (("query", query), ("key", key), ("value", value)):
        if not isinstance(t, Tensor):
            raise TypeError(f"fastattn: {name} must be a torch.Tensor, got {type(t).__name__}")
        if t.dim() < 2:
            raise ValueError(
                f"fastattn: {name} must have at least 2 axes (..., seqlen, head_dim), got {tuple(t.shape)}"
            )
    check.flag("is_causal", is_causal)
    check.flag("enable_gqa", enable_gqa)
    if is_causal and attn_mask is not None:
        raise ValueError("fastattn: attn_mask and is_causal=True cannot be given together, as in torch")
    if not enable_gqa and query.dim() > 2 and query.shape[-3] != key.shape[-3] and key.shape[-3] != 1:
        raise ValueError(
            f"fastattn: query has {query.shape[-3]} heads and key {key.shape[-3]}; pass enable_gqa=True to share keys"
        )
    lead = 3 if enable_gqa else 2  # how many trailing axes do not broadcast
    try:
        batch = torch.broadcast_shapes(query.shape[:-lead], key.shape[:-lead], value.shape[:-lead])
    except RuntimeError as error:
        shapes = f"{tuple(query.shape)}, {tuple(key.shape)} and {tuple(value.shape)}"
        raise ValueError(f"fastattn: the leading axes of query, key and value must broadcast, got {shapes}") from error
    q, k, v = (_four_axes(t.expand(*batch, *t.shape[-lead:])) for t in (query, key, value))
    mask = None
    if attn_mask is not None:
        if not isinstance(attn_mask, Tensor):
            raise TypeError(f"fastattn: attn_mask must be a torch.Tensor, got {type(attn_mask).__name__}")
        mask = attn_mask
        if mask.dim() > 4 or (mask.dim() > 2 and query.dim() != 4):
            mask = _four_axes(mask.expand(*query.shape[:-2] if enable_gqa else batch, *mask.shape[-2:]))
    options: Options = {
        "attn_mask": mask,
        "causal": is_causal,
        "query_start": 0,
        "dropout_p": dropout_p,
        "scale": scale,
    }
    heads = (query.shape[-3],) if enable_gqa else ()
    return q, k, v, options, (*batch, *heads)


def _four_axes(t: Tensor) -> Tensor:
    """(..., heads, seqlen, head_dim) with the axes before the heads folded into one, and missing ones added."""
    while t.dim() < 4:
        t = t[None]
    return t.flatten(0, -4)
