"""The U-Net: residual blocks at falling and rising resolution, joined by skip connections.

    input conv                       every output on the way down is pushed on a stack
    level 0..L-1:  blocks_per_level x (residual block [+ attention]), then Downsample (not on the last level)
    middle:        residual block, attention, residual block
    level L-1..0:  blocks_per_level + 1 x (concatenate the top of the stack, residual block [+ attention]),
                   then Upsample (not on level 0)
    output:        GroupNorm-SiLU-conv

Backward walks the same path in reverse: where forward popped a skip and concatenated, backward splits the gradient and
pushes a half; where forward pushed, backward pops and adds.
"""

import numpy as np

from nn.activation import SiLU
from nn.backend import array_module, to_host
from nn.blocks import AttentionBlock, ResidualBlock, Stage, TimeEmbedding
from nn.conv import Conv2d
from nn.embedding import Embedding
from nn.module import Module
from nn.norm import GroupNorm
from nn.resample import Downsample, Upsample


class UNet(Module):
    """U-Net for images, layout of the improved-diffusion U-Net; images in, one prediction per pixel out.

    Parameters
    ----------
    in_channels, out_channels : int
    base_channels : int
        Channels of the first level; level i has base_channels * channel_mults[i].
    channel_mults : sequence of int
        One entry per level; each level but the last halves the resolution.
    blocks_per_level : int
        Residual blocks per level on the way down (one more on the way up).
    attention_levels : sequence of int
        Levels (0 is the first) where a self-attention follows each residual block.
    heads, groups : int
        Attention heads; groups of the normalisations.
    dropout : float
        Probability inside the residual blocks, in training mode.
    num_classes : int or None
        With labels: the table has one more row, "no label", which y=None stands for.
    rng : numpy.random.Generator
        Draws the initial weights and is the dropout masks' generator.
    dtype : float32 or float64
    """

    def __init__(self, in_channels, out_channels, *, base_channels=32, channel_mults=(1, 2, 2), blocks_per_level=1,
                 attention_levels=(2,), heads=4, groups=8, dropout=0.0, num_classes=None, rng, dtype=np.float32):
        levels = len(channel_mults)
        if any(not 0 <= level < levels for level in attention_levels):
            raise ValueError(f"attention_levels {tuple(attention_levels)} must lie in 0..{levels - 1}, the levels that "
                             f"channel_mults {tuple(channel_mults)} makes")
        self.in_channels, self.num_classes, self.dtype = in_channels, num_classes, np.dtype(dtype)
        self.halvings = levels - 1
        time_dim = 4 * base_channels
        self.time = TimeEmbedding(base_channels, time_dim, rng=rng, dtype=dtype)
        if num_classes is not None:
            self.label = Embedding(num_classes + 1, time_dim, rng=rng, dtype=dtype)
        self.silu = SiLU()

        def residual(c_in, c_out):
            return ResidualBlock(c_in, c_out, time_dim, groups=groups, dropout=dropout, rng=rng, dtype=dtype)

        def attention(c):
            return AttentionBlock(c, heads, groups=groups, rng=rng, dtype=dtype)

        self.input = Conv2d(in_channels, base_channels, rng=rng, dtype=dtype)
        self.down, skips, c = [], [base_channels], base_channels
        for level, mult in enumerate(channel_mults):
            for _ in range(blocks_per_level):
                self.down.append(Stage([residual(c, mult * base_channels)]
                                       + [attention(mult * base_channels)] * (level in attention_levels)))
                c = mult * base_channels
                skips.append(c)
            if level < levels - 1:
                self.down.append(Stage([Downsample(c, rng=rng, dtype=dtype)]))
                skips.append(c)
        self.middle = Stage([residual(c, c), attention(c), residual(c, c)])
        self.up = []
        for level, mult in reversed(list(enumerate(channel_mults))):
            for i in range(blocks_per_level + 1):
                layers = [residual(c + skips.pop(), mult * base_channels)]
                c = mult * base_channels
                if level in attention_levels:
                    layers.append(attention(c))
                if level > 0 and i == blocks_per_level:
                    layers.append(Upsample(c, rng=rng, dtype=dtype))
                self.up.append(Stage(layers))
        self.norm = GroupNorm(groups, c, dtype=dtype, silu=True)
        self.output = Conv2d(c, out_channels, rng=rng, dtype=dtype, zero_init=True)

    def forward(self, x, t, y=None):
        """Predict from noisy images x (N, H, W, C) at times t (int or (N,) integers), with labels y (N,) or None.

        Returns (N, H, W, out_channels). Raises ValueError if H or W can't be halved often enough, or on
        another number of channels, another dtype, or labels that the network does not have.
        """
        self._check(x, y)
        xp, N = array_module(x), x.shape[0]
        embedded = self.time(t, N, xp)
        if self.num_classes is not None:
            embedded = embedded + self.label(self._label_rows(y, N, xp))
        embedded = self.silu(embedded)
        h = self.input(xp.ascontiguousarray(x.transpose(1, 2, 0, 3)))      # the one door: (H, W, N, C) from here on
        skips = [h]
        for stage in self.down:
            h = stage(h, embedded)
            skips.append(h)
        h = self.middle(h, embedded)
        widths = []
        for stage in self.up:
            skip = skips.pop()
            widths.append(h.shape[3])
            h = stage(xp.concatenate([h, skip], axis=3), embedded)
        y = self.output(self.norm(h))
        return self._remember(xp.ascontiguousarray(y.transpose(2, 0, 1, 3)), (embedded, widths, h))

    @property
    def features(self):
        """What the last forward made its output of, (H, W, N, base_channels * channel_mults[0]): see `nn.Head`."""
        if self._cache is None:
            raise RuntimeError("UNet.features: call forward first")
        return self._cache[2]

    def backward(self, dy, *, params=True):
        """dx (N, H, W, C) from dy (N, H, W, out_channels): the vector-Jacobian product of the last forward."""
        embedded, widths, _ = self._recall(dy)
        xp = array_module(dy)
        dembedded = xp.zeros_like(embedded) if params else None
        dh = self.output.backward(xp.ascontiguousarray(dy.transpose(1, 2, 0, 3)), params=params)
        dh = self.norm.backward(dh, params=params)
        dskips = []
        for stage, width in zip(reversed(self.up), reversed(widths), strict=True):
            dh = stage.backward(dh, dembedded, params=params)
            dskips.append(dh[..., width:])
            dh = dh[..., :width]
        dh = self.middle.backward(dh, dembedded, params=params)
        for stage in reversed(self.down):
            dh = stage.backward(dh + dskips.pop(), dembedded, params=params)
        dh = self.input.backward(dh + dskips.pop(), params=params)
        if params:
            dembedded = self.silu.backward(dembedded)
            self.time.backward(dembedded)
            if self.num_classes is not None:
                self.label.backward(dembedded)
        return xp.ascontiguousarray(dh.transpose(2, 0, 1, 3))

    def _check(self, x, y):
        if x.ndim != 4 or x.shape[3] != self.in_channels:
            raise ValueError(f"UNet: x must be (N, H, W, {self.in_channels}), got shape {x.shape}")
        if x.dtype != self.dtype:
            raise ValueError(f"UNet: x is {x.dtype}, but the network computes in {self.dtype}; cast x or the network")
        if x.shape[1] % 2**self.halvings or x.shape[2] % 2**self.halvings:
            raise ValueError(f"UNet: images of {x.shape[1]}x{x.shape[2]} can't be halved {self.halvings} times; height "
                             f"and width must be divisible by {2**self.halvings}, or use fewer levels (channel_mults)")
        if y is not None and self.num_classes is None:
            raise ValueError("UNet: labels were given, but the network was made without num_classes")

    def _label_rows(self, y, N, xp):
        if y is None:
            return xp.full(N, self.num_classes)
        y = to_host(y)
        if y.shape not in ((), (N,)) or not np.issubdtype(y.dtype, np.integer):
            raise ValueError(f"UNet: labels must be an int or {N} integers, one per image, got {y.dtype} of shape "
                             f"{y.shape}")
        if y.min() < 0 or y.max() > self.num_classes:
            raise ValueError(f"UNet: labels must lie in 0..{self.num_classes} ({self.num_classes} is no label)")
        return xp.asarray(np.broadcast_to(y, (N,)))
