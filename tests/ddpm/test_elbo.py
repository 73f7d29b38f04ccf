"""The bound on worlds where log p(x_0) is known, bugs planted against it, and what Rao-Blackwellization buys."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ddpm import elbo, gaussian
from ddpm.posterior import Posterior
from ddpm.schedule import NoiseSchedule
from nn.backend import array_module, per_example, to_host
from tests.ddpm.test_schedule import rescaled
from tests.helpers import general_schedule, property_test, schedules, zscore

SHORT = NoiseSchedule.from_betas(np.linspace(1e-3, 0.2, 50))
LEVELS = 2 * np.arange(256) / 255 - 1


def exact_reverse(schedule, m=0.0, tau2=1.0):
    """The true reverse process of N(m, tau2) data: Gaussian, its moments from E and Var of x_0 | x_t."""
    def reverse(x_t, s, t):
        lam_bar, sigma2_bar = schedule.lam_bar[t], schedule.sigma2_bar[t]
        gain = lam_bar * tau2 / (lam_bar**2 * tau2 + sigma2_bar)
        mean_x0 = m + per_example(gain, x_t) * (x_t - per_example(lam_bar * m, x_t))
        a, _, var = posterior = schedule.posterior(s, t)
        return posterior.mean(mean_x0, x_t), per_example(var + a**2 * (1 - gain * lam_bar) * tau2, x_t)
    return reverse


def contraction(schedule, scale=1.0, widen=1.0):
    """lam_ts x_t with variance sigma2_ts: exact for N(0, 1) data under VP noise, and wrong for scale, widen != 1."""
    def reverse(x_t, s, t):
        lam_ts, sigma2_ts = schedule.between(s, t)
        return per_example(scale * lam_ts, x_t) * x_t, per_example(widen * sigma2_ts, x_t)
    return reverse


# ---- the strongest single check: a bound that must be tight, and bugs that must show

class Shifted(NoiseSchedule):
    """Planted: posteriors of the next pair of times."""
    def posterior(self, s, t):
        return super().posterior(min(s + 1, self.T - 1), min(t + 1, self.T))


class Swapped(NoiseSchedule):
    """Planted: the weights of x_0 and x_t exchanged."""
    def posterior(self, s, t):
        a, b, var = super().posterior(s, t)
        return Posterior(b, a, var)


class StepVariance(NoiseSchedule):
    """Planted: the variance of the noising step for the posterior's."""
    def posterior(self, s, t):
        a, b, _ = super().posterior(s, t)
        return Posterior(a, b, self.between(s, t)[1])


def excess(schedule, seed=0, n=20_000, **options):
    """Negative bound plus log p(x_0) for N(0, 1) data, (n,) nats, and the bound."""
    rng = np.random.default_rng(seed)
    x0 = rng.standard_normal(n)
    true = NoiseSchedule(schedule.lam[1:], schedule.sigma2[1:])
    bound = elbo.negative_bound(x0, contraction(true), schedule, rng, bin_width=None, **options)
    return bound.total + gaussian.log_normal(x0, 0.0, 1.0), bound


def test_L06_bound_is_tight_for_the_exact_reverse_process():
    gap, bound = excess(SHORT)
    assert abs(zscore(gap)) < 4
    assert gap.std() / np.sqrt(gap.size) < 0.02                         # tight: what is left is a fiftieth of a nat
    assert bound.prior.shape == bound.decoder.shape == (20_000,) and bound.steps.shape == (49, 20_000)


@pytest.mark.parametrize("bug", [Shifted, Swapped, StepVariance])
def test_L06_planted_bugs_break_it(bug):
    gap, _ = excess(bug(SHORT.lam[1:], SHORT.sigma2[1:]))
    assert abs(zscore(gap)) > 20


def test_L06_dropping_the_decoder_breaks_it():
    gap, bound = excess(SHORT)
    assert abs(zscore(gap - bound.decoder)) > 20


