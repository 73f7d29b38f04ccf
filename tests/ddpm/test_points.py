"""Training on points, and the measure of recovery: exact on a model that is exact, and on errors of known size."""

import numpy as np
import pytest

from ddpm import covariance, gaussian, gddm
from ddpm.denoiser import Denoiser
from ddpm.gaps import gaussian_gap
from ddpm.mixture import GaussianMixture
from ddpm.models import find_objective
from ddpm.points import fit_head, fit_points, fit_variance, recovery
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


# ---- heads, around a mean that stays as it is

CORRELATED = GaussianMixture.correlated(0.9)
SHORT = {"steps": 400, "batch_size": 128, "lr": 1e-2, "hidden": (32, 32)}
MIDDLE = (10, 20, 40)


def exact_var_eps(t):
    """Var[eps | x_t], (1, 2): of Gaussian data it is the same at every x_t."""
    return LINEAR.snr[t] * np.diagonal(CORRELATED.posterior_x0(np.zeros((1, 2)), t, LINEAR)[1], axis1=1, axis2=2)


def found_var_eps(denoiser, method, t, rng):
    """A method's Var[eps | x_t] at draws of x_t."""
    x_t = CORRELATED.noised(t, LINEAR).sample(500, rng)
    return LINEAR.snr[t] * method.of_x0(denoiser, denoiser.predict(x_t, t), x_t, t)


@pytest.mark.parametrize("kind, within", [("sn", 0.75), ("npr", 0.15), ("ocm", 0.1)])
def test_C10_C12_C14_a_short_training_finds_the_variance_of_gaussian_data(kind, within, rng):
    """Two correlated coordinates. sn sees little of it, the others most; an untrained head or one misread is worse."""
    exact = Denoiser.from_world(CORRELATED, LINEAR)
    heads = [fit_head(kind, exact, CORRELATED, LINEAR, **SHORT),
             fit_head(kind, exact, CORRELATED, LINEAR, **SHORT | {"steps": 1, "lr": 0.0})]
    trained, untrained = (covariance.reverse_covariance(kind, head=head) for head in heads)
    other = covariance.reverse_covariance({"sn": "npr", "npr": "ocm", "ocm": "npr"}[kind], head=heads[0])
    errors = np.array([[np.sqrt(((found_var_eps(exact, m, t, rng) / exact_var_eps(t) - 1)**2).mean())
                        for m in (trained, untrained, other)] for t in MIDDLE])
    learned, start, misread = errors.T
    assert learned.max() < within and (1.3 * learned < misread).all(), errors
    assert 1.3 * learned.max() < start.max(), errors        # (at low noise it starts from nearly the truth)


def test_C10_C14_around_a_wrong_mean_npr_finds_more_and_ocm_finds_the_same(rng):
    """A mean of eps that is wrong by 0.5 everywhere has the exact Jacobian; its residuals are larger by 0.25."""
    exact, t = Denoiser.from_world(CORRELATED, LINEAR), 20
    wrong = Denoiser.from_eps(lambda x_t, t: exact.predict(x_t, t).eps + 0.5, LINEAR, exact.vjp)
    npr, ocm = (covariance.reverse_covariance(kind, head=fit_head(kind, wrong, CORRELATED, LINEAR, **SHORT))
                for kind in ("npr", "ocm"))
    var = exact_var_eps(t)
    np.testing.assert_allclose(found_var_eps(wrong, npr, t, rng).mean(), var.mean() + 0.25, rtol=0.1)
    np.testing.assert_allclose(found_var_eps(wrong, ocm, t, rng).mean(), var.mean(), rtol=0.1)
    assert 0.25 > 0.3 * var.mean()


@pytest.mark.parametrize("model, objective", [("gddm", "pairs"), ("iddpm", "hybrid")])
def test_C05_G06_C14_a_variance_is_trained_around_a_mean_that_stays(model, objective, rng):
    """The variance of x_s | x_t half way down, to 12 per cent; where a network starts it is off by 25 and more."""
    exact = Denoiser.from_world(CORRELATED, LINEAR)
    options = SHORT | {"objective": find_objective(model, objective)}
    trained = fit_variance(model, exact, CORRELATED, LINEAR, **options)
    untrained = fit_variance(model, exact, CORRELATED, LINEAR, **options | {"steps": 1, "lr": 0.0})
    learned = covariance.reverse_covariance("learned")
    for t in MIDDLE:
        x_t = CORRELATED.noised(t, LINEAR).sample(500, rng)
        _, true = gddm.reverse_moments(0, exact.predict(x_t, t).var_x0, x_t, t // 2, t, LINEAR)
        errors = [np.sqrt(((learned(m, m.predict(x_t, t), x_t, t // 2, t, LINEAR) / true - 1)**2).mean())
                  for m in (trained, untrained)]
        assert errors[0] < 0.12 < 0.25 < errors[1], (t, errors)
        np.testing.assert_allclose(trained.predict(x_t, t).eps, exact.predict(x_t, t).eps, rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(trained.vjp(x_t, t, x_t), exact.vjp(x_t, t, x_t))


def test_heads_are_functions_of_the_seed_and_leave_a_learned_mean_alone():
    mean = fit_points(CORRELATED, LINEAR, find_objective("ddpm"), model="ddpm", steps=2, batch_size=8, hidden=(8,))
    before, x_t = mean.network.flat_parameters.copy(), np.ones((3, 2), np.float32)
    few = {"steps": 2, "batch_size": 8, "hidden": (8,)}
    for kind in ("sn", "npr", "ocm"):
        first, again, other = (fit_head(kind, mean, CORRELATED, LINEAR, seed=seed, **few)(x_t, 5) for seed in (0, 0, 1))
        assert first.shape == x_t.shape and (first == again).all() and (first != other).any()
    for model in ("iddpm", "gddm"):
        trained = fit_variance(model, mean, CORRELATED, LINEAR, **few)
        np.testing.assert_array_equal(trained.predict(x_t, 5).eps, mean.predict(x_t, 5).eps)
    np.testing.assert_array_equal(mean.network.flat_parameters, before)


def test_another_kind_of_head_is_refused():
    with pytest.raises(ValueError, match="sn, npr, ocm"):
        fit_head("gddm", Denoiser.from_world(TWO, LINEAR), TWO, LINEAR, steps=1)
