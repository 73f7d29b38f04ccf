"""Score, Hessian and noise moments against the exact posteriors of mixtures; the losses that learn a score."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ddpm import tweedie
from ddpm.denoiser import Denoiser
from ddpm.mixture import GaussianMixture
from ddpm.parameterization import eps_from_score, x0_from_eps
from nn.backend import array_module, to_host
from tests.ddpm.test_mixture import GENERAL, LINEAR, TIMES
from tests.helpers import general_schedule, mixtures, property_test, schedules, zscore


def points_in_space():
    """Five point masses in 3-D: data whose covariances are singular, and whose posterior is a plain sum."""
    return GaussianMixture(np.full(5, 0.2), np.random.default_rng(8).standard_normal((5, 3)), np.zeros((5, 3, 3)))


WORLDS = {"two": GaussianMixture.two_component(), "rotated": GaussianMixture.grid(rotation_degrees=30),
          "correlated": GaussianMixture.correlated(0.95, 3), "points": points_in_space()}


@pytest.fixture(params=WORLDS)
def world(request):
    return WORLDS[request.param]


@pytest.fixture(params=[LINEAR, GENERAL], ids=["linear", "general"])
def schedule(request):
    return request.param


def gaussian_world(variance):
    return GaussianMixture([1.0], [[0.0]], [[[variance]]])


def line(world, nodes=601):
    """Points (K nodes, 1) and weights, sum 1, with which a mean over a world on the line is a trapezoidal sum."""
    z = np.linspace(-10, 10, nodes)
    p = np.exp(-0.5 * z * z)
    x = world.means + np.sqrt(world.covariances[:, :, 0]) * z
    return x.reshape(-1, 1), (world.weights[:, None] * p / p.sum()).ravel()


def cancellation(t, schedule):
    """1 + sigma2_bar / lam_bar^2, the factor by which Tweedie's formulas lose digits."""
    return 1 + np.max(schedule.sigma2_bar[t] / schedule.lam_bar[t]**2)


# ---- C01, C08: the posterior of the clean state

@pytest.mark.parametrize("t", TIMES)
def test_C01_mean_from_score_is_the_posterior_mean(t, world, schedule, rng):
    noised = world.noised(t, schedule)
    x_t = noised.sample(30, rng)
    score, mean = noised.score(x_t), world.posterior_x0(x_t, t, schedule)[0]
    digits = 1e-13 * cancellation(t, schedule)
    np.testing.assert_allclose(tweedie.mean_from_score(score, x_t, t, schedule), mean, rtol=1e-9, atol=digits)
    found = tweedie.score_from_mean(mean, x_t, t, schedule)
    np.testing.assert_allclose(found, score, rtol=1e-9, atol=1e-11 / schedule.sigma2_bar[t])
    np.testing.assert_allclose(x0_from_eps(eps_from_score(score, t, schedule), x_t, t, schedule), mean, atol=1e-9)
    wrong = (x_t - schedule.sigma2_bar[t] * score) / schedule.lam_bar[t]
    assert np.abs(wrong - mean).max() > 1e-4                     # control: the sign of the score


@pytest.mark.parametrize("t", TIMES)
def test_C08_covariance_from_hessian_is_the_posterior_covariance(t, world, schedule, rng):
    noised = world.noised(t, schedule)
    x_t = noised.sample(30, rng)
    hessian, cov = noised.hessian(x_t), world.posterior_x0(x_t, t, schedule)[1]
    lam, v, digits = schedule.lam_bar[t], schedule.sigma2_bar[t], 1e-12 * cancellation(t, schedule)
    np.testing.assert_allclose(tweedie.covariance_from_hessian(hessian, t, schedule), cov, rtol=1e-8, atol=digits)
    found = tweedie.hessian_from_covariance(cov, t, schedule)
    np.testing.assert_allclose(v * found, v * hessian, rtol=1e-8, atol=1e-10)
    jacobian = -np.sqrt(v) * hessian
    np.testing.assert_allclose(tweedie.covariance_from_jacobian(jacobian, t, schedule), cov, rtol=1e-8, atol=digits)
    if t in (100, 300):                                          # control: the factor upside down
        assert np.abs(lam**2 / v * (np.eye(x_t.shape[1]) + v * hessian) - cov).max() > 0.5 * np.abs(cov).max()


