"""Gaussian identities by quadrature, gradients by finite differences, and the likelihood of a level far in the tail."""

import numpy as np
import pytest
import scipy.special
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from ddpm import gaussian
from nn import backend
from nn.backend import array_module, to_host
from tests.helpers import property_test, zscore

LEVELS = 2 * np.arange(256) / 255 - 1
VARIANCES = [1e-10, 1e-6, 1e-3, 0.1, 1.0, 100.0]

NODES, WEIGHTS = np.polynomial.hermite_e.hermegauss(40)
means = st.floats(-3, 3)
variances = st.floats(-5, 3).map(np.exp)


def expectation(f, mean, var):
    """E f(x) under N(mean, var); exact for the polynomials that logarithms of Gaussians are."""
    return (WEIGHTS * f(mean + np.sqrt(var) * NODES)).sum() / np.sqrt(2 * np.pi)


# ---- densities and divergences

@property_test
@given(means, means, variances)
def test_log_normal_is_scipys(x, mean, var):
    expected = scipy.stats.norm.logpdf(x, mean, np.sqrt(var))
    np.testing.assert_allclose(gaussian.log_normal(x, mean, var), expected, rtol=1e-9, atol=1e-12)


@property_test
@given(means, variances, means, variances)
def test_L11_expected_log_density_by_quadrature(mean_q, var_q, mean_p, var_p):
    exact = expectation(lambda x: gaussian.log_normal(x, mean_p, var_p), mean_q, var_q)
    np.testing.assert_allclose(-gaussian.cross_entropy(mean_q, var_q, mean_p, var_p), exact, rtol=1e-9, atol=1e-9)
    formula = gaussian.log_normal(mean_q, mean_p, var_p) - var_q / (2 * var_p)
    np.testing.assert_allclose(formula, exact, rtol=1e-9, atol=1e-9)
    wrong_sign = gaussian.log_normal(mean_q, mean_p, var_p) + var_q / (2 * var_p)
    np.testing.assert_allclose(wrong_sign - exact, var_q / var_p, rtol=1e-6, atol=1e-9)


