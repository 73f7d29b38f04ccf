"""Dropout: what it keeps, that the mean stays, and when it does nothing."""

import numpy as np
import pytest

from nn import Dropout
from tests.reference import error


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_entries_are_dropped_or_scaled_and_the_mean_stays(p, rng):
    x = np.ones((50, 40, 10, 10))
    y = Dropout(p, rng=rng)(x)
    np.testing.assert_allclose(np.unique(y), [0, 1 / (1 - p)], rtol=1e-7)
    assert abs(y.mean() - 1) < 4 * np.sqrt(p / (1 - p) / y.size)
    assert abs((y > 0).mean() - 1) > 4 * np.sqrt(p / (1 - p) / y.size)      # without the scale the mean would move
    assert abs((y == 0).mean() - p) < 4 * np.sqrt(p * (1 - p) / y.size)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_backward_uses_the_mask_of_the_last_forward(dtype, rng):
    layer, x = Dropout(0.4, rng=rng), np.ones((4, 5, 2, 3), dtype)
    first, second = layer(x), layer(x)
    assert not np.array_equal(first, second)                                # a new mask each time
    dy = rng.standard_normal(x.shape).astype(dtype)
    dx = layer.backward(dy)
    np.testing.assert_array_equal(dx, dy * second)
    assert second.dtype == dx.dtype == dtype


def test_a_mask_is_a_function_of_the_generator(rng):
    layer, x = Dropout(0.4, rng=rng), np.ones((4, 5, 2, 3))
    masks = []
    for seed in (1, 2, 1):
        layer.rng = np.random.default_rng(seed)
        masks.append(layer(x))
    np.testing.assert_array_equal(masks[0], masks[2])
    assert not np.array_equal(masks[0], masks[1])
    layer.rng = np.random.default_rng(1)
    np.testing.assert_array_equal(layer(x.astype(np.float32)) > 0, masks[0] > 0)       # whatever the precision


def test_a_mask_can_be_held_fixed(rng):
    layer, x = Dropout(0.4, rng=rng), rng.standard_normal((4, 5, 2, 3))
    layer.mask = (rng.random(x.shape) > 0.4) / 0.6
    for _ in range(2):
        np.testing.assert_array_equal(layer(x), x * layer.mask)
        assert error(layer.backward(x), x * layer.mask) == 0


def test_evaluation_and_p_zero_are_the_identity_and_draw_nothing(rng):
    x, state = rng.standard_normal((4, 5, 2, 3)), rng.bit_generator.state
    for layer in (Dropout(0.4, rng=rng).eval(), Dropout(0.0, rng=rng)):
        np.testing.assert_array_equal(layer(x), x)
        np.testing.assert_array_equal(layer.backward(2 * x), 2 * x)
    assert rng.bit_generator.state == state
    assert not np.array_equal(Dropout(0.4, rng=rng)(x), x)


def test_the_mode_of_the_forward_counts_in_backward(rng):
    layer, x = Dropout(0.4, rng=rng), np.ones((4, 5, 2, 3))
    y = layer(x)
    layer.eval()
    np.testing.assert_array_equal(layer.backward(x), y)


@pytest.mark.parametrize("p", [-0.1, 1, 1.5, float("nan")])
def test_p_outside_its_range_raises(p, rng):
    with pytest.raises(ValueError, match=r"p must lie in \[0, 1\)"):
        Dropout(p, rng=rng)
