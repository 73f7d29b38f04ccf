"""The probability flow where its paths are known, its likelihood where the density is, and the bound beside it."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import ndtr

from ddpm import elbo
from ddpm.flow import exact_trace, flow_log_likelihood, hutchinson_trace, solve_flow
from ddpm.gaps import gaussian_gap
from ddpm.mixture import GaussianMixture
from ddpm.schedule import NoiseSchedule
from ddpm.sde import LinearSDE
from tests.helpers import zscore

VP, SUB = LinearSDE.variance_preserving(), LinearSDE.sub_variance_preserving()
VE = LinearSDE.variance_exploding(0.05, 10)
SDES = {"vp": VP, "sub-vp": SUB, "ve": VE}
each_sde = pytest.mark.parametrize("sde", SDES.values(), ids=SDES)

TWO, TURNED = GaussianMixture.two_component(), GaussianMixture.grid(rotation_degrees=30)
TILTED = GaussianMixture([1.0], [[0.4, -0.3]], [[[1.0, 0.8], [0.8, 1.0]]])
WORLDS = {"two": TWO, "grid": TURNED, "correlated": TILTED}
TIGHT = {"rtol": 1e-9, "atol": 1e-11}


def score_of(world, sde, factor=1.0):
    return lambda x, u: factor * sde.noised(world, u).score(x)


def trace_of(world, sde):
    return exact_trace(lambda x, u: sde.noised(world, u).hessian(x))


def vjp_of(world, sde):
    """z^T (Jacobian of the score); the Jacobian is the Hessian of the log-density, and symmetric."""
    return lambda x, u, z: (sde.noised(world, u).hessian(x) @ z[:, :, None])[:, :, 0]


def cdf(x, world):
    return sum(w * ndtr((x - m) / c**0.5) for w, m, c in
               zip(world.weights, world.means[:, 0], world.covariances[:, 0, 0], strict=True))


# ---- paths

@each_sde
def test_L20_the_flow_of_a_gaussian_stretches_its_axes(sde, rng):
    """In the eigenvectors of the covariance, y - mean grows like the standard deviation, and nothing mixes."""
    x, start, end = TILTED.sample(20, rng), sde.noised(TILTED, 0.1), sde.noised(TILTED, 0.9)
    _, Q = np.linalg.eigh(TILTED.covariances[0])
    stretch = np.sqrt(np.diag(Q.T @ end.cov() @ Q) / np.diag(Q.T @ start.cov() @ Q))
    expected = end.mean() + (x - start.mean()) @ Q * stretch @ Q.T
    moved = solve_flow(x, score_of(TILTED, sde), sde, 0.1, 0.9, **TIGHT)
    np.testing.assert_allclose(moved, expected, rtol=1e-7, atol=1e-8)
    twice = solve_flow(x, score_of(TILTED, sde, factor=2.0), sde, 0.1, 0.9, **TIGHT)       # control: g^2 for g^2/2
    assert np.abs(twice - expected).max() > 0.1
    back = solve_flow(moved, score_of(TILTED, sde), sde, 0.9, 0.1, **TIGHT)
    np.testing.assert_allclose(back, x, rtol=1e-7, atol=1e-8)


@each_sde
def test_L20_on_the_line_the_flow_keeps_quantiles(sde):
    """Paths can't cross on the line, and the law is kept: a point stays the same quantile of the mixture."""
    x = np.linspace(-1.8, 1.4, 33)[:, None]
    seen = solve_flow(x, score_of(TWO, sde), sde, 0.0, 1.0, times=[0.0, 0.2, 0.6, 1.0], **TIGHT)
    assert seen.shape == (4, 33, 1)
    for u, at_u in zip((0.0, 0.2, 0.6, 1.0), seen, strict=True):
        np.testing.assert_allclose(cdf(at_u, sde.noised(TWO, u)), cdf(x, TWO), atol=1e-8)
    np.testing.assert_allclose(solve_flow(x, score_of(TWO, sde), sde, 0.0, 1.0, **TIGHT), seen[-1], atol=1e-9)


def test_solve_flow_keeps_shapes_and_works_in_float64(rng):
    """Images of any shape; float32 comes back as float64; from u to u nothing moves."""
    images = rng.standard_normal((3, 4, 4, 2)).astype(np.float32)

    def score(x, u):
        assert x.dtype == np.float64 and x.shape == images.shape
        lam_bar, sigma2_bar = VP.moments(u)
        return -x / (0.25 * lam_bar**2 + sigma2_bar)                                       # data N(0, 1/4)
    moved = solve_flow(images, score, VP, 0.0, 1.0, **TIGHT)
    assert moved.dtype == np.float64 and images.dtype == np.float32
    lam_bar, sigma2_bar = VP.moments(1.0)
    np.testing.assert_allclose(moved, images * 2 * (0.25 * lam_bar**2 + sigma2_bar)**0.5, rtol=1e-7)
    np.testing.assert_array_equal(solve_flow(images, score, VP, 0.5, 0.5), images)


