"""The experiment behind G09 and G10: what it measures, on cases whose answers are known."""

import numpy as np
import pytest

from ddpm.denoiser import Denoiser
from ddpm.schedule import NoiseSchedule
from experiments import three_models
from experiments.tables import write_csv
from experiments.training_runs import kept, pixel_frechet
from tests.helpers import zscore

SCHEDULE, SHAPE = NoiseSchedule.cosine(30), (6, 8, 1)


def variance_along(tau2, t):
    """Var[x_0 | x_t] of a pixel that is Gaussian with variance tau2."""
    lam, noise = float(SCHEDULE.lam_bar[t]), float(SCHEDULE.sigma2_bar[t])
    return tau2 * noise / (lam**2 * tau2 + noise)


def gaussian_pixels(mean, tau2, claim=1.0):
    """The exact denoiser of independent Gaussian pixels, (H, W, 1) each; it claims `claim` times its variance."""
    def moments(x_t, t):
        lam, noise = float(SCHEDULE.lam_bar[t]), float(SCHEDULE.sigma2_bar[t])
        gain = lam * tau2 / (lam**2 * tau2 + noise)
        return mean + gain * (x_t - lam * mean), 0 * x_t + claim * variance_along(tau2, t)
    return Denoiser.from_moments(moments, SCHEDULE)


def box(rows, columns):
    """A bright box on black, (H, W, 1)."""
    image = np.full(SHAPE, -0.9)
    image[rows, columns] = 0.9
    return image


LEFT, RIGHT = box(slice(1, 5), slice(1, 3)), box(slice(1, 5), slice(5, 7))


def watched(denoiser, num=6):
    return three_models.uncertainty(denoiser, SCHEDULE, SHAPE, num, seed=0, show=30)


# ---- G10

def test_G10_edges_are_the_length_of_the_gradient():
    down, across = np.mgrid[0:5, 0:7].astype(float)
    ramp = (0.3 * down + 0.4 * across)[None, :, :, None]
    np.testing.assert_allclose(three_models.edge_map(ramp), 0.5, rtol=1e-12)
    np.testing.assert_allclose(three_models.edge_map(np.concatenate([ramp, 0 * ramp], axis=-1)), 0.5 / 2**0.5)
    step = np.where(across < 3, -1.0, 1.0)[None, :, :, None]
    np.testing.assert_array_equal(three_models.edge_map(step)[0], np.where((across == 2) | (across == 3), 1.0, 0.0))
    assert not three_models.edge_map(step * 0 + 0.7).any()


def test_G10_correlation_is_that_of_pixels_map_by_map(rng):
    maps, others = rng.standard_normal((2, 3, 4, 5, 6))
    found = three_models.correlation(maps, others)
    expected = [[np.corrcoef(a.ravel(), b.ravel())[0, 1] for a, b in zip(*rows, strict=True)]
                for rows in zip(maps, others, strict=True)]
    np.testing.assert_allclose(found, expected, rtol=1e-10)
    np.testing.assert_allclose(three_models.correlation(maps, 3 * maps + 1), 1)
    np.testing.assert_allclose(three_models.correlation(maps, -maps), -1)
    assert not three_models.correlation(maps, np.ones_like(maps)).any()      # nothing to go with: 0, not nan


def test_G10_area_is_the_share_of_pixels_that_holds_the_variance(rng):
    one, half = np.zeros((4, 5)), np.zeros((4, 5))
    one[2, 3], half[:2] = 7.0, 0.3
    np.testing.assert_allclose(three_models.area(np.stack([one, half, np.full((4, 5), 5.0)])), [1 / 20, 0.5, 1])
    assert three_models.area(rng.gamma(1.0, size=(100, 100))) == pytest.approx(0.5, rel=0.05)    # (E v)^2 / E v^2


