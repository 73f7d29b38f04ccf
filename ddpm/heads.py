"""Heads that learn the spread of the noise while the network that predicts its mean stays as it is (C10, C12).

A network is trained for E[eps | x_t] and then held fixed; a second output learns one more function of (x_t, t):

    sn      h = E[eps^2 | x_t]                       target eps^2                            `covariance.squared_noise`
    npr     h = E[(eps - eps_hat)^2 | x_t]           target the squared residual             `covariance.residual`
    ocm     h = sigma2_bar_t diag Hessian            target one probe of the Jacobian        `covariance.ocm`

and each gives Var[eps | x_t] in its own way. For sn the network's raw output is h - 1, since the mean of eps^2 is 1.
The other two learn a variance, which is positive and goes to zero with the signal, down to 1e-5 at t = T; and
Var[x_0 | x_t] is Var[eps | x_t] / snr, so that zero would have to be learned very exactly. So their raw output is a
standard deviation, less 1, in units of what data of unit variance have:

    Var[eps | x_t] = unit_t (1 + raw)^2,        unit_t = lam_bar_t^2 / (lam_bar_t^2 + sigma2_bar_t)

It starts from raw = 0, right for such data, at every t. The losses stay as published, squared errors with the same
weight for all t in units of the noise, and so does what they are least at; but no estimate is negative. A negative one
would be clipped to 0, which says that a pixel is known, and in few steps the bound punishes that without mercy (sn,
which is a difference, has no such way out).
"""

from ddpm.covariance import ocm, residual, squared_noise
from nn.backend import per_example

HEADS = {"sn": "the squared noise", "npr": "the squared residual of the predicted noise",
         "ocm": "the diagonal of the predicted noise's Jacobian"}


def statistic(kind, raw, t, schedule):
    """h as the method's own formulas take it, shaped as `raw`: the `head` of `ddpm.covariance.reverse_covariance`."""
    if kind == "sn":
        return 1 + raw
    variance, _ = _variance(raw, t, schedule)
    return variance if kind == "npr" else variance - 1


def var_eps(kind, raw, eps_hat, t, schedule):
    """Var[eps | x_t] that a head of that kind stands for, shaped as `raw`; unclipped, for sn it may be negative."""
    return squared_noise.var_eps(1 + raw, eps_hat) if kind == "sn" else _variance(raw, t, schedule)[0]


def loss(kind, raw, eps, eps_hat, t, schedule, targets=None):
    """The head's loss per example (N,); and the gradient of the sum with respect to `raw` (C10, C12).

    Parameters
    ----------
    raw : array (N, ..., C)
        The head's output.
    eps, eps_hat : arrays shaped as raw
        The noise in x_t, and what the fixed network predicts of it.
    t : (N,) integers on the host
    targets : array (M, N, ..., C), for "ocm"
        From `ddpm.covariance.ocm.draw_targets`.
    """
    h = statistic(kind, raw, t, schedule)
    if kind == "sn":
        return squared_noise.loss(h, eps)
    values, gradient = residual.loss(h, eps, eps_hat) if kind == "npr" else ocm.loss_on_each(h, targets)
    _, slope = _variance(raw, t, schedule)
    return values, slope * gradient


def _variance(raw, t, schedule):
    """unit_t (1 + raw)^2 and its derivative with respect to raw, shaped as `raw`."""
    unit, std = per_example(schedule.lam_bar[t]**2 / schedule.marginal_var[t], raw), 1 + raw
    return unit * std * std, 2 * unit * std
