"""Random projections and the estimators built on them, against closed forms.

At the kernel's level: for fixed z = |x + y|^2 an estimate's relative error has a known variance. Whole attention on
Gaussian inputs would show nothing, there the mean of the values is as good an approximation. Everything is float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from fastattn.linear.random_features import (
    hyperbolic,
    oprf,
    oprf_parameter,
    oprf_statistic,
    positive_features,
    random_projection,
    softmax_kernel_estimate,
)

DIM = 64
F64 = torch.float64
Features = Callable[[Tensor], tuple[Tensor, Tensor | None]]
project = partial(random_projection, dtype=F64)


def relative_errors(
    num_features: int, z: float, *, orthogonal: bool, features: Features, draws: int = 200, dim: int = DIM
) -> Tensor:
    """(draws, 32) of estimate / exact - 1, for pairs with |x + y|^2 = z in random directions."""
    direction = torch.nn.functional.normalize(torch.randn(32, dim, dtype=F64), dim=1)
    offset = torch.randn(32, dim, dtype=F64) / dim**0.5
    x, y = math.sqrt(z) / 2 * direction + offset, math.sqrt(z) / 2 * direction - offset
    exact = torch.exp((x * y).sum(1))
    errors = []
    for _ in range(draws):
        projection, bias = features(project(num_features, dim, orthogonal=orthogonal))
        products = positive_features(x, projection, bias) * positive_features(y, projection, bias)
        errors.append(products.mean(1) / exact - 1)
    return torch.stack(errors)


def rms(errors: Tensor) -> float:
    return errors.square().mean().sqrt().item()


def positive(projection: Tensor) -> tuple[Tensor, None]:
    return projection, None


def doubled(projection: Tensor) -> tuple[Tensor, None]:
    return hyperbolic(projection), None


def variance_of_oprf(a: float, z: float, dim: int) -> float:
    """One feature's relative variance, from E exp(s |w|^2 + t . w) = (1 - 2s)^(-dim/2) exp(|t|^2 / (2 - 4s))."""
    constant = dim * math.log(1 - 4 * a) - dim / 2 * math.log(1 - 8 * a)
    return math.exp(constant + 2 * (1 - 4 * a) * z / (1 - 8 * a) - z) - 1


@pytest.mark.parametrize(("num_features", "dim"), [(6, 6), (4, 16), (35, 8), (7, 1)])
def test_orthogonal_rows(num_features: int, dim: int) -> None:
    """Fails if rows of a block are not orthogonal, a last block is not cut, or regularized norms are not sqrt(D)."""
    rows = project(num_features, dim, regularized=True)
    assert rows.shape == (num_features, dim)
    for block in rows.split(dim):
        assert_close(block @ block.mT, dim * torch.eye(len(block), dtype=F64))
    rows = project(num_features, dim)
    for block in rows.split(dim):
        gram = block @ block.mT
        assert_close(gram, torch.diag(gram.diagonal()))


@pytest.mark.parametrize("orthogonal", [True, False])
def test_rows_are_gaussian(orthogonal: bool) -> None:
    """Each row is N(0, I), moments to six standard errors; fails on norms that are not chi-distributed, on directions
    that prefer signs (QR's own), and on blocks that repeat."""
    dim, count = 3, 30000
    rows = project(count, dim, orthogonal=orthogonal)
    standard_error = count**-0.5
    assert rows.mean(0).abs().max() < 6 * standard_error
    assert (rows.square().mean(0) - 1).abs().max() < 6 * standard_error * 2**0.5
    assert ((rows**4).mean(0) - 3).abs().max() < 6 * standard_error * 96**0.5
    # Where in its block a row stands must not matter: QR without its signs makes the first entries negative.
    for place in range(dim):
        assert rows[place::dim].mean(0).abs().max() < 6 * standard_error * dim**0.5
    squares = rows.square().sum(1)
    assert abs(squares.var().item() - 2 * dim) < 6 * standard_error * (48 * dim + 12 * dim**2 - 4 * dim**2) ** 0.5
    if orthogonal:  # norms within a block are independent
        a, b = squares[0::dim] - dim, squares[1::dim] - dim
        assert abs((a * b).mean().item()) < 6 * standard_error * dim**0.5 * 2 * dim


