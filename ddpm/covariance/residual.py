"""NPR-DDPM: a head that learns the squared residual of the predicted noise, E[(eps - eps_hat)^2 | x_t] (C10).

    loss = |h - (eps - eps_hat)^2|^2 / d,        h = Var[eps | x_t] + (E[eps | x_t] - eps_hat)^2

For the exact denoiser h is the variance. For another it is more, by the squared bias; and that is what a reverse step
around a wrong mean needs: the KL of a step from N(mean, W), averaged over q, is least at W = var + c^2 h, diagonal
(C09, G05). The same h is where GDDM's bound leads (G06), which learns the mean with it. Nothing is subtracted, so that
h >= 0 whatever the denoiser does: compare `squared_noise`.

The denoiser is held fixed: it has its own loss, and none of this one's gradient.
"""

from ddpm.ddpm import dimensions


def loss(head, eps, eps_hat):
    """Mean over dimensions of (h - (eps - eps_hat)^2)^2, per example (N,); and the gradient of the sum wrt h (C10)."""
    r = head - (eps - eps_hat)**2
    return (r * r).mean(axis=tuple(range(1, r.ndim))), 2 / dimensions(head) * r


def var_eps(head):
    """Var[eps | x_t], bias included: the head itself (C10)."""
    return head
