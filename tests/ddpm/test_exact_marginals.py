"""Correlated Gaussian data: with all of Cov[x_0 | x_t] every step of every sampler is exact, over any times.

The samplers themselves are run, not formulas for them: on six states whose second moment is that of x_T exactly, with
noise whose second moment is exactly I and which is exactly uncorrelated with the states. Then so is the second moment
of every x_s, to rounding. The bound is `elbo.negative_bound`'s own, on the twelve points of a cubature rule that
integrates its quadratic terms exactly. So an error in a, b, var, a prefactor or an index has nowhere to hide.
"""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ddpm import elbo, gaussian, samplers
from ddpm.covariance import ReverseCovariance, sources
from ddpm.ddpm import fixed_variance
from ddpm.denoiser import Denoiser
from ddpm.likelihood import reverse_model
from ddpm.mixture import GaussianMixture
from ddpm.posterior import renoise
from ddpm.samplers.ancestral import chain
from ddpm.schedule import NoiseSchedule
from tests.helpers import general_schedule, property_test, schedules, zscore

LINEAR = NoiseSchedule.linear(1000)
GENERAL = general_schedule(40)
S0 = np.array([[1.7, 0.6, 0.1], [0.6, 0.4, -0.1], [0.1, -0.1, 0.9]])
WORLD = GaussianMixture([1.0], [np.zeros(3)], [S0])
ENTROPY = 0.5 * np.linalg.slogdet(2 * np.pi * np.e * S0)[1]
EXACT = ReverseCovariance(sources.of_world)


# ---- marginals

def marginal(schedule, t):
    return schedule.lam_bar[t]**2 * S0 + schedule.sigma2_bar[t] * np.eye(3)


class PerfectNoise:
    """A generator whose draws have second moment I and are uncorrelated with the states, both exactly."""

    def __init__(self, x):
        self.x = x

    def standard_normal(self, shape, dtype):
        basis, _ = np.linalg.qr(self.x, mode="complete")
        assert shape == self.x.shape
        return np.sqrt(shape[0]) * basis[:, shape[1]:]

    def see(self, step):
        self.x = step.x_s


def worst_marginal(sampler, schedule, times, **options):
    """The largest error of any marginal on the way, s > 0, when x_T has its own."""
    denoiser = Denoiser.from_world(WORLD, schedule)
    states = np.sqrt(6) * np.eye(6)[:, :3] @ np.linalg.cholesky(marginal(schedule, times[0])).T
    noise, errors = PerfectNoise(states), []

    def look(step):
        noise.see(step)
        if step.s > 0:
            errors.append(np.abs(step.x_s.T @ step.x_s / 6 - marginal(schedule, step.s)).max())
        else:                                                # the mean, whose second moment is short of S0 by Cov
            cov = denoiser.covariance_x0(step.x_t, step.t)[0]
            errors.append(np.abs(step.x_s.T @ step.x_s / 6 + cov - S0).max())
    sampler(denoiser, schedule, states, timesteps=times, rng=noise, callback=look, **options)
    assert len(errors) == len(times)
    return max(errors)


MEMBERS = {"ddpm": (samplers.ddpm, "variance", {}), "eta=0": (samplers.ddim, "covariance", {"eta": 0.0}),
           "eta=0.5": (samplers.ddim, "covariance", {"eta": 0.5}), "eta=1": (samplers.ddim, "covariance", {"eta": 1.0}),
           "renoise": (samplers.renoise, "covariance", {})}


@pytest.mark.parametrize("member", MEMBERS)
@pytest.mark.parametrize("K", [2, 5, 20, 100, 1000])
def test_C15_C16_C03_every_marginal_is_exact_over_any_number_of_steps(K, member):
    sampler, name, options = MEMBERS[member]
    error = worst_marginal(sampler, LINEAR, LINEAR.timesteps(K), **{name: EXACT}, **options)
    assert error < (1e-11 if K < 100 else 1e-12)


