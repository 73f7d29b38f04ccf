"""DDIM: steps that keep every marginal of the noising chain, with as much or as little fresh noise as one likes (C16).

Write x_t = l_t x_0 + n_t eps with n_t = sqrt(sigma2_bar_t). Take any variance 0 <= var <= n_s^2 and put the rest of
x_s's noise on the eps that is already in x_t:

    x_s = l_s x_0 + sqrt(n_s^2 - var) eps + sqrt(var) noise

Given x_0 that is N(l_s x_0, n_s^2) again, whatever var is: the marginals are those of the chain, the joint isn't. As a
function of x_0 and x_t, with r = sqrt(n_s^2 - var)/n_t, it is a Posterior like the chain's own:

    a = l_s - r l_t,   b = r,   var = eta^2 times the chain's posterior variance

eta = 1 is the chain's posterior itself, so that the sampler is DDPM; eta = 0 draws no noise at all, and is a step of
first order along the probability-flow ODE.
"""

import math

from ddpm.posterior import Posterior
from ddpm.samplers.ancestral import chain


def ddim(denoiser, schedule, x_T, *, timesteps, eta=0.0, rng=None, clip=None, callback=None):
    """Draw x_0 from x_T by DDIM over any descending `timesteps` (C16).

    Parameters
    ----------
    denoiser, schedule, x_T, timesteps, clip, callback
        As for `ddpm.samplers.ddpm`.
    eta : float
        0 for no noise, 1 for DDPM's.
    rng : generator with `standard_normal`
        Needed for eta > 0 only.

    Returns
    -------
    x_0, shaped as x_T. ValueError for eta < 0, for an eta that asks a step for more noise than x_s has, and for
    eta > 0 without rng.
    """
    if eta > 0 and rng is None:
        raise ValueError("eta > 0 draws noise: pass rng, or use eta = 0")

    def step(prediction, x_t, s, t):
        posterior = ddim_posterior(s, t, schedule, eta)
        return posterior.mean(prediction.x0, x_t), posterior.var

    return chain(denoiser, schedule, x_T, timesteps=timesteps, step=step, rng=rng, clip=clip, callback=callback)


def ddim_posterior(s, t, schedule, eta=0.0):
    """Posterior(a, b, var) of x_s | x_t, x_0 with var = eta^2 times the chain's, for ints 0 <= s < t (C16).

    ValueError for eta < 0, and where var would exceed sigma2_bar_s.
    """
    chains, room = schedule.posterior(s, t).var, schedule.sigma2_bar[s]
    var = eta**2 * chains
    if eta < 0 or var > room * (1 + 1e-12):
        raise ValueError(f"eta must be at least 0, and at most {math.sqrt(room / chains):.3g} for the step from {t} to "
                         f"{s}, because x_{s} has no more noise; got {eta}")
    r = math.sqrt(max(room - var, 0.0) / schedule.sigma2_bar[t])
    return Posterior(a=schedule.lam_bar[s] - r * schedule.lam_bar[t], b=r, var=var)
