"""Training on points of an exact world, and measuring what was learned against the closed form (G08).

An image model can't be asked how far its Var[x_0 | x_t] is from the truth, because nobody knows the truth. On a
mixture of Gaussians it is known at every point and every time, so a small network trained on samples of the mixture,
by the objective that trains the images, shows what that objective finds:

    posterior         E[x_0 | x_t] and Var[x_0 | x_t]                 the pair (s, t) with s = 0
    reverse step      a E[x_0 | x_t] + b x_t and var + a^2 Var[x_0 | x_t]        any other s < t (G03)

What is trained may be a whole model, or only what a model says of the spread, around a mean that stays as it is: a
head (`fit_head`), or a model's own variance (`fit_variance`). Around the exact mean all that is missing is theirs.

Errors are relative to what cannot be predicted, and so the same for x_0 and for the noise: the two differ in the factor
sqrt(sigma2_bar_t) / lam_bar_t, mean and standard deviation alike (G04).
"""

import math
from typing import NamedTuple

import numpy as np

from ddpm import gaussian, gddm, heads
from ddpm.covariance import ocm
from ddpm.models import OUTPUTS, Batch, find_objective
from ddpm.network_denoiser import NetworkDenoiser, network_input
from ddpm.randomness import generator
from nn.backend import array_module
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


# ---- the training

def fit_points(world, schedule, objective, *, model="gddm", hidden=(64, 64, 64), seed=0, **training):
    """Train an MLP on points of `world` (fresh ones at every step) and return it as a NetworkDenoiser.

    Parameters
    ----------
    world : GaussianMixture, or anything with means (K, D) and `sample(n, rng) -> (n, D)`
    objective : function
        As in `ddpm.models` (`find_objective` gets one by name). Points are not quantised: bin_width is None.
    model : "ddpm", "iddpm" or "gddm"
        How the network's output is read; the objective has to be one of its own.
    training
        Options of `train_on_points`.
    """
    network = _network(world, OUTPUTS[model], hidden, generator(seed, "weights"))

    def loss(output, batch, step):
        return objective(output, batch, schedule, None)

    train_on_points(network, loss, world, schedule, seed=seed, **training)
    return NetworkDenoiser(network, model, schedule)


def fit_head(kind, denoiser, world, schedule, *, probes=1, hidden=(64, 64, 64), seed=0, **training):
    """Train a head that learns the spread of the noise, and hold the denoiser fixed, exact or not (C10, C12).

    Parameters
    ----------
    kind : "sn", "npr" or "ocm"
        See `ddpm.heads`. ValueError for another.
    denoiser : Denoiser
        What npr takes the residuals of, and ocm the Jacobian.
    probes : int >= 1, for "ocm"
        Random probes at each point.
    world, training
        As for `fit_points`.

    Returns
    -------
    head(x_t, t), shaped as x_t: what `ddpm.covariance.reverse_covariance(kind, head=head)` takes.
    """
    if kind not in heads.HEADS:
        raise ValueError(f"kind must be one of {', '.join(heads.HEADS)}, not {kind!r}")
    network = _network(world, 1, hidden, generator(seed, "head", kind))

    def loss(raw, batch, step):
        eps_hat = targets = None
        if kind == "npr":
            eps_hat = denoiser.predict(batch.x_t, batch.t).eps
        if kind == "ocm":
            rng = generator(seed, "probes", step)
            targets = ocm.draw_targets(denoiser.vjp, batch.x_t, batch.t, probes, rng, schedule)
        return heads.loss(kind, raw, batch.eps, eps_hat, batch.t, schedule, targets)

    train_on_points(network, loss, world, schedule, seed=seed, **training)
    network.eval()
    return lambda x_t, t: heads.statistic(kind, network(network_input(x_t, t, schedule), t), t, schedule)


def fit_variance(model, denoiser, world, schedule, objective=None, *, hidden=(64, 64, 64), seed=0, **training):
    """Train a model's own variance around the mean of another denoiser, which is held fixed (C05, G06).

    Parameters
    ----------
    model : "iddpm" or "gddm"
    objective : function
        One of the model's own, its default unless given; what it says of the mean is dropped.
    denoiser, world, training
        As for `fit_head`.

    Returns
    -------
    MeanWithVariance, for the variance "learned".
    """
    objective = objective or find_objective(model)
    network = _network(world, 1, hidden, generator(seed, "variance", model))

    def loss(raw, batch, step):
        values, gradient = objective(_beside(denoiser.predict(batch.x_t, batch.t).eps, raw), batch, schedule, None)
        return values, gradient[..., raw.shape[-1]:]

    train_on_points(network, loss, world, schedule, seed=seed, **training)
    return MeanWithVariance(denoiser, network, model, schedule)


class MeanWithVariance(NetworkDenoiser):
    """The mean of one denoiser, and beside it a network that gives the second half of a model's output only."""

    def __init__(self, mean, network, model, schedule):
        super().__init__(network, model, schedule)
        self.mean = mean

    def vjp(self, x_t, t, v):
        self.vjps += len(x_t)
        return self.mean.vjp(x_t, t, v)

    def _output(self, x_t, t, labels):
        return _beside(self.mean.predict(x_t, t).eps, super()._output(x_t, t, labels))


def train_on_points(network, loss, world, schedule, *, steps=3000, batch_size=512, lr=2e-3, ema=0.995, clip=1.0, seed=0,
                    progress=None):
    """Train `network` in place, on fresh points of `world` at every step, and leave it with averaged weights.

    Parameters
    ----------
    network : Module
        Called as network(network_input(x_t, t, schedule), t).
    loss : function (output, Batch, step) -> (values (N,), gradient of their sum wrt output)
    lr : float
        Falls to 0 along half a cosine.
    ema, clip : float
        Decay of the average of the weights, and largest norm of a gradient.
    progress : function, optional
        Called as progress(step, mean loss of the batch).
    """
    adam, average = Adam(network, lr), EMA(network, ema)
    for step in range(steps):
        batch = _draw(world, schedule, batch_size, generator(seed, "points", step))
        output = network(network_input(batch.x_t, batch.t, schedule), batch.t)
        values, gradient = loss(output, batch, step)
        network.zero_grad()
        network.backward((gradient / batch_size).astype(output.dtype))
        clip_grad_norm(network, clip)
        adam.lr = lr * 0.5 * (1 + math.cos(math.pi * step / steps))
        adam.step()
        average.update()
        if progress:
            progress(step + 1, float(values.mean()))
    average.swap()


def _network(world, outputs, hidden, rng):
    """An MLP with `outputs` numbers for each coordinate of the world."""
    dim = world.means.shape[1]
    return MLP(dim, outputs * dim, hidden=hidden, rng=rng)


def _beside(eps, head):
    """The output of a model with two halves, in the precision of the second."""
    return array_module(head).concatenate([eps.astype(head.dtype), head], axis=-1)


def _draw(world, schedule, n, rng):
    """n points, each with a uniform time t in 1..T, its noise, and a uniform earlier time s."""
    x0 = world.sample(n, rng).astype(np.float32)
    eps = rng.standard_normal(x0.shape, dtype=np.float32)
    t = rng.integers(1, schedule.T + 1, n)
    return Batch(x0, eps, schedule.add_noise(x0, t, eps), t, rng.integers(0, t))


# ---- the measure

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
