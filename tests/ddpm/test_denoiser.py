"""What samplers see of a model."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ddpm.denoiser import Denoiser, Prediction
from ddpm.mixture import GaussianMixture
from ddpm.parameterization import eps_from_score, score_from_eps
from tests.ddpm.test_ddpm import SCHEDULES
from tests.helpers import mixtures, property_test, schedules

WORLD = GaussianMixture.grid(rotation_degrees=30)


@pytest.fixture(params=SCHEDULES)
def schedule(request):
    return SCHEDULES[request.param]


@pytest.mark.parametrize("t", [1, 10, np.array([1, 7, 25])])
def test_L22_noise_and_image_are_one_prediction(t, schedule, rng):
    x_t = rng.standard_normal((3, 2))
    prediction = Denoiser.from_eps(lambda x, t: 0.3 * x, schedule).predict(x_t, t)
    np.testing.assert_array_equal(prediction.eps, 0.3 * x_t)
    np.testing.assert_allclose(schedule.add_noise(prediction.x0, t, prediction.eps), x_t, rtol=1e-12)
    assert prediction.var_x0 is prediction.var_eps is prediction.v is None


@pytest.mark.parametrize("t", [1, 10, np.array([1, 7, 25])])
def test_from_moments_agrees_with_from_eps_on_an_exact_world(t, schedule, rng):
    x_t = rng.standard_normal((3, 2))
    exact = Denoiser.from_world(WORLD, schedule).predict(x_t, t)
    assert isinstance(exact, Prediction)
    mean, cov = WORLD.posterior_x0(x_t, t, schedule)
    np.testing.assert_array_equal(exact.x0, mean)
    np.testing.assert_array_equal(exact.var_x0, np.einsum("nii->ni", cov))
    again = Denoiser.from_eps(lambda x, t: exact.eps, schedule).predict(x_t, t)
    np.testing.assert_allclose(again.x0, exact.x0, rtol=1e-9, atol=1e-12)
    snr = np.reshape(schedule.snr[t], (-1, 1))
    np.testing.assert_allclose(exact.var_eps, snr * exact.var_x0, rtol=1e-12)


@property_test
@given(mixtures(), schedules(), st.data())
def test_U03_noise_is_minus_the_scaled_score_of_any_mixture(world, schedule, data):
    t = data.draw(st.integers(1, schedule.T))
    noised = world.noised(t, schedule)
    x_t = noised.sample(6, np.random.default_rng(t))
    eps, score = Denoiser.from_world(world, schedule).predict(x_t, t).eps, noised.score(x_t)
    digits = 1e-9 * (1 + schedule.snr[t]**0.5)
    np.testing.assert_allclose(eps, eps_from_score(score, t, schedule), rtol=1e-9, atol=digits)
    np.testing.assert_allclose(score_from_eps(eps, t, schedule) * schedule.sigma2_bar[t]**0.5, -eps, rtol=1e-12)
    assert np.abs(eps + schedule.sigma2_bar[t] * score).max() > digits          # control: the root left out


@pytest.mark.parametrize("t", [1, 10, 25, np.array([1, 7, 25])])
def test_C08_the_worlds_vjp_is_the_derivative_of_its_noise(t, schedule, rng, fake):
    denoiser, h = Denoiser.from_world(WORLD, schedule), 1e-5
    x_t = schedule.add_noise(WORLD.sample(3, rng), t, rng.standard_normal((3, 2)))
    v, u = rng.standard_normal((2, 3, 2))
    vjp = denoiser.vjp(x_t, t, v)
    slope = (denoiser.predict(x_t + h * u, t).eps - denoiser.predict(x_t - h * u, t).eps) / (2 * h)
    scale = np.abs(vjp).max() * np.abs(u).max()
    np.testing.assert_allclose((vjp * u).sum(axis=1), (v * slope).sum(axis=1), atol=1e-5 * scale)
    without = v / np.reshape(np.sqrt(schedule.sigma2_bar[t]), (-1, 1))          # control: Cov[x_0 | x_t] left out
    assert np.abs((without * u).sum(axis=1) - (v * slope).sum(axis=1)).max() > 1e-3 * scale
    on_device = denoiser.vjp(fake.asarray(x_t), t, fake.asarray(v))
    np.testing.assert_array_equal(fake.asnumpy(on_device), vjp)
    assert denoiser.vjps == 6


def test_passes_are_counted_in_images():
    schedule = SCHEDULES["linear"]
    denoiser = Denoiser.from_eps(lambda x, t: 0 * x, schedule, vjp=lambda x, t, v: 2 * v)
    denoiser.predict(np.zeros((3, 2)), 5)
    denoiser.predict(np.zeros((4, 2)), np.array([1, 2, 3, 4]))
    np.testing.assert_array_equal(denoiser.vjp(np.zeros((2, 2)), 5, np.ones((2, 2))), np.full((2, 2), 2.0))
    assert (denoiser.evaluations, denoiser.vjps) == (7, 2)


def test_what_is_missing_is_said():
    with pytest.raises(NotImplementedError, match="from_eps"):
        Denoiser(SCHEDULES["linear"]).predict(np.zeros((1, 1)), 1)
    with pytest.raises(NotImplementedError, match="vjp"):
        Denoiser.from_eps(lambda x, t: x, SCHEDULES["linear"]).vjp(np.zeros((1, 1)), 1, np.zeros((1, 1)))


def test_float32_and_device(fake, rng):
    schedule, x = SCHEDULES["linear"], rng.standard_normal((3, 2)).astype(np.float32)
    for denoiser in (Denoiser.from_eps(lambda x, t: 0.3 * x, schedule),
                     Denoiser.from_moments(lambda x, t: (0.3 * x, 0.1 * x * x), schedule)):
        for t in (4, np.array([1, 2, 3])):
            for a, b in zip(denoiser.predict(fake.asarray(x), t), denoiser.predict(x, t), strict=True):
                assert (a is None) == (b is None)
                if b is not None:
                    np.testing.assert_array_equal(fake.asnumpy(a), b)
                    assert b.dtype == np.float32
