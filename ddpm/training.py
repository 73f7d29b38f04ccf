"""One training step, on any number of ranks: the loss's gradient on each rank's images, summed, and one update.

A rank takes its share of the batch's positions, in micro-batches that fit the cache, adds up gradients, and updates its
own shard of the flat parameter buffer. Everything random is a function of (seed, step, position in the batch), so the
step doesn't depend on how positions are shared out, and a run that resumes draws what it would have drawn.
"""

import math
from typing import NamedTuple

import numpy as np

from ddpm.iddpm import ImportanceSampledTimes
from ddpm.models import Batch, build_network, build_schedule, find_objective
from ddpm.network_denoiser import network_input, noise_output, noise_output_backward
from ddpm.randomness import SampleStreams, generator
from nn.backend import device_module, to_host
from nn.dropout import Dropout
from nn.ema import EMA
from nn.optim import Adam, clip_factor, squared_norm


class StepResult(NamedTuple):
    """loss: mean over the batch; grad_norm: before clipping; stop: some rank wants to end after this step."""

    loss: float
    grad_norm: float
    stop: bool


class NotFinite(ArithmeticError):
    """The loss or its gradient is infinite or not a number; parameters are those of the step before."""


class UniformTimes:
    """Times drawn uniformly from 1..T, all with weight 1."""

    def __init__(self, T):
        self.T = T

    def sample(self, n, rng):
        return rng.integers(1, self.T + 1, n), np.ones(n)

    def update(self, t, losses):
        """Uniform times learn nothing from the losses."""


class DropoutDraws:
    """Uniform numbers for feature maps (H, W, N, C): those of an image are a function of (seed, step, its position)."""

    def __init__(self, seed, number, positions):
        self.generators = [generator(seed, "dropout", number, position) for position in positions]

    def random(self, shape, dtype):
        H, W, _, C = shape
        return np.stack([rng.random((H, W, C), dtype=dtype) for rng in self.generators], axis=2)


