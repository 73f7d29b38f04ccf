"""How many bits a model needs for an image: the bound of `ddpm.elbo`, estimated at a price one can pay.

The bound is prior + sum over t = 2..T of a step's KL + decoder (L06). A network pass for each of a thousand steps is a
high price for a sum whose terms vary smoothly, so the steps are cut into strata of times, narrow where t is small and
the terms change fast, and each image draws one time per stratum:

    sum_t KL_t  ~  sum over strata [ (size of the stratum) x KL at a uniform time in it ]

which is unbiased whatever the strata (L07 is the case of one stratum). With as many strata as steps it is the
full sum. A chain of fewer steps, over some of the times, is another model with a bound of its own (C18); its steps are
cut into strata in the same way.
"""

from typing import Any, NamedTuple

import numpy as np

from ddpm import elbo
from ddpm.covariance import shapes
from ddpm.covariance.methods import as_reverse_covariance
from ddpm.ddpm import fixed_variance
from ddpm.metrics import bits_per_dim
from ddpm.randomness import SampleStreams
from ddpm.samplers.ancestral import clip_x0
from nn.backend import array_module, per_example, to_host

DECODER_FLOOR = 1e-10
"""Least variance of a decoder: a head may say 0, with which a pixel that is off by anything had no probability."""


class Bits(NamedTuple):
    """Bits/dim per image, before anything is averaged: prior and decoder (N,), steps (strata, N).

    `edges` (strata+1,) says which steps a row of `steps` stands for, those that end at the i-th time of the chain with
    edges[k] <= i < edges[k+1]; `times` (K+1,) are the chain's times, 0 first, so that in a chain of all times i = t.
    """

    prior: Any
    steps: Any
    decoder: Any
    edges: Any
    times: Any

    @property
    def total(self):
        """(N,) bits/dim."""
        return self.prior + self.steps.sum(axis=0) + self.decoder

    def summary(self):
        """Means over images, and the standard error of the mean total, as a dictionary of floats."""
        total = self.total
        error = total.std(ddof=1) / np.sqrt(len(total)) if len(total) > 1 else float("nan")
        return {"bits_per_dim": float(total.mean()), "prior": float(self.prior.mean()),
                "steps": float(self.steps.sum(axis=0).mean()), "decoder": float(self.decoder.mean()),
                "standard_error": float(error)}


