"""The contestants of benchmarks/bench.py: the same training step and sampling step, by hand and in PyTorch.

A training step is forward, mean squared error, backward, clipping of the gradient's norm at 1, Adam, and the moving
average of the parameters. A sampling step is the network's forward without gradients: the rest of a step is a
few operations on one image-sized array. All contestants see the same weights, images, times and targets, which
`Problem` draws from a fixed seed; no weight is left at zero, so nothing in the network is switched off.

Each contestant is a process that obeys commands on its standard input and sleeps in between (benchmarks/serving.py).
"""

import dataclasses
import json
import sys

import numpy as np

from benchmarks.serving import answer, micro_batches, serve, serve_group

LEARNING_RATE, CLIP, EMA_DECAY = 2e-4, 1.0, 0.999


@dataclasses.dataclass
class Problem:
    """One network and one batch; the same numbers wherever it is made."""

    size: int = 28
    channels: int = 1
    batch: int = 64
    base_channels: int = 32
    channel_mults: tuple = (1, 2, 2)
    blocks: int = 1

    def arguments(self):
        """Of UNet and TorchUNet: attention at the last level, two numbers out per pixel and channel."""
        return dict(in_channels=self.channels, out_channels=2 * self.channels, base_channels=self.base_channels,
                    channel_mults=tuple(self.channel_mults), blocks_per_level=self.blocks,
                    attention_levels=(len(self.channel_mults) - 1,))

    def network(self):
        """The hand-written network with all weights drawn, also those that start at zero or one."""
        from nn import UNet
        rng = np.random.default_rng(0)
        net = UNet(**self.arguments(), rng=rng)
        net.flat_parameters[...] += 0.02 * rng.standard_normal(net.num_parameters)
        return net

    def data(self):
        """(x, t, target), images (N, H, W, C)."""
        rng = np.random.default_rng(1)
        shape = (self.batch, self.size, self.size, self.channels)
        return (rng.standard_normal(shape, np.float32), rng.integers(1, 1001, self.batch),
                rng.standard_normal(shape[:3] + (2 * self.channels,), np.float32))


def ours(problem, workers, micro_batch):
    """The hand-written network, data parallel over micro-batches in `workers` processes."""
    from ddpm.parallel import make_group
    from nn import EMA, Adam
    from nn.backend import keep_freed_memory
    from nn.optim import clip_factor, squared_norm

    yield "imported"
    keep_freed_memory()
    group, net = make_group(workers), problem.network()
    n = net.num_parameters
    net.use_buffers(group.shared_array((n,)), group.rank_array((n,)))
    adam = Adam(net, LEARNING_RATE, state=(group.shared_array((n,)), group.shared_array((n,))))
    ema = EMA(net, EMA_DECAY, buffer=group.shared_array((n,)))
    x, t, target = problem.data()
    output = group.shared_array(target.shape)
    theta, g = net.flat_parameters, net.flat_gradients

    def program(group):
        shard, parts = group.shard(n), micro_batches(group, problem.batch, micro_batch)

        def gradient():
            """The loss of this rank's images; leaves the gradient, summed over ranks, in this rank's shard."""
            net.train().zero_grad()
            loss = 0.0
            for part in parts:
                output[part] = net(x[part], t[part])
                residual = output[part] - target[part]
                loss += float(np.vdot(residual, residual)) / target.size
                residual *= 2 / target.size
                net.backward(residual)
            group.reduce_scatter(g)
            return loss

        def train():
            loss = gradient()
            loss, squared = group.allreduce(np.array([loss, squared_norm(g[shard])]))
            g[shard] *= clip_factor(squared, CLIP)
            adam.step(shard)
            ema.update(shard)
            group.all_gather(theta)
            return loss

        def sample():
            net.eval()
            for part in parts:
                output[part] = net(x[part], t[part])
            group.barrier()

        def check(path):
            gradient()
            group.all_gather(g)
            if group.rank == 0:
                np.savez(path, output=output, **net.gradients())

        serve_group(group, dict(train=train, sample=sample, check=check))

    group.run(program)


def pytorch(problem, layout, threads):
    """PyTorch eager; `layout` is channels_first or channels_last."""
    import torch

    from benchmarks.torch_unet import TorchUNet, gradients, load_from

    yield "imported"
    torch.set_num_threads(threads)
    memory_format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    net = load_from(TorchUNet(**problem.arguments()), problem.network().parameters()).to(memory_format=memory_format)
    parameters = list(net.parameters())
    average = [p.detach().clone() for p in parameters]
    adam = torch.optim.Adam(parameters, LEARNING_RATE, fused=True)
    x, t, target = problem.data()
    x, target = (torch.from_numpy(a).permute(0, 3, 1, 2).contiguous(memory_format=memory_format) for a in (x, target))
    t, updates = torch.from_numpy(t), 0

    def gradient():
        adam.zero_grad(set_to_none=True)
        output = net.train()(x, t)
        loss = torch.nn.functional.mse_loss(output, target)
        loss.backward()
        return output, loss

    def train():
        nonlocal updates
        _, loss = gradient()
        torch.nn.utils.clip_grad_norm_(parameters, CLIP, foreach=True)
        adam.step()
        updates += 1
        decay = min(EMA_DECAY, (1 + updates) / (10 + updates))          # as in nn.EMA
        with torch.no_grad():
            torch._foreach_lerp_(average, parameters, 1 - decay)
        return loss.item()

    def sample():
        with torch.inference_mode():
            net.eval()(x, t)

    def check(path):
        output, _ = gradient()
        np.savez(path, output=output.detach().permute(0, 2, 3, 1).numpy(), **gradients(net))

    serve(dict(train=train, sample=sample, check=check))


def main():
    """Be one contestant: `python -m benchmarks.contestants JSON`, started by benchmarks/runner.py."""
    from benchmarks.layers import our_layers, pytorch_layers
    options = json.loads(sys.argv[1])
    kind = {f.__name__: f for f in (ours, pytorch, our_layers, pytorch_layers)}[options.pop("kind")]
    life = kind(Problem(**options.pop("problem")), **options)
    answer(stage=next(life))
    sys.stdin.readline()                        # the parent looks how much memory the imports took, then says go
    next(life, None)


if __name__ == "__main__":
    main()
