"""Image i of a model is a function of (seed, i), however the work is cut."""

import numpy as np
import pytest

from ddpm.covariance import reverse_covariance
from ddpm.denoiser import Denoiser
from ddpm.generate import SAMPLERS, draw_images, trajectory
from ddpm.guidance import MixtureDenoiser
from ddpm.mixture import GaussianMixture
from ddpm.parallel import Alone, make_group
from ddpm.schedule import NoiseSchedule
from tests.ddpm.test_likelihood import small_network
from tests.helpers import zscore

SCHEDULE, SHAPE = NoiseSchedule.cosine(30), (4, 4, 2)
MEAN, VAR = 0.2, 0.04


def gaussian(schedule=SCHEDULE):
    """The exact denoiser of N(MEAN, VAR) pixels, all of which lie well within [-1, 1]."""
    def moments(x_t, t):
        lam, noise = float(schedule.lam_bar[t]), float(schedule.sigma2_bar[t])
        gain = lam * VAR / (lam**2 * VAR + noise)
        return MEAN + gain * (x_t - lam * MEAN), 0 * x_t + VAR * noise / (lam**2 * VAR + noise)
    return Denoiser.from_moments(moments, schedule)


def drawn(num, workers=1, denoiser=None, shape=SHAPE, **options):
    options = {"steps": 10, "variance": "learned"} | options
    denoiser = denoiser or gaussian()
    return draw_images(denoiser, denoiser.schedule, shape, num, make_group(workers), **options)


def test_an_image_is_a_function_of_seed_and_number():
    whole = drawn(9)
    assert whole.shape == (9, *SHAPE) and whole.dtype == np.float32 and isinstance(whole, np.ndarray)
    for num, workers, chunk in ((9, 1, 1), (9, 1, 4), (9, 2, 3), (9, 3, 16), (4, 1, 16), (12, 2, 5), (1, 1, 1)):
        images = drawn(num, workers, chunk=chunk)
        np.testing.assert_array_equal(images[:9], whole[:num])
    assert (drawn(9, seed=1) != whole).mean() > 0.99
    assert len({image.tobytes() for image in whole}) == 9


def test_later_images_of_a_seed_can_be_drawn_alone():
    whole = drawn(9)
    np.testing.assert_array_equal(drawn(4, first=5), whole[5:])
    np.testing.assert_array_equal(drawn(4, 2, first=5, chunk=1), whole[5:])


def test_C11_probes_are_functions_of_the_seed_and_the_number(rng):
    """Images with Hutchinson's variance don't depend on the pieces they are drawn in."""
    network = small_network()
    method = reverse_covariance("hutchinson", rng=rng, largest=1.0)
    options = {"denoiser": network, "shape": (8, 8, 1), "steps": 3, "variance": method}
    whole = drawn(5, **options)
    for workers, chunk in ((1, 2), (2, 1)):
        np.testing.assert_allclose(drawn(5, workers, chunk=chunk, **options), whole, atol=1e-3)
    np.testing.assert_allclose(drawn(2, first=3, **options), whole[3:], atol=1e-3)
    assert np.abs(drawn(5, **options | {"variance": "learned"}) - whole).max() > 0.01


def test_the_last_noise_is_held_to_what_was_asked():
    wide = Denoiser.from_eps(lambda x_t, t: 0 * x_t, SCHEDULE)
    free, held = (drawn(50, denoiser=wide, variance="large", steps=3, last_variance=last) for last in (None, 1e-4))
    assert (free != held).any() and np.isfinite(held).all()


