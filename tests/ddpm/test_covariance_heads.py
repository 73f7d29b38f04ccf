"""Heads that learn second moments of the noise (SN, NPR): what they find, with the exact mean and with a wrong one."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar

import nn
from ddpm import covariance, gddm
from ddpm.covariance import ocm, residual, squared_noise
from ddpm.denoiser import Denoiser
from ddpm.mixture import GaussianMixture
from nn.backend import array_module, to_host
from tests.ddpm.test_tweedie import GENERAL, LINEAR, points_in_space
from tests.helpers import general_schedule, mixtures, property_test, schedules

TWO = GaussianMixture.two_component()
POINTS = points_in_space()


@pytest.fixture(params=[LINEAR, GENERAL], ids=["linear", "general"])
def schedule(request):
    return request.param


def noise_given(world, x_t, t, schedule):
    """The law of eps | x_t as values (N, M, D) and weights (N, M): a sum over points, or quadrature on the line."""
    posterior = world.posterior_mixture(x_t, t, schedule)
    x0, w = posterior.means, posterior.weights
    if world.covariances.any():
        z = np.linspace(-9, 9, 181)
        p = np.exp(-0.5 * z * z)
        std = np.sqrt(posterior.covariances[:, 0, 0])
        x0 = (x0[:, :, 0, None] + std[:, None] * z).reshape(len(x_t), -1, 1)
        w = (w[:, :, None] * p / p.sum()).reshape(len(x_t), -1)
    return (x_t[:, None, :] - schedule.lam_bar[t] * x0) / np.sqrt(schedule.sigma2_bar[t]), w


def mean(w, values):
    return np.einsum("nm,nmd->nd", w, values)


def expected_gradient(loss, head, w, *noises):
    """Mean over eps | x_t of a loss's gradient at the heads (N, D); the loss sees all pairs as one batch."""
    N, M, D = noises[0].shape
    _, gradient = loss(np.repeat(head, M, axis=0), *(noise.reshape(-1, D) for noise in noises))
    return mean(w, gradient.reshape(N, M, D))


# ---- C10 with the exact mean

@pytest.mark.parametrize("t", [1, 20, 100, 300, 1000])
@pytest.mark.parametrize("world", [TWO, POINTS], ids=["two", "points"])
def test_C10_both_heads_are_the_variance_of_the_noise(world, t, schedule, rng):
    """Where the mean gradient vanishes, the head is E[eps^2 | x_t] or E[r^2 | x_t], and both give Var[eps | x_t]."""
    x_t = world.noised(t, schedule).sample(12, rng)
    eps, w = noise_given(world, x_t, t, schedule)
    prediction = Denoiser.from_world(world, schedule).predict(x_t, t)
    eps_hat, exact = prediction.eps, prediction.var_eps
    tiled = np.broadcast_to(eps_hat[:, None, :], eps.shape)
    squared, of_residual = mean(w, eps**2), mean(w, (eps - tiled)**2)
    assert np.abs(expected_gradient(squared_noise.loss, squared, w, eps)).max() < 1e-11 * (1 + np.abs(squared).max())
    assert np.abs(expected_gradient(residual.loss, of_residual, w, eps, tiled)).max() < 1e-11 * (1 + squared.max())
    for loss, head, noises in ((squared_noise.loss, squared, (eps,)), (residual.loss, of_residual, (eps, tiled))):
        off = expected_gradient(loss, head + 0.1, w, *noises)                  # control: any other head moves
        np.testing.assert_allclose(off, 0.2 / x_t.shape[1], rtol=1e-9, atol=1e-11 * (1 + squared.max()))
    scale = 1 + squared.max()
    np.testing.assert_allclose(squared_noise.var_eps(squared, eps_hat), exact, rtol=1e-8, atol=1e-11 * scale)
    np.testing.assert_allclose(residual.var_eps(of_residual), exact, rtol=1e-8, atol=1e-11)
    found = covariance.var_x0(residual.var_eps(of_residual), t, schedule)
    np.testing.assert_allclose(found, prediction.var_x0, rtol=1e-8, atol=1e-11 / schedule.snr[t])


# ---- C10 with a wrong mean

