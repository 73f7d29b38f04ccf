"""Randomness is a function of (seed, step, sample)."""

import time

import numpy as np
import pytest

from ddpm.randomness import SampleStreams, generator, normal_like

GOLDEN_STREAM = [-1.474835325553529, 0.7183999188831307, -1.0705602367529299]
GOLDEN_GENERATOR = [0.4745796472975044, -0.05765143531799437]


def draws(samples, seed=3, step=5, **options):
    """Three calls of different kinds, as a training step makes them."""
    streams = SampleStreams(seed, step, samples, **options)
    n = len(samples)
    return (streams.integers(1, 1001), streams.standard_normal((n, 4, 3), dtype=np.float32), streams.random(),
            streams.standard_normal((n, 5)))


def test_a_sample_does_not_depend_on_its_batch():
    whole = draws(range(10))
    for part in (range(4), range(4, 10), [7], [9, 2, 5]):
        for all_rows, rows in zip(whole, draws(part), strict=True):
            np.testing.assert_array_equal(rows, all_rows[list(part)])


def test_equal_keys_repeat_and_different_keys_do_not():
    reference = draws(range(4))[1]
    np.testing.assert_array_equal(draws(range(4))[1], reference)
    for options in ({"seed": 4}, {"step": 6}, {"purpose": "sampling"}, {"seed": 5, "step": 3}):
        assert not (draws(range(4), **options)[1] == reference).any()
    assert not (draws(range(4, 8))[1] == reference).any()


def test_calls_continue_whatever_was_drawn_before():
    short, long = SampleStreams(0, 0, [8, 9]), SampleStreams(0, 0, [8, 9])
    short.standard_normal((2, 1)), long.standard_normal((2, 1001), dtype=np.float32)
    a, b = short.standard_normal((2, 6)), long.standard_normal((2, 6))
    np.testing.assert_array_equal(a, b)
    assert not (a == short.standard_normal((2, 6))).any() and short.calls == 3


def test_numbers_have_their_distributions():
    streams = SampleStreams(0, 1, range(64))
    x = streams.standard_normal((64, 2000)).astype(np.float64)
    n = x.size
    assert abs(x.mean()) < 4 / np.sqrt(n) and abs(x.var() - 1) < 4 * np.sqrt(2 / n)
    correlation = np.corrcoef(x) - np.eye(64)                     # between samples
    assert np.abs(correlation).max() < 5 / np.sqrt(2000)
    first = np.array([SampleStreams(0, step, [0]).standard_normal((1, 1)).item() for step in range(4000)])
    assert abs(first.mean()) < 4 / np.sqrt(4000) and abs(first.var() - 1) < 4 * np.sqrt(2 / 4000)
    assert abs(np.corrcoef(first[1:], first[:-1])[0, 1]) < 4 / np.sqrt(4000)
    u = np.concatenate([SampleStreams(1, step, range(100)).random() for step in range(40)])
    assert 0 <= u.min() and u.max() < 1 and abs(u.mean() - 0.5) < 4 / np.sqrt(12 * 4000)


def test_integers_are_uniform_and_take_bounds_per_sample():
    t = np.concatenate([SampleStreams(2, step, range(100)).integers(1, 6) for step in range(100)])
    counts = np.bincount(t, minlength=6)
    assert counts[0] == 0 and len(counts) == 6
    assert (np.abs(counts[1:] - 2000) < 4 * np.sqrt(2000 * 0.8)).all()
    high = np.array([1, 5, 1000])
    s = SampleStreams(0, 0, range(3)).integers(0, high)
    assert s.dtype == np.int64 and s[0] == 0 and (s < high).all()
    with pytest.raises(ValueError, match="low < high"):
        SampleStreams(0, 0, [0]).integers(3, 3)


def test_dtypes_shapes_and_sizes():
    streams = SampleStreams(0, 0, range(3))
    assert streams.standard_normal((3, 2, 2, 1), dtype=np.float32).dtype == np.float32
    assert streams.standard_normal(3).shape == (3,) and streams.random(3).shape == streams.random().shape == (3,)
    for wrong in (lambda: streams.standard_normal((2, 2)), lambda: streams.random(4), lambda: streams.integers(0, 2, 2),
                  lambda: SampleStreams(0, 0, [-1]), lambda: SampleStreams(0, 0, [0.5]),
                  lambda: SampleStreams(-1, 0, [0])):
        with pytest.raises(ValueError):
            wrong()


def test_device_draws_are_the_host_draws(fake):
    for device, host in zip(draws(range(4), xp=fake), draws(range(4)), strict=True):
        np.testing.assert_array_equal(fake.asnumpy(device), host)


def test_normal_like_meets_x_on_its_side(fake):
    x = np.zeros((3, 2), np.float32)
    host = normal_like(x, SampleStreams(0, 0, range(3)))
    assert host.dtype == np.float32
    for rng in (SampleStreams(0, 0, range(3)), SampleStreams(0, 0, range(3), xp=fake)):
        np.testing.assert_array_equal(fake.asnumpy(normal_like(fake.asarray(x), rng)), host)
    assert normal_like(fake.asarray(x), fake.random.default_rng(0)).shape == (3, 2)


def test_generator_paths():
    reference = generator(0, "init", 3).standard_normal(4)
    np.testing.assert_array_equal(generator(np.int64(0), "init", np.int32(3)).standard_normal(4), reference)
    for other in (generator(1, "init", 3), generator(0, "init", "3"), generator(0, "init3"), generator(0, 3, "init")):
        assert not (other.standard_normal(4) == reference).any()


def test_golden_values():
    """Frozen, because a change (NumPy's included) would change every run's draws, and runs could not resume."""
    np.testing.assert_allclose(SampleStreams(1, 2, [3]).standard_normal((1, 3))[0], GOLDEN_STREAM, rtol=1e-12)
    np.testing.assert_allclose(generator(1, "init").standard_normal(2), GOLDEN_GENERATOR, rtol=1e-12)


def test_a_training_batch_costs_about_a_millisecond():
    seconds = []
    for step in range(30):
        start = time.perf_counter()
        SampleStreams(0, step, range(64)).standard_normal((64, 28, 28, 1), dtype=np.float32)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.01                                    # 1 ms when nothing else runs
