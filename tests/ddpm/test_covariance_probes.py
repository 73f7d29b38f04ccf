"""Random signs that find a diagonal (C11), and the head that learns it (C12): over all sign vectors, exactly."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ddpm.covariance import hutchinson, ocm
from ddpm.denoiser import Denoiser
from ddpm.mixture import GaussianMixture
from ddpm.network_denoiser import NetworkDenoiser
from ddpm.randomness import SampleStreams
from nn.backend import array_module, to_host
from nn.mlp import MLP
from tests.ddpm.test_tweedie import GENERAL, LINEAR, gaussian_world
from tests.helpers import general_schedule, property_test, schedules, zscore

ROTATED, CORRELATED = GaussianMixture.grid(rotation_degrees=30), GaussianMixture.correlated(0.9, 3)


class Given:
    """A generator whose draws were written down before."""

    def __init__(self, *draws):
        self.draws = list(draws)

    def standard_normal(self, shape, dtype=np.float64):
        draw = self.draws.pop(0)
        assert draw.shape == shape
        return draw.astype(dtype)


def all_signs(D):
    return np.array(list(itertools.product([-1.0, 1.0], repeat=D)))


def of_matrices(J):
    """vjp of the linear map x -> J x, J (D, D) or (N, D, D)."""
    return lambda x_t, t, v: np.einsum("nj,...nji->ni" if J.ndim == 3 else "nj,ji->ni", v, J)


def diagonal_of(J):
    return np.einsum("...ii->...i", J)


# ---- C11: the estimate

@pytest.mark.parametrize("D", [1, 2, 3, 6])
def test_C11_the_average_over_all_signs_is_the_diagonal(D, rng):
    """For a Jacobian that isn't symmetric; the variance is that of the columns, not of the rows."""
    J, v = rng.standard_normal((D, D)), all_signs(D)
    found = hutchinson.hutchinson_diagonal(of_matrices(J), v, 1, 1, Given(v))
    np.testing.assert_allclose(found.mean(axis=0), np.diag(J), rtol=1e-12, atol=1e-12)
    variance = hutchinson.diagonal_variance(J[None], 1)[0]
    np.testing.assert_allclose(found.var(axis=0), variance, rtol=1e-10, atol=1e-14)
    if D > 1:
        assert np.abs(found.var(axis=0) - hutchinson.diagonal_variance(J.T[None], 1)[0]).max() > 0.1
        assert np.abs(found.mean(axis=0) - J.sum(axis=0)).max() > 0.1          # control: the signs used once only
        again = hutchinson.hutchinson_diagonal(of_matrices(J), v, 1, 1, Given(-v))
        np.testing.assert_array_equal(found, again)                            # v and -v: one probe, not two


@property_test
@given(st.integers(1, 5), st.integers(1, 7), st.integers(0, 2**32 - 1))
def test_C11_variance_falls_as_one_over_the_probes(D, probes, seed):
    """Exactly, from the variance of one: independent probes average."""
    J = np.random.default_rng(seed).standard_normal((2, D, D))
    one = np.stack([hutchinson.hutchinson_diagonal(of_matrices(j), all_signs(D), 1, 1, Given(all_signs(D))).var(axis=0)
                    for j in J])
    np.testing.assert_allclose(hutchinson.diagonal_variance(J, probes), one / probes, rtol=1e-9, atol=1e-14)


def test_C11_random_probes_are_unbiased_with_the_stated_variance(rng):
    n, M = 100_000, 3
    J = rng.standard_normal((3, 3))
    found = hutchinson.hutchinson_diagonal(of_matrices(J), np.zeros((n, 3)), 1, M, rng)
    expected = hutchinson.diagonal_variance(J[None], M)[0]
    for i in range(3):
        assert abs(zscore(found[:, i], J[i, i])) < 4
        assert abs(zscore((found[:, i] - J[i, i])**2, expected[i])) < 4
    signs = hutchinson.signs_like(np.zeros((n, 3)), rng)
    assert (np.abs(signs) == 1).all() and abs(zscore(signs[:, 0])) < 4 and abs(zscore(signs[:, 0] * signs[:, 1])) < 4
    normal = rng.standard_normal((n, 3))                                       # control: the extra 2 J_ii^2 of normals
    products = normal * of_matrices(J)(None, 1, normal)
    worse = hutchinson.diagonal_variance(J[None], 1)[0] + 2 * np.diag(J)**2
    for i in range(3):
        assert abs(zscore((products[:, i] - J[i, i])**2, worse[i])) < 4
    i = np.argmax(np.abs(np.diag(J)))
    assert abs(zscore((products[:, i] - J[i, i])**2, M * expected[i])) > 8


