"""The SDE of a chain and the chains of an SDE: exact kernels, the limit and its order, and the reverse processes."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from scipy.integrate import solve_ivp

from ddpm.mixture import GaussianMixture
from ddpm.schedule import NoiseSchedule
from ddpm.sde import LinearSDE, euler_maruyama, first_order
from nn.backend import array_module, to_host
from tests.helpers import general_schedule, property_test, schedules, zscore

VP, SUB, VE = LinearSDE.variance_preserving(), LinearSDE.sub_variance_preserving(), LinearSDE.variance_exploding()
WAVE = LinearSDE(lambda u: -2 * np.cos(6 * u), lambda u: 1 + np.sin(9 * u)**2)          # no closed form; f changes sign
STEPS = LinearSDE.from_schedule(general_schedule(7))
SDES = {"vp": VP, "sub-vp": SUB, "ve": VE, "wave": WAVE, "steps": STEPS}
each_sde = pytest.mark.parametrize("sde", SDES.values(), ids=SDES)
any_sde = st.sampled_from(list(SDES.values()))
unit = st.floats(0, 1)

TWO, TURNED = GaussianMixture.two_component(), GaussianMixture.grid(rotation_degrees=30)


def quadratured(sde):
    """The same coefficients without their closed form."""
    return LinearSDE(sde.f, sde.g2, breaks=sde._edges[1:-1])


# ---- kernels

@pytest.mark.parametrize("name", ["vp", "sub-vp", "ve", "steps"])
def test_L19_closed_forms_equal_quadrature(name):
    sde, u = SDES[name], np.linspace(0, 1, 61)
    for start, end in ((np.zeros_like(u), u), (u[:-1], u[1:]), (u[:-9], u[9:]), (u[:-1], u[:-1] + 1e-7)):
        for closed, found in zip(sde.between(start, end), quadratured(sde).between(start, end), strict=True):
            np.testing.assert_allclose(closed, found, rtol=1e-12)


@each_sde
def test_L19_moments_solve_their_differential_equations(sde):
    """d log lam/du = f and d sigma2/du = 2 f sigma2 + g^2, by a solver that knows nothing of the integrals."""
    solution = solve_ivp(lambda u, y: [sde.f(u), 2 * sde.f(u) * y[1] + sde.g2(u)], (0, 1), [0, 0], method="DOP853",
                         rtol=1e-12, atol=1e-14, t_eval=np.linspace(0, 1, 8), max_step=0.01)
    lam_bar, sigma2_bar = sde.moments(solution.t)
    np.testing.assert_allclose(lam_bar, np.exp(solution.y[0]), rtol=1e-9)
    np.testing.assert_allclose(sigma2_bar, solution.y[1], rtol=1e-9, atol=1e-13)


@property_test
@given(any_sde, st.tuples(unit, unit, unit).map(sorted))
def test_L02_kernels_compose(sde, times):
    u, v, w = times
    (lam_uv, sigma2_uv), (lam_vw, sigma2_vw), (lam, sigma2) = sde.between(u, v), sde.between(v, w), sde.between(u, w)
    assert lam == pytest.approx(lam_uv * lam_vw, rel=1e-12)
    assert sigma2 == pytest.approx(lam_vw**2 * sigma2_uv + sigma2_vw, rel=1e-12, abs=1e-300)


@property_test
@given(unit, unit, st.floats(0, 5), st.floats(0.01, 30))
def test_L03_variance_preserving(u, v, beta_min, beta_max):
    sde, (u, v) = LinearSDE.variance_preserving(beta_min, beta_max), sorted((u, v))
    lam, sigma2 = sde.between(u, v)
    assert sigma2 == pytest.approx(1 - lam**2, abs=1e-15)
    less = LinearSDE.sub_variance_preserving(beta_min, beta_max).moments(v)
    assert less == pytest.approx((sde.moments(v)[0], sde.moments(v)[1]**2), rel=1e-12)


def test_variance_exploding_keeps_the_signal():
    lam_bar, sigma2_bar = LinearSDE.variance_exploding(0.1, 20).moments([0.0, 0.5, 1.0])
    np.testing.assert_allclose(lam_bar, 1, rtol=0)
    np.testing.assert_allclose(sigma2_bar, [0, 0.01 * 199, 400 - 0.01], rtol=1e-12)


def test_constant_coefficients_may_be_numbers():
    """Ornstein-Uhlenbeck: functions that return a float for an array of times."""
    lam, sigma2 = LinearSDE(lambda u: -1.5, lambda u: 2.0).between(0.2, np.array([0.2, 0.7]))
    np.testing.assert_allclose(lam, [1, np.exp(-0.75)], rtol=1e-14)
    np.testing.assert_allclose(sigma2, [0, 2 * -np.expm1(-1.5) / 3], rtol=1e-14)
    steep = LinearSDE(lambda u: 0.0, lambda u: np.exp(25 * u))                     # 1e-12 over eleven orders
    assert steep.moments(1.0)[1] == pytest.approx(np.expm1(25) / 25, rel=1e-12)


# ---- chain to SDE and back

@property_test
@given(schedules())
def test_L19_an_sde_gives_its_chain_back(schedule):
    T, sde = schedule.T, LinearSDE.from_schedule(schedule)
    back = sde.schedule(T)
    np.testing.assert_allclose(back.lam, schedule.lam, rtol=1e-12)
    np.testing.assert_allclose(back.sigma2, schedule.sigma2, rtol=1e-12)
    lam_bar, sigma2_bar = sde.moments(np.arange(T + 1) / T)
    np.testing.assert_allclose(lam_bar, schedule.lam_bar, rtol=1e-12)
    np.testing.assert_allclose(sigma2_bar, schedule.sigma2_bar, rtol=1e-12)
    s = np.arange(T)
    for found, kernel in zip(sde.between(s / T, 1.0), schedule.between(s, np.full(T, T)), strict=True):
        np.testing.assert_allclose(found, kernel, rtol=1e-9)


@pytest.mark.parametrize("T", [1, 10, 1000])
@each_sde
def test_L19_a_chain_gives_its_sde_back_at_its_times(sde, T):
    u = np.arange(T + 1) / T
    again = LinearSDE.from_schedule(sde.schedule(T))
    for moments in (LinearSDE.moments, lambda sde, u: sde.between(u, 1.0)):
        for found, exact in zip(moments(again, u), moments(sde, u), strict=True):
            np.testing.assert_allclose(found, exact, rtol=1e-9, atol=1e-300)


def test_L19_a_step_without_drift_has_its_limit():
    """lam = 1: f = 0 and g^2 = sigma2/Delta; lam beside 1 is beside it."""
    chain = NoiseSchedule([1.0, 1 + 1e-9, 0.9], [0.3, 0.3, 0.2])
    sde = LinearSDE.from_schedule(chain)
    assert (sde.f(0.1), sde.g2(0.1)) == (0.0, pytest.approx(0.9, rel=1e-15))
    assert sde.g2(0.5) == pytest.approx(0.9, rel=1e-8)
    f = 3 * np.log(0.9)
    assert sde.g2(0.9) == pytest.approx(0.2 * 2 * f / (0.81 - 1), rel=1e-12)       # sigma2 = g^2 (lam^2 - 1)/(2 f)
    assert sde.f(np.array([0, 1 / 3, 1.0])).tolist() == [0.0, 3 * np.log(1 + 1e-9), f]    # at a joint, what follows


def test_schedules_at_any_times():
    chain = VP.schedule([0.0, 0.1, 0.4, 1.0])
    assert chain.T == 3 and chain.is_variance_preserving
    np.testing.assert_allclose(chain.lam_bar, VP.moments([0.0, 0.1, 0.4, 1.0])[0], rtol=1e-12)
    late = VE.schedule([0.5, 0.7])                                                 # x_0 of this chain is x at u = 1/2
    assert late.sigma2[1] == pytest.approx(VE.between(0.5, 0.7)[1], rel=1e-15)
    assert SUB.schedule(1000).sigma2[1] > 0 == SUB.g2(0.0)                         # noise within the step is enough


# ---- L19: the limit

def largest(error):
    return np.abs(error).max()


def orders(errors):
    """log2 of the ratio of successive errors, the step being halved from one to the next."""
    return np.log2(np.divide(errors[:-1], errors[1:]))


@pytest.mark.parametrize("name", ["vp", "sub-vp", "ve", "wave"])
def test_L19_first_order_coefficients_converge(name):
    """-(1 - lam)/Delta and sigma/sqrt(Delta) tend to f and g with an error of O(Delta); E03 and E04 tend to neither."""
    sde, errors, printed = SDES[name], [], []
    for T in (200, 400, 800, 1600):
        chain, u = sde.schedule(T), (np.arange(T) + 0.5) / T
        f, g = first_order(chain)
        assert f.shape == g.shape == (T + 1,) and f[0] == g[0] == 0
        errors.append((largest(f[1:] - sde.f(u)), largest(g[1:]**2 - sde.g2(u))))
        printed.append((largest((1 - chain.lam[1:]) * T - sde.f(u)), largest(chain.sigma2[1:]**0.5 * T - sde.g(u))))
    errors, printed = np.array(errors).T, np.array(printed).T
    if name == "ve":
        assert largest(errors[0]) == 0 and orders(errors[1]).min() > 1.9   # no drift: second order at mid-step
    else:
        assert orders(errors[0]) == pytest.approx(1, abs=0.1) and orders(errors[1]) == pytest.approx(1, abs=0.1)
        assert printed[0] == pytest.approx(2 * largest(sde.f(u)), rel=0.05)        # E03: off by twice the drift
    assert orders(printed[1]) == pytest.approx(-0.5, abs=0.1)                      # E04: grows like sqrt(T)


@each_sde
def test_L19_first_order_undoes_euler_schedule(sde):
    if sde is SUB:
        with pytest.raises(ValueError, match="g > 0 at its start"):
            sde.euler_schedule(50)
        return
    chain, u = sde.euler_schedule(50), np.arange(50) / 50
    f, g = first_order(chain)
    np.testing.assert_allclose(f[1:], sde.f(u), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(g[1:], sde.g(u), rtol=1e-12)


@property_test
@given(schedules(), st.integers(0, 2**32 - 1))
def test_L19_the_chain_is_euler_maruyama_of_its_coefficients(schedule, seed):
    """Step for step, with the same noise; with the drift or the diffusion as printed it is another chain (E03, E04)."""
    T, x0 = schedule.T, np.linspace(-2, 2, 5)[:, None]
    f, g = first_order(schedule)

    def walk(f, g):
        def entry(u):
            return int(np.rint(u * T)) + 1
        return euler_maruyama(x0, lambda x, u: f[entry(u)] * x, lambda u: g[entry(u)], np.arange(T + 1) / T,
                              np.random.default_rng(seed))
    rng, x = np.random.default_rng(seed), x0
    for t in range(1, T + 1):
        x = schedule.lam[t] * x + schedule.sigma2[t]**0.5 * rng.standard_normal(x0.shape)
    np.testing.assert_allclose(walk(f, g), x, rtol=1e-9, atol=1e-9)
    assert largest(walk(-f, g) - x) > 1e-6 and largest(walk(f, g * T**0.5) - x) > 1e-6


@pytest.mark.parametrize("name", ["vp", "ve", "wave"])
def test_L19_euler_maruyama_moments_converge(name):
    """Its chain is known in closed form, so no sampling is needed to see the first order."""
    sde, errors = SDES[name], []
    for T in (200, 400, 800, 1600):
        chain, (lam_bar, sigma2_bar) = sde.euler_schedule(T), sde.moments(np.arange(T + 1) / T)
        errors.append((largest(chain.lam_bar - lam_bar), largest(chain.sigma2_bar - sigma2_bar)))
    errors = np.array(errors).T
    assert orders(errors[1]) == pytest.approx(1, abs=0.1)
    assert largest(errors[0]) == 0 if name == "ve" else orders(errors[0]) == pytest.approx(1, abs=0.1)


def test_L19_euler_maruyama_has_its_chains_moments(rng):
    """By simulation; E03 lets the variance explode, and E04 puts it off by T."""
    x0, n, T = np.array([0.7]), 20_000, 50
    times, chain = np.arange(T + 1) / T, VP.euler_schedule(T)

    def walk(sign=1.0, scale=1.0):
        x = euler_maruyama(np.full((n, 1), x0), lambda x, u: sign * VP.forward_drift(x, u), lambda u: scale * VP.g(u),
                           times, rng)[:, 0]
        return zscore(x, chain.lam_bar[T] * 0.7), zscore((x - chain.lam_bar[T] * 0.7)**2, chain.sigma2_bar[T])
    assert largest(walk()) < 4
    assert min(walk(sign=-1.0)[1], walk(scale=T**0.5)[1]) > 20


def test_E03_E04_a_variance_preserving_process_keeps_its_variance():
    """Var x stays 1 with f = -(1 - lam)/Delta and g = sigma/sqrt(Delta), and with neither misprint."""
    T = 1000
    f, g = first_order(NoiseSchedule.linear(T))

    def variance(f, g2):
        var = 1.0
        for t in range(1, T + 1):
            var = (1 + f[t] / T)**2 * var + g2[t] / T
        return var
    assert variance(f, g**2) == pytest.approx(1, rel=1e-12)                        # Euler-Maruyama is the chain
    assert variance(-f, g**2) > 1e4 and variance(f, g**2 * T) > 100


def test_L19_linear_schedules_tend_to_the_variance_preserving_sde():
    linear, betas, exact = [], [], []
    for T in (200, 400, 800, 1600):
        u, chain = np.arange(T + 1) / T, NoiseSchedule.linear(T)
        linear.append(largest(chain.lam_bar - VP.moments(u)[0]))
        betas.append(largest(NoiseSchedule.from_betas(VP.g2(u[:-1]) / T).lam_bar - VP.moments(u)[0]))
        exact.append(largest(VP.schedule(T).lam_bar - VP.moments(u)[0]))
    assert orders(linear) == pytest.approx(1, abs=0.1) and linear[-1] < 1e-3
    assert orders(betas) == pytest.approx(1, abs=0.1) and largest(exact) < 1e-13
    other = LinearSDE.variance_preserving(0.1, 18.0).moments(u)[0]
    assert largest(chain.lam_bar - other) > 10 * linear[-1]


# ---- L20: the reverse processes

def mixtures(seed):
    """A random mixture of two full Gaussians in the plane."""
    rng = np.random.default_rng(seed)
    roots = rng.standard_normal((2, 2, 2))
    return GaussianMixture([0.3, 0.7], rng.standard_normal((2, 2)), roots @ roots.swapaxes(1, 2) + 0.1 * np.eye(2))


def divergence(drift, x, h=1e-3):
    """sum_i d drift_i/d x_i by five-point differences, (N,)."""
    total = 0.0
    for i in range(x.shape[1]):
        e = h * np.eye(x.shape[1])[i]
        total = total + (drift(x - 2 * e) - 8 * drift(x - e) + 8 * drift(x + e) - drift(x + 2 * e))[:, i] / (12 * h)
    return total


@property_test
@given(st.integers(0, 10_000), st.sampled_from([VP, SUB, WAVE]), st.floats(0.02, 0.98))
def test_L20_U04_E14_the_densities_obey_fokker_planck(seed, sde, u):
    """Three processes, one law: d/du log p = -div b - b.score + noise (tr H + |score|^2), noise = g^2/2, 0 or -g^2/2.

    b is the drift of the SDE forwards (noise adds diffusion), of the flow (none), of the SDE backwards (du < 0, so that
    its diffusion counts negatively). With the drift as printed in E14 the law isn't kept.
    """
    world, rng, h = mixtures(seed), np.random.default_rng(seed), 1e-3
    law = sde.noised(world, u)
    x = law.sample(5, rng)

    def score(x):
        return law.score(x)
    log_p = [sde.noised(world, u + k * h).log_density(x) for k in (-2, -1, 1, 2)]
    change = (log_p[0] - 8 * log_p[1] + 8 * log_p[2] - log_p[3]) / (12 * h)
    curvature = np.trace(law.hessian(x), axis1=1, axis2=2) + (score(x)**2).sum(axis=1)

    def predicted(drift, noise):
        return -divergence(drift, x) - (drift(x) * score(x)).sum(axis=1) + noise * curvature
    half = sde.g2(u) / 2
    scale = 1e-6 * (1 + largest(half * curvature) + largest(change))
    assert largest(predicted(lambda x: sde.forward_drift(x, u), half) - change) < scale
    assert largest(predicted(lambda x: sde.flow_velocity(x, u, score(x)), 0.0) - change) < scale
    assert largest(predicted(lambda x: sde.reverse_drift(x, u, score(x)), -half) - change) < scale
    printed = largest(predicted(lambda x: -0.5 * sde.forward_drift(x, u) - sde.g2(u) * score(x), -half) - change)
    assert printed > 100 * scale or abs(sde.f(u)) < 0.1
    assert largest(predicted(lambda x: sde.flow_velocity(x, u, 2 * score(x)), 0.0) - change) > 100 * scale


def gaussian_score(m, tau2, sde):
    def score(x, u):
        lam_bar, sigma2_bar = sde.moments(u)
        return -(x - lam_bar * m) / (lam_bar**2 * tau2 + sigma2_bar)
    return score


@pytest.mark.parametrize("name", ["vp", "wave"])
def test_L20_reverse_euler_maruyama_converges_to_first_order(name):
    """On Gaussian data each step is affine in x: mean and variance of the walk follow without sampling."""
    sde, m, tau2 = SDES[name], 0.5, 0.2
    score = gaussian_score(m, tau2, sde)

    def end(n, drift, noise=1.0):
        times = np.linspace(1, 0, n + 1)
        lam_bar, sigma2_bar = sde.moments(1.0)
        mean, var = lam_bar * m, lam_bar**2 * tau2 + sigma2_bar
        for u, h in zip(times[:-1], np.diff(times), strict=True):
            at_0, at_1 = drift(np.array([[0.0], [1.0]]), u)[:, 0]
            gain = 1 + h * (at_1 - at_0)
            mean, var = gain * mean + h * at_0, gain**2 * var + noise * sde.g2(u) * abs(h)
        return np.array([mean, var])

    def reverse(x, u):
        return sde.reverse_drift(x, u, score(x, u))

    def flow(x, u):
        return sde.flow_velocity(x, u, score(x, u))

    def printed(x, u):
        return -0.5 * sde.forward_drift(x, u) - sde.g2(u) * score(x, u)
    steps, truth = (200, 400, 800), np.array([m, tau2])
    assert orders([largest(end(n, reverse) - truth) for n in steps]) == pytest.approx(1, abs=0.1)
    assert orders([largest(end(n, flow, noise=0.0) - truth) for n in steps]) == pytest.approx(1, abs=0.1)
    assert largest(end(800, printed) - truth) > 20 * largest(end(800, reverse) - truth)


def test_L20_a_reverse_step_is_the_small_step_of_the_chain():
    """x/lam + sigma2 score (L18) and one Euler-Maruyama step back differ by O(Delta^2)."""
    x = np.linspace(-2, 2, 9)[:, None]
    score, differences = VP.noised(TWO, 0.4).score(x), []
    for h in (0.02, 0.01, 0.005):
        lam, sigma2 = VP.between(0.4 - h, 0.4)
        differences.append(largest(x / lam + sigma2 * score - (x - h * VP.reverse_drift(x, 0.4, score))))
    assert orders(differences) == pytest.approx(2, abs=0.1)


def statistics(x, y, world, u, sde):
    """z-scores of the moments of x under the law at u, and the smallest p-value of KS tests of x against y."""
    law = sde.noised(world, u)
    z = [zscore(x[:, i], law.mean()[i]) for i in range(x.shape[1])]
    z += [zscore(np.prod(x[:, pair] - law.mean()[pair], axis=1), law.cov()[pair[0], pair[1]])
          for pair in ([[0, 0]] if x.shape[1] == 1 else [[0, 0], [0, 1], [1, 1]])]
    directions = np.array([[1.0]]) if x.shape[1] == 1 else np.array([[1, 0], [0, 1], [0.6, 0.8], [0.8, -0.6]])
    return largest(z), min(stats.ks_2samp(x @ d, y @ d).pvalue for d in directions)


@pytest.mark.parametrize("world", [TWO, TURNED], ids=["two", "grid"])
def test_L20_E14_simulated_marginals_are_kept(world, rng):
    """Forwards, backwards and through the flow: moments and a two-sample test, at the end and half way; E14 fails."""
    n, back, half_way = 2500, np.linspace(1, 0, 251)**2, 126

    def score(x, u):
        return VP.noised(world, u).score(x)

    def reverse(x, u):
        return VP.reverse_drift(x, u, score(x, u))

    def flow(x, u):
        return VP.flow_velocity(x, u, score(x, u))

    def printed(x, u):
        return -0.5 * VP.forward_drift(x, u) - VP.g2(u) * score(x, u)

    def sample(u):
        return VP.noised(world, u).sample(n, rng)
    noisy = euler_maruyama(world.sample(n, rng), VP.forward_drift, VP.g, np.linspace(0, 0.4, 201), rng)
    z, p = statistics(noisy, sample(0.4), world, 0.4, VP)
    assert z < 4 and p > 1e-4
    for drift, diffusion in ((reverse, VP.g), (flow, None)):
        for times in (back[:half_way], back):
            u = times[-1]
            z, p = statistics(euler_maruyama(sample(1.0), drift, diffusion, times, rng), sample(u), world, u, VP)
            assert z < 4 and p > 1e-4
    z, p = statistics(euler_maruyama(sample(1.0), printed, VP.g, back, rng), sample(0.0), world, 0.0, VP)
    assert z > 20 and p < 1e-10


# ---- walking

def test_euler_maruyama_shows_the_path_and_needs_no_noise_for_a_flow(rng):
    seen, times = [], [0.9, 0.5, 0.4]
    x = euler_maruyama(np.ones((3, 2)), lambda x, u: u * x, None, times, None,
                       callback=lambda x, u: seen.append((u, x)))
    assert [u for u, _ in seen] == times
    np.testing.assert_allclose(x, (1 - 0.4 * 0.9) * (1 - 0.1 * 0.5) * np.ones((3, 2)), rtol=1e-14)
    np.testing.assert_array_equal(seen[-1][1], x)
    np.testing.assert_array_equal(seen[0][1], np.ones((3, 2)))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_drifts_and_walks_on_any_library(dtype, fake):
    x, score = np.random.default_rng(0).standard_normal((2, 4, 3, 3, 2)).astype(dtype)
    device, device_score = fake.asarray(x), fake.asarray(score)
    for u in (0.3, np.array([0.0, 0.2, 0.5, 1.0])):
        for drift, rest in ((VP.forward_drift, [()] * 2), (VP.reverse_drift, [(score,), (device_score,)]),
                            (VP.flow_velocity, [(score,), (device_score,)])):
            on_host, on_device = drift(x, u, *rest[0]), drift(device, u, *rest[1])
            assert on_host.dtype == on_device.dtype == dtype and array_module(on_device) is fake
            np.testing.assert_array_equal(to_host(on_device), on_host)
    each = VP.reverse_drift(x, np.array([0.0, 0.2, 0.5, 1.0]), score)
    np.testing.assert_allclose(each[2:3], VP.reverse_drift(x[2:3], 0.5, score[2:3]), rtol=1e-6)

    def walk(x):
        return euler_maruyama(x, lambda x, u: VP.reverse_drift(x, u, -x), VP.g, np.linspace(1, 0.2, 9),
                              np.random.default_rng(1))
    fake.transfers.clear()
    end = walk(device)
    assert {transfer.direction for transfer in fake.transfers} == {"to_device"}    # the host's generator, and no more
    assert walk(x).dtype == end.dtype == dtype
    np.testing.assert_array_equal(to_host(end), walk(x))
    fake.transfers.clear()
    euler_maruyama(device, lambda x, u: -x, VP.g, [0.0, 0.5, 1.0], fake.random.default_rng(0))
    assert fake.transfers == []


def test_times_shape_the_results():
    assert isinstance(VP.f(0.5), float) and isinstance(VP.g(0.5), float)
    assert isinstance(VP.moments(0.5)[0], float) and isinstance(STEPS.between(0.1, 0.7)[1], float)
    assert STEPS.between(np.zeros((3, 1)), np.linspace(0.1, 1, 4))[1].shape == (3, 4)
    for sde in SDES.values():
        assert sde.between(0.3, 0.3) == sde.moments(0.0) == sde.between(1, 1) == (1.0, 0.0)
    assert VP.noised(TWO, 0) is TWO


def test_bad_input():
    for call in (lambda: VP.f(1.2), lambda: VP.moments(-0.1), lambda: VP.between(0.1, np.array([0.2, 2.0])),
                 lambda: VP.g(np.nan)):
        with pytest.raises(ValueError, match=r"must lie in \[0, 1\]"):
            call()
    with pytest.raises(ValueError, match="u must not be later than v"):
        VP.between(0.5, 0.4)
    with pytest.raises(TypeError, match="g2 must be a function"):
        LinearSDE(np.cos, 1.0)
    with pytest.raises(ValueError, match="g2.u. must be finite and >= 0"):
        LinearSDE(np.zeros_like, lambda u: 0.5 - u).moments(1.0)
    with pytest.raises(ValueError, match="f.u. must be finite"):
        LinearSDE(lambda u: np.full_like(u, np.inf), np.ones_like).f(0.5)
    with pytest.raises(ValueError, match="breaks must lie"):
        LinearSDE(np.cos, np.ones_like, breaks=[1.5])
    with pytest.raises(ValueError, match="0 < sigma_min < sigma_max"):
        LinearSDE.variance_exploding(1.0, 0.5)
    for make in (LinearSDE.variance_preserving, LinearSDE.sub_variance_preserving):
        with pytest.raises(ValueError, match="beta_min >= 0"):
            make(-1.0, 2.0)
    for times in (0, [0.1], [0.3, 0.1], [[0.1, 0.2]]):
        with pytest.raises(ValueError, match="a number of steps >= 1, or"):
            VP.schedule(times)
    with pytest.raises(ValueError, match="g2 must be positive somewhere within each step"):
        LinearSDE(np.zeros_like, lambda u: np.where(u < 0.5, 0.0, 1.0), breaks=[0.5]).schedule(2)
    with pytest.raises(ValueError, match="take shorter steps"):
        VP.euler_schedule(5)
    for times in ([0.5], [0.1, 0.1], [0.1, 0.5, 0.3], 10):
        with pytest.raises(ValueError, match="all rising or all falling|must lie in"):
            euler_maruyama(np.zeros((2, 1)), VP.forward_drift, VP.g, times, None)
