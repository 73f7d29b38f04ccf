"""What a sampler, an uncertainty or a metric sees of a model: `predict(x_t, t) -> Prediction`, never a network.

A denoiser speaks of the noise and of the clean image at once; with x_t = lam_bar_t x_0 + sqrt(sigma2_bar_t) eps each
follows from the other, E[x_0 | x_t] = (x_t - sqrt(sigma2_bar_t) E[eps | x_t]) / lam_bar_t (L22).
"""

from typing import Any, NamedTuple

import numpy as np

from ddpm.gddm import data_to_noise
from ddpm.parameterization import x0_from_eps
from nn.backend import per_example


class Prediction(NamedTuple):
    """What a model says about x_t, all shaped as x_t: eps and x0 are means, the rest is None where it isn't modelled.

    var_eps and var_x0 are a GDDM's variances of the noise and of x_0 (G04); v is an I-DDPM's second head (C05).
    """

    eps: Any
    x0: Any
    var_x0: Any = None
    var_eps: Any = None
    v: Any = None


class Denoiser:
    """A denoiser made of functions; models built on networks override `predict` and `vjp`.

    Attributes
    ----------
    schedule : NoiseSchedule
    evaluations, vjps : int
        Calls of `predict` and of `vjp` so far, counted in images: a batch of N counts N, however images are stacked.
    passes : int
        What they cost in passes through a network, evaluations + 2 vjps: a vjp is a forward pass and the backward pass
        through it. Divided by the number of samples, it is the price of a method.
    """

    def __init__(self, schedule, predict=None, vjp=None, covariance=None):
        self.schedule, self._predict, self._vjp, self._covariance = schedule, predict, vjp, covariance
        self.evaluations = self.vjps = 0

    @property
    def passes(self):
        return self.evaluations + 2 * self.vjps

    @classmethod
    def from_eps(cls, fn, schedule, vjp=None):
        """Wrap `fn(x_t, t)`, the predicted noise, and optionally `vjp(x_t, t, v)`, the row vectors v d fn/d x_t."""
        def predict(x_t, t):
            eps = fn(x_t, t)
            return Prediction(eps=eps, x0=x0_from_eps(eps, x_t, t, schedule))
        return cls(schedule, predict, vjp)

    @classmethod
    def from_moments(cls, fn, schedule, vjp=None, covariance=None):
        """Wrap `fn(x_t, t) -> (mean_x0, var_x0)`, both shaped as x_t; `vjp` as in `from_eps`.

        `covariance(x_t, t)` may give all of Cov[x_0 | x_t], (N, D, D).
        """
        def predict(x_t, t):
            x0, var_x0 = fn(x_t, t)
            eps, var_eps = data_to_noise(x0, var_x0, x_t, t, schedule)
            return Prediction(eps=eps, x0=x0, var_x0=var_x0, var_eps=var_eps)
        return cls(schedule, predict, vjp, covariance)

    @classmethod
    def from_world(cls, world, schedule):
        """The exact denoiser of a world with `posterior_x0(x_t, t, schedule) -> (mean (N, D), cov (N, D, D))`.

        x_t is (N, D); of the covariance `predict` gives the diagonal, and `covariance_x0` all. The Jacobian of
        E[eps | x_t] is symmetric, (I - Cov[eps | x_t]) / sqrt(sigma2_bar_t), so that `vjp` is exact too (C08).
        """
        def moments(x_t, t):
            mean, cov = world.posterior_x0(x_t, t, schedule)
            return mean, cov.diagonal(axis1=1, axis2=2)

        def covariance(x_t, t):
            return world.posterior_x0(x_t, t, schedule)[1]

        def vjp(x_t, t, v):
            _, cov = world.posterior_x0(x_t, t, schedule)
            n, snr = per_example(np.sqrt(schedule.sigma2_bar[t]), v), per_example(schedule.snr[t], v)
            return (v - snr * (cov @ v[:, :, None])[:, :, 0]) / n
        return cls.from_moments(moments, schedule, vjp, covariance)

    def predict(self, x_t, t):
        """Prediction for x_t at the time t >= 1, an int or an (N,) integer array on the host."""
        if self._predict is None:
            raise NotImplementedError("a Denoiser needs a predict function: use from_eps, or override predict")
        self.evaluations += len(x_t)
        return self._predict(x_t, t)

    def vjp(self, x_t, t, v):
        """v times the Jacobian d eps/d x_t, shaped as x_t. NotImplementedError where the model has no derivative."""
        if self._vjp is None:
            raise NotImplementedError("this denoiser has no vjp: pass vjp= to from_eps, or use one built on a network")
        self.vjps += len(x_t)
        return self._vjp(x_t, t, v)

    def covariance_x0(self, x_t, t):
        """Cov[x_0 | x_t], (N, D, D), exact; it counts as an evaluation. NotImplementedError where it isn't known."""
        if self._covariance is None:
            raise NotImplementedError("this denoiser doesn't know the covariance of x_0: use one from_world, or what a "
                                      "vjp gives, reverse_covariance(\"full\")")
        self.evaluations += len(x_t)
        return self._covariance(x_t, t)
