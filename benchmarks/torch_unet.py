"""The U-Net of nn/unet.py once more, in plain PyTorch: what the hand-written one is compared with and timed against.

Written as one would write it in PyTorch: images are (N, C, H, W), in either memory format, and autograd does the rest.
Modules have the names of ours, so a parameter differs in its layout only:

    convolution (kh, kw, C, K) -> (K, C, kh, kw)      linear (C, K) -> (K, C)      all others alike
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn


def timestep_embedding(t, dim, max_period=10000):
    """(N, dim) float64: cosines, then sines, of t at dim/2 falling frequencies."""
    half = dim // 2
    frequencies = torch.exp(-math.log(max_period) / max(half, 1) * torch.arange(half, dtype=torch.float64))
    angles = t.to(torch.float64)[:, None] * frequencies
    return F.pad(torch.cat([angles.cos(), angles.sin()], dim=1), (0, dim % 2))


class TimeEmbedding(nn.Module):
    def __init__(self, dim, out_dim):
        super().__init__()
        self.dim = dim
        self.linear1 = nn.Linear(dim, out_dim)
        self.linear2 = nn.Linear(out_dim, out_dim)

    def forward(self, t):
        return self.linear2(F.silu(self.linear1(timestep_embedding(t, self.dim).to(self.linear1.weight.dtype))))


class ResidualBlock(nn.Module):
    def __init__(self, in_channels, out_channels, time_dim, groups, dropout):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.project = nn.Linear(time_dim, out_channels)
        self.norm2 = nn.GroupNorm(groups, out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.skip = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def forward(self, x, embedded):
        h = self.conv1(F.silu(self.norm1(x))) + self.project(embedded)[:, :, None, None]
        return self.skip(x) + self.conv2(self.dropout(F.silu(self.norm2(h))))


class SelfAttention(nn.Module):
    def __init__(self, channels, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(channels, 3 * channels)
        self.out = nn.Linear(channels, channels)

    def forward(self, x):
        N, C, H, W = x.shape
        qkv = self.qkv(x.flatten(2).transpose(1, 2))                                    # (N, L, 3C)
        q, k, v = qkv.view(N, H * W, 3, self.heads, C // self.heads).permute(2, 0, 3, 1, 4)
        o = F.scaled_dot_product_attention(q, k, v)                                     # (N, heads, L, C/heads)
        o = self.out(o.transpose(1, 2).reshape(N, H * W, C))
        return o.transpose(1, 2).unflatten(2, (H, W))


class AttentionBlock(nn.Module):
    def __init__(self, channels, heads, groups):
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels)
        self.attention = SelfAttention(channels, heads)

    def forward(self, x):
        return x + self.attention(self.norm(x))


class Downsample(nn.Conv2d):
    def __init__(self, channels):
        super().__init__(channels, channels, 3, stride=2, padding=1)


class Upsample(nn.Conv2d):
    def __init__(self, channels):
        super().__init__(channels, channels, 3, padding=1)

    def forward(self, x):
        return super().forward(F.interpolate(x, scale_factor=2, mode="nearest"))


class Stage(nn.Module):
    def __init__(self, layers):
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x, embedded):
        for layer in self.layers:
            x = layer(x, embedded) if isinstance(layer, ResidualBlock) else layer(x)
        return x


class TorchUNet(nn.Module):
    """nn.UNet in PyTorch; arguments as there, without `rng` and `dtype` (weights come from `load_from`)."""

    def __init__(self, in_channels, out_channels, *, base_channels=32, channel_mults=(1, 2, 2), blocks_per_level=1,
                 attention_levels=(2,), heads=4, groups=8, dropout=0.0, num_classes=None):
        super().__init__()
        time_dim, levels = 4 * base_channels, len(channel_mults)
        self.time = TimeEmbedding(base_channels, time_dim)
        self.num_classes = num_classes
        if num_classes is not None:
            self.label = nn.Embedding(num_classes + 1, time_dim)

        def residual(c_in, c_out):
            return ResidualBlock(c_in, c_out, time_dim, groups, dropout)

        def attention(c):
            return AttentionBlock(c, heads, groups)

        self.input = nn.Conv2d(in_channels, base_channels, 3, padding=1)
        down, widths, c = [], [base_channels], base_channels
        for level, mult in enumerate(channel_mults):
            for _ in range(blocks_per_level):
                layers = [residual(c, mult * base_channels)]
                c = mult * base_channels
                if level in attention_levels:
                    layers.append(attention(c))
                down.append(Stage(layers))
                widths.append(c)
            if level < levels - 1:
                down.append(Stage([Downsample(c)]))
                widths.append(c)
        self.down = nn.ModuleList(down)
        self.middle = Stage([residual(c, c), attention(c), residual(c, c)])
        up = []
        for level in reversed(range(levels)):
            for i in range(blocks_per_level + 1):
                layers = [residual(c + widths.pop(), channel_mults[level] * base_channels)]
                c = channel_mults[level] * base_channels
                if level in attention_levels:
                    layers.append(attention(c))
                if level > 0 and i == blocks_per_level:
                    layers.append(Upsample(c))
                up.append(Stage(layers))
        self.up = nn.ModuleList(up)
        self.norm = nn.GroupNorm(groups, c)
        self.output = nn.Conv2d(c, out_channels, 3, padding=1)

    def forward(self, x, t, y=None):
        """(N, out_channels, H, W) from x (N, C, H, W), t (N,) integers and, with classes, labels y (N,) or None."""
        embedded = self.time(t)
        if self.num_classes is not None:
            embedded = embedded + self.label(torch.full_like(t, self.num_classes) if y is None else y)
        embedded = F.silu(embedded)
        h = self.input(x)
        skips = [h]
        for stage in self.down:
            h = stage(h, embedded)
            skips.append(h)
        h = self.middle(h, embedded)
        for stage in self.up:
            h = stage(torch.cat([h, skips.pop()], dim=1), embedded)
        return self.output(F.silu(self.norm(h)))


# ---- parameters and gradients in the hand-written network's names and layouts

def _our_name(name):
    return name.replace("label.weight", "label.table")


def _to_ours(name, value):
    """A PyTorch parameter as the hand-written network lays it out; its own inverse but for convolutions."""
    if value.ndim == 4:
        return value.permute(2, 3, 1, 0)
    return value.T if value.ndim == 2 and not name.startswith("label.") else value


def load_from(network, arrays):
    """Copy the parameters of a hand-written network, `net.parameters()`, into its PyTorch twin, and return that.

    The dtype follows the arrays. Raises ValueError when names do not match.
    """
    own = {_our_name(name): value for name, value in network.named_parameters()}
    if own.keys() != arrays.keys():
        raise ValueError(f"load_from: names differ: {sorted(own.keys() ^ arrays.keys())[:4]}")
    network.to(torch.from_numpy(next(iter(arrays.values()))).dtype)
    with torch.no_grad():
        for name, value in own.items():
            _to_ours(name, value).copy_(torch.from_numpy(np.ascontiguousarray(arrays[name])))
    return network


def gradients(network):
    """Dict name -> array like the hand-written network's `gradients()`."""
    return {_our_name(name): _to_ours(name, p.grad).contiguous().numpy() for name, p in network.named_parameters()}
