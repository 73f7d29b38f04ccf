"""Bits per dimension at a price: strata of times against the full sum, in a world where log p is known."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ddpm import elbo
from ddpm.covariance import reverse_covariance
from ddpm.denoiser import Denoiser
from ddpm.likelihood import Bits, evaluate_bits, image_bits, reverse_model, time_strata
from ddpm.network_denoiser import NetworkDenoiser
from ddpm.parallel import Alone, make_group
from ddpm.schedule import NoiseSchedule
from nn.unet import UNet
from tests.helpers import general_schedule, property_test, zscore

SCHEDULE = NoiseSchedule.cosine(30)


def exact(schedule=SCHEDULE, spread=1.0):
    """The exact denoiser of standard normal pixels; `spread` makes its variance of x_0 wrong by that factor."""
    def moments(x_t, t):
        tables = schedule.lam_bar, schedule.sigma2_bar
        lam, noise = (np.reshape(table[t], (-1, 1, 1, 1)).astype(x_t.dtype) for table in tables)
        gain = lam**2 + noise
        return lam / gain * x_t, spread * noise / gain + 0 * x_t
    return Denoiser.from_moments(moments, schedule)


# ---- strata

@property_test
@given(T=st.integers(1, 1500), strata=st.integers(1, 1600))
def test_strata_cover_2_to_T_once(T, strata):
    edges = time_strata(T, strata)
    assert len(edges) - 1 == min(strata, T - 1)
    assert edges[0] == 2 and edges[-1] == T + 1
    assert (np.diff(edges) >= 1).all()


def test_strata_widen_with_t():
    edges = time_strata(1000, 32)
    widths = np.diff(edges)
    assert widths[0] == 1 and widths[-1] > 50 and (edges[1:] / edges[:-1]).max() <= 1.5
    np.testing.assert_array_equal(time_strata(1000, 1), [2, 1001])
    np.testing.assert_array_equal(time_strata(50, 999), np.arange(2, 52))


# ---- the estimate against log p

@pytest.mark.parametrize("strata", [1, 5, 29, 64])
def test_L06_L07_the_exact_model_attains_log_p_with_any_strata(strata, rng):
    """Standard normal pixels of a variance-preserving process: -log p / (D ln 2), on average over data and noise."""
    x0 = rng.standard_normal((400, 3, 3, 2))
    bits = image_bits(exact(), SCHEDULE, x0, variance="learned", bin_width=None, strata=strata, clip=None)
    log_p = -0.5 * (x0**2 + np.log(2 * np.pi)).reshape(400, -1).sum(axis=1)
    difference = bits.total + log_p / (18 * np.log(2))
    assert abs(zscore(difference)) < 4
    assert bits.steps.shape == (min(strata, 29), 400)
    wrong = image_bits(exact(spread=6.0), SCHEDULE, x0, variance="learned", bin_width=None, strata=strata, clip=None)
    assert zscore(wrong.total + log_p / (18 * np.log(2))) > 6                        # a worse model needs more bits
    assert abs(zscore(difference - bits.decoder)) > 6        # every part is needed


@pytest.mark.parametrize("schedule", [NoiseSchedule.variance_exploding(30), NoiseSchedule.sub_variance_preserving(30),
                                      general_schedule(30)], ids=["VE", "sub-VP", "general"])
def test_L06_L07_so_it_does_on_any_schedule(schedule, rng):
    """With the prior that belongs to the schedule; N(0, 1) for x_T would cost a variance-exploding one dearly."""
    x0 = rng.standard_normal((400, 3, 3, 2))
    bits = image_bits(exact(schedule), schedule, x0, variance="learned", bin_width=None, strata=8, clip=None)
    log_p = -0.5 * (x0**2 + np.log(2 * np.pi)).reshape(400, -1).sum(axis=1)
    difference = bits.total + log_p / (18 * np.log(2))
    assert abs(zscore(difference)) < 4
    standard = elbo.prior_kl(x0, schedule, prior_var=1.0).reshape(400, -1).sum(axis=1) / (18 * np.log(2))
    gap = (standard - bits.prior).mean()
    assert gap > 100 if schedule.lam[1] == 1 else gap > 0


@pytest.mark.parametrize("variance", ["large", "small", "learned"])
def test_L09_each_stratum_estimates_its_part_of_the_full_bound(variance, rng):
    """Term by term, against `negative_bound`, whose sum over t is complete; also bin masses, and clipping."""
    x0 = rng.integers(0, 17, (300, 2, 2, 1)) / 8 - 1.0
    options = {"variance": variance, "clip": (-1, 1)}
    edges = time_strata(30, 6)
    full = elbo.negative_bound(x0, reverse_model(exact(), SCHEDULE, variance, (-1, 1)), SCHEDULE, rng, bin_width=1 / 8)
    steps = full.steps[::-1] / (4 * np.log(2))               # row k belongs to t = k + 2
    for strata in (6, 29):
        bits = image_bits(exact(), SCHEDULE, x0, bin_width=1 / 8, strata=strata, seed=1, **options)
        np.testing.assert_allclose(bits.prior, full.prior / (4 * np.log(2)), rtol=1e-9)
        assert abs(zscore(bits.decoder - full.decoder / (4 * np.log(2)))) < 4
        assert abs(zscore(bits.total - full.total / (4 * np.log(2)))) < 4
    six = image_bits(exact(), SCHEDULE, x0, bin_width=1 / 8, strata=6, seed=1, **options)
    for k, (low, high) in enumerate(zip(edges, edges[1:], strict=False)):
        part = steps[low - 2:high - 2].sum(axis=0)
        assert abs(zscore(six.steps[k] - part)) < 4
        if high - low > 2:                                   # the factor (size of the stratum) is needed
            assert abs(zscore(six.steps[k] / (high - low) - part)) > 8
    raw = image_bits(exact(), SCHEDULE, x0, bin_width=1 / 8, strata=6, seed=1, variance=variance, clip=None)
    assert (raw.steps != six.steps).any()


def test_C04_the_large_variance_is_the_learned_one_for_unit_variance_data(rng):
    x0 = rng.integers(0, 17, (50, 2, 2, 1)) / 8 - 1.0
    large, small, learned = (image_bits(exact(), SCHEDULE, x0, variance=v, bin_width=1 / 8).total
                             for v in ("large", "small", "learned"))
    np.testing.assert_allclose(large, learned, rtol=1e-9)
    assert (small > 1.05 * learned).mean() > 0.9
    with pytest.raises(ValueError, match="variance"):
        image_bits(exact(), SCHEDULE, x0, variance="tiny", bin_width=1 / 8)


# ---- chains of fewer steps

@pytest.mark.parametrize("schedule", [SCHEDULE, general_schedule(30)], ids=["cosine", "general"])
@pytest.mark.parametrize("spacing, steps", [("uniform", 5), ("uniform", 30), ("trailing", 4), ("quadratic", 6),
                                            ("uniform", 1)])
def test_C15_C18_bits_of_few_steps_are_the_bound_of_that_chain(spacing, steps, schedule, rng):
    """Term by term against `negative_bound` over the same times; the bound over other times fails it."""
    x0, timesteps = rng.standard_normal((400, 2, 2, 1)), schedule.timesteps(steps, spacing)
    denoiser, dims = exact(schedule), 4 * np.log(2)
    options = {"variance": "small", "bin_width": None, "clip": None}
    reverse = reverse_model(denoiser, schedule, "small")
    full = elbo.negative_bound(x0, reverse, schedule, rng, timesteps, bin_width=None)
    bits = image_bits(denoiser, schedule, x0, timesteps=timesteps, **options)
    assert bits.times.tolist() == [0, *timesteps[::-1]] and bits.steps.shape == (steps - 1, 400)
    np.testing.assert_allclose(bits.prior, full.prior / dims, rtol=1e-9)
    assert abs(zscore(bits.decoder - full.decoder / dims)) < 4
    if steps > 1:
        assert abs(zscore(bits.steps.sum(axis=0) - full.steps.sum(axis=0) / dims)) < 4
        few = image_bits(denoiser, schedule, x0, timesteps=timesteps, strata=2, **options)
        assert abs(zscore(few.total - full.total / dims)) < 4
    if 1 < steps < 30 and schedule is SCHEDULE:             # (on the other one these happen to agree)
        other = image_bits(denoiser, schedule, x0, **options)
        assert abs(zscore(other.total - full.total / dims)) > 6


def test_C15_an_exact_model_of_unit_gaussian_pixels_is_exact_in_any_number_of_steps(rng):
    x0 = rng.standard_normal((400, 3, 3, 2))
    log_p = -0.5 * (x0**2 + np.log(2 * np.pi)).reshape(400, -1).sum(axis=1)
    for steps in (1, 2, 7):
        bits = image_bits(exact(), SCHEDULE, x0, variance="learned", bin_width=None, clip=None,
                          timesteps=SCHEDULE.timesteps(steps))
        assert abs(zscore(bits.total + log_p / (18 * np.log(2)))) < 4
    with pytest.raises(ValueError, match="timesteps must descend"):
        image_bits(exact(), SCHEDULE, x0, variance="learned", bin_width=None, timesteps=[3, 5])


def test_C11_bits_with_probes_do_not_depend_on_the_pieces(rng):
    """Hutchinson's signs are functions of the seed and the image, however a data set is cut."""
    images, network = rng.integers(0, 17, (5, 8, 8, 1)).astype(np.uint8), small_network()
    method = reverse_covariance("hutchinson", rng=np.random.default_rng(9), largest=1.0)
    options = {"variance": method, "timesteps": SCHEDULE.timesteps(4), "decoder": "small"}
    whole = evaluated(network, images, **options)
    for workers, chunk in ((1, 2), (2, 1)):
        np.testing.assert_allclose(evaluated(network, images, workers, chunk, **options).total, whole.total, rtol=1e-4)
    assert (evaluated(network, images, seed=1, **options).total != whole.total).all()