def test_generator_device_and_dtype() -> None:
    """Fails if a seed does not fix the rows, torch's own generator is not the default, or the dtype is not as asked."""
    first, again = (random_projection(9, 4, generator=torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, random_projection(9, 4, generator=torch.Generator().manual_seed(4)))
    state = torch.get_rng_state()
    default = random_projection(9, 4)
    torch.set_rng_state(state)
    assert torch.equal(random_projection(9, 4), default)
    for dtype in (torch.float32, torch.bfloat16, F64):
        assert random_projection(9, 4, dtype=dtype).dtype == dtype
    with torch.device("meta"):
        assert random_projection(9, 4).device.type == "meta"
        assert random_projection(9, 4, device="cpu").device.type == "cpu"
        assert torch.equal(random_projection(9, 4, generator=torch.Generator("cpu").manual_seed(3)), first)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((0, 4), {}, ValueError, "num_features must be at least 1, got 0"),
        ((4, 2.0), {}, TypeError, "head_dim must be an int, got float"),
        ((4, 2), {"orthogonal": 1}, TypeError, "orthogonal must be a bool, got int"),
        ((4, 2), {"regularized": None}, TypeError, "regularized must be a bool, got NoneType"),
        ((4, 2), {"dtype": torch.int64}, TypeError, "dtype must be floating point, got torch.int64"),
    ],
)
def test_projection_errors(arguments: tuple, options: dict, error: type[Exception], message: str) -> None:
    """Fails where a bad argument is accepted, or the message does not say what it was."""
    with pytest.raises(error, match=message):
        random_projection(*arguments, **options)


def test_estimators_are_their_formulas() -> None:
    """Fails if a feature leaves out its bias or |x|^2 / 2, the mean is taken over the wrong number, or rows of x and y
    are not paired each with each."""
    x, y = torch.randn(2, 5, 3, dtype=F64), torch.randn(2, 4, 3, dtype=F64)
    projection, bias = torch.randn(7, 3, dtype=F64), torch.randn(7, dtype=F64)
    found = softmax_kernel_estimate(x, y, projection, bias)
    for b, i, j in ((0, 4, 0), (1, 2, 3)):
        norms = x[b, i].square().sum() + y[b, j].square().sum()
        terms = [torch.exp(w @ (x[b, i] + y[b, j]) + 2 * c - norms / 2) for w, c in zip(projection, bias, strict=True)]
        assert_close(found[b, i, j], sum(terms) / 7)
    assert_close(softmax_kernel_estimate(x, y, projection), softmax_kernel_estimate(x, y, projection, 0 * bias))


def test_independent_features_have_the_variance_of_the_formula() -> None:
    """Lemma 2 at z = 1: (e^z - 1) / M. Fails if rows depend on each other, or an estimate is scaled or biased."""
    error = rms(relative_errors(256, 1.0, orthogonal=False, features=positive))
    assert error == pytest.approx(math.sqrt((math.e - 1) / 256), rel=0.25)


def test_hyperbolic_features_have_the_variance_of_the_formula() -> None:
    """Lemma 2: (cosh z - 1) / M of M random rows, less than 2M positive features have. Fails if the opposite rows are
    missing or are drawn anew."""
    z, rows = 1.0, 128
    error = rms(relative_errors(rows, z, orthogonal=False, features=doubled))
    assert error == pytest.approx(math.sqrt((math.cosh(z) - 1) / rows), rel=0.25)
    orthogonal = rms(relative_errors(rows, z, orthogonal=True, features=doubled))
    assert orthogonal < rms(relative_errors(2 * rows, z, orthogonal=True, features=positive))


def test_error_falls_as_the_root_of_the_number_of_features() -> None:
    """Slope -0.5 +- 0.1 of log error in log M over 64 to 1024, and orthogonal rows at most as wrong as independent ones
    at each M; fails if blocks of rows repeat or only the first block is orthogonal."""
    sizes = (64, 256, 1024)
    errors = {
        orthogonal: [rms(relative_errors(m, 1.0, orthogonal=orthogonal, features=positive, draws=100)) for m in sizes]
        for orthogonal in (True, False)
    }
    for curve in errors.values():
        slope = (math.log(curve[-1]) - math.log(curve[0])) / math.log(sizes[-1] / sizes[0])
        assert slope == pytest.approx(-0.5, abs=0.1)
    for ours, independent in zip(errors[True], errors[False], strict=True):
        assert ours < 0.97 * independent


@pytest.mark.parametrize("kind", ["positive", "hyperbolic", "oprf", "oprf hyperbolic"])
@pytest.mark.parametrize("orthogonal", [True, False])
def test_estimates_are_unbiased(kind: str, orthogonal: bool) -> None:
    """The mean over many draws is the kernel, to six standard errors of the formula's variance; fails on a wrong
    constant: D or B of FAVOR++, |x|^2 / 2, regularized norms."""
    z, draws, m, dim = 0.5, 400, 32, 16
    a = -0.05
    features: Features = {
        "positive": positive,
        "hyperbolic": doubled,
        "oprf": lambda w: oprf(w, a),
        "oprf hyperbolic": lambda w: oprf(hyperbolic(w), a),
    }[kind]
    errors = relative_errors(m, z, orthogonal=orthogonal, features=features, draws=draws, dim=dim).mean(1)
    # Orthogonal rows and opposite rows lower the variance; the 32 directions share their rows, so count them as one.
    variance = variance_of_oprf(a, z, dim) if "oprf" in kind else math.exp(z) - 1
    assert abs(errors.mean().item()) < 6 * math.sqrt(variance / (m * draws))
    assert abs(errors.mean().item()) < 6 * (errors.std() / draws**0.5).item() + 1e-12