def test_C08_the_jacobian_is_that_of_the_predicted_noise(schedule, rng):
    """By five-point differences of the exact E[eps | x_t], and, for a network's, by its symmetric part."""
    world, t, h = WORLDS["rotated"], 200, 2e-3
    denoiser, x_t = Denoiser.from_world(world, schedule), world.noised(200, schedule).sample(20, rng)
    jacobian = np.empty((20, 2, 2))
    for j, e in enumerate(h * np.eye(2)):
        f = [denoiser.predict(x_t + k * e, t).eps for k in (-2, -1, 1, 2)]
        jacobian[:, :, j] = (f[0] - 8 * f[1] + 8 * f[2] - f[3]) / (12 * h)
    cov = world.posterior_x0(x_t, t, schedule)[1]
    np.testing.assert_allclose(tweedie.covariance_from_jacobian(jacobian, t, schedule), cov, atol=1e-6)
    skew = jacobian + np.array([[0.0, 0.3], [-0.3, 0.0]])
    found = tweedie.covariance_from_jacobian(skew, t, schedule)
    np.testing.assert_allclose(found, tweedie.covariance_from_jacobian(jacobian, t, schedule), atol=1e-12)
    np.testing.assert_array_equal(found, found.swapaxes(1, 2))


@pytest.mark.parametrize("t", TIMES)
def test_C10_covariance_from_the_noise_moment_on_a_plain_sum(t, schedule, rng):
    """Data are five points, so that E[. | x_t] is a sum over them, and nothing of the mixture's formulas is used."""
    world = WORLDS["points"]
    lam, v = schedule.lam_bar[t], schedule.sigma2_bar[t]
    x_t = schedule.add_noise(world.sample(20, rng), t, rng.standard_normal((20, 3)))
    eps_i = (x_t[:, None, :] - lam * world.means) / np.sqrt(v)                                     # (N, 5, 3)
    w = np.exp(-0.5 * (eps_i**2).sum(axis=-1) + 0.5 * (eps_i**2).sum(axis=-1).min(axis=1, keepdims=True))
    w /= w.sum(axis=1, keepdims=True)
    eps, second = np.einsum("nk,nki->ni", w, eps_i), np.einsum("nk,nki,nkj->nij", w, eps_i, eps_i)
    deviation = world.means - np.einsum("nk,ki->ni", w, world.means)[:, None, :]
    cov = np.einsum("nk,nki,nkj->nij", w, deviation, deviation)
    digits = 1e-12 * cancellation(t, schedule)
    found = tweedie.covariance_from_noise_moment(second, eps, t, schedule)
    np.testing.assert_allclose(found, cov, rtol=1e-8, atol=digits)
    np.testing.assert_allclose(found, world.posterior_x0(x_t, t, schedule)[1], rtol=1e-8, atol=digits)
    if t >= 10:                                                  # control: without the mean's square
        assert np.abs(v / lam**2 * second - cov).max() > 0.1 * np.abs(cov).max()


@pytest.mark.parametrize("t", [100, 300, 700])
def test_E22_the_printed_second_formula_has_the_density_where_its_hessian_belongs(t, rng):
    world, lam, v = GaussianMixture.two_component(), LINEAR.lam_bar[t], LINEAR.sigma2_bar[t]
    noised = world.noised(t, LINEAR)
    x_t = noised.sample(50, rng)
    cov, eye = world.posterior_x0(x_t, t, LINEAR)[1], np.eye(1)
    printed = (v**2 * lam**2 * noised.log_density(x_t)[:, None, None] + v * eye) / lam**2
    correct = (v**2 * noised.hessian(x_t) + v * eye) / lam**2
    np.testing.assert_allclose(correct, cov, rtol=1e-8, atol=1e-12 * cancellation(t, LINEAR))
    assert np.abs(printed - cov).max() > 0.3 * np.abs(cov).max()