@pytest.mark.parametrize("bin_width", [1 / 8, None])
def test_a_variance_of_0_costs_many_bits_and_not_infinitely_many(bin_width, rng):
    x0 = rng.integers(0, 17, (4, 2, 2, 1)) / 8 - 1.0
    bits = image_bits(exact(spread=0.0), SCHEDULE, x0, variance="learned", bin_width=bin_width, strata=2)
    assert np.isfinite(bits.decoder).all() and bits.decoder.mean() > 100


# ---- an image's bits are its own

def small_network():
    network = UNet(1, 2, base_channels=8, channel_mults=(1, 2), attention_levels=(1,), groups=4, heads=2,
                   rng=np.random.default_rng(0))
    network.flat_parameters[...] += 0.05
    return NetworkDenoiser(network, "gddm", SCHEDULE)


def scale(images):
    return images.astype(np.float32) / 8 - 1


def evaluated(denoiser, images, workers=1, chunk=16, **options):
    options = {"variance": "learned", "bin_width": 1 / 8, "strata": 4} | options
    return evaluate_bits(denoiser, SCHEDULE, images, scale, make_group(workers), chunk=chunk, **options)


@pytest.mark.parametrize("side", [2, 28])
def test_chunks_and_workers_do_not_matter(side, rng):
    images = rng.integers(0, 17, (9, side, side, 1)).astype(np.uint8)
    whole = evaluated(exact(), images)
    for workers, chunk in ((1, 1), (1, 4), (2, 3), (3, 16)):
        other = evaluated(exact(), images, workers, chunk)
        for a, b in zip(whole, other, strict=True):
            np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(evaluated(exact(), images[:4]).total, whole.total[:4])
    tail = image_bits(exact(), SCHEDULE, scale(images[5:]), variance="learned", bin_width=1 / 8, strata=4, first=5)
    np.testing.assert_array_equal(tail.total, whole.total[5:])
    assert (evaluated(exact(), images, seed=1).total != whole.total).all()


