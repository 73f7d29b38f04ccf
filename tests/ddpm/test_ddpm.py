"""The fixed-variance model: its losses, their gradients, and what all losses share."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ddpm import ddpm, gaussian
from ddpm.schedule import NoiseSchedule
from nn.backend import to_host
from tests.helpers import property_test, schedules

BIN = 2 / 255
SCHEDULES = {
    "linear": NoiseSchedule.linear(50),
    "cosine": NoiseSchedule.cosine(40),
    "variance exploding": NoiseSchedule(np.ones(30), np.geomspace(1e-4, 4.0, 30)),
    "general": NoiseSchedule(np.linspace(1.05, 0.8, 25), np.geomspace(1e-4, 0.3, 25)),
}


@pytest.fixture(params=SCHEDULES)
def schedule(request):
    return SCHEDULES[request.param]


def batch(rng, schedule, t, heads=1, shape=(2, 2, 1), dtype=np.float64, spread=0.5):
    """(output, x0, eps, x_t, t) with levels on the 8-bit grid and predictions near the truth."""
    t = np.asarray(t)
    shape = (len(t), *shape)
    x0 = -1 + BIN * rng.integers(0, 256, shape).astype(dtype)
    eps = rng.standard_normal(shape).astype(dtype)
    output = np.concatenate([eps] + [np.zeros_like(eps)] * (heads - 1), axis=-1)
    output = output + spread * rng.standard_normal(output.shape).astype(dtype)
    return output, x0, eps, schedule.add_noise(x0, t, eps), t


def numeric_gradient(f, x, h=1e-3):
    """Gradient of the sum of f's values by a five-point stencil, one entry of x at a time (error of order h^4)."""
    gradient = np.empty_like(x)
    for i in np.ndindex(x.shape):
        moved = [x.copy() for _ in range(4)]
        for y, by in zip(moved, (-2 * h, -h, h, 2 * h), strict=True):
            y[i] += by
        a, b, c, d = (f(y) for y in moved)
        gradient[i] = (a - 8 * b + 8 * c - d).sum() / (12 * h)    # differences first: rows that stay cancel exactly
    return gradient


def relative_error(actual, expected):
    return np.abs(actual - expected).max() / max(np.abs(expected).max(), 1e-300)


def run_on(xp, loss, output, x0, eps, x_t, t, schedule, **options):
    """The loss on the fake device, back on the host; inputs as on the host."""
    output, x0, eps, x_t = (xp.asarray(v) for v in (output, x0, eps, x_t))
    values, gradient = loss(output, x0, eps, x_t, t, schedule, **options)
    assert values.shape == (len(t),) and gradient.shape == output.shape
    assert values.dtype == gradient.dtype == output.dtype
    return to_host(values), to_host(gradient)


LOSSES = {
    "simple": (ddpm.simple_loss, {}),
    "small": (ddpm.vlb_loss, {"bin_width": BIN, "variance": "small"}),
    "large": (ddpm.vlb_loss, {"bin_width": BIN, "variance": "large"}),
    "density": (ddpm.vlb_loss, {"bin_width": None, "variance": "small"}),
}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("times", ["mixed", [1], [2], [1, 1], [7, 3]])
def test_gradients_match_finite_differences(name, heads, times, schedule, rng):
    loss, options = LOSSES[name]
    output, *rest = batch(rng, schedule, [1, 2, schedule.T, 1] if times == "mixed" else times, heads, spread=0.1)
    values, gradient = loss(output, *rest, schedule, **options)
    expected = numeric_gradient(lambda o: loss(o, *rest, schedule, **options)[0], output, h=1e-4)
    assert values.shape == rest[3].shape and gradient.shape == output.shape
    for row, (g, e) in enumerate(zip(gradient, expected, strict=True)):
        assert relative_error(g, e) < 1e-7, f"row {row}"


def test_L22_simple_loss_is_the_mean_squared_error(rng):
    output, *rest = batch(rng, SCHEDULES["linear"], [3, 40])
    values, gradient = ddpm.simple_loss(output, *rest, SCHEDULES["linear"])
    np.testing.assert_allclose(values, ((rest[1] - output)**2).mean(axis=(1, 2, 3)), rtol=1e-14)
    np.testing.assert_allclose(gradient, 2 * (output - rest[1]) / 4, rtol=1e-14)


