"""Self-attention against loops over images, heads, queries and keys."""

import numpy as np
import pytest

from nn import SelfAttention
from nn.attention import attention_backward, attention_forward
from tests import reference
from tests.reference import error


def test_the_reference_is_its_own_derivative(rng):
    qkv, do = rng.standard_normal((3, 2, 12)), rng.standard_normal((3, 2, 4))
    difference = reference.central_difference(lambda qkv: reference.attention(qkv, 2), qkv, do)
    assert error(reference.attention_backward(do, qkv, 2), difference) < 1e-8


@pytest.mark.parametrize("L, N, C, heads", [(1, 1, 2, 1), (4, 1, 4, 2), (6, 2, 6, 3), (5, 3, 8, 1), (5, 2, 4, 4)])
def test_equals_the_loops(L, N, C, heads, rng):
    qkv, do = rng.standard_normal((L, N, 3 * C)), rng.standard_normal((L, N, C))
    o, cache = attention_forward(qkv, heads)
    assert error(o, reference.attention(qkv, heads)) < 1e-12
    assert error(attention_backward(do, cache), reference.attention_backward(do, qkv, heads)) < 1e-12


def test_another_scale_or_number_of_heads_is_noticed(rng):
    qkv = rng.standard_normal((5, 2, 24))
    o, _ = attention_forward(qkv, 2)
    unscaled = qkv.copy()
    unscaled[..., :8] *= 2                                                  # no 1/sqrt(4)
    assert error(attention_forward(unscaled, 2)[0], o) > 1e-2
    assert error(attention_forward(qkv, 4)[0], o) > 1e-2


def test_huge_scores_pick_the_best_key(rng):
    qkv = rng.standard_normal((3, 1, 6)).astype(np.float32)
    qkv[..., :4] *= 1e6
    o, cache = attention_forward(qkv, 1)
    best = (qkv[:, 0, :2] @ qkv[:, 0, 2:4].T).argmax(axis=1)
    np.testing.assert_allclose(o[:, 0], qkv[best, 0, 4:], rtol=1e-6)
    assert np.isfinite(attention_backward(np.ones_like(o), cache)).all()


def test_module_projects_before_and_after(rng):
    layer = SelfAttention(6, 2, rng=rng, dtype=np.float64)
    assert layer.num_parameters == 6 * 18 + 18 + 6 * 6 + 6
    layer.flat_parameters[...] = rng.standard_normal(layer.num_parameters)
    x, p = rng.standard_normal((2, 3, 2, 6)), layer.parameters()
    qkv = x.reshape(6, 2, 6) @ p["qkv.weight"] + p["qkv.bias"]
    expected = reference.attention(qkv, 2) @ p["out.weight"] + p["out.bias"]
    assert error(layer(x), expected.reshape(x.shape)) < 1e-12


def test_it_does_not_know_where_pixels_are_and_keeps_images_apart(rng):
    layer = SelfAttention(6, 3, rng=rng, dtype=np.float64)
    x = rng.standard_normal((2, 3, 2, 6))
    y = layer(x)
    order = rng.permutation(6)
    shuffled = x.reshape(6, 2, 6)[order].reshape(x.shape)
    assert error(layer(shuffled), y.reshape(6, 2, 6)[order].reshape(x.shape)) < 1e-12
    changed = x.copy()
    changed[:, :, 1] += 1
    np.testing.assert_array_equal(layer(changed)[:, :, 0], y[:, :, 0])
    assert error(layer(changed)[:, :, 1], y[:, :, 1]) > 1e-3


def test_bad_heads_raise(rng):
    with pytest.raises(ValueError, match="6 channels do not divide into 4 heads"):
        SelfAttention(6, 4, rng=rng)
