"""Ways to know the spread of x_0 | x_t without modelling it: what a denoiser trained for its mean already says.

A reverse step x_s | x_t has covariance var I + a^2 Cov[x_0 | x_t] (G03), and the mean of x_0 doesn't say the second
part. It is in the derivative of the mean (C08), in second moments of the noise (C10), and in averages of either. One
file each:

                    estimates                          learns             passes beyond the mean's
    analytic        one number for each t (C06, C09)   nothing            none
    squared_noise   each coordinate (C10)              E[eps^2 | x_t]     that of its head
    residual        each coordinate (C10)              E[r^2 | x_t]       that of its head
    hutchinson      each coordinate (C11)              nothing            a forward and a backward one per probe
    ocm             each coordinate (C12)              the diagonal       that of its head

with r = eps - eps_hat. Not here: the two variances that depend on the times only (C04, `ddpm.ddpm.fixed_variance`), the
one learned between these (C05, `ddpm.iddpm`), the one learned from the bound (G06, `ddpm.gddm`), and the whole matrix,
which takes a backward pass for each coordinate (C08, `ddpm.tweedie`).

All but the first speak of Var[eps | x_t], which stays of the order of one where Var[x_0 | x_t] is multiplied by
sigma2_bar_t / lam_bar_t^2, and none clips: `var_x0` does both.
"""

from ddpm.covariance import analytic, hutchinson, ocm, residual, squared_noise
from nn.backend import array_module, per_example

__all__ = ["analytic", "hutchinson", "ocm", "residual", "squared_noise", "var_x0"]


def var_x0(var_eps, t, schedule, largest=None):
    """Var[x_0 | x_t] = (sigma2_bar_t / lam_bar_t^2) Var[eps | x_t], clipped to [0, largest]; shaped as var_eps (C08).

    An estimate may be negative, a variance not. Data in [low, high] have variances up to ((high - low) / 2)^2, 1 for
    images in [-1, 1]; None sets no upper end. Var[eps | x_t] itself has no such bound: between two modes it exceeds 1.
    """
    factor = per_example(schedule.sigma2_bar[t] / schedule.lam_bar[t]**2, var_eps)
    return array_module(var_eps).clip(factor * var_eps, 0, largest)
