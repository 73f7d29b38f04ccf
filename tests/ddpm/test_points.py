"""Training on points, and the measure of recovery: exact on a model that is exact, and on errors of known size."""

import numpy as np
import pytest

from ddpm import gaussian
from ddpm.denoiser import Denoiser
from ddpm.gaps import gaussian_gap
from ddpm.mixture import GaussianMixture
from ddpm.models import find_objective
from ddpm.points import fit_points, recovery
from ddpm.schedule import NoiseSchedule

LINEAR = NoiseSchedule.linear(100)
TWO = GaussianMixture.two_component()
GAUSSIAN = GaussianMixture([1.0], [[0.3]], [[[0.5]]])
PAIRS = [(0, 1), (0, 30), (0, 100), (15, 30), (29, 30)]


def posterior_of(world, shift=0.0, factor=1.0):
    """The exact posterior of x_0 as a denoiser, its mean moved by `shift` and its variances multiplied."""
    def moments(x_t, t):
        mean, cov = world.posterior_x0(x_t, t, LINEAR)
        return mean + shift, factor * np.diagonal(cov, axis1=1, axis2=2)
    return Denoiser.from_moments(moments, LINEAR)


# ---- the measure

@pytest.mark.parametrize("world", [TWO, GaussianMixture.grid()], ids=["two", "grid"])
def test_G08_an_exact_model_is_recovered_exactly(world, rng):
    for row in recovery(posterior_of(world), world, PAIRS, rng, n=500):
        np.testing.assert_allclose(row[2:], (0, 0, 1, 0, 0), atol=1e-9, err_msg=str(row))


def test_G08_errors_of_known_size_are_measured(rng):
    """Gaussian data have one variance at every x_t, so that each column is a number known beforehand."""
    for row in recovery(posterior_of(GAUSSIAN, shift=0.05, factor=2.0), GAUSSIAN, PAIRS, rng, n=200):
        signal, noise = LINEAR.lam_bar[row.t], LINEAR.sigma2_bar[row.t]
        var_x0 = 0.5 * noise / (0.5 * signal**2 + noise)
        a, _, step_var = LINEAR.posterior(row.s, row.t)
        var = step_var + a**2 * var_x0
        wide = step_var + 2 * a**2 * var_x0
        expected = (0.05 * a / var**0.5, wide / var - 1, wide / var, gaussian.kl(0.05 * a, var, 0.0, wide),
                    0.05 * signal / noise**0.5)
        np.testing.assert_allclose(row[2:], expected, rtol=1e-9)


def test_G12_the_gap_and_the_distance_to_the_best_gaussian_add_up():
    """KL(x_0 | x_t || p) = KL(x_0 | x_t || Gaussian of its moments) + KL(that Gaussian || p), for any Gaussian p."""
    t, x_t = 25, np.linspace(-2, 2, 9)[:, None]
    mixture = TWO.posterior_mixture(x_t, t, LINEAR)
    mean, var = mixture.mean(), mixture.cov()[:, 0]
    x0 = np.linspace(-4, 4, 8001)
    density = sum(mixture.weights[:, [k]] * np.exp(gaussian.log_normal(x0, mixture.means[:, k], v.item()))
                  for k, v in enumerate(mixture.covariances))

    def divergence(mean, var):
        log_p = np.log(np.maximum(density, 1e-300))
        return (density * (log_p - gaussian.log_normal(x0, mean, var))).sum(axis=1) * (x0[1] - x0[0])
    for m, v in ((mean + 0.1, 1.3 * var), (0 * mean, 1 + 0 * var), (mean, 0.5 * var)):
        excess = gaussian.kl(mean, var, m, v)[:, 0]
        np.testing.assert_allclose(divergence(m, v), divergence(mean, var) + excess, rtol=1e-6, atol=1e-9)
        assert np.abs(divergence(m, v) - divergence(mean, var) - gaussian.kl(m, v, mean, var)[:, 0]).max() > 1e-2


def test_G12_recovery_measures_what_comes_on_top_of_the_gap(rng):
    """N(0, 1), which ignores x_t, is as good as a Gaussian can be at T, and wastes nats before."""
    blind = Denoiser.from_moments(lambda x_t, t: (0 * x_t, 1 + 0 * x_t), LINEAR)
    near, far = recovery(blind, TWO, [(0, 30), (0, 100)], rng, n=2000)
    assert far.nats < 1e-3 < 0.3 < near.nats and gaussian_gap(TWO, 0, 100, LINEAR) > 0.9


def test_recovery_needs_a_variance(rng):
    denoiser = Denoiser.from_eps(lambda x_t, t: x_t, LINEAR)
    with pytest.raises(ValueError, match="variances"):
        recovery(denoiser, TWO, [(0, 3)], rng)


# ---- the training

@pytest.mark.parametrize("schedule, times", [(LINEAR, (10, 40)), (NoiseSchedule.variance_exploding(100), (50, 60))],
                         ids=["VP", "VE"])
def test_a_short_training_learns_gaussian_data(schedule, times):
    """The posterior of Gaussian data is linear in x_t with one variance: little training finds most of it."""
    losses = []
    model = fit_points(GAUSSIAN, schedule, find_objective("gddm"), steps=400, batch_size=128, lr=1e-2, hidden=(32, 32),
                       progress=lambda step, loss: losses.append((step, loss)))
    assert [step for step, _ in losses] == list(range(1, 401))
    start, end = (np.mean([loss for _, loss in part]) for part in (losses[:20], losses[-20:]))
    assert end < 0.7 * start
    untrained = fit_points(GAUSSIAN, schedule, find_objective("gddm"), steps=1, batch_size=2, lr=0.0, hidden=(32, 32))
    after, before = (recovery(m, GAUSSIAN, [(0, t) for t in times], np.random.default_rng(0), n=2000)
                     for m in (model, untrained))
    for row, control in zip(after, before, strict=True):
        assert row.nats < 0.05 < control.nats and row.mean < 0.2 < control.mean and abs(row.ratio - 1) < 0.3, row


@pytest.mark.parametrize("model, outputs", [("ddpm", 2), ("iddpm", 4), ("gddm", 4)])
def test_any_model_trains_on_points_of_any_dimension(model, outputs):
    def run(seed):
        return fit_points(GaussianMixture.grid(), LINEAR, find_objective(model), model=model, steps=2, batch_size=8,
                          hidden=(8,), seed=seed)
    first, again, other = run(0), run(0), run(1)
    x_t = np.ones((3, 2), np.float32)
    assert first.network(x_t, 5).shape == (3, outputs) and np.isfinite(first.network(x_t, 5)).all()
    assert first.predict(x_t, 5).eps.dtype == np.float32
    np.testing.assert_array_equal(first.network.flat_parameters, again.network.flat_parameters)
    assert (first.network.flat_parameters != other.network.flat_parameters).any()


def test_an_objective_of_another_model_is_refused():
    with pytest.raises(ValueError, match="variance head"):
        fit_points(TWO, LINEAR, find_objective("gddm"), model="ddpm", steps=1)