def time_strata(T, strata):
    """Edges (strata+1,) that cut 2..T into that many runs (at most T-1), widening geometrically."""
    edges = np.unique(np.rint(np.geomspace(2, T + 1, min(strata, T - 1) + 1)).astype(int))
    while len(edges) - 1 < min(strata, T - 1):              # rounding has merged the narrow ones: split the widest
        widest = np.argmax(np.diff(edges))
        edges = np.insert(edges, widest + 1, (edges[widest] + edges[widest + 1]) // 2)
    return edges


def reverse_model(denoiser, schedule, variance, clip=None, decoder="model"):
    """The reverse step of a denoiser as a function (x_t, s, t) -> (mean, var), for `ddpm.elbo` (L13, G03, C04-C12).

    Parameters
    ----------
    variance : str or ReverseCovariance
        As for `ddpm.samplers.ddpm`; var is shaped as x_t, or (N, D, D) for a full covariance.
    clip : (lo, hi) or None
        Clamp the predicted x_0.
    decoder : "model" or "small"
        The variance at s = 0: the model's own there, which is Cov[x_0 | x_t] for all but the fixed ones, or for any
        model the posterior's of the step 2 -> 1, with which models of different variances are often compared.
    """
    covariance = as_reverse_covariance(variance)
    if decoder not in ("model", "small"):
        raise ValueError(f'decoder must be "model" or "small", not {decoder!r}')

    def reverse(x_t, s, t):
        raw = prediction = denoiser.predict(x_t, t)
        if clip is not None:
            prediction = clip_x0(raw, x_t, t, schedule, clip)
        mean = schedule.posterior(s, t).mean(prediction.x0, x_t)
        if decoder == "small" and np.all(np.asarray(s) == 0):
            var = per_example(fixed_variance("small", s, t, schedule), x_t)
        else:
            var = covariance(denoiser, raw, x_t, s, t, schedule)
            if np.all(np.asarray(s) == 0):
                var = shapes.clip(var, DECODER_FLOOR, None, x_t)
        shaped = shapes.is_full(var, x_t) or getattr(var, "shape", None) == x_t.shape
        return mean, var if shaped else array_module(x_t).ones_like(x_t) * var
    return reverse


def image_bits(denoiser, schedule, x0, *, variance, bin_width, timesteps=None, strata=64, seed=0, first=0, clip=(-1, 1),
               decoder="model"):
    """Bits/dim of images under a model, term by term (L06, L07, L09, C18).

    Parameters
    ----------
    x0 : array (N, H, W, C) in [-1, 1]
    variance, clip, decoder
        See `reverse_model`.
    bin_width : float or None
        Distance of two neighbouring pixel levels (None: bits of a density).
    timesteps : descending integers in 1..T, or None for all
        The chain that is measured: that of a sampler with these timesteps.
    strata : int
        Network passes per image, besides the decoder's.
    seed, first : int
        Times and noise are functions of (seed, first + row), so that a data set may be evaluated in any pieces.

    Returns
    -------
    Bits, on the host. ValueError for timesteps that don't descend within 1..T.
    """
    dims = int(np.prod(x0.shape[1:]))
    samples = np.arange(first, first + len(x0))
    streams = SampleStreams(seed, 0, samples, purpose="bits per dim", xp=array_module(x0))
    probes = SampleStreams(seed, 0, samples, purpose="probes", xp=array_module(x0))
    draw_time = SampleStreams(seed, 0, samples, purpose="times")
    reverse = reverse_model(denoiser, schedule, as_reverse_covariance(variance).with_rng(probes), clip, decoder)
    times = np.array([0, *elbo.descending(timesteps, schedule)[::-1]])
    edges = time_strata(len(times) - 1, strata)

    def noisy(t):
        return schedule.add_noise(x0, t, streams.standard_normal(x0.shape, dtype=x0.dtype))

    def per_image(nats):
        return bits_per_dim(to_host(nats).reshape(len(x0), -1).sum(axis=1, dtype=np.float64), dims)

    steps = np.empty((len(edges) - 1, len(x0)))
    for k, (low, high) in enumerate(zip(edges, edges[1:], strict=False)):
        i = draw_time.integers(low, high)
        s, t = times[i - 1], times[i]
        x_t = noisy(t)
        steps[k] = (high - low) * per_image(elbo.step_kl(x0, x_t, *reverse(x_t, s, t), s, t, schedule))
    zero = np.zeros(len(x0), dtype=int)
    decoder = per_image(elbo.decoder_nats(x0, *reverse(noisy(zero + times[1]), zero, zero + times[1]), bin_width))
    return Bits(per_image(elbo.prior_kl(x0, schedule, int(times[-1]))), steps, decoder, edges, times)


def evaluate_bits(denoiser, schedule, images, scale, group, *, chunk=16, timesteps=None, strata=64, progress=None,
                  **options):
    """`image_bits` of uint8 images, shared out over the ranks of a group; arguments as there."""
    n, times = len(images), np.array([0, *elbo.descending(timesteps, schedule)[::-1]])
    edges = time_strata(len(times) - 1, strata)
    rows = group.shared_array((n, len(edges) + 1), np.float64)

    def work(group):
        mine = group.shard(n)
        for start in range(mine.start, mine.stop, chunk):
            part = slice(start, min(start + chunk, mine.stop))
            bits = image_bits(denoiser, schedule, scale(images[part]), first=start, timesteps=timesteps, strata=strata,
                              **options)
            rows[part] = np.column_stack([bits.prior, bits.decoder, bits.steps.T])
            if progress and group.rank == 0:
                before, after = ((i - mine.start) * n // (mine.stop - mine.start) for i in (part.start, part.stop))
                progress(after - before)                    # the others are as far with their shares
        group.barrier()

    group.run(work)
    rows = to_host(rows)
    return Bits(rows[:, 0], rows[:, 2:].T, rows[:, 1], edges, times)
