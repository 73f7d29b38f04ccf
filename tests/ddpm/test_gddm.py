"""GDDM's equations G02-G07, its loss and its variance head; the misprints of the poster are the negative controls."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ddpm import ddpm, gaussian, gddm
from ddpm.schedule import NoiseSchedule
from tests.ddpm.test_ddpm import BIN, SCHEDULES, batch, numeric_gradient, relative_error, run_on
from tests.helpers import mixtures, property_test, schedules

VP = NoiseSchedule.linear(1000)
PAIRS = [(1, 2), (2, 3), (9, 10), (3, 20), (1, 25)]


@pytest.fixture(params=SCHEDULES)
def schedule(request):
    return SCHEDULES[request.param]


def integrate(f, mean, std):
    """Trapezoid over mean +- 12 std."""
    x = np.linspace(mean - 12 * std, mean + 12 * std, 4001)
    return f(x).sum() * (x[1] - x[0])


# ---- G02: the poster's A, B and beta~ are the posterior's a, b and var

def bayes_moments(s, t, x0, x_t, schedule):
    """Mean and variance of x_s | x_t, x_0 by integrating q(x_t | x_s) q(x_s | x_0) over x_s."""
    lam_ts, sigma2_ts = schedule.between(s, t)
    mean, var = schedule.lam_bar[s] * x0, schedule.sigma2_bar[s]

    def moment(power):
        return integrate(lambda x: x**power * np.exp(gaussian.log_normal(x, mean, var)
                                                     + gaussian.log_normal(x_t, lam_ts * x, sigma2_ts)), mean, var**0.5)
    m = moment(1) / moment(0)
    return m, moment(2) / moment(0) - m**2


@pytest.mark.parametrize("t", [2, 10, 300, 900])
def test_G02_posterior_in_the_posters_notation_matches_bayes(t):
    beta, alpha, abar = VP.beta, VP.alpha, VP.alpha_bar
    A = np.sqrt(abar[t - 1]) * beta[t] / (1 - abar[t])
    B = np.sqrt(alpha[t]) * (1 - abar[t - 1]) / (1 - abar[t])
    var = (1 - abar[t - 1]) / (1 - abar[t]) * beta[t]
    np.testing.assert_allclose(VP.posterior(t - 1, t), (A, B, var), rtol=1e-9)
    x0 = 0.7
    x_t = VP.lam_bar[t] * x0 + 0.5 * VP.sigma2_bar[t]**0.5
    np.testing.assert_allclose(bayes_moments(t - 1, t, x0, x_t, VP), (A * x0 + B * x_t, var), rtol=1e-8)


@pytest.mark.parametrize("t", [10, 300, 900])
def test_E08_E09_printed_coefficients_fail_bayes(t):
    beta, abar = VP.beta, VP.alpha_bar
    printed_A = np.sqrt(abar[t]) * beta[t] / (1 - abar[t])
    printed_B = np.sqrt(abar[t]) * (1 - abar[t - 1]) / (1 - abar[t])
    a, b, _ = VP.posterior(t - 1, t)
    x_t, noise = VP.lam_bar[t], VP.sigma2_bar[t]**0.5             # the mean is linear: read off its two weights
    mean, moved = (bayes_moments(t - 1, t, 1.0, x, VP)[0] for x in (x_t, x_t + noise))
    bayes_B = (moved - mean) / noise
    bayes_A = mean - bayes_B * x_t
    assert a == pytest.approx(bayes_A, rel=1e-7) and b == pytest.approx(bayes_B, rel=1e-7)
    assert abs(printed_A / bayes_A - 1) > 1e-4 and abs(printed_B / bayes_B - 1) > 1e-4
    assert abs(printed_A + printed_B * VP.lam_bar[t] - VP.lam_bar[t - 1]) > 5e-4          # the tower rule breaks too
    assert a + b * VP.lam_bar[t] == pytest.approx(VP.lam_bar[t - 1], rel=1e-12)


# ---- G04: two ways to say the same Gaussian

def test_G04_round_trip(schedule, rng):
    t = np.array([1, 2, 10, schedule.T])
    mean, x_t = rng.standard_normal((2, 4, 2, 2, 1))
    var = rng.gamma(1.0, size=mean.shape)
    there = gddm.noise_to_data(mean, var, x_t, t, schedule)
    back = gddm.data_to_noise(*there, x_t, t, schedule)
    np.testing.assert_allclose(back[0], mean, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(back[1], var, rtol=1e-12)


def test_G04_is_the_change_of_variables(schedule, rng):
    """Noise drawn from N(mean, var) makes an x_0 = (x_t - sqrt(sigma2_bar) eps)/lam_bar with the moments given."""
    t, x_t = 10, np.full((1, 1), 0.4)
    mean_x0, var_x0 = gddm.noise_to_data(np.full((1, 1), 0.3), np.full((1, 1), 0.6), x_t, t, schedule)
    eps = 0.3 + np.sqrt(0.6) * rng.standard_normal(100_000)
    x0 = (0.4 - schedule.sigma2_bar[t]**0.5 * eps) / schedule.lam_bar[t]
    assert abs(x0.mean() - mean_x0.item()) < 4 * x0.std() / 316
    assert abs(x0.var() / var_x0.item() - 1) < 4 * np.sqrt(2) / 316
    np.testing.assert_allclose(schedule.add_noise(mean_x0, t, np.full((1, 1), 0.3)), x_t, rtol=1e-12)


# ---- G03: averaging the posterior

@pytest.mark.parametrize("s, t", PAIRS)
def test_G03_reverse_moments_are_the_marginal(s, t, schedule):
    m, v, x_t = np.array([[0.6]]), np.array([[0.3]]), np.array([[-0.2]])
    mean, var = (value.item() for value in gddm.reverse_moments(m, v, x_t, s, t, schedule))
    a, b, posterior_var = schedule.posterior(s, t)

    def moment(power):                                            # of a x_0 + b x_t + noise, integrated over x_0
        def integrand(x0):
            center = a * x0 - 0.2 * b
            return (center if power == 1 else center**2 + posterior_var) * np.exp(gaussian.log_normal(x0, 0.6, 0.3))
        return integrate(integrand, 0.6, 0.3**0.5)
    assert mean == pytest.approx(moment(1), rel=1e-9)
    assert var == pytest.approx(moment(2) - moment(1)**2, rel=1e-8)
    assert var > posterior_var                                    # what a point mass for x_0 loses (G01)


def test_G03_reverse_moments_match_samples(schedule, rng):
    s, t, n = 17, 25, 200_000
    m, v, x_t = np.array([[0.6]]), np.array([[0.3]]), np.array([[-0.2]])
    mean, var = (value.item() for value in gddm.reverse_moments(m, v, x_t, s, t, schedule))
    posterior = schedule.posterior(s, t)
    x_s = (posterior.mean(0.6 + np.sqrt(0.3) * rng.standard_normal(n), np.full(n, -0.2))
           + posterior.var**0.5 * rng.standard_normal(n))
    assert abs(x_s.mean() - mean) < 4 * np.sqrt(var / n)
    assert abs(x_s.var() / var - 1) < 4 * np.sqrt(2 / n)
    wrong = posterior.var + posterior.a * 0.3                     # a in place of a^2
    assert abs(x_s.var() / wrong - 1) > 4 * np.sqrt(2 / n)


def test_G03_at_s_0_it_is_the_posterior_of_the_image(schedule, rng):
    m, v, x_t = (rng.gamma(2.0, size=(2, 2, 2, 1)) for _ in range(3))
    mean, var = gddm.reverse_moments(m, v, x_t, np.array([0, 0]), np.array([1, 15]), schedule)
    np.testing.assert_allclose(mean, m, rtol=1e-9)
    np.testing.assert_allclose(var, v, rtol=1e-9)


# ---- G05: c and V

@pytest.mark.parametrize("s, t", [(0, 1), (0, 9), *PAIRS])
def test_G05_variance_is_the_same_from_either_form(s, t, schedule, rng):
    var_eps, x_t = rng.gamma(1.0, size=(1, 5)), rng.standard_normal((1, 5))
    c = gddm.noise_coefficient(s, t, schedule)
    _, var_x0 = gddm.noise_to_data(x_t, var_eps, x_t, t, schedule)
    _, V = gddm.reverse_moments(x_t, var_x0, x_t, s, t, schedule)
    np.testing.assert_allclose(schedule.posterior(s, t).var + c**2 * var_eps, V, rtol=1e-9)
    assert isinstance(c, float)
    assert c == pytest.approx(schedule.posterior(s, t).a * schedule.sigma2_bar[t]**0.5 / schedule.lam_bar[t], rel=1e-9)


@pytest.mark.parametrize("t", [2, 300, 900])
def test_G05_variance_preserving_form_and_E08(t):
    beta, alpha, abar = VP.beta, VP.alpha, VP.alpha_bar
    c = gddm.noise_coefficient(t - 1, t, VP)
    assert c == pytest.approx(beta[t] / np.sqrt(alpha[t] * (1 - abar[t])), rel=1e-9)
    A = VP.posterior(t - 1, t).a
    assert c == pytest.approx(A * np.sqrt((1 - abar[t]) / abar[t]), rel=1e-9)
    printed = np.sqrt(abar[t]) * beta[t] / (1 - abar[t]) * np.sqrt((1 - abar[t]) / abar[t])
    assert (c / printed)**2 == pytest.approx(1 / alpha[t], rel=1e-9) and (c / printed)**2 > 1 + 1e-4


def test_G05_per_example_times(schedule):
    s, t = np.array([0, 3, 9]), np.array([1, 9, 25])
    single = [gddm.noise_coefficient(int(i), int(j), schedule) for i, j in zip(s, t, strict=True)]
    np.testing.assert_allclose(gddm.noise_coefficient(s, t, schedule), single, rtol=1e-14)


# ---- G06: the KL of a step

def reverse_gaussians(eps, mean_eps, var_eps, x_t, s, t, schedule):
    """(mean, var) of q(x_s | x_t, x_0) and of the model's p(x_s | x_t), in image space."""
    posterior = schedule.posterior(s, t)
    x0 = (x_t - schedule.sigma2_bar[t]**0.5 * eps) / schedule.lam_bar[t]
    p = gddm.reverse_moments(*gddm.noise_to_data(mean_eps, var_eps, x_t, t, schedule), x_t, s, t, schedule)
    return (posterior.mean(x0, x_t), posterior.var), p