@pytest.mark.parametrize("member", MEMBERS)
@pytest.mark.parametrize("K", [1, 2, 5, 20, 40])
def test_C15_C16_C03_every_marginal_is_exact_on_any_schedule(K, member):
    sampler, name, options = MEMBERS[member]
    assert worst_marginal(sampler, GENERAL, GENERAL.timesteps(K), **{name: EXACT}, **options) < 1e-11


@pytest.mark.parametrize("member", MEMBERS)
def test_C08_from_backward_passes_too(member):
    """The same from D vjps of the predicted noise, which loses the digits that sigma2_bar / lam_bar^2 multiplies."""
    sampler, name, options = MEMBERS[member]
    for schedule, K in ((LINEAR, 5), (LINEAR, 100), (GENERAL, 20)):
        assert worst_marginal(sampler, schedule, schedule.timesteps(K), **{name: "full"}, **options) < 1e-10


@property_test
@given(schedules(), st.floats(0, 1), st.data())
def test_C16_property_any_schedule_any_times_any_eta(schedule, eta, data):
    times = sorted(data.draw(st.sets(st.integers(1, schedule.T), min_size=1, max_size=6)), reverse=True)
    size = np.abs(marginal(schedule, times[0])).max() + 1
    assert worst_marginal(samplers.ddim, schedule, times, eta=eta, covariance=EXACT) < 1e-10 * size
    if len(times) > 1:                                       # control: the diagonal alone, where data are correlated
        assert worst_marginal(samplers.ddim, schedule, times, eta=eta, covariance="diagonal") > 1e-12


def wrong_prefactor(denoiser, prediction, x_t, t):
    """Planted: lam_bar^2 / sigma2_bar for its inverse."""
    return denoiser.schedule.snr[t]**2 * denoiser.covariance_x0(x_t, t)


def forgetful(denoiser, schedule, x_T, *, variance, **options):
    """Planted: the mean of re-noising with a variance of the chain (E29)."""
    def step(prediction, x_t, s, t):
        return renoise(s, t, schedule).mean(prediction.x0, x_t), fixed_variance(variance, s, t, schedule) if s else 0.0
    return chain(denoiser, schedule, x_T, step=step, **options)


@pytest.mark.parametrize("sampler, variance, error", [
    (samplers.ddpm, "small", 0.463), (samplers.ddpm, "large", 0.096),
    (samplers.ddpm, ReverseCovariance(wrong_prefactor), 31.6),
    (forgetful, "large", 1.116), (forgetful, "small", 1.361)], ids=["small", "large", "prefactor", "T4", "T4 small"])
def test_wrong_steps_fail_it(sampler, variance, error):
    assert worst_marginal(sampler, LINEAR, LINEAR.timesteps(20), variance=variance) == pytest.approx(error, rel=5e-3)


@pytest.mark.parametrize("member", MEMBERS)
def test_wrong_covariances_fail_it(member):
    """Less than all of it, for each member of the family: the diagonal, a number for each t, and nothing."""
    sampler, name, options = MEMBERS[member]
    average = ReverseCovariance(sources.of_world, average=True)
    for spread in ("diagonal", average, "small"):
        assert worst_marginal(sampler, LINEAR, LINEAR.timesteps(20), **{name: spread}, **options) > 0.02


# ---- the bound

class Cubature:
    """Twelve equally likely points, x_0 (12, 3) and noise: exact means of quadratic functions of the two."""

    def __init__(self):
        z = np.sqrt(6) * np.concatenate([np.eye(6), -np.eye(6)])
        self.x0, self.eps = z[:, :3] @ np.linalg.cholesky(S0).T, z[:, 3:]

    def standard_normal(self, shape, dtype):
        return self.eps


def bound(schedule, K, variance, **options):
    points = Cubature()
    reverse = reverse_model(Denoiser.from_world(WORLD, schedule), schedule, variance, **options)
    return elbo.negative_bound(points.x0, reverse, schedule, points, schedule.timesteps(K), bin_width=None).total.mean()


def floor(schedule, K):
    """Entropy of the data and KL(q(x_T) || N(0, marginal_var)), which no reverse step can change."""
    T = schedule.timesteps(K)[0]
    ratio = np.linalg.eigvalsh(marginal(schedule, T)) / schedule.marginal_var[T]
    return ENTROPY + gaussian.kl(0.0, ratio, 0.0, 1.0).sum()


