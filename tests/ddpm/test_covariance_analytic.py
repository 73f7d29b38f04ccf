"""A-DDPM's one variance for each t: three forms of one number, what it is best at, and how well each is estimated."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar

from ddpm import gaussian
from ddpm.covariance import analytic
from ddpm.mixture import GaussianMixture
from ddpm.parameterization import eps_from_score
from nn.backend import array_module, to_host
from tests.ddpm.test_tweedie import (
    GENERAL,
    LINEAR,
    cancellation,
    gaussian_world,
    line,
    noisy_pairs,
    points_in_space,
)
from tests.helpers import general_schedule, mixtures, property_test, schedules, zscore

TWO = GaussianMixture.two_component()
ROTATED = GaussianMixture.grid(rotation_degrees=30)


@pytest.fixture(params=[LINEAR, GENERAL], ids=["linear", "general"])
def schedule(request):
    return request.param


def average_variance(world, t, schedule, nodes=601):
    """E Var[x_0 | x_t] of a world on the line, by quadrature over x_t."""
    x, p = line(world.noised(t, schedule), nodes)
    return p @ world.posterior_x0(x, t, schedule)[1][:, 0, 0]


def three_forms(world, t, schedule):
    """tau^2 from the score, from the predicted noise, and from residuals, on the line and by quadrature."""
    noised = world.noised(t, schedule)
    x, p = line(noised)
    from_score = p @ analytic.var_x0_from_score(noised.score(x), t, schedule)
    from_eps = p @ analytic.var_x0_from_eps(eps_from_score(noised.score(x), t, schedule), t, schedule)
    x, eps, p = noisy_pairs(world, t, schedule)
    eps_hat = eps_from_score(noised.score(x), t, schedule)
    return from_score, from_eps, p @ analytic.var_x0_from_residual(eps, eps_hat, t, schedule)


# ---- C06, C09: one number in three forms

@pytest.mark.parametrize("t", [1, 20, 100, 300, 700, 1000])
def test_C06_three_forms_of_the_average_variance(t, schedule):
    expected = average_variance(TWO, t, schedule)
    found = three_forms(TWO, t, schedule)
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12 * cancellation(t, schedule))
    np.testing.assert_allclose(found[2], expected, rtol=1e-9)                   # the residual form doesn't cancel


@property_test
@given(mixtures(), schedules(), st.data())
def test_C06_holds_for_any_world_on_the_line(world, schedule, data):
    world = GaussianMixture(world.weights, world.means[:, :1], world.covariances[:, :1, :1])
    t = data.draw(st.integers(1, schedule.T))
    noised = world.noised(t, schedule)
    x, p = line(noised, nodes=401)
    expected, digits = average_variance(world, t, schedule, 401), 1e-9 * cancellation(t, schedule)
    found = p @ analytic.var_x0_from_score(noised.score(x), t, schedule)
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=digits)
    # the same in terms of one reverse step: var + a^2 tau^2 = (1 - sigma2_ts E|score|^2/d) sigma2_ts / lam_ts^2
    s = data.draw(st.integers(0, t - 1))
    (a, _, var), (lam_ts, sigma2_ts) = schedule.posterior(s, t), schedule.between(s, t)
    squared_norm = p @ noised.score(x)[:, 0]**2
    np.testing.assert_allclose(var + a**2 * expected, (1 - sigma2_ts * squared_norm) * sigma2_ts / lam_ts**2,
                               rtol=1e-9, atol=digits)
    assert var <= var + a**2 * expected <= sigma2_ts / lam_ts**2 * (1 + 1e-9)


@pytest.mark.parametrize("t", [100, 300, 600])
@pytest.mark.parametrize("world", [ROTATED, points_in_space()], ids=["rotated", "points"])
def test_C09_is_the_average_trace_over_d(world, t, rng):
    """In two and three dimensions, within 4 standard errors of the differences; the sum of variances is d times it."""
    n, d = 20_000, world.means.shape[1]
    eps = rng.standard_normal((n, d))
    x_t = LINEAR.add_noise(world.sample(n, rng), t, eps)
    score, trace = world.noised(t, LINEAR).score(x_t), np.trace(world.posterior_x0(x_t, t, LINEAR)[1], axis1=1, axis2=2)
    eps_hat = eps_from_score(score, t, LINEAR)
    for values in (analytic.var_x0_from_score(score, t, LINEAR), analytic.var_x0_from_eps(eps_hat, t, LINEAR),
                   analytic.var_x0_from_residual(eps, eps_hat, t, LINEAR)):
        assert values.shape == (n,)
        assert abs(zscore(values - trace / d)) < 4
        assert t == 100 or abs(zscore(values - trace)) > 8


@pytest.mark.parametrize("t", [100, 300, 700])
def test_C09_is_the_argmin_of_the_averaged_kl(t):
    """E KL(q(x_0 | x_t) || N(mean, tau^2)), with the density of the posterior on a grid, minimised numerically."""
    x_t, p = line(TWO.noised(t, LINEAR), nodes=121)
    posterior = TWO.posterior_mixture(x_t, t, LINEAR)
    x0 = np.linspace(-2.6, 2.2, 1201)
    variances = posterior.covariances[:, 0, 0]
    density = sum(posterior.weights[:, k, None] * np.exp(gaussian.log_normal(x0, posterior.means[:, k], variances[k]))
                  for k in range(2)) * (x0[1] - x0[0])

    def averaged_kl(log_tau2, error=0.0):                                      # without the entropy, which is constant
        mean = posterior.mean() + error
        return -p @ (density * gaussian.log_normal(x0, mean, np.exp(log_tau2))).sum(axis=1)
    best = minimize_scalar(averaged_kl, bounds=(-15, 3), method="bounded", options={"xatol": 1e-9})
    expected = three_forms(TWO, t, LINEAR)[0]
    assert np.exp(best.x) == pytest.approx(expected, rel=1e-5)
    for factor in (0.9, 1.1, LINEAR.lam_bar[t]):                               # the last is the printed one (E21)
        assert averaged_kl(np.log(factor * expected)) > best.fun + 5e-4
    shifted = minimize_scalar(lambda log_tau2: averaged_kl(log_tau2, 0.2), bounds=(-15, 3), method="bounded",
                              options={"xatol": 1e-9})
    assert np.exp(shifted.x) == pytest.approx(expected + 0.04, rel=1e-5)       # a wrong mean adds its squared bias


def test_C09_the_residual_gives_the_best_variance_for_a_wrong_mean():
    """With eps_hat off by e(x): residual E Var + E e^2, score norm E Var - 2 E[eps e] - E e^2, too little."""
    t = 200
    x, eps, p = noisy_pairs(TWO, t, LINEAR)
    exact = eps_from_score(TWO.noised(t, LINEAR).score(x), t, LINEAR)
    error, factor = 0.2 * np.tanh(x) + 0.1, 1 / LINEAR.snr[t]
    average = average_variance(TWO, t, LINEAR)
    found = p @ analytic.var_x0_from_residual(eps, exact + error, t, LINEAR)
    assert found == pytest.approx(average + factor * (p @ error[:, 0]**2), rel=1e-9)
    other = p @ analytic.var_x0_from_eps(exact + error, t, LINEAR)
    expected = average - factor * (p @ (2 * exact * error + error**2)[:, 0])
    assert other == pytest.approx(expected, rel=1e-9) and other < average - 0.05 < average + 0.01 < found


def test_E21_the_printed_form_lacks_the_square():
    """N(0, 2.5), t = 300: 0.946, and 0.596 with lam_bar in place of lam_bar^2; on the mixture it is wrong as well."""
    for world, exact, printed in ((gaussian_world(2.5), 0.94627, 0.59579), (TWO, None, None)):
        t, (x, p) = 300, line(world.noised(300, LINEAR))
        lam, v = LINEAR.lam_bar[t], LINEAR.sigma2_bar[t]
        squared_norm = p @ world.noised(t, LINEAR).score(x)[:, 0]**2
        average = average_variance(world, t, LINEAR)
        assert (v - v**2 * squared_norm) / lam**2 == pytest.approx(average, rel=1e-9)
        assert (v - v**2 * squared_norm) / lam < 0.65 * average
        if exact:
            assert average == pytest.approx(exact, abs=5e-6)
            assert (v - v**2 * squared_norm) / lam == pytest.approx(printed, abs=5e-5)


# ---- how well each is estimated

@pytest.mark.parametrize("t, least, most", [(5, 0.05, 0.1), (200, 0.4, 0.6), (600, 8, 11), (800, 180, 240),
                                            (1000, 7e3, 9e3)])
def test_C06_standard_errors_of_the_two_estimates(t, least, most, rng):
    """Score norm over residual: below 1 at low noise, thousands at the end, where 1 - |eps_hat|^2/d is all error."""
    n = 10_000
    eps = rng.standard_normal((n, 2))
    x_t = LINEAR.add_noise(ROTATED.sample(n, rng), t, eps)
    eps_hat = eps_from_score(ROTATED.noised(t, LINEAR).score(x_t), t, LINEAR)
    norm = analytic.var_x0_from_eps(eps_hat, t, LINEAR)
    residual = analytic.var_x0_from_residual(eps, eps_hat, t, LINEAR)
    assert least < norm.std() / residual.std() < most
    if t == 1000:
        assert norm.std() * LINEAR.snr[t] == pytest.approx(1, rel=0.05)        # sqrt(2/d), d = 2
        assert norm.std() / np.sqrt(n) > 100 > 6.01 > residual.mean() - 4 * residual.std() / np.sqrt(n) > 5.8
        assert abs(zscore(residual, 6.01)) < 4                                 # the data's own variance: x_t is noise


# ---- bounds

@pytest.mark.parametrize("world, data_range", [(TWO, None), (points_in_space(), (-2.5, 2.5)), (ROTATED, (-4.5, 4.5))])
def test_C06_the_average_variance_lies_within_its_bounds(world, data_range, schedule, rng):
    for t in (1, 10, 100, 300, 600, 1000):
        x_t = world.noised(t, schedule).sample(4000, rng)
        average = np.trace(world.posterior_x0(x_t, t, schedule)[1], axis1=1, axis2=2).mean() / x_t.shape[1]
        bound = analytic.upper_bound(t, schedule, data_range)
        assert 0 <= average < 1.05 * bound and type(bound) is float
        assert bound <= analytic.upper_bound(t, schedule) == pytest.approx(1 / schedule.snr[t], rel=1e-12)
    assert data_range is None or analytic.upper_bound(1000, LINEAR, data_range) == (data_range[1])**2
    pointwise = ROTATED.posterior_x0(ROTATED.noised(100, LINEAR).sample(20_000, rng), 100, LINEAR)[1][:, 0, 0].max()
    assert pointwise > analytic.upper_bound(100, LINEAR)                       # it binds the average only


@property_test
@given(schedules(), st.data())
def test_C06_the_bound_of_a_reverse_step(schedule, data):
    t = data.draw(st.integers(1, schedule.T))
    s = data.draw(st.integers(0, t - 1))
    (a, _, var), (lam_ts, sigma2_ts) = schedule.posterior(s, t), schedule.between(s, t)
    np.testing.assert_allclose(var + a**2 * analytic.upper_bound(t, schedule), sigma2_ts / lam_ts**2, rtol=1e-9)


def test_bounds_of_several_times_and_bad_ranges():
    bounds = analytic.upper_bound(np.array([1, 1000]), LINEAR, (-1, 1))
    np.testing.assert_allclose(bounds, [analytic.upper_bound(1, LINEAR), 1])
    for bad in ((1, -1), (0, 0), (np.nan, 1)):
        with pytest.raises(ValueError, match="data_range must be"):
            analytic.upper_bound(5, LINEAR, bad)


# ---- arrays

def test_known_data_have_no_variance(rng):
    """One point mass: the score is the noise itself, and nothing is left at any t."""
    world = GaussianMixture([1.0], [[0.3, -0.7]], np.zeros((1, 2, 2)))
    for schedule, times in ((LINEAR, (1, 300, 1000)), (general_schedule(), (1, 20))):
        for t in times:
            eps = rng.standard_normal((500, 2))
            x_t = schedule.add_noise(world.sample(500, rng), t, eps)
            eps_hat = eps_from_score(world.noised(t, schedule).score(x_t), t, schedule)
            residual = analytic.var_x0_from_residual(eps, eps_hat, t, schedule)
            assert np.abs(residual).max() < 1e-9 and (residual >= 0).all()


@pytest.mark.parametrize("t", [1, 1000, np.array([1, 300, 1000])])
def test_images_precision_and_device(t, schedule, rng, fake):
    eps, eps_hat = rng.standard_normal((2, 3, 4, 4, 2))

    def calls(eps, eps_hat):
        return [analytic.var_x0_from_score(eps, t, schedule), analytic.var_x0_from_eps(eps_hat, t, schedule),
                analytic.var_x0_from_residual(eps, eps_hat, t, schedule)]
    exact = calls(eps, eps_hat)
    device = calls(fake.asarray(eps), fake.asarray(eps_hat))
    single = calls(eps.astype(np.float32), eps_hat.astype(np.float32))
    for a, b, c in zip(exact, device, single, strict=True):
        assert a.shape == (3,) and array_module(b) is fake and c.dtype == np.float64
        np.testing.assert_array_equal(to_host(b), a)
        np.testing.assert_allclose(c, a, rtol=1e-5, atol=1e-6 * np.abs(a).max())
    for i in range(3):
        row, time = slice(i, i + 1), int(np.broadcast_to(t, 3)[i])
        one = analytic.var_x0_from_residual(eps[row], eps_hat[row], time, schedule)
        np.testing.assert_allclose(one, exact[2][row], rtol=1e-12)