@pytest.mark.parametrize("s, t", PAIRS)
def test_G06_step_kl_is_the_kl_in_image_space(s, t, schedule, rng):
    eps, mean_eps, x_t = (rng.standard_normal((2, 3, 3, 1)) for _ in range(3))
    var_eps = rng.gamma(1.0, size=eps.shape)
    q, p = reverse_gaussians(eps, mean_eps, var_eps, x_t, s, t, schedule)
    kl = gddm.step_kl(eps, mean_eps, var_eps, s, t, schedule)
    np.testing.assert_allclose(kl, gaussian.kl(*q, *p), rtol=1e-8, atol=1e-12)
    assert np.abs(gaussian.kl(*p, *q) / kl - 1).max() > 0.01      # the other direction is another number


@pytest.mark.parametrize("s, t", PAIRS)
def test_G06_step_kl_matches_quadrature(s, t, schedule):
    eps, mean_eps, var_eps, x_t = (np.array([[v]]) for v in (0.7, 0.3, 0.5, 0.2))
    (mq, vq), (mp, vp) = reverse_gaussians(eps, mean_eps, var_eps, x_t, s, t, schedule)
    mq, mp, vp = mq.item(), mp.item(), vp.item()
    integral = integrate(lambda x: np.exp(gaussian.log_normal(x, mq, vq))
                         * (gaussian.log_normal(x, mq, vq) - gaussian.log_normal(x, mp, vp)), mq, vq**0.5)
    assert gddm.step_kl(eps, mean_eps, var_eps, s, t, schedule).item() == pytest.approx(integral, rel=1e-7)


