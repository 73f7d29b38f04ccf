"""The sinusoids of the time, and the table of labels."""

import math

import numpy as np
import pytest

from nn import Embedding, timestep_embedding
from nn.embedding import embedding_backward, embedding_forward
from tests.reference import error


def expected(t, dim, max_period=10000):
    """Cosines of t max_period^(-i / half), then sines, then a zero for an odd dim."""
    half = dim // 2
    angles = [t * max_period**(-i / half) for i in range(half)]
    return [math.cos(a) for a in angles] + [math.sin(a) for a in angles] + [0.0] * (dim % 2)


@pytest.mark.parametrize("dim", [2, 3, 8, 9, 32])
@pytest.mark.parametrize("max_period", [10000, 50])
def test_values_cosines_first(dim, max_period):
    t = np.array([0, 1, 17, 1000])
    e = timestep_embedding(t, dim, max_period)
    assert e.dtype == np.float64 and e.shape == (4, dim)
    np.testing.assert_allclose(e, [expected(int(s), dim, max_period) for s in t], rtol=0, atol=1e-12)
    half = dim // 2
    assert np.abs(np.roll(e[:, :2 * half], half, axis=1) - e[:, :2 * half]).max() > 1e-2      # sines first


def test_times_may_be_one_int_or_one_each():
    np.testing.assert_array_equal(timestep_embedding(7, 8), timestep_embedding(np.array([7]), 8))
    assert timestep_embedding(7, 8).shape == (1, 8)
    np.testing.assert_array_equal(timestep_embedding(np.int64(7), 8), timestep_embedding(7, 8))


def test_a_dim_of_one_is_a_zero():
    np.testing.assert_array_equal(timestep_embedding(np.array([1, 2]), 1), np.zeros((2, 1)))


def test_neighbouring_times_differ():
    e = timestep_embedding(np.arange(1001), 32)
    np.testing.assert_allclose((e * e).sum(axis=1), 16)                     # cos^2 + sin^2 at 16 frequencies
    squared_distances = 32 - 2 * e @ e.T + 100 * np.eye(1001)
    assert squared_distances.min() > 0.25


def test_a_row_collects_the_gradients_of_all_who_read_it(rng):
    table, dy = rng.standard_normal((4, 3)), rng.standard_normal((5, 3))
    index = np.array([2, 0, 2, 3, 2])
    y, cache = embedding_forward(index, table)
    np.testing.assert_array_equal(y, [table[i] for i in index])
    dtable = np.zeros((4, 3))
    for i, d in zip(index, dy, strict=True):
        dtable[i] += d
    assert error(embedding_backward(dy, cache), dtable) < 1e-15
    overwritten = np.zeros((4, 3))
    overwritten[index] = dy                                                 # keeps the last reader only
    assert error(overwritten, dtable) > 1e-2


def test_a_negative_index_counts_from_the_end_in_both_directions(rng):
    table, dy = rng.standard_normal((4, 3)), rng.standard_normal((2, 3))
    y, cache = embedding_forward(np.array([-1, 1]), table)
    np.testing.assert_array_equal(y, table[[3, 1]])
    assert error(embedding_backward(dy, cache)[[3, 1]], dy) < 1e-15


def test_module_adds_to_its_gradient_and_has_nothing_below(rng):
    layer = Embedding(4, 3, rng=rng, dtype=np.float64)
    dy = rng.standard_normal((2, 3))
    with pytest.raises(RuntimeError, match="call forward first"):
        layer.backward(dy)
    layer(np.array([1, 1]))
    assert layer.backward(dy) is None and layer.backward(dy) is None
    assert error(layer.table.grad[1], 2 * dy.sum(axis=0)) < 1e-14 and not layer.table.grad[[0, 2, 3]].any()
    layer.flat_gradients[...] = np.nan
    layer.backward(dy, params=False)
    assert np.isnan(layer.flat_gradients).all()


def test_initial_table_is_standard_normal(rng):
    table = Embedding(200, 300, rng=rng).table.value
    assert table.dtype == np.float32 and abs(table.std() - 1) < 4 / math.sqrt(2 * table.size)