def test_E22_E23_on_gaussian_data():
    """N(0, 2.5) at t = 300: 0.946, and what the printed forms make of it."""
    world, t, x_t = gaussian_world(2.5), 300, np.array([[0.7]])
    lam, v, beta, alpha = LINEAR.lam_bar[t], LINEAR.sigma2_bar[t], LINEAR.beta[t], LINEAR.alpha[t]
    noised, exact = world.noised(t, LINEAR), world.posterior_x0(x_t, t, LINEAR)[1]
    assert exact[0, 0, 0] == pytest.approx(0.946, abs=5e-4)
    printed = (v**2 * lam**2 * noised.log_density(x_t) + v) / lam**2
    assert printed[0] == pytest.approx(1.047, abs=5e-4)
    eps = eps_from_score(noised.score(x_t), t, LINEAR)
    second = eps[:, :, None] * eps[:, None, :] + LINEAR.snr[t] * exact
    found = tweedie.covariance_from_noise_moment(second, eps, t, LINEAR)
    np.testing.assert_allclose(found, exact, rtol=1e-12)
    score = noised.score(x_t)[0, 0]
    assert 0 < beta**2 / alpha * (second[0, 0, 0] / beta - score**2) < 0.01                # the step's beta and alpha


@pytest.mark.parametrize("t", [20, 100, 300])
def test_E23_the_noise_moment_belongs_to_the_cumulative_kernel(t, rng):
    world = GaussianMixture.grid(rotation_degrees=30)
    noised = world.noised(t, LINEAR)
    x_t = noised.sample(50, rng)
    score, cov = noised.score(x_t), world.posterior_x0(x_t, t, LINEAR)[1]
    eps, outer = eps_from_score(score, t, LINEAR), score[:, :, None] * score[:, None, :]
    second = eps[:, :, None] * eps[:, None, :] + LINEAR.snr[t] * cov

    def form(noise, signal2):
        return noise**2 / signal2 * (second / noise - outer)
    np.testing.assert_allclose(form(1 - LINEAR.alpha_bar[t], LINEAR.alpha_bar[t]), cov, rtol=1e-8, atol=1e-11)
    printed = form(LINEAR.beta[t], LINEAR.alpha[t])
    assert np.abs(printed - cov).max() > 0.5 * np.abs(cov).max()


# ---- the reverse step, L18 in its exact version

@property_test
@given(mixtures(), schedules(), st.data())
def test_L18_reverse_moments_from_the_score_hold_for_any_mixture(world, schedule, data):
    """Against the exact mixture of x_s | x_t, and against the posterior's coefficients (G01)."""
    t = data.draw(st.integers(1, schedule.T))
    s = data.draw(st.integers(0, t - 1))
    noised, eye = world.noised(t, schedule), np.eye(world.means.shape[1])
    x_t = noised.sample(6, np.random.default_rng(t))
    score, hessian = noised.score(x_t), noised.hessian(x_t)
    mean, cov = tweedie.reverse_moments_from_score(score, hessian, x_t, s, t, schedule)
    reverse, digits = world.reverse(x_t, s, t, schedule), 1e-10 * cancellation(t, schedule)
    np.testing.assert_allclose(mean, reverse.mean(), rtol=1e-9, atol=digits)
    np.testing.assert_allclose(cov, reverse.cov(), rtol=1e-8, atol=digits)
    (a, b, var), (mean_x0, cov_x0) = schedule.posterior(s, t), world.posterior_x0(x_t, t, schedule)
    np.testing.assert_allclose(mean, a * mean_x0 + b * x_t, rtol=1e-9, atol=digits)
    np.testing.assert_allclose(cov, var * eye + a**2 * cov_x0, rtol=1e-8, atol=digits)
    only_mean, nothing = tweedie.reverse_moments_from_score(score, None, x_t, s, t, schedule)
    np.testing.assert_array_equal(only_mean, mean)
    assert nothing is None


