"""Which reverse variance a trained model takes, by name, with whatever the name asks for made ready.

Of the names in `ddpm.covariance.METHODS` some need nothing, a head's belongs to the run that trained it, and
"analytic" and "residual" read a table over t that is measured on the training images once and kept in the run's folder
(statistics.safetensors), beside the checkpoint it was measured with.
"""

import contextlib

import numpy as np

from ddpm.covariance import METHODS, NoiseStatistics, noise_statistics, reverse_covariance
from ddpm.errors import UserError
from ddpm.heads import HEADS
from ddpm.models import default_variance
from ddpm.randomness import SampleStreams
from nn import checkpoint
from nn.backend import array_module, to_host

STATISTICS = "statistics.safetensors"

IMAGE_VARIANCE = 1.0
"""No pixel in [-1, 1] has a larger variance."""

PER_TIME = 16
"""Training images at each t that statistics are measured on: of 784 pixels the mean is known to a few per cent."""


def check_variance(name, config, sampler="ddpm"):
    """UserError, with what to do, where the model of `config` can't have the variance `name`, or the sampler use it."""
    if name == "learned" and config.model == "ddpm":
        raise UserError("--variance learned needs a model that has one (gddm, iddpm, or a head: sn, npr, ocm); use "
                        "large or small, or one that needs no training: analytic, residual, hutchinson")
    if name in HEADS and name != config.model:
        raise UserError(f"--variance {name} needs a head that has learned it: train one with python -m ddpm.train "
                        f"--model {name} --from RUN, and name its run")
    if sampler in ("dpm-solver", "flow") and name is not None:
        raise UserError(f"--sampler {sampler} draws no noise and has no --variance; leave it out")
    if sampler == "ddim" and (name == "large" or (name, config.model) == ("learned", "iddpm")):
        raise UserError(f"--variance {name} is one of DDPM's own step and belongs to --sampler ddpm; ddim takes one of "
                        "the image, or none")


def default_decoder(config, name):
    """Whose variance the last step is scored with, to the image: the model's own where it was trained for that.

    That is so for a gddm and an iddpm with their own. A head of the noise's variance, or a mean over the data, is far
    from fine enough at t = 1, where most pixels are known to within a level or two.
    """
    return "model" if name == "learned" and config.model in ("gddm", "iddpm") else "small"


def prepare_variance(name, run, denoiser, dataset, group, *, probes=1, bar=None):
    """The ReverseCovariance `name` of a run's model, for images in [-1, 1]; None stands for the model's default.

    Parameters
    ----------
    name : str or None
        As `check_variance` lets it pass.
    run, denoiser : RunFolder and what `load_denoiser` made of it
    dataset : function without arguments -> Dataset
        Called where its training images are needed.
    group : function without arguments -> Group
        Called where there is work to share.
    probes : int
        Of "hutchinson"; whoever samples gives the generator, by `with_rng`.
    bar : function without arguments -> context of a progress bar over T times, or None
        Shown where statistics have to be measured.
    """
    name = name or default_variance(run.config.model)
    if name in HEADS:
        name = "learned"                                        # the denoiser of that run predicts it
    if name in ("large", "small", "learned"):
        return reverse_covariance(name)
    statistics = None
    if METHODS[name].needs == "statistics":
        statistics = run_statistics(run, denoiser, dataset, group, bar)
    return reverse_covariance(name, statistics=statistics, rng=np.random.default_rng(0), probes=probes,
                              largest=IMAGE_VARIANCE)


def run_statistics(run, denoiser, dataset, group, bar=None):
    """NoiseStatistics of a run's model on its training images: those in its folder, or measured now and left there.

    They are measured anew where the folder's belong to another checkpoint. A conditional model's are those of images
    without a label. Arguments as for `prepare_variance`.
    """
    _, metadata = run.load_checkpoint()
    try:
        arrays, origin = checkpoint.load(run.path / STATISTICS)
        if origin == {"step": metadata["step"], "per_time": PER_TIME}:
            return NoiseStatistics(arrays["square"], arrays["residual"])
    except (FileNotFoundError, ValueError):                     # none yet, or a damaged file: it can be measured anew
        pass
    with bar() if bar else contextlib.nullcontext() as shown:
        found = measure_statistics(denoiser, dataset(), group(), seed=run.config.seed,
                                   progress=shown and shown.update)
    checkpoint.save(run.path / STATISTICS, found._asdict(), {"step": metadata["step"], "per_time": PER_TIME})
    return found


def measure_statistics(denoiser, dataset, group, *, per_time=PER_TIME, seed=0, progress=None):
    """`ddpm.covariance.noise_statistics` of a data set's training images, the times shared out over a group's ranks.

    The noise is a function of the seed, the time and the image's place, so that the ranks don't matter.
    """
    schedule = denoiser.schedule
    per_time = min(per_time, len(dataset.train_images))
    table = group.shared_array((2, schedule.T + 1), np.float64)
    xp = array_module(denoiser.network.flat_parameters)

    def work(group):
        mine = group.shard(schedule.T)
        for t in range(mine.start + 1, mine.stop + 1):
            streams = SampleStreams(seed, t, range(per_time), purpose="statistics", xp=xp)
            found = noise_statistics(denoiser, schedule, dataset.train_images, streams, per_time=per_time, times=[t],
                                     scale=lambda images: xp.asarray(dataset.scale(images)), batch=per_time)
            table[:, t] = array_module(table).asarray([found.square[t], found.residual[t]])
            if progress and group.rank == 0:
                before, after = ((i - mine.start) * schedule.T // (mine.stop - mine.start) for i in (t - 1, t))
                progress(after - before)                        # the others are as far with their shares
        group.barrier()

    group.run(work)
    return NoiseStatistics(*to_host(table))
