"""The moving average against its recursion, whole and in spans."""

import numpy as np
import pytest

from nn import EMA, Linear
from tests.reference import error


def layer(rng, size=5):
    return Linear(size, size, rng=rng, dtype=np.float64)


@pytest.mark.parametrize("decay", [0.0, 0.15, 0.999])
@pytest.mark.parametrize("size", [5, 200])                                  # one block, several
def test_average_is_the_recursion(decay, size, rng):
    module = layer(rng, size)
    ema, average = EMA(module, decay), module.flat_parameters.copy()
    for k in range(1, 8):
        module.flat_parameters[...] += rng.standard_normal(module.num_parameters)
        ema.update()
        d = min(decay, (1 + k) / (10 + k))
        average = d * average + (1 - d) * module.flat_parameters
        assert error(ema.average, average) < 1e-13
    without_warm_up = decay * average + (1 - decay) * module.flat_parameters
    if decay == 0.999:
        assert error(without_warm_up, d * average + (1 - d) * module.flat_parameters) > 1e-2
    assert ema.updates == 7


def test_the_decay_is_reached_after_the_warm_up(rng):
    module = layer(rng)
    ema = EMA(module, 0.9)
    ema.updates = 1000
    start = ema.average.copy()
    module.flat_parameters[...] += 1
    ema.update()
    np.testing.assert_allclose(ema.average - start, 0.1, rtol=1e-9)


def test_spans_equal_the_whole(rng):
    module, buffer = layer(rng), np.full(30, np.nan)
    whole, ranks = EMA(module, 0.9), [EMA(module, 0.9, buffer=buffer) for _ in range(2)]
    spans = slice(0, 11), slice(11, 30)
    for _ in range(3):
        module.flat_parameters[...] += rng.standard_normal(30)
        whole.update()
        for rank, span in zip(ranks, spans, strict=True):
            rank.update(span)
    np.testing.assert_array_equal(buffer, whole.average)
    assert ranks[0].average is buffer


def test_it_starts_as_a_copy_of_the_parameters(rng):
    module = layer(rng)
    ema, start = EMA(module), module.flat_parameters.copy()
    module.flat_parameters[...] = 0
    np.testing.assert_array_equal(ema.average, start)


def test_swap_exchanges_and_undoes(rng):
    module = layer(rng)
    ema = EMA(module, 0.9)
    module.flat_parameters[...] += 1
    ema.update()
    average, current, buffer = ema.average.copy(), module.flat_parameters.copy(), ema.average
    ema.swap()
    np.testing.assert_array_equal(module.flat_parameters, average)
    np.testing.assert_array_equal(ema.average, current)
    np.testing.assert_array_equal(module.weight.value.ravel(), average[:25])            # the network itself sees it
    ema.swap()
    np.testing.assert_array_equal(module.flat_parameters, current)
    np.testing.assert_array_equal(ema.average, average)
    assert ema.average is buffer


@pytest.mark.parametrize("decay", [-0.1, 1.0, float("nan")])
def test_a_decay_outside_its_range_raises(decay, rng):
    with pytest.raises(ValueError, match=r"decay must lie in \[0, 1\)"):
        EMA(layer(rng), decay)