@pytest.mark.parametrize("s, t", [(99, 100), (1, 300), (50, 300), (500, 1000)])
def test_L18_the_printed_form_is_of_first_order(s, t, world, schedule, rng):
    """x/lam + sigma2 score misses the factor 1/lam of the score: little for one step, a lot for a skip."""
    noised = world.noised(t, schedule)
    x_t, (lam_ts, sigma2_ts) = noised.sample(20, rng), schedule.between(s, t)
    score, exact = noised.score(x_t), world.reverse(x_t, s, t, schedule).mean()
    mean, _ = tweedie.reverse_moments_from_score(score, None, x_t, s, t, schedule)
    np.testing.assert_allclose(mean, exact, rtol=1e-9, atol=1e-12 * cancellation(t, schedule))
    missing = np.abs(x_t / lam_ts + sigma2_ts * score - exact).max()
    np.testing.assert_allclose(missing, np.abs((1 / lam_ts - 1) * sigma2_ts * score).max(), rtol=1e-6, atol=1e-12)
    assert missing > (1e-2 if t - s > 100 and schedule is LINEAR else 1e-8)


def test_L18_values_of_a_skip():
    """N(0, 2.5) from 300 to 1 at x = 0.7: 0.6910, and 0.8468 by the first-order form; one step: 0.69946 and 0.69947."""
    noised, x_t = gaussian_world(2.5).noised(300, LINEAR), np.array([[0.7]])
    score, hessian = noised.score(x_t), noised.hessian(x_t)
    for s, exact, first_order in ((1, 0.690958, 0.846790), (299, 0.699463, 0.699471)):
        mean, cov = tweedie.reverse_moments_from_score(score, hessian, x_t, s, 300, LINEAR)
        lam_ts, sigma2_ts = LINEAR.between(s, 300)
        assert mean[0, 0] == pytest.approx(exact, abs=1e-6)
        assert (x_t / lam_ts + sigma2_ts * score)[0, 0] == pytest.approx(first_order, abs=1e-6)
    assert cov[0, 0, 0] == pytest.approx(0.00607, abs=5e-6)


def test_C15_times_may_differ_per_point(schedule, rng):
    world, s, t = WORLDS["rotated"], np.array([0, 5, 9, 400]), np.array([1, 10, 300, 1000])
    x_t = world.sample(4, rng)
    parts = [world.noised(int(time), schedule) for time in t]
    score = np.concatenate([part.score(x_t[i:i + 1]) for i, part in enumerate(parts)])
    hessian = np.concatenate([part.hessian(x_t[i:i + 1]) for i, part in enumerate(parts)])
    mean, cov = tweedie.reverse_moments_from_score(score, hessian, x_t, s, t, schedule)
    second = rng.standard_normal((4, 2, 2))
    whole = (tweedie.mean_from_score(score, x_t, t, schedule), tweedie.covariance_from_hessian(hessian, t, schedule),
             tweedie.hessian_from_covariance(second, t, schedule), tweedie.score_from_mean(x_t, score, t, schedule),
             tweedie.covariance_from_noise_moment(second, score, t, schedule))
    for i in range(4):
        row, si, ti = slice(i, i + 1), int(s[i]), int(t[i])                                  # a batch of one
        one = tweedie.reverse_moments_from_score(score[row], hessian[row], x_t[row], si, ti, schedule)
        np.testing.assert_allclose(mean[row], one[0], rtol=1e-12)
        np.testing.assert_allclose(cov[row], one[1], rtol=1e-12)
        single = (tweedie.mean_from_score(score[row], x_t[row], ti, schedule),
                  tweedie.covariance_from_hessian(hessian[row], ti, schedule),
                  tweedie.hessian_from_covariance(second[row], ti, schedule),
                  tweedie.score_from_mean(x_t[row], score[row], ti, schedule),
                  tweedie.covariance_from_noise_moment(second[row], score[row], ti, schedule))
        for a, b in zip(whole, single, strict=True):
            np.testing.assert_allclose(a[row], b, rtol=1e-12)


