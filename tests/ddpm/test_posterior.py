"""x_s | x_t, x_0 against Bayes' rule by quadrature, the tower rules, and the printed coefficients that fail them."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ddpm.gaussian import log_normal
from ddpm.mixture import GaussianMixture
from ddpm.posterior import Posterior, posterior_coefficients, renoise
from ddpm.schedule import NoiseSchedule
from nn.backend import array_module, to_host
from tests.helpers import general_schedule, property_test, schedules

LINEAR = NoiseSchedule.linear()


def bayes_moments(schedule, s, t, x0, x_t):
    """Mean and variance of q(x_s | x_t, x_0) ~ q(x_s | x_0) q(x_t | x_s), on a grid."""
    lam_ts, sigma2_ts = schedule.between(s, t)
    precision = 1 / schedule.sigma2_bar[s] + lam_ts**2 / sigma2_ts      # only to place the grid
    centre = (schedule.lam_bar[s] * x0 / schedule.sigma2_bar[s] + lam_ts * x_t / sigma2_ts) / precision
    x_s = centre + np.linspace(-14, 14, 2001) / np.sqrt(precision)
    log_q = (log_normal(x_s, schedule.lam_bar[s] * x0, schedule.sigma2_bar[s])
             + log_normal(x_t, lam_ts * x_s, sigma2_ts))
    q = np.exp(log_q - log_q.max())
    mean = (q * x_s).sum() / q.sum()
    return mean, (q * (x_s - mean)**2).sum() / q.sum()


# ---- L10, G02

@pytest.mark.parametrize("schedule", [LINEAR, NoiseSchedule.cosine(100), general_schedule()],
                         ids=["linear", "cosine", "general"])
@pytest.mark.parametrize("steps_back", [1, 5, None])
def test_L10_posterior_matches_bayes(schedule, steps_back):
    x0, x_t = 0.7, -1.1
    for t in (2, 7, schedule.T // 2, schedule.T):
        s = max(1, t - steps_back) if steps_back else 1
        a, b, var = schedule.posterior(s, t)
        mean, variance = bayes_moments(schedule, s, t, x0, x_t)
        np.testing.assert_allclose(a * x0 + b * x_t, mean, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(var, variance, rtol=1e-9)
        assert abs(a * x_t + b * x0 - mean) > 1e-2 * abs(a - b)         # control: a and b exchanged


@property_test
@given(schedules(), st.data())
def test_L10_tower_rules(schedule, data):
    """Averaging x_s | x_t, x_0 over x_t | x_0 gives x_s | x_0 back; x_s and x_t covary by lam_ts sigma2_bar_s."""
    s, t = sorted(data.draw(st.lists(st.integers(0, schedule.T), min_size=2, max_size=2, unique=True)))
    a, b, var = schedule.posterior(s, t)
    lam_ts, _ = schedule.between(s, t)
    np.testing.assert_allclose(a + b * schedule.lam_bar[t], schedule.lam_bar[s], rtol=1e-12)
    np.testing.assert_allclose(b**2 * schedule.sigma2_bar[t] + var, schedule.sigma2_bar[s], rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(b * schedule.sigma2_bar[t], lam_ts * schedule.sigma2_bar[s], rtol=1e-12, atol=1e-15)


@property_test
@given(schedules(), st.data())
def test_C15_skipping_a_time_is_walking_through_it(schedule, data):
    """Going t -> s -> r with x_0 known has the mean and covariance of going t -> r at once, for any r < s < t."""
    r, s, t = sorted(data.draw(st.lists(st.integers(0, schedule.T), min_size=3, max_size=3, unique=True)))
    near, far, both = schedule.posterior(r, s), schedule.posterior(s, t), schedule.posterior(r, t)
    np.testing.assert_allclose(near.a + near.b * far.a, both.a, rtol=1e-11)
    np.testing.assert_allclose(near.b * far.b, both.b, rtol=1e-11)
    np.testing.assert_allclose(near.var + near.b**2 * far.var, both.var, rtol=1e-10, atol=1e-15)


def test_L10_at_the_clean_end_x0_is_known():
    for schedule in (LINEAR, general_schedule()):
        for t in (1, 2, schedule.T):
            assert schedule.posterior(0, t) == (1.0, 0.0, 0.0)
    a, b, var = LINEAR.posterior(np.array([0, 3]), np.array([4, 4]))
    assert (a[0], b[0], var[0]) == (1.0, 0.0, 0.0) and (a[1], b[1], var[1]) == LINEAR.posterior(3, 4)


def test_E07_the_precision_form_breaks_at_the_clean_end():
    def printed(schedule, s, t):
        lam_ts, sigma2_ts = schedule.between(s, t)
        precision = 1 / schedule.sigma2_bar[s] + lam_ts**2 / sigma2_ts
        return schedule.lam_bar[s] / schedule.sigma2_bar[s] / precision, lam_ts / sigma2_ts / precision, 1 / precision

    np.testing.assert_allclose(LINEAR.posterior(7, 8), printed(LINEAR, 7, 8), rtol=1e-9)
    with np.errstate(divide="ignore", invalid="ignore"):
        assert np.isnan(printed(LINEAR, 0, 1)[0])
    assert LINEAR.posterior(0, 1) == (1.0, 0.0, 0.0)


def test_G02_variance_preserving_forms():
    t = np.arange(2, 1001)
    beta, alpha, abar, abar_1 = LINEAR.beta[t], LINEAR.alpha[t], LINEAR.alpha_bar[t], LINEAR.alpha_bar[t - 1]
    a, b, var = LINEAR.posterior(t - 1, t)
    np.testing.assert_allclose(a, np.sqrt(abar_1) * beta / (1 - abar), rtol=1e-9)
    np.testing.assert_allclose(b, np.sqrt(alpha) * (1 - abar_1) / (1 - abar), rtol=1e-9)
    np.testing.assert_allclose(var, (1 - abar_1) / (1 - abar) * beta, rtol=1e-9)


def test_G02_values_of_the_usual_schedule():
    for t, a in ((2, 0.5453), (3, 0.3887), (10, 0.1473), (100, 0.0191), (500, 0.00307)):
        assert LINEAR.posterior(t - 1, t).a == pytest.approx(a, rel=5e-3)


@pytest.mark.parametrize("t", [2, 10, 100, 500])
def test_E08_E09_printed_coefficients_fail_bayes(t):
    beta, abar, abar_1 = LINEAR.beta[t], LINEAR.alpha_bar[t], LINEAR.alpha_bar[t - 1]
    x0, x_t = 0.7, 1.9
    mean, variance = bayes_moments(LINEAR, t - 1, t, x0, x_t)
    a, b, _ = LINEAR.posterior(t - 1, t)
    printed_a = np.sqrt(abar) * beta / (1 - abar)
    printed_b = np.sqrt(abar) * (1 - abar_1) / (1 - abar)
    assert abs(a * x0 + b * x_t - mean) < 1e-9
    assert abs(printed_a * x0 + b * x_t - mean) > 1e-6                  # E08: small, sqrt(alpha_t) is near one
    assert abs(a * x0 + printed_b * x_t - mean) > 1e-5                  # E09
    assert abs(a * x0 + printed_b * x_t - mean) > 0.02 or t < 100


# ---- L08: the two fixed variances, on data whose reverse step is known by quadrature

def reverse_variance(schedule, s, t, spread, x_t):
    """Var[x_s | x_t] and the density of x_t; data are N(-m, c^2) or N(m, c^2), m = 0.95 spread, c = 0.3 spread."""
    x0 = np.linspace(-5.5, 5.5, 2201)[:, None] * spread
    data = sum(np.exp(log_normal(x0, sign * 0.95 * spread, 0.09 * spread**2)) for sign in (-1, 1))
    joint = data * np.exp(log_normal(x_t, schedule.lam_bar[t] * x0, schedule.sigma2_bar[t]))
    density = joint.sum(axis=0)
    mean = (joint * x0).sum(axis=0) / density
    var_x0 = (joint * (x0 - mean)**2).sum(axis=0) / density
    a, _, var = schedule.posterior(s, t)
    return var + a**2 * var_x0, density / density.sum()


@pytest.mark.parametrize("t", [2, 50, 200, 400, 1000])
def test_L08_the_fixed_variances_bracket_the_average_on_unit_variance_data(t):
    spread = 1 / np.sqrt(0.95**2 + 0.09)
    variance, density = reverse_variance(LINEAR, t - 1, t, spread, np.linspace(-5, 5, 501))
    average = (variance * density).sum()
    lower, upper = LINEAR.posterior(t - 1, t).var, LINEAR.between(t - 1, t)[1]
    assert lower * (1 - 1e-9) <= average <= upper * (1 + 1e-9)
    assert (variance >= lower * (1 - 1e-9)).all()


def test_L08_where_the_bracket_fails():
    """The upper one fails at single points (between the modes), and on average for data of a larger variance."""
    x_t, t = np.linspace(-5, 5, 501), 150
    upper = LINEAR.between(t - 1, t)[1]
    spread = 1 / np.sqrt(0.95**2 + 0.09)
    variance, _ = reverse_variance(LINEAR, t - 1, t, spread, x_t)
    assert variance[250] > 1.01 * upper and variance[0] < upper
    variance, density = reverse_variance(LINEAR, 599, 600, 3 * spread, 3 * x_t)
    assert (variance * density).sum() > LINEAR.between(599, 600)[1]


def test_E31_the_large_variance_belongs_to_the_later_time():
    """On N(0, 1) data the step t+1 -> t has variance sigma2_{t+1}; printed is sigma2_t, a sixth too small at t = 1."""
    schedule, t = LINEAR, 1
    a, _, var = schedule.posterior(t, t + 1)
    exact = var + a**2 * schedule.sigma2_bar[t + 1]                     # Var[x0 | x_t] = sigma2_bar for unit variance
    np.testing.assert_allclose(exact, schedule.sigma2[t + 1], rtol=1e-9)
    np.testing.assert_allclose(schedule.between(t, t + 1)[1], exact, rtol=1e-9)
    assert schedule.sigma2[t] < 0.9 * exact


# ---- C03: the re-noise step, and what it is not

@property_test
@given(schedules(), st.floats(0, 9), st.data())
def test_C03_renoise_keeps_the_marginal_and_not_the_joint(schedule, variance, data):
    """On N(0, tau^2) data, by linear maps: x_s has its own variance, and cov(x_s, x_t) is lam_ts sigma2_bar_s short."""
    t = data.draw(st.integers(1, schedule.T))
    s = data.draw(st.integers(0, t - 1))
    lam_ts, _ = schedule.between(s, t)
    spread_s, spread_t = (schedule.lam_bar[i]**2 * variance + schedule.sigma2_bar[i] for i in (s, t))
    gain = schedule.lam_bar[t] * variance / spread_t                                   # E[x0 | x_t] = gain x_t
    var_x0 = variance * schedule.sigma2_bar[t] / spread_t
    moments = {}
    for name, (a, b, var) in (("chain", schedule.posterior(s, t)), ("renoise", renoise(s, t, schedule))):
        slope = a * gain + b
        moments[name] = slope**2 * spread_t + a**2 * var_x0 + var, slope * spread_t    # Var[x_s], cov(x_s, x_t)
    np.testing.assert_allclose([v for v, _ in moments.values()], spread_s, rtol=1e-9, atol=1e-14)
    np.testing.assert_allclose(moments["chain"][1], lam_ts * spread_s, rtol=1e-9, atol=1e-14)
    np.testing.assert_allclose(moments["renoise"][1], schedule.lam_bar[s] * schedule.lam_bar[t] * variance,
                               rtol=1e-9, atol=1e-14)
    np.testing.assert_allclose(moments["chain"][1] - moments["renoise"][1], lam_ts * schedule.sigma2_bar[s],
                               rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize("schedule", [LINEAR, general_schedule()], ids=["linear", "general"])
@pytest.mark.parametrize("back", [1, 10, None])
def test_C03_on_a_mixture(back, schedule):
    """Densities by quadrature over x_t: the law of x_s comes out either way; E[x_s x_t] tells them apart (E19)."""
    world, t = GaussianMixture.two_component(), schedule.T * 3 // 10 + 6
    s = max(0 if back is None else t - back, 1)
    noised = world.noised(t, schedule)
    z = np.linspace(-10, 10, 801)
    p = np.exp(-0.5 * z * z)
    x_t = (noised.means + np.sqrt(noised.covariances[:, :, 0]) * z).reshape(-1, 1)
    p = (noised.weights[:, None] * p / p.sum()).ravel()
    posterior = world.posterior_mixture(x_t, t, schedule)
    x_s = np.linspace(-3, 3, 41)
    law = np.exp(world.noised(s, schedule).log_density(x_s[:, None]))
    product = {}
    for name, (a, b, var) in (("chain", schedule.posterior(s, t)), ("renoise", renoise(s, t, schedule))):
        means, variances = a * posterior.means[:, :, 0] + b * x_t, a**2 * posterior.covariances[:, 0, 0] + var
        density = sum(posterior.weights[:, k, None] * np.exp(log_normal(x_s, means[:, k, None], variances[k]))
                      for k in range(2))
        np.testing.assert_allclose(p @ density, law, rtol=1e-7, atol=1e-9)
        product[name] = p @ ((posterior.weights * means).sum(axis=1) * x_t[:, 0])
    lam_ts, _ = schedule.between(s, t)
    exact = lam_ts * world.noised(s, schedule).cov()[0, 0]                             # the world's mean is 0
    assert product["chain"] == pytest.approx(exact, rel=1e-9)
    assert product["renoise"] == pytest.approx(exact - lam_ts * schedule.sigma2_bar[s], rel=1e-9)


def test_E19_renoise_is_not_the_reverse_of_the_chain():
    """N(0, 2.5), t = 300: x_299 | x_300 has slope 0.99923 and variance 0.00607, and printed 0.62338 and 0.97857."""
    s, t, variance = 299, 300, 2.5
    spread = LINEAR.lam_bar[t]**2 * variance + LINEAR.sigma2_bar[t]
    gain, var_x0 = LINEAR.lam_bar[t] * variance / spread, variance * LINEAR.sigma2_bar[t] / spread

    def step(a, b, var):
        return a * gain + b, var + a**2 * var_x0
    assert step(*LINEAR.posterior(s, t)) == (pytest.approx(0.99923, abs=5e-6), pytest.approx(0.00607, abs=5e-6))
    assert step(*renoise(s, t, LINEAR)) == (pytest.approx(0.62338, abs=5e-6), pytest.approx(0.97857, abs=5e-6))
    # Bayes' rule: cov(x_s, x_t) / Var[x_t], and what is left of Var[x_s]
    lam_ts, _ = LINEAR.between(s, t)
    spread_s = LINEAR.lam_bar[s]**2 * variance + LINEAR.sigma2_bar[s]
    exact = lam_ts * spread_s / spread, spread_s - (lam_ts * spread_s)**2 / spread
    np.testing.assert_allclose(step(*LINEAR.posterior(s, t)), exact, rtol=1e-9)
    assert abs(step(*renoise(s, t, LINEAR))[0] - exact[0]) > 0.3


def test_E24_a_step_that_averages_another_kernel_is_not_the_reverse_step():
    """On the mixture, 300 to 299: q(x_t | x_t) stays where it is, q(x_t | x_0) has all the noise of the way up."""
    world, s, t, x_t = GaussianMixture.two_component(), 299, 300, np.array([[-1.0], [0.1], [0.8]])
    exact, (mean_x0, cov_x0) = world.reverse(x_t, s, t, LINEAR), world.posterior_x0(x_t, t, LINEAR)

    def moments(step):
        return step.mean(mean_x0, x_t), step.var + step.a**2 * cov_x0
    mean, cov = moments(LINEAR.posterior(s, t))
    np.testing.assert_allclose(mean, exact.mean(), rtol=1e-9)
    np.testing.assert_allclose(cov, exact.cov(), rtol=1e-9)
    stays, far = moments(Posterior(0.0, 1.0, 0.0)), moments(Posterior(LINEAR.lam_bar[t], 0.0, LINEAR.sigma2_bar[t]))
    np.testing.assert_array_equal(stays[0], x_t)
    assert (stays[1] == 0).all() and np.abs(stays[0] - exact.mean()).min() > 1e-4
    assert (far[1] > 50 * exact.cov()).all() and np.abs(far[0] - exact.mean()).max() > 0.1


def test_E29_the_renoise_mean_with_the_chains_variance_collapses():
    """On N(0, 1) data, E[x0 | x_t] = lam_bar_t x_t: of variance 1 the printed chain keeps 0.02, DDPM's all."""
    def chain(step, variances):
        variance = {LINEAR.T: 1.0}
        for t in range(LINEAR.T, 0, -1):
            a, b, _ = step(t - 1, t)
            variance[t - 1] = (a * LINEAR.lam_bar[t] + b)**2 * variance[t] + variances[t]
        return variance

    def forgetful(s, t):
        return renoise(s, t, LINEAR)
    t = np.arange(1, LINEAR.T + 1)
    beta, small, own = LINEAR.beta, np.zeros(LINEAR.T + 1), np.zeros(LINEAR.T + 1)
    a, _, small[1:] = LINEAR.posterior(t - 1, t)
    own[1:] = LINEAR.sigma2_bar[:-1] + LINEAR.lam_bar[:-1]**2 * LINEAR.sigma2_bar[1:]  # with a^2 Var[x0 | x_t], a = lam
    np.testing.assert_allclose(small[1:] + a**2 * LINEAR.sigma2_bar[1:], beta[1:], rtol=1e-9)     # beta is exact here
    printed = chain(forgetful, beta)
    assert printed[999] == pytest.approx(0.0200, abs=5e-5) and printed[499] == pytest.approx(0.010, abs=5e-4)
    assert printed[0] == pytest.approx(0.026, abs=5e-4)
    assert max(v for time, v in chain(forgetful, small).items() if time < LINEAR.T) < 0.03
    for variance in (chain(LINEAR.posterior, beta), chain(forgetful, own)):            # each mean with its own variance
        np.testing.assert_allclose(list(variance.values()), 1, rtol=1e-9)
    assert 0.5 < chain(LINEAR.posterior, small)[0] < 1                                 # "small", and still no collapse