# ---- the likelihood, exact

@each_sde
@pytest.mark.parametrize("world", WORLDS.values(), ids=WORLDS)
def test_L20_flow_likelihood_is_the_density(world, sde, rng):
    """To 1e-6 nats, at the data and at a later time; with g^2 in the place of g^2/2 it is off by more than 0.1."""
    for u0 in (0.0, 0.3):
        law = sde.noised(world, u0)
        x = np.concatenate([law.sample(20, rng), 1.5 * law.sample(5, rng)])                # some of them far out
        options = {"divergence": trace_of(world, sde), "u0": u0, "log_prior": sde.noised(world, 1.0).log_density}
        found = flow_log_likelihood(x, score_of(world, sde), sde, **options, **TIGHT)
        np.testing.assert_allclose(found.log_density, law.log_density(x), rtol=1e-7, atol=1e-6)
        assert (found.standard_error == 0).all() and found.x1.shape == x.shape and found.evaluations > 50
    wrong = flow_log_likelihood(x, score_of(world, sde, factor=2.0), sde, **options)
    assert np.abs(wrong.log_density - law.log_density(x)).max() > 0.1


def test_L20_point_masses_have_a_density_from_u0_on(rng):
    points = GaussianMixture([0.5, 0.5], [[-1.0], [0.5]], np.zeros((2, 1, 1)))
    x = VP.noised(points, 1e-3).sample(10, rng)
    found = flow_log_likelihood(x, score_of(points, VP), VP, divergence=trace_of(points, VP), u0=1e-3,
                                log_prior=VP.noised(points, 1.0).log_density, **TIGHT)
    np.testing.assert_allclose(found.log_density, VP.noised(points, 1e-3).log_density(x), atol=1e-6)
    with pytest.raises(ValueError, match="no density"):
        solve_flow(x, score_of(points, VP), VP, 1.0, 0.0)


@settings(max_examples=10, deadline=None, derandomize=True)
@given(st.integers(0, 1000))
def test_L20_any_score_gives_a_density_that_integrates_to_one(seed):
    """The flow of a wrong score is a bijection all the same; dropping the stretching leaves no density."""
    a, b, c = np.random.default_rng(seed).uniform(0.3, 1.5, 3)

    def score(x, u):
        return -a * x + b * np.sin(3 * c * x)

    def slope(x, u):
        return (-a + 3 * b * c * np.cos(3 * c * x))[:, 0]
    sde = LinearSDE.variance_preserving(0.1, 3.0)
    x = np.linspace(-12, 12, 4001)[:, None]
    found = flow_log_likelihood(x, score, sde, divergence=slope)
    mass = np.exp(found.log_density).sum() * (x[1, 0] - x[0, 0])
    assert mass == pytest.approx(1, abs=1e-5)
    bare = np.exp(-found.x1**2 / 2).sum() / (2 * np.pi)**0.5 * (x[1, 0] - x[0, 0])
    assert abs(bare - 1) > 1e-3


def test_L20_prior_var_is_the_gaussian_at_the_end(rng):
    """For data of unit variance it need not be given, and is right but for what x_1 remembers of their shape."""
    x, world = TWO.sample(20, rng), GaussianMixture([1.0], [[0.0]], [[[0.7]]])
    for sde in (VP, VE):
        near = flow_log_likelihood(x, score_of(TWO, sde), sde, divergence=trace_of(TWO, sde))
        np.testing.assert_allclose(near.log_density, TWO.log_density(x), atol=1e-3)
    prior_var = VE.moments(1.0)[1] + 0.7
    found = flow_log_likelihood(x, score_of(world, VE), VE, divergence=trace_of(world, VE), prior_var=prior_var)
    np.testing.assert_allclose(found.log_density, world.log_density(x), atol=1e-6)


# ---- the likelihood, estimated

