"""Layers, networks and optimisers with hand-written backward passes; knows nothing of diffusion.

Letters in shapes: N images, H rows, W columns, C (in) and K (out) channels, L = H W pixels. Networks take and
return images (N, H, W, C); layers take and return feature maps (H, W, N, C).
"""

from nn.activation import SiLU
from nn.attention import SelfAttention
from nn.checkpoint import load, save
from nn.classifier import Classifier, softmax_cross_entropy
from nn.conv import Conv2d
from nn.dropout import Dropout
from nn.ema import EMA
from nn.embedding import Embedding, timestep_embedding
from nn.gradcheck import gradcheck
from nn.head import Head
from nn.linear import Linear
from nn.mlp import MLP
from nn.module import Module
from nn.norm import GroupNorm
from nn.optim import Adam, clip_grad_norm
from nn.resample import Downsample, Upsample
from nn.unet import UNet

__all__ = ["Adam", "Classifier", "Conv2d", "Downsample", "Dropout", "EMA", "Embedding", "GroupNorm", "Head", "Linear",
           "MLP", "Module", "SelfAttention", "SiLU", "UNet", "Upsample", "clip_grad_norm", "gradcheck", "load", "save",
           "softmax_cross_entropy", "timestep_embedding"]