def test_chunks_and_workers_do_not_matter_to_a_network(rng):
    """Matrix products of another size may round in another way, so this holds to rounding."""
    images, network = rng.integers(0, 17, (6, 8, 8, 1)).astype(np.uint8), small_network()
    whole = evaluated(network, images)
    np.testing.assert_array_equal(evaluated(network, images).total, whole.total)
    for workers, chunk in ((1, 1), (2, 2)):
        np.testing.assert_allclose(evaluated(network, images, workers, chunk).total, whole.total, rtol=1e-4)


def test_a_pass_per_stratum_and_one_for_the_decoder(rng):
    d, seen = exact(), []
    evaluated(d, rng.integers(0, 17, (5, 2, 2, 1)).astype(np.uint8), chunk=2, progress=seen.append)
    assert d.evaluations == 5 * (4 + 1) and seen == [2, 2, 1]
    evaluated(d, rng.integers(0, 17, (5, 2, 2, 1)).astype(np.uint8), 2, chunk=1, progress=seen.append)
    assert sum(seen[3:]) == 5                                # the first rank speaks for all


def test_runs_on_a_device(fake, rng):
    def moments(x_t, t):
        return 0.5 * x_t, 0.1 + 0 * x_t
    d, images = Denoiser.from_moments(moments, SCHEDULE), rng.integers(0, 17, (3, 2, 2, 1)).astype(np.uint8)
    host = evaluated(d, images)
    device = evaluate_bits(d, SCHEDULE, images, lambda v: fake.asarray(scale(v)), Alone(), variance="learned",
                           bin_width=1 / 8, strata=4)
    np.testing.assert_allclose(device.total, host.total, rtol=1e-6)
    for variance in ("large", "small"):
        image_bits(d, SCHEDULE, fake.asarray(scale(images)), variance=variance, bin_width=1 / 8, strata=2)


# ---- the summary

def test_summary_is_means_and_a_standard_error():
    bits = Bits(np.array([1.0, 3.0]), np.array([[1.0, 1.0], [2.0, 0.0]]), np.array([0.5, 0.5]), np.array([2, 3, 9]),
                np.arange(9))
    np.testing.assert_array_equal(bits.total, [4.5, 4.5])
    assert bits.summary() == {"bits_per_dim": 4.5, "prior": 2.0, "steps": 2.0, "decoder": 0.5, "standard_error": 0.0}
    assert all(type(part) is float for part in bits.summary().values()) and json.dumps(bits.summary())
    spread = bits._replace(prior=np.array([1.0, 5.0]))       # totals 4.5 and 6.5
    assert spread.summary()["standard_error"] == pytest.approx(1.0)
    assert np.isnan(Bits(*(a[..., :1] for a in bits[:3]), *bits[3:]).summary()["standard_error"])
