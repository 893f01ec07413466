"""Linformer: attention to keys and values that a learned matrix has projected to a fixed number of positions."""

from __future__ import annotations

from torch import Tensor

from fastattn.dense import arguments as check
from fastattn.dense.api import attention
from fastattn.linear import lowrank


def linformer_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    key_projection: Tensor,
    value_projection: Tensor,
    key_mask: Tensor | None = None,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    r"""softmax(scale * query @ (E key)^T) @ (F value), E and F learned (Wang et al. 2020, arXiv:2006.04768).

    E and F make K positions of Nk, so time and memory are linear in Nq and Nk. What attends to the K projected keys is
    `fastattn.attention`. It is not the softmax attention of the keys, and it is not causal: every projected key mixes
    all positions.

    Args:
        query: (B, Hq, Nq, D), float32, bfloat16, float16 or float64, any strides.
        key: (B, Hkv, Nk, D), Hq a multiple of Hkv (grouped-query attention).
        value: (B, Hkv, Nk, Dv).
        key_projection: E, (K, N) or one for each key head, (Hkv, K, N), in query's dtype, N >= Nk. Of a longer one
            the first Nk columns count.
        value_projection: F, the same; K is E's.
        key_mask: (B, Nk) bool. Keys and values where it is False are 0 before the projection.
        scale: factor on query @ (E key)^T; default 1 / sqrt(D).
        backend: the dense backend to use, by name; None takes the first that supports the call.

    Returns:
        (B, Hq, Nq, Dv) over (B, Nq, Hq, Dv) memory. Where no key takes part it is 0.

    Raises:
        TypeError, ValueError: an argument is of the wrong type, dtype, shape, device or range.
        UnsupportedError: the named backend cannot run this call.
    """
    query, key, value = lowrank.inputs(query, key, value, key_mask=key_mask, scale=scale, backend=backend)
    projections = {"key_projection": key_projection, "value_projection": value_projection}
    for name, projection in projections.items():
        if not isinstance(projection, Tensor):
            raise TypeError(f"fastattn: {name} must be a torch.Tensor, got {type(projection).__name__}")
    _, e, f = check.autocast(query, key_projection, value_projection)
    for name, projection in zip(projections, (e, f), strict=True):
        check_projection(name, projection, key)
    if e.shape[-2] != f.shape[-2]:
        raise ValueError(
            "fastattn: value_projection must make as many positions as key_projection, "
            f"{e.shape[-2]}, got {f.shape[-2]}"
        )
    return attention(query, project(key, e, key_mask), project(value, f, key_mask), scale=scale, backend=backend)


def check_projection(name: str, projection: Tensor, key: Tensor) -> None:
    """Raise where a projection does not fit a key (B, H, N, D)."""
    heads, length = key.shape[1:3]
    wanted = f"(K, N) or ({heads}, K, N) with N >= {length}"
    if projection.dtype != key.dtype:
        raise TypeError(f"fastattn: {name} must have query's dtype {key.dtype}, got {projection.dtype}")
    if projection.device != key.device:
        raise ValueError(f"fastattn: {name} must be on query's device {key.device}, got {projection.device}")
    if (
        projection.dim() not in (2, 3)
        or projection.shape[:-2] not in ((), (heads,))
        or projection.shape[-2] == 0
        or projection.shape[-1] < length
    ):
        raise ValueError(f"fastattn: {name} must have shape {wanted}, got {tuple(projection.shape)}")


def project(x: Tensor, projection: Tensor, mask: Tensor | None) -> Tensor:
    """(B, H, N, D) to (B, H, K, D), what the mask (B, N) excludes set to 0 before."""
    return projection[..., : x.shape[2]] @ lowrank.without_masked(x, mask)