@pytest.mark.parametrize("kind", ["small", "large"])
@pytest.mark.parametrize("s, t", [(1, 2), (1, 20), (9, 10), (4, 25)])
def test_L22_losses_in_noise_and_in_image_are_equal_after_weighting(kind, s, t, schedule, rng):
    eps_hat, x0, eps, x_t, _ = batch(rng, schedule, [t])
    posterior, W = schedule.posterior(s, t), ddpm.fixed_variance(kind, s, t, schedule)
    x0_hat = (x_t - np.sqrt(schedule.sigma2_bar[t]) * eps_hat) / schedule.lam_bar[t]
    in_x0 = posterior.a**2 * (x0 - x0_hat)**2 / (2 * W)
    in_noise = ddpm.step_weight(s, t, schedule) * posterior.var / (2 * W) * (eps - eps_hat)**2
    np.testing.assert_allclose(in_noise, in_x0, rtol=1e-9)
    assert ddpm.step_weight(s, t, schedule) == pytest.approx(schedule.snr[s] / schedule.snr[t] - 1, rel=1e-9)


@property_test
@given(schedules(), st.data(), st.sampled_from(["small", "large"]))
def test_L13_L22_C04_a_steps_loss_holds_for_any_schedule(schedule, data, kind):
    """The KL of two steps, through the image and through the noise; and small < large wherever the noise grows."""
    t = data.draw(st.integers(2, schedule.T))
    s = data.draw(st.integers(1, t - 1))
    posterior, W = schedule.posterior(s, t), ddpm.fixed_variance(kind, s, t, schedule)
    rho, k = W / posterior.var, ddpm.step_weight(s, t, schedule)
    assert rho == pytest.approx({"small": 1, "large": schedule.sigma2_bar[t] / schedule.sigma2_bar[s]}[kind], rel=1e-9)
    assert (posterior.var < schedule.between(s, t)[1]) == (schedule.sigma2_bar[s] < schedule.sigma2_bar[t])
    assert k == pytest.approx(schedule.snr[s] / schedule.snr[t] - 1, rel=1e-6)
    eps, eps_hat, x_t = np.random.default_rng(t).standard_normal((3, 2, 4))
    x0, x0_hat = ((x_t - np.sqrt(schedule.sigma2_bar[t]) * e) / schedule.lam_bar[t] for e in (eps, eps_hat))
    in_noise = 0.5 * (np.log(rho) + 1 / rho - 1 + k * (eps - eps_hat)**2 / rho)
    in_image = 0.5 * (np.log(rho) + 1 / rho - 1 + posterior.a**2 * (x0 - x0_hat)**2 / W)
    np.testing.assert_allclose(in_noise, in_image, rtol=1e-8, atol=1e-12)
    means = posterior.mean(x0, x_t), posterior.mean(x0_hat, x_t)
    lost = 1e-13 * (np.abs(means[0]) + np.abs(means[1]))**2 / posterior.var     # digits of a difference of means
    kl = gaussian.kl(means[0], posterior.var, means[1], W)
    assert (np.abs(in_image - kl) <= 1e-9 * kl + lost + 1e-14).all()
    assert np.abs(0.5 * k * (eps - eps_hat)**2 * rho - 0.5 * k * (eps - eps_hat)**2 / rho).max() > 0 or kind == "small"


@pytest.mark.parametrize("kind", ["small", "large"])
def test_L13_vlb_is_T_times_the_kl_of_the_two_reverse_steps(kind, schedule, rng):
    t = np.array([2, 5, schedule.T])
    eps_hat, x0, eps, x_t, _ = batch(rng, schedule, t)
    values, _ = ddpm.vlb_loss(eps_hat, x0, eps, x_t, t, schedule, bin_width=BIN, variance=kind)
    for i, time in enumerate(t):
        posterior = schedule.posterior(time - 1, time)
        x0_hat = (x_t[i] - np.sqrt(schedule.sigma2_bar[time]) * eps_hat[i]) / schedule.lam_bar[time]
        W = posterior.var if kind == "small" else schedule.sigma2[time]
        kl = gaussian.kl(posterior.mean(x0[i], x_t[i]), posterior.var, posterior.mean(x0_hat, x_t[i]), W)
        assert values[i] == pytest.approx(schedule.T * kl.mean(), rel=1e-9)


