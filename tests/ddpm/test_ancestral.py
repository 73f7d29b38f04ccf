"""Ancestral sampling against chains whose law is known (L05, C15)."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ddpm import samplers
from ddpm.ddpm import fixed_variance
from ddpm.denoiser import Denoiser, Prediction
from ddpm.gddm import reverse_moments
from ddpm.iddpm import reverse_log_variance
from ddpm.mixture import GaussianMixture
from ddpm.randomness import SampleStreams
from ddpm.samplers.ancestral import clip_x0
from tests.ddpm.test_ddpm import SCHEDULES
from tests.helpers import property_test, schedules

LINEAR = SCHEDULES["linear"]
MEAN, VAR = 0.4, 0.3


@pytest.fixture(params=SCHEDULES)
def schedule(request):
    return SCHEDULES[request.param]


def gaussian_denoiser(schedule):
    """The exact denoiser of N(MEAN, VAR) data, elementwise."""
    def fn(x_t, t):
        lam, noise = schedule.lam_bar[t], schedule.sigma2_bar[t]
        gain = float(lam * VAR / (lam**2 * VAR + noise))
        return MEAN + gain * (x_t - float(lam) * MEAN), 0 * x_t + float(VAR * noise / (lam**2 * VAR + noise))
    return Denoiser.from_moments(fn, schedule)


def pushed_moments(schedule, timesteps, variance):
    """Mean and variance of x_0 when x_T ~ its marginal goes through the chain, in closed form (all maps are affine)."""
    mean = schedule.lam_bar[timesteps[0]] * MEAN
    var = schedule.lam_bar[timesteps[0]]**2 * VAR + schedule.sigma2_bar[timesteps[0]]
    for t, s in zip(timesteps, [*timesteps[1:], 0], strict=True):
        lam, noise, (a, b, _) = schedule.lam_bar[t], schedule.sigma2_bar[t], schedule.posterior(s, t)
        gain = lam * VAR / (lam**2 * VAR + noise)
        mean = a * (MEAN + gain * (mean - lam * MEAN)) + b * mean
        var = (a * gain + b)**2 * var + (variance(s, t) if s else 0)
    return mean, var


def marginal(schedule, t, n, rng, dtype=np.float64):
    spread = np.sqrt(schedule.lam_bar[t]**2 * VAR + schedule.sigma2_bar[t])
    return (schedule.lam_bar[t] * MEAN + spread * rng.standard_normal((n, 1))).astype(dtype)


@pytest.mark.parametrize("steps", ["all", [25, 12, 5, 2, 1], [20, 1]])
@pytest.mark.parametrize("variance", ["learned", "large", "small"])
def test_L05_C15_samples_have_the_moments_of_the_chain(steps, variance, schedule, rng):
    times, n = list(range(schedule.T, 0, -1)) if steps == "all" else steps, 100_000
    denoiser = gaussian_denoiser(schedule)
    x_0 = samplers.ddpm(denoiser, schedule, marginal(schedule, times[0], n, rng), timesteps=times, variance=variance,
                        rng=rng)

    def closed(s, t):
        if variance != "learned":
            return fixed_variance(variance, s, t, schedule)
        lam, noise = schedule.lam_bar[t], schedule.sigma2_bar[t]
        return schedule.posterior(s, t).var + schedule.posterior(s, t).a**2 * VAR * noise / (lam**2 * VAR + noise)
    mean, var = pushed_moments(schedule, times, closed)
    assert abs(x_0.mean() - mean) < 4 * np.sqrt(var / n)
    assert abs(x_0.var() / var - 1) < 4 * np.sqrt(2 / n)
    assert denoiser.evaluations == n * len(times)


@pytest.mark.parametrize("steps", ["all", [25, 12, 5, 2, 1], [20, 1]])
def test_L05_exact_reverse_recovers_the_data(steps, schedule, rng):
    """Mean and variance of the data, but for the last step's mean, whose variance is less by Var[x_0 | x_1]."""
    times, n = list(range(schedule.T, 0, -1)) if steps == "all" else steps, 100_000
    x_0 = samplers.ddpm(gaussian_denoiser(schedule), schedule, marginal(schedule, times[0], n, rng), timesteps=times,
                        variance="learned", rng=rng)
    last = VAR * schedule.sigma2_bar[1] / (schedule.lam_bar[1]**2 * VAR + schedule.sigma2_bar[1])
    assert abs(x_0.mean() - MEAN) < 4 * np.sqrt(VAR / n)
    assert abs(x_0.var() / (VAR - last) - 1) < 4 * np.sqrt(2 / n)


class Silent:
    """A generator whose noise is zero."""

    def standard_normal(self, shape, dtype=np.float64):
        return np.zeros(shape, dtype)