@pytest.mark.parametrize("schedule, timesteps", [
    (NoiseSchedule.linear(100), NoiseSchedule.linear(100).timesteps(7)),
    (SHORT, SHORT.timesteps(10, "quadratic")),
    (SHORT, [50]),
    (SHORT, [1]),
], ids=["skip", "ends early", "one step from T", "one step from 1"])
def test_C15_the_bound_is_tight_for_any_subset_of_times(schedule, timesteps):
    """On Gaussian data a reverse step of any length is Gaussian, so that skipping costs nothing."""
    gap, bound = excess(schedule, timesteps=timesteps)
    assert abs(zscore(gap)) < 4 and bound.steps.shape[0] == len(timesteps) - 1


# ---- L05, L06: the chain

@pytest.mark.parametrize("schedule", [SHORT, general_schedule()], ids=["VP", "general"])
def test_L05_ancestral_sampling_of_the_exact_reverse_recovers_the_data(schedule, rng):
    m, tau2 = 0.7, 0.2
    reverse = exact_reverse(schedule, m, tau2)
    spread = schedule.lam_bar[-1]**2 * tau2 + schedule.sigma2_bar[-1]
    x = schedule.lam_bar[-1] * m + np.sqrt(spread) * rng.standard_normal(50_000)
    narrow = x.copy()
    for t in range(schedule.T, 0, -1):
        mean, var = reverse(x, t - 1, t)
        x = mean + np.sqrt(var) * rng.standard_normal(x.size)
        mean, _ = reverse(narrow, t - 1, t)
        narrow = mean + np.sqrt(schedule.posterior(t - 1, t).var) * rng.standard_normal(x.size)
    assert abs(zscore(x, m)) < 4 and abs(zscore((x - m)**2, tau2)) < 4
    assert abs(zscore((narrow - m)**2, tau2)) > 20                      # control: the posterior's variance alone


@pytest.mark.parametrize("timesteps", [None, [50, 20, 7, 1], [50]])
def test_L06_every_path_gives_log_p_for_the_exact_model(timesteps, rng):
    """With p the true joint, log p(x_{0:T}) - log q(x_{1:T}|x_0) = log p(x_0), whatever the path."""
    x0 = rng.standard_normal((5, 4))
    value = elbo.sampled_bound(x0, contraction(SHORT), SHORT, rng, timesteps)
    np.testing.assert_allclose(value, gaussian.log_normal(x0, 0.0, 1.0).sum(axis=1), rtol=1e-10)
    wrong = elbo.sampled_bound(x0, contraction(SHORT, scale=0.99), SHORT, rng, timesteps)
    assert abs(wrong - value).min() > 1e-6


def test_L06_every_path_gives_log_p_on_a_general_schedule(rng):
    schedule, m, tau2 = general_schedule(), 0.0, 0.5
    x0 = rng.standard_normal((5, 4))
    prior_var = schedule.lam_bar[-1]**2 * tau2 + schedule.sigma2_bar[-1]
    value = elbo.sampled_bound(x0, exact_reverse(schedule, m, tau2), schedule, rng, prior_var=prior_var)
    np.testing.assert_allclose(value, gaussian.log_normal(x0, m, tau2).sum(axis=1), rtol=1e-10)


@pytest.mark.parametrize("scale, widen", [(0.98, 1.0), (1.0, 1.2), (1.0, 0.8), (1.02, 1.1)])
def test_L06_a_wrong_model_has_a_worse_bound(scale, widen, rng):
    x0 = rng.standard_normal(20_000)
    model = contraction(SHORT, scale, widen)
    bound = elbo.negative_bound(x0, model, SHORT, rng, bin_width=None).total
    assert zscore(bound + gaussian.log_normal(x0, 0.0, 1.0)) > 20
    naive = elbo.sampled_bound(x0, model, SHORT, rng)
    assert abs(zscore(naive + bound)) < 4                               # both estimate the same bound


# ---- the prior, and schedules that aren't variance preserving

OTHERS = {"VE": NoiseSchedule.variance_exploding(50), "sub-VP": NoiseSchedule.sub_variance_preserving(50),
          "general": general_schedule()}


