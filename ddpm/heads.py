"""Heads that learn the spread of the noise while the network that predicts its mean stays as it is (C10, C12).

A network is trained for E[eps | x_t] and then held fixed; a second output learns one more function of (x_t, t):

    sn      h = E[eps^2 | x_t]                       target eps^2                            `covariance.squared_noise`
    npr     h = E[(eps - eps_hat)^2 | x_t]           target the squared residual             `covariance.residual`
    ocm     h = sigma2_bar_t diag Hessian            target one probe of the Jacobian        `covariance.ocm`

and each gives Var[eps | x_t] in its own way. For sn the network's raw output is h - 1, since the mean of eps^2 is 1.
The other two ask for numbers that go to zero with the signal, down to 1e-5 at t = T, and there a network would have to
learn zero very exactly, because Var[x_0 | x_t] is Var[eps | x_t] / snr. So they are in units of what data of unit
variance have,

    Var[eps | x_t] = unit_t raw,        unit_t = lam_bar_t^2 / (lam_bar_t^2 + sigma2_bar_t)

which is right in order of magnitude wherever raw is. The losses stay as published: the same weight for all t in units
of the noise, so that the minimiser and its weights are theirs. With raw = 0, where a head starts, npr and ocm take x_0
for known, and sn has 1 - eps_hat^2.
"""

from ddpm.covariance import ocm, residual, squared_noise
from nn.backend import per_example

HEADS = {"sn": "the squared noise", "npr": "the squared residual of the predicted noise",
         "ocm": "the diagonal of the predicted noise's Jacobian"}


def statistic(kind, raw, t, schedule):
    """h as the method's own formulas take it, shaped as `raw`: the `head` of `ddpm.covariance.reverse_covariance`."""
    if kind == "sn":
        return 1 + raw
    h = _unit(t, schedule, raw) * raw
    return h if kind == "npr" else h - 1


def var_eps(kind, raw, eps_hat, t, schedule):
    """Var[eps | x_t] that a head of that kind stands for, shaped as `raw`; unclipped, for sn it may be negative."""
    h = statistic(kind, raw, t, schedule)
    return {"sn": lambda: squared_noise.var_eps(h, eps_hat), "npr": lambda: residual.var_eps(h),
            "ocm": lambda: ocm.var_eps(h)}[kind]()


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
    return values, _unit(t, schedule, raw) * gradient


def _unit(t, schedule, like):
    """Var[eps | x_t] of data with variance 1."""
    return per_example(schedule.lam_bar[t]**2 / schedule.marginal_var[t], like)
