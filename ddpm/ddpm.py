"""The fixed-variance model (DDPM): one output, the noise; and the single-step term of the bound that all models share.

The reverse step puts the predicted clean image into the posterior of the noising chain, p(x_s | x_t) = N(a x0_hat +
b x_t, W). Since x_0 = (x_t - sqrt(sigma2_bar_t) eps) / lam_bar_t, an error in the noise is an error in x_0, and with
r = eps - eps_hat the two means of the KL differ by c r, where c = a sqrt(sigma2_bar_t) / lam_bar_t. Measured in units
of the posterior variance var, with rho = W / var,

    KL(x_s | x_t, x_0  ||  p) = 1/2 (log rho + 1/rho - 1 + k r^2 / rho),      k = c^2 / var = snr_s / snr_t - 1,

per pixel, in nats (L12, L22). DDPM fixes W and forgets the weight: the mean of r^2 is `simple_loss`. At s = 0, var = 0
and k is infinite: there the term of the bound is the decoder, -log p(x_0 | x_t), a Gaussian of its own variance read
off in bins of the data (E10).

Losses share one signature and return values per example, of shape (N,), with the gradient of their sum, shaped as the
network's output. Data are (N, ..., C); an output has C channels, or 2C where a model has a variance head.
"""

import numpy as np

from ddpm.gaussian import (
    discretized_log_likelihood,
    discretized_log_likelihood_gradients,
    log_normal,
    log_normal_gradients,
)
from nn.backend import array_module, per_example


def fixed_variance(kind, s, t, schedule):
    """Reverse-step variance that depends on the times only (C04).

    "large" is sigma2_ts, the variance of the noising step s -> t itself (not of the step before: E31), right for data
    of unit variance that are pure noise; "small" is the posterior variance, right for a single known image. At s = 0
    the small one would be 0, so that the decoder, and it alone, uses the posterior variance of the step 2 -> 1.

    A float, or an (N,) array for arrays of times. ValueError for another kind, and for "small" at s = 0 if T = 1.
    """
    if kind == "large":
        return schedule.between(s, t)[1]
    if kind != "small":
        raise ValueError(f'variance must be "large" or "small", not {kind!r}')
    var = schedule.posterior(s, t).var
    if np.all(np.asarray(s) > 0):
        return var
    if schedule.T < 2:
        raise ValueError('variance "small" needs a schedule of T >= 2 steps: its decoder uses the step 2 -> 1')
    var = np.where(np.asarray(s) == 0, schedule.posterior(1, 2).var, var)
    return float(var) if var.ndim == 0 else var


def step_weight(s, t, schedule):
    """k = c^2 / var = snr_s / snr_t - 1: the squared error of the noise in units of the posterior variance, s > 0.

    Written sigma2_ts / (lam_ts^2 sigma2_bar_s), which doesn't cancel. ValueError at s = 0, where it is infinite.
    """
    if np.any(np.asarray(s) == 0):
        raise ValueError("the single-step KL diverges at s=0, where the posterior variance is 0 (E10); "
                         "use the decoder's likelihood for these rows")
    lam_ts, sigma2_ts = schedule.between(s, t)
    return sigma2_ts / (lam_ts**2 * schedule.sigma2_bar[s])


def simple_loss(output, x0, eps, x_t, t, schedule, *, bin_width=None):
    """Mean over dimensions of (eps - eps_hat)^2, and its gradient: the noise prediction of L22, all weights dropped.

    x0, x_t, t, schedule and bin_width are not used; they make the signature that of the other losses. A variance head
    in `output` gets gradient zero.
    """
    r = eps - noise_channels(output, eps)
    values = (r * r).mean(axis=tuple(range(1, r.ndim)))
    return values, output_gradient(output, d_eps=-2 / dimensions(eps) * r)


def vlb_loss(output, x0, eps, x_t, t, schedule, *, bin_width, variance="small"):
    """T times the single-step term t -> t-1 of the bound under a fixed variance, nats per dimension; and its gradient.

    Its mean over t = 1..T is the bound's per-dimension sum without the prior term (L07). At t = 1 the term is the
    decoder's -log p(x_0 | x_1), of bins of width `bin_width` (None: the density). `variance` as in `fixed_variance`.
    A variance head in `output` gets gradient zero.
    """
    scale = schedule.T / dimensions(eps)

    def step(output, eps, s, t):
        rho = fixed_variance(variance, s, t, schedule) / schedule.posterior(s, t).var
        k = step_weight(s, t, schedule)
        r = eps - noise_channels(output, eps)
        nats = 0.5 * (per_example(np.log(rho) + 1 / rho - 1, r) + per_example(k / rho, r) * r * r)
        return scale * sum_per_example(nats), output_gradient(output, d_eps=per_example(-scale * k / rho, r) * r)

    def decoder(output, x0, x_t, s, t):
        var = per_example(fixed_variance(variance, s, t, schedule), x0)
        nats, d_eps, _ = decoder_nats(x0, noise_channels(output, x0), var, x_t, t, schedule, bin_width)
        return scale * sum_per_example(nats), output_gradient(output, d_eps=scale * d_eps)

    return chain_loss(step, decoder, output, x0, eps, x_t, np.asarray(t) - 1, t)


