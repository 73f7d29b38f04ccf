"""The four predictions are one: round trips, errors in proportion, the reverse mean, and the score of Gaussian data."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ddpm import parameterization as par
from ddpm.elbo import expected_log_reverse, step_kl
from ddpm.gaussian import log_normal
from ddpm.schedule import NoiseSchedule
from nn.backend import array_module, per_example, to_host
from tests.helpers import general_schedule, property_test, schedules

LINEAR = NoiseSchedule.linear()
both = pytest.mark.parametrize("schedule", [LINEAR, general_schedule(), NoiseSchedule.variance_exploding(20)],
                               ids=["VP", "general", "VE"])


def example(schedule, rng, shape=(4, 3, 3, 2)):
    """x0, eps, x_t and the four predictions that all say (x0, eps), at t = 1, ..., T."""
    t = np.array([1, 2, schedule.T // 2, schedule.T])
    x0, eps = rng.standard_normal((2, *shape))
    x_t = schedule.add_noise(x0, t, eps)
    l, n = per_example(schedule.lam_bar[t], x0), per_example(np.sqrt(schedule.sigma2_bar[t]), x0)
    return t, x_t, {"eps": eps, "x0": x0, "v": (l * eps - n * x0) / np.sqrt(l**2 + n**2), "score": -eps / n}


@both
@pytest.mark.parametrize("source, target", list(product(par.KINDS, par.KINDS)))
def test_L22_conversions(schedule, source, target, rng):
    t, x_t, predictions = example(schedule, rng)
    converted = par.convert(predictions[source], source, target, x_t, t, schedule)
    # x_0 is known from x_T only to the digits that lam_bar_T leaves, and eps from x_1 only to those of sigma_bar_1
    np.testing.assert_allclose(converted, predictions[target], rtol=1e-9, atol=1e-10)
    for i, time in enumerate(t):
        one = slice(i, i + 1)
        single = par.convert(predictions[source][one], source, target, x_t[one], int(time), schedule)
        np.testing.assert_allclose(single, converted[one], rtol=1e-9, atol=1e-10)


@both
def test_L22_single_functions(schedule, rng):
    t, x_t, p = example(schedule, rng)
    for value, expected in (
            (par.x0_from_eps(p["eps"], x_t, t, schedule), p["x0"]),
            (par.eps_from_x0(p["x0"], x_t, t, schedule), p["eps"]),
            (par.v_from_eps(p["eps"], x_t, t, schedule), p["v"]),
            (par.eps_from_v(p["v"], x_t, t, schedule), p["eps"]),
            (par.score_from_eps(p["eps"], t, schedule), p["score"]),
            (par.eps_from_score(p["score"], t, schedule), p["eps"])):
        np.testing.assert_allclose(value, expected, rtol=1e-9, atol=1e-10)


@both
@pytest.mark.parametrize("kind", par.KINDS)
def test_L22_squared_errors_are_in_proportion(schedule, kind, rng):
    t, x_t, predictions = example(schedule, rng)
    eps_hat = predictions["eps"] + 0.1 * rng.standard_normal(x_t.shape)
    error = par.convert(eps_hat, "eps", kind, x_t, t, schedule) - predictions[kind]
    ratio = (error**2).sum(axis=(1, 2, 3)) / ((eps_hat - predictions["eps"])**2).sum(axis=(1, 2, 3))
    np.testing.assert_allclose(ratio, par.squared_error_ratio(kind, t, schedule), rtol=1e-9)
    if kind == "x0":
        np.testing.assert_allclose(ratio, 1 / schedule.snr[t], rtol=1e-9)


@property_test
@given(schedules(), st.data())
def test_L22_v_has_unit_variance_and_its_errors_do_not_grow(schedule, data):
    """In any schedule (x_t, r v)/r is (x0, eps) turned by an angle; the plain l eps - n x0 has variance r^2."""
    t = data.draw(st.integers(1, schedule.T))
    l, n = schedule.lam_bar[t], np.sqrt(schedule.sigma2_bar[t])
    x0, eps, error = np.random.default_rng(0).standard_normal((3, 5))
    x_t = schedule.add_noise(x0, t, eps)
    v = par.v_from_eps(eps, x_t, t, schedule)
    scaled = x_t / np.sqrt(schedule.marginal_var[t])
    np.testing.assert_allclose(scaled**2 + v**2, x0**2 + eps**2, rtol=1e-9)
    turn = np.array([[l, n], [-n, l]]) / np.sqrt(l**2 + n**2)
    np.testing.assert_allclose([scaled, v], turn @ [x0, eps], rtol=1e-9, atol=1e-10)
    for kind in ("x0", "eps"):
        moved = par.convert(v + error, "v", kind, x_t, t, schedule) - par.convert(v, "v", kind, x_t, t, schedule)
        assert (abs(moved) <= abs(error) * (1 + 1e-9)).all()


@property_test
@given(schedules(), st.data())
def test_L22_derivatives_of_eps_from_v(schedule, data):
    """eps is linear in x_t and in v, so that a difference of any length gives the slope."""
    times = np.array(data.draw(st.lists(st.integers(1, schedule.T), min_size=1, max_size=4)))
    x_t, v, dx, dv = np.random.default_rng(0).standard_normal((4, len(times), 3))
    for t in (times, int(times[0])):
        of_x, of_v = (per_example(w, x_t) for w in par.eps_from_v_derivatives(t, schedule))
        moved = par.eps_from_v(v + dv, x_t + dx, t, schedule) - par.eps_from_v(v, x_t, t, schedule)
        np.testing.assert_allclose(moved, of_x * dx + of_v * dv, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(per_example(par.squared_error_ratio("v", t, schedule), v) * of_v**2, 1, rtol=1e-9)


@both
@pytest.mark.parametrize("kind", par.KINDS)
def test_L13_weighted_losses_equal_the_bounds_step(schedule, kind, rng):
    """weight |error|^2 is what the step's KL, and E log p, lose by the error, whatever is predicted (L12, L13, L22)."""
    _, x_t, predictions = example(schedule, rng)
    s, t = np.array([1, 1, 4, 7]), np.array([2, 3, 5, 20])
    x0, eps = predictions["x0"], predictions["eps"]
    x_t = schedule.add_noise(x0, t, eps)
    target = par.convert(eps, "eps", kind, x_t, t, schedule)
    guess = target + 0.1 * rng.standard_normal(x_t.shape)
    var = 1.3 * schedule.posterior(s, t).var
    mean = schedule.posterior(s, t).mean(par.convert(guess, kind, "x0", x_t, t, schedule), x_t)
    perfect = schedule.posterior(s, t).mean(x0, x_t)
    weighted = per_example(par.bound_weight(kind, s, t, var, schedule), x_t) * (guess - target)**2
    var = per_example(var, x_t)
    for term in (lambda m: step_kl(x0, x_t, m, var, s, t, schedule),
                 lambda m: -expected_log_reverse(x0, x_t, m, var, s, t, schedule)):
        np.testing.assert_allclose(term(mean) - term(perfect), weighted, rtol=1e-7, atol=1e-10)


