"""Nine Gaussians on a grid in five and ten steps: what each covariance is worth, in nats, against known values (C17).

A term of the bound is quadratic in x_0, whose law given x_t has a known mean and covariance: four points with those
moments integrate x_0 out exactly, and only x_t is drawn. Of a turned grid the diagonal isn't all, of an upright it is.
"""

import numpy as np
import pytest

from ddpm import elbo
from ddpm.covariance import ReverseCovariance, shapes, sources
from ddpm.denoiser import Denoiser
from ddpm.likelihood import reverse_model
from ddpm.mixture import GaussianMixture
from ddpm.schedule import NoiseSchedule

LINEAR, N = NoiseSchedule.linear(1000), 20_000
WORLDS = {"grid": GaussianMixture.grid(), "turned": GaussianMixture.grid(rotation_degrees=30)}
ENTROPY = np.log(9) + np.log(2 * np.pi * np.e * 0.01)
FULL = ReverseCovariance(sources.of_world)


def four_points(mean, cov):
    """Points (4, N, 2) of mean `mean` and covariance `cov`."""
    return np.stack([mean + shapes.root_times(cov, np.broadcast_to(np.sqrt(2) * sign * e, mean.shape))
                     for e in np.eye(2) for sign in (-1, 1)])


def bound(world, K, variance, decoder="model"):
    """The negative bound in nats and its standard error, over N draws of x_t at each time."""
    rng, denoiser, times = np.random.default_rng(K), Denoiser.from_world(world, LINEAR), LINEAR.timesteps(K)
    reverse = reverse_model(denoiser, LINEAR, variance, decoder=decoder)
    x0 = four_points(np.zeros((1, 2)), world.cov()[None])[:, 0]
    total, square = elbo.prior_kl(x0, LINEAR).sum(axis=1).mean(), 0.0
    for t, s in zip(times, [*times[1:], 0], strict=True):
        x_t = world.noised(t, LINEAR).sample(N, rng)
        mean, var = reverse(x_t, s, t)
        points = four_points(*world.posterior_x0(x_t, t, LINEAR))
        nats = np.mean([(elbo.step_kl(x0, x_t, mean, var, s, t, LINEAR) if s else
                         elbo.decoder_nats(x0, mean, var, bin_width=None)).reshape(N, -1).sum(axis=1)
                        for x0 in points], axis=0)
        total, square = total + nats.mean(), square + nats.var() / N
    return total, np.sqrt(square)


def averages(world, K):
    """E tr Cov[x_0 | x_t] / 2 at the times of a chain, from draws of its own."""
    rng, table = np.random.default_rng(100 + K), np.zeros(LINEAR.T + 1)
    for t in LINEAR.timesteps(K):
        x_t = world.noised(t, LINEAR).sample(2 * N, rng)
        table[t] = world.posterior_x0(x_t, t, LINEAR)[1].trace(0, 1, 2).mean() / 2
    return ReverseCovariance(sources.table(table))


METHODS = {"large": lambda world, K: "large", "small": lambda world, K: "small", "average": averages,
           "diagonal": lambda world, K: "learned", "full": lambda world, K: FULL}
ANCHORS = {("grid", "large"): (5.121, 3.484), ("grid", "small"): (5352, 99.4), ("grid", "average"): (4.215, 1.415),
           ("grid", "diagonal"): (3.063, 0.880), ("turned", "diagonal"): (3.538, 1.023),
           ("turned", "full"): (3.061, 0.878)}


@pytest.mark.parametrize("where, variance", ANCHORS)
@pytest.mark.parametrize("K", [5, 10])
def test_C17_nats_in_few_steps(where, variance, K):
    """Within 4 standard errors, ours and those of the values; the fixed variances with the decoder "small"."""
    world, anchor = WORLDS[where], ANCHORS[where, variance][K == 10]
    found, error = bound(world, K, METHODS[variance](world, K), "small" if variance in ("large", "small") else "model")
    theirs = error if variance == "small" else {5: 0.009, 10: 0.015 if variance == "average" else 0.005}[K]
    assert abs(found - anchor) < 4 * np.hypot(error, theirs)
    assert found > ENTROPY and error < 0.02 * anchor


def test_C14_C17_upright_the_diagonal_is_all_and_turned_it_is_not():
    upright, turned = ([bound(world, 5, v)[0] for v in ("learned", FULL)] for world in WORLDS.values())
    assert upright[0] == pytest.approx(upright[1], rel=1e-9)
    assert turned[0] > turned[1] + 0.4
    assert bound(WORLDS["turned"], 5, averages(WORLDS["turned"], 5))[0] > turned[0] + 0.4