def test_C03_renoise_at_the_ends_and_for_arrays(rng):
    """At s = 0 nothing is added to x_0, as in the chain; the member of the DDIM family with all of the variance."""
    for schedule in (LINEAR, general_schedule()):
        for t in (1, 2, schedule.T):
            assert renoise(0, t, schedule) == schedule.posterior(0, t) == (1.0, 0.0, 0.0)
    assert all(type(v) is float for v in renoise(3, 9, LINEAR))
    several = renoise(np.array([0, 3, 8]), np.array([4, 4, 1000]), LINEAR)
    for i, (s, t) in enumerate(((0, 4), (3, 4), (8, 1000))):
        assert tuple(v[i] for v in several) == renoise(s, t, LINEAR)
    assert all(v.shape == (2,) and v.dtype == np.float64 for v in renoise(3, np.array([5, 6]), LINEAR))
    x0, x_t = rng.standard_normal((2, 3, 2, 2, 1))
    np.testing.assert_array_equal(renoise(3, 9, LINEAR).mean(x0, x_t), LINEAR.lam_bar[3] * x0)
    for s, t in ((5, 5), (6, 5), (np.array([1, 5]), np.array([2, 5]))):
        with pytest.raises(ValueError, match="earlier"):
            renoise(s, t, LINEAR)