AVERAGE = ReverseCovariance(sources.of_world, average=True)


@pytest.mark.parametrize("K", [1, 2, 5, 20, 100, 1000])
def test_L06_C15_with_the_full_covariance_the_bound_is_the_entropy_for_any_steps(K):
    assert bound(LINEAR, K, EXACT) == pytest.approx(floor(LINEAR, K), abs=1e-9)
    assert bound(LINEAR, K, "diagonal") > floor(LINEAR, K) + 1e-4
    if K <= 40:
        assert bound(GENERAL, K, EXACT) == pytest.approx(floor(GENERAL, K), abs=1e-11)
        assert bound(GENERAL, K, "full") == pytest.approx(floor(GENERAL, K), abs=1e-9)
    assert floor(LINEAR, K) - ENTROPY == pytest.approx(6.6e-10, rel=0.02)


@pytest.mark.parametrize("K", [2, 5, 10, 20, 100])
def test_L06_the_more_a_covariance_can_say_the_better_the_bound(K):
    full, diagonal, average = (bound(LINEAR, K, v) for v in (EXACT, "diagonal", AVERAGE))
    large, small = (bound(LINEAR, K, v, decoder="small") for v in ("large", "small"))
    assert full < diagonal < average < large < small
    table = sources.table(np.array([0, *(covariance_trace(t) for t in range(1, LINEAR.T + 1))]))
    assert bound(LINEAR, K, ReverseCovariance(table)) == pytest.approx(average, rel=1e-9)


def covariance_trace(t):
    return np.trace(WORLD.posterior_x0(np.zeros((1, 3)), t, LINEAR)[1][0]) / 3


def test_L06_anchors():
    assert bound(LINEAR, 10, EXACT) == pytest.approx(3.57357, abs=5e-6)
    assert bound(LINEAR, 10, "diagonal") == pytest.approx(3.6720, abs=5e-5)
    assert bound(LINEAR, 10, AVERAGE) == pytest.approx(3.7732, abs=5e-5)
    assert bound(LINEAR, 10, "large", decoder="small") == pytest.approx(4.1396, abs=5e-5)
    assert bound(LINEAR, 10, "small") == pytest.approx(1651.7, abs=0.05)
    for variance, excess in (("diagonal", 0.0094), (AVERAGE, 0.0202), ("large", 0.3658), ("small", 29.3)):
        decoder = {"decoder": "small"} if variance in ("large", "small") else {}
        found = bound(LINEAR, 100, variance, **decoder) - ENTROPY
        assert found == pytest.approx(excess, abs=0.05 if excess > 1 else 5e-5)


# ---- C17: a mixture, where no Gaussian step is exact

def test_C17_in_ten_steps_the_full_covariance_says_more(rng):
    """The stripes at 45 degrees: bound and samples, both better with the full covariance than with its diagonal."""
    world, n, times = GaussianMixture.stripes(), 20_000, LINEAR.timesteps(10)
    denoiser, x0, found, spread = Denoiser.from_world(world, LINEAR), world.sample(n, rng), {}, {}
    x_T = rng.standard_normal((n, 2))
    for name, variance in (("full", EXACT), ("diagonal", "learned")):
        reverse = reverse_model(denoiser, LINEAR, variance)
        found[name] = elbo.negative_bound(x0, reverse, LINEAR, np.random.default_rng(1), times, bin_width=None).total
        last = samplers.ddpm(denoiser, LINEAR, x_T, timesteps=times, variance=variance, rng=np.random.default_rng(2))
        spread[name] = np.cov(last.T)
    assert zscore(found["diagonal"] - found["full"]) > 20
    entropy = -world.log_density(x0)
    assert zscore(found["full"] - entropy) > 4                       # and still not log p: the step isn't a Gaussian
    wrong = {name: np.abs(cov - world.cov()).max() for name, cov in spread.items()}
    assert wrong["full"] < 0.5 * wrong["diagonal"], (spread, world.cov())