# ---- C02, E20: learning a score

def features(x):
    return np.concatenate([np.ones_like(x), x, x**3, np.tanh(2 * x)], axis=1)               # (N, 4)


def expected_loss(theta, loss, x, p):
    """Mean of a loss over weighted points, and its gradient wrt the weights of a model linear in its features."""
    values, gradient = loss(features(x) @ theta[:, None])
    return p @ values, features(x).T @ (p * gradient[:, 0])


def noisy_pairs(world, t, schedule, nodes=241):
    """Weighted points (x_t, eps) over data and noise: a double trapezoidal sum, in which no score occurs."""
    (x0, p0), (eps, p1) = line(world, nodes), line(gaussian_world(1.0), nodes)
    x0, eps = np.repeat(x0, len(eps), axis=0), np.tile(eps, (len(x0), 1))
    return schedule.add_noise(x0, t, eps), eps, np.outer(p0, p1).ravel()


@pytest.mark.parametrize("schedule, t", [(LINEAR, 150), (LINEAR, 1000), (GENERAL, 400), (general_schedule(), 12)],
                         ids=["linear", "end", "general", "short"])
def test_C02_the_two_losses_differ_by_a_constant(schedule, t, rng):
    """Exactly: gradients agree for any parameters, and values differ by E tr Cov[eps | x_t] / sigma2_bar."""
    world, thetas = GaussianMixture.two_component(), rng.standard_normal((4, 4))
    noised = world.noised(t, schedule)
    x, p = line(noised)
    score, v = noised.score(x), schedule.sigma2_bar[t]
    x_t, eps, weight = noisy_pairs(world, t, schedule)
    offsets = []
    for theta in thetas:
        value, gradient = expected_loss(theta, lambda s: tweedie.score_matching(s, score), x, p)
        found, slope = expected_loss(
            theta, lambda s: tweedie.denoising_score_matching(s, eps, t, schedule), x_t, weight)
        np.testing.assert_allclose(slope, gradient, rtol=1e-9, atol=1e-9 * np.abs(gradient).max())
        offsets.append(found - value)
    expected = schedule.snr[t] / v * (p @ world.posterior_x0(x, t, schedule)[1][:, 0, 0])
    np.testing.assert_allclose(offsets, expected, rtol=1e-9, atol=1e-9 * (1 + found))
    assert schedule is not LINEAR or t == 1000 or expected > 0.1                # not a constant of zero


def test_E20_the_noise_has_to_be_that_of_the_examples_own_time(rng):
    """With one sigma^2 for all times the gradient is another: at the true score it isn't even zero."""
    world, theta = GaussianMixture.two_component(), rng.standard_normal(4)
    for t, other in ((150, 160), (150, 300)):
        x, p = line(world.noised(t, LINEAR))
        score, (x_t, eps, weight) = world.noised(t, LINEAR).score(x), noisy_pairs(world, t, LINEAR)
        _, gradient = expected_loss(theta, lambda s, v=score: tweedie.score_matching(s, v), x, p)

        def printed(s, time=other, eps=eps):
            return tweedie.denoising_score_matching(s, eps, time, LINEAR)
        _, slope = expected_loss(theta, printed, x_t, weight)
        assert np.abs(slope - gradient).max() > 1e-2 * np.abs(gradient).max()
        wrong_sigma = features(x_t).T @ (weight * printed(world.noised(t, LINEAR).score(x_t))[1][:, 0])
        right = tweedie.denoising_score_matching(world.noised(t, LINEAR).score(x_t), eps, t, LINEAR)[1]
        right = features(x_t).T @ (weight * right[:, 0])
        assert np.abs(right).max() < 1e-9 < 1e-2 < np.abs(wrong_sigma).max()


