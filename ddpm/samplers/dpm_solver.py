"""DPM-Solver++: the probability-flow ODE, solved with what is known of it in closed form (second order, multistep).

With x_t = l x_0 + n eps and h = log(l/n), half the log of the signal-to-noise ratio, the flow is d(x/n)/dh = e^h x0_hat
with x0_hat = E[x_0 | x]. If that stays as it is over a step from t to s, the integral is closed, and is DDIM's step:

    x_s = (n_s/n_t) x_t + (l_s - l_t n_s/n_t) x0_hat                                                 order 1

The prediction moves, though, nearly along a line in h; the value half-way through the step, extrapolated from this
prediction and the last one,

    x0_hat + (x0_hat - x0_hat_before) (h_s - h_t) / (2 (h_t - h_before)),                            order 2

is what a midpoint rule wants: the error of a whole path falls with the square of the step, for the same passes. Steps
of very different length in h spoil that. The first step and the last (to s = 0, where h is infinite) are of order 1.
"""

import numpy as np

from ddpm.samplers.ancestral import chain
from ddpm.samplers.ddim import ddim_posterior


def dpm_solver_pp(denoiser, schedule, x_T, *, timesteps, order=2, clip=None, callback=None):
    """Carry x_T to x_0 along the probability flow by DPM-Solver++; no randomness but that of x_T (U13).

    Parameters
    ----------
    denoiser, schedule, x_T, timesteps, clip, callback
        As for `ddpm.samplers.ddpm`.
    order : 1 or 2
        1 is DDIM with eta = 0.

    Returns
    -------
    x_0, shaped as x_T. ValueError for another order.
    """
    if order not in (1, 2):
        raise ValueError(f"order must be 1 or 2, got {order!r}")
    with np.errstate(divide="ignore"):
        h = 0.5 * np.log(schedule.snr)
    before = None                                                       # (time, prediction) of the step before

    def step(prediction, x_t, s, t):
        nonlocal before
        x0 = prediction.x0
        if order == 2 and before is not None and s > 0:
            x0 = x0 + float((h[s] - h[t]) / (2 * (h[t] - h[before[0]]))) * (x0 - before[1])
        before = t, prediction.x0
        return ddim_posterior(s, t, schedule).mean(x0, x_t), None

    return chain(denoiser, schedule, x_T, timesteps=timesteps, step=step, rng=None, clip=clip, callback=callback)
