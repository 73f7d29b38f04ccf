"""What a family of models must miss: each price against quadrature, a numerical optimum or samples."""

import numpy as np
import pytest
import scipy.optimize
from hypothesis import given
from hypothesis import strategies as st

from ddpm import gaussian
from ddpm.gaps import diagonal_gap, gaussian_gap, own_coordinate_excess
from ddpm.mixture import GaussianMixture
from ddpm.schedule import NoiseSchedule
from nn.backend import to_host
from tests.helpers import general_schedule, property_test, schedules

LINEAR = NoiseSchedule.linear(1000)


# ---- G12

def test_G12_the_gap_is_the_divergence_from_the_best_gaussian():
    """Against a direct quadrature of the KL, at one x_t grid; any other Gaussian is farther away."""
    world, t = GaussianMixture.two_component(), 200
    x_t = np.linspace(-5, 5, 801)[:, None]
    q = np.exp(world.noised(t, LINEAR).log_density(x_t))
    q /= q.sum()
    posterior = world.posterior_mixture(x_t, t, LINEAR)
    x0 = np.linspace(-4, 4, 4001)
    density = np.einsum("nk,nkx->nx", posterior.weights, np.exp(gaussian.log_normal(
        x0, posterior.means, posterior.covariances[:, 0, 0][:, None])))
    mean, var = posterior.mean(), posterior.cov()[:, 0]

    def divergence(mean, var):
        log_p = np.log(np.maximum(density, 1e-300))
        return q @ (density * (log_p - gaussian.log_normal(x0, mean, var))).sum(axis=1) * (x0[1] - x0[0])
    gap = gaussian_gap(world, 0, t, LINEAR)
    assert gap == pytest.approx(divergence(mean, var), rel=1e-6)
    for other in ((mean + 0.05, var), (mean, 1.1 * var), (mean, var / 1.1)):
        assert divergence(*other) > gap + 1e-4


def test_G12_gap_against_time():
    """None near the data, all of the data's own distance from a Gaussian at T; a single step's is small throughout."""
    world = GaussianMixture.two_component()
    gaps = [gaussian_gap(world, 0, t, LINEAR) for t in (1, 20, 50, 100, 200, 300, 500, 1000)]
    assert gaps[0] < 1e-10 and (np.diff(gaps) > 0).all()
    x0 = np.linspace(-4, 4, 20_001)
    log_p = world.log_density(x0[:, None])
    entropy = -(np.exp(log_p) * log_p).sum() * (x0[1] - x0[0])
    np.testing.assert_allclose(gaps[-1], gaussian.entropy(1.0) - entropy, rtol=1e-3)
    assert gaps[-1] == pytest.approx(0.93643, abs=1e-5)
    one_step = {t: gaussian_gap(world, t - 1, t, LINEAR) for t in (2, 20, 100, 300, 1000)}
    assert max(one_step.values()) < 1e-5 and max(one_step, key=one_step.get) == 100
    skipping = gaussian_gap(world, 100, 300, LINEAR)
    assert one_step[300] < skipping < gaps[5]


def test_G12_a_gaussian_world_has_no_gap():
    world = GaussianMixture([1.0], [[0.3]], [[[0.5]]])
    for s, t in ((0, 10), (0, 500), (99, 100)):
        assert abs(gaussian_gap(world, s, t, LINEAR)) < 1e-12
    with pytest.raises(ValueError, match="D = 1"):
        gaussian_gap(GaussianMixture.grid(), 0, 10, LINEAR)


# ---- C17: diagonal

def covariance(dim, seed):
    root = np.random.default_rng(seed).standard_normal((dim, dim + 1))
    return root @ root.T


@property_test
@given(st.integers(2, 5), st.integers(0, 2**32 - 1))
def test_C17_diagonal_gap_is_the_divergence_from_the_best_diagonal(dim, seed):
    """Against the divergence of two full Gaussians, and against a numerical search for a better diagonal."""
    S = covariance(dim, seed)

    def divergence(log_variances):
        D = np.exp(log_variances)
        return 0.5 * (np.log(D).sum() - np.linalg.slogdet(S)[1] + (np.diag(S) / D).sum() - dim)
    gap = diagonal_gap(S)
    assert gap == pytest.approx(divergence(np.log(np.diag(S))), rel=1e-9, abs=1e-12)
    best = scipy.optimize.minimize(divergence, np.zeros(dim), method="BFGS").fun
    assert gap == pytest.approx(best, rel=1e-5) and gap > 0
    assert divergence(np.log(1 / np.diag(np.linalg.inv(S)))) > gap     # control: the conditional variances instead


def test_C17_diagonal_gap_of_two_coordinates_and_of_a_diagonal(fake):
    for rho in (0.0, 0.5, -0.9):
        S = GaussianMixture.correlated(rho).cov()
        assert diagonal_gap(S) == pytest.approx(-0.5 * np.log(1 - rho**2), abs=1e-15)
    stack = np.stack([covariance(3, seed) for seed in range(4)])
    np.testing.assert_allclose(diagonal_gap(stack), [diagonal_gap(S) for S in stack], rtol=1e-12)
    np.testing.assert_array_equal(to_host(diagonal_gap(fake.asarray(stack))), diagonal_gap(stack))


# ---- L21: a coordinate alone

@property_test
@given(st.integers(2, 5), st.integers(0, 2**32 - 1), schedules(), st.data())
def test_L21_one_coordinate_is_not_enough(dim, seed, schedule, data):
    """The excess equals the difference of the two conditional variances, by conditioning the joint Gaussian."""
    S, t = covariance(dim, seed), data.draw(st.integers(1, schedule.T))
    l, v = schedule.lam_bar[t], schedule.sigma2_bar[t]

    def conditional(i, seen):
        """Var[x_0,i | x_t,j for j in seen]."""
        C = l**2 * S[np.ix_(seen, seen)] + v * np.eye(len(seen))
        return S[i, i] - l**2 * S[i, seen] @ np.linalg.inv(C) @ S[seen, i]
    expected = np.array([conditional(i, [i]) - conditional(i, list(range(dim))) for i in range(dim)])
    excess = own_coordinate_excess(S, t, schedule)
    np.testing.assert_allclose(excess, expected, rtol=1e-6, atol=1e-9 * S.max())
    assert (excess >= -1e-12 * S.max()).all() and excess.max() > 0
    np.testing.assert_allclose(own_coordinate_excess(np.diag(np.diag(S)), t, schedule), 0, atol=1e-12 * S.max())


@pytest.mark.parametrize("schedule", [LINEAR, general_schedule(8)], ids=["VP", "general"])
def test_L21_is_what_regression_finds(schedule, rng):
    """Least squares on samples, from one coordinate and from all: their errors differ by the closed form."""
    world, t, n = GaussianMixture.correlated(0.9, 3), min(100, schedule.T), 400_000
    x0 = world.sample(n, rng)
    x_t = schedule.add_noise(x0, t, rng.standard_normal(x0.shape))
    alone = x0[:, 0] - x_t[:, 0] * (x_t[:, 0] @ x0[:, 0]) / (x_t[:, 0] @ x_t[:, 0])
    together = x0[:, 0] - x_t @ np.linalg.lstsq(x_t, x0[:, 0])[0]
    difference = alone**2 - together**2
    error = difference.std() / np.sqrt(n)
    excess = own_coordinate_excess(world.cov(), t, schedule)[0]
    assert abs(difference.mean() - excess) < 4 * error < excess / 10   # and zero is far outside
    assert own_coordinate_excess(world.cov(), 0, schedule) == pytest.approx(np.zeros(3), abs=1e-12)