@pytest.mark.parametrize("kind", ["small", "large"])
def test_E10_at_t_1_the_term_is_the_decoder(kind, schedule, rng):
    eps_hat, x0, eps, x_t, t = batch(rng, schedule, [1])
    values, _ = ddpm.vlb_loss(eps_hat, x0, eps, x_t, t, schedule, bin_width=BIN, variance=kind)
    mean = (x_t - np.sqrt(schedule.sigma2_bar[1]) * eps_hat) / schedule.lam_bar[1]
    W = schedule.posterior(1, 2).var if kind == "small" else schedule.sigma2[1]
    nats = -gaussian.discretized_log_likelihood(x0, mean, W, BIN)
    assert values[0] == pytest.approx(schedule.T * nats.mean(), rel=1e-12)
    with pytest.raises(ValueError, match="E10"):
        ddpm.step_weight(0, 1, schedule)


def test_L07_mean_over_t_is_the_bound_per_dimension(rng):
    """Averaging T L_t over all t gives the sum of the terms, whose factor T is easily forgotten (E06)."""
    schedule = SCHEDULES["cosine"]
    x0, eps = np.full((1, 2, 2, 1), 0.2), rng.standard_normal((1, 2, 2, 1))
    terms = []
    for t in range(1, schedule.T + 1):
        x_t = schedule.add_noise(x0, t, eps)
        terms.append(ddpm.vlb_loss(0.9 * eps, x0, eps, x_t, t, schedule, bin_width=None)[0].item() / schedule.T)
    t = np.arange(1, schedule.T + 1)
    x0, eps = np.repeat(x0, schedule.T, axis=0), np.repeat(eps, schedule.T, axis=0)
    values, _ = ddpm.vlb_loss(0.9 * eps, x0, eps, schedule.add_noise(x0, t, eps), t, schedule, bin_width=None)
    assert values.mean() == pytest.approx(sum(terms), rel=1e-12)


def test_C04_fixed_variances(schedule):
    s, t = np.array([1, 1, 6]), np.array([2, 9, 7])
    np.testing.assert_allclose(ddpm.fixed_variance("large", s, t, schedule), schedule.between(s, t)[1], rtol=1e-15)
    np.testing.assert_allclose(ddpm.fixed_variance("small", s, t, schedule), schedule.posterior(s, t).var, rtol=1e-15)
    assert (ddpm.fixed_variance("small", s, t, schedule) < ddpm.fixed_variance("large", s, t, schedule)).all()
    assert ddpm.fixed_variance("small", 0, 1, schedule) == schedule.posterior(1, 2).var
    assert isinstance(ddpm.fixed_variance("small", 0, 1, schedule), float)
    mixed = ddpm.fixed_variance("small", np.array([0, 3]), np.array([4, 4]), schedule)
    np.testing.assert_allclose(mixed, [schedule.posterior(1, 2).var, schedule.posterior(3, 4).var], rtol=1e-15)


