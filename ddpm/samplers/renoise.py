"""Re-noising: predict x_0, and noise it anew to the next time, forgetting x_t (C03).

The step is the member of the marginal-preserving family with all of x_s's noise fresh, a = lam_bar_s, b = 0 and
var = sigma2_bar_s. With Cov[x_0 | x_t] added, Gaussian data keep their marginals over any steps. Without it this member
loses the most, since its a is the largest of all; and with or without, it isn't the reverse step of the noising chain
(E19): it forgets which of the possible x_0 it was on the way to.
"""

from ddpm import posterior
from ddpm.samplers.ddim import posterior_chain


def renoise(denoiser, schedule, x_T, *, timesteps, rng, covariance=None, clip=None, last_variance=None, callback=None):
    """Draw x_0 from x_T by predicting and re-noising over any descending `timesteps` (C03); arguments as `ddim`'s."""
    def forget(s, t):
        return posterior.renoise(s, t, schedule)

    return posterior_chain(denoiser, schedule, x_T, forget, covariance, timesteps=timesteps, rng=rng, clip=clip,
                           last_variance=last_variance, callback=callback)
