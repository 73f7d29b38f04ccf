"""Drawing images from a trained model, shared out over processes; which image comes out depends on seed and number."""

import numpy as np

from ddpm.guidance import Guided
from ddpm.models import network_input
from ddpm.randomness import SampleStreams
from ddpm.samplers import ddpm as ancestral
from nn.backend import array_module, to_host


def draw_images(denoiser, schedule, image_shape, num, group, *, steps, variance, seed=0, chunk=16, clip=(-1, 1),
                progress=None, labels=None, guidance_scale=1.0):
    """`num` images in [-1, 1], float32 on the host, (num, H, W, C), by ancestral sampling in `steps` steps (L05, C15).

    Image i is a function of (seed, i): of neither the number of images, nor the chunks, nor the processes. With
    `labels` (num,), on the host, it is also one of labels[i] and the scale: the noise is that of any other label (C20).
    """
    images = group.shared_array((num, *image_shape))
    timesteps = schedule.timesteps(steps)

    def work(group):
        mine = group.shard(num)
        for start in range(mine.start, mine.stop, chunk):
            part = range(start, min(start + chunk, mine.stop))
            before, after = ((i - mine.start) * num // (mine.stop - mine.start) for i in (part.start, part.stop))

            def tick(step, passes=after - before):          # the others are as far with their shares
                if progress and group.rank == 0:
                    progress(passes)

            model = _labelled(denoiser, labels, part, guidance_scale)
            images[part.start:part.stop] = _draw(model, schedule, image_shape, part, timesteps, variance, seed, clip,
                                                 array_module(images), tick)
        group.barrier()

    group.run(work)
    return np.clip(to_host(images), *clip)


def trajectory(denoiser, schedule, image_shape, num, *, steps, variance, seed=0, show=8, clip=(-1, 1), xp=np,
               labels=None, guidance_scale=1.0):
    """What a model with a variance thinks on the way to its first `num` images, at `show` times from T to 1 (G10).

    Returns (times, x_t, mean_x0, std_x0): a list of ints and three host arrays (show, num, H, W, C). x_t is scaled as
    the network sees it, to unit variance (`ddpm.models.network_input`), so that it can be shown beside the images.
    """
    timesteps = schedule.timesteps(steps)
    keep = set(timesteps[np.unique(np.rint(np.linspace(0, len(timesteps) - 1, show)).astype(int))].tolist())
    seen = []

    def remember(step):
        if step.t in keep:
            std = step.prediction.var_x0**0.5
            x_t = network_input(step.x_t, step.t, schedule)
            seen.append((step.t, *(to_host(a) for a in (x_t, step.prediction.x0, std))))

    model = _labelled(denoiser, labels, range(num), guidance_scale)
    _draw(model, schedule, image_shape, range(num), timesteps, variance, seed, clip, xp, remember)
    times, *arrays = zip(*seen, strict=True)
    return list(times), *(np.stack(a) for a in arrays)


def _labelled(denoiser, labels, samples, scale):
    """The denoiser of these samples: itself, or guided to the label of each."""
    return denoiser if labels is None else Guided(denoiser, labels[samples.start:samples.stop], scale)


def _draw(denoiser, schedule, image_shape, samples, timesteps, variance, seed, clip, xp, callback):
    streams = SampleStreams(seed, 0, list(samples), purpose="sampling", xp=xp)
    noise = streams.standard_normal((len(samples), *image_shape), dtype=np.float32)
    x_T = float(schedule.marginal_var[timesteps[0]])**0.5 * noise               # the prior of the bound (elbo.prior_kl)
    return ancestral(denoiser, schedule, x_T, timesteps=timesteps, variance=variance, rng=streams, clip=clip,
                     callback=callback)