@pytest.mark.parametrize("s, t", PAIRS)
def test_G06_gradients_match_finite_differences(s, t, schedule, rng):
    eps, mean_eps = rng.standard_normal((2, 1, 4, 1)), rng.standard_normal((2, 1, 4, 1))
    var_eps = 0.2 + rng.gamma(1.0, size=eps.shape)
    d_mean, d_var = gddm.step_kl_gradients(eps, mean_eps, var_eps, s, t, schedule)
    numeric_mean = numeric_gradient(lambda m: gddm.step_kl(eps, m, var_eps, s, t, schedule), mean_eps)
    numeric_var = numeric_gradient(lambda v: gddm.step_kl(eps, mean_eps, v, s, t, schedule), var_eps)
    assert relative_error(d_mean, numeric_mean) < 1e-7 and relative_error(d_var, numeric_var) < 1e-7
    posterior, c = schedule.posterior(s, t), gddm.noise_coefficient(s, t, schedule)
    r, V = eps - mean_eps, posterior.var + c**2 * var_eps         # the gradients as derived from the poster's form
    np.testing.assert_allclose(d_mean, -c**2 * r / V, rtol=1e-8)
    np.testing.assert_allclose(d_var, c**2 / 2 * (1 / V - (posterior.var + c**2 * r**2) / V**2), rtol=1e-6, atol=1e-9)