def test_G10_uncertainty_along_trajectories_of_a_known_world():
    """Pixels at the edges of a box vary, the others don't: mean variance in closed form, correlation with the edges."""
    edges = three_models.edge_map(LEFT[None])[0, :, :, None]
    tau2 = 0.001 + 0.004 * edges
    found = watched(gaussian_pixels(LEFT, tau2))
    assert found["t"].tolist() == list(range(30, 0, -1)) and found["variance"].shape == (30, 6)
    expected = [variance_along(tau2, t).mean() for t in found["t"]]
    np.testing.assert_allclose(found["variance"], np.repeat(expected, 6).reshape(30, 6), rtol=1e-5)
    assert (np.diff(found["variance"], axis=0) < 0).all()                    # it contracts
    np.testing.assert_allclose(found["area"][0], three_models.area(tau2[..., 0]), rtol=0.01)
    assert (found["edges"][0] > 0.9).all()
    moved = watched(gaussian_pixels(LEFT, np.roll(tau2, 4, axis=1)))         # controls: in the wrong place,
    np.testing.assert_allclose(moved["variance"], found["variance"], rtol=1e-5)
    assert (moved["edges"][0] < 0.1).all()
    even = watched(gaussian_pixels(LEFT, 0 * tau2 + tau2.mean()))            # and everywhere
    np.testing.assert_allclose(even["edges"], 0, atol=1e-3)
    np.testing.assert_allclose(even["area"], 1, rtol=1e-6)


def test_G10_the_control_looks_at_another_images_edges():
    """Each image is a box on the left or on the right, and unsure at its own edges: another's tell it less."""
    def moments(x_t, t):
        left = (x_t * (LEFT - RIGHT)).sum(axis=(1, 2, 3), keepdims=True) > 0
        x0 = np.where(left, LEFT, RIGHT)
        return x0, float(SCHEDULE.sigma2_bar[t]) * (0.01 + three_models.edge_map(x0)[..., None])
    found = watched(Denoiser.from_moments(moments, SCHEDULE), num=24)
    np.testing.assert_allclose(found["edges"][-1], 1, rtol=1e-6)
    maps = three_models.edge_map(np.stack([LEFT, RIGHT]))
    apart = three_models.correlation(*maps)
    other = found["others"][-1]
    assert apart < 0.2 and set(np.round(other, 6)) == {1.0, np.round(apart, 6)}
    assert other.mean() < 0.9 < found["edges"][-1].mean()


def test_G10_claims_are_held_against_errors(rng):
    mean, tau2 = 0.1 * np.ones(SHAPE), 0.02 + 0.1 * rng.random(SHAPE)
    x0 = (mean + tau2**0.5 * rng.standard_normal((400, *SHAPE)))
    times = np.array([30, 15, 3])
    true, sure = (three_models.reliability(gaussian_pixels(mean, tau2, claim), SCHEDULE, x0, times,
                                           np.random.default_rng(0)) for claim in (1.0, 0.25))
    np.testing.assert_allclose(true["claimed"], [variance_along(tau2, t).mean() for t in times], rtol=1e-6)
    np.testing.assert_allclose(true["error"], true["claimed"], rtol=0.05)
    np.testing.assert_array_equal(sure["error"], true["error"])
    np.testing.assert_allclose(sure["claimed"], true["claimed"] / 4)


# ---- G09

def table(values, case):
    return [{"kind": "run", "model": case[0], "objective": case[1], "seed": seed, "bits_per_dim": value}
            for seed, value in values.items()]


ONE, OTHER = ("gddm", "balanced"), ("iddpm", "hybrid")


def test_G09_mean_and_standard_error(rng):
    values = rng.standard_normal(7)
    mean, error = three_models.mean_and_error(values)
    assert mean == pytest.approx(values.mean()) and error == pytest.approx(values.std(ddof=1) / 7**0.5)
    assert np.isnan(three_models.mean_and_error([2.0])[1]) and three_models.mean_and_error([2.0])[0] == 2
    many = rng.standard_normal((4000, 5))                                    # it is the spread of the mean
    errors = [three_models.mean_and_error(row)[1]**2 for row in many]
    assert np.mean(errors) == pytest.approx(many.mean(axis=1).var(), rel=0.1)


