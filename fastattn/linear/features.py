"""Feature maps: what makes linear attention out of query-key products, sim(q, k) = phi(q) . psi(k)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastattn.dense import arguments as check


@dataclass(frozen=True, eq=False)
class FeatureMap:
    """A feature map that kernels compute themselves, so that features are never stored: f(W x).

    Attributes:
        kind: f: "identity", "elu" (elu(x) + 1), "relu" (relu(x) + eps) or "softmax" (see `softmax_features`).
        projection: W, (M, D), floating point; None for the identity. It has no gradient.
        bias: (M,), added to the exponents of softmax features.
        eps: added by "relu".
    """

    kind: str
    projection: Tensor | None = None
    bias: Tensor | None = None
    eps: float = 0.0


def softmax_features(projection: Tensor, bias: Tensor | None = None) -> FeatureMap:
    """Positive random features of the softmax kernel (FAVOR+): exp(w_m . x + bias_m - |x|^2 / 2).

    With rows w_m drawn from N(0, I), the mean over m of phi_m(x) phi_m(y) is an unbiased estimate of exp(x . y). x is
    sqrt(scale) times query or key. Every exponent is taken together with -|x|^2 / 2 and a maximum that cancels, so
    features neither overflow nor need an epsilon, and the attention must be normalised.

    Args:
        projection: (M, D), for example of `random_projection`.
        bias: (M,), for FAVOR++.

    Source: Choromanski et al. 2021, "Rethinking Attention with Performers", Lemma 1; Likhosherstov et al. 2022.
    """
    return FeatureMap("softmax", projection, bias)


def relu_features(projection: Tensor | None = None, eps: float = 1e-3) -> FeatureMap:
    """Performer's generalised attention: relu(W x) + eps (Choromanski et al. 2021, section 2.2)."""
    return FeatureMap("relu", projection, eps=eps)


@dataclass(frozen=True)
class Cosformer:
    """cosFormer's feature map: relu(x) cos(pi i / 2L), relu(x) sin(pi i / 2L) at position i, 2 D features.

    Products are relu(q) . relu(k) cos(pi (i - j) / 2L): positive for all positions below L, and more so nearby.

    Attributes:
        length: L, at least the longest sequence (checked unless sequences are packed).
        start: the position of the first step, for calls that continue from a state.

    Source: Qin et al. 2022, "cosFormer: Rethinking Softmax in Attention", equation 10.
    """

    length: int
    start: int = 0

    def __post_init__(self) -> None:
        for name, value, least in (("length", self.length, 1), ("start", self.start, 0)):
            if not check.is_integer(value):
                raise TypeError(f"fastattn: Cosformer's {name} must be an int, got {type(value).__name__}")
            if value < least:
                raise ValueError(f"fastattn: Cosformer's {name} must be at least {least}, got {value}")

    def __call__(self, x: Tensor, positions: Tensor) -> Tensor:
        """(..., N, D) at positions (N,) to (..., N, 2 D)."""
        steps = (positions + self.start).to(torch.promote_types(x.dtype, torch.float32))
        angle = (math.pi / 2 / self.length * steps)[:, None]
        x = torch.relu(x)
        return torch.cat([x * torch.cos(angle).to(x.dtype), x * torch.sin(angle).to(x.dtype)], -1)


NAMED = {
    "identity": FeatureMap("identity"),
    "elu": FeatureMap("elu"),
    "relu": FeatureMap("relu"),
}
NAMES = (*NAMED, "cosformer")

AnyFeatureMap = str | FeatureMap | Cosformer | Callable[[Tensor], Tensor]


def resolve(value: Any, longest: int) -> FeatureMap | Cosformer | Callable[[Tensor], Tensor]:
    """The feature map that an argument names or is; `longest` is the length for "cosformer" by name."""
    if isinstance(value, str):
        if value not in NAMES:
            raise ValueError(
                f"fastattn: feature_map must be one of {', '.join(NAMES)}, a FeatureMap or a callable, got {value!r}"
            )
        return NAMED[value] if value in NAMED else Cosformer(max(longest, 1))
    if not callable(value) and not isinstance(value, FeatureMap):
        raise TypeError(f"fastattn: feature_map must be a name, a FeatureMap or a callable, got {type(value).__name__}")
    return value