@property_test
@given(schedules(), st.data())
def test_L04_the_prior_costs_what_x_T_still_knows(schedule, data):
    """For N(0, 1) data E KL(q(x_t|x_0) || N(0, marginal_var)) is the mutual information, log(1 + snr)/2; other priors
    cost more. The KL is linear in x_0^2, so that x_0^2 = 1 stands for the mean."""
    t = data.draw(st.integers(1, schedule.T))
    x0 = np.array([1.0, -1.0])
    cost = elbo.prior_kl(x0, schedule, t)
    np.testing.assert_allclose(cost, 0.5 * np.log1p(schedule.snr[t]), rtol=1e-9, atol=1e-14)
    var = schedule.marginal_var[t]
    np.testing.assert_array_equal(elbo.prior_kl(x0, schedule, t, prior_var=float(var)), cost)
    for factor in (0.9, 1.1):
        assert (elbo.prior_kl(x0, schedule, t, prior_var=factor * var) > cost + 1e-3).all()


def test_L04_times_of_a_prior_may_differ(rng):
    schedule, t = NoiseSchedule.variance_exploding(20), np.array([3, 20])
    x0 = rng.standard_normal((2, 4)).astype(np.float32)
    both = elbo.prior_kl(x0, schedule, t)
    assert both.dtype == np.float32
    for i in range(2):
        np.testing.assert_allclose(both[i], elbo.prior_kl(x0[i:i + 1], schedule, int(t[i]))[0], rtol=1e-4, atol=1e-6)


@property_test
@given(schedules(), st.data())
def test_L06_every_path_gives_log_p_on_any_schedule_and_any_times(schedule, data):
    """N(0, 1) data, their exact reverse and the default prior: the bound is log p(x_0) along every single path."""
    times = sorted(data.draw(st.sets(st.integers(1, schedule.T), min_size=1)), reverse=True)
    rng = np.random.default_rng(0)
    x0 = rng.standard_normal((4, 3))
    log_p = gaussian.log_normal(x0, 0.0, 1.0).sum(axis=1)
    value = elbo.sampled_bound(x0, exact_reverse(schedule), schedule, rng, times)
    np.testing.assert_allclose(value, log_p, rtol=1e-8, atol=1e-8)
    wrong = elbo.sampled_bound(x0, exact_reverse(schedule), schedule, rng, times,
                               prior_var=1.3 * schedule.marginal_var[times[0]])
    assert abs(wrong - log_p).max() > 1e-2


@pytest.mark.parametrize("name", OTHERS)
def test_L06_bound_is_tight_on_other_schedules_with_its_default_prior(name):
    schedule, rng, n = OTHERS[name], np.random.default_rng(0), 20_000
    x0, reverse = rng.standard_normal(n), exact_reverse(schedule)
    log_p = gaussian.log_normal(x0, 0.0, 1.0)
    for timesteps in (None, schedule.timesteps(7), schedule.timesteps(10, "quadratic"), [1]):
        bound = elbo.negative_bound(x0, reverse, schedule, rng, timesteps, bin_width=None)
        assert abs(zscore(bound.total + log_p)) < 4
        first = schedule.T if timesteps is None else timesteps[0]
        np.testing.assert_array_equal(bound.prior, elbo.prior_kl(x0, schedule, first))
    wide = elbo.negative_bound(x0, reverse, schedule, rng, bin_width=None, prior_var=4 * schedule.marginal_var[-1])
    assert zscore(wide.total + log_p) > 20                              # control: another prior
    t = rng.integers(1, schedule.T + 1, n)
    assert abs(zscore(elbo.uniform_time_bound(x0, t, reverse, schedule, rng, bin_width=None) + log_p)) < 4


