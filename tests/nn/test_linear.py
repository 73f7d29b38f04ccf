"""y = x W + b: against sums written out, on any number of leading axes."""

import numpy as np
import pytest

from nn import Linear
from nn.linear import linear_backward, linear_forward
from tests.reference import error


def sums(x, w, b, dy):
    """y, dx, dw, db of (N, C) rows, one product at a time."""
    y, dx, dw, db = np.zeros(dy.shape), np.zeros(x.shape), np.zeros(w.shape), np.zeros(b.shape)
    for n in range(len(x)):
        for k in range(w.shape[1]):
            y[n, k] += b[k]
            db[k] += dy[n, k]
            for c in range(w.shape[0]):
                y[n, k] += x[n, c] * w[c, k]
                dx[n, c] += dy[n, k] * w[c, k]
                dw[c, k] += x[n, c] * dy[n, k]
    return y, dx, dw, db


@pytest.mark.parametrize("leading", [(1,), (5,), (2, 3), (2, 1, 3)])
def test_matches_the_sums(leading, rng):
    x, w, b = rng.standard_normal(leading + (4,)), rng.standard_normal((4, 3)), rng.standard_normal(3)
    dy = rng.standard_normal(leading + (3,))
    y, cache = linear_forward(x, w, b)
    results = y, *linear_backward(dy, cache)
    for actual, expected in zip(results, sums(x.reshape(-1, 4), w, b, dy.reshape(-1, 3)), strict=True):
        assert error(actual.reshape(expected.shape), expected) < 1e-12
    assert results[0].shape == leading + (3,) and results[1].shape == x.shape


def test_without_params_no_parameter_gradient_is_formed(rng):
    _, cache = linear_forward(rng.standard_normal((2, 3)), rng.standard_normal((3, 4)))
    dx, dw, db = linear_backward(np.ones((2, 4)), cache, params=False)
    assert dx.shape == (2, 3) and dw is None and db is None


def test_initial_weight_is_uniform_and_bias_zero(rng):
    layer = Linear(400, 300, rng=rng)
    w = layer.weight.value
    assert w.dtype == np.float32 and np.abs(w).max() <= 1 / 20 and not layer.bias.value.any()
    assert abs(w.std() / (1 / 20 / np.sqrt(3)) - 1) < 4 * np.sqrt(0.2 / w.size)       # kurtosis of a uniform: 1.8
    assert Linear(3, 2, rng=rng, bias=False).num_parameters == 6


def test_wrong_width_raises(rng):
    with pytest.raises(ValueError, match="last axis of x is 3, but the layer takes 4"):
        Linear(4, 2, rng=rng)(np.zeros((5, 3), np.float32))
