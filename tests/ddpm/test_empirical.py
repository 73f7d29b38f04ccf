"""The exact denoiser of a finite data set, against brute force, finite differences, closed forms and samples."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ddpm import samplers
from ddpm.empirical import EmpiricalDenoiser
from ddpm.gddm import reverse_moments
from ddpm.mixture import GaussianMixture
from ddpm.randomness import SampleStreams
from ddpm.schedule import NoiseSchedule
from tests.ddpm.test_ddpm import SCHEDULES
from tests.helpers import property_test, schedules, zscore

LINEAR = SCHEDULES["linear"]
LONG = NoiseSchedule.linear(1000)


@pytest.fixture(params=SCHEDULES)
def schedule(request):
    return SCHEDULES[request.param]


def cloud(n=9, D=3, seed=1):
    return np.random.default_rng(seed).standard_normal((n, D))


def noisy(data, t, schedule, rng, N=6):
    """N draws of x_t."""
    x0 = data[rng.integers(0, len(data), N)]
    return schedule.add_noise(x0, t, rng.standard_normal(x0.shape))


def brute_force_weights(data, x_t, lam, noise):
    """The softmax of L14 as it is written, in extended precision."""
    data, x_t = np.longdouble(data), np.longdouble(x_t)
    exponents = -((x_t[:, None] - lam * data)**2).sum(axis=2) / (2 * np.longdouble(noise))
    w = np.exp(exponents - exponents.max(axis=1, keepdims=True))
    return (w / w.sum(axis=1, keepdims=True)).astype(np.float64)


def point_masses(data):
    """The same law as a mixture of Gaussians without width."""
    n, D = data.shape
    return GaussianMixture(np.full(n, 1 / n), data, np.zeros((n, D, D)))


def order(steps, errors):
    """Slope of log(error) against log(step)."""
    return np.polyfit(np.log(steps), np.log(errors), 1)[0]


# ---- L14: the weights

@pytest.mark.parametrize("t", [1, 2, 12, 25])
@pytest.mark.parametrize("block", [1, 4, 9, 100])
def test_L14_weights_equal_brute_force(block, t, schedule, rng):
    data = cloud()
    x_t = noisy(data, t, schedule, rng)
    w = EmpiricalDenoiser(data, schedule, block=block).weights(x_t, t)
    np.testing.assert_allclose(w, brute_force_weights(data, x_t, schedule.lam_bar[t], schedule.sigma2_bar[t]),
                               rtol=1e-9, atol=1e-300)
    np.testing.assert_allclose(w.sum(axis=1), 1, rtol=1e-14)
    assert (w >= 0).all() and w.shape == (6, 9)


def test_L14_weights_at_the_first_step_of_images(rng):
    """784 pixels, sigma2_bar = 1e-4: candidates that differ by a grey level compete, and all digits are needed."""
    data = 1000 + np.sign(cloud(1, 784)) + 3e-4 * cloud(20, 784, seed=2)
    x_t = noisy(data, 1, LONG, rng, N=4)
    lam, noise = LONG.lam_bar[1], LONG.sigma2_bar[1]
    assert noise == pytest.approx(1e-4)
    expected = brute_force_weights(data, x_t, lam, noise)
    assert (expected.max(axis=1) < 0.9).all()
    np.testing.assert_allclose(EmpiricalDenoiser(data, LONG, block=7).weights(x_t, 1), expected, rtol=1e-9)
    plain = -((x_t**2).sum(axis=1)[:, None] - 2 * lam * x_t @ data.T + lam**2 * (data**2).sum(axis=1)) / (2 * noise)
    plain = np.exp(plain - plain.max(axis=1, keepdims=True))
    plain /= plain.sum(axis=1, keepdims=True)                             # the same product, not about the mean
    assert np.abs(plain / expected - 1).max() > 1e-3


@pytest.mark.parametrize("t", [1, 500, 1000])
def test_L14_far_away_the_weights_stay_finite(t):
    data = cloud()
    x_t = np.array([[1e8, 0, 0], [-3e5, 2e5, 1e5], [0, 0, 1e3]])
    denoiser = EmpiricalDenoiser(data, LONG, block=2)
    w = denoiser.weights(x_t, t)
    np.testing.assert_allclose(w, brute_force_weights(data, x_t, LONG.lam_bar[t], LONG.sigma2_bar[t]), atol=1e-6)
    np.testing.assert_allclose(w.sum(axis=1), 1, rtol=1e-14)
    for values in (*denoiser.predict(x_t, t)[:4], denoiser.score(x_t, t), denoiser.log_density(x_t, t)):
        assert np.isfinite(values).all()
    with np.errstate(under="ignore", invalid="ignore"):
        naive = np.exp(-((x_t[:, None] - data)**2).sum(axis=2) / (2 * LONG.sigma2_bar[t]))
        assert not np.isfinite(naive / naive.sum(axis=1, keepdims=True)).all()          # without the largest exponent


def test_L14_doubt_falls_with_the_noise(rng):
    """exp(entropy of the weights), the number of candidates: 1 at t = 1, all of them at T."""
    data = cloud(40, 2)
    candidates = []
    for t in (1, 50, 200, 400, 1000):
        w = EmpiricalDenoiser(data, LONG).weights(noisy(data, t, LONG, rng, N=200), t)
        candidates.append(np.exp(-(w * np.log(np.maximum(w, 1e-300))).sum(axis=1)).mean())
    assert (np.diff(candidates) > 0).all() and candidates[0] < 1.05 and candidates[-1] > 39.9


# ---- L17: the density and the score

@pytest.mark.parametrize("t", [1, 12, 25])
def test_L17_score_is_the_gradient_of_log_density(t, schedule, rng):
    denoiser, x_t = EmpiricalDenoiser(cloud(), schedule, block=4), noisy(cloud(), t, schedule, rng)
    h = 1e-3 * np.sqrt(schedule.sigma2_bar[t])
    moved = (x_t[:, None] + h * np.eye(3) * k for k in (-2, -1, 1, 2))
    f = [denoiser.log_density(x.reshape(-1, 3), t).reshape(-1, 3) for x in moved]
    slope = (f[0] - 8 * f[1] + 8 * f[2] - f[3]) / (12 * h)
    assert np.abs(denoiser.score(x_t, t) - slope).max() < 1e-7 * np.abs(slope).max()


@pytest.mark.parametrize("t", [12, 25])
def test_E05_the_earlier_times_tables_do_not_give_the_score(t, schedule, rng):
    """lam_bar_{t-1} and sigma2_bar_{t-1} in the score at x_t, as printed: with their own weights or with x_t's."""
    denoiser, x_t = EmpiricalDenoiser(cloud(), schedule), noisy(cloud(), t, schedule, rng)
    h = 1e-3 * np.sqrt(schedule.sigma2_bar[t])
    moved = (x_t[:, None] + h * np.eye(3) * k for k in (-1, 1))
    low, high = (denoiser.log_density(x.reshape(-1, 3), t).reshape(-1, 3) for x in moved)
    slope, size = (high - low) / (2 * h), np.abs(high - low).max() / (2 * h)
    printed = denoiser.score(x_t, t - 1)
    mixed = (schedule.lam_bar[t - 1] * denoiser.weights(x_t, t) @ cloud() - x_t) / schedule.sigma2_bar[t - 1]
    assert np.abs(denoiser.score(x_t, t) - slope).max() < 1e-5 * size
    assert min(np.abs(wrong - slope).max() for wrong in (printed, mixed)) > 1e-2 * size


