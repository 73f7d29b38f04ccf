"""The Bayes posterior x_s | x_t, x_0 of the noising chain: the one Gaussian that every reverse step is built on.

Writing x_t | x_s = N(lam_ts x_s, sigma2_ts) and x_s | x_0 = N(lam_bar_s x_0, sigma2_bar_s), completing the square in
x_s gives a Gaussian with precision 1/sigma2_bar_s + lam_ts^2/sigma2_ts. Multiplied out with
sigma2_bar_t = lam_ts^2 sigma2_bar_s + sigma2_ts, nothing divides by sigma2_bar_s, so that s = 0 is legal (E07):

    a   = lam_bar_s sigma2_ts / sigma2_bar_t          weight of x_0
    b   = lam_ts sigma2_bar_s / sigma2_bar_t          weight of x_t
    var = sigma2_bar_s sigma2_ts / sigma2_bar_t       (0 at s = 0: x_0 is then known)

It isn't the only Gaussian that gives x_s the right law when x_0 is drawn from x_0 | x_t: `renoise` forgets x_t and
noises x_0 anew. Every x_s by itself is as it should be, but x_s and x_t share x_0 alone, and no noise (C03).
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


def renoise(s, t, schedule):
    """x_s | x_0 in place of x_s | x_t, x_0: Posterior(lam_bar_s, 0, sigma2_bar_s) for 0 <= s < t (C03).

    Averaged over the true x_0 | x_t it keeps the law of x_s, but cov(x_s, x_t) is lam_bar_s lam_bar_t Cov[x_0], short
    of the chain's by lam_ts sigma2_bar_s I. So it is not the reverse step of the noising chain (E19), and its mean
    goes with its own variance, not with the chain's (E29). ValueError unless s < t.
    """
    shape = np.shape(schedule.posterior(s, t).var)                      # checks the times
    table = (schedule.lam_bar[s], 0.0, schedule.sigma2_bar[s])
    return Posterior(*(np.full(shape, v) if shape else float(v) for v in table))
