"""What Rao-Blackwellization removes of a variance, and what it can't: closed forms, quadrature, brute force."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ddpm import elbo, gaussian
from ddpm.denoiser import Denoiser
from ddpm.gaps import gaussian_gap
from ddpm.likelihood import reverse_model
from ddpm.mixture import GaussianMixture
from ddpm.rao_blackwell import Estimate, compare_bound, compare_step, log_ratio_variance, path_terms
from ddpm.schedule import NoiseSchedule
from nn.backend import array_module, per_example, to_host
from tests.helpers import general_schedule, property_test, schedules, zscore

SHORT = NoiseSchedule.from_betas(np.linspace(1e-3, 0.2, 50))
LINEAR = NoiseSchedule.linear(1000)
NODES, WEIGHTS = np.polynomial.hermite_e.hermegauss(9)                  # exact for polynomials up to degree 17
WEIGHTS = WEIGHTS / WEIGHTS.sum()


def contraction(schedule, scale=1.0, widen=1.0):
    """scale lam_ts x_t with variance widen sigma2_ts: exact for N(0, 1) data under VP noise without the two factors."""
    def reverse(x_t, s, t):
        lam_ts, sigma2_ts = schedule.between(s, t)
        return per_example(scale * lam_ts, x_t) * x_t, per_example(widen * sigma2_ts, x_t)
    return reverse


def best_gaussian(world, schedule, widen=1.0):
    """The reverse step with the exact mean and (diagonal) variance of a world's x_s | x_t."""
    reverse = reverse_model(Denoiser.from_world(world, schedule), schedule, "learned")
    return lambda x_t, s, t: (lambda mean, var: (mean, widen * var))(*reverse(x_t, s, t))


def agree(estimate, claim, sigmas=4):
    """Whether an Estimate is within its standard errors of a number or of another, independent Estimate."""
    claim = claim if isinstance(claim, Estimate) else Estimate(claim, 0.0)
    return abs(estimate.value - claim.value) < sigmas * np.hypot(estimate.error, claim.error)


# ---- the variance of a log-ratio

@property_test
@given(st.floats(-3, 3), st.floats(0.01, 5), st.floats(-3, 3), st.floats(0.01, 5))
def test_L09_variance_of_a_log_ratio_by_quadrature(mean_q, var_q, mean_p, var_p):
    x = mean_q + var_q**0.5 * NODES
    log_ratio = gaussian.log_normal(x, mean_p, var_p) - gaussian.log_normal(x, mean_q, var_q)
    mean = WEIGHTS @ log_ratio
    assert mean == pytest.approx(-gaussian.kl(mean_q, var_q, mean_p, var_p), rel=1e-9, abs=1e-9)
    exact = WEIGHTS @ (log_ratio - mean)**2
    assert log_ratio_variance(mean_q, var_q, mean_p, var_p) == pytest.approx(exact, rel=1e-8, abs=1e-10)
    alone = WEIGHTS @ (gaussian.log_normal(x, mean_p, var_p) + gaussian.cross_entropy(mean_q, var_q, mean_p, var_p))**2
    assert alone - exact == pytest.approx(var_q / var_p - 0.5, rel=1e-6, abs=1e-6 * alone)     # control: without log q


@property_test
@given(st.floats(-3, 3), st.floats(0.01, 5), st.floats(-3, 3))
def test_L09_with_equal_variances_it_is_twice_the_divergence(mean_q, var, mean_p):
    twice = 2 * gaussian.kl(mean_q, var, mean_p, var)
    assert log_ratio_variance(mean_q, var, mean_p, var) == pytest.approx(twice, rel=1e-12, abs=1e-300)


# ---- one term

