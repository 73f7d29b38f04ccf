"""Guidance: a model that knows labels is pushed towards one of them, at the price of a second pass (C20).

A network that is trained with labels, some of them left out at random, predicts the noise in two ways: eps(x_t, y) with
the label, eps(x_t) without. Classifier-free guidance goes from the second through the first, and on:

    eps_s = eps(x_t) + s [eps(x_t, y) - eps(x_t)]          s = 0: no label, s = 1: the label, s > 1: more than the label

(the 1 + w of papers that write (1 + w) eps(x_t, y) - w eps(x_t) is s). By eps = -sqrt(sigma2_bar_t) score and Bayes'
rule log q(x_t | y) = log q(x_t) + log p(y | x_t) + const, it is the noise that belongs to

    score_s = grad log q(x_t) + s grad log p(y | x_t)       the score of  q(x_t) p(y | x_t)^s, up to a constant factor

so that the difference of the two predictions is the gradient of a classifier, which nobody had to train.

What is drawn with it has an exact law only at s = 0 and s = 1. One might expect q(x_0) p(y | x_0)^s; but noising that
gives q(x_t) E[p(y | x_0)^s | x_t], while guidance follows q(x_t) E[p(y | x_0) | x_t]^s, and the power of an average is
not the average of the powers. For s > 1 it is smaller (Jensen): samples are pushed further from whatever else x_t might
be than that law asks for, and along the flow, where no fresh noise spreads them again, they are less varied too.
"""

import math
from numbers import Real

import numpy as np

from ddpm.denoiser import Denoiser
from ddpm.parameterization import x0_from_eps
from nn.backend import array_module, to_host


class Guided(Denoiser):
    """A denoiser bound to labels, for samplers and metrics, which know of none: eps + scale (eps(label) - eps) (C20).

    Variances (var_x0, var_eps, v) are those of the prediction with the label, or without at scale 0. The mean's line
    can't be drawn through them: Var + scale (Var(label) - Var) is what the second derivative of the guided density
    says, but it is negative where the label makes x_0 certain, and the chain that it would belong to does not exist
    (see above). The label's variance is positive, and exact at scale 1.

    Parameters
    ----------
    denoiser : NetworkDenoiser, MixtureDenoiser or another with predict(x_t, t, labels=None) and vjp(..., labels=None)
        The schedule is its own.
    labels : int or (N,) integers on the host
        One for all rows of x_t, or one for each.
    scale : float >= 0
        ValueError otherwise. At 0 and at 1 a prediction costs one pass, else two; `evaluations` and `vjps` count them.
    """

    def __init__(self, denoiser, labels, scale=1.0):
        if labels is None:
            raise ValueError("labels must be an int or integers, one per example; without any, use the denoiser itself")
        check_scale(scale, "scale")
        super().__init__(denoiser.schedule)
        self.denoiser, self.labels, self.scale = denoiser, labels, float(scale)

    @property
    def predictions(self):
        """Predictions of the network that one guided prediction takes: 1 or 2."""
        return 1 if self.scale in (0, 1) else 2

    def predict(self, x_t, t):
        """The guided prediction for x_t at time t, an int or (N,) host integers."""
        self.evaluations += self.predictions * len(x_t)
        if self.predictions == 1:
            return self.denoiser.predict(x_t, t, self.labels if self.scale else None)
        without, given = self.denoiser.predict(x_t, t), self.denoiser.predict(x_t, t, self.labels)
        eps = without.eps + self.scale * (given.eps - without.eps)
        return given._replace(eps=eps, x0=x0_from_eps(eps, x_t, t, self.schedule))

    def vjp(self, x_t, t, v):
        """v times the Jacobian of the guided eps: the same combination of the two."""
        self.vjps += self.predictions * len(x_t)
        if self.predictions == 1:
            return self.denoiser.vjp(x_t, t, v, self.labels if self.scale else None)
        without, given = self.denoiser.vjp(x_t, t, v), self.denoiser.vjp(x_t, t, v, self.labels)
        return without + self.scale * (given - without)


def check_scale(scale, name):
    """ValueError, naming `name`, unless scale is a finite number >= 0."""
    if not (isinstance(scale, Real) and math.isfinite(scale) and scale >= 0):
        raise ValueError(f"{name} must be a finite number from 0 up (0: no label, 1: the label alone), got {scale}")


# ---- a world where all of this is exact

class MixtureDenoiser(Denoiser):
    """The exact denoiser of a mixture of Gaussians in which the label of a point is its component.

    Given the label, x_0 | x_t is the component's own Gaussian: the mixture's posterior with all weight on one term.

    Parameters
    ----------
    world : GaussianMixture
    schedule : NoiseSchedule
    """

    def __init__(self, world, schedule):
        super().__init__(schedule)
        self.world = world

    def predict(self, x_t, t, labels=None):
        """Exact E and Var of x_0 | x_t, given labels (an int or (N,) host integers in 0..K-1) or none."""
        self.evaluations += len(x_t)
        return self._given(labels).predict(x_t, t)

    def vjp(self, x_t, t, v, labels=None):
        """v times the exact Jacobian of E[eps | x_t], or of E[eps | x_t, label]."""
        self.vjps += len(x_t)
        return self._given(labels).vjp(x_t, t, v)

    def _given(self, labels):
        world = self.world if labels is None else _KnownComponent(self.world, labels)
        return Denoiser.from_world(world, self.schedule)


class _KnownComponent:
    """A mixture seen by someone who is told which component each point came from."""

    def __init__(self, world, labels):
        self.world, self.labels = world, to_host(labels)
        if self.labels.min() < 0 or self.labels.max() >= len(world.weights):
            raise ValueError(f"labels must lie in 0..{len(world.weights) - 1}, one for each component of the mixture")

    def posterior_x0(self, x_t, t, schedule):
        posterior = self.world.posterior_mixture(x_t, t, schedule)
        one_hot = np.broadcast_to(np.eye(len(self.world.weights))[self.labels], posterior.weights.shape)
        posterior = posterior._replace(weights=array_module(x_t).asarray(one_hot))
        return posterior.mean(), posterior.cov()
