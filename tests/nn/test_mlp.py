"""The network for points: its formula, its gradients, its arguments."""

import numpy as np
import pytest

import nn
from nn import MLP
from tests import reference
from tests.reference import error


def make(rng, **options):
    net = MLP(2, 3, **{"hidden": (7, 5), "time_dim": 6, "rng": rng, "dtype": np.float64} | options)
    net.flat_parameters[...] = 0.5 * rng.standard_normal(net.num_parameters)
    return net


def test_it_is_linear_silu_layers_of_the_point_and_its_time(rng):
    net, x, t = make(rng), rng.standard_normal((4, 2)), np.array([1, 10, 3, 1000])
    h, p = np.hstack([x, nn.timestep_embedding(t, 6)]), net.parameters()
    for layer in (0, 2):
        h = reference.silu(h @ p[f"layers.{layer}.weight"] + p[f"layers.{layer}.bias"])
    assert error(net(x, t), h @ p["layers.4.weight"] + p["layers.4.bias"]) < 1e-12
    assert net.num_parameters == (2 + 6) * 7 + 7 + 7 * 5 + 5 + 5 * 3 + 3


@pytest.mark.parametrize("shape", [(4, 2), (1, 2), (2, 3, 5, 2)])
def test_gradients(shape, rng):
    for t in (17, rng.integers(1, 1000, shape[0])):
        assert nn.gradcheck(make(rng), rng.standard_normal(shape), t, rng=rng) <= 1e-6


def test_no_hidden_layer(rng):
    net = make(rng, hidden=())
    assert nn.gradcheck(net, rng.standard_normal((4, 2)), 5, rng=rng) <= 1e-6
    assert net.num_parameters == 8 * 3 + 3


def test_times_of_images_belong_to_their_image(rng):
    net, x, t = make(rng), rng.standard_normal((2, 3, 5, 2)), np.array([4, 900])
    y = net(x, t)
    for n in range(2):
        assert error(net(x[n:n + 1], int(t[n])), y[n:n + 1]) < 1e-12
    assert error(net(x, t[::-1].copy()), y) > 1e-3


def test_without_params_gradients_stay(rng):
    net, x = make(rng), rng.standard_normal((4, 2))
    dy = rng.standard_normal(net(x, 3).shape)
    dx = net.backward(dy)
    net.flat_gradients[...] = np.nan
    np.testing.assert_array_equal(net.backward(dy, params=False), dx)
    assert np.isnan(net.flat_gradients).all() and dx.shape == x.shape


def test_the_last_forward_counts_and_errors_speak(rng):
    net = make(rng)
    with pytest.raises(RuntimeError, match="MLP.backward: call forward first"):
        net.backward(np.ones((4, 3)))
    first, second = rng.standard_normal((4, 2)), rng.standard_normal((4, 2))
    y = net(first, 3)
    kept = y.copy()
    net(second, 3)
    dx = net.backward(np.ones((4, 3)))
    np.testing.assert_array_equal(y, kept)
    net(second, 3)
    np.testing.assert_array_equal(net.backward(np.ones((4, 3))), dx)
    with pytest.raises(ValueError, match="dy has shape"):
        net.backward(np.ones((4, 2)))
    with pytest.raises(ValueError, match="last axis of x must be 2"):
        net(np.zeros((4, 3)), 1)
    with pytest.raises(ValueError, match="t must be an int or 4 integers"):
        net(first, np.array([1, 2, 3]))


def test_default_precision_is_float32(rng):
    net = MLP(2, 2, rng=rng)
    y = net(np.zeros((3, 2), np.float32), 5)
    assert y.dtype == net.backward(y).dtype == net.flat_parameters.dtype == np.float32
    assert net.num_parameters == 66 * 128 + 128 + 2 * (128 * 128 + 128) + 128 * 2 + 2
