"""The Frechet distance of two Gaussians against its closed forms."""

import numpy as np
import pytest
from scipy.linalg import sqrtm

from ddpm.metrics import frechet_distance


def covariance(rng, dim, rank=None):
    root = rng.standard_normal((dim, rank or 2 * dim))
    return root @ root.T / root.shape[1]


def test_one_dimension_is_the_distance_of_means_and_standard_deviations():
    assert frechet_distance([1.0], [[4.0]], [3.0], [[9.0]]) == pytest.approx(2.0**2 + 1.0**2, rel=1e-12)


def test_general_case_equals_the_matrix_root_and_not_the_root_of_one_factor(rng):
    mu1, mu2, c1, c2 = rng.standard_normal(5), rng.standard_normal(5), covariance(rng, 5), covariance(rng, 5)
    exact = ((mu1 - mu2)**2).sum() + np.trace(c1 + c2 - 2 * sqrtm(c1 @ c2).real)
    assert frechet_distance(mu1, c1, mu2, c2) == pytest.approx(exact, rel=1e-9)
    wrong = ((mu1 - mu2)**2).sum() + np.trace(c1 + c2 - 2 * sqrtm(c1).real @ c2)
    assert abs(wrong / exact - 1) > 0.01


def test_zero_for_equal_gaussians_symmetric_and_finite_for_singular_ones(rng):
    mu, c1, c2 = rng.standard_normal(6), covariance(rng, 6, rank=2), covariance(rng, 6, rank=3)
    # A zero eigenvalue is known to rounding, 1e-16, and its root to 1e-8.
    assert abs(frechet_distance(mu, c1, mu, c1)) < 1e-6
    assert frechet_distance(mu, c1, 0 * mu, c2) == pytest.approx(frechet_distance(0 * mu, c2, mu, c1), abs=1e-6)
    assert frechet_distance(mu, 0 * c1, mu, 0 * c1) == 0


def test_shapes_that_do_not_match_are_refused():
    with pytest.raises(ValueError, match="frechet_distance"):
        frechet_distance(np.zeros(3), np.eye(3), np.zeros(2), np.eye(2))
