"""Convolution, all its ways, against loops over pixels and taps (tests/reference.py)."""

import numpy as np
import pytest

import nn.conv
from nn import Adam, Conv2d
from nn.conv import conv_backward, conv_forward, gather_patches, scatter_patches
from tests import reference
from tests.reference import error

SIZES = [(1, 1), (2, 3), (5, 4), (7, 7)]
CHANNELS = [(1, 1), (1, 4), (2, 3), (5, 2), (8, 8), (9, 8), (8, 11), (9, 2)]     # (C, K): wide, narrow, either way


def draw(rng, H, W, N, C, K, k, stride=1, dtype=np.float64):
    x, w = rng.standard_normal((H, W, N, C)).astype(dtype), rng.standard_normal((k, k, C, K)).astype(dtype)
    return x, w, rng.standard_normal((-(-H // stride), -(-W // stride), N, K)).astype(dtype)


def all_errors(x, w, b, dy, stride=1):
    """Errors of y, dx, dw and, where there is a bias, db."""
    y, cache = conv_forward(x, w, b, stride=stride)
    dx, dw, db = conv_backward(dy, cache)
    expected = reference.conv_backward(dy, x, w, stride)
    errors = [error(y, reference.conv(x, w, b, stride)), error(dx, expected[0]), error(dw, expected[1])]
    if b is not None:
        errors.append(error(db, expected[2] if b.ndim == 2 else expected[2].sum(axis=0)))
    return errors


@pytest.mark.parametrize("stride", [1, 2])
def test_the_reference_is_its_own_derivative(stride, rng):
    x, w, dy = draw(rng, 3, 4, 2, 2, 3, 3, stride)
    dx, dw, db = reference.conv_backward(dy, x, w, stride)
    b = rng.standard_normal((2, 3))
    assert error(dx, reference.central_difference(lambda x: reference.conv(x, w, b, stride), x, dy)) < 1e-8
    assert error(dw, reference.central_difference(lambda w: reference.conv(x, w, b, stride), w, dy)) < 1e-8
    assert error(db, reference.central_difference(lambda b: reference.conv(x, w, b, stride), b, dy)) < 1e-8


@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("C, K", CHANNELS)
def test_equals_the_loops(k, stride, C, K, rng):
    for H, W in SIZES:
        x, w, dy = draw(rng, H, W, 2, C, K, k, stride)
        assert max(all_errors(x, w, rng.standard_normal(K), dy, stride)) < 1e-12


@pytest.mark.parametrize("C, K", [(3, 4), (4, 2), (8, 9)])
@pytest.mark.parametrize("bias", ["none", "per image"])
def test_other_biases(C, K, bias, rng):
    for k in (1, 3):
        x, w, dy = draw(rng, 5, 3, 2, C, K, k)
        b = None if bias == "none" else rng.standard_normal((2, K))
        assert max(all_errors(x, w, b, dy)) < 1e-12
        _, cache = conv_forward(x, w, b)
        assert conv_backward(dy, cache)[2] is None or b is not None


@pytest.mark.parametrize("k", [7, 9])
def test_a_kernel_wider_than_the_map(k, rng):
    for size in range(1, 6):
        for stride in (1, 2):
            x, w, dy = draw(rng, size, 3, 1, 2, 2, k, stride)
            assert max(all_errors(x, w, None, dy, stride)) < 1e-12


@pytest.mark.parametrize("wrong", ["mirrored", "transposed", "shifted"])
def test_a_wrong_filter_is_noticed(wrong, rng):
    for C in (3, 8):                                                        # patches, Winograd
        x, w, _ = draw(rng, 5, 6, 2, C, C, 3)
        other = {"mirrored": w[::-1, ::-1], "transposed": w.transpose(1, 0, 2, 3), "shifted": np.roll(w, 1, 0)}[wrong]
        assert error(conv_forward(x, other)[0], reference.conv(x, w)) > 1e-2


@pytest.mark.parametrize("k, C, K, bound", [(1, 16, 8, 2e-6), (3, 3, 16, 2e-6), (3, 32, 16, 1e-5), (3, 16, 3, 2e-6)])
def test_float32(k, C, K, bound, rng):
    x, w, dy = draw(rng, 9, 8, 2, C, K, k)
    b = rng.standard_normal(K)
    y, cache = conv_forward(*(a.astype(np.float32) for a in (x, w, b)))
    dx, dw, db = conv_backward(dy.astype(np.float32), cache)
    expected = reference.conv_backward(dy, x, w)
    assert all(a.dtype == np.float32 for a in (y, dx, dw, db))
    assert error(y, reference.conv(x, w, b)) < bound
    assert error(dx, expected[0]) < bound and error(dw, expected[1]) < bound and error(db, expected[2].sum(0)) < bound


@pytest.mark.parametrize("C, K", [(3, 4), (4, 2), (8, 9)])
def test_without_params_no_parameter_gradient_is_formed(C, K, rng, monkeypatch):
    def forbidden(*args):
        raise AssertionError("parameter work")
    for k, stride in ((1, 1), (3, 1), (3, 2)):
        x, w, dy = draw(rng, 5, 3, 2, C, K, k, stride)
        _, cache = conv_forward(x, w, rng.standard_normal(K), stride=stride)
        full = conv_backward(dy, cache)
        with monkeypatch.context() as patch:
            patch.setattr(nn.conv, "filter_transform_backward", forbidden)
            dx, dw, db = conv_backward(dy, cache, params=False)
        np.testing.assert_array_equal(dx, full[0])
        assert dw is None and db is None


@pytest.mark.parametrize("k, stride", [(1, 1), (3, 1), (3, 2), (5, 1), (5, 2)])
def test_gather_and_scatter_are_transposes(k, stride, rng):
    for H, W in SIZES:
        x = rng.standard_normal((H, W, 2, 3))
        gathered = gather_patches(x, k, stride)
        patches = rng.standard_normal(gathered.shape)
        left, right = (gathered * patches).sum(), (x * scatter_patches(patches, H, W, stride)).sum()
        assert abs(left - right) < 1e-12 * np.abs(gathered * patches).sum()


# ---- the module

def test_shift_is_a_bias_of_each_image(rng):
    for bias in (True, False):
        layer = Conv2d(8, 9, rng=rng, bias=bias, dtype=np.float64)
        layer.flat_parameters[...] = rng.standard_normal(layer.num_parameters)
        x, shift, dy = rng.standard_normal((3, 5, 2, 8)), rng.standard_normal((2, 9)), rng.standard_normal((3, 5, 2, 9))
        b = layer.bias.value if bias else 0
        assert error(layer(x, shift=shift), reference.conv(x, layer.weight.value, b + shift)) < 1e-12
        layer.backward(dy)
        assert error(layer.dshift, dy.sum(axis=(0, 1))) < 1e-12
        if bias:
            assert error(layer.bias.grad, dy.sum(axis=(0, 1, 2))) < 1e-12


def test_a_weight_that_changed_in_place_is_noticed(rng):
    layer = Conv2d(8, 8, rng=rng, dtype=np.float64)
    x, dy = rng.standard_normal((4, 6, 2, 8)), rng.standard_normal((4, 6, 2, 8))

    def check():
        w = layer.weight.value
        assert error(layer(x), reference.conv(x, w, layer.bias.value)) < 1e-12
        assert error(layer.backward(dy), reference.conv_backward(dy, x, w)[0]) < 1e-12

    check()
    optimiser = Adam(layer, lr=0.1)
    for _ in range(3):
        optimiser.step()
        check()
    layer.flat_parameters[...] *= -2
    check()
    layer.parameters()["weight"][0, 0, 0, 0] += 1                           # one entry
    check()
    layer.load({"weight": rng.standard_normal((3, 3, 8, 8)), "bias": np.zeros(8)})
    check()
    layer.use_buffers(layer.flat_parameters.copy(), layer.flat_gradients.copy())
    check()


def test_filters_are_transformed_once_while_the_weight_stays(rng, monkeypatch):
    calls, original = [], nn.conv.winograd_filters
    monkeypatch.setattr(nn.conv, "winograd_filters", lambda w: calls.append(1) or original(w))
    layer, x = Conv2d(8, 8, rng=rng), np.zeros((4, 4, 1, 8), np.float32)
    for _ in range(3):
        layer.backward(layer(x))
    assert len(calls) == 1
    layer.weight.value[0, 0, 0, 0] += 1
    layer(x)
    assert len(calls) == 2


def test_backward_uses_the_filters_of_its_forward(rng):
    layer = Conv2d(8, 8, rng=rng, dtype=np.float64)
    x, dy, w = rng.standard_normal((4, 6, 2, 8)), rng.standard_normal((4, 6, 2, 8)), layer.weight.value.copy()
    layer(x)
    layer.weight.value[...] = 0
    assert error(layer.backward(dy), reference.conv_backward(dy, x, w)[0]) < 1e-12


def test_initial_weights(rng):
    layer = Conv2d(4, 5, 3, rng=rng)
    assert layer.weight.value.shape == (3, 3, 4, 5) and np.abs(layer.weight.value).max() <= 1 / 6
    assert not layer.bias.value.any() and layer.num_parameters == 9 * 20 + 5
    assert not Conv2d(4, 5, 3, rng=rng, zero_init=True).flat_parameters.any()


def test_bad_arguments_raise(rng):
    with pytest.raises(ValueError, match="kernel_size must be odd"):
        Conv2d(1, 1, 2, rng=rng)
    with pytest.raises(ValueError, match="upsample goes with kernel_size=3 and stride=1"):
        Conv2d(1, 1, 3, stride=2, upsample=True, rng=rng)
    layer = Conv2d(3, 1, rng=rng)
    for shape in ((4, 4, 2, 2), (4, 4, 3)):
        with pytest.raises(ValueError, match=r"x must be \(H, W, N, 3\)"):
            layer(np.zeros(shape, np.float32))