@property_test
@given(schedules())
def test_L06_the_bound_knows_a_process_by_its_signal_to_noise_ratio_alone(schedule):
    """Scaled to unit variance, with the model scaled alike, every process gives the bound of a VP one, term by term."""
    vp, r = rescaled(schedule)

    def wrong(x_t, s, t):
        mean, var = exact_reverse(schedule, 0.1, 0.5)(x_t, s, t)
        return mean + 0.05 * r[s], 1.2 * var

    def wrong_scaled(x_t, s, t):
        mean, var = wrong(r[t] * x_t, s, t)
        return mean / r[s], var / r[s]**2

    x0 = np.random.default_rng(0).uniform(-1, 1, (3, 4))
    ours, theirs = (elbo.negative_bound(x0, model, process, np.random.default_rng(1), bin_width=0.1)
                    for process, model in ((schedule, wrong), (vp, wrong_scaled)))
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-9)


# ---- L07, E06

def test_L07_uniform_times_estimate_the_bound(rng):
    n, model = 200_000, contraction(SHORT, 0.98, 1.1)
    x0 = rng.standard_normal(n)
    full = elbo.negative_bound(x0[:20_000], model, SHORT, rng, bin_width=None)
    t = rng.integers(1, SHORT.T + 1, n)
    single = elbo.uniform_time_bound(x0, t, model, SHORT, rng, bin_width=None)
    error = np.hypot(full.total.std() / np.sqrt(20_000), single.std() / np.sqrt(n))
    assert abs(single.mean() - full.total.mean()) < 4 * error
    prior = elbo.prior_kl(x0, SHORT)
    assert abs((prior + (single - prior) / SHORT.T).mean() - full.total.mean()) > 20 * error    # E06: no factor T


def test_E06_uniform_times_have_the_factor_T_exactly(rng):
    """A model whose every term is a known number: T times one term, not one term."""
    x0 = rng.standard_normal((6, 3))

    def reverse(x_t, s, t):                                             # knows x_0: means agree, variances e-fold
        posterior = SHORT.posterior(s, t)
        return posterior.mean(x0, x_t), per_example(np.e * posterior.var, x_t)

    value = elbo.uniform_time_bound(x0, np.array([2, 3, 10, 20, 49, 50]), reverse, SHORT, rng)
    step = 3 * 0.5 * (1 + np.exp(-1) - 1)
    np.testing.assert_allclose(value - elbo.prior_kl(x0, SHORT).sum(axis=1), SHORT.T * step, rtol=1e-9)


# ---- L09: Rao-Blackwellization

@pytest.mark.parametrize("s, t", [(1, 2), (4, 5), (19, 20), (49, 50), (5, 30)])
def test_L09_same_mean_smaller_variance(s, t, rng):
    """Analytic and sampled terms agree in the mean; the sampled variance is the analytic one plus E Var[. | x_t]."""
    n = 200_000
    x0 = rng.standard_normal(n)
    x_t = SHORT.add_noise(x0, t, rng.standard_normal(n))
    mean, var = contraction(SHORT, 0.97, 1.2)(x_t, s, t)
    posterior = SHORT.posterior(s, t)
    offset = posterior.mean(x0, x_t) - mean

    def variance(samples):
        centred = samples - samples.mean()
        return (centred**2).mean(), (centred**2).std() / np.sqrt(n)     # and its standard error

    for sampled, analytic, within in (
            (elbo.sampled_log_reverse(x0, x_t, mean, var, s, t, SHORT, rng),
             elbo.expected_log_reverse(x0, x_t, mean, var, s, t, SHORT),
             (offset**2 * posterior.var + posterior.var**2 / 2) / var**2),
            (elbo.sampled_step(x0, x_t, mean, var, s, t, SHORT, rng),
             -elbo.step_kl(x0, x_t, mean, var, s, t, SHORT),
             offset**2 * posterior.var / var**2 + (posterior.var / var - 1)**2 / 2)):
        assert abs(zscore(sampled - analytic)) < 4
        assert abs(zscore(sampled - analytic - posterior.var / (2 * var))) > 10     # control: L11 without its last term
        (naive, naive_error), (blackwell, error) = variance(sampled), variance(analytic)
        assert naive - blackwell > 5 * np.hypot(naive_error, error)
        assert abs(naive - blackwell - within.mean()) < 4 * np.hypot(naive_error, error)