@property_test
@given(mixtures(), schedules(), st.floats(-2, 2), st.data())
def test_C10_a_wrong_mean_adds_its_square_to_one_and_bends_the_other(world, schedule, bias, data):
    """For any law of eps | x_t: residual Var + e^2, never negative; squared noise Var - 2 E[eps] e - e^2."""
    world = GaussianMixture(world.weights, world.means, np.zeros_like(world.covariances))
    t = data.draw(st.integers(1, schedule.T))
    x_t = world.noised(t, schedule).sample(4, np.random.default_rng(t))
    eps, w = noise_given(world, x_t, t, schedule)
    exact = mean(w, eps)
    var, wrong = mean(w, (eps - exact[:, None])**2), exact + bias
    scale = 1e-9 * (1 + (eps**2).max())
    np.testing.assert_allclose(mean(w, (eps - wrong[:, None])**2), var + bias**2, rtol=1e-9, atol=scale)
    np.testing.assert_allclose(squared_noise.var_eps(mean(w, eps**2), wrong), var - 2 * exact * bias - bias**2,
                               rtol=1e-9, atol=scale)


def test_C10_the_residual_is_the_best_variance_for_a_wrong_mean():
    """A two-point law of the noise, mean -0.339 and variance 1.2057, denoised with an error of -0.6.

    The KL of a step around the wrong mean is least at var + c^2 1.566, the residual's; squared noise says 0.439.
    """
    low, high, error = -1.4, 0.7973, -0.6
    p = (high + 0.339) / (high - low)
    values, w = np.array([low, high]), np.array([p, 1 - p])
    exact, var = w @ values, w @ values**2 - (w @ values)**2
    assert exact == pytest.approx(-0.339, abs=1e-12) and var == pytest.approx(1.2057, abs=1e-3)
    npr = residual.var_eps(w @ (values - exact - error)**2)
    sn = squared_noise.var_eps(w @ values**2, exact + error)
    assert npr == pytest.approx(var + error**2, rel=1e-12)
    assert sn == pytest.approx(var - 2 * exact * error - error**2, rel=1e-12)
    assert npr == pytest.approx(1.566, abs=1e-3) and sn == pytest.approx(0.439, abs=1e-3)
    for schedule, s, t in ((LINEAR, 50, 300), (LINEAR, 1, 2), (general_schedule(), 3, 15)):
        c, step = gddm.noise_coefficient(s, t, schedule), schedule.posterior(s, t).var

        def averaged_kl(log_variance, c=c, step=step):                         # E KL(N(c eps, step) || N(c eps_hat, W))
            W = np.exp(log_variance)
            return 0.5 * (np.log(W / step) + (step + c**2 * (w @ (values - exact - error)**2)) / W - 1)
        best = np.exp(minimize_scalar(averaged_kl, bounds=(-30, 5), method="bounded", options={"xatol": 1e-9}).x)
        assert best == pytest.approx(step + c**2 * npr, rel=1e-5)
        assert best > (step + c**2 * sn) * 1.01


# ---- losses as code

def test_gradients_match_differences(rng):
    head, eps, eps_hat, direction = rng.standard_normal((4, 2, 3, 3, 2))
    targets, h = rng.standard_normal((4, 2, 3, 3, 2)), 1e-5
    for loss in (lambda y: squared_noise.loss(y, eps), lambda y: residual.loss(y, eps, eps_hat),
                 lambda y: ocm.loss_on_average(y, targets), lambda y: ocm.loss_on_each(y, targets)):
        values, gradient = loss(head)
        assert values.shape == (2,) and gradient.shape == head.shape
        slope = (loss(head + h * direction)[0] - loss(head - h * direction)[0]).sum() / (2 * h)
        assert slope == pytest.approx((gradient * direction).sum(), rel=1e-8)
        assert slope != pytest.approx(2 * (gradient * direction).sum(), rel=1e-2)


