"""Fails if planted coefficients are not recovered, a term is invented, or the longest length is not the longest."""

import pytest

from fastattn.bench.fit import Fit, fit_growth

LENGTHS = (256, 512, 1024, 2048, 4096, 8192)


@pytest.mark.parametrize(
    ("constant", "linear", "quadratic", "dominant"),
    [
        (1e6, 6144.0, 49.0, "quadratic"),
        (2e6, 1e4, 0.0, "linear"),
        (5e7, 0.0, 0.0, "constant"),
        (0.0, 0.0, 3.0, "quadratic"),
    ],
)
def test_planted_coefficients_are_recovered(constant, linear, quadratic, dominant):
    fit = fit_growth(LENGTHS, [constant + linear * n + quadratic * n * n for n in LENGTHS])
    assert fit.constant == pytest.approx(constant, rel=1e-6, abs=1)
    assert fit.linear == pytest.approx(linear, rel=1e-6, abs=1e-3)
    assert fit.quadratic == pytest.approx(quadratic, rel=1e-6, abs=1e-6)
    assert fit.residual < 1e-6
    assert fit.dominant(8192) == dominant


def test_coefficients_are_never_negative():
    """The points curve downwards: the unconstrained quadratic would be negative."""
    fit = fit_growth(LENGTHS, [1e4 * n**0.9 for n in LENGTHS])
    assert min(fit.constant, fit.linear, fit.quadratic) >= 0
    assert fit.quadratic == 0
    assert 0 < fit.residual < 0.3


@pytest.mark.parametrize(
    "fit", [Fit(1e6, 6144.0, 49.0, 0.0), Fit(0.0, 100.0, 1e-9, 0.0), Fit(1e3, 0.0, 2.0, 0.0), Fit(5.0, 3.0, 0.0, 0.0)]
)
def test_longest_length_is_the_last_that_fits(fit):
    capacity = 24e9
    longest = fit.longest(capacity)
    assert fit.at(longest) <= capacity * (1 + 1e-12) < fit.at(longest + 1)


def test_longest_length_at_the_edges():
    assert Fit(10.0, 0.0, 0.0, 0.0).longest(100.0) is None
    assert Fit(200.0, 1.0, 0.0, 0.0).longest(100.0) == 0


def test_bad_points():
    with pytest.raises(ValueError, match="two points"):
        fit_growth([512], [1.0])
    with pytest.raises(ValueError, match="positive"):
        fit_growth([512, 1024], [1.0, 0.0])


def test_steps_of_buffers_are_not_a_quadratic_term():
    """Fails if a fit that a small quadratic term improves by a few per cent is extrapolated by it."""
    fit = fit_growth([1024, 2048, 4096, 8192], [11.49, 19.5, 38.6, 76.7])
    assert fit.quadratic == 0
    assert fit.residual < 0.06
    nearly = fit_growth(LENGTHS, [1e5 + 277.0 * n + 1e-5 * n * n for n in LENGTHS])
    assert nearly.quadratic == 0
    assert nearly.linear == pytest.approx(277, rel=0.001)
