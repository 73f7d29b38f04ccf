"""The gradient check must pass what is right, fail what is wrong, and leave the network as it was."""

import numpy as np
import pytest

import nn
from nn.module import Module, Parameter


class Cubic(Module):
    """y = a x^3, with a backward that can be broken."""

    def __init__(self, broken=None):
        self.a, self.broken = Parameter(np.array([1.7])), broken

    def forward(self, x, offset=0.0):
        return self._remember(self.a.value * x**3 + offset, x)

    def backward(self, dy, *, params=True):
        x, slope = self._recall(dy), 2 if self.broken == "dx" else 3
        if params:
            self.a.grad += (dy * (x**2 if self.broken == "da" else x**3)).sum()
        return dy * self.a.value * slope * x**2


def test_a_right_backward_passes(rng):
    assert nn.gradcheck(Cubic(), rng.standard_normal((3, 4)), rng=rng) <= 1e-6
    assert nn.gradcheck(Cubic(), rng.standard_normal((3, 4)), 0.5) <= 1e-6


@pytest.mark.parametrize("broken", ["dx", "da"])
def test_a_wrong_backward_fails(broken, rng):
    assert nn.gradcheck(Cubic(broken), rng.standard_normal((3, 4)), rng=rng) > 1e-2


def test_parameters_alone_can_be_checked(rng):
    x = rng.standard_normal((3, 4))
    assert nn.gradcheck(Cubic("dx"), x, check_input=False) <= 1e-6
    assert nn.gradcheck(Cubic("da"), x, check_input=False) > 1e-2


@pytest.mark.parametrize("wrong", ["flipped dw", "dx of another image", "forgotten skip"])
def test_planted_bugs_in_layers_fail(wrong, rng, monkeypatch):
    x = rng.standard_normal((5, 4, 2, 3))
    conv = nn.Conv2d(3, 3, rng=rng, dtype=np.float64)
    assert nn.gradcheck(conv, x) <= 1e-6
    original = nn.conv.conv_backward

    def backward(dy, cache, *, params=True):
        dx, dw, db = original(dy, cache, params=params)
        return {"flipped dw": (dx, dw[::-1], db), "dx of another image": (dx[:, :, ::-1], dw, db),
                "forgotten skip": (dx - dy, dw, db)}[wrong]

    monkeypatch.setattr(nn.conv, "conv_backward", backward)
    assert nn.gradcheck(conv, x) > 1e-2


def test_a_coarse_step_is_noticed(rng):
    assert nn.gradcheck(Cubic(), rng.standard_normal((3, 4)), step=0.5) > 1e-2


def test_the_parameters_are_put_back(rng):
    layer = nn.Linear(3, 2, rng=rng, dtype=np.float64)
    before = layer.flat_parameters.copy()
    x = rng.standard_normal((4, 3))
    kept = x.copy()
    nn.gradcheck(layer, x)
    np.testing.assert_array_equal(layer.flat_parameters, before)
    np.testing.assert_array_equal(x, kept)


def test_float32_is_refused(rng):
    with pytest.raises(ValueError, match="float64"):
        nn.gradcheck(nn.Linear(3, 2, rng=rng), np.zeros((1, 3)))
    with pytest.raises(ValueError, match="float64"):
        nn.gradcheck(nn.SiLU(), np.zeros((1, 3), np.float32))