def test_E05_is_right_to_first_order(rng):
    """The step's mean with the earlier time's score errs by O(step^2), as the small-step form itself does."""
    data, t, steps = cloud(), 600, np.array([1, 2, 4, 8, 16])
    denoiser, x_t = EmpiricalDenoiser(data, LONG), noisy(data, t, LONG, rng)
    errors = []
    for s in t - steps:
        lam_ts, sigma2_ts = LONG.between(s, t)
        printed = x_t / lam_ts + sigma2_ts * denoiser.score(x_t, s)
        errors.append(np.abs(printed - denoiser.reverse_mean(x_t, s, t)).max())
    assert order(steps, errors) == pytest.approx(2, abs=0.05)


# ---- L15: the reverse step

@pytest.mark.parametrize("s, t", [(1, 2), (11, 12), (5, 20), (1, 25), (0, 20)])
def test_L15_forward_pairs_and_reversed_pairs_have_one_law(s, t, schedule, rng):
    """(x_s, x_t) of the noising chain, and (a draw of x_s | x_t, x_t): the mean of any f of the two is the same."""
    n, data = 40_000, cloud(5, 2)
    denoiser, (lam_ts, sigma2_ts) = EmpiricalDenoiser(data, schedule), schedule.between(s, t)
    x_s = schedule.add_noise(data[rng.integers(0, 5, n)], s, rng.standard_normal((n, 2)))
    x_t = lam_ts * x_s + np.sqrt(sigma2_ts) * rng.standard_normal((n, 2))
    drawn = denoiser.sample_reverse(x_t, s, t, rng)
    again = schedule.add_noise(data[rng.integers(0, 5, n)], s, rng.standard_normal((n, 2)))     # right law, wrong pairs
    frequencies = np.random.default_rng(3).standard_normal((8, 4))

    def differences(other):
        both = [np.concatenate([x, x_t], axis=1) for x in (x_s, other)]
        features = [np.concatenate([z[:, :2], (z[:, :, None] * z[:, None, :2]).reshape(n, -1),
                                    np.cos(z @ frequencies.T), np.sin(z @ frequencies.T)], axis=1) for z in both]
        return max(abs(zscore(column)) for column in (features[0] - features[1]).T)
    assert differences(drawn) < 4
    assert differences(again) > 15