def test_G06_best_variance_is_the_mean_squared_error(schedule, rng):
    """E over r of the KL is least at S = E[r^2], for a bimodal r too."""
    r = np.concatenate([rng.normal(-1, 0.2, 500), rng.normal(0.6, 0.5, 500)])[None]
    best = np.full_like(r, (r**2).mean())
    zero = np.zeros_like(r)
    d_var = gddm.step_kl_gradients(r, zero, best, 4, 9, schedule)[1]
    assert abs(d_var.sum()) < 1e-12 * np.abs(d_var).sum()
    at = {f: gddm.step_kl(r, zero, f * best, 4, 9, schedule).mean() for f in (0.8, 1.0, 1.25)}
    assert at[1.0] < min(at[0.8], at[1.25])


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.floats(-24, 5), st.floats(-5, 5), st.integers(2, 1000), st.sampled_from([VP, NoiseSchedule.cosine(1000)]))
def test_G06_kl_is_nonnegative_and_finite_in_float32(u, r, t, schedule):
    eps, zero = np.full((1, 1), r, np.float32), np.zeros((1, 1), np.float32)
    for s in {1, t // 2, t - 1} - {0, t}:
        value = gddm.step_kl(eps, zero, np.exp(np.full((1, 1), u, np.float32)), s, t, schedule)
        gradients = gddm.step_kl_gradients(eps, zero, np.exp(np.full((1, 1), u, np.float32)), s, t, schedule)
        exact = gddm.step_kl(eps.astype(float), zero.astype(float), np.exp(np.full((1, 1), np.float64(np.float32(u)))),
                             s, t, schedule)
        assert value.dtype == np.float32 and np.isfinite(gradients).all()
        np.testing.assert_allclose(value, exact, rtol=1e-4, atol=1e-6)
        assert exact.item() >= -1e-12


# ---- G07: no variance

@pytest.mark.parametrize("s, t", PAIRS)
def test_G07_without_variance_it_is_the_weighted_squared_error(s, t, schedule, rng):
    eps, mean_eps = rng.standard_normal((2, 5)), rng.standard_normal((2, 5))
    r, weight = eps - mean_eps, gddm.noise_coefficient(s, t, schedule)**2 / schedule.posterior(s, t).var
    zero = np.zeros_like(eps)
    np.testing.assert_allclose(gddm.step_kl(eps, mean_eps, zero, s, t, schedule), weight / 2 * r**2, rtol=1e-8)
    np.testing.assert_allclose(gddm.step_kl_gradients(eps, mean_eps, zero, s, t, schedule)[0], -weight * r, rtol=1e-8)
    errors = [np.abs(gddm.step_kl(eps, mean_eps, zero + S, s, t, schedule) / (weight / 2 * r**2) - 1).max()
              for S in (1e-6 / weight, 1e-7 / weight)]
    assert errors[1] < 1e-3 and errors[0] / errors[1] == pytest.approx(10, rel=0.01)       # linearly in S
    assert relative_error(gddm.step_kl(eps, mean_eps, zero, s, t, schedule), weight * r**2) > 0.4


def test_G07_matches_the_fixed_small_variance_model(schedule, rng):
    eps_hat, x0, eps, x_t, t = batch(rng, schedule, [2, 9, 25])
    values, _ = ddpm.vlb_loss(eps_hat, x0, eps, x_t, t, schedule, bin_width=BIN, variance="small")
    kl = gddm.step_kl(eps, eps_hat, np.zeros_like(eps), t - 1, t, schedule)
    np.testing.assert_allclose(values, schedule.T * kl.mean(axis=(1, 2, 3)), rtol=1e-12)


# ---- any schedule, any two times, any numbers

@property_test
@given(schedules(), st.data(), st.integers(0, 2**32 - 1))
def test_G03_G04_G05_G06_hold_for_any_schedule(schedule, data, seed):
    """Two roads to the same step: through the image (G04, G03, the KL of two Gaussians) and in the noise (G05, G06)."""
    t = data.draw(st.integers(2, schedule.T))
    s = data.draw(st.integers(1, t - 1))
    rng = np.random.default_rng(seed)
    eps, mean_eps, x_t = rng.standard_normal((3, 2, 3))
    var_eps = rng.gamma(1.0, size=eps.shape)
    mean_x0, var_x0 = gddm.noise_to_data(mean_eps, var_eps, x_t, t, schedule)
    for there, back in zip(gddm.data_to_noise(mean_x0, var_x0, x_t, t, schedule), (mean_eps, var_eps), strict=True):
        np.testing.assert_allclose(there, back, rtol=1e-9, atol=1e-9 * (1 + schedule.snr[t]**0.5))
    q, p = reverse_gaussians(eps, mean_eps, var_eps, x_t, s, t, schedule)
    posterior, c = schedule.posterior(s, t), gddm.noise_coefficient(s, t, schedule)
    np.testing.assert_allclose(p[1], posterior.var + c**2 * var_eps, rtol=1e-9)
    kl, apart = gddm.step_kl(eps, mean_eps, var_eps, s, t, schedule), np.abs(q[0]) + np.abs(p[0])
    lost = 1e-13 * apart**2 / posterior.var                             # what gaussian.kl loses in q's mean minus p's
    assert (np.abs(kl - gaussian.kl(*q, *p)) <= 1e-9 * kl + lost + 1e-14).all()
    point = gddm.step_kl(eps, mean_eps, 0 * var_eps, s, t, schedule)    # G07
    np.testing.assert_allclose(point, c**2 / (2 * posterior.var) * (eps - mean_eps)**2, rtol=1e-9)
    assert np.abs(point - kl).max() > 0


@property_test
@given(mixtures(), schedules(), st.data())
def test_G03_is_exact_in_the_moments_of_any_mixture(world, schedule, data):
    """With the true E[x_0 | x_t] and Var[x_0 | x_t] a GDDM has the true mean and variance of x_s | x_t."""
    t = data.draw(st.integers(1, schedule.T))
    s = data.draw(st.integers(0, t - 1))
    x_t = world.noised(t, schedule).sample(6, np.random.default_rng(t))
    mean_x0, cov_x0 = world.posterior_x0(x_t, t, schedule)
    mean, var = gddm.reverse_moments(mean_x0, np.einsum("nii->ni", cov_x0), x_t, s, t, schedule)
    exact = world.reverse(x_t, s, t, schedule)
    np.testing.assert_allclose(mean, exact.mean(), rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(var, np.einsum("nii->ni", exact.cov()), rtol=1e-8, atol=1e-12)
    wrong = schedule.posterior(s, t)
    assert np.abs(wrong.var + wrong.a * np.einsum("nii->ni", cov_x0) - var).max() > 1e-9 or wrong.a > 1 - 1e-6


# ---- E10: the last step

def test_E10_single_step_kl_diverges_at_t_1(schedule):
    one = np.ones((1, 1))
    with pytest.raises(ValueError, match="E10"):
        gddm.step_kl(one, 0 * one, one, 0, 1, schedule)
    with pytest.raises(ValueError, match="E10"):
        gddm.step_kl_gradients(one, 0 * one, one, np.array([0]), np.array([1]), schedule)
    c, V = gddm.noise_coefficient(0, 1, schedule), schedule.posterior(0, 1).var
    with np.errstate(divide="ignore"):
        assert np.isinf(np.log((V + c**2) / np.float64(V)))      # the printed L_t


@pytest.mark.parametrize("t", [1, 2, 20])
def test_E10_decoder_is_the_discretised_likelihood_under_the_models_gaussian(t, schedule, rng):
    output, x0, eps, x_t, _ = batch(rng, schedule, [t, t], heads=2)
    s = np.zeros(2, dtype=int)
    values, _ = gddm.kl_loss(output, x0, eps, x_t, np.array([t, t]), schedule, bin_width=BIN, s=s)
    var_eps = np.exp(gddm.log_variance(output[..., 1:])[0])
    mean_x0, var_x0 = gddm.noise_to_data(output[..., :1], var_eps, x_t, t, schedule)
    nats = -gaussian.discretized_log_likelihood(x0, mean_x0, var_x0, BIN)
    np.testing.assert_allclose(values, schedule.T * nats.mean(axis=(1, 2, 3)), rtol=1e-9)


# ---- the loss

CASES = {
    "one-step, mixed": ([1, 2, 25, 1], None),
    "decoder only": ([1], None),
    "steps only": ([7, 3], None),
    "pairs": ([9, 4, 25, 3, 1], [0, 1, 3, 0, 0]),
}


@pytest.mark.parametrize("bin_width", [BIN, None])
@pytest.mark.parametrize("case", CASES)
def test_G06_loss_gradients_match_finite_differences(case, bin_width, schedule, rng):
    t, s = CASES[case]
    options = {"bin_width": bin_width, "s": s if s is None else np.array(s)}
    output, *rest = batch(rng, schedule, t, heads=2, spread=0.2)
    values, gradient = gddm.kl_loss(output, *rest, schedule, **options)
    expected = numeric_gradient(lambda o: gddm.kl_loss(o, *rest, schedule, **options)[0], output, h=1e-4)
    for row in range(len(t)):
        for head in (slice(0, 1), slice(1, 2)):
            assert relative_error(gradient[row, ..., head], expected[row, ..., head]) < 1e-7


def test_G06_loss_is_T_times_the_mean_kl(schedule, rng):
    output, x0, eps, x_t, t = batch(rng, schedule, [2, 9, 25], heads=2)
    var_eps = np.exp(gddm.log_variance(output[..., 1:])[0])
    for s in (None, np.array([1, 4, 1])):
        kl = gddm.step_kl(eps, output[..., :1], var_eps, t - 1 if s is None else s, t, schedule)
        values, _ = gddm.kl_loss(output, x0, eps, x_t, t, schedule, bin_width=BIN, s=s)
        np.testing.assert_allclose(values, schedule.T * kl.mean(axis=(1, 2, 3)), rtol=1e-12)


def test_stopped_mean_gradient(schedule, rng):
    output, *rest = batch(rng, schedule, [1, 2, 25], heads=2)
    full = gddm.kl_loss(output, *rest, schedule, bin_width=BIN)
    stopped = gddm.kl_loss(output, *rest, schedule, bin_width=BIN, stop_mean_gradient=True)
    np.testing.assert_array_equal(stopped[0], full[0])
    np.testing.assert_array_equal(stopped[1][..., 1:], full[1][..., 1:])
    assert not stopped[1][..., :1].any() and full[1][..., :1].all()


def test_several_channels_and_flat_data(rng):
    for shape in ((2, 2, 3), (5,)):
        schedule = SCHEDULES["linear"]
        output, *rest = batch(rng, schedule, [1, 8], heads=2, shape=shape, spread=0.2)
        _, gradient = gddm.kl_loss(output, *rest, schedule, bin_width=BIN)
        expected = numeric_gradient(lambda o: gddm.kl_loss(o, *rest, schedule, bin_width=BIN)[0], output, h=1e-4)  # noqa: B023
        assert relative_error(gradient, expected) < 1e-7


@pytest.mark.parametrize("case", CASES)
def test_loss_on_a_device(case, fake, rng):
    t, s = CASES[case]
    options = {"bin_width": BIN, "s": s if s is None else np.array(s)}
    arguments = batch(rng, SCHEDULES["linear"], t, heads=2, dtype=np.float32)
    values, gradient = run_on(fake, gddm.kl_loss, *arguments, SCHEDULES["linear"], **options)
    expected = gddm.kl_loss(*arguments, SCHEDULES["linear"], **options)
    np.testing.assert_array_equal(values, expected[0])
    np.testing.assert_array_equal(gradient, expected[1])


def test_conversions_on_a_device(fake, rng):
    host = [rng.standard_normal((2, 2, 2, 1)).astype(np.float32) for _ in range(3)]
    device, s, t = [fake.asarray(v) for v in host], np.array([0, 3]), np.array([1, 9])
    for function, times in ((gddm.noise_to_data, (t,)), (gddm.data_to_noise, (t,)), (gddm.reverse_moments, (s, t))):
        for a, b in zip(function(*device, *times, VP), function(*host, *times, VP), strict=True):
            np.testing.assert_array_equal(fake.asnumpy(a), b)
            assert b.dtype == np.float32


@pytest.mark.parametrize("make", [NoiseSchedule.linear, NoiseSchedule.cosine])
@pytest.mark.parametrize("raw", [-1e4, -30.0, 0.0, 8.0, 1e4])
def test_loss_is_finite_in_float32(make, raw, rng):
    schedule = make(1000)
    t = np.array([1, 2, 3, 10, 100, 500, 999, 1000] * 2)
    s = np.concatenate([t[:8] - 1, np.zeros(8, dtype=int)])
    output, *rest = batch(rng, schedule, t, heads=2, dtype=np.float32)
    output[..., 1:] = raw
    with np.errstate(over="raise", invalid="raise", divide="raise"):
        values, gradient = gddm.kl_loss(output, *rest, schedule, bin_width=BIN, s=s)
    assert values.dtype == gradient.dtype == np.float32
    assert np.isfinite(values).all() and np.isfinite(gradient).all()
    exact = gddm.kl_loss(*(a.astype(np.float64) for a in (output, *rest[:3])), t, schedule, bin_width=BIN, s=s)
    np.testing.assert_allclose(values, exact[0], rtol=2e-3)


@pytest.mark.parametrize("make", [NoiseSchedule.linear, NoiseSchedule.cosine])
def test_a_zero_initialised_network_starts_well_scaled(make, rng):
    """Also on a background without any variance: at every t the loss is a moderate number, and so is its gradient."""
    schedule, t = make(1000), np.arange(1, 1001)
    x0, eps = np.full((1000, 2, 2, 1), -1.0, np.float32), rng.standard_normal((1000, 2, 2, 1)).astype(np.float32)
    output = np.zeros((1000, 2, 2, 2), np.float32)
    values, gradient = gddm.kl_loss(output, x0, eps, schedule.add_noise(x0, t, eps), t, schedule, bin_width=BIN)
    assert np.isfinite(values).all() and np.isfinite(gradient).all()
    assert np.abs(values).max() < 8 * schedule.T and np.abs(gradient).max() < 20 * schedule.T


# ---- the variance head

def test_log_variance_starts_at_one_and_stays_in_bounds():
    raw = np.array([-1e12, -1e4, -24.0, -1.0, 0.0, 1.0, 5.0, 1e4, 1e12], dtype=np.float32)
    u, slope = gddm.log_variance(raw)
    low, high = gddm.LOG_VARIANCE_BOUNDS
    assert u.dtype == slope.dtype == np.float32
    assert u[4] == 0 and slope[4] == 1
    assert (np.diff(u) >= 0).all() and low <= u[0] and u[-1] <= high
    assert (slope > 0).all()                                      # a hard clip's is 0 outside, and never comes back
    assert abs(u[5] - 1) < 0.03 and abs(u[3] + 1) < 0.03          # near 0 the head is the log-variance itself


def test_log_variance_slope_matches_finite_differences():
    raw = np.concatenate([np.linspace(-60, -0.01, 40), np.linspace(0.01, 20, 40)])
    numeric = numeric_gradient(lambda r: gddm.log_variance(r)[0], raw)
    np.testing.assert_allclose(gddm.log_variance(raw)[1], numeric, rtol=1e-8)


def test_a_head_that_has_gone_out_of_range_comes_back():
    """Gradient descent on the KL from raw = 40 and from raw = -60 finds S = r^2; behind a clip it would not move."""
    for start in (40.0, -60.0):
        raw = np.full((1, 1), start)
        for i in range(4000):
            u, slope = gddm.log_variance(raw)
            d_var = gddm.step_kl_gradients(np.full((1, 1), 0.5), 0 * raw, np.exp(u), 1, 500, VP)[1]
            raw = raw - np.clip((200 if i < 3000 else 1) * d_var * np.exp(u) * slope, -0.05, 0.05)
        assert np.exp(gddm.log_variance(raw)[0]).item() == pytest.approx(0.25, rel=1e-6)


def test_one_head_is_refused(rng):
    output, *rest = batch(rng, SCHEDULES["linear"], [3], heads=1)
    with pytest.raises(ValueError, match="variance head"):
        gddm.kl_loss(output, *rest, SCHEDULES["linear"], bin_width=BIN)
    with pytest.raises(ValueError, match="0 <= s < t"):
        gddm.kl_loss(np.concatenate([output, output], -1), *rest, SCHEDULES["linear"], bin_width=BIN, s=np.array([3]))