def test_C02_with_a_time_for_each_example(rng):
    """Random times, in three dimensions: the gradient on noise is that on the score, within 4 standard errors."""
    world, n = WORLDS["correlated"], 40_000
    t = rng.integers(1, 1001, n)
    eps = rng.standard_normal((n, 3))
    x_t = LINEAR.add_noise(world.sample(n, rng), t, eps)
    lam, v = LINEAR.lam_bar[t][:, None, None], LINEAR.sigma2_bar[t][:, None, None]
    precision = np.linalg.inv(lam**2 * world.covariances + v * np.eye(3))
    score, score_hat = -(precision @ x_t[:, :, None])[:, :, 0], -0.8 * x_t
    _, exact = tweedie.score_matching(score_hat, score)
    values, noisy = tweedie.denoising_score_matching(score_hat, eps, t, LINEAR)
    weight = v[:, 0, 0]                                           # keeps the variance of the estimate finite and small
    assert values.shape == (n,)
    for feature in (x_t[:, 0], x_t[:, 1] * x_t[:, 2], np.sin(x_t[:, 0])):
        difference = (weight * feature)[:, None] * (noisy - exact)
        assert np.abs([zscore(d) for d in difference.T]).max() < 4
    wrong = (weight * x_t[:, 0])[:, None] * (tweedie.denoising_score_matching(score_hat, -eps, t, LINEAR)[1] - exact)
    assert np.abs([zscore(d) for d in wrong.T]).max() > 20        # control: the noise with its sign lost


def test_C02_gradients_match_differences(rng):
    score_hat, score, eps = rng.standard_normal((3, 2, 4, 4, 1))
    t, direction, h = np.array([3, 700]), rng.standard_normal((2, 4, 4, 1)), 1e-5
    for loss in (lambda s: tweedie.score_matching(s, score),
                 lambda s: tweedie.denoising_score_matching(s, eps, t, LINEAR)):
        values, gradient = loss(score_hat)
        assert values.shape == (2,) and gradient.shape == score_hat.shape
        slope = (loss(score_hat + h * direction)[0] - loss(score_hat - h * direction)[0]).sum() / (2 * h)
        assert slope == pytest.approx((gradient * direction).sum(), rel=1e-7)
        assert slope != pytest.approx((gradient * direction).sum() / 2, rel=1e-2)


# ---- C07

def divergence(p, q, t, schedule):
    p, q = p.noised(t, schedule), q.noised(t, schedule)
    x, weight = line(q)
    return weight @ tweedie.fisher_divergence(p, q, x)