@pytest.mark.parametrize("dim", [1, 16, 64])
@pytest.mark.parametrize("z", [0.25, 4.0, 30.0])
def test_oprf_parameter_has_the_least_variance(dim: int, z: float) -> None:
    """Against minimisation of the closed form by brute force; fails with the published notes' formula that lacks D."""
    grid = [(1 - i / 500) / 8 for i in range(1, 35000)]
    best = min(
        grid,
        key=lambda a: dim * math.log(1 - 4 * a) - dim / 2 * math.log(1 - 8 * a) + 2 * (1 - 4 * a) * z / (1 - 8 * a),
    )
    assert oprf_parameter(z, dim) == pytest.approx(best, abs=2.5e-4)


def test_oprf_parameter_without_spread() -> None:
    """At z = 0 plain features are best; fails on 0 / 0, or if a tensor is not taken."""
    assert oprf_parameter(0.0, 8) == 0.0
    assert oprf_parameter(torch.tensor(2.0), 8) == oprf_parameter(2.0, 8)
    w = project(5, 4)
    scaled, bias = oprf(w, 0.0)
    assert torch.equal(scaled, w)
    assert not bias.any()


def test_oprf_varies_less_than_positive_features() -> None:
    """At z = 4 with its best parameter, as much as the closed form says; fails if A, B or D is wrong, and unless the
    error is below that of positive features from the same number of rows."""
    z, m, dim = 4.0, 256, 16
    a = oprf_parameter(z, dim)
    found = rms(relative_errors(m, z, orthogonal=False, features=lambda w: oprf(w, a), dim=dim))
    expected = math.sqrt(variance_of_oprf(a, z, dim) / m)
    assert found == pytest.approx(expected, rel=0.25)
    assert found < rms(relative_errors(m, z, orthogonal=False, features=positive, dim=dim))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_oprf_statistic(scale: float | None, masked: bool) -> None:
    """Against all pairs one by one, query heads sharing keys; fails if masked keys (NaN here) count, sequences with
    more keys count less than their pairs, or the scale is left out."""
    query, key = torch.randn(3, 4, 5, 6, dtype=F64), torch.randn(3, 2, 7, 6, dtype=F64)
    mask = torch.rand(3, 7) < 0.6
    mask[:, 0] = True
    if not masked:
        mask = torch.ones(3, 7, dtype=torch.bool)
    key = key.masked_fill(~mask[:, None, :, None], math.nan)
    root = math.sqrt(6**-0.5 if scale is None else scale)
    distances = [
        (root * (query[b, h, i] + key[b, h // 2, j])).square().sum()
        for b in range(3)
        for h in range(4)
        for i in range(5)
        for j in range(7)
        if mask[b, j]
    ]
    found = oprf_statistic(query, key, key_mask=mask if masked else None, scale=scale)
    assert_close(found, torch.stack(distances).mean())
    assert not oprf_statistic(query.requires_grad_(), key, key_mask=mask).requires_grad
    assert oprf_statistic(query, key, key_mask=torch.zeros_like(mask)) == 0
    assert oprf_statistic(query.bfloat16(), key.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: hyperbolic(torch.zeros(3)), ValueError, r"projection must have shape \(num_features, head_dim\)"),
        (lambda: oprf(torch.zeros(3, 2), 0.125), ValueError, "parameter must be below 1/8, got 0.125"),
        (lambda: oprf([[1.0]], -1.0), TypeError, "projection must be a torch.Tensor"),
        (lambda: oprf(torch.zeros(3, 2), math.nan), ValueError, "parameter must be finite, got nan"),
        (lambda: oprf_parameter(-1.0, 4), ValueError, "statistic must not be negative, got -1.0"),
        (lambda: oprf_parameter(1.0, 0), ValueError, "head_dim must be at least 1, got 0"),
        (
            lambda: oprf_statistic(*torch.zeros(2, 1, 1, 2, 4), scale=-1.0),
            ValueError,
            "scale must not be negative for random features, got -1.0",
        ),
        (
            lambda: oprf_statistic(*torch.zeros(2, 1, 1, 2, 4), key_mask=torch.ones(1, 3, dtype=torch.bool)),
            ValueError,
            r"key_mask must have shape \(1, 2\), got \(1, 3\)",
        ),
    ],
)
def test_estimator_errors(call: Callable[[], object], error: type[Exception], message: str) -> None:
    """Fails where a bad argument is accepted, or the message does not say what it was."""
    with pytest.raises(error, match=message):
        call()
