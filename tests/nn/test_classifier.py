"""The classifier: its loss against the definition, its gradients by differences, and that it learns."""

import numpy as np
import pytest

import nn
from nn.backend import to_host
from nn.classifier import Classifier, softmax_cross_entropy
from tests.nn.test_device import on_device
from tests.reference import error


def make(rng, dtype=np.float64, **options):
    net = Classifier(2, 3, **{"widths": (8, 4), "groups": 2, "rng": rng, "dtype": dtype} | options)
    net.flat_parameters[...] = (0.4 * rng.standard_normal(net.num_parameters)).astype(dtype)
    return net


def test_cross_entropy_is_minus_the_log_of_the_softmax(rng):
    logits, labels = 3 * rng.standard_normal((5, 4)), np.array([0, 3, 1, 1, 2])
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    values, gradient = softmax_cross_entropy(logits, labels)
    np.testing.assert_allclose(values, -np.log(p[np.arange(5), labels]), rtol=1e-12)
    np.testing.assert_allclose(gradient, p - np.eye(4)[labels], atol=1e-14)
    h = 1e-6
    for k in range(4):
        moved = [softmax_cross_entropy(logits + sign * h * np.eye(4)[k], labels)[0] for sign in (1, -1)]
        np.testing.assert_allclose((moved[0] - moved[1]) / (2 * h), gradient[:, k], atol=1e-8)
    assert np.abs(gradient - (np.eye(4)[labels] - p)).max() > 0.1              # control: the other sign


def test_cross_entropy_is_finite_for_any_logits(rng):
    logits = np.array([[1e4, -1e4], [-3e38, 3e38]], np.float32)
    with np.errstate(over="ignore"):
        values, gradient = softmax_cross_entropy(logits, np.array([0, 1]))
    assert values.tolist() == [0, 0] and not gradient.any() and values.dtype == gradient.dtype == np.float32


@pytest.mark.parametrize("shape", [(3, 6, 6, 2), (1, 5, 7, 2), (2, 1, 1, 2)])
def test_gradients(shape, rng):
    assert nn.gradcheck(make(rng), rng.standard_normal(shape), rng=rng) <= 1e-6


def test_features_are_pooled_over_places(rng):
    net, x = make(rng), rng.standard_normal((2, 6, 6, 2))
    features = net.features(x)
    assert features.shape == (2, 4)
    p = net.parameters()
    assert error(net(x), features @ p["head.weight"] + p["head.bias"]) < 1e-12
    for n in range(2):
        assert error(net(x[n:n + 1]), net(x)[n:n + 1]) < 1e-12


def test_without_params_gradients_stay(rng):
    net, x = make(rng), rng.standard_normal((2, 6, 6, 2))
    dy = rng.standard_normal(net(x).shape)
    dx = net.backward(dy)
    before = net.flat_gradients.copy()
    assert error(net.backward(dy, params=False), dx) < 1e-12
    np.testing.assert_array_equal(net.flat_gradients, before)


def test_it_learns_to_tell_bars_apart(rng):
    net = Classifier(1, 2, widths=(8, 8), groups=2, rng=rng)
    adam, accuracy = nn.Adam(net, 1e-2), []
    for _ in range(40):
        labels = rng.integers(0, 2, 32)
        x = 0.5 * rng.standard_normal((32, 6, 6, 1)).astype(np.float32)
        x[labels == 0, 2] += 1
        x[labels == 1, :, 2] += 1
        logits = net(x)
        net.zero_grad()
        net.backward(softmax_cross_entropy(logits, labels)[1] / 32)
        adam.step()
        accuracy.append((logits.argmax(axis=1) == labels).mean())
    assert np.mean(accuracy[-5:]) > 0.95


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_on_a_device(dtype, rng, fake):
    net, x, labels = make(rng, dtype), rng.standard_normal((3, 6, 6, 2)).astype(dtype), np.array([0, 2, 1])
    device = on_device(net, fake)
    values, gradient = softmax_cross_entropy(net(x), labels)
    on = softmax_cross_entropy(device(fake.asarray(x)), fake.asarray(labels))
    assert values.dtype == gradient.dtype == dtype
    for a, b in zip(on, (values, gradient), strict=True):
        assert error(to_host(a), b) < 1e-5 if dtype == np.float32 else 1e-12
    assert error(to_host(device.backward(on[1])), net.backward(gradient)) < (1e-4 if dtype == np.float32 else 1e-11)


def test_bad_images_are_refused(rng):
    with pytest.raises(ValueError, match="x must be"):
        make(rng)(np.zeros((2, 6, 6, 1)))