# ---- arrays

def test_mean_broadcasts_over_the_image(rng, fake):
    x0, x_t = rng.standard_normal((2, 3, 4, 4, 2))
    s, t = np.array([0, 4, 9]), np.array([1, 7, 10])
    posterior = LINEAR.posterior(s, t)
    mean = posterior.mean(x0, x_t)
    for i in range(3):
        single = LINEAR.posterior(int(s[i]), int(t[i]))
        np.testing.assert_allclose(mean[i], single.mean(x0[i], x_t[i]), rtol=1e-14)
    device = posterior.mean(fake.asarray(x0), fake.asarray(x_t))
    assert array_module(device) is fake
    np.testing.assert_array_equal(to_host(device), mean)
    x0_32, x_t_32 = x0.astype(np.float32), x_t.astype(np.float32)
    assert posterior.mean(x0_32, x_t_32).dtype == single.mean(x0_32, x_t_32).dtype == np.float32


def test_coefficients_are_python_floats_for_int_times():
    assert all(type(v) is float for v in LINEAR.posterior(3, 9))
    assert all(v.shape == (2,) and v.dtype == np.float64 for v in LINEAR.posterior(3, np.array([5, 6])))
    assert posterior_coefficients(1.0, 0.0, 0.9, 0.19) == (1.0, 0.0, 0.0)
