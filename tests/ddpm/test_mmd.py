"""MMD^2: against loops over pairs, without bias, against the closed form of Gaussians, and with an honest error."""

import numpy as np
import pytest

from ddpm.metrics import squared_mmd, squared_mmd_to_world
from ddpm.metrics.mmd import BANDWIDTHS, DEVICE_TILE, TILE
from ddpm.mixture import GaussianMixture
from tests import fake_device
from tests.helpers import zscore

GRID, SKEW = GaussianMixture.grid(), GaussianMixture.correlated(0.8)


def kernel(x, y, bandwidths):
    return sum(np.exp(-((x - y)**2).sum() / (2 * h**2)) for h in bandwidths)


def by_hand(x, y, bandwidths=BANDWIDTHS, own_pairs=False):
    """MMD^2 in loops; with `own_pairs` the biased one, in which a point is a pair with itself."""
    def within(z):
        pairs = [kernel(a, b, bandwidths) for i, a in enumerate(z) for j, b in enumerate(z) if own_pairs or i != j]
        return np.mean(pairs)
    return within(x) + within(y) - 2 * np.mean([kernel(a, b, bandwidths) for a in x for b in y])


def standard_normal(covariance):
    return GaussianMixture([1.0], np.zeros((1, len(covariance))), np.array(covariance)[None])


@pytest.mark.parametrize("n, m, D", [(3, 3, 1), (7, 5, 2), (6, 9, 4)])
def test_C17_mmd_is_the_sum_over_pairs_of_different_points(n, m, D, rng):
    x, y = rng.standard_normal((n, D)), 0.3 + rng.standard_normal((m, D))
    assert squared_mmd(x, y).value == pytest.approx(by_hand(x, y), rel=1e-10, abs=1e-12)
    assert squared_mmd(x, y, (0.7,)).value == pytest.approx(by_hand(x, y, (0.7,)), rel=1e-10, abs=1e-12)
    assert squared_mmd(x, y).value == pytest.approx(squared_mmd(y, x).value, rel=1e-12, abs=1e-12)
    assert abs(squared_mmd(x, y).value - by_hand(x, y, own_pairs=True)) > 0.1


def test_tiles_cover_every_pair_once(monkeypatch, rng):
    x, y = rng.standard_normal((50, 2)), rng.standard_normal((23, 2))
    exact, to_world = squared_mmd(x, y), squared_mmd_to_world(x, GRID)
    for size in (1, 7, 49, 50):
        monkeypatch.setattr("ddpm.metrics.mmd.TILE", size)
        np.testing.assert_allclose(squared_mmd(x, y), exact, rtol=1e-10)
        np.testing.assert_allclose(squared_mmd_to_world(x, GRID), to_world, rtol=1e-10)
    assert TILE**2 * 8 <= 2**20 and DEVICE_TILE**2 * 8 <= 2**30


def test_far_from_the_origin_the_distance_is_the_same(rng):
    x, y = rng.standard_normal((40, 2)), rng.standard_normal((40, 2))
    np.testing.assert_allclose(squared_mmd(x + 100, y + 100), squared_mmd(x, y), rtol=1e-8)


def test_C17_equal_laws_have_distance_zero_on_average(rng):
    """200 pairs of sets of 20; the biased estimate is off by 2 (4 - E k)/20."""
    pairs = [(GRID.sample(20, rng), GRID.sample(20, rng)) for _ in range(200)]
    assert abs(zscore(np.array([squared_mmd(x, y).value for x, y in pairs]))) < 4
    assert abs(zscore(np.array([squared_mmd_to_world(x, GRID).value for x, _ in pairs]))) < 4
    x, y = pairs[0]
    bias = by_hand(x, y, own_pairs=True) - by_hand(x, y)
    found = np.array([squared_mmd(x, y).value + bias for x, y in pairs])
    assert zscore(found) > 20 and bias > 0.2