@pytest.mark.parametrize("t", [10, 100, 300, 1000])
@pytest.mark.parametrize("schedule", [LINEAR, GENERAL], ids=["linear", "general"])
def test_C11_on_a_mixture_it_is_the_variance_of_the_noise(t, schedule, rng):
    """Over the four signs of a rotated grid: exactly Var[eps | x_t], with the scatter of its off-diagonals."""
    denoiser, v = Denoiser.from_world(ROTATED, schedule), all_signs(2)
    x_t = ROTATED.noised(t, schedule).sample(10, rng)
    exact, (_, cov) = denoiser.predict(x_t, t).var_eps, ROTATED.posterior_x0(x_t, t, schedule)
    every = np.stack([hutchinson.var_eps(hutchinson.hutchinson_diagonal(
        denoiser.vjp, x_t, t, 1, Given(np.repeat(sign[None], 10, axis=0))), t, schedule) for sign in v])
    np.testing.assert_allclose(every.mean(axis=0), exact, rtol=1e-9, atol=1e-12)
    J = (np.eye(2) - schedule.snr[t] * cov) / np.sqrt(schedule.sigma2_bar[t])
    expected = schedule.sigma2_bar[t] * hutchinson.diagonal_variance(J, 1)
    np.testing.assert_allclose(every.var(axis=0), expected, rtol=1e-7, atol=1e-20)
    straight = GaussianMixture.grid()                                          # no off-diagonals: one probe is exact
    one = hutchinson.hutchinson_diagonal(Denoiser.from_world(straight, schedule).vjp, x_t, t, 1, rng)
    exact = Denoiser.from_world(straight, schedule).predict(x_t, t).var_eps
    np.testing.assert_allclose(hutchinson.var_eps(one, t, schedule), exact, rtol=1e-8, atol=1e-11)
    assert t != 300 or schedule is not LINEAR or every.var(axis=0).max() > 1e-2


class Counting(MLP):
    """An MLP that counts the images that go forwards and backwards through it."""

    forwards = backwards = 0

    def forward(self, x, t):
        self.forwards += len(x)
        return super().forward(x, t)

    def backward(self, dy, *, params=True):
        self.backwards += len(dy)
        return super().backward(dy, params=params)


def test_C11_two_passes_for_each_probe_on_a_network(rng):
    """M forward and M backward ones per image, 2 M in all; the product is with the transpose of the Jacobian."""
    N, M, t, h = 4, 5, 300, 1e-5
    network = Counting(3, 3, hidden=(16,), time_dim=8, rng=rng, dtype=np.float64)
    denoiser, x_t = NetworkDenoiser(network, "ddpm", LINEAR), rng.standard_normal((N, 3))
    J = np.stack([(network(x_t + h * e, t) - network(x_t - h * e, t)) / (2 * h) for e in np.eye(3)], axis=2)
    v = rng.standard_normal((N, 3))
    np.testing.assert_allclose(denoiser.vjp(x_t, t, v), np.einsum("nj,nji->ni", v, J), rtol=1e-6, atol=1e-9)
    assert np.abs(denoiser.vjp(x_t, t, v) - np.einsum("nj,nij->ni", v, J)).max() > 1e-3
    network.forwards = network.backwards = denoiser.evaluations = denoiser.vjps = 0
    draws = [hutchinson.signs_like(x_t, rng) for _ in range(M)]
    found = hutchinson.hutchinson_diagonal(denoiser.vjp, x_t, t, M, Given(*draws))
    assert (network.forwards, network.backwards) == (N * M, N * M)
    assert (denoiser.evaluations, denoiser.vjps) == (0, N * M)
    assert not network.flat_gradients.any()                                    # the parameters are left alone
    expected = np.mean([d * np.einsum("nj,nji->ni", d, J) for d in draws], axis=0)
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-9)


def test_C11_probes_of_a_sample_do_not_depend_on_its_batch():
    x_t, J = np.zeros((4, 3)), np.arange(9.0).reshape(3, 3)

    def estimate(rows):
        streams = SampleStreams(0, 7, rows, purpose="probes")
        return hutchinson.hutchinson_diagonal(of_matrices(J), x_t[rows], 1, 2, streams)
    np.testing.assert_array_equal(np.concatenate([estimate([0]), estimate([1, 2, 3])]), estimate([0, 1, 2, 3]))


