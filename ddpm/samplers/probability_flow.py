"""The probability-flow ODE by Heun's rule: two passes a step, of second order, with the plain ODE in the line (L20).

In x/l against n/l, with l = lam_bar and n = sqrt(sigma2_bar), the flow is d(x/l) / d(n/l) = eps(x, t): whatever the
process, its slope is the predicted noise. Euler's rule takes the slope at the start of a step and is DDIM with eta = 0.
Heun's takes the mean of that and of the slope where Euler's step would end,

    x_s = l_s (x_t/l_t + (n_s/l_s - n_t/l_t) (eps_t + eps_s)/2)

The last step, to s = 0, is Euler's, because there is no noise to predict. `ddpm.flow` solves the same equation to any
tolerance where the score is known at all times, and gives likelihoods; `dpm_solver_pp` is of second order too, with one
pass a step and the step before.
"""

from ddpm.parameterization import x0_from_eps
from ddpm.samplers.ancestral import chain, clip_x0
from ddpm.samplers.ddim import ddim_posterior


def probability_flow(denoiser, schedule, x_T, *, timesteps, clip=None, callback=None):
    """Carry x_T to x_0 along the probability flow by Heun's rule (L20, U13); 2K - 1 passes for K timesteps.

    denoiser, schedule, x_T, timesteps, clip and callback are as for `ddpm.samplers.ddpm`. No randomness but x_T's.
    """
    def step(prediction, x_t, s, t):
        euler = ddim_posterior(s, t, schedule).mean(prediction.x0, x_t)
        if s == 0:
            return euler, None
        there = denoiser.predict(euler, s)
        if clip is not None:
            there = clip_x0(there, euler, s, schedule, clip)
        slope = 0.5 * (prediction.eps + there.eps)
        return ddim_posterior(s, t, schedule).mean(x0_from_eps(slope, x_t, t, schedule), x_t), None

    return chain(denoiser, schedule, x_T, timesteps=timesteps, step=step, rng=None, clip=clip, callback=callback)