@pytest.mark.parametrize("bandwidths", [BANDWIDTHS, (0.5,)])
def test_C17_gaussians_in_closed_form(bandwidths, rng):
    """E exp(-d^2 / (2 h^2)) for d ~ N(m, S) is h^D / sqrt(det(S + h^2)) exp(-m^T (S + h^2)^-1 m / 2)."""
    S, R, m = SKEW.covariances[0], np.diag([0.3, 1.4]), np.array([0.5, -0.2])

    def expected(covariance, mean):
        return sum(h**2 / np.sqrt(np.linalg.det(covariance + h**2 * np.eye(2)))
                   * np.exp(-0.5 * mean @ np.linalg.solve(covariance + h**2 * np.eye(2), mean)) for h in bandwidths)
    exact = expected(2 * S, 0 * m) + expected(2 * R, 0 * m) - 2 * expected(S + R, m)
    world = GaussianMixture([1.0], [m], [R])
    xs, ys = ([law.sample(60, rng) for _ in range(150)] for law in (SKEW, world))
    both = np.array([squared_mmd(x, y, bandwidths).value for x, y in zip(xs, ys, strict=True)])
    to_world = np.array([squared_mmd_to_world(x, world, bandwidths).value for x in xs])
    assert abs(zscore(both, exact)) < 4 and abs(zscore(to_world, exact)) < 4
    assert to_world.std() < 0.9 * both.std()                                        # y is integrated out
    assert abs(zscore(to_world, 2 * exact)) > 10


def test_C17_a_world_is_a_sample_without_end(rng):
    """The mean kernel of the grid, at points and between two draws, against a large sample."""
    x, y = 0.9 * GRID.sample(400, rng), GRID.sample(16_000, rng)
    exact = squared_mmd_to_world(x, GRID)
    halves = np.array([squared_mmd(x, y[i::16]).value for i in range(16)])
    assert abs(zscore(halves, exact.value)) < 4 and abs(zscore(halves, squared_mmd_to_world(x, SKEW).value)) > 20


@pytest.mark.parametrize("scale, bandwidths, low, high", [(0.3, (3.0,), 0.85, 1.15), (1.0, BANDWIDTHS, 1.2, 1.6)])
def test_the_error_is_the_scatter_and_never_too_small(scale, bandwidths, low, high, rng):
    """The scatter itself where the laws differ much; where they are equal it is larger by sqrt(2)."""
    draws = [(scale * GRID.sample(50, rng), GRID.sample(40, rng)) for _ in range(200)]
    for found in ([squared_mmd(x, y, bandwidths) for x, y in draws],
                  [squared_mmd_to_world(x, GRID, bandwidths) for x, _ in draws]):
        scatter = np.std([f.value for f in found])
        assert low < np.mean([f.error**2 for f in found])**0.5 / scatter < high


def test_the_error_is_the_jackknife(rng):
    x, y = rng.standard_normal((6, 2)), rng.standard_normal((5, 2))
    by_x = [by_hand(np.delete(x, i, axis=0), y) for i in range(6)]
    by_y = [by_hand(x, np.delete(y, i, axis=0)) for i in range(5)]
    assert squared_mmd(x, y).error**2 == pytest.approx(5 * np.var(by_x) + 4 * np.var(by_y), rel=1e-9)


def test_device_and_precision(fake, rng):
    x, y = rng.standard_normal((20, 2)).astype(np.float32), rng.standard_normal((30, 2)).astype(np.float32)
    exact = squared_mmd(x.astype(np.float64), y.astype(np.float64)), squared_mmd_to_world(x.astype(np.float64), GRID)
    assert (squared_mmd(x, y), squared_mmd_to_world(x, GRID)) == exact
    with fake_device.synchronisation_allowed():
        found = squared_mmd(fake.asarray(x), fake.asarray(y)), squared_mmd_to_world(fake.asarray(x), GRID)
    np.testing.assert_allclose(found, exact, rtol=1e-12)


@pytest.mark.parametrize("x, y", [(np.zeros((2, 2)), np.zeros((5, 2))), (np.zeros(5), np.zeros((5, 2))),
                                  (np.zeros((5, 2)), np.zeros((5, 2, 1))), (np.zeros((5, 2)), np.zeros((5, 3)))])
def test_bad_shapes_are_refused(x, y):
    with pytest.raises(ValueError, match="points|dimension"):
        squared_mmd(x, y)


@pytest.mark.parametrize("bandwidths", [(), (1.0, 0.0), (-1.0,)])
def test_bad_bandwidths_are_refused(bandwidths):
    with pytest.raises(ValueError, match="bandwidths"):
        squared_mmd(np.zeros((5, 2)), np.zeros((5, 2)), bandwidths)


def test_points_of_another_dimension_are_refused():
    with pytest.raises(ValueError, match="points"):
        squared_mmd_to_world(np.zeros((5, 3)), GRID)