def test_G09_differences_are_taken_at_equal_seed(rng):
    common = 10 * rng.standard_normal(6)
    ours = {seed: common[seed] - 0.5 + 0.1 * rng.standard_normal() for seed in (5, 0, 3, 1, 4)}      # in any order,
    theirs = {seed: common[seed] for seed in range(5)}                                               # not the same
    rows = table(ours, ONE) + table(theirs, OTHER) + [{"kind": "step", "model": ONE[0], "objective": ONE[1], "seed": 0,
                                                       "t": 2, "bits_per_step": 1.0}]
    found = three_models.differences(rows, ONE, OTHER, "bits_per_dim")
    np.testing.assert_allclose(found, [ours[seed] - theirs[seed] for seed in (0, 1, 3, 4)], rtol=1e-12)
    np.testing.assert_allclose(three_models.differences(rows, OTHER, ONE, "bits_per_dim"), -found, rtol=1e-12)
    mean, error = three_models.mean_and_error(found)
    assert abs(mean + 0.5) < 4 * error < 0.4
    apart = [three_models.mean_and_error(list(values.values())) for values in (ours, theirs)]
    assert np.hypot(apart[0][1], apart[1][1]) > 10 * error                   # unpaired, the order couldn't be seen
    assert three_models.differences(rows, ("ddpm", "simple"), OTHER, "bits_per_dim").size == 0


def test_G09_ratios_of_steps_are_taken_at_equal_seed_and_time():
    def steps(case, factor):
        return [{"kind": "step", "model": case[0], "objective": case[1], "seed": seed, "t": t,
                 "bits_per_step": factor * (seed + 1) / t} for seed in range(3) for t in (2.0, 7.5)]
    found = three_models.ratios(steps(ONE, 3.0) + steps(OTHER, 2.0), ONE, OTHER)
    assert set(found) == {2.0, 7.5}
    for mean, error in found.values():
        assert mean == pytest.approx(1.5) and error == pytest.approx(0, abs=1e-12)


def test_G09_frechet_distance_of_pixels(rng):
    """In all components of the pixels, a shift costs its squared length, and a wider spread what Gaussians say."""
    train = rng.standard_normal((4000, 2, 3, 1))
    test = rng.standard_normal((5000, 2, 3, 1))
    assert pixel_frechet(train, test, test) == pytest.approx(0, abs=1e-8)
    assert pixel_frechet(train, test, test + 0.5) == pytest.approx(6 * 0.25, rel=1e-6)
    wider = test.mean(axis=0) + 2 * (test - test.mean(axis=0))
    covariance = np.cov(test.reshape(5000, 6).T)
    assert pixel_frechet(train, test, wider) == pytest.approx(np.trace(covariance), rel=1e-6)        # (2 - 1)^2 tr C
    fresh = [pixel_frechet(train, test, rng.standard_normal((200, 2, 3, 1))) for _ in range(20)]
    assert zscore(np.array(fresh)) > 4                                       # of few samples it is never 0


# ---- what is kept

def test_what_was_measured_is_not_measured_again(tmp_path):
    calls = []

    def measure():
        calls.append(1)
        return {"bits_per_dim": 2.5, "kind": "run"}, {"images": np.arange(6.0).reshape(2, 3)}
    for _ in range(2):
        row, arrays = kept(tmp_path / "case.npz", measure)
        assert row == {"bits_per_dim": 2.5, "kind": "run"} and set(arrays) == {"images"}
        np.testing.assert_array_equal(arrays["images"], np.arange(6.0).reshape(2, 3))
    assert len(calls) == 1


def test_rows_come_back_as_they_were_written(tmp_path):
    rows = [{"kind": "run", "model": "gddm", "seed": 0, "bits_per_dim": 2.123456789012345, "prior": 1e-05},
            {"kind": "step", "model": "gddm", "seed": 3, "t": 7.5, "bits_per_step": -0.25}]
    write_csv(tmp_path / "rows.csv", rows)
    assert three_models.read(tmp_path / "rows.csv") == rows


@pytest.mark.parametrize("value, error, text", [(2.25349, 0.0063, "2.2535 ± 0.0063"), (116.6, 5.53, "116.6 ± 5.5"),
                                                (2404.0, 146.0, "2404 ± 146"), (1.5, float("nan"), "1.500"),
                                                (0.5, 0.0, "0.500")])
def test_errors_have_two_digits(value, error, text):
    assert three_models.shown(value, error) == text
