"""Drawing images from a trained model, shared out over processes; which image comes out depends on seed and number."""

import numpy as np

from ddpm import samplers
from ddpm.covariance import ReverseCovariance
from ddpm.guidance import Guided
from ddpm.network_denoiser import network_input
from ddpm.randomness import SampleStreams
from nn.backend import array_module, to_host

SAMPLERS = ("ddpm", "ddim", "dpm-solver", "flow")


def draw_images(denoiser, schedule, image_shape, num, group, *, steps, variance, seed=0, chunk=16, clip=(-1, 1),
                progress=None, labels=None, guidance_scale=1.0, sampler="ddpm", eta=0.0, spacing="uniform",
                last_variance=None, first=0):
    """`num` images in [-1, 1], float32 on the host, (num, H, W, C), in `steps` steps of a sampler (L05, C15, C16, U13).

    They are the images first, first + 1, ... of the seed. Image i is a function of (seed, i): of neither the number of
    images, nor the chunks, nor the processes. With `labels` (num,), on the host, it is also one of its label and of the
    scale: the noise is that of any other label (C20).
    `sampler`, `variance`, `eta` and `last_variance` are those of `find_sampler`, `spacing` that of
    `NoiseSchedule.timesteps`.
    """
    images = group.shared_array((num, *image_shape))
    timesteps, run = schedule.timesteps(steps, spacing), find_sampler(sampler, variance, eta, last_variance)

    def work(group):
        mine = group.shard(num)
        for start in range(mine.start, mine.stop, chunk):
            part = range(start, min(start + chunk, mine.stop))
            before, after = ((i - mine.start) * num // (mine.stop - mine.start) for i in (part.start, part.stop))

            def tick(step, passes=after - before):          # the others are as far with their shares
                if progress and group.rank == 0:
                    progress(passes)

            model = _labelled(denoiser, labels, part, guidance_scale)
            numbers = range(first + part.start, first + part.stop)
            images[part.start:part.stop] = _draw(run, model, schedule, image_shape, numbers, timesteps, seed, clip,
                                                 array_module(images), tick)
        group.barrier()

    group.run(work)
    return np.clip(to_host(images), *clip)


def trajectory(denoiser, schedule, image_shape, num, *, steps, variance, seed=0, show=8, clip=(-1, 1), xp=np,
               labels=None, guidance_scale=1.0, sampler="ddpm", eta=0.0, spacing="uniform", last_variance=None):
    """What a model with a variance thinks on the way to its first `num` images, at `show` times from T to 1 (G10).

    Returns (times, x_t, mean_x0, std_x0): a list of ints and three host arrays (show, num, H, W, C). x_t is scaled as
    the network sees it, to unit variance (`ddpm.models.network_input`), so that it can be shown beside the images.
    """
    timesteps = schedule.timesteps(steps, spacing)
    keep = set(timesteps[np.unique(np.rint(np.linspace(0, len(timesteps) - 1, show)).astype(int))].tolist())
    seen = []

    def remember(step):
        if step.t in keep:
            std = step.prediction.var_x0**0.5
            x_t = network_input(step.x_t, step.t, schedule)
            seen.append((step.t, *(to_host(a) for a in (x_t, step.prediction.x0, std))))

    model = _labelled(denoiser, labels, range(num), guidance_scale)
    _draw(find_sampler(sampler, variance, eta, last_variance), model, schedule, image_shape, range(num), timesteps,
          seed, clip, xp, remember)
    times, *arrays = zip(*seen, strict=True)
    return list(times), *(np.stack(a) for a in arrays)


def _labelled(denoiser, labels, samples, scale):
    """The denoiser of these samples: itself, or guided to the label of each."""
    return denoiser if labels is None else Guided(denoiser, labels[samples.start:samples.stop], scale)


def _draw(sampler, denoiser, schedule, image_shape, samples, timesteps, seed, clip, xp, callback):
    streams = SampleStreams(seed, 0, list(samples), purpose="sampling", xp=xp)
    noise = streams.standard_normal((len(samples), *image_shape), dtype=np.float32)
    x_T = float(schedule.marginal_var[timesteps[0]])**0.5 * noise               # the prior of the bound (elbo.prior_kl)
    probes = SampleStreams(seed, 0, list(samples), purpose="probes", xp=xp)
    return sampler(denoiser, schedule, x_T, timesteps=timesteps, rng=streams, probes=probes, clip=clip,
                   callback=callback)


def find_sampler(name, variance, eta=0.0, last_variance=None):
    """The sampler of a name in SAMPLERS as a function of (denoiser, schedule, x_T, *, timesteps, rng, probes, clip,
    callback).

    `variance` is DDPM's, and what DDIM adds to its own (None: nothing); `probes` is the generator of one that draws.
    `eta` is DDIM's, `last_variance` that of both; "dpm-solver" and "flow", Heun's rule, both of second order, draw no
    noise and take none of them. ValueError for another name.
    """
    def bound(probes):
        return variance.with_rng(probes) if isinstance(variance, ReverseCovariance) else variance

    if name == "ddpm":
        return lambda *args, probes, **options: samplers.ddpm(
            *args, variance=bound(probes), last_variance=last_variance, **options)
    if name == "ddim":
        return lambda *args, probes, **options: samplers.ddim(
            *args, eta=eta, covariance=bound(probes), last_variance=last_variance, **options)
    if name in ("dpm-solver", "flow"):
        solver = samplers.dpm_solver_pp if name == "dpm-solver" else samplers.probability_flow
        return lambda *args, probes, rng, **options: solver(*args, **options)
    raise ValueError(f"sampler must be one of {', '.join(SAMPLERS)}, not {name!r}")