def test_L15_draws_follow_the_weights(rng):
    data, t, n = cloud(6, 2), 12, 50_000
    denoiser = EmpiricalDenoiser(data, LINEAR, block=2)
    x_t = np.tile(noisy(data, t, LINEAR, rng, N=1), (n, 1))
    w = denoiser.weights(x_t[:1], t)[0]
    drawn = denoiser.sample_reverse(x_t, 0, t, rng)
    share = (drawn[:, None] == data).all(axis=2).mean(axis=0)
    assert share.sum() == 1                                               # at s = 0 a draw is a data point, to the bit
    assert (np.abs(share - w) < 4 * np.sqrt(w * (1 - w) / n)).all() and np.abs(1 / 6 - w).max() > 0.1


def test_L15_one_step_has_the_moments_of_the_mixture(rng):
    data, s, t, n = cloud(4, 2), 10, 30, 60_000
    x_t = noisy(data, t, LINEAR, rng, N=1)
    exact = point_masses(data).reverse(x_t, s, t, LINEAR)
    drawn = EmpiricalDenoiser(data, LINEAR).sample_reverse(np.tile(x_t, (n, 1)), s, t, rng)
    spread = np.sqrt(np.diag(exact.cov()[0]))
    assert (np.abs(drawn.mean(axis=0) - exact.mean()[0]) < 4 * spread / np.sqrt(n)).all()
    deviation = drawn - exact.mean()[0]
    products = deviation[:, :, None] * deviation[:, None, :]
    assert (np.abs(products.mean(axis=0) - exact.cov()[0]) < 4 * products.std(axis=0) / np.sqrt(n)).all()


def shares(x_0, data):
    """(largest distance to the data, chi-square of equal shares over its expectation, in standard deviations)."""
    distance = np.sqrt(((x_0[:, None] - data)**2).sum(axis=2))
    n, counts = len(data), np.bincount(distance.argmin(axis=1), minlength=len(data))
    chi2 = ((counts - len(x_0) / n)**2 / (len(x_0) / n)).sum()
    return distance.min(axis=1).max(), (chi2 - (n - 1)) / np.sqrt(2 * (n - 1))


def test_L15_ancestral_sampling_returns_the_data(rng):
    """Over the full chain with the exact mean and variance; without noise in the steps the shares come out wrong."""
    data, N = cloud(8, 2, seed=4), 1500
    denoiser, x_T = EmpiricalDenoiser(data, LONG), noisy(data, LONG.T, LONG, rng, N)
    chain = dict(timesteps=range(LONG.T, 0, -1), rng=rng)
    distance, excess = shares(samplers.ddpm(denoiser, LONG, x_T, variance="learned", **chain), data)
    assert distance < 1e-6 and abs(excess) < 4
    assert denoiser.evaluations == LONG.T * N
    _, excess = shares(samplers.ddpm(denoiser, LONG, x_T, variance=lambda *_: 0.0, **chain), data)
    assert excess > 20


def test_L15_exact_steps_of_any_length_return_the_data(schedule, rng):
    """Each x_s is a draw of the mixture: a chain of few long steps is exact too, one of Gaussians isn't."""
    data, N = cloud(8, 2, seed=4), 3000
    denoiser, times = EmpiricalDenoiser(data, schedule), [25, 18, 12]
    x_t = x_T = noisy(data, 25, schedule, rng, N)
    for t, s in zip(times, [*times[1:], 0], strict=True):
        x_t = denoiser.sample_reverse(x_t, s, t, rng)
    distance, excess = shares(x_t, data)
    assert distance == 0 and abs(excess) < 4
    gaussian = samplers.ddpm(denoiser, schedule, x_T, timesteps=times, variance="learned", rng=rng)
    assert shares(gaussian, data)[0] > 0.1


# ---- L16, L18: the mean and the variance of a step

@pytest.mark.parametrize("s, t", [(0, 1), (0, 20), (1, 2), (11, 12), (3, 25)])
def test_L16_mean_is_that_of_the_mixture_of_posteriors(s, t, schedule, rng):
    data = cloud()
    denoiser, x_t = EmpiricalDenoiser(data, schedule, block=2), noisy(data, t, schedule, rng)
    w = brute_force_weights(data, x_t, schedule.lam_bar[t], schedule.sigma2_bar[t])
    posterior, mean = schedule.posterior(s, t), denoiser.reverse_mean(x_t, s, t)
    each = np.stack([posterior.mean(x_i, x_t) for x_i in data], axis=1)                         # (N, n, D)
    np.testing.assert_allclose(mean, (w[:, :, None] * each).sum(axis=1), rtol=1e-9, atol=1e-11)
    lam_ts, sigma2_ts = schedule.between(s, t)
    np.testing.assert_allclose(mean, (x_t + sigma2_ts * denoiser.score(x_t, t)) / lam_ts, rtol=1e-8, atol=1e-9)