def test_L13_weight_of_x0_is_a_squared_over_twice_the_variance():
    a, _, var = LINEAR.posterior(9, 10)
    assert par.bound_weight("x0", 9, 10, var, LINEAR) == pytest.approx(a**2 / (2 * var), rel=1e-12)
    beta, alpha, abar = LINEAR.beta[10], LINEAR.alpha[10], LINEAR.alpha_bar[10]
    weight = par.bound_weight("eps", 9, 10, var, LINEAR)
    assert weight == pytest.approx(beta**2 / (2 * var * alpha * (1 - abar)), rel=1e-9)


# ---- U02, U03

@property_test
@given(schedules(), st.data())
def test_U02_reverse_mean_equals_the_posterior_mean(schedule, data):
    s, t = sorted(data.draw(st.lists(st.integers(0, schedule.T), min_size=2, max_size=2, unique=True)))
    rng = np.random.default_rng(0)
    x0, eps = rng.standard_normal((2, 3, 4))
    x_t = schedule.add_noise(x0, t, eps)
    np.testing.assert_allclose(par.reverse_mean_from_eps(eps, x_t, s, t, schedule),
                               schedule.posterior(s, t).mean(x0, x_t), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("t", [1, 2, 10, 500, 1000])
def test_U02_as_printed_and_E13_its_misprint(t, rng):
    x0, eps = rng.standard_normal((2, 3, 4, 4, 1))
    x_t = LINEAR.add_noise(x0, t, eps)
    mean = LINEAR.posterior(t - 1, t).mean(x0, x_t)
    beta, alpha, abar = LINEAR.beta[t], LINEAR.alpha[t], LINEAR.alpha_bar[t]
    correct = (x_t - beta / np.sqrt(1 - abar) * eps) / np.sqrt(alpha)
    printed = (x_t - beta / np.sqrt(1 - alpha) * eps) / np.sqrt(alpha)
    np.testing.assert_allclose(par.reverse_mean_from_eps(eps, x_t, t - 1, t, LINEAR), correct, rtol=1e-12)
    np.testing.assert_allclose(correct, mean, rtol=1e-9, atol=1e-11)
    if t > 1:                                                           # at t = 1 the two are one
        assert abs(printed - mean).max() > 1e-3


@both
def test_U03_noise_is_minus_the_scaled_score_of_gaussian_data(schedule):
    """For N(m, tau^2) data q(x_t) is Gaussian; its score by finite differences is -E[eps | x_t]/sqrt(sigma2_bar_t)."""
    m, tau2, x = 0.4, 0.3, np.linspace(-2, 2, 9)
    for t in (1, 5, schedule.T):
        lam_bar, sigma2_bar = schedule.lam_bar[t], schedule.sigma2_bar[t]
        total = lam_bar**2 * tau2 + sigma2_bar
        eps = np.sqrt(sigma2_bar) * (x - lam_bar * m) / total           # E[eps | x_t], by Gaussian conditioning
        h = 1e-4 * np.sqrt(total)
        score = (log_normal(x + h, lam_bar * m, total) - log_normal(x - h, lam_bar * m, total)) / (2 * h)
        np.testing.assert_allclose(par.score_from_eps(eps, t, schedule), score, rtol=1e-7, atol=1e-8)
        assert abs(-eps - score).max() > 0.1 or t == schedule.T         # control: the scale left out


# ---- bad input, dtypes and devices

def test_bad_input():
    x = np.zeros((2, 3))
    for t in (0, np.array([1, 0]), -1):
        for call in (lambda t=t: par.eps_from_x0(x, x, t, LINEAR), lambda t=t: par.eps_from_v_derivatives(t, LINEAR)):
            with pytest.raises(ValueError, match="t must be at least 1"):
                call()
    with pytest.raises(ValueError, match="one of eps, x0, v, score"):
        par.convert(x, "noise", "x0", x, 3, LINEAR)
    with pytest.raises(ValueError, match="one of eps"):
        par.bound_weight("mu", 2, 3, 1.0, LINEAR)
    with pytest.raises(ValueError, match="var must be > 0"):
        par.bound_weight("x0", 0, 1, 0.0, LINEAR)
    with pytest.raises(ValueError, match="s must be earlier"):
        par.reverse_mean_from_eps(x, x, 3, 3, LINEAR)


@pytest.mark.parametrize("source, target", list(product(par.KINDS, par.KINDS)))
def test_float32_and_device(source, target, rng, fake):
    t, x_t, predictions = example(LINEAR, rng)
    x_t, value = x_t.astype(np.float32), predictions[source].astype(np.float32)
    single = par.convert(value, source, target, x_t, t, LINEAR)
    device = par.convert(fake.asarray(value), source, target, fake.asarray(x_t), t, LINEAR)
    assert single.dtype == device.dtype == np.float32 and array_module(device) is fake
    np.testing.assert_array_equal(to_host(device), single)
    mean = par.reverse_mean_from_eps(fake.asarray(value), fake.asarray(x_t), t - 1, t, LINEAR)
    np.testing.assert_array_equal(to_host(mean), par.reverse_mean_from_eps(value, x_t, t - 1, t, LINEAR))
    assert [transfer.direction for transfer in fake.transfers].count("to_host") == 2       # only those of this test