def test_an_image_of_a_network_is_so_to_rounding():
    """Matrix products of another size may round in another way; few steps keep that small."""
    network = small_network()
    whole = drawn(5, denoiser=network, shape=(8, 8, 1), steps=3)
    np.testing.assert_array_equal(drawn(5, denoiser=network, shape=(8, 8, 1), steps=3), whole)
    for workers, chunk in ((1, 1), (2, 2)):
        other = drawn(5, workers, denoiser=network, shape=(8, 8, 1), steps=3, chunk=chunk)
        np.testing.assert_allclose(other, whole, atol=1e-3)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_C16_U13_images_of_any_sampler(sampler):
    """Each is a function of seed and number, the samplers differ, and all draw from the pixels' law."""
    whole = drawn(200, sampler=sampler, steps=30, variance="learned" if sampler == "ddpm" else None)
    np.testing.assert_array_equal(
        drawn(7, 2, sampler=sampler, steps=30, variance="learned" if sampler == "ddpm" else None, chunk=3), whole[:7])
    assert abs(zscore(whole, MEAN)) < 4 and 0.85 < whole.std() / VAR**0.5 < 1.02      # thirty steps narrow it a little
    other = drawn(200, sampler="ddim", eta=0.5, steps=30, variance=None)
    assert np.abs(whole - other).mean() > 0.01


def test_samplers_and_spacings_that_there_are():
    with pytest.raises(ValueError, match="sampler must be one of ddpm, ddim, dpm-solver, flow, not 'euler'"):
        drawn(1, sampler="euler")
    assert np.abs(drawn(3, spacing="trailing") - drawn(3)).max() > 0


PAIR = MixtureDenoiser(GaussianMixture.two_component(), SCHEDULE)        # labels 0 and 1 at -1.2 and 0.8


def test_C20_a_labelled_image_is_a_function_of_seed_number_and_label():
    options = {"denoiser": PAIR, "shape": (1,), "clip": (-3, 3), "guidance_scale": 2.0}
    labels = np.arange(9) % 2
    whole = drawn(9, labels=labels, **options)
    assert ((whole[:, 0] > 0) == labels).all()
    for num, workers, chunk in ((9, 1, 4), (9, 2, 3), (4, 1, 16), (5, 3, 1)):
        np.testing.assert_array_equal(drawn(num, workers, chunk=chunk, labels=labels[:num], **options), whole[:num])
    mixed = drawn(9, labels=1 - labels[:1] + 0 * labels, **options)      # neighbours' labels don't matter
    np.testing.assert_array_equal(mixed[labels == 1], whole[labels == 1])
    assert (mixed[labels == 0] > 0).all()
    for scale in (1.0, 3.0):
        assert (drawn(9, labels=labels, **options | {"guidance_scale": scale}) != whole).all()
    unlabelled = drawn(9, denoiser=PAIR, shape=(1,), clip=(-3, 3))
    np.testing.assert_array_equal(drawn(9, labels=labels, **options | {"guidance_scale": 0.0}), unlabelled)


def test_C20_the_way_to_a_labelled_image():
    labels = np.array([1, 0])
    options = {"steps": 10, "variance": "learned", "clip": (-3, 3), "labels": labels, "guidance_scale": 2.0}
    times, _, mean, std = trajectory(PAIR, SCHEDULE, (1,), 2, **options)
    images = draw_images(PAIR, SCHEDULE, (1,), 2, make_group(1), **options)
    np.testing.assert_allclose(mean[-1], images, rtol=1e-5)
    spread = [PAIR.predict(np.zeros((1, 1)), t, 0).var_x0.item()**0.5 for t in times]
    np.testing.assert_allclose(std[:, 0, 0], spread, rtol=1e-5)          # given the label, the same at every point


OTHERS = {"cosine": SCHEDULE, "VE": NoiseSchedule.variance_exploding(30),
          "sub-VP": NoiseSchedule.sub_variance_preserving(30)}


@pytest.mark.parametrize("schedule", OTHERS.values(), ids=OTHERS)
@pytest.mark.parametrize("steps", [30, 5])
def test_C15_samples_of_the_exact_model_have_the_moments_of_the_data(steps, schedule):
    images = drawn(300, steps=steps, chunk=100, denoiser=gaussian(schedule)).astype(np.float64)
    last = VAR * schedule.sigma2_bar[1] / (schedule.lam_bar[1]**2 * VAR + schedule.sigma2_bar[1])
    assert abs(images.mean() - MEAN) < 4 * np.sqrt(VAR / images.size)
    assert abs(images.var() / (VAR - last) - 1) < 4 * np.sqrt(2 / images.size)


