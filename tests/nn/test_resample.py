"""Halving and doubling a map, against loops."""

import numpy as np
import pytest

from nn import Downsample, Upsample
from tests import reference
from tests.reference import error


def filled(layer, rng):
    layer.flat_parameters[...] = rng.standard_normal(layer.num_parameters)
    return layer, layer.weight.value, layer.bias.value


def test_the_reference_is_its_own_derivative(rng):
    x, dy = rng.standard_normal((2, 3, 2, 2)), rng.standard_normal((4, 6, 2, 2))
    np.testing.assert_array_equal(reference.upsample(x), x.repeat(2, axis=0).repeat(2, axis=1))
    assert error(reference.upsample_backward(dy), reference.central_difference(reference.upsample, x, dy)) < 1e-8


@pytest.mark.parametrize("H, W", [(1, 1), (2, 2), (5, 8), (7, 3)])
@pytest.mark.parametrize("channels", [2, 9])
def test_downsample_is_a_convolution_with_stride_2(H, W, channels, rng):
    layer, w, b = filled(Downsample(channels, rng=rng, dtype=np.float64), rng)
    x, dy = rng.standard_normal((H, W, 2, channels)), rng.standard_normal((-(-H // 2), -(-W // 2), 2, channels))
    assert error(layer(x), reference.conv(x, w, b, stride=2)) < 1e-12
    dx, dw, db = reference.conv_backward(dy, x, w, stride=2)
    assert error(layer.backward(dy), dx) < 1e-12
    assert error(layer.weight.grad, dw) < 1e-12 and error(layer.bias.grad, db.sum(axis=0)) < 1e-12
    if (H, W) == (2, 2):
        assert error(layer(x), reference.conv(x, w, b)[1::2, 1::2]) > 1e-2      # starts one pixel late


@pytest.mark.parametrize("H, W", [(1, 1), (2, 2), (5, 8), (7, 3)])
@pytest.mark.parametrize("channels", [2, 9])
def test_upsample_is_a_convolution_of_the_doubled_map(H, W, channels, rng):
    layer, w, b = filled(Upsample(channels, rng=rng, dtype=np.float64), rng)
    x, dy = rng.standard_normal((H, W, 2, channels)), rng.standard_normal((2 * H, 2 * W, 2, channels))
    assert error(layer(x), reference.conv(reference.upsample(x), w, b)) < 1e-12
    dbig, dw, db = reference.conv_backward(dy, reference.upsample(x), w)
    assert error(layer.backward(dy), reference.upsample_backward(dbig)) < 1e-12
    assert error(layer.weight.grad, dw) < 1e-12 and error(layer.bias.grad, db.sum(axis=0)) < 1e-12
    if H > 1:
        assert error(layer(x), reference.upsample(reference.conv(x, w, b))) > 1e-2     # the other order