# ---- L12, L13, E01

@pytest.mark.parametrize("schedule", [SHORT, general_schedule()], ids=["VP", "general"])
def test_L12_expected_term_is_minus_a_squared_error(schedule, rng):
    x0, x_t, mean = rng.standard_normal((3, 4, 5))
    s, t, var = 3, 9, 0.07
    a, b, post_var = schedule.posterior(s, t)
    constant = -0.5 * np.log(2 * np.pi * var) - post_var / (2 * var)
    squared = (a * x0 + b * x_t - mean)**2 / (2 * var)
    term = elbo.expected_log_reverse(x0, x_t, mean, var, s, t, schedule)
    np.testing.assert_allclose(term, constant - squared, rtol=1e-10)
    np.testing.assert_allclose(term, -elbo.step_kl(x0, x_t, mean, var, s, t, schedule) - gaussian.entropy(post_var),
                               rtol=1e-9, atol=1e-12)
    x0_hat = rng.standard_normal(x0.shape)                              # L13: the mean function a x0_hat + b x_t
    term = elbo.expected_log_reverse(x0, x_t, a * x0_hat + b * x_t, var, s, t, schedule)
    np.testing.assert_allclose(term, constant - a**2 / (2 * var) * (x0 - x0_hat)**2, rtol=1e-9)


def test_E01_raising_the_error_lowers_the_bound(rng):
    """Printed is +1/2 of the squared error, with which a worse model would have a better bound."""
    x0, x_t = rng.standard_normal((2, 100))
    a, b, post_var = SHORT.posterior(3, 4)
    perfect = a * x0 + b * x_t
    terms = [elbo.expected_log_reverse(x0, x_t, perfect + error, post_var, 3, 4, SHORT) for error in (0.0, 0.1, 0.2)]
    printed = [0.5 * (perfect - (perfect + error))**2 / post_var for error in (0.0, 0.1, 0.2)]
    assert (terms[0] > terms[1]).all() and (terms[1] > terms[2]).all()
    assert (printed[0] < printed[1]).all() and (printed[1] < printed[2]).all()


# ---- the decoder, s = 0

def test_E10_at_the_clean_end_the_term_is_the_decoder(rng):
    x0, x_1 = rng.standard_normal((2, 4, 3))
    mean, var = contraction(SHORT)(x_1, 0, 1)
    with pytest.raises(ValueError, match="s must be at least 1"):
        elbo.step_kl(x0, x_1, mean, var, 0, 1, SHORT)
    posterior = SHORT.posterior(0, 1)
    with np.errstate(divide="ignore"):
        assert np.isposinf(gaussian.kl(posterior.mean(x0, x_1), posterior.var, mean, var)).all()
    np.testing.assert_array_equal(elbo.expected_log_reverse(x0, x_1, mean, var, 0, 1, SHORT),
                                  -elbo.decoder_nats(x0, mean, var, bin_width=None))


def test_discretized_decoder_is_the_density_times_the_bin_where_bins_are_narrow(rng):
    """And the bound on levels is then log p of the level: the density's bound minus log(2/255)."""
    schedule, m, tau2 = NoiseSchedule.linear(100), 0.0, 0.04
    x0 = LEVELS[rng.integers(100, 156, (5000, 1))]
    reverse = exact_reverse(schedule, m, tau2)
    prior_var = schedule.lam_bar[-1]**2 * tau2 + schedule.sigma2_bar[-1]
    timesteps = [100, 50, 30, 20]
    levels = elbo.negative_bound(x0, reverse, schedule, np.random.default_rng(1), timesteps, prior_var=prior_var)
    density = elbo.negative_bound(x0, reverse, schedule, np.random.default_rng(1), timesteps, bin_width=None,
                                  prior_var=prior_var)
    np.testing.assert_array_equal(levels.steps, density.steps)
    np.testing.assert_allclose(levels.decoder, density.decoder - np.log(2 / 255), atol=5e-3)
    log_p = gaussian.discretized_log_likelihood(x0, m, tau2).sum(axis=1)
    assert abs(zscore(levels.total + log_p)) < 4


