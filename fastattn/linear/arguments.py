"""Validation of the linear family's arguments: every check happens here, before any work is done."""

from __future__ import annotations

from typing import Any, TypedDict

import torch
from torch import Tensor

from fastattn import backends
from fastattn.dense import arguments as check
from fastattn.linear.features import FeatureMap
from fastattn.linear.problem import FEATURE_KINDS
from fastattn.linear.state import LinearState


class Options(TypedDict, total=False):
    """Keyword arguments that the functions of the family share."""

    scale: float | None
    key_mask: Tensor | None
    initial_state: LinearState | None
    cu_seqlens: Tensor | None
    backend: str | None


def _floating(name: str, value: Any, like: Tensor) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"fastattn: {name} must be a torch.Tensor, got {type(value).__name__}")
    if not value.is_floating_point():
        raise TypeError(f"fastattn: {name} must be a floating-point tensor, got {value.dtype}")
    if value.device != like.device:
        raise ValueError(f"fastattn: {name} must be on query's device {like.device}, got {value.device}")


def decay(value: Any, shape: tuple[int, int, int], num_features: int, accumulate: torch.dtype, like: Tensor) -> Any:
    """(H,), (B, H, N) or (B, H, N, M) as a view of the last two shapes."""
    if value is None:
        return None
    _floating("decay", value, like)
    heads = shape[1]
    if value.shape == (heads,):
        return value.to(accumulate).view(1, heads, 1).expand(shape)
    if value.shape not in (shape, (*shape, num_features)):
        raise ValueError(
            f"fastattn: decay must have shape (H,) = ({heads},), (B, H, N) = {shape} or (B, H, N, features) = "
            f"{(*shape, num_features)}, got {tuple(value.shape)}"
        )
    return value.to(accumulate)


def beta(value: Any, shape: tuple[int, int, int], accumulate: torch.dtype, like: Tensor) -> Tensor:
    _floating("beta", value, like)
    if value.shape != shape:
        raise ValueError(f"fastattn: beta must have shape (B, H, N) = {shape}, got {tuple(value.shape)}")
    return value.to(accumulate)


def key_mask(value: Any, key: Tensor) -> Tensor | None:
    if value is None:
        return None
    shape = (key.shape[0], key.shape[2])
    if not isinstance(value, Tensor) or value.dtype != torch.bool:
        given = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"fastattn: key_mask must be a bool tensor of shape (B, Nk) = {shape}, got {given}")
    if value.shape != shape:
        raise ValueError(f"fastattn: key_mask must have shape (B, Nk) = {shape}, got {tuple(value.shape)}")
    if value.device != key.device:
        raise ValueError(f"fastattn: key_mask must be on query's device {key.device}, got {value.device}")
    return value


def feature_map(value: FeatureMap, head_dim: int, normalize: bool, like: Tensor) -> None:
    if value.kind not in FEATURE_KINDS:
        raise ValueError(f"fastattn: feature_map's kind must be one of {', '.join(FEATURE_KINDS)}, got {value.kind!r}")
    if check.number("feature_map's eps", value.eps) and value.kind != "relu":
        raise ValueError(f"fastattn: feature_map's eps goes with relu, not with {value.kind}")
    if value.projection is not None:
        _floating("feature_map's projection", value.projection, like)
        if value.projection.dim() != 2 or value.projection.shape[1] != head_dim or not len(value.projection):
            raise ValueError(
                f"fastattn: feature_map's projection must have shape (features, head_dim) = (M, {head_dim}), got "
                f"{tuple(value.projection.shape)}"
            )
        if value.projection.requires_grad:
            raise ValueError(
                "fastattn: feature_map's projection has no gradient; pass projection.detach(), or a module as "
                "feature_map to learn it"
            )
    if value.kind == "softmax":
        if value.projection is None:
            raise ValueError("fastattn: feature_map's projection must be given for softmax features, got None")
        if not normalize:
            raise ValueError(
                "fastattn: softmax features need normalize=True: they are computed up to a factor for each query"
            )
    if value.bias is not None:
        _floating("feature_map's bias", value.bias, like)
        if value.kind != "softmax":
            raise ValueError(f"fastattn: feature_map's bias goes with softmax features, not with {value.kind}")
        if value.projection is None or value.bias.shape != value.projection.shape[:1] or value.bias.requires_grad:
            raise ValueError(
                "fastattn: feature_map's bias must have shape (features,) and no gradient, got "
                f"{tuple(value.bias.shape)}"
            )


def cu_seqlens(value: Any, query: Tensor, key: Tensor) -> Tensor | None:
    if value is None:
        return None
    check.tensor("cu_seqlens", value, 1, "(sequences + 1,)")
    if value.dtype not in (torch.int32, torch.int64) or not len(value):
        raise TypeError(
            f"fastattn: cu_seqlens must be int32 or int64 with at least one element, got {value.dtype}, "
            f"{tuple(value.shape)}"
        )
    if value.device != query.device:
        raise ValueError(f"fastattn: cu_seqlens must be on query's device {query.device}, got {value.device}")
    if query.shape[0] != 1 or query.shape[2] != key.shape[2]:
        raise ValueError(
            "fastattn: cu_seqlens needs packed sequences, query (1, Hq, total, D) and key (1, Hkv, total, D), got "
            f"{tuple(query.shape)} and {tuple(key.shape)}"
        )
    return value.to(torch.int32).contiguous()


def initial_state(
    value: Any, shape: tuple[int, int, int, int], normalize: bool, softmax: bool, accumulate: torch.dtype, like: Tensor
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(kv, normalizer, log_scale) for states of shape (sequences, H, M, Dv)."""
    if value is None:
        return None, None, None
    if not isinstance(value, LinearState):
        raise TypeError(f"fastattn: initial_state must be a LinearState, got {type(value).__name__}")
    wanted = (shape, shape[:3] if normalize else None, shape[:2] if softmax else None)
    for name, part, expected in zip(LinearState._fields, value, wanted, strict=True):
        if (part is None) != (expected is None):
            raise ValueError(
                f"fastattn: initial_state.{name} must {'be None' if expected is None else f'have shape {expected}'} "
                f"for this call, got {None if part is None else tuple(part.shape)}"
            )
        if part is None:
            continue
        _floating(f"initial_state.{name}", part, like)
        if part.shape != expected:
            raise ValueError(f"fastattn: initial_state.{name} must have shape {expected}, got {tuple(part.shape)}")
    kv, normalizer, log_scale = (None if part is None else part.to(accumulate) for part in value)
    return kv, normalizer, None if log_scale is None else log_scale.detach()


def backend(value: Any) -> str | None:
    names = backends.backend_names("linear")
    if value is not None and value not in names:
        raise ValueError(f"fastattn: backend must be None or one of {', '.join(names)}, got {value!r}")
    return value
