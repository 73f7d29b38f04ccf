"""Group normalisation against loops over images and groups, and where its numbers are hard."""

import numpy as np
import pytest

from nn import GroupNorm
from nn.backend import row_blocks
from nn.norm import group_norm_backward, group_norm_forward
from tests import reference
from tests.reference import error


def draw(rng, shape, dtype=np.float64):
    C = shape[-1]
    return (2 * rng.standard_normal(shape).astype(dtype) + 1, rng.standard_normal(C).astype(dtype),
            rng.standard_normal(C).astype(dtype), rng.standard_normal(shape).astype(dtype))


def test_the_reference_is_its_own_derivative(rng):
    x, weight, bias, dy = draw(rng, (2, 3, 2, 4))
    dx, dweight, dbias = reference.group_norm_backward(dy, x, weight, 2)
    for grad, f, at in ((dx, lambda v: reference.group_norm(v, weight, bias, 2), x),
                        (dweight, lambda v: reference.group_norm(x, v, bias, 2), weight),
                        (dbias, lambda v: reference.group_norm(x, weight, v, 2), bias)):
        assert error(grad, reference.central_difference(f, at, dy)) < 1e-8


@pytest.mark.parametrize("shape", [(1, 2, 1, 4), (3, 5, 2, 8), (4, 1, 3, 12)])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("silu", [False, True])
def test_equals_the_loops(shape, groups, silu, rng):
    x, weight, bias, dy = draw(rng, shape)
    y, cache = group_norm_forward(x, weight, bias, groups, silu=silu)
    h = reference.group_norm(x, weight, bias, groups)
    dh = reference.silu_backward(dy, h) if silu else dy
    assert error(y, reference.silu(h) if silu else h) < 1e-12
    for actual, expected in zip(group_norm_backward(dy, cache), reference.group_norm_backward(dh, x, weight, groups),
                                strict=True):
        assert error(actual, expected) < 1e-9


def test_maps_of_several_blocks_of_rows(rng):
    x, weight, bias, dy = draw(rng, (40, 41, 2, 8))
    assert len(row_blocks(40 * 41, 2 * 8 * x.itemsize, np)) > 1
    y, cache = group_norm_forward(x, weight, bias, 4)
    rows = x.reshape(40 * 41, 2, 4, 2)
    xhat = (rows - rows.mean((0, 3), keepdims=True)) / np.sqrt(rows.var((0, 3), keepdims=True) + 1e-5)
    assert error(y, xhat.reshape(x.shape) * weight + bias) < 1e-12
    for silu in (False, True):
        _, cache = group_norm_forward(x, weight, bias, 4, silu=silu)
        arguments, ends = (x, weight, bias), []
        directions = [rng.standard_normal(a.shape) for a in arguments]
        for i, grad in enumerate(group_norm_backward(dy, cache)):
            for step in (1e-6, -1e-6):
                moved = [a + step * d * (i == j) for j, (a, d) in enumerate(zip(arguments, directions, strict=True))]
                ends.append((dy * group_norm_forward(*moved, 4, silu=silu)[0]).sum())
            assert abs((grad * directions[i]).sum() / ((ends[-2] - ends[-1]) / 2e-6) - 1) < 1e-6


def test_without_params_no_parameter_gradient_is_formed(rng):
    x, weight, bias, dy = draw(rng, (3, 2, 2, 4))
    _, cache = group_norm_forward(x, weight, bias, 2)
    dx, dweight, dbias = group_norm_backward(dy, cache, params=False)
    np.testing.assert_array_equal(dx, group_norm_backward(dy, cache)[0])
    assert dweight is None and dbias is None


def test_groups_are_neighbouring_channels_of_one_image(rng):
    x, weight, bias, _ = draw(rng, (3, 4, 2, 6))
    y, _ = group_norm_forward(x, weight, bias, 3)
    changed = x.copy()
    changed[:, :, 1, 2:4] *= 5
    changed[0, 0, 1, 2] += 1
    moved = np.abs(group_norm_forward(changed, weight, bias, 3)[0] - y).max(axis=(0, 1)) > 1e-6
    np.testing.assert_array_equal(moved, [[False] * 6, [False, False, True, True, False, False]])


def test_shift_and_scale_of_the_input_do_not_matter(rng):
    x, weight, bias, _ = draw(rng, (3, 4, 2, 6))
    y, _ = group_norm_forward(x, weight, bias, 3, eps=1e-30)
    assert error(group_norm_forward(7 * x - 3, weight, bias, 3, eps=1e-30)[0], y) < 1e-12


@pytest.mark.parametrize("shape", [(4, 4, 2, 8), (32, 32, 8, 32)])
def test_a_large_mean_keeps_its_digits_in_float32(shape, rng):
    x, weight, bias, dy = draw(rng, shape)
    x = (rng.standard_normal(shape) + 1000).astype(np.float32)              # std 1 around 1000: spacing 6e-5
    exact, exact_cache = group_norm_forward(x.astype(np.float64), weight, bias, 4)
    y, cache = group_norm_forward(x, weight.astype(np.float32), bias.astype(np.float32), 4)
    assert error(y, exact) < 1e-4
    grads = group_norm_backward(dy.astype(np.float32), cache)
    for actual, expected in zip(grads, group_norm_backward(dy, exact_cache), strict=True):
        assert error(actual, expected) < 1e-3
    # The textbook's shortcut for the variance, E[x^2] - mean^2, fails the same check.
    rows = x.reshape(-1, shape[2], 4, shape[3] // 4)
    mean = rows.mean(axis=(0, 3), keepdims=True)
    variance = np.maximum((rows * rows).mean(axis=(0, 3), keepdims=True) - mean * mean, 0)
    shortcut = ((rows - mean) / np.sqrt(variance + np.float32(1e-5))).reshape(shape) * weight + bias
    assert error(shortcut, exact) > 4e-4


def test_a_constant_map_gives_the_bias_and_finite_gradients(rng):
    _, weight, bias, dy = draw(rng, (3, 4, 2, 6))
    y, cache = group_norm_forward(np.full((3, 4, 2, 6), 3.0), weight, bias, 3)
    np.testing.assert_allclose(y, np.broadcast_to(bias, y.shape), atol=1e-12)
    dx, dweight, _ = group_norm_backward(dy, cache)
    assert np.isfinite(dx).all() and np.abs(dweight).max() < 1e-9


@pytest.mark.parametrize("silu", [False, True])
def test_module_starts_as_the_plain_normalisation(silu, rng):
    x = draw(rng, (3, 4, 2, 6))[0]
    layer = GroupNorm(3, 6, dtype=np.float64, silu=silu)
    h = reference.group_norm(x, np.ones(6), np.zeros(6), 3)
    assert error(layer(x), reference.silu(h) if silu else h) < 1e-12


def test_bad_arguments_raise():
    with pytest.raises(ValueError, match="6 channels do not divide into 4 groups"):
        GroupNorm(4, 6)
    for shape in ((3, 4, 2, 5), (2, 6)):
        with pytest.raises(ValueError, match=r"x must be \(H, W, N, 6\)"):
            GroupNorm(3, 6)(np.zeros(shape, np.float32))
