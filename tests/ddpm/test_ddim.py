"""DDIM and DPM-Solver++: the family that keeps the marginals, its ends, and the order of convergence on exact flows."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ddpm import samplers
from ddpm.denoiser import Denoiser
from ddpm.mixture import GaussianMixture
from ddpm.samplers.ddim import ddim_posterior
from ddpm.schedule import NoiseSchedule
from nn.backend import array_module, to_host
from tests.helpers import property_test, schedules, zscore

LINEAR = NoiseSchedule.linear(1000)
EXPLODING = NoiseSchedule(np.ones(1000), np.diff(np.geomspace(0.01, 20, 1001)**2))


# ---- the step

@property_test
@given(schedules(), st.data(), st.floats(0, 1))
def test_C16_any_eta_keeps_the_marginals(schedule, data, eta):
    """With x_t | x_0 as in the chain, so is x_s | x_0: mean a + b lam_bar_t, variance b^2 sigma2_bar_t + var."""
    t = data.draw(st.integers(1, schedule.T))
    s = data.draw(st.integers(0, t - 1))
    a, b, var = ddim_posterior(s, t, schedule, eta)
    assert a + b * schedule.lam_bar[t] == pytest.approx(schedule.lam_bar[s], rel=1e-12)
    assert b**2 * schedule.sigma2_bar[t] + var == pytest.approx(schedule.sigma2_bar[s], rel=1e-9, abs=1e-15)
    assert var == pytest.approx(eta**2 * schedule.posterior(s, t).var, rel=1e-12)
    if s > 0 and eta < 0.9:                                             # control: all of x_t's b with less of its var
        assert abs(schedule.posterior(s, t).b**2 * schedule.sigma2_bar[t] + var - schedule.sigma2_bar[s]) > 1e-7


@property_test
@given(schedules(), st.data())
def test_C16_eta_1_is_the_chains_posterior(schedule, data):
    t = data.draw(st.integers(1, schedule.T))
    s = data.draw(st.integers(0, t - 1))
    scale = schedule.lam_bar[s] + schedule.lam_bar[t] + 1
    np.testing.assert_allclose(ddim_posterior(s, t, schedule, 1.0), schedule.posterior(s, t), rtol=1e-9,
                               atol=1e-12 * scale)


def test_C16_at_the_clean_end_x0_is_known():
    for eta in (0.0, 0.5, 1.0):
        assert ddim_posterior(0, 300, LINEAR, eta) == (1.0, 0.0, 0.0)


def test_C16_eta_has_an_upper_end():
    limit = np.sqrt(LINEAR.sigma2_bar[100] / LINEAR.posterior(100, 300).var)
    assert limit > 1 and ddim_posterior(100, 300, LINEAR, limit * (1 - 1e-13)).b < 1e-5       # all noise is fresh
    for eta in (-0.1, 1.01 * limit):
        with pytest.raises(ValueError, match="eta must be at least 0, and at most"):
            ddim_posterior(100, 300, LINEAR, eta)


# ---- the sampler

def exact(schedule, world=None):
    return Denoiser.from_world(GaussianMixture.two_component() if world is None else world, schedule)


def test_C16_eta_1_draws_ddpms_samples(rng):
    x_T, times = rng.standard_normal((50, 1)), LINEAR.timesteps(20)
    one = samplers.ddim(exact(LINEAR), LINEAR, x_T, timesteps=times, eta=1.0, rng=np.random.default_rng(1))
    ddpm = samplers.ddpm(exact(LINEAR), LINEAR, x_T, timesteps=times, variance="small", rng=np.random.default_rng(1))
    np.testing.assert_allclose(one, ddpm, rtol=1e-9)
    other = samplers.ddim(exact(LINEAR), LINEAR, x_T, timesteps=times, eta=0.5, rng=np.random.default_rng(1))
    assert np.abs(other - ddpm).max() > 0.1


@pytest.mark.parametrize("schedule", [LINEAR, EXPLODING], ids=["VP", "VE"])
@pytest.mark.parametrize("eta", [0.0, 0.6])
def test_C16_many_steps_recover_the_data(schedule, eta, rng):
    world, n = GaussianMixture.two_component(), 20_000
    x_T = world.noised(schedule.T, schedule).sample(n, rng)
    x = samplers.ddim(exact(schedule), schedule, x_T, timesteps=schedule.timesteps(200), eta=eta, rng=rng)
    assert abs(zscore(x)) < 4 and abs(zscore(x**2, 1.0)) < 4 and abs(zscore((x < 0).astype(float), 0.4)) < 4


# ---- the order

def evenly_spaced(K, first=3.0, last=-2.5):
    """A variance-preserving chain whose half log-snr falls evenly from `first` at t = 1 to `last` at t = K + 1."""
    abar = 1 / (1 + np.exp(-2 * np.linspace(first, last, K + 1)))
    return NoiseSchedule.from_betas(1 - abar / np.concatenate([[1.0], abar[:-1]]))


def at_time_one(sampler, world, x_T, K, **options):
    """Where the flow has come to at t = 1, before the last step to 0."""
    seen, schedule = {}, evenly_spaced(K)
    sampler(exact(schedule, world), schedule, x_T, timesteps=schedule.timesteps(K + 1),
            callback=lambda step: seen.update({step.s: step.x_s}), **options)
    return seen[1]


METHODS = {"ddim": (samplers.ddim, {}, 1), "order 1": (samplers.dpm_solver_pp, {"order": 1}, 1),
           "order 2": (samplers.dpm_solver_pp, {"order": 2}, 2), "heun": (samplers.probability_flow, {}, 2)}


def orders(errors):
    return np.log2(np.array(errors[:-1]) / errors[1:])


@pytest.mark.parametrize("method", METHODS)
def test_U13_order_of_convergence_on_a_gaussian(method, rng):
    """The exact flow of N(m, c) shrinks deviations by the ratio of standard deviations."""
    sampler, options, order = METHODS[method]
    m, c = 0.4, 0.3
    world, x_T, errors = GaussianMixture([1.0], [[m]], [[[c]]]), rng.standard_normal((20, 1)), []
    for K in (32, 64, 128, 256):
        l, v = evenly_spaced(K).lam_bar, evenly_spaced(K).sigma2_bar
        std = np.sqrt(l**2 * c + v)
        truth = l[1] * m + (x_T - l[-1] * m) * std[1] / std[-1]
        errors.append(np.abs(at_time_one(sampler, world, x_T, K, **options) - truth).max())
    assert np.abs(orders(errors)[-2:] - order).max() < 0.15, errors


@pytest.mark.parametrize("method", METHODS)
def test_U13_order_of_convergence_on_a_mixture(method, rng):
    sampler, options, order = METHODS[method]
    world = GaussianMixture.grid(std=0.5, rotation_degrees=30)
    x_T = 2 * rng.standard_normal((20, 2))
    truth = at_time_one(samplers.dpm_solver_pp, world, x_T, 4096)
    errors = [np.abs(at_time_one(sampler, world, x_T, K, **options) - truth).max() for K in (64, 128, 256)]
    assert np.abs(orders(errors)[-1:] - order).max() < 0.25, errors


def test_U13_order_1_is_ddim_and_order_2_is_closer_in_as_many_passes(rng):
    world, x_T = GaussianMixture.grid(std=0.5), 2 * rng.standard_normal((50, 2))
    truth = at_time_one(samplers.dpm_solver_pp, world, x_T, 1024)
    first, second = (at_time_one(samplers.dpm_solver_pp, world, x_T, 20, order=k) for k in (1, 2))
    np.testing.assert_array_equal(first, at_time_one(samplers.ddim, world, x_T, 20))
    assert np.abs(second - truth).mean() < 0.5 * np.abs(first - truth).mean()


def test_L20_U13_heuns_rule_is_two_passes_a_step_and_the_mean_of_two_slopes(rng):
    """One step by hand, on a schedule that isn't variance preserving; clipping reaches both slopes."""
    schedule, x_T = EXPLODING, rng.standard_normal((5, 1))
    denoiser = exact(schedule)
    seen = []
    samplers.probability_flow(denoiser, schedule, x_T, timesteps=[60, 20], callback=seen.append)
    assert denoiser.evaluations == 3 * len(x_T)
    ratio = np.sqrt(schedule.sigma2_bar) / schedule.lam_bar

    def along(slope):
        return schedule.lam_bar[20] * (x_T / schedule.lam_bar[60] + (ratio[20] - ratio[60]) * slope)
    first = denoiser.predict(x_T, 60).eps
    second = denoiser.predict(along(first), 20).eps
    np.testing.assert_allclose(seen[0].x_s, along((first + second) / 2), rtol=1e-12)
    assert np.abs(seen[0].x_s - along(first)).max() > 1e-4                          # Euler's is another
    clipped = samplers.probability_flow(denoiser, schedule, 10 * x_T, timesteps=[60, 20], clip=(-0.1, 0.1))
    assert np.abs(clipped).max() <= 0.1 + 1e-12