def test_C04_the_two_variances_agree_as_T_grows():
    """At a fixed place of the schedule 1 - small/large = sigma2_t/sigma2_bar_t falls like 1/T."""
    gaps = []
    for T in (100, 200, 400, 800, 1600):
        schedule = NoiseSchedule.cosine(T)
        large, small = (ddpm.fixed_variance(kind, T // 2 - 1, T // 2, schedule) for kind in ("large", "small"))
        gaps.append(1 - small / large)
    orders = np.log2(np.array(gaps[:-1]) / gaps[1:])
    np.testing.assert_allclose(orders, 1, atol=0.03)
    first = [ddpm.fixed_variance(kind, 1, 2, NoiseSchedule.linear(1000)) for kind in ("large", "small")]
    assert first[1] / first[0] < 0.5                            # at the very first steps they never agree


def test_E31_large_variance_belongs_to_the_step_itself():
    schedule = NoiseSchedule.linear(1000)
    assert ddpm.fixed_variance("large", 1, 2, schedule) == pytest.approx(1.1992e-4, rel=1e-4)
    assert schedule.sigma2[1] == pytest.approx(1.0e-4)           # what is printed: the step before


def test_rows_are_independent_of_their_company(rng):
    """A batch with decoder rows gives each row what it gets alone."""
    schedule = SCHEDULES["linear"]
    output, x0, eps, x_t, t = batch(rng, schedule, [5, 1, 50, 1, 2])
    values, gradient = ddpm.vlb_loss(output, x0, eps, x_t, t, schedule, bin_width=BIN)
    for i in range(5):
        row = slice(i, i + 1)
        alone = ddpm.vlb_loss(output[row], x0[row], eps[row], x_t[row], t[row], schedule, bin_width=BIN)
        np.testing.assert_allclose(values[row], alone[0], rtol=1e-13)
        np.testing.assert_allclose(gradient[row], alone[1], rtol=1e-13)


def test_decoder_sees_its_rows_only(rng, monkeypatch):
    schedule, seen = SCHEDULES["linear"], []
    real = gaussian.discretized_log_likelihood
    monkeypatch.setattr(ddpm, "discretized_log_likelihood", lambda x, *rest: seen.append(len(x)) or real(x, *rest))
    for t in ([5, 1, 50, 1, 2], [5, 6], [1]):
        ddpm.vlb_loss(*batch(rng, schedule, t), schedule, bin_width=BIN)
    assert seen == [2, 1]


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("times", [[1, 2, 50, 1], [1], [50, 7]])
def test_losses_on_a_device(name, times, fake, rng):
    loss, options = LOSSES[name]
    arguments = batch(rng, SCHEDULES["linear"], times, dtype=np.float32)
    values, gradient = run_on(fake, loss, *arguments, SCHEDULES["linear"], **options)
    expected_values, expected_gradient = loss(*arguments, SCHEDULES["linear"], **options)
    np.testing.assert_array_equal(values, expected_values)
    np.testing.assert_array_equal(gradient, expected_gradient)
    assert all(transfer.direction == "to_device" or transfer.shape in (values.shape, gradient.shape)
               for transfer in fake.transfers)


@pytest.mark.parametrize("make", [NoiseSchedule.linear, NoiseSchedule.cosine])
@pytest.mark.parametrize("kind", ["small", "large"])
def test_float32_follows_float64(make, kind, rng):
    schedule = make(1000)
    t = np.array([1, 2, 3, 10, 100, 500, 900, 999, 1000])
    output, x0, eps, x_t, _ = batch(rng, schedule, t)
    exact = ddpm.vlb_loss(output, x0, eps, x_t, t, schedule, bin_width=BIN, variance=kind)
    single = ddpm.vlb_loss(*(v.astype(np.float32) for v in (output, x0, eps, x_t)), t, schedule, bin_width=BIN,
                           variance=kind)
    np.testing.assert_allclose(single[0], exact[0], rtol=2e-4)
    np.testing.assert_allclose(single[1], exact[1], rtol=1e-3, atol=1e-3 * np.abs(exact[1]).mean())


def test_bad_arguments_say_what_to_do(rng):
    schedule = SCHEDULES["linear"]
    output, x0, eps, x_t, t = batch(rng, schedule, [3, 4])
    with pytest.raises(ValueError, match="output must be shaped"):
        ddpm.simple_loss(output[..., :0], x0, eps, x_t, t, schedule)
    with pytest.raises(ValueError, match="large"):
        ddpm.vlb_loss(output, x0, eps, x_t, t, schedule, bin_width=BIN, variance="medium")
    with pytest.raises(ValueError, match="0 <= s < t"):
        ddpm.vlb_loss(output, x0, eps, x_t, np.array([3, 0]), schedule, bin_width=BIN)
    with pytest.raises(ValueError, match="T >= 2"):
        ddpm.fixed_variance("small", 0, 1, NoiseSchedule([0.9], [0.1]))
