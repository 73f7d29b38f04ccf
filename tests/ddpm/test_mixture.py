"""The exact world: every closed form against finite differences, quadrature or samples; G01 on it."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ddpm import gaussian, gddm
from ddpm.gaps import diagonal_gap
from ddpm.mixture import GaussianMixture
from ddpm.schedule import NoiseSchedule
from nn.backend import to_host
from tests.helpers import mixtures, property_test, schedules

LINEAR = NoiseSchedule.linear(1000)
GENERAL = NoiseSchedule(np.linspace(1.05, 0.8, 1000)**0.02, np.geomspace(1e-5, 0.02, 1000))
TIMES = [1, 10, 100, 300, 700, 1000]


def skewed():
    """Three components with full, different covariances in 3-D."""
    rng = np.random.default_rng(5)
    roots = rng.standard_normal((3, 3, 3)) * np.array([0.3, 0.6, 1.0])[:, None, None]
    return GaussianMixture([0.2, 0.5, 0.3], rng.standard_normal((3, 3)), roots @ roots.swapaxes(1, 2))


WORLDS = {"two": GaussianMixture.two_component(), "grid": GaussianMixture.grid(),
          "rotated": GaussianMixture.grid(rotation_degrees=30), "stripes": GaussianMixture.stripes(),
          "correlated": GaussianMixture.correlated(0.95, 3), "skewed": skewed()}


@pytest.fixture(params=WORLDS)
def world(request):
    return WORLDS[request.param]


@pytest.fixture(params=[LINEAR, GENERAL], ids=["linear", "general"])
def schedule(request):
    return request.param


def brute_force_log_density(world, x):
    terms = [w / np.sqrt(np.linalg.det(2 * np.pi * S))
             * np.exp(-0.5 * np.einsum("ni,ij,nj->n", x - m, np.linalg.inv(S), x - m))
             for w, m, S in zip(world.weights, world.means, world.covariances, strict=True)]
    return np.log(sum(terms))


def differences(f, x, h):
    """(N, ..., D): five-point derivatives of f along each coordinate."""
    columns = []
    for i in range(x.shape[1]):
        e = h * np.eye(x.shape[1])[i]
        columns.append((f(x - 2 * e) - 8 * f(x - e) + 8 * f(x + e) - f(x + 2 * e)) / (12 * h))
    return np.stack(columns, axis=-1)


# ---- the density

def test_log_density_is_the_sum_of_the_components(world, rng):
    x = world.sample(50, rng)
    np.testing.assert_allclose(world.log_density(x), brute_force_log_density(world, x), rtol=1e-9)


def test_L02_noised_is_the_law_of_noisy_samples(world, schedule, rng):
    t, n = 300, 200_000
    x_t = schedule.add_noise(world.sample(n, rng), t, rng.standard_normal((n, world.means.shape[1])))
    noised = world.noised(t, schedule)
    spread = np.sqrt(np.diag(noised.cov()))
    assert (np.abs(x_t.mean(axis=0) - noised.mean()) < 4 * spread / np.sqrt(n)).all()
    products = (x_t - noised.mean())[:, :, None] * (x_t - noised.mean())[:, None, :]
    assert (np.abs(products.mean(axis=0) - noised.cov()) < 4 * products.std(axis=0) / np.sqrt(n)).all()
    expected = schedule.lam_bar[t]**2 * world.cov() + schedule.sigma2_bar[t] * np.eye(world.means.shape[1])
    np.testing.assert_allclose(noised.cov(), expected, rtol=1e-9, atol=1e-12)


def test_sample_picks_components_by_weight(rng):
    x = GaussianMixture.two_component().sample(100_000, rng)
    assert abs((x < 0).mean() - 0.4) < 4 * np.sqrt(0.24 / 1e5)


@pytest.mark.parametrize("t", TIMES)
def test_L17_score_and_hessian_match_finite_differences(t, world, schedule, rng):
    noised = world.noised(t, schedule)
    x, h = noised.sample(20, rng), 2e-3 * np.sqrt(np.linalg.eigvalsh(noised.covariances).min())
    score, hessian = noised.score(x), noised.hessian(x)
    assert np.abs(differences(noised.log_density, x, h) - score).max() < 1e-7 * np.abs(score).max()
    assert np.abs(differences(noised.score, x, h) - hessian).max() < 1e-7 * np.abs(hessian).max()


def test_log_space_is_stable_far_away(world):
    x = np.full((1, world.means.shape[1]), 1e4)
    assert np.isfinite(world.log_density(x)).all() and np.isfinite(world.score(x)).all()
    assert np.isfinite(world.hessian(x)).all() and np.isfinite(world.posterior_x0(x, 5, LINEAR)[1]).all()


# ---- the posterior of x_0

@pytest.mark.parametrize("t", TIMES)
def test_C08_posterior_moments_match_tweedie(t, world, schedule, rng):
    noised = world.noised(t, schedule)
    x_t, lam, var = noised.sample(50, rng), schedule.lam_bar[t], schedule.sigma2_bar[t]
    mean, cov = world.posterior_x0(x_t, t, schedule)
    scale = 1 + var / lam**2
    np.testing.assert_allclose(mean, (x_t + var * noised.score(x_t)) / lam, atol=1e-11 * scale)
    eye = np.eye(x_t.shape[1])
    np.testing.assert_allclose(cov, var / lam**2 * (eye + var * noised.hessian(x_t)), atol=1e-11 * scale)
    if t == 300:                                                  # E22 keeps the prefactor wrong
        assert np.abs(cov - lam**2 / var * (eye + var * noised.hessian(x_t))).max() > 1e-3


@pytest.mark.parametrize("t", TIMES)
def test_C01_posterior_moments_match_quadrature(t, schedule):
    world = GaussianMixture.two_component()
    x_t = np.array([[-1.5], [-0.2], [0.3], [1.1]])
    x0 = np.linspace(-4, 4, 80_001)
    log_joint = gaussian.log_normal(x_t, schedule.lam_bar[t] * x0, schedule.sigma2_bar[t])
    log_joint += world.log_density(x0[:, None])
    p = np.exp(log_joint - log_joint.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    mean = p @ x0
    var = (p * (x0 - mean[:, None])**2).sum(axis=1)
    found_mean, found_cov = world.posterior_x0(x_t, t, schedule)
    np.testing.assert_allclose(found_mean[:, 0], mean, rtol=1e-8)
    np.testing.assert_allclose(found_cov[:, 0, 0], var, rtol=1e-7)


@pytest.mark.parametrize("t", TIMES)
def test_posterior_of_isotropic_mixtures_has_its_short_form(t, rng):
    """v = lam^2 c^2 + V: mean (V mbar + lam c^2 x)/v and covariance c^2 V/v I + (V/v)^2 Cov_r[m]."""
    world, c2 = GaussianMixture.grid(rotation_degrees=30), 0.01
    x, lam, V = world.noised(t, LINEAR).sample(30, rng), LINEAR.lam_bar[t], LINEAR.sigma2_bar[t]
    v = lam**2 * c2 + V
    log_r = -((x[:, None] - lam * world.means)**2).sum(-1) / (2 * v)
    r = np.exp(log_r - log_r.max(axis=1, keepdims=True))
    r /= r.sum(axis=1, keepdims=True)
    mbar = r @ world.means
    R = np.einsum("nk,nki,nkj->nij", r, world.means - mbar[:, None], world.means - mbar[:, None])
    mean, cov = world.posterior_x0(x, t, LINEAR)
    np.testing.assert_allclose(mean, (V * mbar + lam * c2 * x) / v, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(cov, c2 * V / v * np.eye(2) + (V / v)**2 * R, rtol=1e-9, atol=1e-12)


def test_times_may_differ_per_point(world, schedule, rng):
    t, x = np.array([1, 300, 1000]), world.sample(3, rng)
    mean, cov = world.posterior_x0(x, t, schedule)
    reverse = world.reverse(x, t - 1, t, schedule)
    for i in range(3):
        one = world.posterior_x0(x[i:i + 1], int(t[i]), schedule)
        np.testing.assert_allclose(mean[i], one[0][0], rtol=1e-12)
        np.testing.assert_allclose(cov[i], one[1][0], rtol=1e-12, atol=1e-15)
        one = world.reverse(x[i:i + 1], int(t[i]) - 1, int(t[i]), schedule)
        np.testing.assert_allclose(reverse.cov()[i], one.cov()[0], rtol=1e-12, atol=1e-15)
        assert one.covariances.shape == world.covariances.shape


def test_point_masses_are_legal_data(rng):
    """Covariance 0 is the empirical distribution: no density of its own, but a posterior at every t >= 1."""
    points = rng.standard_normal((4, 2))
    world = GaussianMixture(np.full(4, 0.25), points, np.zeros((4, 2, 2)))
    mean, cov = world.posterior_x0(points, 1, LINEAR)
    assert np.isfinite(cov).all() and np.isfinite(world.noised(1, LINEAR).score(points)).all()
    np.testing.assert_allclose(mean, points, atol=0.05)
    with pytest.raises(ValueError, match="no density"):
        world.log_density(points)


# ---- the grid

def test_C14_grid_has_diagonal_covariances_only_when_not_rotated(rng):
    grid, rotated = GaussianMixture.grid(), GaussianMixture.grid(rotation_degrees=30)
    assert grid.mean() == pytest.approx([0, 0], abs=1e-12) and grid.cov() == pytest.approx(6.01 * np.eye(2), abs=1e-12)
    c, s = np.cos(np.pi / 6), np.sin(np.pi / 6)
    R = np.array([[c, -s], [s, c]])
    for t in (100, 200, 300):
        x = grid.noised(t, LINEAR).sample(2000, rng)
        cov, turned = grid.posterior_x0(x, t, LINEAR)[1], rotated.posterior_x0(x @ R.T, t, LINEAR)[1]
        assert np.abs(cov[:, 0, 1]).max() < 1e-12
        np.testing.assert_allclose(turned, R @ cov @ R.T, atol=1e-12)
        correlated = np.sqrt((turned[:, 0, 1]**2).mean() / (turned[:, [0, 1], [0, 1]]**2).mean())
        assert t == 100 or correlated > 0.3                       # what a diagonal covariance cannot say


@pytest.mark.parametrize("t, rms, std", [(100, 0.1142, 0.0806), (200, 0.90, 0.83), (400, 0.614, 0.271),
                                         (700, 0.0405, 0.00167), (1000, 2.425e-4, 6.2e-8)])
def test_C14_grid_posterior_variance_anchors(t, rms, std, rng):
    """Var[eps | x_t] along a coordinate, over x_t: what the covariance methods without and with its average miss.

    By quadrature, on the grid's own marginal, three Gaussians on the line: at t = 100 the tails are heavy, and samples
    in the ten thousands mislead.
    """
    line = GaussianMixture(np.full(3, 1 / 3), [[-3.0], [0.0], [3.0]], np.full((3, 1, 1), 0.01))
    x = np.linspace(-9, 9, 40_001)[:, None]
    q = np.exp(line.noised(t, LINEAR).log_density(x))
    q /= q.sum()
    g = line.posterior_x0(x, t, LINEAR)[1][:, 0, 0] * LINEAR.snr[t]
    assert np.sqrt(q @ g**2) == pytest.approx(rms, rel=5e-3)
    assert np.sqrt(q @ g**2 - (q @ g)**2) == pytest.approx(std, rel=5e-3)
    y = GaussianMixture.grid().noised(t, LINEAR).sample(100, rng)
    both = np.stack([line.posterior_x0(y[:, i:i + 1], t, LINEAR)[1][:, 0, 0] for i in (0, 1)], axis=1)
    np.testing.assert_allclose(np.einsum("nii->ni", GaussianMixture.grid().posterior_x0(y, t, LINEAR)[1]), both,
                               rtol=1e-9, atol=1e-14)


# ---- the reverse step

@pytest.mark.parametrize("s, t", [(1, 2), (9, 10), (99, 100), (50, 300), (499, 500), (1, 1000), (0, 1), (0, 300)])
def test_G01_reverse_has_the_moments_of_the_averaged_posterior(s, t, world, schedule, rng):
    """mean a E[x_0] + b x_t, covariance var I + a^2 Cov[x_0]: a point estimate loses exactly the second part."""
    x_t = world.noised(t, schedule).sample(20, rng)
    reverse, posterior = world.reverse(x_t, s, t, schedule), schedule.posterior(s, t)
    mean, cov = world.posterior_x0(x_t, t, schedule)
    eye = np.eye(x_t.shape[1])
    np.testing.assert_allclose(reverse.mean(), posterior.mean(mean, x_t), rtol=1e-8, atol=1e-9)
    np.testing.assert_allclose(reverse.cov(), posterior.var * eye + posterior.a**2 * cov, rtol=1e-7, atol=1e-10)
    lost = np.trace(reverse.cov() - posterior.var * eye, axis1=1, axis2=2)
    np.testing.assert_allclose(lost, posterior.a**2 * np.trace(cov, axis1=1, axis2=2), rtol=1e-6, atol=1e-10)
    assert (lost > 0).all()
    diagonal = np.einsum("nii->ni", cov)
    moments = gddm.reverse_moments(mean, diagonal, x_t, s, t, schedule)
    np.testing.assert_allclose(moments[0], reverse.mean(), rtol=1e-8, atol=1e-9)
    np.testing.assert_allclose(moments[1], np.einsum("nii->ni", reverse.cov()), rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("s, t", [(9, 10), (50, 300), (500, 1000)])
def test_G01_reverse_matches_bayes_pointwise(s, t, schedule):
    """The mixture's density at x_s is q(x_t | x_s) q(x_s) / q(x_t)."""
    world = GaussianMixture.two_component()
    x_t = np.array([[-0.7], [0.1], [0.9]])
    lam_ts, sigma2_ts = schedule.between(s, t)
    reverse = world.reverse(x_t, s, t, schedule)
    x_s = reverse.mean()[:, 0] + np.sqrt(reverse.cov()[:, 0, 0]) * np.linspace(-2, 2, 9)[:, None]        # (9, 3)
    density = (reverse.weights * np.exp(gaussian.log_normal(
        x_s[:, :, None], reverse.means[:, :, 0], reverse.covariances[:, 0, 0]))).sum(-1)
    log_bayes = (gaussian.log_normal(x_t[:, 0], lam_ts * x_s, sigma2_ts)
                 + world.noised(s, schedule).log_density(x_s.reshape(-1, 1)).reshape(9, 3)
                 - world.noised(t, schedule).log_density(x_t))
    np.testing.assert_allclose(np.log(density), log_bayes, rtol=1e-8, atol=1e-8)
    marginals = [world.noised(time, schedule).log_density(x_s.reshape(-1, 1)) for time in (s, t)]
    assert np.abs(marginals[1] - marginals[0]).max() > 1e-4       # q_t in place of q_s would show


