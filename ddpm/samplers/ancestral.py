"""Ancestral sampling: x_T -> ... -> x_0, each x_s drawn from the model's Gaussian for x_s | x_t (L05, C15).

For any two times s < t the mean is a x_0_hat + b x_t with the posterior's a and b, and only the variance is a choice:

    "small"    var          the posterior variance, as if x_0 were known
    "large"    sigma2_ts    the noising step's own
    "learned"  var + a^2 Var[x_0 | x_t]  (G03), or between the two by an I-DDPM's v (C05)

The step to s = 0 returns the mean. `chain` is the loop itself; another sampler is another `step` for it.
"""

from typing import Any, NamedTuple

from ddpm.ddpm import fixed_variance
from ddpm.gddm import reverse_moments
from ddpm.iddpm import reverse_log_variance
from ddpm.parameterization import eps_from_x0
from ddpm.randomness import normal_like
from nn.backend import array_module


class Step(NamedTuple):
    """One step t -> s as a callback sees it: x_s = mean + sqrt(var) noise (x_s = mean at s = 0).

    prediction is the denoiser's at (x_t, t), after clipping; var is a float or an array shaped as x_t.
    """

    x_t: Any
    x_s: Any
    t: int
    s: int
    prediction: Any
    mean: Any
    var: Any


def ddpm(denoiser, schedule, x_T, *, timesteps, variance, rng, clip=None, callback=None):
    """Draw x_0 by ancestral sampling over any descending `timesteps` (L05, C15).

    Parameters
    ----------
    denoiser : anything with predict(x_t, t) -> Prediction
    x_T : array (N, ..., C)
        Where the chain starts, at t = timesteps[0]: standard normal noise times schedule.marginal_var[t]**0.5, which is
        1 where variance preserving, or a draw of x_t itself.
    timesteps : descending integers in 1..T, as from `schedule.timesteps`; 0 follows by itself
    variance : "large", "small", "learned" or a function (prediction, s, t) -> float or array shaped as x_t
    rng : numpy Generator, CuPy Generator or SampleStreams
        Anything with standard_normal(shape, dtype=...); host draws are moved to x_T's side.
    clip : (lo, hi) or None
        Clamp the predicted x_0; (-1, 1) for images.
    callback : function of a Step, called after each step, or None

    Returns
    -------
    x_0, shaped as x_T. ValueError for bad timesteps, and for "learned" with a model that has no variance.
    """
    if not callable(variance) and variance not in ("large", "small", "learned"):
        raise ValueError(f'variance must be "large", "small", "learned" or a function, not {variance!r}')

    def step(prediction, x_t, s, t):
        mean = schedule.posterior(s, t).mean(prediction.x0, x_t)
        if callable(variance):
            return mean, variance(prediction, s, t)
        if variance == "learned":
            return mean, learned_variance(prediction, x_t, s, t, schedule)
        return mean, fixed_variance(variance, s, t, schedule) if s > 0 else 0.0

    return chain(denoiser, schedule, x_T, timesteps=timesteps, step=step, rng=rng, clip=clip, callback=callback)


def learned_variance(prediction, x_t, s, t, schedule):
    """The model's own variance of x_s | x_t: from var_x0 (G03) or from v (C05). ValueError where it has neither."""
    if prediction.var_x0 is not None:
        return reverse_moments(prediction.x0, prediction.var_x0, x_t, s, t, schedule)[1]
    if prediction.v is not None:
        return array_module(x_t).exp(reverse_log_variance(prediction.v, s, t, schedule))
    raise ValueError('variance "learned" needs a model with a variance (gddm or iddpm); use "large" or "small"')


def chain(denoiser, schedule, x_T, *, timesteps, step, rng, clip=None, callback=None):
    """The loop that samplers share: predict, clip, `step(prediction, x_t, s, t) -> (mean, var)`, add the noise.

    `var` is a float or an array; no noise is drawn at s = 0, nor where var is None or the number 0.
    """
    times = _check_timesteps(timesteps, schedule)
    x_t = x_T
    for t, s in zip(times, [*times[1:], 0], strict=True):
        prediction = denoiser.predict(x_t, t)
        if clip is not None:
            prediction = clip_x0(prediction, x_t, t, schedule, clip)
        mean, var = step(prediction, x_t, s, t)
        deterministic = s == 0 or var is None or isinstance(var, float | int) and var == 0
        x_s = mean if deterministic else mean + var**0.5 * normal_like(x_t, rng)
        if callback is not None:
            callback(Step(x_t, x_s, t, s, prediction, mean, var))
        x_t = x_s
    return x_t


def clip_x0(prediction, x_t, t, schedule, clip):
    """The prediction with x_0 clamped to (lo, hi), and the noise that belongs to the clamped x_0."""
    x0 = array_module(x_t).clip(prediction.x0, *clip)
    return prediction._replace(x0=x0, eps=eps_from_x0(x0, x_t, t, schedule))


def _check_timesteps(timesteps, schedule):
    times = [int(t) for t in timesteps]
    ends_fit = times and times[0] <= schedule.T and times[-1] >= 1
    if not ends_fit or any(s >= t for t, s in zip(times, times[1:], strict=False)):
        raise ValueError(f"timesteps must be descending integers from at most T={schedule.T} to at least 1, "
                         "as schedule.timesteps(steps) gives them")
    return times
