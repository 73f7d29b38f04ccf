"""Numbers, diagonals and matrices: one covariance in three shapes gives one answer, and a matrix the textbook's."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import multivariate_normal

from ddpm import gaussian
from ddpm.covariance import shapes
from ddpm.posterior import Posterior
from nn.backend import array_module, to_host
from tests.helpers import property_test, zscore

IMAGES = (4, 2, 3, 1)                                                          # N, H, W, C: D = 6


def matrices(rng, N, D, least=0.05):
    root = rng.standard_normal((N, D, D)) / np.sqrt(D)
    return root @ root.swapaxes(1, 2) + least * np.eye(D)


def in_three_shapes(v, x):
    """The variance v of every coordinate, as a number, per example, as a diagonal and as a matrix."""
    N, D = len(x), x[0].size
    return [v, np.full((N,) + (1,) * (x.ndim - 1), v), np.full(x.shape, v), np.tile(v * np.eye(D), (N, 1, 1))]


@pytest.mark.parametrize("shape", [(4, 6), IMAGES, (4, 1), (1, 5), (3, 2, 2)])
def test_which_shape_it_is(shape, rng):
    x = rng.standard_normal(shape)
    *flat, matrix = in_three_shapes(0.3, x)
    assert not any(shapes.is_full(cov, x) for cov in flat) and not shapes.is_full(None, x)
    assert shapes.is_full(matrix, x)
    assert not shapes.is_full(np.ones((len(x), x[0].size, x[0].size + 1)), x)


@property_test
@given(st.floats(0.01, 5), st.floats(0.1, 3), st.floats(0, 2), st.integers(0, 2**32 - 1))
def test_G03_one_covariance_in_all_shapes_gives_one_answer(var, v, a, seed):
    rng = np.random.default_rng(seed)
    x, noise, mean = rng.standard_normal((3, *IMAGES))
    posterior = Posterior(a, 0.5, var)
    found = []
    for cov in in_three_shapes(v, x):
        step = shapes.step_covariance(posterior, cov, x)
        clipped = shapes.clip(step, None, 1.7, x)
        full = shapes.is_full(step, x)
        kl = shapes.kl(x, 0.4, mean, step) if full else gaussian.kl(x, 0.4, mean, step).reshape(4, -1).sum(axis=1)
        other = (shapes.cross_entropy(x, 0.4, mean, step) if full else
                 gaussian.cross_entropy(x, 0.4, mean, step).reshape(4, -1).sum(axis=1))
        found.append([shapes.diagonal(step, x) + 0 * x, shapes.root_times(step, noise), kl, other,
                      shapes.diagonal(clipped, x) + 0 * x, shapes.isotropic(step, x) + 0 * x])
    assert found[0][0].flat[0] == pytest.approx(var + a**2 * v, rel=1e-12)
    for answers in found[1:]:
        for one, first in zip(answers, found[0], strict=True):
            np.testing.assert_allclose(one, first, rtol=1e-9, atol=1e-12)


@property_test
@given(st.integers(1, 6), st.integers(0, 2**32 - 1))
def test_L06_a_matrix_against_scipy(D, seed):
    rng = np.random.default_rng(seed)
    W, x, mean = matrices(rng, 3, D), *rng.standard_normal((2, 3, D))
    v = rng.uniform(0.1, 2, 3)
    log_p = np.array([multivariate_normal(mean[i], W[i]).logpdf(x[i]) for i in range(3)])
    np.testing.assert_allclose(-shapes.cross_entropy(x, 0.0, mean, W), log_p, rtol=1e-8, atol=1e-9)
    inverse, d = np.linalg.inv(W), x - mean
    trace = np.trace(inverse, axis1=1, axis2=2)
    quadratic = np.einsum("ni,nij,nj->n", d, inverse, d)
    kl = 0.5 * (np.linalg.slogdet(W)[1] - D * np.log(v) + v * trace + quadratic - D)
    np.testing.assert_allclose(shapes.kl(x, v, mean, W), kl, rtol=1e-8, atol=1e-9)
    np.testing.assert_allclose(shapes.cross_entropy(x, v, mean, W), kl + 0.5 * D * np.log(2 * np.pi * np.e * v),
                               rtol=1e-8, atol=1e-9)
    np.testing.assert_allclose(shapes.kl(x, 0.7, x, np.tile(0.7 * np.eye(D), (3, 1, 1))), 0, atol=1e-14)
    if D > 1:                                                # control: the diagonal's is another
        only = np.stack([np.diag(np.diag(w)) for w in W])
        assert np.abs(shapes.kl(x, v, mean, only) - kl).max() > 1e-6


def test_C08_draws_have_the_covariance_of_the_matrix(rng):
    W, n = matrices(rng, 1, 3)[0], 100_000
    draws = shapes.root_times(np.broadcast_to(W, (n, 3, 3)), rng.standard_normal((n, 3)))
    for i in range(3):
        for j in range(3):
            assert abs(zscore(draws[:, i] * draws[:, j], W[i, j])) < 4
    assert abs(zscore(draws[:, 0] * draws[:, 1], 0.0)) > 4                     # control: the coordinates are correlated
    one = shapes.root_times(W[None], np.eye(3)[:1])
    root = np.concatenate([shapes.root_times(W[None], e[None]) for e in np.eye(3)])
    np.testing.assert_allclose(root @ root, W, atol=1e-12)
    np.testing.assert_allclose(root, root.T, atol=1e-12)                       # the symmetric root, not Cholesky's
    np.testing.assert_array_equal(one[0], root[0])


def test_clipping_bounds_the_variance_along_any_direction(rng):
    values, Q = np.array([-0.3, 0.4, 2.0]), np.linalg.qr(rng.standard_normal((3, 3)))[0]
    x, W = np.zeros((1, 3)), ((Q * values) @ Q.T)[None]
    np.testing.assert_allclose(np.linalg.eigvalsh(shapes.clip(W, 0, 1, x)[0]), [0, 0.4, 1], atol=1e-12)
    np.testing.assert_allclose(shapes.clip(W, 0, None, x)[0], (Q * [0, 0.4, 2]) @ Q.T, atol=1e-12)
    np.testing.assert_array_equal(shapes.clip(values[None], 0, 1, x), [[0, 0.4, 1]])
    assert shapes.clip(-0.1, 0, 1, x) == 0 and shapes.clip(3.0, 0, 1, x) == 1 and shapes.clip(3.0, 0, None, x) == 3
    noise = rng.standard_normal((1, 3))
    assert np.isfinite(shapes.root_times(W, noise)).all()                      # a negative eigenvalue counts as 0
    np.testing.assert_allclose(shapes.root_times(W, noise), shapes.root_times(shapes.clip(W, 0, None, x), noise),
                               atol=1e-7)


def test_a_direction_without_variance(rng):
    x, mean = rng.standard_normal((2, 2, 3))
    for least in (0.0, -0.1):
        singular = np.tile(np.diag([1.0, 1.0, least]), (2, 1, 1))
        with np.errstate(all="ignore"):
            assert np.isnan(shapes.kl(x, 0.5, mean, singular)).all()
        np.testing.assert_allclose(shapes.root_times(singular, x)[:, 2], 0, atol=1e-12)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_times_may_differ_and_arrays_may_be_on_a_device(dtype, fake, rng):
    x, noise = rng.standard_normal((2, *IMAGES)).astype(dtype)
    posterior = Posterior(np.array([0.1, 0.2, 0.3, 1.0]), np.zeros(4), np.array([0.5, 0.4, 0.3, 0.0]))
    for cov in (0.3, in_three_shapes(0.3, x)[1].astype(dtype), rng.uniform(0, 1, IMAGES).astype(dtype),
                matrices(rng, 4, 6)):
        def answers(cov, x, noise):
            step = shapes.step_covariance(posterior, cov, x)
            return [step, shapes.root_times(step, noise), shapes.clip(step, 0, 0.4, x), shapes.diagonal(step, x),
                    *([shapes.kl(x, posterior.var + 0.1, noise, step)] if shapes.is_full(step, x) else [])]
        host = answers(cov, x, noise)
        to = fake.asarray if hasattr(cov, "shape") else float
        for a, b in zip(host, answers(to(cov), fake.asarray(x), fake.asarray(noise)), strict=True):
            assert array_module(b) is fake
            np.testing.assert_array_equal(to_host(b), a)
        for i in range(4):
            row = slice(i, i + 1)
            one = shapes.step_covariance(Posterior(*(float(v[i]) for v in posterior)),
                                         cov[row] if hasattr(cov, "shape") else cov, x[row])
            np.testing.assert_allclose(host[0][row], one, rtol=1e-6)
        assert host[1].dtype == dtype and host[1].shape == x.shape