# ---- any mixture, any schedule, any two times

@property_test
@given(mixtures(), schedules(), st.data())
def test_C01_C08_G01_tweedie_and_the_reverse_step_hold_for_any_mixture(world, schedule, data):
    """Score and Hessian give the posterior's moments, and the posterior's moments the reverse step's."""
    t = data.draw(st.integers(1, schedule.T))
    s = data.draw(st.integers(0, t - 1))
    noised, eye = world.noised(t, schedule), np.eye(world.means.shape[1])
    x_t, lam, v = noised.sample(8, np.random.default_rng(t)), schedule.lam_bar[t], schedule.sigma2_bar[t]
    mean, cov = world.posterior_x0(x_t, t, schedule)
    digits = 1e-9 * (1 + v / lam**2)                                     # Tweedie's formulas cancel by this factor
    np.testing.assert_allclose(mean, (x_t + v * noised.score(x_t)) / lam, rtol=1e-9, atol=digits)
    np.testing.assert_allclose(cov, v / lam**2 * (eye + v * noised.hessian(x_t)), rtol=1e-8, atol=digits)
    reverse, (a, b, var) = world.reverse(x_t, s, t, schedule), schedule.posterior(s, t)
    np.testing.assert_allclose(reverse.mean(), a * mean + b * x_t, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(reverse.cov(), var * eye + a**2 * cov, rtol=1e-8, atol=1e-9)
    assert s == 0 or np.abs(reverse.cov() - var * eye).max() > 1e-12    # control: a point estimate's covariance


@property_test
@given(mixtures(), schedules(), st.data())
def test_L15_reverse_is_bayes_rule_for_any_mixture(world, schedule, data):
    """q(x_s | x_t) = q(x_t | x_s) q(x_s) / q(x_t) at every point; with q_t for q_s it fails."""
    t = data.draw(st.integers(1, schedule.T))
    s = data.draw(st.integers(0, t - 1))
    rng, (lam_ts, sigma2_ts) = np.random.default_rng(t), schedule.between(s, t)
    x_t, x_s = world.noised(t, schedule).sample(5, rng), world.noised(s, schedule).sample(5, rng)
    reverse = world.reverse(x_t, s, t, schedule)
    for i in range(5):
        at_x_t = GaussianMixture(np.maximum(reverse.weights[i], 1e-300) / reverse.weights[i].sum(), reverse.means[i],
                                 reverse.covariances)
        q_s, q_t = (world.noised(time, schedule).log_density for time in (s, t))
        kernel = gaussian.log_normal(x_t[i], lam_ts * x_s, sigma2_ts).sum(axis=1)
        found, one = at_x_t.log_density(x_s), x_t[i:i + 1]
        likely = found > -600                                           # beyond that, weights have underflowed
        expected = kernel + q_s(x_s) - q_t(one)
        np.testing.assert_allclose(found[likely], expected[likely], rtol=1e-8, atol=1e-7)
    assert np.abs(q_s(x_s) - q_t(x_s)).max() > 1e-9


@property_test
@given(mixtures(), schedules(), st.data())
def test_L17_score_is_the_gradient_for_any_mixture(world, schedule, data):
    noised = world.noised(data.draw(st.integers(1, schedule.T)), schedule)
    x, h = noised.sample(4, np.random.default_rng(1)), 2e-3 * np.sqrt(np.linalg.eigvalsh(noised.covariances).min())
    score, hessian = noised.score(x), noised.hessian(x)
    assert np.abs(differences(noised.log_density, x, h) - score).max() < 1e-6 * np.abs(score).max()
    assert np.abs(differences(noised.score, x, h) - hessian).max() < 1e-6 * np.abs(hessian).max()


# ---- the other worlds

def test_C17_stripes_need_a_full_covariance_only_when_turned(rng):
    straight, turned = GaussianMixture.stripes(rotation_degrees=0), GaussianMixture.stripes()
    assert straight.cov() == pytest.approx(np.diag([1.69, 0.25]), abs=1e-12)
    assert np.diag(turned.cov()) == pytest.approx([0.97, 0.97], abs=1e-12)
    for s, t in ((0, 300), (100, 300), (200, 600)):
        x = straight.noised(t, LINEAR).sample(500, rng)
        assert np.abs(straight.reverse(x, s, t, LINEAR).cov()[:, 0, 1]).max() < 1e-12
        cov = turned.reverse(turned.noised(t, LINEAR).sample(500, rng), s, t, LINEAR).cov()
        assert diagonal_gap(cov).mean() > 0.1                           # nats of a step that no diagonal can have


def test_L21_correlated_world():
    world = GaussianMixture.correlated(0.8, 4)
    np.testing.assert_allclose(world.cov(), 0.2 * np.eye(4) + 0.8, rtol=1e-15)
    for rho, dim in ((1.0, 2), (-0.5, 3), (0.5, 1)):
        with pytest.raises(ValueError, match="rho must lie strictly between"):
            GaussianMixture.correlated(rho, dim)
    with pytest.raises(ValueError, match="only a world in two dimensions"):
        world.rotated(10)


# ---- the rest

def test_two_component_world_is_standardised():
    world = GaussianMixture.two_component()
    assert world.mean() == pytest.approx([0], abs=1e-15) and world.cov() == pytest.approx(np.ones((1, 1)), rel=1e-12)


def test_mixture_on_a_device(fake, rng):
    world = WORLDS["skewed"]
    x = world.sample(5, rng).astype(np.float32)
    device = fake.asarray(x)
    pairs = [(world.log_density, ()), (world.score, ()), (world.hessian, ()),
             (world.posterior_x0, (300, LINEAR)), (world.posterior_x0, (np.arange(1, 6), LINEAR)),
             (world.reverse, (5, 300, LINEAR))]
    for function, rest in pairs:
        on_device, on_host = function(device, *rest), function(x, *rest)
        if not isinstance(on_host, tuple):
            on_device, on_host = (on_device,), (on_host,)
        for a, b in zip(on_device, on_host, strict=True):
            np.testing.assert_array_equal(to_host(a), b)
            assert b.dtype == np.float64


@pytest.mark.parametrize("arguments, message", [
    (([0.5, 0.6], np.zeros((2, 1)), np.ones((2, 1, 1))), "sum to 1"),
    (([1.0], np.zeros((2, 1)), np.ones((2, 1, 1))), "weights must be"),
    (([1.0], np.zeros((1, 2)), np.ones((1, 1, 1))), "covariances must be"),
    (([1.0], np.zeros((1, 2)), [[[1.0, 0.5], [0.0, 1.0]]]), "symmetric"),
    (([1.0], np.zeros((1, 2)), [[[1.0, 2.0], [2.0, 1.0]]]), "semi-definite"),
])
def test_bad_mixtures_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        GaussianMixture(*arguments)
    with pytest.raises(ValueError, match="points must be"):
        GaussianMixture.grid().score(np.zeros((3, 1)))