def affine_maps(schedule, times, variance):
    """What the sampler does to Gaussian data: (s, m, k, v) with x_s = m + k x_t + sqrt(v) noise, for each step."""
    steps = []
    samplers.ddpm(gaussian_denoiser(schedule), schedule, np.array([[-5.0], [5.0]]), timesteps=times, variance=variance,
                  rng=Silent(), callback=steps.append)
    for step in steps:
        k = np.diff(step.mean[:, 0]).item() / np.diff(step.x_t[:, 0]).item()
        yield step.s, (step.mean[0] - k * step.x_t[0]).item(), k, np.ravel(step.var)[0]


@property_test
@given(schedules(), st.data())
def test_L05_C15_marginals_are_kept_on_any_schedule_over_any_times(schedule, data):
    """In closed form, no draw: mean and variance go through the sampler's own steps, and stay those of q(x_s)."""
    times = sorted(data.draw(st.sets(st.integers(1, schedule.T), min_size=1, max_size=8)), reverse=True)

    def law(t):
        return schedule.lam_bar[t] * MEAN, schedule.lam_bar[t]**2 * VAR + schedule.sigma2_bar[t]
    mean, var = law(times[0])
    for s, m, k, v in affine_maps(schedule, times, "learned"):
        mean, var = m + k * mean, k**2 * var + (v if s else 0)
        expected_mean, expected_var = law(s)
        if s == 0:                                           # the last step is the mean: Var[x_0 | x_t] is left out
            expected_var -= VAR * schedule.sigma2_bar[times[-1]] / law(times[-1])[1]
        np.testing.assert_allclose((mean, var), (expected_mean, expected_var), rtol=1e-7)
    if len(times) > 1:                                       # control: "small" misses a^2 Var[x_0 | x_t]
        t, (s, m, k, v) = times[0], next(affine_maps(schedule, times, "small"))
        missing = schedule.posterior(s, t).a**2 * VAR * schedule.sigma2_bar[t] / law(t)[1]
        np.testing.assert_allclose(k**2 * law(t)[1] + v + missing, law(s)[1], rtol=1e-9)
        assert missing > 1e-6 * law(s)[1]


def test_L05_fixed_variances_miss_it_over_large_steps(rng):
    """The negative control: with few steps "small" is too narrow and "large" too wide for these data."""
    times, n = [50, 25, 12, 5, 2, 1], 50_000
    x_T, found = marginal(LINEAR, 50, n, rng), {}
    for variance in ("small", "learned", "large"):
        found[variance] = samplers.ddpm(gaussian_denoiser(LINEAR), LINEAR, x_T, timesteps=times, variance=variance,
                                        rng=rng).var()
    assert found["small"] < 0.9 * VAR < found["learned"] < 1.02 * VAR < found["large"]


def test_C15_one_skipping_step_has_the_law_of_the_exact_reverse(rng):
    """On a mixture, mean and covariance of x_s | x_t for a skip, against the closed form."""
    world, s, t, n = GaussianMixture.grid(rotation_degrees=30), 20, 35, 50_000
    x_t = np.tile(world.noised(t, LINEAR).sample(1, rng), (n, 1))
    exact = world.reverse(x_t[:1], s, t, LINEAR)

    def moments(x, t):
        mean, cov = world.posterior_x0(x[:1], t, LINEAR)
        return np.tile(mean, (len(x), 1)), np.tile(np.diag(cov[0]), (len(x), 1))
    steps = []
    samplers.ddpm(Denoiser.from_moments(moments, LINEAR), LINEAR, x_t, timesteps=[t, s], variance="learned", rng=rng,
                  callback=steps.append)
    x_s, var = steps[0].x_s, np.diag(exact.cov()[0])
    assert (np.abs(x_s.mean(axis=0) - exact.mean()[0]) < 4 * np.sqrt(var / n)).all()
    assert (np.abs(x_s.var(axis=0) / var - 1) < 4 * np.sqrt(2 / n)).all()
    np.testing.assert_allclose(steps[0].mean, reverse_moments(*moments(x_t, t), x_t, s, t, LINEAR)[0], rtol=1e-12)


def test_callback_sees_every_step_and_the_last_has_no_noise(rng):
    steps = []
    x_T = rng.standard_normal((3, 2, 2, 1)).astype(np.float32)
    x_0 = samplers.ddpm(gaussian_denoiser(LINEAR), LINEAR, x_T, timesteps=[50, 20, 1], variance="large", rng=rng,
                        callback=steps.append)
    assert [(step.t, step.s) for step in steps] == [(50, 20), (20, 1), (1, 0)]
    assert steps[0].x_t is x_T and steps[-1].x_s is x_0
    for before, after in zip(steps, steps[1:], strict=False):
        assert after.x_t is before.x_s
    for step in steps:
        assert isinstance(step, samplers.Step) and isinstance(step.prediction, Prediction)
        assert step.x_s.dtype == step.mean.dtype == np.float32
        assert step.var == (fixed_variance("large", step.s, step.t, LINEAR) if step.s else 0)
    np.testing.assert_array_equal(x_0, steps[-1].mean)
    assert not (steps[0].x_s == steps[0].mean).any()