@pytest.mark.parametrize("kind", ["rademacher", "gaussian"])
def test_L20_hutchinson_is_z_M_z_for_a_gaussian(kind):
    """Its integrated Jacobian M is known, so each probe's value is, their mean, and their variance 2 sum M_ij^2.

    (Over i != j for signs.) Each of the N points has probes of its own, so the points are samples of the estimate.
    """
    N, x = 4000, TILTED.sample(4000, np.random.default_rng(0))
    d, Q = np.linalg.eigh(TILTED.covariances[0])
    lam_bar, sigma2_bar = VP.moments(1.0)
    M = Q * (0.5 * np.log((lam_bar**2 * d + sigma2_bar) / d) - np.log(lam_bar)) @ Q.T      # -int g^2/2 Hessian du
    divergence = hutchinson_trace(vjp_of(TILTED, VP), x, np.random.default_rng(1), probes=2, kind=kind)
    found = flow_log_likelihood(x, score_of(TILTED, VP), VP, divergence=divergence, rtol=1e-6, atol=1e-8,
                                log_prior=VP.noised(TILTED, 1.0).log_density)
    z = np.random.default_rng(1).standard_normal((2, N, 2))
    z = np.where(z < 0, -1.0, 1.0) if kind == "rademacher" else z
    error = found.log_density - TILTED.log_density(x)
    each = np.einsum("mni,ij,mnj->mn", z, M, z) - np.trace(M)
    np.testing.assert_allclose(error, each.mean(axis=0), atol=1e-5)
    assert abs(zscore(error)) < 4
    variance = 2 * (M**2).sum() - (2 * (np.diag(M)**2).sum() if kind == "rademacher" else 0)
    assert abs(zscore(error**2, variance / 2)) < 4 < abs(zscore(error**2, variance))
    assert abs(zscore(found.standard_error**2, variance / 2)) < 4


@pytest.mark.parametrize("kind", ["rademacher", "gaussian"])
def test_L20_hutchinson_is_unbiased_on_a_mixture(kind):
    """Over 800 points, within 4 standard errors; with probes of variance 2 it isn't."""
    x = TURNED.sample(800, np.random.default_rng(2))
    options = {"log_prior": VP.noised(TURNED, 1.0).log_density, "rtol": 1e-5, "atol": 1e-7}

    def error(scale):
        vjp = vjp_of(TURNED, VP)
        divergence = hutchinson_trace(lambda x, u, z: scale * vjp(x, u, z), x, np.random.default_rng(3), kind=kind)
        found = flow_log_likelihood(x, score_of(TURNED, VP), VP, divergence=divergence, **options)
        assert np.isnan(found.standard_error).all()                                        # one probe can't tell
        return zscore(found.log_density - TURNED.log_density(x))
    assert abs(error(1.0)) < 4 < 10 < abs(error(2.0))


def test_L20_signs_are_exact_where_the_jacobian_is_diagonal(rng):
    upright = GaussianMixture([1.0], [[0.1, 0.2]], [[[0.5, 0.0], [0.0, 2.0]]])
    for world, x in ((TWO, TWO.sample(10, rng)), (upright, upright.sample(10, rng))):
        for kind, exact in (("rademacher", True), ("gaussian", False)):
            divergence = hutchinson_trace(vjp_of(world, VP), x, rng, probes=3, kind=kind)
            found = flow_log_likelihood(x, score_of(world, VP), VP, divergence=divergence,
                                        log_prior=VP.noised(world, 1.0).log_density)
            assert (np.abs(found.log_density - world.log_density(x)) < 1e-5).all() == exact
            assert (found.standard_error < 1e-9).all() == exact


def test_traces_on_any_library(fake, rng):
    """Both kinds of divergence dispatch, in either precision; images are summed over all but their first axis."""
    x, A = rng.standard_normal((3, 2, 2, 1)), rng.standard_normal((4, 4))

    def vjp(x, u, z):
        return (z.reshape(3, 4) @ matrix).reshape(x.shape)
    for dtype in (np.float32, np.float64):
        results = []
        for xp, make in ((np, np.asarray), (fake, fake.asarray)):
            matrix, y = make(A.astype(dtype)), make(x.astype(dtype))
            estimates = hutchinson_trace(vjp, y, np.random.default_rng(0), probes=5)(y, 0.3)
            assert estimates.shape == (5, 3) and estimates.dtype == dtype
            stack = xp.stack([matrix] * 3)
            trace = exact_trace(lambda y, u, stack=stack: stack)(y, 0.3)
            results.append([fake.asnumpy(estimates), fake.asnumpy(trace)])
        for host, device in zip(*results, strict=True):
            np.testing.assert_array_equal(host, device)
        np.testing.assert_allclose(results[0][1], np.trace(A), rtol=1e-6)
    z = np.where(np.random.default_rng(0).standard_normal((5, 3, 2, 2, 1)) < 0, -1, 1).reshape(5, 3, 4)
    np.testing.assert_allclose(results[0][0], np.einsum("mni,ij,mnj->mn", z, A, z), rtol=1e-9)


# ---- beside the bound (L06)

