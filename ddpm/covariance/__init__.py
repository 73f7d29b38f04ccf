"""The covariance of a reverse step, beyond its mean: what can be known of Cov[x_0 | x_t], and at what price.

A reverse step x_s | x_t has covariance var I + a^2 Cov[x_0 | x_t] (G03), and the mean of x_0 doesn't say the second
part. It is in the derivative of the mean (C08), in second moments of the noise (C10), and in averages of either. One
file each:

                    estimates                          learns             passes beyond the mean's
    analytic        one number for each t (C06, C09)   nothing            none
    squared_noise   each coordinate (C10)              E[eps^2 | x_t]     that of its head
    residual        each coordinate (C10)              E[r^2 | x_t]       that of its head
    hutchinson      each coordinate (C11)              nothing            a forward and a backward one per probe
    ocm             each coordinate (C12)              the diagonal       that of its head
    jacobian        each, or all pairs (C08)           nothing            a forward and a backward one per coordinate

with r = eps - eps_hat. Elsewhere are the variances that depend on the times only (C04, `ddpm.ddpm.fixed_variance`), the
one learned between these (C05, `ddpm.iddpm`), and the one learned from the bound (G06, `ddpm.gddm`).

All but the first speak of Var[eps | x_t], which stays of the order of one where Var[x_0 | x_t] is multiplied by
sigma2_bar_t / lam_bar_t^2. `sources` brings them to one form, `methods` makes the step's covariance of it, by name,
and `shapes` knows what to do with a number, a diagonal or a matrix.
"""

from ddpm.covariance import analytic, hutchinson, jacobian, methods, ocm, residual, shapes, sources, squared_noise
from ddpm.covariance.analytic import NoiseStatistics, noise_statistics
from ddpm.covariance.methods import METHODS, ReverseCovariance, reverse_covariance
from ddpm.covariance.sources import var_x0

__all__ = ["METHODS", "NoiseStatistics", "ReverseCovariance", "analytic", "hutchinson", "jacobian", "methods",
           "noise_statistics", "ocm", "residual", "reverse_covariance", "shapes", "sources", "squared_noise", "var_x0"]
