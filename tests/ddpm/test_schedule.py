"""The noising process against simulation, recursion and its own tower rules."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ddpm.elbo import prior_kl
from ddpm.schedule import NoiseSchedule
from nn.backend import to_host
from tests.helpers import general_schedule, property_test, schedules, zscore

# ---- L01-L04, U01

def test_L01_one_step_has_these_moments(rng):
    schedule = general_schedule()
    t, x = 7, 1.3
    x_t = schedule.lam[t] * x + np.sqrt(schedule.sigma2[t]) * rng.standard_normal(100_000)
    assert schedule.between(t - 1, t) == (schedule.lam[t], schedule.sigma2[t])
    assert abs(zscore(x_t, schedule.lam[t] * x)) < 4
    assert abs(zscore((x_t - schedule.lam[t] * x)**2, schedule.sigma2[t])) < 4


@pytest.mark.parametrize("schedule", [NoiseSchedule.linear(30), general_schedule(30)], ids=["VP", "general"])
def test_L02_closed_form_equals_simulating_the_chain(schedule, rng):
    x0, s, n = 0.8, 12, 100_000
    x = x_s = np.full(n, x0)
    for t in range(1, schedule.T + 1):
        x = schedule.lam[t] * x + np.sqrt(schedule.sigma2[t]) * rng.standard_normal(n)
        x_s = x if t == s else x_s
    mean, var = schedule.lam_bar[-1] * x0, schedule.sigma2_bar[-1]
    assert abs(zscore(x, mean)) < 4 and abs(zscore((x - mean)**2, var)) < 4
    lam_ts, sigma2_ts = schedule.between(s, schedule.T)
    residual = x - lam_ts * x_s
    assert abs(zscore(residual, 0)) < 4 and abs(zscore(residual**2, sigma2_ts)) < 4
    assert abs(zscore(residual * x_s, 0)) < 4                           # what is added is independent of x_s
    assert abs(zscore((x - mean)**2, var - schedule.sigma2[-1])) > 20   # control: a chain one step short in variance


@property_test
@given(schedules(), st.data())
def test_L02_between_composes(schedule, data):
    r, s, t = sorted(data.draw(st.lists(st.integers(0, schedule.T), min_size=3, max_size=3)))
    (lam_sr, sigma2_sr), (lam_ts, sigma2_ts) = schedule.between(r, s), schedule.between(s, t)
    lam_tr, sigma2_tr = schedule.between(r, t)
    np.testing.assert_allclose(lam_tr, lam_ts * lam_sr, rtol=1e-12)
    np.testing.assert_allclose(sigma2_tr, lam_ts**2 * sigma2_sr + sigma2_ts, rtol=1e-11, atol=1e-15)
    np.testing.assert_allclose(schedule.between(0, t), (schedule.lam_bar[t], schedule.sigma2_bar[t]), rtol=1e-12)
    assert schedule.between(s, s) == (1.0, 0.0)


@property_test
@given(schedules())
def test_L02_from_marginals_reads_the_recursion_backwards(schedule):
    again = NoiseSchedule.from_marginals(schedule.lam_bar[1:], schedule.sigma2_bar[1:])
    np.testing.assert_allclose(again.lam, schedule.lam, rtol=1e-12)
    np.testing.assert_allclose(again.sigma2, schedule.sigma2, rtol=1e-9, atol=1e-13 * schedule.sigma2_bar.max())
    np.testing.assert_allclose(again.sigma2_bar, schedule.sigma2_bar, rtol=1e-12)


@property_test
@given(schedules(), st.data())
def test_L02_from_marginals_refuses_a_signal_to_noise_ratio_that_rises(schedule, data):
    """Noise can't be taken back: with the marginals of t and t+1 exchanged, the step to t+1 has no variance."""
    t = data.draw(st.integers(1, schedule.T - 1))
    order = np.arange(1, schedule.T + 1)
    order[t - 1:t + 1] = t + 1, t
    with pytest.raises(ValueError, match=f"must fall from each t .* to t={t + 1} would not be above 0"):
        NoiseSchedule.from_marginals(schedule.lam_bar[order], schedule.sigma2_bar[order])