def linear_step(schedule, s, t, scale, widen, dims):
    """The exact Comparison of N(0, 1) data under `contraction`: mean_q - mean_p = alpha x_0 + beta eps."""
    a, b, post_var = schedule.posterior(s, t)
    lam_ts, sigma2_ts = schedule.between(s, t)
    var, excess = widen * sigma2_ts, b - scale * lam_ts
    alpha, beta = a + excess * schedule.lam_bar[t], excess * np.sqrt(schedule.sigma2_bar[t])
    d2, ratio = alpha**2 + beta**2, post_var / var
    mean = -dims * 0.5 * (ratio - 1 - np.log(ratio) + d2 / var)
    between = dims * alpha**4 / (2 * var**2)
    analytic = dims * (beta**4 + 2 * alpha**2 * beta**2) / (2 * var**2)
    naive = analytic + dims * (d2 * post_var / var**2 + (ratio - 1)**2 / 2)
    return mean, between, naive, analytic, naive / analytic, (between + naive) / (between + analytic)


@property_test
@given(schedules(), st.data())
def test_L09_law_of_total_variance(schedule, data):
    """Quadrature over x_0, eps and x_s, for N(0, 1) data: the three parts are the whole, for any s < t and schedule."""
    s, t = sorted(data.draw(st.lists(st.integers(1, schedule.T), min_size=2, max_size=2, unique=True)))
    scale, widen = data.draw(st.floats(0.8, 1.2)), data.draw(st.floats(0.7, 1.5))
    x0, eps, z = np.meshgrid(NODES, NODES, NODES, indexing="ij")
    weights = WEIGHTS[:, None, None] * WEIGHTS[:, None] * WEIGHTS
    x_t = schedule.add_noise(x0, t, eps)
    mean, var = contraction(schedule, scale, widen)(x_t, s, t)
    posterior = schedule.posterior(s, t)
    mean_q = posterior.mean(x0, x_t)
    x_s = mean_q + np.sqrt(posterior.var) * z
    naive = gaussian.log_normal(x_s, mean, var) - gaussian.log_normal(x_s, mean_q, posterior.var)
    analytic = -elbo.step_kl(x0, x_t, mean, var, s, t, schedule)
    removed = log_ratio_variance(mean_q, posterior.var, mean, var)

    def variance(values):
        return (weights * (values - (weights * values).sum())**2).sum()

    given_x0 = (WEIGHTS @ analytic[..., 0].T)                           # E[analytic | x_0]
    between, removed = WEIGHTS @ (given_x0 - WEIGHTS @ given_x0)**2, (weights * removed).sum()
    exact = linear_step(schedule, s, t, scale, widen, dims=1)
    assert variance(naive) == pytest.approx(variance(analytic) + removed, rel=1e-8)
    assert variance(naive) > variance(analytic) * (1 + 1e-12)
    assert (exact[0], exact[1], exact[2]) == pytest.approx(
        ((weights * naive).sum(), between, variance(naive) - between), rel=1e-6, abs=1e-12)


@pytest.mark.parametrize("schedule, s, t, scale, widen", [
    (SHORT, 1, 2, 1.0, 1.0), (SHORT, 19, 20, 0.99, 1.2), (SHORT, 5, 30, 0.97, 0.8), (SHORT, 49, 50, 1.0, 1.0),
    (general_schedule(), 3, 4, 0.9, 1.1), (general_schedule(), 2, 19, 1.0, 1.0)])
def test_L09_compare_step_finds_the_closed_forms(schedule, s, t, scale, widen, rng):
    x0 = rng.standard_normal((20_000, 3))
    found = compare_step(x0, contraction(schedule, scale, widen), s, t, schedule, rng, draws=3)
    exact = linear_step(schedule, s, t, scale, widen, dims=3)
    for name, estimate, claim in zip(found._fields, found, exact, strict=True):
        assert agree(estimate, claim), name
    assert found.factor.error < 0.05 * found.factor.value
    assert not agree(found.naive, exact[3], sigmas=10)                  # control: nothing removed
    assert not agree(found.overall, exact[2] / exact[3] + 1, sigmas=3)