@pytest.mark.parametrize("t", [10, 100, 300, 1000])
def test_C07_fisher_divergence_of_gaussians(t, schedule):
    """Two means: lam^2 (m_p - m_q)^2 / v^2; two variances: (1/v_p - 1/v_q)^2 v_q."""
    lam2, v = schedule.lam_bar[t]**2, schedule.sigma2_bar[t]
    p, q, wide = GaussianMixture([1.0], [[0.4]], [[[0.5]]]), gaussian_world(0.5), gaussian_world(0.9)
    expected = lam2 * 0.16 / (lam2 * 0.5 + v)**2
    np.testing.assert_allclose(divergence(p, q, t, schedule), expected, rtol=1e-9, atol=1e-15)
    v_p, v_q = lam2 * 0.9 + v, lam2 * 0.5 + v
    np.testing.assert_allclose(divergence(wide, q, t, schedule), (1 / v_p - 1 / v_q)**2 * v_q, rtol=1e-9, atol=1e-15)
    np.testing.assert_allclose(divergence(q, wide, t, schedule), (1 / v_p - 1 / v_q)**2 * v_p, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("t", [100, 300, 500])
def test_C07_it_grows_with_the_distance_and_vanishes_only_at_equality(t, schedule):
    world = GaussianMixture.two_component()
    families = {
        "shift": [GaussianMixture(world.weights, world.means + d, world.covariances) for d in (0, 0.02, 0.1, 0.3, 0.6)],
        "apart": [GaussianMixture(world.weights, world.means * (1 + d), world.covariances) for d in (0, 0.1, 0.3, 0.6)],
        "wide": [GaussianMixture(world.weights, world.means, world.covariances * (1 + d)) for d in (0, 0.5, 2, 6)],
        "weights": [GaussianMixture([0.4 + d, 0.6 - d], world.means, world.covariances) for d in (0, 0.05, 0.1, 0.2)],
        "parts": [GaussianMixture([0.4, 0.6], [[-1.2], [0.8]], world.covariances)] + [
            GaussianMixture([0.4, 0.6 - w, w], [[-1.2], [0.8], [2.0]], np.full((3, 1, 1), 0.04)) for w in (0.01, 0.1)],
    }
    for name, family in families.items():
        found = np.array([divergence(p, world, t, schedule) for p in family])
        assert found[0] < 1e-20, name
        assert (np.diff(found) > 0).all() and found[1] > 1e-9, name


def test_C07_is_a_mean_over_draws_of_the_second_law(rng):
    world, other, t = WORLDS["rotated"], GaussianMixture.grid(rotation_degrees=20), 300
    p, q = other.noised(t, LINEAR), world.noised(t, LINEAR)
    values = tweedie.fisher_divergence(p, q, q.sample(2000, rng))
    assert values.shape == (2000,) and (values >= 0).all()
    np.testing.assert_allclose(tweedie.fisher_divergence(q, q, q.sample(10, rng)), 0)
    again = tweedie.fisher_divergence(p, q, q.sample(2000, rng))
    assert abs(values.mean() - again.mean()) < 4 * np.hypot(values.std(), again.std()) / np.sqrt(2000)
    assert values.mean() > 0.01


def test_C07_small_is_not_close_at_low_noise():
    """Exchanged weights of two separate components: invisible to the scores until the noise joins the two."""
    p = GaussianMixture([0.4, 0.6], [[-2.0], [2.0]], np.full((2, 1, 1), 0.04))
    q = GaussianMixture([0.6, 0.4], [[-2.0], [2.0]], np.full((2, 1, 1), 0.04))
    assert divergence(p, q, 1, LINEAR) < 1e-9 and divergence(p, q, 400, LINEAR) > 1e-3


# ---- E18: re-noising one estimate of x_0 does not measure the Hessian

@pytest.mark.parametrize("variance, t", [(1.0, 200), (0.25, 200), (4.0, 400)])
def test_E18_renoising_one_estimate_gives_the_square_of_the_scaled_hessian(variance, t, rng):
    """On N(0, tau^2) data: r = sigma2_bar / (lam_bar^2 tau^2 + sigma2_bar) is -sigma2_bar Hessian, and U is r^2."""
    world, M = gaussian_world(variance), 40_000
    denoiser, lam, v = Denoiser.from_world(world, LINEAR), LINEAR.lam_bar[t], LINEAR.sigma2_bar[t]
    r = v / (lam**2 * variance + v)
    x_t = np.array([[0.8]])
    assert -v * world.noised(t, LINEAR).hessian(x_t)[0, 0, 0] == pytest.approx(r, rel=1e-12)
    x0_hat = np.repeat(denoiser.predict(x_t, t).x0, M, axis=0)
    eps_hat = denoiser.predict(LINEAR.add_noise(x0_hat, t, rng.standard_normal((M, 1))), t).eps[:, 0]
    squares = (eps_hat - eps_hat.mean())**2 * M / (M - 1)                        # their mean is U
    assert abs(zscore(squares, r**2)) < 4
    assert abs(zscore(squares, r)) > 20 and r - r**2 > 0.1                       # what is printed
    # the identity would need re-noised states that are draws of q(x_t), and residuals in place of predictions
    x0, eps = world.sample(M, rng), rng.standard_normal((M, 1))
    predicted = denoiser.predict(LINEAR.add_noise(x0, t, eps), t).eps[:, 0]
    assert abs(zscore(predicted**2, r)) < 4                                      # v E[score^2], the Fisher information


# ---- arrays

def calls(score, hessian, x_t, t, schedule):
    s = np.asarray(t) - 1 if np.ndim(t) else t - 1
    return [tweedie.mean_from_score(score, x_t, t, schedule), tweedie.score_from_mean(score, x_t, t, schedule),
            *(convert(hessian, t, schedule) for convert in (
                tweedie.covariance_from_hessian, tweedie.hessian_from_covariance, tweedie.covariance_from_jacobian)),
            tweedie.covariance_from_noise_moment(hessian, score, t, schedule),
            *tweedie.reverse_moments_from_score(score, hessian, x_t, s, t, schedule),
            *tweedie.denoising_score_matching(score, x_t, t, schedule)]


@pytest.mark.parametrize("t", [1, 1000, np.array([1, 300, 1000])])
def test_precision_and_device(t, schedule, rng, fake):
    arrays = rng.standard_normal((3, 2)), rng.standard_normal((3, 2, 2)), rng.standard_normal((3, 2))
    exact = calls(*arrays, t, schedule)
    single = calls(*(a.astype(np.float32) for a in arrays), t, schedule)
    device = calls(*(fake.asarray(a) for a in arrays), t, schedule)
    for a, b, c in zip(exact, single, device, strict=True):
        assert b.dtype == np.float32 and a.dtype == np.float64 and array_module(c) is fake
        np.testing.assert_allclose(b, a, rtol=1e-4, atol=1e-5 * np.abs(a).max())
        np.testing.assert_array_equal(to_host(c), a)


def test_fisher_divergence_on_a_device(fake, rng):
    x = rng.standard_normal((4, 2))
    p, q = WORLDS["rotated"].noised(300, LINEAR), GaussianMixture.grid().noised(300, LINEAR)
    np.testing.assert_array_equal(to_host(tweedie.fisher_divergence(p, q, fake.asarray(x))),
                                  tweedie.fisher_divergence(p, q, x))


def test_means_of_images(rng):
    x_t, score = rng.standard_normal((2, 3, 4, 4, 2))
    t = np.array([1, 20, 1000])
    mean = tweedie.mean_from_score(score, x_t, t, LINEAR)
    np.testing.assert_allclose(mean, x0_from_eps(eps_from_score(score, t, LINEAR), x_t, t, LINEAR), rtol=1e-9)
    np.testing.assert_allclose(tweedie.score_from_mean(mean, x_t, t, LINEAR), score, rtol=1e-7, atol=1e-9)
    assert tweedie.reverse_moments_from_score(score, None, x_t, 0, t, LINEAR)[0].shape == x_t.shape


@pytest.mark.parametrize("call", [
    lambda x, m: tweedie.mean_from_score(x, x, 0, LINEAR),
    lambda x, m: tweedie.score_from_mean(x, x, np.array([0, 1]), LINEAR),
    lambda x, m: tweedie.covariance_from_hessian(m, 0, LINEAR),
    lambda x, m: tweedie.denoising_score_matching(x, x, 0, LINEAR),
    lambda x, m: tweedie.reverse_moments_from_score(x, m, x, 5, 5, LINEAR),
    lambda x, m: tweedie.reverse_moments_from_score(x, m, x, np.array([3, 9]), np.array([4, 8]), LINEAR),
])
def test_a_step_without_noise_is_refused(call):
    with pytest.raises(ValueError, match="later than s"):
        call(np.zeros((2, 2)), np.zeros((2, 2, 2)))