@property_test
@given(schedules(variance_preserving=True))
def test_L03_variance_preserving(schedule):
    assert schedule.is_variance_preserving
    np.testing.assert_allclose(schedule.sigma2_bar, 1 - schedule.lam_bar**2, rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(schedule.lam**2 * 1.0 + schedule.sigma2, 1, rtol=1e-14)      # unit variance stays
    assert (schedule.marginal_var == 1).all()


@property_test
@given(schedules(variance_preserving=False))
def test_L03_control_general_schedules_are_not_variance_preserving(schedule):
    assert not schedule.is_variance_preserving
    assert abs(schedule.sigma2_bar - (1 - schedule.lam_bar**2)).max() > 1e-4
    assert abs(schedule.marginal_var - 1).max() > 1e-4


@property_test
@given(schedules())
def test_L03_marginal_variance_is_what_unit_variance_becomes(schedule):
    carried = np.ones(schedule.T + 1)
    for t in range(1, schedule.T + 1):
        carried[t] = schedule.lam[t]**2 * carried[t - 1] + schedule.sigma2[t]
    np.testing.assert_allclose(schedule.marginal_var, carried, rtol=1e-12)


def rescaled(schedule):
    """The process of x_t / r_t, r_t^2 = marginal_var_t, and the r_t (T+1,)."""
    r = np.sqrt(schedule.marginal_var)
    return NoiseSchedule.from_marginals(schedule.lam_bar[1:] / r[1:], schedule.sigma2_bar[1:] / r[1:]**2), r


@property_test
@given(schedules(), st.data())
def test_L03_any_process_is_variance_preserving_in_units_of_its_own_spread(schedule, data):
    vp, r = rescaled(schedule)
    assert vp.is_variance_preserving
    np.testing.assert_allclose(vp.snr, schedule.snr, rtol=1e-10)
    s, t = sorted(data.draw(st.lists(st.integers(0, schedule.T), min_size=2, max_size=2, unique=True)))
    a, b, var = schedule.posterior(s, t)
    np.testing.assert_allclose(vp.posterior(s, t), (a / r[s], b * r[t] / r[s], var / r[s]**2), rtol=1e-8, atol=1e-13)


def test_L04_long_chains_forget_and_easy_steps_remember():
    """At a fixed step the prior's KL falls with T like lam_bar_T^2; at a fixed T it grows as steps get easier."""
    x0 = np.array([1.5])
    chains = [NoiseSchedule.from_betas(np.full(T, 0.01)) for T in (100, 200, 400, 800)]
    kls = np.array([prior_kl(x0, chain)[0] for chain in chains])
    first_order = np.array([0.5 * chain.alpha_bar[-1] * x0[0]**2 for chain in chains])
    assert (np.diff(kls) < 0).all()
    np.testing.assert_allclose(kls[2:], first_order[2:], rtol=0.02)
    easier = [prior_kl(x0, NoiseSchedule.from_betas(np.full(100, beta)))[0] for beta in (0.1, 0.03, 0.01, 0.003)]
    assert (np.diff(easier) > 0).all()


@pytest.mark.parametrize("schedule", [NoiseSchedule.linear(), general_schedule()], ids=["VP", "general"])
def test_U01_add_noise(schedule, rng):
    x0, eps = rng.standard_normal((2, 4, 5, 5, 2))
    t = np.array([1, 3, schedule.T, 0])
    x_t = schedule.add_noise(x0, t, eps)
    for i in range(4):
        expected = schedule.lam_bar[t[i]] * x0[i] + np.sqrt(schedule.sigma2_bar[t[i]]) * eps[i]
        np.testing.assert_allclose(x_t[i], expected, rtol=1e-14)
        np.testing.assert_allclose(schedule.add_noise(x0[i:i + 1], int(t[i]), eps[i:i + 1])[0], expected, rtol=1e-14)
    np.testing.assert_array_equal(x_t[3], x0[3])
    assert schedule.add_noise(x0.astype(np.float32), t, eps.astype(np.float32)).dtype == np.float32


def test_E11_the_step_goes_from_the_earlier_time_to_the_later(rng):
    """Printed: x_{t-1} given x_t has mean sqrt(1-beta) x_t; that regression belongs to unit-variance data only."""
    schedule = NoiseSchedule.linear(50)
    x0 = np.full(100_000, 0.5)
    x_s = schedule.add_noise(x0, 9, rng.standard_normal(x0.size))
    x_t = schedule.lam[10] * x_s + np.sqrt(schedule.sigma2[10]) * rng.standard_normal(x0.size)
    assert abs(zscore(x_t - np.sqrt(1 - schedule.beta[10]) * x_s, 0)) < 4
    assert abs(zscore(x_s - np.sqrt(1 - schedule.beta[10]) * x_t, 0)) > 20


def test_E12_the_noise_is_scaled_by_the_root(rng):
    schedule, t = NoiseSchedule.linear(), 200
    eps = rng.standard_normal(100_000)
    correct = schedule.add_noise(np.zeros_like(eps), t, eps)
    printed = (1 - schedule.alpha_bar[t]) * eps
    assert abs(zscore(correct**2, schedule.sigma2_bar[t])) < 4 < 20 < abs(zscore(printed**2, schedule.sigma2_bar[t]))


def test_add_noise_on_a_device(fake, rng):
    schedule = NoiseSchedule.linear()
    x0, eps = rng.standard_normal((2, 3, 4, 4, 1), dtype=np.float32)
    t = np.array([1, 500, 1000])
    x_t = schedule.add_noise(fake.asarray(x0), t, fake.asarray(eps))
    np.testing.assert_array_equal(to_host(x_t), schedule.add_noise(x0, t, eps))
    assert x_t.dtype == np.float32
    with pytest.raises(TypeError):
        schedule.add_noise(fake.asarray(x0), t, eps)


# ---- constructors

def test_linear_values():
    schedule = NoiseSchedule.linear()
    assert schedule.T == 1000 and schedule.beta[1] == 1e-4 and schedule.beta[-1] == 0.02
    np.testing.assert_allclose(schedule.alpha_bar[-1], 4.0358e-5, rtol=2e-5)
    np.testing.assert_allclose(schedule.snr[500], schedule.alpha_bar[500] / (1 - schedule.alpha_bar[500]), rtol=1e-12)
    assert np.isinf(schedule.snr[0]) and schedule.lam_bar[0] == 1 and schedule.sigma2_bar[0] == 0


@pytest.mark.parametrize("T", [50, 100, 250, 1000, 4000])
def test_linear_ends_equally_noisy_for_any_T(T):
    assert 1e-6 < NoiseSchedule.linear(T).alpha_bar[-1] < 5e-5


def test_cosine_values():
    schedule = NoiseSchedule.cosine()
    u = np.arange(1000) / 1000
    f = np.cos((u + 0.008) / 1.008 * np.pi / 2)**2
    np.testing.assert_allclose(schedule.alpha_bar[:1000], f / f[0], rtol=1e-9)
    assert schedule.beta[-1] == pytest.approx(0.999) and schedule.alpha_bar[-1] < 1e-8
    assert NoiseSchedule.cosine(1).T == 1


def test_L01_variance_exploding_only_adds_noise():
    schedule = NoiseSchedule.variance_exploding()
    assert schedule.T == 1000 and (schedule.lam == 1).all() and not schedule.is_variance_preserving
    sigma = np.sqrt(schedule.sigma2_bar[1:])
    np.testing.assert_allclose(sigma[[0, -1]], (0.01, 50), rtol=1e-12)
    np.testing.assert_allclose(sigma[1:] / sigma[:-1], 5000**(1 / 999), rtol=1e-10)
    np.testing.assert_allclose(schedule.sigma2[1:], np.diff(schedule.sigma2_bar), rtol=1e-12)
    np.testing.assert_allclose(schedule.marginal_var[[0, 1, 1000]], (1, 1.0001, 2501), rtol=1e-12)
    one, short = NoiseSchedule.variance_exploding(1), NoiseSchedule.variance_exploding(3, 0.1, 10)
    np.testing.assert_allclose(one.sigma2_bar, (0, 2500))
    np.testing.assert_allclose(short.sigma2_bar, (0, 0.01, 1, 100), rtol=1e-12)
    for bounds in ((0, 1), (1, 1), (2, 1), (1, np.inf), (np.nan, 1)):
        with pytest.raises(ValueError, match="sigma_min must be above 0 and below sigma_max"):
            NoiseSchedule.variance_exploding(10, *bounds)


@pytest.mark.parametrize("T", [25, 1000])
def test_L01_sub_variance_preserving_fades_alike_with_less_noise(T):
    schedule, vp = NoiseSchedule.sub_variance_preserving(T), NoiseSchedule.linear(T)
    lam_bar2 = 0.99 * vp.alpha_bar[1:]
    np.testing.assert_allclose(schedule.lam_bar[1:]**2, lam_bar2, rtol=1e-12)
    np.testing.assert_allclose(schedule.sigma2_bar[1:], (1 - lam_bar2)**2, rtol=1e-9)
    np.testing.assert_allclose(schedule.lam[2:], vp.lam[2:], rtol=1e-12)
    assert (schedule.sigma2_bar[1:] < 1 - schedule.lam_bar[1:]**2).all() and (schedule.marginal_var[1:] < 1).all()
    plain = NoiseSchedule.sub_variance_preserving(T, sigma_min=0)
    np.testing.assert_allclose(plain.sigma2_bar, vp.sigma2_bar**2, rtol=1e-9)
    for sigma_min in (-0.1, 1, np.nan):
        with pytest.raises(ValueError, match="sigma_min must be at least 0 and below 1"):
            NoiseSchedule.sub_variance_preserving(T, sigma_min=sigma_min)
    with pytest.raises(ValueError, match="too small"):
        NoiseSchedule.sub_variance_preserving(20)


@property_test
@given(schedules(variance_preserving=True))
def test_L02_every_step_of_a_sub_variance_preserving_process_adds_noise(vp):
    """With u = 1 - alpha_bar_{t-1}, (1 - alpha_bar_t)^2 - alpha_t u^2 is beta_t [beta_t + alpha_t u (2 - u)] > 0."""
    u = vp.sigma2_bar[:-1]
    expected = vp.beta[1:] * (vp.beta[1:] + vp.alpha[1:] * u * (2 - u))
    schedule = NoiseSchedule.from_marginals(vp.lam_bar[1:], vp.sigma2_bar[1:]**2)
    np.testing.assert_allclose(schedule.sigma2[1:], expected, rtol=1e-9, atol=1e-15)
    assert abs(vp.beta[2:] * (vp.beta[2:] + vp.alpha[2:] * u[1:]) / expected[1:] - 1).max() > 0.01   # control


def test_tables_are_float64_and_read_only():
    schedule = NoiseSchedule([0.9, np.float32(0.8)], [0.1, 0.2])
    for table in (schedule.lam, schedule.sigma2, schedule.lam_bar, schedule.sigma2_bar, schedule.snr,
                  schedule.marginal_var):
        assert table.dtype == np.float64 and table.shape == (3,)
        with pytest.raises(ValueError):
            table[1] = 0
    assert "general" in repr(schedule) and "variance preserving" in repr(NoiseSchedule.linear())


@pytest.mark.parametrize("lam, sigma2, message", [
    ([0.9, 0.9], [0.1], "one length T"),
    ([], [], "one length T"),
    ([[0.9]], [[0.1]], "one length T"),
    ([0.9, 0.0], [0.1, 0.1], "lam must be"),
    ([0.9, np.nan], [0.1, 0.1], "lam must be"),
    ([0.9, 0.9], [0.1, 0.0], "sigma2 must be"),
    ([0.9, 0.9], [0.1, np.inf], "sigma2 must be"),
])
def test_bad_tables(lam, sigma2, message):
    with pytest.raises(ValueError, match=message):
        NoiseSchedule(lam, sigma2)
    with pytest.raises(ValueError, match=message.replace("lam", "lam_bar").replace("sigma2", "sigma2_bar")):
        NoiseSchedule.from_marginals(lam, sigma2)


def test_a_signal_that_fades_or_grows_beyond_all_numbers_is_refused():
    for lam in (1e-3, 1e3):
        NoiseSchedule(np.full(50, lam), np.ones(50))
        with pytest.raises(ValueError, match="leaves the range of floats"), np.errstate(over="ignore"):
            NoiseSchedule(np.full(200, lam), np.ones(200))


def test_bad_constructor_arguments():
    for betas in ([0.1, 0.0], [1.0], [-0.1], [np.nan]):
        with pytest.raises(ValueError, match="betas"):
            NoiseSchedule.from_betas(betas)
    for constructor in (NoiseSchedule.linear, NoiseSchedule.cosine, NoiseSchedule.variance_exploding,
                        NoiseSchedule.sub_variance_preserving):
        for T in (0, -3, 2.5):
            with pytest.raises(ValueError, match="T must be an integer"):
                constructor(T)
    with pytest.raises(ValueError, match="too small for a linear schedule"):
        NoiseSchedule.linear(20)


def test_variance_preserving_views_only_where_they_exist():
    for schedule in (general_schedule(), NoiseSchedule.variance_exploding(), NoiseSchedule.sub_variance_preserving()):
        for name in ("beta", "alpha", "alpha_bar"):
            with pytest.raises(AttributeError, match=f"{name} is defined for variance-preserving"):
                getattr(schedule, name)


def test_bad_times():
    schedule = NoiseSchedule.linear(100)
    x = np.zeros((2, 3))
    for t in (-1, 101, np.array([1, 101])):
        with pytest.raises(ValueError, match="0..100"):
            schedule.add_noise(x, t, x)
    with pytest.raises(TypeError, match="integer"):
        schedule.add_noise(x, 1.0, x)
    with pytest.raises(ValueError, match="s must not be later"):
        schedule.between(5, 4)
    for s, t in ((3, 3), (4, 3), (np.array([1, 3]), 3)):
        with pytest.raises(ValueError, match="s must be earlier"):
            schedule.posterior(s, t)
    with pytest.raises(ValueError, match="0..100"):
        schedule.posterior(-1, 3)


# ---- timesteps

@pytest.mark.parametrize("T, steps, spacing, ascending", [
    (1000, 10, "uniform", [1, 112, 223, 334, 445, 556, 667, 778, 889, 1000]),
    (1000, 5, "uniform", [1, 251, 500, 750, 1000]),
    (1000, 10, "quadratic", [1, 10, 40, 89, 159, 247, 356, 484, 633, 801]),
    (1000, 4, "trailing", [250, 500, 750, 1000]),
    (7, 7, "uniform", [1, 2, 3, 4, 5, 6, 7]),
    (7, 7, "quadratic", [1, 2, 3, 4, 5, 6, 7]),
    (7, 7, "trailing", [1, 2, 3, 4, 5, 6, 7]),
    (1000, 1, "uniform", [1000]),
    (1, 1, "quadratic", [1]),
])
def test_timesteps_golden(T, steps, spacing, ascending):
    assert NoiseSchedule.cosine(T).timesteps(steps, spacing).tolist() == ascending[::-1]


@property_test
@given(st.integers(1, 300), st.data(), st.sampled_from(["uniform", "quadratic", "trailing"]))
def test_timesteps_descend_strictly_within_1_to_T(T, data, spacing):
    steps = data.draw(st.integers(1, T))
    times = NoiseSchedule.cosine(T).timesteps(steps, spacing)
    assert len(times) == steps and np.issubdtype(times.dtype, np.integer)
    assert (np.diff(times) < 0).all() and 1 <= times[-1] and times[0] <= T


def test_bad_timesteps():
    schedule = NoiseSchedule.linear(100)
    for steps in (0, 101, 2.5):
        with pytest.raises(ValueError, match="steps must be an integer from 1 to T=100"):
            schedule.timesteps(steps)
    with pytest.raises(ValueError, match='"uniform", "quadratic" or "trailing"'):
        schedule.timesteps(10, "cubic")
