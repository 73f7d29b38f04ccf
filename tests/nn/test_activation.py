"""SiLU and softmax: values, slopes, and arguments where a careless exponential would overflow."""

import numpy as np
import pytest

from nn.activation import silu_backward, silu_forward, silu_slope_of_half, softmax_backward, softmax_forward
from tests import reference
from tests.reference import error


@pytest.mark.parametrize("shape", [(), (5,), (3, 4), (2, 3, 2, 4)])
def test_silu_equals_the_formula(shape, rng):
    x, dy = 3 * rng.standard_normal(shape), np.asarray(rng.standard_normal(shape))
    x = np.asarray(x)
    y, cache = silu_forward(x)
    assert error(y, reference.silu(x)) < 1e-14
    assert error(silu_backward(dy, cache), reference.silu_backward(dy, x)) < 1e-13
    assert error(silu_backward(dy, cache), reference.central_difference(reference.silu, x, dy)) < 1e-8


def test_silu_over_many_blocks(rng):
    x, dy = rng.standard_normal((300, 129)), rng.standard_normal((300, 129))
    assert error(silu_forward(x)[0], reference.silu(x)) < 1e-14
    assert error(silu_backward(dy, x), reference.silu_backward(dy, x)) < 1e-13


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_silu_far_out(dtype):
    x = np.array([-1e30, -1e4, -100, 0, 100, 1e4, 1e30], dtype)
    with np.errstate(all="raise"):
        y, slope = silu_forward(x)[0], silu_backward(np.ones_like(x), x)
    np.testing.assert_array_equal(y, np.maximum(x, 0))
    np.testing.assert_array_equal(slope, [0, 0, 0, 0.5, 1, 1, 1])


def test_silu_slope_without_its_second_term_is_noticed(rng):
    x = rng.standard_normal(50)
    exact = reference.central_difference(reference.silu, x, np.ones(50))
    assert error(silu_slope_of_half(x / 2), exact) < 1e-8
    assert error(1 / (1 + np.exp(-x)), exact) > 1e-2


def test_softmax_equals_the_formula_and_its_backward_the_jacobian(rng):
    x, dy = rng.standard_normal((2, 3, 5)), rng.standard_normal((2, 3, 5))
    y, cache = softmax_forward(x)
    assert error(y, np.exp(x) / np.exp(x).sum(axis=-1, keepdims=True)) < 1e-14
    dx = softmax_backward(dy, cache)
    for i in np.ndindex(2, 3):
        assert error(dx[i], (np.diag(y[i]) - np.outer(y[i], y[i])) @ dy[i]) < 1e-13
    assert error(dy * y, dx) > 1e-2                                         # the diagonal alone


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_softmax_of_huge_logits(dtype):
    x = np.array([[1e4, 1e4, -1e4], [1e30, 0, 0], [-1e30, -1e30, -1e30]], dtype)
    y, _ = softmax_forward(x)
    np.testing.assert_allclose(y, [[0.5, 0.5, 0], [1, 0, 0], [1 / 3, 1 / 3, 1 / 3]], rtol=1e-6)
    assert np.isfinite(softmax_backward(np.ones_like(y), y)).all()


def test_softmax_leaves_its_input_alone(rng):
    x = rng.standard_normal((2, 3))
    kept = x.copy()
    softmax_forward(x)
    np.testing.assert_array_equal(x, kept)
