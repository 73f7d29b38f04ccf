"""One prediction in four costumes: the noise eps, the clean image x0, the velocity v and the score (L22).

At a given x_t = l x0 + n eps, with l = lam_bar_t and n = sqrt(sigma2_bar_t), each of them fixes the others:

    x0    = (x_t - n eps) / l                     eps = (x_t - l x0) / n
    v     = (l eps - n x0) / r                    x0  = (l x_t - n r v) / r^2,   eps = (n x_t + l r v) / r^2
    score = -eps / n          (U03)               the gradient of log q(x_t), where eps is E[eps | x_t]

with r^2 = l^2 + n^2 the variance of x_t for data of unit variance (`schedule.marginal_var`), 1 where variance
preserving. (l, n)/r is a point on the unit circle: x_t/r = cos x0 + sin eps and v = cos eps - sin x0 are one pair of
numbers in two frames, and v has unit variance at every t of every schedule. An error in one is an error in all, in
fixed proportion, so squared errors differ by a factor that depends on t only: choosing what a network predicts is
choosing a weight over time. An error of v is never larger in x0 or in eps than in v itself. The mean of a reverse step
is a x0 + b x_t (L13), and with eps put in for x0 (U02),

    mu = (x_t - sigma2_ts/sqrt(sigma2_bar_t) eps) / lam_ts

or, for one variance-preserving step, (x_t - beta_t/sqrt(1 - alpha_bar_t) eps) / sqrt(alpha_t).
"""

import numpy as np

from nn.backend import per_example

KINDS = ("eps", "x0", "v", "score")


# ---- conversions; every array is shaped as x_t, and t is an int or an (N,) host array of times >= 1

def x0_from_eps(eps, x_t, t, schedule):
    """The clean image that the noise eps leaves of x_t (L22)."""
    l, n = _signal_and_noise(x_t, t, schedule)
    return (x_t - n * eps) / l


def eps_from_x0(x0, x_t, t, schedule):
    """The noise between x0 and x_t (L22)."""
    l, n = _signal_and_noise(x_t, t, schedule)
    return (x_t - l * x0) / n


def v_from_eps(eps, x_t, t, schedule):
    """v = (l eps - n x0) / r, with x0 from eps and x_t (L22)."""
    l, n = _signal_and_noise(x_t, t, schedule)
    return (l * eps - n * (x_t - n * eps) / l) / _root_marginal_var(x_t, t, schedule)


def eps_from_v(v, x_t, t, schedule):
    """(n x_t + l r v) / r^2 (L22)."""
    l, n = _signal_and_noise(x_t, t, schedule)
    return (n * x_t + l * _root_marginal_var(x_t, t, schedule) * v) / (l**2 + n**2)


def eps_from_v_derivatives(t, schedule):
    """(d eps/d x_t, d eps/d v) = (n/r^2, l/r) of `eps_from_v`: floats, or (N,) host arrays (L22)."""
    _check_time(t)
    l, n = schedule.lam_bar[t], np.sqrt(schedule.sigma2_bar[t])
    r2 = l**2 + schedule.sigma2_bar[t]
    return n / r2, l * np.sqrt(schedule.marginal_var[t]) / r2


def score_from_eps(eps, t, schedule):
    """-eps / sqrt(sigma2_bar_t): the score of q(x_t), where eps is E[eps | x_t] (U03)."""
    _, n = _signal_and_noise(eps, t, schedule)
    return -eps / n


def eps_from_score(score, t, schedule):
    """-sqrt(sigma2_bar_t) score (U03)."""
    _, n = _signal_and_noise(score, t, schedule)
    return -n * score


def convert(value, source, target, x_t, t, schedule):
    """The prediction `value` of kind `source`, said as `target`; kinds are "eps", "x0", "v" and "score" (L22, U03).

    `value` is shaped as x_t. ValueError for another kind, or for a time below 1.
    """
    _check_kinds(source, target)
    to_eps = {"eps": lambda y: y,
              "x0": lambda y: eps_from_x0(y, x_t, t, schedule),
              "v": lambda y: eps_from_v(y, x_t, t, schedule),
              "score": lambda y: eps_from_score(y, t, schedule)}
    from_eps = {"eps": lambda eps: eps,
                "x0": lambda eps: x0_from_eps(eps, x_t, t, schedule),
                "v": lambda eps: v_from_eps(eps, x_t, t, schedule),
                "score": lambda eps: score_from_eps(eps, t, schedule)}
    return value if source == target else from_eps[target](to_eps[source](value))


# ---- the reverse mean

def reverse_mean_from_eps(eps, x_t, s, t, schedule):
    """Mean of x_s | x_t for a predicted noise and any s < t, shaped as x_t (U02, L13); at s = 0 it is x0."""
    schedule.posterior(s, t)                                            # checks s < t
    lam_ts, sigma2_ts = schedule.between(s, t)
    return (x_t - per_example(sigma2_ts / np.sqrt(schedule.sigma2_bar[t]), x_t) * eps) / per_example(lam_ts, x_t)


# ---- squared errors and their weights: floats, or (N,) host arrays for arrays of times

def squared_error_ratio(kind, t, schedule):
    """Squared error of `kind` that goes with a squared error of one in eps, at the time t >= 1 (L22)."""
    _check_kinds(kind)
    _check_time(t)
    l2, n2 = schedule.lam_bar[t]**2, schedule.sigma2_bar[t]
    return {"eps": l2 / l2, "x0": n2 / l2, "v": (l2 + n2) / l2, "score": 1 / n2}[kind]


def bound_weight(kind, s, t, var, schedule):
    """Weight w of a squared error of `kind` in the step t -> s of the bound: w |error|^2 + const, nats (L12, L13).

    `var` is the variance of the model's reverse step. For "x0" it is a^2 / (2 var); for "eps" c^2 / (2 var) with
    c = a sqrt(sigma2_bar_t) / lam_bar_t, and so on. ValueError unless 0 <= s < t, for another kind, and for var <= 0.
    """
    if np.any(np.asarray(var) <= 0):
        raise ValueError("var must be > 0: it is the variance of the model's reverse step")
    x0_weight = schedule.posterior(s, t).a**2 / (2 * var)
    return x0_weight * squared_error_ratio("x0", t, schedule) / squared_error_ratio(kind, t, schedule)


def _signal_and_noise(x_t, t, schedule):
    """lam_bar_t and sqrt(sigma2_bar_t), ready to meet x_t."""
    _check_time(t)
    return per_example(schedule.lam_bar[t], x_t), per_example(np.sqrt(schedule.sigma2_bar[t]), x_t)


def _root_marginal_var(x_t, t, schedule):
    """r, ready to meet x_t: exactly 1 where variance preserving."""
    return per_example(np.sqrt(schedule.marginal_var[t]), x_t)


def _check_time(t):
    if np.any(np.asarray(t) < 1):
        raise ValueError("t must be at least 1: at t = 0 there is no noise to predict")


def _check_kinds(*kinds):
    for kind in kinds:
        if kind not in KINDS:
            raise ValueError(f"a prediction is one of {', '.join(KINDS)}, not {kind!r}")