@pytest.mark.parametrize("s, t, draws", [(1, 2, 2), (99, 100, 2), (20, 300, 5)])
def test_L09_the_drawn_term_varies_as_much_as_said(s, t, draws, rng):
    """On the mixture: the variance of `elbo.sampled_step`, drawn, is the one that compare_step adds up."""
    world = GaussianMixture.two_component()
    model, x0 = best_gaussian(world, LINEAR), world.sample(20_000, rng)
    found = compare_step(x0, model, s, t, LINEAR, rng, draws=draws)
    terms = np.empty((8, len(x0)))
    for row in terms:
        x_t = LINEAR.add_noise(x0, t, rng.standard_normal(x0.shape))
        row[:] = elbo.sampled_step(x0, x_t, *model(x_t, s, t), s, t, LINEAR, rng).sum(axis=1)
    variances = terms.var(axis=0, ddof=1)
    drawn = Estimate(variances.mean(), variances.std() / np.sqrt(len(x0)))
    assert agree(found.naive, drawn) and agree(found.mean, Estimate(terms.mean(), terms.std() / np.sqrt(len(x0))))
    assert not agree(found.analytic, drawn, sigmas=10)
    assert found.factor.value == pytest.approx(found.naive.value / found.analytic.value)


@pytest.mark.parametrize("t", [100, 400, 800])
def test_L09_factor_of_a_small_step_is_dimensions_per_nat(t):
    """For the exact model of N(0, 1) data: overall = 1 + D/KL, up to terms that vanish with the step."""
    errors = []
    for T in (1000, 4000):
        schedule = NoiseSchedule.linear(T)
        mean, *_, overall = linear_step(schedule, t * T // 1000 - 1, t * T // 1000, 1.0, 1.0, dims=5)
        errors.append(abs((overall - 1) * -mean / 5 - 1))
    assert errors[0] < 0.02 and errors[1] < 0.3 * errors[0]


def test_standard_errors_are_those_of_repetitions():
    """The jackknife of 300 examples, over 200 repetitions with 300 others: z has about unit spread."""
    exact = linear_step(SHORT, 19, 20, 0.99, 1.2, dims=2)
    z = np.empty((200, len(exact)))
    for i, row in enumerate(z):
        rng = np.random.default_rng(i)
        found = compare_step(rng.standard_normal((300, 2)), contraction(SHORT, 0.99, 1.2), 19, 20, SHORT, rng)
        row[:] = [(estimate.value - claim) / estimate.error for estimate, claim in zip(found, exact, strict=True)]
    assert ((abs(z) < 2).mean(axis=0) > 0.85).all() and ((abs(z) < 1).mean(axis=0) < 0.85).all()


# ---- the whole bound

SIX = 0.7 * np.random.default_rng(6).standard_normal((6, 2))
MANY = np.tile(SIX, (4000, 1))                                          # variances given x_0 need few x_0, often


def variance_given_x0(values, parts=20):
    """E Var[. | x_0] of values at MANY, with its standard error from parts of the repetitions."""
    variances = [part.var(axis=0, ddof=1).mean() for part in np.split(values.reshape(-1, len(SIX)), parts)]
    return Estimate(float(np.mean(variances)), float(np.std(variances, ddof=1) / np.sqrt(parts)))


@pytest.mark.parametrize("schedule, timesteps", [(SHORT, [50, 20, 7, 1]), (general_schedule(), None), (SHORT, [30])])
def test_L06_a_path_adds_up_to_the_sampled_bound(schedule, timesteps):
    x0 = np.random.default_rng(1).standard_normal((5, 4))
    model = contraction(schedule, 0.98, 1.1)
    terms = path_terms(x0, model, schedule, np.random.default_rng(2), timesteps, bin_width=None)
    path = elbo.sampled_bound(x0, model, schedule, np.random.default_rng(2), timesteps)
    np.testing.assert_allclose(terms.sampled.sum(axis=0), path, rtol=1e-10)
    assert terms.sampled.shape == ((schedule.T if timesteps is None else len(timesteps)) + 1, 5)
    assert (terms.sampled[-1] == terms.analytic[-1]).all() and (terms.removed[-1] == 0).all()    # the decoder
    assert (terms.removed[:-1] > 0).all()


@pytest.mark.parametrize("schedule", [SHORT, general_schedule()], ids=["VP", "general"])
def test_L09_terms_of_a_path_have_the_means_of_the_bound(schedule, rng):
    x0 = rng.standard_normal((20_000, 2))
    model, times = contraction(schedule, 0.97, 1.2), [20, 12, 5, 1]
    terms = path_terms(x0, model, schedule, rng, times)
    bound = elbo.negative_bound(x0, model, schedule, rng, times)
    np.testing.assert_allclose(terms.analytic[0], -bound.prior, rtol=1e-12)
    for row, independent in enumerate((*bound.steps, bound.decoder), 1):
        for of_path in (terms.sampled, terms.analytic):
            assert abs(zscore(of_path[row] + independent)) < 4
            if row < 4:
                assert abs(zscore(of_path[row] + terms.removed[row] + independent)) > 10
        # given x_t and x_0 the drawn term has the variance that is said to be removed
        assert row == 4 or abs(zscore((terms.sampled - terms.analytic)[row]**2 - terms.removed[row])) < 4


@pytest.mark.parametrize("schedule", [SHORT, general_schedule()], ids=["VP", "general"])
def test_L09_what_x_s_adds_to_a_path_is_uncorrelated(schedule, rng):
    """sampled - analytic has mean 0 given all later times: on a path, too, the variances of these differences add."""
    x0 = rng.standard_normal(40_000)
    terms = path_terms(x0, contraction(schedule, 0.95, 1.3), schedule, rng, [20, 15, 10, 5, 2, 1])
    difference, removed = (terms.sampled - terms.analytic).sum(axis=0), terms.removed.sum(axis=0)
    assert abs(zscore(difference)) < 4 and abs(zscore(difference**2 - removed)) < 4
    assert abs(zscore(difference**2 - 1.2 * removed)) > 4


@pytest.mark.parametrize("schedule, var, timesteps", [
    (SHORT, 1.0, None), (SHORT, 1.0, [50, 20, 7, 1]), (general_schedule(), 0.5, None)])
def test_L09_on_a_path_of_the_exact_model_only_the_analytic_sum_varies(schedule, var, timesteps, rng):
    """Each single term gains by Rao-Blackwellization, and so does a sum of independent ones; that of a path loses."""
    world = GaussianMixture([1.0], [[0.0, 0.0]], [var * np.eye(2)])
    x0, exact = world.sample(200, rng), best_gaussian(world, schedule)
    prior_var = schedule.lam_bar[-1]**2 * var + schedule.sigma2_bar[-1]
    found = compare_bound(x0, exact, schedule, rng, timesteps, bin_width=None, prior_var=prior_var)
    assert found.path.naive.value < 1e-20 and found.path.factor.value < 1e-18
    assert found.path.analytic.value > 5 * found.path.analytic.error > 0
    assert found.independent.factor.value > 1 + 10 * found.independent.factor.error
    assert found.uniform.factor.value > 1 + 10 * found.uniform.factor.error
    assert found.path.mean.value == pytest.approx(world.log_density(x0).mean(), rel=1e-10)
    wrong = compare_bound(x0, best_gaussian(world, schedule, widen=1.05), schedule, rng, timesteps, bin_width=None,
                          prior_var=prior_var)
    assert wrong.path.naive.value > 1e-6                                # control: only the exact model is constant


def test_L09_independent_terms_against_brute_force(rng):
    """Variances given x_0 of elbo.negative_bound itself, and of the same with drawn x_s, over many repetitions."""
    times, model = [50, 20, 7, 1], contraction(SHORT, 0.97, 1.2)
    analytic = variance_given_x0(elbo.negative_bound(MANY, model, SHORT, rng, times).total)
    x_T = SHORT.add_noise(MANY, 50, rng.standard_normal(MANY.shape))
    log_q = gaussian.log_normal(x_T, SHORT.lam_bar[50] * MANY, SHORT.sigma2_bar[50])
    naive = gaussian.log_normal(x_T, 0.0, 1.0) - log_q
    for t, s in zip(times, [*times[1:], 0], strict=True):
        naive += sampled_pair(MANY, s, t, model, SHORT, rng)
    naive = variance_given_x0(naive.sum(axis=1))
    for draws in (2, 5):
        found = compare_bound(MANY, model, SHORT, rng, times, draws=draws).independent
        assert agree(found.analytic, analytic) and agree(found.naive, naive)
    assert not agree(naive, analytic, sigmas=10)


@pytest.mark.parametrize("schedule", [NoiseSchedule.from_betas([0.05, 0.2, 0.4]), general_schedule(4)],
                         ids=["VP", "general"])
def test_L07_uniform_times_against_brute_force(schedule, rng):
    """elbo.uniform_time_bound, and the same with drawn x_s, at one random time for each repetition."""
    model, t = contraction(schedule, 0.7, 1.3), rng.integers(1, schedule.T + 1, len(MANY))
    analytic = variance_given_x0(elbo.uniform_time_bound(MANY, t, model, schedule, rng))
    naive = -elbo.prior_kl(MANY, schedule)
    for now in range(1, schedule.T + 1):
        naive[t == now] += schedule.T * sampled_pair(MANY[t == now], now - 1, now, model, schedule, rng)
    naive = variance_given_x0(naive.sum(axis=1))
    for draws in (2, 5):
        found = compare_bound(MANY, model, schedule, rng, draws=draws).uniform
        assert agree(found.analytic, analytic) and agree(found.naive, naive)
    assert not agree(naive, analytic)


def sampled_pair(x0, s, t, model, schedule, rng):
    """The naive term of the pair (s, t) at a fresh x_t, shaped as x0; at s = 0 the decoder."""
    x_t = schedule.add_noise(x0, t, rng.standard_normal(x0.shape))
    mean, var = model(x_t, s, t)
    return elbo.sampled_step(x0, x_t, mean, var, s, t, schedule, rng) if s else -elbo.decoder_nats(x0, mean, var)


# ---- the bound where log p(x_0) is known

@pytest.mark.parametrize("timesteps", [[1000, 600, 300, 150, 60, 20, 5, 1], [1000, 300], [400]])
def test_L06_G12_the_bound_misses_log_p_by_the_gaps_of_its_steps(timesteps, rng):
    """E log p(x_0) - bound = KL of x_T from the prior + sum E KL(x_s | x_t, its best Gaussian), on the mixture."""
    world = GaussianMixture.two_component()
    x0 = world.sample(40_000, rng)
    last = world.noised(timesteps[0], LINEAR)
    prior = np.linspace(-6, 6, 4001)[:, None]
    density = np.exp(last.log_density(prior))
    of_prior = (density * (last.log_density(prior) - gaussian.log_normal(prior[:, 0], 0.0, 1.0))).sum() * 12 / 4000
    gaps = [gaussian_gap(world, s, t, LINEAR, nodes=150) for t, s in zip(timesteps, [*timesteps[1:], 0], strict=True)]
    missed = world.log_density(x0) - elbo.sampled_bound(x0, best_gaussian(world, LINEAR), LINEAR, rng, timesteps)
    assert abs(zscore(missed, of_prior + sum(gaps))) < 4
    assert abs(zscore(missed, of_prior + sum(gaps) - max(gaps))) > 20
    worse = world.log_density(x0) - elbo.sampled_bound(x0, best_gaussian(world, LINEAR, 2.0), LINEAR, rng, timesteps)
    assert zscore(worse, of_prior + sum(gaps)) > 10


def test_L06_the_bound_is_tight_for_correlated_data_seen_along_its_axes(rng):
    """One Gaussian with a diagonal covariance: no gap; turned by 45 degrees, a diagonal reverse step has one."""
    straight = GaussianMixture([1.0], [[0.0, 0.0]], [np.diag([1.9, 0.1])])
    missed = []
    for world in (straight, straight.rotated(45)):
        x0 = world.sample(300, rng)
        found = compare_bound(x0, best_gaussian(world, SHORT), SHORT, rng, [50, 25, 10], draws=8,
                              bin_width=None)
        missed.append(world.log_density(x0).mean() - found.path.mean.value)
    assert abs(missed[0]) < 0.02 and missed[1] > 0.2


# ---- shapes, dtypes, devices, bad input

@pytest.mark.parametrize("shape", [(3,), (3, 5), (4, 4, 4, 2)])
def test_images_in_float32_give_what_float64_gives(shape):
    x0 = np.random.default_rng(0).uniform(-1, 1, shape)
    model = contraction(SHORT, 0.99, 1.1)
    single, double = ([
        compare_step(x, model, 9, 10, SHORT, np.random.default_rng(1)).naive,
        path_terms(x, model, SHORT, np.random.default_rng(1), [50, 9, 1])] for x in (x0.astype(np.float32), x0))
    assert all(isinstance(v, float) for v in (*single[0], *double[0])) and single[0].value > 0
    for terms in (single[1], double[1]):
        assert all(field.dtype == np.float64 and field.shape == (4, len(x0)) for field in terms)


def test_runs_on_a_device(fake):
    x0, model = np.random.default_rng(0).uniform(-1, 1, (3, 4, 4, 1)).astype(np.float32), contraction(SHORT, 0.99, 1.1)
    x0_device = fake.asarray(x0)
    host = path_terms(x0, model, SHORT, np.random.default_rng(1), [50, 9, 1])
    fake.transfers.clear()
    device = path_terms(x0_device, model, SHORT, fake.random.default_rng(1), [50, 9, 1])
    assert not fake.transfers
    for on_host, on_device in zip(host, device, strict=True):
        assert array_module(on_device) is fake
        np.testing.assert_array_equal(to_host(on_device), on_host)
    assert (compare_step(x0_device, model, 3, 9, SHORT, fake.random.default_rng(1))
            == compare_step(x0, model, 3, 9, SHORT, np.random.default_rng(1)))
    assert (compare_bound(x0_device, model, SHORT, fake.random.default_rng(1), [50, 9, 1])
            == compare_bound(x0, model, SHORT, np.random.default_rng(1), [50, 9, 1]))
    assert array_module(log_ratio_variance(x0_device, 0.1, 0.9 * x0_device, 0.2)) is fake


def test_bad_input(rng):
    x0, model = np.zeros((3, 2)), contraction(SHORT)
    with pytest.raises(ValueError, match="s must be at least 1"):
        compare_step(x0, model, 0, 1, SHORT, rng)
    with pytest.raises(ValueError, match="x0 must hold at least 3 examples"):
        compare_step(x0[:2], model, 1, 2, SHORT, rng)
    with pytest.raises(ValueError, match="draws must be at least 2"):
        compare_bound(x0, model, SHORT, rng, draws=1)
    for timesteps in ([], [3, 5], [5, 5], [51, 1], [5, 0]):
        with pytest.raises(ValueError):
            path_terms(x0, model, SHORT, rng, timesteps)


def test_a_model_that_knows_x_0_leaves_nothing_to_compare(rng):
    """All variances are 0, and their ratio is no number; a constant divergence gives an infinite one."""
    x0 = np.full((5, 3), 0.3)
    posterior = SHORT.posterior(4, 9)
    exact = compare_step(x0, lambda x_t, s, t: (posterior.mean(x0, x_t), posterior.var), 4, 9, SHORT, rng)
    assert exact.mean == exact.naive == exact.analytic == (0.0, 0.0) and np.isnan(exact.factor.value)
    wide = compare_step(x0, lambda x_t, s, t: (posterior.mean(x0, x_t), 2 * posterior.var), 4, 9, SHORT, rng)
    assert wide.naive.value == pytest.approx(3 / 8, rel=1e-12) and wide.factor.value > 1e20
