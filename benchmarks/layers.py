"""Which layers the network is made of, and contestants that run each kind of them alone, forward and backward.

By hand: every worker takes its share of the batch through a layer, micro-batch by micro-batch. PyTorch: the whole
batch, all threads. A kind is a layer with its channels and its map's size; how often it occurs in the network is
counted, so that times add up to a step's.
"""

from collections import Counter
from typing import NamedTuple

import numpy as np

from nn import Conv2d, Downsample, GroupNorm, Linear, SelfAttention, UNet, Upsample


class Kind(NamedTuple):
    """A layer on maps of height x width (of one pixel for a Linear on the time embedding)."""

    name: str
    C: int
    K: int
    height: int
    width: int

    def __str__(self):
        where = f" @ {self.height}x{self.width}" if self.height > 1 else ""
        return f"{self.name} {self.C}" + (f" -> {self.K}" if self.K != self.C else "") + where


def kinds_of(problem):
    """Counter of the kinds of layers that one forward of the problem's network meets."""
    net, seen = UNet(**problem.arguments(), rng=np.random.default_rng(0)), Counter()

    def watch(module):
        forward = module.forward

        def watched(x, *args, **kwargs):
            seen[_kind(module, x)] += 1
            return forward(x, *args, **kwargs)

        module.forward = watched

    projections = {id(p) for m in net.modules() if isinstance(m, SelfAttention) for p in (m.qkv, m.out)}
    for module in list(net.modules()):
        if isinstance(module, Conv2d | GroupNorm | SelfAttention | Linear) and id(module) not in projections:
            watch(module)
    net(np.zeros((1, problem.size, problem.size, problem.channels), np.float32), 1)
    return seen


def _kind(module, x):
    C, height, width = x.shape[-1], *(x.shape[:2] if x.ndim == 4 else (1, 1))
    if isinstance(module, Conv2d):
        k, _, C, K = module.weight.value.shape
        name = {Downsample: "downsample", Upsample: "upsample"}.get(type(module), f"conv {k}x{k}")
        return Kind(name, C, K, height, width)
    if isinstance(module, GroupNorm):
        return Kind("GroupNorm-SiLU" if module.silu else "GroupNorm", C, C, height, width)
    if isinstance(module, Linear):
        return Kind("linear", C, module.weight.value.shape[1], 1, 1)
    return Kind("attention", C, C, height, width)


def our_layers(problem, workers, micro_batch):
    """Actions layer0, layer1, ... in the order of `kinds_of(problem)`."""
    from benchmarks.serving import micro_batches, serve_group
    from ddpm.parallel import make_group
    from nn.backend import keep_freed_memory

    yield "imported"
    keep_freed_memory()
    rng = np.random.default_rng(0)
    make = {"conv 3x3": lambda k: Conv2d(k.C, k.K, rng=rng), "conv 1x1": lambda k: Conv2d(k.C, k.K, 1, rng=rng),
            "downsample": lambda k: Downsample(k.C, rng=rng), "upsample": lambda k: Upsample(k.C, rng=rng),
            "GroupNorm-SiLU": lambda k: GroupNorm(8, k.C, silu=True), "GroupNorm": lambda k: GroupNorm(8, k.C),
            "linear": lambda k: Linear(k.C, k.K, rng=rng), "attention": lambda k: SelfAttention(k.C, 4, rng=rng)}
    kinds = list(kinds_of(problem))
    layers = [make[kind.name](kind) for kind in kinds]

    def program(group):
        def action(kind, layer):
            parts = micro_batches(group, problem.batch, micro_batch)
            maps = [_map(kind, part.stop - part.start) for part in parts]
            gradients = [rng.standard_normal(layer(x).shape, np.float32) for x in maps]

            def run():
                group.barrier()
                for x, dy in zip(maps, gradients, strict=True):
                    layer(x)
                    layer.backward(dy)
                group.barrier()

            return run

        def _map(kind, N):
            shape = (N, kind.C) if kind.name == "linear" else (kind.height, kind.width, N, kind.C)
            return rng.standard_normal(shape, np.float32)

        serve_group(group, {f"layer{i}": action(kind, layer) for i, (kind, layer) in
                            enumerate(zip(kinds, layers, strict=True))})

    make_group(workers).run(program)


def pytorch_layers(problem, layout, threads):
    """The same actions; the gradient of the first layer's input is not wanted by anybody, so it is not computed."""
    import torch
    from torch import nn

    from benchmarks import torch_unet
    from benchmarks.serving import serve

    yield "imported"
    torch.set_num_threads(threads)
    memory_format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    make = {"conv 3x3": lambda k: nn.Conv2d(k.C, k.K, 3, padding=1), "conv 1x1": lambda k: nn.Conv2d(k.C, k.K, 1),
            "downsample": lambda k: torch_unet.Downsample(k.C), "upsample": lambda k: torch_unet.Upsample(k.C),
            "GroupNorm-SiLU": lambda k: nn.Sequential(nn.GroupNorm(8, k.C), nn.SiLU()),
            "GroupNorm": lambda k: nn.GroupNorm(8, k.C), "linear": lambda k: nn.Linear(k.C, k.K),
            "attention": lambda k: torch_unet.SelfAttention(k.C, 4)}

    def action(kind, first):
        layer = make[kind.name](kind)
        if kind.name == "linear":
            x = torch.randn(problem.batch, kind.C)
        else:
            layer = layer.to(memory_format=memory_format)
            x = torch.randn(problem.batch, kind.C, kind.height, kind.width).contiguous(memory_format=memory_format)
        x.requires_grad_(not first)
        y = layer(x).detach()
        dy = torch.randn_like(y)

        def run():
            x.grad = None
            layer.zero_grad(set_to_none=True)
            layer(x).backward(dy)

        return run

    kinds = list(kinds_of(problem))
    serve({f"layer{i}": action(kind, first=kind.name == "conv 3x3" and kind.C == problem.channels)
           for i, kind in enumerate(kinds)})