# ---- what the losses of all three models are made of

def decoder_nats(x0, eps_hat, var_x0, x_t, t, schedule, bin_width):
    """-log p(x_0 | x_t) under N(x0_hat, var_x0), x0_hat = (x_t - sqrt(sigma2_bar_t) eps_hat) / lam_bar_t, elementwise.

    Returns (nats, d nats/d eps_hat, d nats/d var_x0). `bin_width` None means the density, not a bin's mass.
    """
    noise = np.sqrt(schedule.sigma2_bar[t])
    mean = (x_t - per_example(noise, x_t) * eps_hat) / per_example(schedule.lam_bar[t], x_t)
    if bin_width is None:
        log_p = log_normal(x0, mean, var_x0)
        d_mean, d_var = log_normal_gradients(x0, mean, var_x0)
    else:
        log_p = discretized_log_likelihood(x0, mean, var_x0, bin_width)
        d_mean, d_var = discretized_log_likelihood_gradients(x0, mean, var_x0, bin_width)
    return -log_p, per_example(noise / schedule.lam_bar[t], x_t) * d_mean, -d_var


def chain_loss(step, decoder, output, x0, eps, x_t, s, t):
    """One term of the bound per example: `decoder` for the rows with s = 0 and `step` for the others (E10).

    `step(output, eps, s, t)` and `decoder(output, x0, x_t, s, t)` return (values, gradient) of the rows they are given;
    neither ever sees a row of the other kind, and a batch of one kind isn't copied.
    """
    xp, n = array_module(output, eps), len(eps)
    s, t = np.broadcast_to(s, (n,)), np.broadcast_to(t, (n,))
    if (s < 0).any() or (s >= t).any():
        raise ValueError("times must satisfy 0 <= s < t for every example")
    if (s > 0).all():
        return step(output, eps, s, t)
    if (s == 0).all():
        return decoder(output, x0, x_t, s, t)
    inner, last = np.flatnonzero(s > 0), np.flatnonzero(s == 0)
    i, j = xp.asarray(inner), xp.asarray(last)
    values, gradient = xp.empty(n, dtype=eps.dtype), xp.empty_like(output)
    values[i], gradient[i] = step(output[i], eps[i], s[inner], t[inner])
    values[j], gradient[j] = decoder(output[j], x0[j], x_t[j], s[last], t[last])
    return values, gradient


def noise_channels(output, eps):
    """The first C channels of a network output, eps_hat. ValueError unless the output has C or 2C channels."""
    channels = eps.shape[-1]
    two_heads = (*eps.shape[:-1], 2 * channels)
    if output.shape not in (eps.shape, two_heads):
        raise ValueError(f"output must be shaped {eps.shape} or, with a variance head, {two_heads}, got {output.shape}")
    return output[..., :channels]


def variance_channels(output, eps):
    """The last C channels of a two-head output, the raw variance head. ValueError unless the output has 2C channels."""
    channels = eps.shape[-1]
    two_heads = (*eps.shape[:-1], 2 * channels)
    if output.shape != two_heads:
        raise ValueError(f"this model has a variance head: output must be shaped {two_heads}, got {output.shape}; "
                         "build the network with out_channels = 2 x channels")
    return output[..., channels:]


def output_gradient(output, d_eps=None, d_head=None):
    """The gradient shaped as `output`, from those of its two halves; a half that isn't given has gradient zero."""
    if d_eps is not None and d_eps.shape == output.shape:
        return d_eps
    channels = output.shape[-1] // 2
    gradient = array_module(output).zeros_like(output)
    if d_eps is not None:
        gradient[..., :channels] = d_eps
    if d_head is not None:
        gradient[..., channels:] = d_head
    return gradient


def dimensions(x):
    """Number of dimensions of one example of the batch x."""
    return int(np.prod(x.shape[1:]))


def sum_per_example(x):
    """(N, ...) -> (N,)."""
    return x.sum(axis=tuple(range(1, x.ndim)))