@pytest.mark.parametrize("schedule", OTHERS.values(), ids=OTHERS)
def test_chains_start_from_the_prior_of_the_bound(schedule):
    """Standard normal noise, scaled to what x_T is for data of unit variance; shown to people at unit variance."""
    seen = []

    class Watched(Denoiser):
        def predict(self, x_t, t):
            seen.append(x_t)
            return gaussian(schedule).predict(x_t, t)
    drawn(50, denoiser=Watched(schedule), steps=3, chunk=50)
    x_T, var = seen[0].astype(np.float64), schedule.marginal_var[-1]
    assert abs(zscore(x_T.ravel())) < 4 and abs(zscore(x_T.ravel()**2, var)) < 4 and seen[0].dtype == np.float32
    assert not schedule.is_variance_preserving or var == 1
    times, shown, *_ = trajectory(gaussian(schedule), schedule, SHAPE, 50, steps=3, variance="learned")
    np.testing.assert_allclose(shown[0] * var**0.5, seen[0], rtol=1e-6)
    spread = (schedule.lam_bar[times]**2 * VAR + schedule.sigma2_bar[times]) / schedule.marginal_var[times]
    np.testing.assert_allclose(shown.var(axis=(1, 2, 3, 4)), spread, rtol=0.15)


def test_images_stay_in_range_and_progress_is_counted():
    wide, seen = Denoiser.from_eps(lambda x_t, t: 0 * x_t, SCHEDULE), []
    images = drawn(5, denoiser=wide, variance="large", chunk=2, progress=seen.append)
    assert abs(images).max() == 1 and sum(seen) == 5 * 10 == wide.evaluations
    for num, workers in ((5, 2), (7, 3)):                    # the first rank speaks for all
        seen.clear()
        drawn(num, workers, chunk=2, progress=seen.append)
        assert sum(seen) == num * 10
    with pytest.raises(ValueError, match="needs a model with a variance"):
        drawn(1, denoiser=wide)


@pytest.mark.parametrize("steps, show, count", [(10, 4, 4), (30, 8, 8), (3, 8, 3), (1, 8, 1)])
def test_G10_trajectory_shows_times_from_T_to_1(steps, show, count):
    times, x_t, mean, std = trajectory(gaussian(), SCHEDULE, SHAPE, 2, steps=steps, variance="learned", show=show)
    timesteps = SCHEDULE.timesteps(steps).tolist()
    assert len(times) == count and set(times) <= set(timesteps) and times == sorted(times, reverse=True)
    assert times[0] == timesteps[0] and times[-1] == timesteps[-1] and all(type(t) is int for t in times)
    assert x_t.shape == mean.shape == std.shape == (count, 2, *SHAPE)
    for t, noisy, x0, spread in zip(times, x_t, mean, std, strict=True):
        prediction = gaussian().predict(noisy, t)
        np.testing.assert_allclose(x0, np.clip(prediction.x0, -1, 1), rtol=1e-6)
        np.testing.assert_allclose(spread, np.sqrt(prediction.var_x0), rtol=1e-6)
    assert (np.diff(std.mean(axis=(1, 2, 3, 4))) <= 1e-7).all()      # ever more certain
    if steps == 10:                                          # it is the way to the images that sampling gives
        np.testing.assert_allclose(mean[-1], drawn(2), rtol=1e-5, atol=1e-6)


def test_runs_on_a_device(fake):
    host = drawn(3)
    images = draw_images(gaussian(), SCHEDULE, SHAPE, 3, Alone(fake), steps=10, variance="learned", chunk=2)
    assert isinstance(images, np.ndarray)
    np.testing.assert_allclose(images, host, atol=1e-5)
    seen = trajectory(gaussian(), SCHEDULE, SHAPE, 2, steps=5, variance="learned", xp=fake)
    ours = trajectory(gaussian(), SCHEDULE, SHAPE, 2, steps=5, variance="learned")
    assert seen[0] == ours[0]
    for a, b in zip(seen[1:], ours[1:], strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
