r"""Random projections for positive softmax features, and two that need fewer features for the same error.

The softmax kernel of x, y (D,) is estimated without bias by M random features (FAVOR+, Choromanski et al. 2021,
arXiv:2009.14794):

    exp(x . y)  =  E  1/M  sum_m phi_m(x) phi_m(y),        phi_m(x) = exp(w_m . x + bias_m - |x|^2 / 2)

In attention x is sqrt(scale) * query and y is sqrt(scale) * key. With z = |x + y|^2 the relative variance of the
estimate is, for M independent rows,

    (e^z - 1) / M              w_m Gaussian, no bias
    (cosh z - 1) / (M / 2)     `hyperbolic`
    (((1 - 4A)^2 / (1 - 8A))^(D/2) exp(2 (1 - 4A) z / (1 - 8A) - z) - 1) / M     `oprf` with the parameter A

and at most that for orthogonal ones. It grows as e^z: where x + y is long no practical number of features is enough.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn.dense import arguments as check
from fastattn.dense.problem import default_scale
from fastattn.linear import lowrank


def random_projection(
    num_features: int,
    head_dim: int,
    *,
    orthogonal: bool = True,
    regularized: bool = False,
    generator: torch.Generator | None = None,
    device: torch.device | str | int | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Rows w_m of random features, each Gaussian N(0, I) unless regularized.

    Args:
        num_features: M.
        head_dim: D.
        orthogonal: rows are orthogonal in blocks of D, directions uniform (Haar) and norms independent, which lowers
            the variance of the estimate; otherwise all rows are independent.
        regularized: every norm is sqrt(D), what a Gaussian row's is on average. The features then estimate the
            regularized softmax kernel (SMREG in the paper), a lower bound of the softmax kernel.
        generator: what the rows are drawn from, on its device; None is torch's own for the device.
        device: default the generator's, else torch's default device.
        dtype: default torch's default dtype.

    Returns:
        (M, D).

    Raises:
        TypeError, ValueError: sizes that are no positive integers, flags that are no bools, a dtype that is not
            floating point.
    """
    lowrank.positive("num_features", num_features)
    lowrank.positive("head_dim", head_dim)
    check.flag("orthogonal", orthogonal)
    check.flag("regularized", regularized)
    dtype = torch.get_default_dtype() if dtype is None else dtype
    if not dtype.is_floating_point:
        raise TypeError(f"fastattn: dtype must be floating point, got {dtype}")
    if device is None and generator is not None:
        device = generator.device
    drawn = torch.float64 if dtype == torch.float64 else torch.float32

    def gaussian(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=drawn)

    if orthogonal:
        blocks = -(-num_features // head_dim)
        q, r = torch.linalg.qr(gaussian(blocks, head_dim, head_dim))
        # QR fixes signs by its algorithm; with R's diagonal made positive Q is Haar-distributed (Mezzadri 2007).
        q = q * torch.where(r.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0)[:, None, :].to(drawn)
        directions = q.reshape(-1, head_dim)[:num_features]
    else:
        directions = F.normalize(gaussian(num_features, head_dim), dim=1)
    norms = math.sqrt(head_dim) if regularized else gaussian(num_features, head_dim).norm(dim=1, keepdim=True)
    return (directions * norms).to(dtype)


def hyperbolic(projection: Tensor) -> Tensor:
    """(M, D) to (2M, D): each row and its opposite, which costs half the random rows and varies less than 2M of them.

    Their product estimates cosh (SM^hyp+ in Choromanski et al. 2021, Lemma 1).
    """
    check.tensor("projection", projection, 2, "(num_features, head_dim)")
    return torch.cat([projection, -projection])


def oprf(projection: Tensor, parameter: float) -> tuple[Tensor, Tensor]:
    """The projection and bias of FAVOR++'s features, from the rows of a Gaussian projection.

    Optimal positive random features (Likhosherstov et al. 2022, "Chefs' Random Tables", arXiv:2205.15317):
    D exp(A |w|^2 + B w . x - |x|^2 / 2) with B = sqrt(1 - 4A) and D = (1 - 4A)^(head_dim / 4).

    Args:
        projection: (M, D), rows Gaussian, orthogonal or not, also `hyperbolic`; not regularized.
        parameter: A, below 1/8 (where the variance becomes infinite); 0 leaves the features as they are.
            `oprf_parameter` gives the best. A parameter computed from all keys is not causal: in a causal model use
            one that was fixed before.

    Returns:
        (B * projection, bias), (M, D) and (M,).

    Raises:
        TypeError, ValueError: a projection that is no matrix, a parameter that is no number or not below 1/8.
    """
    check.tensor("projection", projection, 2, "(num_features, head_dim)")
    if check.number("parameter", parameter) >= 0.125:
        raise ValueError(f"fastattn: parameter must be below 1/8, got {parameter}")
    bias = parameter * projection.square().sum(1) + projection.shape[1] / 4 * math.log1p(-4 * parameter)
    return math.sqrt(1 - 4 * parameter) * projection, bias


def oprf_parameter(statistic: float | Tensor, head_dim: int) -> float:
    """The A of least variance at |x + y|^2 = statistic, at most 0; `oprf_statistic` measures the mean to use.

    Args:
        statistic: z >= 0, a number or a tensor of one element, which is read (on a GPU that waits for it).
        head_dim: D.

    Raises:
        TypeError, ValueError: a statistic that is no finite number >= 0, a head_dim that is no positive integer.
    """
    z = check.number("statistic", statistic.item() if isinstance(statistic, Tensor) else statistic)
    if z < 0:
        raise ValueError(f"fastattn: statistic must not be negative, got {z}")
    d = lowrank.positive("head_dim", head_dim)
    # The paper's rho = (sqrt((2z + d)^2 + 8dz) - 2z - d) / 4z, multiplied out so that z = 0 gives 1; A = (1 - 1/rho)/8.
    inverse_rho = (math.sqrt((2 * z + d) ** 2 + 8 * d * z) + 2 * z + d) / (2 * d)
    return (1 - inverse_rho) / 8


@torch.no_grad()
def oprf_statistic(query: Tensor, key: Tensor, *, key_mask: Tensor | None = None, scale: float | None = None) -> Tensor:
    """The mean of |x_i + y_j|^2 over all pairs of queries and keys, in O(N D) time, without gradient.

    Args:
        query: (B, Hq, Nq, D); x = sqrt(scale) * query.
        key: (B, Hkv, Nk, D), Hq a multiple of Hkv; y = sqrt(scale) * key.
        key_mask: (B, Nk) bool, False where there is no key.
        scale: default 1 / sqrt(D); not negative.

    Returns:
        A tensor of one element, float32 (float64 for float64); 0 where there is no pair.

    Raises:
        TypeError, ValueError: as `fastattn.attention`.
    """
    query, key, _ = lowrank.inputs(query, key, key, key_mask=key_mask)
    scale = default_scale(query.shape[-1]) if scale is None else check.number("scale", scale)
    if scale < 0:
        raise ValueError(f"fastattn: scale must not be negative for random features, got {scale}")
    x, y = (lowrank.accumulable(t) for t in (query, lowrank.without_masked(key, key_mask)))
    y = y.repeat_interleave(x.shape[1] // y.shape[1], 1)
    # Per sequence and head: sum_ij |x_i + y_j|^2 = n_y sum |x|^2 + n_x sum |y|^2 + 2 sum x . sum y.
    n_x, n_y = x.shape[2], y.new_full((y.shape[0],), y.shape[2]) if key_mask is None else key_mask.sum(1).to(y.dtype)
    squares = n_y[:, None] * x.square().sum((2, 3)) + n_x * y.square().sum((2, 3))
    products = (x.sum(2) * y.sum(2)).sum(2)
    pairs = (n_x * n_y.sum() * x.shape[1]).clamp(min=1)
    return scale * (squares + 2 * products).sum() / pairs


def positive_features(x: Tensor, projection: Tensor, bias: Tensor | None = None) -> Tensor:
    """phi(x) of this module's formula, (..., D) to (..., M): the definition, without a kernel's guard against overflow.

    Args:
        x: (..., D), scaled.
        projection: (M, D).
        bias: (M,), default 0.
    """
    exponent = x @ projection.mT - x.square().sum(-1, keepdim=True) / 2
    return torch.exp(exponent if bias is None else exponent + bias)


def softmax_kernel_estimate(x: Tensor, y: Tensor, projection: Tensor, bias: Tensor | None = None) -> Tensor:
    """The estimate of exp(x_i . y_j) for all pairs, (..., N, D) and (..., M, D) to (..., N, M)."""
    phi_x, phi_y = (positive_features(t, projection, bias) for t in (x, y))
    return phi_x @ phi_y.mT / projection.shape[0]
