"""Training on points of an exact world, and measuring what was learned against the closed form (G08).

An image model can't be asked how far its Var[x_0 | x_t] is from the truth, because nobody knows the truth. On a
mixture of Gaussians it is known at every point and every time, so a small network trained on samples of the mixture,
by the objective that trains the images, shows what that objective finds:

    posterior         E[x_0 | x_t] and Var[x_0 | x_t]                 the pair (s, t) with s = 0
    reverse step      a E[x_0 | x_t] + b x_t and var + a^2 Var[x_0 | x_t]        any other s < t (G03)

Errors are relative to what cannot be predicted, and so the same for x_0 and for the noise: the two differ in the factor
sqrt(sigma2_bar_t) / lam_bar_t, mean and standard deviation alike (G04).
"""

import math
from typing import NamedTuple

import numpy as np

from ddpm import gaussian, gddm
from ddpm.models import OUTPUTS, Batch, NetworkDenoiser, network_input
from ddpm.randomness import generator
from nn.ema import EMA
from nn.mlp import MLP
from nn.optim import Adam, clip_grad_norm


class Recovery(NamedTuple):
    """How far a denoiser is from the exact x_s | x_t, over draws of x_t, as fractions.

    mean : root mean square error of the mean, in units of the root mean variance of x_s | x_t
    var : root mean square error of the variance, in units of its root mean square
    ratio : mean variance over the exact mean variance; above 1 the model is less sure than it should be
    nats : mean KL from the Gaussian of the exact moments to the model's. Together with `gaps.gaussian_gap`, which no
        Gaussian escapes, it is the whole divergence from x_s | x_t (G12)
    eps : root mean square error of E[eps | x_t] itself, whatever s is
    """

    s: int
    t: int
    mean: float
    var: float
    ratio: float
    nats: float
    eps: float


def fit_points(world, schedule, objective, *, model="gddm", steps=3000, batch_size=512, lr=2e-3, hidden=(64, 64, 64),
               ema=0.995, clip=1.0, seed=0, progress=None):
    """Train an MLP on points of `world` (fresh ones at every step) and return it as a NetworkDenoiser.

    Parameters
    ----------
    world : GaussianMixture, or anything with means (K, D) and `sample(n, rng) -> (n, D)`
    objective : function
        As in `ddpm.models` (`find_objective` gets one by name). Points are not quantised: bin_width is None.
    model : "ddpm", "iddpm" or "gddm"
        How the network's output is read; the objective has to be one of its own.
    lr : float
        Falls to 0 along half a cosine.
    progress : function, optional
        Called as progress(step, mean loss of the batch).
    """
    dim = world.means.shape[1]
    network = MLP(dim, OUTPUTS[model] * dim, hidden=hidden, rng=generator(seed, "weights"))
    adam, average = Adam(network, lr), EMA(network, ema)
    for step in range(steps):
        batch = _draw(world, schedule, batch_size, generator(seed, "points", step))
        output = network(network_input(batch.x_t, batch.t, schedule), batch.t)
        values, gradient = objective(output, batch, schedule, None)
        network.zero_grad()
        network.backward(gradient / np.float32(batch_size))
        clip_grad_norm(network, clip)
        adam.lr = lr * 0.5 * (1 + math.cos(math.pi * step / steps))
        adam.step()
        average.update()
        if progress:
            progress(step + 1, float(values.mean()))
    average.swap()
    return NetworkDenoiser(network, model, schedule)


def _draw(world, schedule, n, rng):
    """n points, each with a uniform time t in 1..T, its noise, and a uniform earlier time s."""
    x0 = world.sample(n, rng).astype(np.float32)
    eps = rng.standard_normal(x0.shape, dtype=np.float32)
    t = rng.integers(1, schedule.T + 1, n)
    return Batch(x0, eps, schedule.add_noise(x0, t, eps), t, rng.integers(0, t))


def recovery(denoiser, world, pairs, rng, n=20_000):
    """Compare a denoiser that has var_x0 with the exact mean and variance of x_s | x_t: a Recovery per (s, t) (G08).

    `pairs` are (s, t) with 0 <= s < t, s = 0 being the posterior of the clean point. x_t is drawn from the world, `n`
    points for each pair; of a covariance the diagonal is compared. ValueError for a denoiser without a variance.
    """
    return [_compare(denoiser, world, s, t, rng, n) for s, t in pairs]


def _compare(denoiser, world, s, t, rng, n):
    schedule = denoiser.schedule
    x_t = world.noised(t, schedule).sample(n, rng)
    prediction = denoiser.predict(x_t, t)
    if prediction.var_x0 is None:
        raise ValueError("recovery compares variances, and this denoiser has none: use a gddm")
    mean, var = gddm.reverse_moments(prediction.x0, prediction.var_x0, x_t, s, t, schedule)
    reverse = world.reverse(x_t, s, t, schedule)
    true_mean, true_var = reverse.mean(), np.diagonal(reverse.cov(), axis1=1, axis2=2)
    true_eps, _ = gddm.data_to_noise(*world.posterior_x0(x_t, t, schedule), x_t, t, schedule)
    return Recovery(s, t, mean=_rms(mean - true_mean) / float(np.sqrt(true_var.mean())),
                    var=_rms(var - true_var) / _rms(true_var), ratio=float(var.mean() / true_var.mean()),
                    nats=float(gaussian.kl(true_mean, true_var, mean, var).mean()), eps=_rms(prediction.eps - true_eps))


def _rms(x):
    return float(np.sqrt((x * x).mean()))
