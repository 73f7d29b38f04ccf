"""The interpolated variance, the hybrid loss and the importance-sampled times (C05)."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ddpm import ddpm, gaussian, iddpm
from ddpm.randomness import SampleStreams
from ddpm.schedule import NoiseSchedule
from tests.ddpm.test_ddpm import BIN, SCHEDULES, batch, numeric_gradient, relative_error, run_on
from tests.helpers import property_test, schedules


@pytest.fixture(params=SCHEDULES)
def schedule(request):
    return SCHEDULES[request.param]


@pytest.mark.parametrize("s, t", [(1, 2), (4, 5), (3, 20), (0, 1), (0, 9)])
def test_C05_log_variance_interpolates(s, t, schedule):
    large, small = (ddpm.fixed_variance(kind, s, t, schedule) for kind in ("large", "small"))
    v = np.array([[-1.0, 1.0, 0.0, 3.0]])
    expected = [small, large, np.sqrt(small * large), large**2 / small]      # v is not squashed: it may extrapolate
    np.testing.assert_allclose(np.exp(iddpm.reverse_log_variance(v, s, t, schedule))[0], expected, rtol=1e-9)
    assert small != pytest.approx(large, rel=1e-3)


@property_test
@given(schedules(), st.data(), st.floats(-3, 3))
def test_C05_the_variance_is_a_weighted_geometric_mean_for_any_schedule(schedule, data, v):
    t = data.draw(st.integers(2, schedule.T))
    s = data.draw(st.integers(1, t - 1))
    large, small, w = schedule.between(s, t)[1], schedule.posterior(s, t).var, (v + 1) / 2
    found = np.exp(iddpm.reverse_log_variance(np.array([[v]]), s, t, schedule)).item()
    assert found == pytest.approx(large**w * small**(1 - w), rel=1e-9)
    arithmetic = w * large + (1 - w) * small                            # control: it isn't that mean
    assert abs(v) == 1 or abs(large / small - 1) < 1e-3 or found != pytest.approx(arithmetic, rel=1e-9)


def test_C05_lower_end_at_the_last_step(schedule):
    assert schedule.posterior(0, 1).var == 0.0
    lower = np.exp(iddpm.reverse_log_variance(np.array([[-1.0]]), 0, 1, schedule))
    assert lower.item() == pytest.approx(schedule.posterior(1, 2).var, rel=1e-12)


def test_C05_times_per_example(schedule, rng):
    v, s, t = rng.standard_normal((3, 2, 2, 1)), np.array([0, 3, 1]), np.array([1, 4, 9])
    rows = [iddpm.reverse_log_variance(v[i:i + 1], int(s[i]), int(t[i]), schedule) for i in range(3)]
    np.testing.assert_allclose(iddpm.reverse_log_variance(v, s, t, schedule), np.concatenate(rows), rtol=1e-12)


def test_C05_vlb_is_T_times_the_kl(schedule, rng):
    t = np.array([2, 5, schedule.T])
    output, x0, eps, x_t, _ = batch(rng, schedule, t, heads=2)
    values, _ = iddpm.vlb_loss(output, x0, eps, x_t, t, schedule, bin_width=BIN)
    for i, time in enumerate(t):
        posterior = schedule.posterior(time - 1, time)
        x0_hat = (x_t[i] - np.sqrt(schedule.sigma2_bar[time]) * output[i, ..., :1]) / schedule.lam_bar[time]
        W = np.exp(iddpm.reverse_log_variance(output[i:i + 1, ..., 1:], time - 1, time, schedule))[0]
        kl = gaussian.kl(posterior.mean(x0[i], x_t[i]), posterior.var, posterior.mean(x0_hat, x_t[i]), W)
        assert values[i] == pytest.approx(schedule.T * kl.mean(), rel=1e-9)
        if time == 2:                                             # where the ends are far apart, logarithms matter
            w = (output[i, ..., 1:] + 1) / 2
            linear = w * schedule.sigma2[2] + (1 - w) * posterior.var
            wrong = gaussian.kl(posterior.mean(x0[i], x_t[i]), posterior.var, posterior.mean(x0_hat, x_t[i]), linear)
            assert abs(schedule.T * wrong.mean() / values[i] - 1) > 1e-3


@pytest.mark.parametrize("v, kind", [(-1.0, "small"), (1.0, "large")])
def test_C05_ends_are_the_fixed_variance_models(v, kind, schedule, rng):
    output, *rest = batch(rng, schedule, [1, 2, 9, 20], heads=2)
    output[..., 1:] = v
    learned = iddpm.vlb_loss(output, *rest, schedule, bin_width=BIN)
    fixed = ddpm.vlb_loss(output, *rest, schedule, bin_width=BIN, variance=kind)
    np.testing.assert_allclose(learned[0], fixed[0], rtol=1e-9)
    np.testing.assert_allclose(learned[1][..., :1], fixed[1][..., :1], rtol=1e-9)


@pytest.mark.parametrize("bin_width", [BIN, None])
@pytest.mark.parametrize("times", [[1, 2, 25, 1], [1], [7, 3]])
def test_C05_vlb_gradients_match_finite_differences(bin_width, times, schedule, rng):
    output, *rest = batch(rng, schedule, times, heads=2, spread=0.1)
    _, gradient = iddpm.vlb_loss(output, *rest, schedule, bin_width=bin_width)
    expected = numeric_gradient(lambda o: iddpm.vlb_loss(o, *rest, schedule, bin_width=bin_width)[0], output, h=1e-4)
    for row in range(len(times)):
        for head in (slice(0, 1), slice(1, 2)):
            assert relative_error(gradient[row, ..., head], expected[row, ..., head]) < 1e-7


def test_C05_hybrid_trains_the_mean_by_the_squared_error_alone(schedule, rng):
    output, *rest = batch(rng, schedule, [1, 2, 9, 20], heads=2, spread=0.1)
    simple, d_simple = ddpm.simple_loss(output, *rest, schedule)
    vlb, d_vlb = iddpm.vlb_loss(output, *rest, schedule, bin_width=BIN)
    values, gradient = iddpm.hybrid_loss(output, *rest, schedule, bin_width=BIN)
    bits = vlb / np.log(2)
    np.testing.assert_allclose(values, simple + 0.001 * bits, rtol=1e-12)
    np.testing.assert_array_equal(gradient[..., :1], d_simple[..., :1])
    np.testing.assert_allclose(gradient[..., 1:], 0.001 / np.log(2) * d_vlb[..., 1:], rtol=1e-12)
    without_stop = d_simple + 0.001 / np.log(2) * d_vlb
    assert relative_error(without_stop[..., :1], gradient[..., :1]) > 1e-3


def test_C05_hybrid_gradient_of_v_matches_finite_differences(schedule, rng):
    output, *rest = batch(rng, schedule, [1, 2, 25], heads=2, spread=0.1)
    _, gradient = iddpm.hybrid_loss(output, *rest, schedule, bin_width=BIN)
    expected = numeric_gradient(lambda o: iddpm.hybrid_loss(o, *rest, schedule, bin_width=BIN)[0], output, h=1e-4)
    for row in range(3):                                          # the value's derivative, of v only: the mean is held
        assert relative_error(gradient[row, ..., 1:], expected[row, ..., 1:]) < 1e-7


@pytest.mark.parametrize("loss", [iddpm.vlb_loss, iddpm.hybrid_loss])
@pytest.mark.parametrize("times", [[1, 2, 50, 1], [1], [50, 7]])
def test_losses_on_a_device(loss, times, fake, rng):
    arguments = batch(rng, SCHEDULES["linear"], times, heads=2, dtype=np.float32)
    values, gradient = run_on(fake, loss, *arguments, SCHEDULES["linear"], bin_width=BIN)
    expected = loss(*arguments, SCHEDULES["linear"], bin_width=BIN)
    np.testing.assert_array_equal(values, expected[0])
    np.testing.assert_array_equal(gradient, expected[1])


@pytest.mark.parametrize("make", [NoiseSchedule.linear, NoiseSchedule.cosine])
@pytest.mark.parametrize("v", [-20.0, 0.0, 20.0])
def test_finite_in_float32(make, v, rng):
    schedule, t = make(1000), np.array([1, 2, 3, 10, 100, 500, 999, 1000])
    output, *rest = batch(rng, schedule, t, heads=2, dtype=np.float32)
    output[..., 1:] = v
    values, gradient = iddpm.hybrid_loss(output, *rest, schedule, bin_width=BIN)
    assert np.isfinite(values).all() and np.isfinite(gradient).all()
    exact = iddpm.hybrid_loss(*(a.astype(np.float64) for a in (output, *rest[:3])), t, schedule, bin_width=BIN)
    np.testing.assert_allclose(values, exact[0], rtol=1e-3)


def test_one_head_is_refused(rng):
    output, *rest = batch(rng, SCHEDULES["linear"], [3], heads=1)
    with pytest.raises(ValueError, match="variance head"):
        iddpm.hybrid_loss(output, *rest, SCHEDULES["linear"], bin_width=BIN)


# ---- importance-sampled times

def filled(T, rng, losses):
    times = iddpm.ImportanceSampledTimes(T)
    for _ in range(10):
        times.update(np.arange(1, T + 1), losses)
    return times


def test_C05_times_are_uniform_until_every_t_has_ten_losses(rng):
    times = iddpm.ImportanceSampledTimes(5)
    for _ in range(9):
        times.update(np.arange(1, 6), np.arange(1.0, 6))
    times.update(np.arange(1, 5), np.arange(1.0, 5))
    np.testing.assert_array_equal(times.probabilities(), [0, 0.2, 0.2, 0.2, 0.2, 0.2])
    np.testing.assert_allclose(times.sample(8, rng)[1], 1.0)
    times.update([5], [5.0])
    np.testing.assert_allclose(times.probabilities(), [0, *(0.999 * np.arange(1, 6) / 15 + 0.001 / 5)], rtol=1e-12)


def test_C05_the_last_ten_losses_count(rng):
    times = filled(2, rng, np.array([1.0, 1.0]))
    for loss in (100.0, *[3.0] * 10):
        times.update([1], [loss])
    np.testing.assert_allclose(times.probabilities()[1:], 0.999 * np.array([0.75, 0.25]) + 0.0005, rtol=1e-12)


def test_C05_weights_keep_the_mean_unbiased(rng):
    """Exactly: sum_t p_t w_t f_t = mean f. Unweighted it is far off."""
    T, f = 40, rng.gamma(0.3, size=40)
    times = filled(T, rng, f)
    p = times.probabilities()[1:]
    assert p.sum() == pytest.approx(1, rel=1e-12)
    assert (p * (1 / (T * p)) * f).sum() == pytest.approx(f.mean(), rel=1e-12)
    assert (p * f).sum() > 1.5 * f.mean()
    t, weight = times.sample(1000, rng)
    np.testing.assert_allclose(weight, 1 / (T * p[t - 1]), rtol=1e-12)
    estimate = times.sample(200_000, rng)
    products = estimate[1] * f[estimate[0] - 1]
    assert abs(products.mean() - f.mean()) < 4 * products.std() / np.sqrt(len(products))
    assert products.std() < f.std()                               # what it is for


def test_C05_draws_follow_the_probabilities(rng):
    times = filled(6, rng, np.array([0.0, 1, 2, 3, 4, 90]))
    t, _ = times.sample(100_000, rng)
    p = times.probabilities()
    counts = np.bincount(t, minlength=7)
    assert counts[0] == 0
    np.testing.assert_array_less(np.abs(counts - 1e5 * p), 4 * np.sqrt(1e5 * p) + 1e-9)


def test_C05_draws_come_from_sample_streams_and_device_losses_are_fetched(fake):
    times = iddpm.ImportanceSampledTimes(6)
    times.update(np.array([2, 2]), fake.asarray(np.array([1.0, 3.0], dtype=np.float32)))
    np.testing.assert_array_equal(times.history[2, :3], [1, 3, 0])
    t, weight = times.sample(4, SampleStreams(0, 1, range(4)))
    assert t.shape == weight.shape == (4,) and t.min() >= 1 and t.max() <= 6
    np.testing.assert_array_equal(t[2:], times.sample(2, SampleStreams(0, 1, [2, 3]))[0])