@property_test
@given(means, variances, means, variances)
def test_kl_and_entropy_by_quadrature(mean_q, var_q, mean_p, var_p):
    kl = gaussian.kl(mean_q, var_q, mean_p, var_p)
    log_ratio = expectation(lambda x: gaussian.log_normal(x, mean_q, var_q) - gaussian.log_normal(x, mean_p, var_p),
                            mean_q, var_q)
    np.testing.assert_allclose(kl, log_ratio, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(kl, gaussian.cross_entropy(mean_q, var_q, mean_p, var_p) - gaussian.entropy(var_q),
                               rtol=1e-9, atol=1e-9)
    assert kl >= -1e-12 and gaussian.kl(mean_q, var_q, mean_q, var_q) == 0


def test_kl_by_monte_carlo_and_not_the_other_way_round(rng):
    x = 0.3 + np.sqrt(0.5) * rng.standard_normal(200_000)
    log_ratio = gaussian.log_normal(x, 0.3, 0.5) - gaussian.log_normal(x, -0.2, 0.8)
    assert abs(zscore(log_ratio, gaussian.kl(0.3, 0.5, -0.2, 0.8))) < 4
    assert abs(zscore(log_ratio, gaussian.kl(-0.2, 0.8, 0.3, 0.5))) > 20


def test_kl_of_small_variances_keeps_its_digits_in_float32(rng):
    """Early times have variances near 1e-5, almost equal; a difference of their logarithms would be off by 1e-6."""
    var_q, var_p = (rng.uniform(1e-5, 2e-5, (2, 1000)) * [[1], [1.01]]).astype(np.float32)
    exact = gaussian.kl(0.0, var_q.astype(float), 0.0, var_p.astype(float))
    single = gaussian.kl(0.0, var_q, 0.0, var_p)
    difference = 0.5 * (np.log(var_p) - np.log(var_q) + var_q / var_p - 1)
    assert single.dtype == difference.dtype == np.float32
    assert abs(single - exact).max() < 2e-7 < 4e-7 < abs(difference - exact).max()


def test_zero_variance():
    """A point mass has an infinite KL (E10) and a finite cross entropy, minus the log density at the point."""
    x = np.array([0.3, -1.0])
    with np.errstate(divide="ignore"):
        assert np.isposinf(gaussian.kl(x, 0.0, 0.1, 0.5)).all()
    np.testing.assert_allclose(gaussian.cross_entropy(x, 0.0, 0.1, 0.5), -gaussian.log_normal(x, 0.1, 0.5))
    assert all(np.isfinite(g).all() for g in gaussian.kl_gradients(x, 0.0, 0.1, 0.5))
    for bad in (lambda: gaussian.log_normal(x, 0.0, 0.0), lambda: gaussian.kl(x, 1.0, x, 0.0),
                lambda: gaussian.cross_entropy(x, 1.0, x, -1.0), lambda: gaussian.entropy(0.0),
                lambda: gaussian.log_normal_gradients(x, 0.0, 0), lambda: gaussian.kl_gradients(x, 1.0, x, 0.0),
                lambda: gaussian.discretized_log_likelihood(x, x, 0.0)):
        with pytest.raises(ValueError, match="must be > 0"):
            bad()


# ---- gradients

def central(f, x, step):
    return (f(x + step) - f(x - step)) / (2 * step)


@property_test
@given(means, variances, means, variances)
def test_gradients_by_finite_differences(mean_q, var_q, mean_p, var_p):
    for f, gradients in (
            (lambda m, v: gaussian.kl(mean_q, var_q, m, v), gaussian.kl_gradients(mean_q, var_q, mean_p, var_p)),
            (lambda m, v: gaussian.log_normal(mean_q, m, v), gaussian.log_normal_gradients(mean_q, mean_p, var_p))):
        scale = 1 / var_p + (mean_q - mean_p)**2 / var_p**2 + var_q / var_p**2 + 1
        d_mean = central(lambda m, f=f: f(m, var_p), mean_p, 1e-4 * np.sqrt(var_p))
        d_var = central(lambda v, f=f: f(mean_p, v), var_p, 1e-4 * var_p)
        np.testing.assert_allclose(gradients[0], d_mean, rtol=1e-6, atol=1e-7 * scale)
        np.testing.assert_allclose(gradients[1], d_var, rtol=1e-6, atol=1e-6 * scale)


@pytest.mark.parametrize("var", VARIANCES)
@pytest.mark.parametrize("mean", [-1.0, 0.3, 0.501, 5.0])
def test_discretized_gradients_by_finite_differences(mean, var):
    def f(m, v):
        return gaussian.discretized_log_likelihood(LEVELS, m, v)

    d_mean, d_var = gaussian.discretized_log_likelihood_gradients(LEVELS, mean, var)
    assert np.isfinite(d_mean).all() and np.isfinite(d_var).all()
    # the value itself is rounded to 1e-16 of its size, which a difference over a step divides by that step
    step = 1e-5 * np.sqrt(var)
    rounding = 1e-15 * abs(f(mean, var)).max()
    np.testing.assert_allclose(d_mean, central(lambda m: f(m, var), mean, step), rtol=1e-5,
                               atol=1e-6 / np.sqrt(var) + rounding / step)
    np.testing.assert_allclose(d_var, central(lambda v: f(mean, v), var, 1e-5 * var), rtol=1e-6,
                               atol=1e-5 / var + rounding / (1e-5 * var))


def test_discretized_gradients_tend_to_the_densitys_where_bins_are_narrow():
    """In a tail 4000 standard deviations out the bin's near edge is what counts; in a wide Gaussian, its centre."""
    x = LEVELS[1:-1]
    for exact, limit in zip(gaussian.discretized_log_likelihood_gradients(x, 0.1, 100.0),
                            gaussian.log_normal_gradients(x, 0.1, 100.0), strict=True):
        np.testing.assert_allclose(exact, limit, rtol=1e-4, atol=1e-9)
    d_mean, _ = gaussian.discretized_log_likelihood_gradients(LEVELS[:100], 4.0, 1e-6)
    np.testing.assert_allclose(d_mean, (LEVELS[:100] + 1 / 255 - 4.0) / 1e-6, rtol=1e-3)


# ---- the likelihood of a level

@pytest.mark.parametrize("var", VARIANCES)
@pytest.mark.parametrize("levels", [2, 3, 256])
def test_discretized_masses_sum_to_one(var, levels):
    x = 2 * np.arange(levels) / (levels - 1) - 1
    for mean in (-7.0, -1.0, 0.12345, 0.999, 30.0):
        log_mass = gaussian.discretized_log_likelihood(x, mean, var, bin_width=2 / (levels - 1))
        assert np.isfinite(log_mass).all()
        np.testing.assert_allclose(np.exp(log_mass).sum(), 1, rtol=1e-12)


def log_mass_by_quadrature(x, mean, var, width):
    """log of the integral of N(mean, var) over the bin, taken relative to the bin's largest value."""
    low, high = x - width / 2, x + width / 2
    peak = np.clip(mean, low, high)
    std = np.sqrt(var)
    decay = std / np.maximum(abs(peak - mean) / std, 1)                 # how fast the density falls off the peak
    low, high = np.maximum(low, peak - 40 * decay), np.minimum(high, peak + 40 * decay)
    nodes, weights = np.polynomial.legendre.leggauss(400)
    u = (low + high) / 2 + np.multiply.outer(nodes, (high - low) / 2)
    ratio = np.exp(gaussian.log_normal(u, mean, var) - gaussian.log_normal(peak, mean, var))
    return gaussian.log_normal(peak, mean, var) + np.log(np.tensordot(weights, ratio, 1) * (high - low) / 2)


@pytest.mark.parametrize("var", [1e-6, 1e-3, 0.1, 1.0, 100.0])
@pytest.mark.parametrize("mean", [-0.9, 0.2, 3.0])
def test_discretized_equals_quadrature(mean, var):
    x = LEVELS[1:-1]                                                    # closed bins
    np.testing.assert_allclose(gaussian.discretized_log_likelihood(x, mean, var),
                               log_mass_by_quadrature(x, mean, var, 2 / 255), rtol=1e-9, atol=1e-9)


def test_discretized_is_exact_thirty_deviations_out_where_a_difference_of_cdfs_is_zero():
    x, std = LEVELS[[20, 128, 240]], 0.01
    mean = x + 30 * std
    exact = gaussian.discretized_log_likelihood(x, mean, std**2)
    np.testing.assert_allclose(exact, log_mass_by_quadrature(x, mean, std**2, 2 / 255), rtol=1e-10)
    ndtr = scipy.special.ndtr
    naive = np.log(np.maximum(ndtr((x + 1 / 255 - mean) / std) - ndtr((x - 1 / 255 - mean) / std), 1e-12))
    assert (exact < -400).all() and (naive > -28).all()


def test_discretized_is_symmetric_and_open_at_the_ends():
    f = gaussian.discretized_log_likelihood
    np.testing.assert_allclose(f(LEVELS, 0.37, 0.02), f(-LEVELS, -0.37, 0.02), rtol=1e-12)
    np.testing.assert_allclose(f(np.array([-1.0, 1.0]), np.array([-9.0, 9.0]), 0.01), 0, atol=1e-15)
    np.testing.assert_allclose(f(np.array([1.0]), 0.0, 1.0), scipy.stats.norm.logsf(1 - 1 / 255), rtol=1e-12)
    for width in (0, -0.1, 2.5):
        with pytest.raises(ValueError, match="bin_width"):
            f(LEVELS, 0.0, 1.0, bin_width=width)


# ---- dtypes and devices

FUNCTIONS = {
    "log_normal": lambda x, m, v: gaussian.log_normal(x, m, v),
    "log_normal_gradients": lambda x, m, v: gaussian.log_normal_gradients(x, m, v)[1],
    "entropy": lambda x, m, v: gaussian.entropy(v) + 0 * x,
    "kl": lambda x, m, v: gaussian.kl(x, 0.3, m, v),
    "kl_gradients": lambda x, m, v: gaussian.kl_gradients(x, np.float64(0.3), m, v)[1],
    "cross_entropy": lambda x, m, v: gaussian.cross_entropy(x, 0.3, m, v),
    "discretized": lambda x, m, v: gaussian.discretized_log_likelihood(x, m, v),
    "discretized, mean": lambda x, m, v: gaussian.discretized_log_likelihood_gradients(x, m, v)[0],
    "discretized, var": lambda x, m, v: gaussian.discretized_log_likelihood_gradients(x, m, v)[1],
}


@pytest.mark.parametrize("f", FUNCTIONS.values(), ids=FUNCTIONS)
@pytest.mark.parametrize("scalars", [False, True])
def test_float32_and_device(f, scalars, rng, fake):
    x = LEVELS[rng.integers(0, 256, (2, 5, 5, 1))]
    mean, var = 0.2, np.float64(0.05)
    if not scalars:
        mean, var = x + 0.3 * rng.standard_normal(x.shape), rng.uniform(0.01, 1, x.shape)
    exact = f(x, mean, var)
    narrow = [v if scalars and v is not x else v.astype(np.float32) for v in (x, mean, var)]
    single = f(*narrow)
    assert exact.dtype == np.float64 and single.dtype == np.float32
    np.testing.assert_allclose(single, exact, rtol=1e-4, atol=1e-5)
    arguments = [fake.asarray(v) if hasattr(v, "shape") and v.shape else v for v in narrow]
    fake.transfers.clear()
    device = f(*arguments)
    assert array_module(device) is fake and device.dtype == np.float32 and not fake.transfers
    np.testing.assert_array_equal(to_host(device), single)
    if not scalars:
        with pytest.raises(TypeError):
            f(*arguments[:-1], narrow[-1])


def test_special_module_finds_cupys(monkeypatch):
    """CuPy's special functions live beside CuPy, in cupyx."""
    import sys
    from types import ModuleType

    modules = {name: ModuleType(name) for name in ("cupy", "cupyx", "cupyx.scipy", "cupyx.scipy.special")}
    modules["cupyx"].scipy = modules["cupyx.scipy"]
    modules["cupyx.scipy"].special = modules["cupyx.scipy.special"]
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    array = type("ndarray", (), {"__module__": "cupy"})()
    assert backend.special_module(array) is modules["cupyx.scipy.special"]
    assert backend.special_module(1.0) is scipy.special