ORDERS = [("linear", LONG, 600), ("cosine", NoiseSchedule.cosine(1000), 500),
          ("general", NoiseSchedule(np.full(1000, 0.9995), np.full(1000, 2e-3)), 500)]


@pytest.mark.parametrize("name, schedule, t", ORDERS, ids=[name for name, *_ in ORDERS])
def test_L16_L18_small_step_mean_converges_with_order_two(name, schedule, t, rng):
    """exact - small = sigma2 (1/lam - 1) score. Both factors fall with the step: order two, with that very constant.

    Controls: leaving the score out is of order one; E02, which undoes the whole contraction, isn't even of order one.
    """
    data, steps = cloud(), np.array([1, 2, 4, 8, 16])
    denoiser, x_t = EmpiricalDenoiser(data, schedule), noisy(data, t, schedule, rng)
    score, errors = denoiser.score(x_t, t), {"small": [], "no score": [], "E02": []}
    for s in t - steps:
        lam_ts, sigma2_ts = schedule.between(s, t)
        exact, small = denoiser.reverse_mean(x_t, s, t), denoiser.small_step_mean(x_t, s, t)
        np.testing.assert_allclose(exact - small, sigma2_ts * (1 / lam_ts - 1) * score, rtol=1e-5, atol=1e-13)
        for kind, mean in (("small", small), ("no score", x_t / lam_ts),
                           ("E02", x_t / schedule.lam_bar[t] + sigma2_ts * score)):
            errors[kind].append(np.abs(mean - exact).max())
    assert order(steps, errors["small"]) == pytest.approx(2, abs=0.05)
    assert order(steps, errors["no score"]) == pytest.approx(1, abs=0.05)
    assert order(steps, errors["E02"]) < 0.1 and errors["E02"][0] > 100 * errors["small"][0]


@pytest.mark.parametrize("name, schedule, t", ORDERS, ids=[name for name, *_ in ORDERS])
def test_L18_small_step_variance_converges_with_order_two(name, schedule, t, rng):
    """exact - sigma2 = sigma2 (1/lam^2 - 1) + sigma2^2/lam^2 Hessian: order two again. Control: sigma2_bar of x_t."""
    data, steps = cloud(), np.array([1, 2, 4, 8, 16])
    denoiser, x_t = EmpiricalDenoiser(data, schedule), noisy(data, t, schedule, rng)
    prediction, hessian = denoiser.predict(x_t, t), point_masses(data).noised(t, schedule).hessian(x_t)
    errors = {"small": [], "no step": []}
    for s in t - steps:
        lam_ts, sigma2_ts = schedule.between(s, t)
        exact = reverse_moments(prediction.x0, prediction.var_x0, x_t, s, t, schedule)[1]
        diagonal = np.einsum("nii->ni", hessian)
        np.testing.assert_allclose(exact - sigma2_ts, sigma2_ts * (1 / lam_ts**2 - 1)
                                   + (sigma2_ts / lam_ts)**2 * diagonal, rtol=1e-5, atol=1e-13)
        errors["small"].append(np.abs(exact - sigma2_ts).max())
        errors["no step"].append(np.abs(exact - schedule.sigma2_bar[t]).max())
    assert order(steps, errors["small"]) == pytest.approx(2, abs=0.1)
    assert order(steps, errors["no step"]) < 0.1


def test_L18_doubling_T_quarters_the_error_of_a_step(rng):
    """The same data and the same noise level in schedules of 500, 1000, 2000, 4000 steps."""
    data, counts, errors = cloud(), np.array([500, 1000, 2000, 4000]), []
    x_t = noisy(data, 300, NoiseSchedule.linear(500), rng)
    for T in counts:
        schedule, t = NoiseSchedule.linear(T), 3 * T // 5
        denoiser = EmpiricalDenoiser(data, schedule)
        errors.append(np.abs(denoiser.reverse_mean(x_t, t - 1, t) - denoiser.small_step_mean(x_t, t - 1, t)).max())
    assert order(1 / counts, errors) == pytest.approx(2, abs=0.05)


def test_L18_without_contraction_the_small_step_mean_is_exact(rng):
    schedule, data = SCHEDULES["variance exploding"], cloud()
    denoiser, x_t = EmpiricalDenoiser(data, schedule), noisy(data, 30, schedule, rng)
    for s in (0, 1, 15, 29):
        np.testing.assert_allclose(denoiser.small_step_mean(x_t, s, 30), denoiser.reverse_mean(x_t, s, 30), rtol=1e-9,
                                   atol=1e-9)