class Trainer:
    """Network, optimiser and average of one run, in memory that the ranks of `group` share.

    Made before `group.run`; `step(number)` is called by every rank with the same numbers 1, 2, ...; `label_names` is
    what a conditional run's labels stand for, else None.

    Parameters
    ----------
    config : TrainConfig
    dataset : Dataset
    group : Group
    """

    def __init__(self, config, dataset, group):
        self.config, self.dataset, self.group = config, dataset, group
        self.schedule, self.label_names = build_schedule(config), label_names(config, dataset)
        by_importance = (config.model, config.objective) == ("iddpm", "vlb")
        self.times = ImportanceSampledTimes(config.T) if by_importance else UniformTimes(config.T)
        self.xp = device_module(config.device)
        self.network = self._build().to(config.device)
        n = self.network.num_parameters
        self.network.use_buffers(group.shared_array((n,)), group.rank_array((n,)))
        self.adam = Adam(self.network, config.lr, weight_decay=config.weight_decay,
                         state=(group.shared_array((n,)), group.shared_array((n,))))
        self.ema = EMA(self.network, config.ema, buffer=group.shared_array((n,)))

    def _build(self):
        """What learns, and with it the objective that it learns by."""
        config = self.config
        self.objective = find_objective(config.model, config.objective, config.network_predicts)
        return build_network(config, self.dataset.image_shape[2], num_classes=len(self.label_names or ()) or None)

    # ---- one step

    @np.errstate(over="ignore", invalid="ignore", divide="ignore")                  # NotFinite says it better
    def step(self, number, *, stop=False):
        """Train on batch `number` = 1, 2, ...; NotFinite, with nothing updated, if the loss or its gradient is not."""
        config, group, network = self.config, self.group, self.network
        network.train().zero_grad()
        indices = batch_indices(config.seed, number, config.batch_size, len(self.dataset.train_images))
        t, weight = self.times.sample(config.batch_size, self._streams(number, range(config.batch_size), "time"))
        losses = np.zeros(config.batch_size)
        mine = group.shard(config.batch_size)
        for start in range(mine.start, mine.stop, config.micro_batch):
            rows = slice(start, min(start + config.micro_batch, mine.stop))
            losses[rows] = self._accumulate(number, indices[rows], t[rows], weight[rows], rows)
        group.reduce_scatter(network.flat_gradients)
        span = group.shard(network.num_parameters)
        squared = squared_norm(network.flat_gradients[span])
        shared = group.allreduce(np.concatenate([[float(to_host(squared)), float(stop)], losses]))
        squared, stop, losses = shared[0], bool(shared[1]), shared[2:]
        loss = float((weight * losses).mean())
        if not (math.isfinite(squared) and math.isfinite(loss)):
            raise NotFinite(f"the loss became {loss} (gradient norm {math.sqrt(squared)}) at step {number}")
        self.times.update(t, losses)
        if config.clip:
            network.flat_gradients[span] *= np.float32(clip_factor(squared, config.clip))
        self.adam.lr = learning_rate(config, number)
        self.adam.step(span)
        self.ema.update(span)
        group.all_gather(network.flat_parameters)
        return StepResult(loss, math.sqrt(squared), stop)

    def _accumulate(self, number, indices, t, weight, rows):
        """Add the gradient of one micro-batch, as its part of the mean over the batch; returns its losses, (n,)."""
        positions = range(rows.start, rows.stop)
        batch, labels = self._batch(number, indices, t, positions), self._labels(number, indices, positions)
        values, gradient, backward = self._loss(number, batch, labels, positions)
        gradient *= self.xp.asarray((weight / self.config.batch_size).astype(np.float32)).reshape(-1, 1, 1, 1)
        backward(gradient)
        return to_host(values)

    def _loss(self, number, batch, labels, positions):
        """Losses (n,), the gradient of their sum, and the function that carries it back to the parameters."""
        if self.config.dropout:
            masks = DropoutDraws(self.config.seed, number, positions)
            for module in self.network.modules():
                if isinstance(module, Dropout):
                    module.rng = masks
        where = batch.x_t, batch.t, self.schedule, self.config.network_predicts
        shown = network_input(batch.x_t, batch.t, self.schedule)
        output = noise_output(self.network(shown, batch.t, labels), *where)
        values, gradient = self.objective(output, batch, self.schedule, self.dataset.bin_width)
        return values, gradient, lambda gradient: self.network.backward(noise_output_backward(gradient, *where))

    def _batch(self, number, indices, t, positions):
        """The noisy images of some positions of batch `number`."""
        x0 = self.xp.asarray(self.dataset.scale(self.dataset.train_images[indices]))
        eps = self.xp.asarray(self._streams(number, positions, "noise").standard_normal(x0.shape, dtype=x0.dtype))
        s = self._streams(number, positions, "earlier time").integers(0, t)
        return Batch(x0, eps, self.schedule.add_noise(x0, t, eps), t, s)

    def _labels(self, number, indices, positions):
        """Their labels, (n,) on the host, some of them replaced by "no label"; None in an unconditional run (C20)."""
        if not self.config.conditional:
            return None
        left_out = self._streams(number, positions, "label").random() < self.config.label_dropout
        return np.where(left_out, len(self.label_names), self.dataset.train_labels[indices])

    def _streams(self, number, positions, purpose):
        return SampleStreams(self.config.seed, number, positions, purpose=purpose)

    # ---- saving and going on

    def gather(self):
        """Show every rank all of the optimiser's state, of which it updates only its own shard; all ranks call it."""
        for flat in (self.ema.average, self.adam.m, self.adam.v):
            self.group.all_gather(flat)

    def state(self):
        """Everything that training goes on from, after `gather`: arrays by name, and counters."""
        arrays = {}
        for prefix, flat in self._buffers().items():
            arrays |= {f"{prefix}/{name}": view for name, view in named_views(self.network, flat).items()}
        if isinstance(self.times, ImportanceSampledTimes):
            arrays |= {"times/history": self.times.history, "times/count": self.times.count}
        return arrays, {"adam_steps": self.adam.steps, "ema_updates": self.ema.updates}

    def restore(self, arrays, counters):
        """Take over what `state` returned."""
        for prefix, flat in self._buffers().items():
            for name, view in named_views(self.network, flat).items():
                view[...] = self.xp.asarray(arrays[f"{prefix}/{name}"])
        if isinstance(self.times, ImportanceSampledTimes):
            self.times.history[...], self.times.count[...] = arrays["times/history"], arrays["times/count"]
        self.adam.steps, self.ema.updates = counters["adam_steps"], counters["ema_updates"]

    def _buffers(self):
        return {"parameters": self.network.flat_parameters, "ema": self.ema.average, "adam.m": self.adam.m,
                "adam.v": self.adam.v}


def label_names(config, dataset):
    """What the labels 0, 1, ... stand for, a list, or None for an unconditional run; ValueError without labels."""
    if not config.conditional:
        return None
    if dataset.train_labels is None:
        raise ValueError(f"--conditional needs labels, and --data {config.data} has none; put the pictures of each "
                         "class in a subfolder of their own, or leave --conditional out")
    return list(dataset.label_names)


def named_views(network, flat):
    """A flat vector cut into views with the names and shapes of the network's parameters."""
    views, start = {}, 0
    for name, value in network.parameters().items():
        views[name] = flat[start:start + value.size].reshape(value.shape)
        start += value.size
    return views


def batch_indices(seed, number, batch_size, n):
    """Which images batch `number` holds: the data in a new order in each epoch, cut into batches, (batch_size,)."""
    places = np.arange((number - 1) * batch_size, number * batch_size)
    epochs = {epoch: generator(seed, "epoch", epoch).permutation(n) for epoch in np.unique(places // n).tolist()}
    return np.array([epochs[place // n][place % n] for place in places.tolist()])


def learning_rate(config, number):
    """The rate at step `number`: a linear warm-up, then half a cosine down to 0 at the last step, if so configured."""
    rate = config.lr * min(1.0, number / config.warmup if config.warmup else 1.0)
    if config.lr_decay == "cosine" and number > config.warmup:
        done = (number - config.warmup) / max(1, config.steps - config.warmup)
        rate *= 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
    return rate
