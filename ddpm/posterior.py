"""The Gaussians x_s | x_t, x_0 that reverse steps are built on: the chain's own, and all that keep its marginals.

Writing x_t | x_s = N(lam_ts x_s, sigma2_ts) and x_s | x_0 = N(lam_bar_s x_0, sigma2_bar_s), completing the square in
x_s gives a Gaussian with precision 1/sigma2_bar_s + lam_ts^2/sigma2_ts. Multiplied out with
sigma2_bar_t = lam_ts^2 sigma2_bar_s + sigma2_ts, nothing divides by sigma2_bar_s, so that s = 0 is legal (E07):

    a   = lam_bar_s sigma2_ts / sigma2_bar_t          weight of x_0
    b   = lam_ts sigma2_bar_s / sigma2_bar_t          weight of x_t
    var = sigma2_bar_s sigma2_ts / sigma2_bar_t       (0 at s = 0: x_0 is then known)

It isn't the only Gaussian that gives x_s its law. The noise in x_s may be fresh, or that of x_t once more, or some of
each: with any variance 0 <= var <= sigma2_bar_s for the fresh part, and r sqrt(sigma2_bar_t) eps for the other,

    x_s = lam_bar_s x_0 + r (x_t - lam_bar_t x_0) + sqrt(var) noise,       r^2 = (sigma2_bar_s - var) / sigma2_bar_t

is N(lam_bar_s x_0, sigma2_bar_s) again, given x_0 (C16). So a = lam_bar_s - r lam_bar_t and b = r. The chain's own var
gives the chain's own a and b; var = 0 is DDIM's step; and with all of the noise fresh, r = 0, x_t is forgotten and x_0
noised anew: `renoise` (C03). The marginals are those of the chain for all of them, the joint law for the first only.
"""

from typing import NamedTuple

import numpy as np

from nn.backend import per_example


class Posterior(NamedTuple):
    """x_s | x_t, x_0 = N(a x_0 + b x_t, var), s < t: floats, or (N,) float64 arrays for (N,) times (L10, G02)."""

    a: float
    b: float
    var: float

    def mean(self, x0, x_t):
        """a x_0 + b x_t, shaped as x_t (L10; with E[x0|x_t] for x_0 it is the reverse mean, L13)."""
        return per_example(self.a, x_t) * x0 + per_example(self.b, x_t) * x_t


def posterior_coefficients(lam_bar_s, sigma2_bar_s, lam_ts, sigma2_ts):
    """Posterior of x_s given x_t and x_0, from the two kernels that meet at x_s (L10, G02)."""
    sigma2_bar_t = lam_ts**2 * sigma2_bar_s + sigma2_ts
    return Posterior(a=lam_bar_s * sigma2_ts / sigma2_bar_t,
                     b=lam_ts * sigma2_bar_s / sigma2_bar_t,
                     var=sigma2_bar_s * sigma2_ts / sigma2_bar_t)


def marginal_preserving(s, t, schedule, var):
    """The Posterior with variance `var` that leaves x_s | x_0 as it is, for 0 <= s < t (C16).

    s and t are ints, or (N,) integer arrays on the host, and var is a float or (N,). ValueError unless s < t and
    0 <= var <= sigma2_bar_s, which is all the noise that x_s has.
    """
    shape = np.shape(schedule.posterior(s, t).var)                      # checks the times
    room, var = np.broadcast_to(schedule.sigma2_bar[s], shape), np.broadcast_to(np.asarray(var, np.float64), shape)
    if np.any(var < 0) or np.any(var > room * (1 + 1e-12)):
        raise ValueError(f"var must lie between 0 and sigma2_bar_s = {room}, the noise that x_s has, got {var}")
    r = np.sqrt(np.maximum(room - var, 0) / schedule.sigma2_bar[t])
    table = schedule.lam_bar[s] - r * schedule.lam_bar[t], r, var
    return Posterior(*(v.copy() if shape else float(v) for v in table))


def renoise(s, t, schedule):
    """x_s | x_0 in place of x_s | x_t, x_0: Posterior(lam_bar_s, 0, sigma2_bar_s) for 0 <= s < t (C03).

    Averaged over the true x_0 | x_t it keeps the law of x_s, but cov(x_s, x_t) is lam_bar_s lam_bar_t Cov[x_0], short
    of the chain's by lam_ts sigma2_bar_s I. So it is not the reverse step of the noising chain (E19), and its mean
    goes with its own variance, not with the chain's (E29). ValueError unless s < t.
    """
    return marginal_preserving(s, t, schedule, schedule.sigma2_bar[s])