def test_E02_E32_on_gaussian_data_a_long_step_needs_the_exact_form(rng):
    """300 -> 1 in one step, N(m, S) data: (x + sigma2 score)/lam is the mean, the printed forms are far from it."""
    root = cloud(3, 3, seed=6)
    world, s, t = GaussianMixture([1.0], cloud(1, 3), (root @ root.T)[None]), 1, 300
    x_t, (lam_ts, sigma2_ts) = world.noised(t, LONG).sample(50, rng), LONG.between(s, t)
    reverse, score = world.reverse(x_t, s, t, LONG), world.noised(t, LONG).score(x_t)
    np.testing.assert_allclose((x_t + sigma2_ts * score) / lam_ts, reverse.mean(), rtol=1e-9, atol=1e-11)
    hessian = world.noised(t, LONG).hessian(x_t)
    np.testing.assert_allclose(sigma2_ts / lam_ts**2 * (np.eye(3) + sigma2_ts * hessian), reverse.cov(), rtol=1e-9,
                               atol=1e-11)
    for printed in (x_t / lam_ts + sigma2_ts * score, x_t / LONG.lam_bar[t] + sigma2_ts * score):
        assert np.sqrt(((printed - reverse.mean())**2).mean()) > 0.2
    for s, t in ((299, 300), (599, 600)):                       # a single step: E32 is small there, E02 is not
        lam_ts, sigma2_ts = LONG.between(s, t)
        exact, score = world.reverse(x_t, s, t, LONG).mean(), world.noised(t, LONG).score(x_t)
        assert np.abs(x_t / lam_ts + sigma2_ts * score - exact).max() < 1e-3
        assert np.abs(x_t / LONG.lam_bar[t] + sigma2_ts * score - exact).max() > 0.3


# ---- everything at once: the mixture of point masses, and Tweedie

@st.composite
def problems(draw):
    """A schedule, data of 1..6 points in 1..4 dimensions, states near them, a time for each, earlier times, a block."""
    schedule, n, D, N = draw(schedules()), *(draw(st.integers(1, k)) for k in (6, 4, 4))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    data = rng.standard_normal((n, D)) + draw(st.sampled_from([0.0, 5.0]))
    t = rng.integers(1, schedule.T + 1, N) if draw(st.booleans()) else draw(st.integers(1, schedule.T))
    s = rng.integers(0, t)
    x0 = data[rng.integers(0, n, N)]
    x_t = schedule.add_noise(x0, t, 1.5 * rng.standard_normal((N, D)))
    return schedule, data, x_t, s if np.ndim(t) else int(s), t, draw(st.integers(1, 7))


@property_test
@given(problems())
def test_L14_L15_L16_property_equals_the_mixture_of_point_masses(problem):
    schedule, data, x_t, s, t, block = problem
    denoiser, world = EmpiricalDenoiser(data, schedule, block=block), point_masses(data)
    prediction, reverse = denoiser.predict(x_t, t), world.reverse(x_t, s, t, schedule)
    mean, cov = world.posterior_x0(x_t, t, schedule)
    weights = denoiser.weights(x_t, t)
    snr = np.reshape(schedule.snr[t], (-1, 1))
    np.testing.assert_allclose(weights, reverse.weights, rtol=1e-7, atol=1e-12)
    np.testing.assert_allclose(weights.sum(axis=1), 1, rtol=1e-14)
    np.testing.assert_allclose(denoiser.reverse_mean(x_t, s, t), reverse.mean(), rtol=1e-8, atol=1e-9)
    np.testing.assert_allclose(prediction.x0, mean, rtol=1e-8, atol=1e-9)
    np.testing.assert_allclose(prediction.var_x0, np.einsum("nii->ni", cov), rtol=1e-7, atol=1e-11)
    np.testing.assert_allclose(prediction.var_eps, snr * prediction.var_x0, rtol=1e-12)
    np.testing.assert_allclose(schedule.add_noise(prediction.x0, t, prediction.eps), x_t, rtol=1e-9, atol=1e-9)
    v = np.random.default_rng(0).standard_normal(x_t.shape)
    expected = (v - snr * (cov @ v[:, :, None])[:, :, 0]) / np.sqrt(np.reshape(schedule.sigma2_bar[t], (-1, 1)))
    np.testing.assert_allclose(denoiser.vjp(x_t, t, v), expected, rtol=1e-6, atol=1e-7 * (1 + snr.max()))


@property_test
@given(problems())
def test_C01_L16_U03_property_the_step_is_tweedies_formula(problem):
    """E[x_s | x_t] = (x_t + sigma2_ts score)/lam_ts for any s < t; at s = 0 it is the clean state's (C01)."""
    schedule, data, x_t, s, t, block = problem
    denoiser = EmpiricalDenoiser(data, schedule, block=block)
    score = denoiser.score(x_t, t)
    for start in (s, 0 * t):
        lam_ts, sigma2_ts = (np.reshape(v, (-1, 1)) for v in schedule.between(start, t))
        scale = 1 + (sigma2_ts / lam_ts).max()
        np.testing.assert_allclose((x_t + sigma2_ts * score) / lam_ts, denoiser.reverse_mean(x_t, start, t), rtol=1e-8,
                                   atol=1e-9 * scale)
    prediction = denoiser.predict(x_t, t)
    np.testing.assert_allclose(prediction.x0, denoiser.reverse_mean(x_t, 0 * t, t), rtol=1e-12, atol=1e-12)
    roots = np.sqrt(np.reshape(schedule.sigma2_bar[t], (-1, 1)))
    np.testing.assert_allclose(prediction.eps, -roots * score, rtol=1e-12)                      # U03


