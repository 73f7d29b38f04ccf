"""DDIM: steps that keep every marginal of the noising chain, with as much or as little fresh noise as one likes (C16).

Write x_t = l_t x_0 + n_t eps with n_t = sqrt(sigma2_bar_t). Take any variance 0 <= var <= n_s^2 and put the rest of
x_s's noise on the eps that is already in x_t:

    x_s = l_s x_0 + sqrt(n_s^2 - var) eps + sqrt(var) noise

Given x_0 that is N(l_s x_0, n_s^2) again, whatever var is: the marginals are those of the chain, the joint isn't. As a
function of x_0 and x_t, with r = sqrt(n_s^2 - var)/n_t, it is a Posterior like the chain's own:

    a = l_s - r l_t,   b = r,   var = eta^2 times the chain's posterior variance

eta = 1 is the chain's posterior itself, so that the sampler is DDPM; eta = 0 draws no noise at all, and is a step of
first order along the probability-flow ODE.

But x_0 isn't known. The predicted x_0 in its place keeps the mean of x_s | x_t and drops a^2 Cov[x_0 | x_t] of its
covariance, all of it where eta = 0: little for a small step, where a is, and most of what there is to say for a large
one. With it DDIM draws noise too, and Gaussian data keep their marginals over any steps, for any eta.
"""

import math

from ddpm.covariance.methods import as_reverse_covariance
from ddpm.posterior import marginal_preserving
from ddpm.samplers.ancestral import chain


def ddim(denoiser, schedule, x_T, *, timesteps, eta=0.0, rng=None, covariance=None, clip=None, last_variance=None,
         callback=None):
    """Draw x_0 from x_T by DDIM over any descending `timesteps` (C16).

    Parameters
    ----------
    denoiser, schedule, x_T, timesteps, clip, last_variance, callback
        As for `ddpm.samplers.ddpm`.
    eta : float
        0 for no noise but the covariance's, 1 for DDPM's.
    rng : generator with `standard_normal`
        Needed for eta > 0, and with a covariance.
    covariance : str, ReverseCovariance or None
        Add a^2 Cov[x_0 | x_t] from this source to the variance of each step; names and sources as for
        `ddpm.samplers.ddpm`, but not "large", nor an I-DDPM's own, which are no covariances of x_0.

    Returns
    -------
    x_0, shaped as x_T. ValueError for eta < 0, for an eta that asks a step for more noise than x_s has, and for
    noise without rng.
    """
    if rng is None and (eta > 0 or covariance is not None):
        raise ValueError("eta > 0 or a covariance draws noise: pass rng, or use eta = 0 without covariance")

    def posterior(s, t):
        return ddim_posterior(s, t, schedule, eta)

    return posterior_chain(denoiser, schedule, x_T, posterior, covariance, timesteps=timesteps, rng=rng, clip=clip,
                           last_variance=last_variance, callback=callback)


def posterior_chain(denoiser, schedule, x_T, posterior, covariance, **options):
    """The chain of the family's member `posterior(s, t)`, with or without Cov[x_0 | x_t]; options as for `chain`."""
    covariance = None if covariance is None else as_reverse_covariance(covariance)

    def step(prediction, x_t, s, t):
        return posterior(s, t).mean(prediction.x0, x_t), posterior(s, t).var

    def spread(raw, x_t, s, t):
        return covariance(denoiser, raw, x_t, s, t, schedule, posterior(s, t))

    return chain(denoiser, schedule, x_T, step=step, spread=spread if covariance is not None else None, **options)


def ddim_posterior(s, t, schedule, eta=0.0):
    """Posterior(a, b, var) of x_s | x_t, x_0 with var = eta^2 times the chain's, for ints 0 <= s < t (C16).

    ValueError for eta < 0, and where var would exceed sigma2_bar_s.
    """
    chains, room = schedule.posterior(s, t).var, schedule.sigma2_bar[s]
    if eta < 0 or eta**2 * chains > room * (1 + 1e-12):
        raise ValueError(f"eta must be at least 0, and at most {math.sqrt(room / chains):.3g} for the step from {t} to "
                         f"{s}, because x_{s} has no more noise; got {eta}")
    return marginal_preserving(s, t, schedule, eta**2 * chains)