# ---- shapes, dtypes, devices, bad input

@pytest.mark.parametrize("shape", [(1, 4, 4, 1), (3, 4, 4, 2), (3, 5), (3,)])
def test_terms_are_per_example_and_float64(shape, rng):
    x0 = LEVELS[rng.integers(0, 256, shape)].astype(np.float32)
    bound = elbo.negative_bound(x0, contraction(SHORT), SHORT, rng, SHORT.timesteps(6))
    assert (bound.prior.shape, bound.steps.shape, bound.decoder.shape) == (shape[:1], (5, *shape[:1]), shape[:1])
    assert bound.total.shape == shape[:1] and bound.total.dtype == np.float64
    np.testing.assert_allclose(bound.prior, elbo.prior_kl(x0, SHORT).reshape(len(x0), -1).sum(axis=1), rtol=1e-5)
    exact = elbo.negative_bound(x0.astype(float), contraction(SHORT), SHORT, np.random.default_rng(3), [50, 1])
    assert np.isfinite(exact.total).all()
    t = np.arange(1, len(x0) + 1)
    single = elbo.uniform_time_bound(x0, t, contraction(SHORT), SHORT, rng)
    assert single.shape == shape[:1] and single.dtype == np.float64


def test_runs_on_a_device(fake, rng):
    x0 = LEVELS[rng.integers(0, 256, (3, 4, 4, 1))].astype(np.float32)
    x0_device, model = fake.asarray(x0), contraction(SHORT)
    for bin_width in (None, 2 / 255):
        host = elbo.negative_bound(x0, model, SHORT, np.random.default_rng(1), [50, 9, 1], bin_width=bin_width)
        fake.transfers.clear()
        rng_device = fake.random.default_rng(1)                         # a device's own generator: nothing is moved
        device = elbo.negative_bound(x0_device, model, SHORT, rng_device, [50, 9, 1], bin_width=bin_width)
        assert not fake.transfers
        for on_host, on_device in zip((*host, host.total), (*device, device.total), strict=True):
            assert array_module(on_device) is fake
            np.testing.assert_array_equal(to_host(on_device), on_host)
    t = np.array([1, 30, 1])
    np.testing.assert_array_equal(
        to_host(elbo.uniform_time_bound(x0_device, t, model, SHORT, fake.random.default_rng(2))),
        elbo.uniform_time_bound(x0, t, model, SHORT, np.random.default_rng(2)))
    np.testing.assert_array_equal(
        to_host(elbo.sampled_bound(x0_device, model, SHORT, fake.random.default_rng(2))),
        elbo.sampled_bound(x0, model, SHORT, np.random.default_rng(2)))
    x_t, mean = x0_device * 0.5, x0_device * 0.4
    for term in (elbo.step_kl, elbo.expected_log_reverse):
        assert array_module(term(x0_device, x_t, mean, 0.1, 3, 4, SHORT)) is fake
    for term in (elbo.sampled_step, elbo.sampled_log_reverse):
        assert array_module(term(x0_device, x_t, mean, 0.1, 3, 4, SHORT, rng)) is fake


def test_bad_input(rng):
    x0, model = np.zeros((2, 3)), contraction(SHORT)
    for timesteps in ([], [3, 5], [5, 5], [51, 1], [5, 0]):
        with pytest.raises(ValueError, match="timesteps must descend within 50..1"):
            elbo.negative_bound(x0, model, SHORT, rng, timesteps)
    for t in (3, np.array([1, 2, 3]), np.array([0, 1]), np.array([1, 51])):
        with pytest.raises(ValueError, match="t must hold one integer in 1..50 for each of the 2 examples"):
            elbo.uniform_time_bound(x0, t, model, SHORT, rng)
