"""SN-DDPM: a head that learns the second moment of the noise, E[eps^2 | x_t] (C10).

A regression finds the conditional mean of its target, and of the noise in x_t, its square is as well known as itself:

    loss = |h - eps^2|^2 / d,        h = E[eps^2 | x_t],        Var[eps | x_t] = h - eps_hat^2

The mean is taken from a denoiser that is trained already, and only the head learns. What that costs: with
eps_hat = E[eps | x_t] + e the difference is Var[eps | x_t] - 2 E[eps | x_t] e - e^2, off in first order of the error
and in either direction; at high noise, where h and eps_hat^2 nearly cancel, most of it is error. `residual` is the way
out.
"""

from ddpm.ddpm import dimensions


def loss(head, eps):
    """Mean over dimensions of (h - eps^2)^2, per example (N,); and the gradient of the sum, shaped as `head` (C10)."""
    r = head - eps * eps
    return (r * r).mean(axis=tuple(range(1, r.ndim))), 2 / dimensions(head) * r


def var_eps(head, eps_hat):
    """Var[eps | x_t] = h - eps_hat^2, elementwise; negative where the head or the denoiser is wrong (C10)."""
    return head - eps_hat * eps_hat