def test_precision_and_device(fake, rng):
    head, eps, eps_hat = rng.standard_normal((3, 2, 3, 3, 1))
    targets, t = rng.standard_normal((4, 2, 3, 3, 1)), np.array([1, 1000])

    def calls(head, eps, eps_hat, targets):
        return [*squared_noise.loss(head, eps), *residual.loss(head, eps, eps_hat), *ocm.loss_on_each(head, targets),
                *ocm.loss_on_average(head, targets), squared_noise.var_eps(head, eps_hat), residual.var_eps(head),
                ocm.var_eps(head), covariance.var_x0(head, t, LINEAR, 1.0), covariance.var_x0(head, 3, LINEAR)]
    arrays = head, eps, eps_hat, targets
    exact = calls(*arrays)
    device, single = calls(*map(fake.asarray, arrays)), calls(*(a.astype(np.float32) for a in arrays))
    for a, b, c in zip(exact, device, single, strict=True):
        assert array_module(b) is fake and c.dtype == np.float32
        np.testing.assert_array_equal(to_host(b), a)
        np.testing.assert_allclose(c, a, rtol=1e-5, atol=1e-5)


def test_var_x0_clips_what_no_variance_can_be(rng):
    var_eps = np.array([[-0.3, 0.0], [0.2, 5.0]])
    t = np.array([500, 500])
    factor = 1 / LINEAR.snr[500]
    np.testing.assert_allclose(covariance.var_x0(var_eps, t, LINEAR), [[0, 0], [0.2 * factor, 5 * factor]])
    np.testing.assert_allclose(covariance.var_x0(var_eps, 500, LINEAR, largest=1.0), [[0, 0], [1, 1]])
    _, exact = gddm.noise_to_data(var_eps, var_eps, var_eps, 500, LINEAR)
    np.testing.assert_allclose(covariance.var_x0(var_eps, 500, LINEAR)[1], exact[1])


# ---- heads trained on it

def train(loss, t, steps=800, batch=256, lr=4e-3):
    """A small network of (x_t, t) trained as a head: loss(head, eps, x_t, prediction, rng), on fresh points."""
    rng, denoiser = np.random.default_rng(1), Denoiser.from_world(TWO, LINEAR)
    network = nn.MLP(1, 1, hidden=(32, 32), time_dim=16, rng=np.random.default_rng(0))
    adam, average = nn.Adam(network, lr), nn.EMA(network, 0.99)
    for step in range(steps):
        eps = rng.standard_normal((batch, 1))
        x_t = LINEAR.add_noise(TWO.sample(batch, rng), t, eps)
        _, gradient = loss(network(x_t.astype(np.float32), t), eps, x_t, denoiser, rng)
        network.zero_grad()
        network.backward(gradient.astype(np.float32) / batch)
        nn.clip_grad_norm(network, 1.0)
        adam.lr = lr * 0.5 * (1 + np.cos(np.pi * step / steps))
        adam.step()
        average.update()
    average.swap()
    return network.eval()


def trained_on_squared_noise(t):
    head = train(lambda h, eps, x, d, rng: squared_noise.loss(h, eps), t)
    return lambda x, eps_hat: squared_noise.var_eps(head(x, t), eps_hat)


def trained_on_residuals(t):
    head = train(lambda h, eps, x, d, rng: residual.loss(h, eps, d.predict(x, t).eps), t)
    return lambda x, eps_hat: residual.var_eps(head(x, t))


def trained_on_single_probes(t):
    head = train(lambda h, eps, x, d, rng: ocm.loss_on_each(h, ocm.draw_targets(d.vjp, x, t, 1, rng, LINEAR)), t)
    return lambda x, eps_hat: ocm.var_eps(head(x, t))


@pytest.mark.parametrize("trained, within", [(trained_on_squared_noise, 0.25), (trained_on_residuals, 0.2),
                                             (trained_on_single_probes, 0.12)])
def test_C10_C12_heads_trained_on_it_find_the_variance(trained, within, rng):
    """Two components, t = 200: root mean square error over root mean square; the best constant misses by 0.73."""
    t = 200
    var_eps = trained(t)
    x_t = TWO.noised(t, LINEAR).sample(4000, rng)
    exact = Denoiser.from_world(TWO, LINEAR).predict(x_t, t)
    error = np.sqrt(((var_eps(x_t.astype(np.float32), exact.eps) - exact.var_eps)**2).mean())
    rms = np.sqrt((exact.var_eps**2).mean())
    assert error < within * rms < 0.7 * rms < exact.var_eps.std()