def test_L06_flow_and_exact_reverse_chain_agree_on_a_gaussian(rng):
    """For the true reverse process the bound is log p(x_0) on every path; the flow finds the same number."""
    world, chain = GaussianMixture([1.0], [[0.0]], [[[0.6]]]), VP.schedule(30)

    def reverse(x_t, s, t):
        exact = world.reverse(x_t, s, t, chain)
        return exact.mean(), exact.cov()[:, :, 0]
    x = world.sample(20, rng)
    prior_var = VP.noised(world, 1.0).covariances.item()
    bound = elbo.sampled_bound(x, reverse, chain, rng, prior_var=prior_var)
    flow = flow_log_likelihood(x, score_of(world, VP), VP, divergence=trace_of(world, VP), prior_var=prior_var, **TIGHT)
    np.testing.assert_allclose(bound, flow.log_density, atol=1e-6)
    np.testing.assert_allclose(bound, world.log_density(x), rtol=1e-9)


@pytest.mark.parametrize("steps", [5, 10])
def test_L06_what_the_bound_loses_on_a_mixture_is_the_gap_of_its_steps(steps):
    """Negative bound minus the flow's -log p: the sum of what Gaussian steps miss (G12), on average over the data."""
    n, chain, rng = 4000, VP.schedule(steps), np.random.default_rng(0)

    def reverse(x_t, s, t):
        exact = TWO.reverse(x_t, s, t, chain)
        return exact.mean(), exact.cov()[:, :, 0]
    x = TWO.sample(n, rng)
    draws = elbo.negative_bound(np.tile(x, (8, 1)), reverse, chain, rng, bin_width=None).total.reshape(8, n)
    flow = flow_log_likelihood(x, score_of(TWO, VP), VP, divergence=trace_of(TWO, VP), rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(flow.log_density, TWO.log_density(x), atol=1e-3)
    lost = sum(gaussian_gap(TWO, t - 1, t, chain) for t in range(1, steps + 1))
    excess = draws.mean(axis=0) + flow.log_density
    assert abs(zscore(excess, lost)) < 4 < 6 < zscore(excess)


def test_L20_flow_of_a_discrete_chain(rng):
    """The SDE that is a chain exactly has the chain's marginals at its times, so its flow has them too."""
    chain = NoiseSchedule.linear(25)
    sde, x = LinearSDE.from_schedule(chain), np.linspace(-1.6, 1.2, 9)[:, None]
    moved = solve_flow(x, score_of(TWO, sde), sde, 0.0, 1.0, times=[0.2, 1.0], rtol=1e-7, atol=1e-9)
    for t, at_t in zip((5, 25), moved, strict=True):
        np.testing.assert_allclose(cdf(at_t, TWO.noised(t, chain)), cdf(x, TWO), atol=1e-5)


# ---- bad input

def test_bad_input(fake, rng):
    x = rng.standard_normal((4, 2))
    score, divergence = score_of(TURNED, VP), trace_of(TURNED, VP)
    for call in (lambda: solve_flow(fake.asarray(x), score, VP, 0.0, 1.0), lambda: solve_flow([[0.0]], score, VP, 0, 1),
                 lambda: flow_log_likelihood(fake.asarray(x), score, VP, divergence=divergence)):
        with pytest.raises(TypeError, match="move x with to_host"):
            call()
    with pytest.raises(ValueError, match="one row per point"):
        solve_flow(x[:, 0], score, VP, 0.0, 1.0)
    for ends in ((0.0, 1.5), (-0.1, 0.5)):
        with pytest.raises(ValueError, match="u0 and u1 must lie in"):
            solve_flow(x, score, VP, *ends)
    for times in ([0.1, 0.9], [0.4, 0.2, 0.3], []):
        with pytest.raises(ValueError, match="times must run from u0=0.5 towards u1=0.1"):
            solve_flow(x, score, VP, 0.5, 0.1, times=times)
    with pytest.raises(ValueError, match="the score isn't finite at u = 0"):
        solve_flow(x, lambda x, u: x / u if u else x * np.nan, VP, 0.0, 1.0)
    with pytest.raises(ValueError, match="the divergence isn't finite"):
        flow_log_likelihood(x, score, VP, divergence=lambda x, u: np.full(4, np.inf))
    with pytest.raises(ValueError, match='"rademacher" or "gaussian"'):
        hutchinson_trace(None, x, rng, kind="normal")
    with pytest.raises(ValueError, match="probes must be at least 1"):
        hutchinson_trace(None, x, rng, probes=0)
    with pytest.raises((RuntimeError, ValueError), match="could not be solved|isn't finite"):
        solve_flow(1 + x**2, lambda x, u: -x**3, VP, 0.0, 1.0)                             # escapes in finite time