@pytest.mark.parametrize("t", [1, 12, 25])
def test_L17_density_and_score_equal_the_noised_mixtures(t, schedule, rng):
    data = cloud()
    denoiser, x_t = EmpiricalDenoiser(data, schedule, block=4), noisy(data, t, schedule, rng)
    noised = point_masses(data).noised(t, schedule)
    np.testing.assert_allclose(denoiser.log_density(x_t, t), noised.log_density(x_t), rtol=1e-9)
    np.testing.assert_allclose(denoiser.score(x_t, t), noised.score(x_t), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("t", [2, 12, 25])
def test_C08_vjp_matches_finite_differences_and_is_symmetric(t, schedule, rng):
    data = cloud()
    denoiser, x_t = EmpiricalDenoiser(data, schedule, block=4), noisy(data, t, schedule, rng)
    v, w = rng.standard_normal((2, *x_t.shape))
    h = 1e-4 * np.sqrt(schedule.sigma2_bar[t])
    e = [denoiser.predict(x_t + k * h * w, t).eps for k in (-2, -1, 1, 2)]
    jvp = (v * (e[0] - 8 * e[1] + 8 * e[2] - e[3]) / (12 * h)).sum(axis=1)
    scale = np.abs(v * w).sum(axis=1).max() / np.sqrt(schedule.sigma2_bar[t])
    np.testing.assert_allclose((denoiser.vjp(x_t, t, v) * w).sum(axis=1), jvp, atol=1e-7 * scale)
    np.testing.assert_allclose((denoiser.vjp(x_t, t, w) * v).sum(axis=1), jvp, atol=1e-7 * scale)


def test_C08_vjp_keeps_its_digits_at_the_first_step_of_images(rng):
    """snr = 1e4 multiplies a small Cov[x_0 | x_t] v, of points far from the data's mean: sums about the posterior's."""
    corner = np.sign(cloud(1, 784))
    data = np.concatenate([corner + 4e-4 * cloud(10, 784, seed=2), -corner + 4e-4 * cloud(10, 784, seed=3)])
    x_t, v = noisy(data, 1, LONG, rng, N=4), rng.standard_normal((4, 784))
    denoiser = EmpiricalDenoiser(data, LONG, block=7)
    w = np.longdouble(denoiser.weights(x_t, 1))
    centered = data - (w @ data)[:, None]                                                       # (N, n, D)
    cov_v = (w[:, :, None] * centered * (centered * v[:, None]).sum(axis=2, keepdims=True)).sum(axis=1)
    expected = ((v - LONG.snr[1] * cov_v) / np.sqrt(LONG.sigma2_bar[1])).astype(np.float64)
    found = denoiser.vjp(x_t, 1, v)
    assert np.abs(found - expected).max() < 1e-12 * np.abs(expected).max()
    assert 0.01 < LONG.snr[1] * np.abs(cov_v).max() < 1


def test_C08_variance_is_the_diagonal_of_the_jacobian(schedule, rng):
    """Var[eps_i | x_t] = 1 - sqrt(sigma2_bar) d eps_i/d x_i, from two methods that share only the weights."""
    data, t = cloud(), 12
    denoiser, x_t = EmpiricalDenoiser(data, schedule), noisy(data, t, schedule, rng)
    diagonal = np.stack([denoiser.vjp(x_t, t, np.tile(e, (6, 1)))[:, i] for i, e in enumerate(np.eye(3))], axis=1)
    expected = 1 - np.sqrt(schedule.sigma2_bar[t]) * diagonal
    np.testing.assert_allclose(denoiser.predict(x_t, t).var_eps, expected, rtol=1e-7, atol=1e-10)


# ---- edges

def test_one_point_is_always_the_answer(schedule, rng):
    data = 100 + cloud(1, 5)
    denoiser, x_t = EmpiricalDenoiser(data, schedule), 100 + rng.standard_normal((3, 5))
    for t in (1, schedule.T):
        prediction = denoiser.predict(x_t, t)
        np.testing.assert_array_equal(prediction.x0, np.tile(data, (3, 1)))
        assert (prediction.var_x0 == 0).all() and (prediction.var_eps == 0).all()
        np.testing.assert_array_equal(denoiser.weights(x_t, t), 1)
        np.testing.assert_allclose(denoiser.vjp(x_t, t, x_t), x_t / np.sqrt(schedule.sigma2_bar[t]), rtol=1e-12)
        np.testing.assert_array_equal(denoiser.sample_reverse(x_t, 0, t, rng), np.tile(data, (3, 1)))


def test_variance_is_never_negative_and_vanishes_with_the_noise(rng):
    """Where one point, or one point stored twice, takes all the weight; far from the origin too."""
    for data in (cloud(6, 4), 1e4 + cloud(6, 4), np.repeat(cloud(3, 4), 2, axis=0)):
        x_t = LONG.lam_bar[1] * data + 1e-4
        prediction = EmpiricalDenoiser(data, LONG, block=4).predict(x_t, 1)
        assert (prediction.var_x0 >= 0).all() and prediction.var_x0.max() < 1e-14
        np.testing.assert_allclose(prediction.x0, data, rtol=1e-12)


def test_times_may_differ_per_state(schedule, rng):
    data, t, s = cloud(), np.array([1, 9, 25]), np.array([0, 3, 24])
    denoiser, x_t = EmpiricalDenoiser(data, schedule, block=4), cloud(3, 3, seed=8)
    together = {"weights": denoiser.weights(x_t, t), "log": denoiser.log_density(x_t, t),
                "score": denoiser.score(x_t, t), "vjp": denoiser.vjp(x_t, t, x_t), **denoiser.predict(x_t, t)._asdict(),
                "mean": denoiser.reverse_mean(x_t, s, t), "small": denoiser.small_step_mean(x_t, s, t)}
    for i in range(3):
        x, time, before = x_t[i:i + 1], int(t[i]), int(s[i])
        alone = {"weights": denoiser.weights(x, time), "log": denoiser.log_density(x, time),
                 "score": denoiser.score(x, time), "vjp": denoiser.vjp(x, time, x),
                 **denoiser.predict(x, time)._asdict(), "mean": denoiser.reverse_mean(x, before, time),
                 "small": denoiser.small_step_mean(x, before, time)}
        for key, value in alone.items():
            if value is not None:
                np.testing.assert_allclose(together[key][i], value[0], rtol=1e-10, atol=1e-13, err_msg=key)


def test_images_float32_and_the_shape_of_results(rng):
    data = rng.uniform(-1, 1, (7, 4, 4, 2)).astype(np.float32)
    flat = data.reshape(7, -1).astype(np.float64)
    images, points = EmpiricalDenoiser(data, LINEAR, block=3), EmpiricalDenoiser(flat, LINEAR)
    x_t = noisy(flat, 20, LINEAR, rng, N=5).astype(np.float32)
    wide = x_t.astype(np.float64)
    single = x_t.reshape(5, 4, 4, 2)
    results = [*zip(images.predict(single, 20)[:4], points.predict(wide, 20)[:4], strict=True),
               (images.score(single, 20), points.score(wide, 20)),
               (images.vjp(single, 20, single), points.vjp(wide, 20, wide)),
               (images.reverse_mean(single, 5, 20), points.reverse_mean(wide, 5, 20)),
               (images.small_step_mean(single, 5, 20), points.small_step_mean(wide, 5, 20))]
    for a, b in results:
        assert a.shape == single.shape and a.dtype == np.float32 and b.dtype == np.float64
        np.testing.assert_allclose(a.reshape(5, -1), b, rtol=1e-6, atol=1e-9)
    for a, b in ((images.weights(single, 20), points.weights(wide, 20)),
                 (images.log_density(single, 20), points.log_density(wide, 20))):
        assert a.dtype == np.float64
        np.testing.assert_allclose(a, b, rtol=1e-12)
    drawn = images.sample_reverse(single, 5, 20, rng)
    assert drawn.shape == single.shape and drawn.dtype == np.float32


def test_draws_depend_on_the_stream_alone(fake, rng):
    """Not on the block, the batch or the device."""
    data = cloud(20, 2)
    x_t = noisy(data, 30, LINEAR, rng)

    def draw(rows, block=5, to=lambda x: x, **streams):
        return EmpiricalDenoiser(to(data), LINEAR, block=block).sample_reverse(
            to(x_t[rows]), 10, 30, SampleStreams(3, 0, rows, **streams))
    whole = draw([0, 1, 2, 3, 4, 5])
    for other in (draw([0, 1, 2, 3, 4, 5], block=20), np.concatenate([draw([0, 1]), draw([2, 3, 4, 5])]),
                  fake.asnumpy(draw([0, 1, 2, 3, 4, 5], to=fake.asarray)),
                  fake.asnumpy(draw([0, 1, 2, 3, 4, 5], to=fake.asarray, xp=fake))):
        np.testing.assert_allclose(other, whole, rtol=1e-12)


def test_a_sum_of_weights_that_rounds_to_less_than_one_still_draws_the_last_point(rng):
    class Highest:
        def random(self, size):
            return np.ones(size)
    data = cloud(3, 2)
    drawn = EmpiricalDenoiser(data, LINEAR).sample_reverse(noisy(data, 50, LINEAR, rng), 0, 50, Highest())
    np.testing.assert_array_equal(drawn, np.tile(data[2], (6, 1)))


def test_on_a_device_only_the_tables_of_an_array_of_times_are_moved(fake, rng):
    data, t = cloud(), np.array([1, 9, 25, 50])
    x_t = noisy(data, 20, LINEAR, rng, N=4)
    host, x = EmpiricalDenoiser(data, LINEAR, block=4), fake.asarray(x_t)
    on_device = fake.asarray(data)
    fake.transfers.clear()
    device = EmpiricalDenoiser(on_device, LINEAR, block=4)
    calls = [("weights", ()), ("log_density", ()), ("predict", ()), ("score", ()), ("vjp", (x_t,)),
             ("reverse_mean", None), ("small_step_mean", None)]
    for times, shapes in ((20, set()), (t, {(4,)})):
        for name, rest in calls:
            arguments = (0 * times, times) if rest is None else (times, *rest)
            expected = getattr(host, name)(x_t, *arguments)
            arguments = [x if a is x_t else a for a in arguments]
            found = getattr(device, name)(x, *arguments)
            assert {transfer.shape for transfer in fake.transfers} <= shapes, name
            for a, b in zip(found if name == "predict" else [found], expected if name == "predict" else [expected],
                            strict=True):
                if b is not None:
                    np.testing.assert_array_equal(fake.asnumpy(a), b)
            fake.transfers.clear()
    with pytest.raises(TypeError, match="mixed"):
        device.predict(x_t, 20)


def test_evaluations_are_counted_in_states(rng):
    denoiser, x_t = EmpiricalDenoiser(cloud(), LINEAR), cloud(4, 3)
    calls = (denoiser.predict, denoiser.score, denoiser.weights, denoiser.log_density)
    for k, call in enumerate(calls, 1):
        call(x_t, 5)
        assert denoiser.evaluations == 4 * k
    for k, call in enumerate((denoiser.reverse_mean, denoiser.small_step_mean), 5):
        call(x_t, 2, 5)
        assert denoiser.evaluations == 4 * k
    denoiser.sample_reverse(x_t, 2, 5, rng)
    assert (denoiser.evaluations, denoiser.vjps) == (28, 0)
    denoiser.vjp(x_t[:3], 5, x_t[:3])
    assert (denoiser.evaluations, denoiser.vjps) == (28, 3)


def test_memory_does_not_grow_with_the_data(rng):
    """30,000 points of 64 numbers, 16 states: weights alone would be 3.8 MB, all differences 245 MB."""
    N, D, block = 16, 64, 256
    x_t = rng.standard_normal((N, D))

    def peak(n, block):
        denoiser = EmpiricalDenoiser(rng.standard_normal((n, D), dtype=np.float32), LINEAR, block=block)
        tracemalloc.start()
        for call in (lambda: denoiser.predict(x_t, 20), lambda: denoiser.vjp(x_t, 20, x_t),
                     lambda: denoiser.sample_reverse(x_t, 5, 20, rng)):
            call()
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found
    bound = 24 * (N + D) * block + 40 * 8 * N * D
    small, large = peak(2000, block), peak(30_000, block)
    assert large < bound and large < 1.1 * small
    assert peak(30_000, 30_000) > 10 * bound


@pytest.mark.parametrize("data, error, message", [
    (np.zeros((3, 2), np.uint8), TypeError, "floats .* not uint8"),
    ([[0.0, 1.0]], TypeError, "floats .* not list"),
    (np.zeros(3), ValueError, "data must be an array"),
    (np.zeros((0, 2)), ValueError, "data must be an array"),
])
def test_bad_data_are_refused(data, error, message):
    with pytest.raises(error, match=message):
        EmpiricalDenoiser(data, LINEAR)


def test_bad_arguments_are_refused(rng):
    with pytest.raises(ValueError, match="block"):
        EmpiricalDenoiser(cloud(), LINEAR, block=0)
    denoiser, x_t = EmpiricalDenoiser(cloud(), LINEAR), cloud(4, 3)
    for x, t, message in ((x_t[:, :2], 5, "x_t must be"), (x_t.astype(int), 5, "x_t must be"), (x_t, 0, "t must lie"),
                          (x_t, 51, "t must lie"), (x_t, np.array([1, 0, 2, 3]), "t must lie"),
                          (x_t, np.array([1, 2, 3]), "one per state")):
        with pytest.raises(ValueError, match=message):
            denoiser.predict(x, t)
    with pytest.raises(ValueError, match="v must be"):
        denoiser.vjp(x_t, 5, x_t[:2])
    for call in (denoiser.reverse_mean, lambda *a: denoiser.sample_reverse(*a, rng)):
        with pytest.raises(ValueError, match="s must be earlier"):
            call(x_t, 5, 5)