# ---- edges

def test_single_steps_and_bad_input(rng):
    x_T = rng.standard_normal((1, 1))
    denoiser = exact(LINEAR)
    for sampler in (samplers.ddim, samplers.dpm_solver_pp, samplers.probability_flow):
        np.testing.assert_array_equal(sampler(denoiser, LINEAR, x_T, timesteps=[1000]), denoiser.predict(x_T, 1000).x0)
        with pytest.raises(ValueError, match="timesteps must be descending"):
            sampler(denoiser, LINEAR, x_T, timesteps=[1, 1000])
    with pytest.raises(ValueError, match="pass rng"):
        samplers.ddim(denoiser, LINEAR, x_T, timesteps=[1000], eta=0.5)
    with pytest.raises(ValueError, match="order must be 1 or 2"):
        samplers.dpm_solver_pp(denoiser, LINEAR, x_T, timesteps=[1000], order=3)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_on_a_device(dtype, fake, rng):
    x_T = rng.standard_normal((3, 4, 4, 1)).astype(dtype)
    denoiser = Denoiser.from_eps(lambda x, t: 0.3 * x, LINEAR)
    for sampler, options in ((samplers.ddim, {}), (samplers.dpm_solver_pp, {}), (samplers.probability_flow, {})):
        host = sampler(denoiser, LINEAR, x_T, timesteps=[900, 500, 100], **options)
        device = sampler(denoiser, LINEAR, fake.asarray(x_T), timesteps=[900, 500, 100], **options)
        assert array_module(device) is fake and host.dtype == dtype
        np.testing.assert_array_equal(to_host(device), host)
    host = samplers.ddim(denoiser, LINEAR, x_T, timesteps=[900, 1], eta=1.0, rng=np.random.default_rng(0))
    device = samplers.ddim(denoiser, LINEAR, fake.asarray(x_T), timesteps=[900, 1], eta=1.0,
                           rng=fake.random.default_rng(0))
    np.testing.assert_array_equal(to_host(device), host)
