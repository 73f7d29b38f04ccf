"""Ancestral sampling: x_T -> ... -> x_0, each x_s drawn from the model's Gaussian for x_s | x_t (L05, C15).

For any two times s < t the mean is a x_0_hat + b x_t with the posterior's a and b, and only the spread is a choice: a
number for all coordinates, one for each, or a matrix. All that is known of it is in `ddpm.covariance`, by name:

    "small"     var          the posterior variance, as if x_0 were known
    "large"     sigma2_ts    the noising step's own
    others      var I + a^2 Cov[x_0 | x_t]  (G03), with a source of the second part; "full" has all of it

The step to s = 0 returns the mean. `chain` is the loop itself; another sampler is another `step` for it.
"""

import math
from typing import Any, NamedTuple

from ddpm.covariance import ReverseCovariance, shapes
from ddpm.covariance.methods import as_reverse_covariance
from ddpm.parameterization import eps_from_x0
from ddpm.randomness import normal_like
from nn.backend import array_module


class Step(NamedTuple):
    """One step t -> s as a callback sees it: x_s = mean + var^(1/2) noise, without noise at s = 0.

    prediction is the denoiser's at (x_t, t), after clipping; var is a float (0 at s = 0), an array that broadcasts to
    x_t, or a full covariance (N, D, D).
    """

    x_t: Any
    x_s: Any
    t: int
    s: int
    prediction: Any
    mean: Any
    var: Any


def ddpm(denoiser, schedule, x_T, *, timesteps, variance, rng, clip=None, last_variance=None, callback=None):
    """Draw x_0 by ancestral sampling over any descending `timesteps` (L05, C15).

    Parameters
    ----------
    denoiser : anything with predict(x_t, t) -> Prediction
        And with `schedule` and `vjp`, where the variance asks for them.
    x_T : array (N, ..., C)
        Where the chain starts, at t = timesteps[0]: standard normal noise times schedule.marginal_var[t]**0.5, which is
        1 where variance preserving, or a draw of x_t itself.
    timesteps : descending integers in 1..T, as from `schedule.timesteps`; 0 follows by itself
    variance : str, ReverseCovariance or function
        A name in `ddpm.covariance.METHODS` that needs nothing more ("large", "small", "learned", "diagonal", "full"),
        a covariance as `ddpm.covariance.reverse_covariance` makes it, or a function (prediction, s, t) -> float or
        array. It is asked where noise is drawn, not at s = 0.
    rng : numpy Generator, CuPy Generator or SampleStreams
        Anything with standard_normal(shape, dtype=...); host draws are moved to x_T's side.
    clip : (lo, hi) or None
        Clamp the predicted x_0; (-1, 1) for images.
    last_variance : float or None
        Largest variance, in any direction, of the last step that draws noise, to timesteps[-1]; for images see
        `grey_level_variance`. It changes the samples only, not what the bound says of the model.
    callback : function of a Step, called after each step, or None

    Returns
    -------
    x_0, shaped as x_T. ValueError for bad timesteps, and for a variance that the model can't give.
    """
    covariance = None
    if isinstance(variance, ReverseCovariance) or not callable(variance):
        covariance = as_reverse_covariance(variance)

    def step(prediction, x_t, s, t):
        mean = schedule.posterior(s, t).mean(prediction.x0, x_t)
        return mean, variance(prediction, s, t) if covariance is None and s > 0 else None

    def spread(raw, x_t, s, t):
        return covariance(denoiser, raw, x_t, s, t, schedule)

    return chain(denoiser, schedule, x_T, timesteps=timesteps, step=step, rng=rng, clip=clip, callback=callback,
                 spread=spread if covariance is not None else None, last_variance=last_variance)


def chain(denoiser, schedule, x_T, *, timesteps, step, rng, spread=None, clip=None, last_variance=None, callback=None):
    """The loop that samplers share: predict, clip, `step(prediction, x_t, s, t) -> (mean, var)`, add the noise.

    `var` is a float, an array or a full covariance; no noise is drawn where it is None or the number 0, nor at s = 0.
    `spread(prediction, x_t, s, t)`, where given, has the last word on it: it is asked for s > 0 only, which saves its
    passes, and sees the prediction as it was before clipping. Other arguments as for `ddpm`.
    """
    times = _check_timesteps(timesteps, schedule)
    x_t = x_T
    for t, s in zip(times, [*times[1:], 0], strict=True):
        raw = prediction = denoiser.predict(x_t, t)
        if clip is not None:
            prediction = clip_x0(raw, x_t, t, schedule, clip)
        mean, var = step(prediction, x_t, s, t)
        if s > 0 and spread is not None:
            var = spread(raw, x_t, s, t)
        if s == 0 or var is None:
            var = 0.0
        elif s == times[-1] and last_variance is not None:
            var = shapes.clip(var, None, last_variance, x_t)
        deterministic = isinstance(var, float | int) and var == 0
        x_s = mean if deterministic else mean + shapes.root_times(var, normal_like(x_t, rng))
        if callback is not None:
            callback(Step(x_t, x_s, t, s, prediction, mean, var))
        x_t = x_s
    return x_t


def grey_level_variance(levels=1.0, bin_width=2 / 255):
    """The variance of noise whose mean size E|n| is `levels` grey levels, `bin_width` apart: (levels w)^2 pi/2.

    For `last_variance`: the last noise stays in the image, and from 1 or 2 levels on it shows.
    """
    return (levels * bin_width)**2 * math.pi / 2


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