@pytest.mark.parametrize("variance", ["small", "large", "learned"])
def test_L05_the_last_step_is_the_mean_for_every_variance(variance, rng):
    x_1 = rng.standard_normal((2, 3))
    denoiser = gaussian_denoiser(LINEAR)
    x_0 = samplers.ddpm(denoiser, LINEAR, x_1, timesteps=[1], variance=variance, rng=None)
    np.testing.assert_array_equal(x_0, denoiser.predict(x_1, 1).x0)


def test_C05_learned_variance_of_an_iddpm(rng):
    v = rng.standard_normal((2, 3))
    base = Denoiser.from_eps(lambda x, t: 0.5 * x, LINEAR)

    class WithV(Denoiser):
        def predict(self, x_t, t):
            return base.predict(x_t, t)._replace(v=v)
    steps = []
    samplers.ddpm(WithV(LINEAR), LINEAR, rng.standard_normal((2, 3)), timesteps=[9, 4], variance="learned", rng=rng,
                  callback=steps.append)
    np.testing.assert_allclose(steps[0].var, np.exp(reverse_log_variance(v, 4, 9, LINEAR)), rtol=1e-12)
    with pytest.raises(ValueError, match="learned"):
        samplers.ddpm(base, LINEAR, np.zeros((2, 3)), timesteps=[9, 4], variance="learned", rng=rng)


def test_variance_may_be_a_function(rng):
    seen, x = [], rng.standard_normal((2, 3))

    def variance(prediction, s, t):
        seen.append((s, t))
        return 0.0
    samplers.ddpm(gaussian_denoiser(LINEAR), LINEAR, x, timesteps=[9, 4], variance=variance, rng=None)  # no draw
    assert seen == [(4, 9)]                                            # no noise at s = 0, and nothing to ask


def test_clip_clamps_the_image_and_moves_the_noise_with_it(schedule, rng):
    x_t = 3 * rng.standard_normal((4, 5))
    steps = []
    x_0 = samplers.ddpm(gaussian_denoiser(schedule), schedule, x_t, timesteps=[20, 1], variance="small", rng=rng,
                        clip=(-0.1, 0.2), callback=steps.append)
    assert x_0.min() >= -0.1 and x_0.max() <= 0.2
    for step in steps:
        assert step.prediction.x0.min() >= -0.1 and step.prediction.x0.max() <= 0.2
        again = schedule.add_noise(step.prediction.x0, step.t, step.prediction.eps)
        np.testing.assert_allclose(again, step.x_t, rtol=1e-9)
    free = gaussian_denoiser(schedule).predict(x_t, 20)
    same = clip_x0(free, x_t, 20, schedule, (-100, 100))
    np.testing.assert_allclose(same.eps, free.eps, rtol=1e-9, atol=1e-12)


def test_samples_do_not_depend_on_the_batch_or_the_device(fake):
    x_T = SampleStreams(7, 0, range(6), purpose="start").standard_normal((6, 2, 2, 1), dtype=np.float32)

    def run(samples, to=lambda x: x, **streams):
        return samplers.ddpm(gaussian_denoiser(LINEAR), LINEAR, to(x_T[samples]), timesteps=[50, 20, 5, 1],
                             variance="learned", rng=SampleStreams(7, 0, samples, purpose="noise", **streams),
                             clip=(-1, 1))
    whole = run([0, 1, 2, 3, 4, 5])
    np.testing.assert_array_equal(np.concatenate([run([0, 1]), run([2, 3, 4, 5])]), whole)
    np.testing.assert_array_equal(fake.asnumpy(run([0, 1, 2, 3, 4, 5], fake.asarray)), whole)
    np.testing.assert_array_equal(fake.asnumpy(run([0, 1, 2, 3, 4, 5], fake.asarray, xp=fake)), whole)
    assert whole.dtype == np.float32


@pytest.mark.parametrize("times", [[], [5, 5], [3, 4], [51, 2], [4, 0]])
def test_bad_timesteps_are_refused(times, rng):
    with pytest.raises(ValueError, match="descending"):
        samplers.ddpm(gaussian_denoiser(LINEAR), LINEAR, np.zeros((1, 1)), timesteps=times, variance="small", rng=rng)


def test_bad_variance_is_refused(rng):
    with pytest.raises(ValueError, match="variance must be"):
        samplers.ddpm(gaussian_denoiser(LINEAR), LINEAR, np.zeros((1, 1)), timesteps=[1], variance="tiny", rng=rng)