# ---- C12, E30: the targets of a head

@property_test
@given(schedules(), st.floats(0, 9), st.data())
def test_C12_sign_and_scale_of_the_target(schedule, variance, data):
    """N(0, c) data, where eps is linear: the target is -sigma2_bar/(lam_bar^2 c + sigma2_bar) for every probe."""
    t = data.draw(st.integers(1, schedule.T))
    lam2, v = schedule.lam_bar[t]**2, schedule.sigma2_bar[t]
    denoiser, x_t = Denoiser.from_world(gaussian_world(variance), schedule), np.array([[-0.7], [0.0], [2.0]])
    y = ocm.draw_targets(denoiser.vjp, x_t, t, 4, np.random.default_rng(t), schedule)
    assert y.shape == (4, 3, 1)
    spread = lam2 * variance + v
    np.testing.assert_allclose(y, -v / spread, rtol=1e-9)
    np.testing.assert_allclose(ocm.var_eps(y), lam2 * variance / spread, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("schedule", [LINEAR, general_schedule()], ids=["linear", "general"])
def test_C12_targets_average_to_the_scaled_diagonal_of_the_hessian(schedule, rng):
    t = schedule.T // 5
    x_t = CORRELATED.noised(t, schedule).sample(8, rng)
    denoiser, signs = Denoiser.from_world(CORRELATED, schedule), all_signs(3)
    draws = [np.repeat(sign[None], 8, axis=0) for sign in signs]
    y = ocm.draw_targets(denoiser.vjp, x_t, t, 8, Given(*draws), schedule)
    expected = schedule.sigma2_bar[t] * diagonal_of(CORRELATED.noised(t, schedule).hessian(x_t))
    np.testing.assert_allclose(y.mean(axis=0), expected, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(ocm.var_eps(y.mean(axis=0)), denoiser.predict(x_t, t).var_eps, rtol=1e-8, atol=1e-11)
    diagonal = hutchinson.hutchinson_diagonal(denoiser.vjp, x_t, t, 8, Given(*draws))
    np.testing.assert_allclose(y.mean(axis=0), -np.sqrt(schedule.sigma2_bar[t]) * diagonal, rtol=1e-9)
    assert y.std(axis=0).max() > 0.05


def targets_of_all_probes(J, t, schedule, M):
    """y (M, 8^M, 3): all tuples of M sign vectors in three dimensions, each a row of the batch."""
    tuples = np.array(list(itertools.product(all_signs(3), repeat=M))).swapaxes(0, 1)
    x_t = np.zeros(tuples.shape[1:])
    return ocm.draw_targets(of_matrices(J), x_t, t, M, Given(*tuples), schedule)


@pytest.mark.parametrize("M", [1, 2, 3])
def test_E30_only_the_value_is_offset_and_no_gradient_is_biased(M, rng):
    """All sign vectors in D = 3, exactly: both losses have the gradient of the loss on the diagonal itself.

    Their values are more than its own by tr Cov[y] / 3, or by an M-th of it: that is all there is to the 'bias'.
    """
    t, J = 300, rng.standard_normal((3, 3))
    scale = np.sqrt(LINEAR.sigma2_bar[t])
    y = targets_of_all_probes(J, t, LINEAR, M)
    exact = -scale * np.diag(J)
    offset = LINEAR.sigma2_bar[t] * hutchinson.diagonal_variance(J[None], 1).sum() / 3
    for head in (exact, np.zeros(3), rng.standard_normal(3)):
        every = np.broadcast_to(head, y.shape[1:])
        for loss, expected in ((ocm.loss_on_average, offset / M), (ocm.loss_on_each, offset)):
            values, gradient = loss(every, y)
            np.testing.assert_allclose(gradient.mean(axis=0), 2 / 3 * (head - exact), rtol=1e-10, atol=1e-14)
            np.testing.assert_allclose(values.mean(), ((head - exact)**2).mean() + expected, rtol=1e-10)
    np.testing.assert_allclose(ocm.loss_on_average(every, y)[1], ocm.loss_on_each(every, y)[1], rtol=1e-12, atol=1e-14)
    assert offset > 0.05                                                       # and at the minimiser neither is 0
    biased = np.abs(y).mean(axis=(0, 1)) - np.abs(exact)                       # control: a target that is not linear
    assert np.abs(biased).max() > 0.05


@pytest.mark.parametrize("M", [1, 2])
def test_C12_the_minimiser_of_either_loss_is_the_diagonal_as_a_function(M, rng):
    """Scores with quadratic components, so that the diagonal is linear in x: least squares finds it exactly.

    s_i = x^T Q_i x / 2 + b_i^T x has diagonal b_ii + sum_k Q_i[i, k] x_k. With the exact average over all probes and a
    head linear in x, the normal equations of both losses have the same solution, and the least loss is the scatter.
    """
    n = 12
    Q, b, x = rng.standard_normal((3, 3, 3)), rng.standard_normal((3, 3)), rng.standard_normal((n, 3))
    Q = Q + Q.swapaxes(1, 2)
    J = np.einsum("ijk,nk->nij", Q, x) + b                                     # d s_i / d x_j at each x
    t, scale = 500, np.sqrt(LINEAR.sigma2_bar[500])
    y = np.stack([targets_of_all_probes(-j / scale, t, LINEAR, M) for j in J], axis=1)         # (M, n, 8^M, 3)
    features = np.column_stack([np.ones(n), x])
    P = y.shape[2]

    def slope(loss, theta):
        head = np.repeat(features @ theta, P, axis=0)
        values, gradient = loss(head, y.reshape(M, n * P, 3))
        return values.mean(), np.repeat(features, P, axis=0).T @ gradient / (n * P)

    wanted = np.concatenate([np.diag(b)[None], np.stack([Q[i, i] for i in range(3)], axis=1)])
    scatter = np.mean([hutchinson.diagonal_variance(j[None], 1).mean() for j in J])
    for loss, offset in ((ocm.loss_on_average, scatter / M), (ocm.loss_on_each, scatter)):
        _, at_zero = slope(loss, np.zeros((4, 3)))
        theta = np.linalg.solve(features.T @ features, -at_zero * 3 * n / 2)   # gradient = 2/(3n) F^T (F theta - y)
        np.testing.assert_allclose(theta, wanted, rtol=1e-9, atol=1e-11)
        least, gradient = slope(loss, theta)
        assert np.abs(gradient).max() < 1e-12
        assert least == pytest.approx(offset, rel=1e-10) and offset > 0.1


# ---- arrays and errors

def test_precision_and_device(fake, rng):
    J, x_t = rng.standard_normal((3, 3)), rng.standard_normal((4, 3))
    draws, t = rng.standard_normal((2, 4, 3)), np.array([1, 5, 300, 1000])

    def calls(x_t, J, dtype=np.float64):
        def vjp(x_t, t, v):
            return v @ J
        xp = array_module(x_t)
        y = ocm.draw_targets(vjp, x_t, t, 2, Given(*draws), LINEAR)
        diagonal = hutchinson.hutchinson_diagonal(vjp, x_t, t, 2, Given(*draws))
        return [y, diagonal, hutchinson.var_eps(diagonal, t, LINEAR), hutchinson.diagonal_variance(J[None], 2),
                *ocm.loss_on_each(xp.zeros_like(x_t), y), *ocm.loss_on_average(xp.zeros_like(x_t), y)]
    exact = calls(x_t, J)
    device, single = calls(fake.asarray(x_t), fake.asarray(J)), calls(x_t.astype(np.float32), J.astype(np.float32))
    for a, b, c in zip(exact, device, single, strict=True):
        assert array_module(b) is fake and c.dtype == np.float32
        np.testing.assert_array_equal(to_host(b), a)
        np.testing.assert_allclose(c, a, rtol=1e-4, atol=1e-5)


def test_images_are_vectors_of_pixels(rng):
    """A map that mixes all pixels, images of two channels, a batch of one."""
    J, x_t = rng.standard_normal((8, 8)), rng.standard_normal((1, 2, 2, 2))
    signs = all_signs(8).reshape(-1, 1, 2, 2, 2)

    def vjp(x_t, t, v):
        return (v.reshape(1, 8) @ J).reshape(v.shape)
    found = hutchinson.hutchinson_diagonal(vjp, x_t, 5, len(signs), Given(*signs))
    np.testing.assert_allclose(found.reshape(8), np.diag(J), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("probes", [0, -1])
def test_no_probes_are_refused(probes, rng):
    x = np.zeros((2, 2))
    for call in (lambda: hutchinson.hutchinson_diagonal(None, x, 1, probes, rng),
                 lambda: ocm.draw_targets(None, x, 1, probes, rng, LINEAR)):
        with pytest.raises(ValueError, match="probes must be at least 1"):
            call()
