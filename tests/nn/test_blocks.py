"""The U-Net's parts: time embedding, residual block, attention block, and a row of them."""

import numpy as np
import pytest

import nn
from nn.blocks import AttentionBlock, ResidualBlock, Stage, TimeEmbedding
from nn.module import Module, Parameter
from tests import reference
from tests.reference import error


class WithEmbedding(Module):
    """A block whose embedding is a parameter of its own, so that a gradient check sees both inputs."""

    def __init__(self, block, embedded):
        self.block, self.embedded = block, Parameter(embedded)

    def forward(self, x):
        return self.block(x, self.embedded.value)

    def backward(self, dy, *, params=True):
        return self.block.backward(dy, self.embedded.grad, params=params)


def residual_block(rng, c_in, c_out, dropout=0.0, N=2):
    block = ResidualBlock(c_in, c_out, 5, groups=2, dropout=dropout, rng=rng, dtype=np.float64)
    whole = WithEmbedding(block, rng.standard_normal((N, 5)))
    block_parameters = whole.flat_parameters[N * 5:]
    block_parameters[...] = 0.5 * rng.standard_normal(block_parameters.size)
    return whole


def formula(p, x, e, mask=1.0):
    """skip(x) + conv2(mask silu(norm2(conv1(silu(norm1(x))) + project(e))))."""
    h = reference.silu(reference.group_norm(x, p["norm1.weight"], p["norm1.bias"], 2))
    h = reference.conv(h, p["conv1.weight"], p["conv1.bias"]) + (e @ p["project.weight"] + p["project.bias"])
    h = mask * reference.silu(reference.group_norm(h, p["norm2.weight"], p["norm2.bias"], 2))
    h = reference.conv(h, p["conv2.weight"], p["conv2.bias"])
    return h + (reference.conv(x, p["skip.weight"], p["skip.bias"]) if "skip.weight" in p else x)


@pytest.mark.parametrize("c_in, c_out", [(4, 4), (4, 6), (8, 8), (12, 8)])
@pytest.mark.parametrize("N", [1, 2])
def test_residual_block_is_its_formula_and_has_its_gradient(c_in, c_out, N, rng):
    whole, x = residual_block(rng, c_in, c_out, N=N), rng.standard_normal((3, 5, N, c_in))
    p = {name.removeprefix("block."): value for name, value in whole.parameters().items()}
    assert ("skip.weight" in p) == (c_in != c_out)
    assert error(whole(x), formula(p, x, p["embedded"])) < 1e-12
    assert nn.gradcheck(whole, x, rng=rng) <= 1e-6


def test_residual_block_drops_out_before_its_last_convolution(rng):
    whole, x = residual_block(rng, 4, 6, dropout=0.3), rng.standard_normal((3, 5, 2, 4))
    p = {name.removeprefix("block."): value for name, value in whole.parameters().items()}
    whole.block.dropout.mask = mask = (rng.random((3, 5, 2, 6)) > 0.3) / 0.7
    assert error(whole(x), formula(p, x, p["embedded"], mask)) < 1e-12
    assert nn.gradcheck(whole, x, rng=rng) <= 1e-6
    whole.eval()
    assert error(whole(x), formula(p, x, p["embedded"])) < 1e-12
    assert nn.gradcheck(whole, x, rng=rng) <= 1e-6


def test_residual_block_without_params_leaves_gradients_and_embedding_alone(rng):
    whole, x = residual_block(rng, 4, 6), rng.standard_normal((3, 5, 2, 4))
    dy = rng.standard_normal(whole(x).shape)
    dx = whole.backward(dy)
    whole.flat_gradients[...] = np.nan
    np.testing.assert_array_equal(whole.backward(dy, params=False), dx)
    assert np.isnan(whole.flat_gradients).all()


def test_blocks_start_as_their_skip(rng):
    x, e = rng.standard_normal((3, 5, 2, 4)), rng.standard_normal((2, 5))
    same = ResidualBlock(4, 4, 5, groups=2, dropout=0.0, rng=rng, dtype=np.float64)
    np.testing.assert_array_equal(same(x, e), x)
    wider = ResidualBlock(4, 6, 5, groups=2, dropout=0.0, rng=rng, dtype=np.float64)
    assert error(wider(x, e), reference.conv(x, wider.skip.weight.value)) < 1e-12


def test_attention_block_is_a_skip_around_a_norm_and_attention(rng):
    block = AttentionBlock(6, 3, groups=2, rng=rng, dtype=np.float64)
    block.flat_parameters[...] = rng.standard_normal(block.num_parameters)
    x, p = rng.standard_normal((2, 3, 2, 6)), block.parameters()
    normalised = reference.group_norm(x, p["norm.weight"], p["norm.bias"], 2).reshape(6, 2, 6)
    o = reference.attention(normalised @ p["attention.qkv.weight"] + p["attention.qkv.bias"], 3)
    o = o @ p["attention.out.weight"] + p["attention.out.bias"]
    assert error(block(x), x + o.reshape(x.shape)) < 1e-12


def test_stage_hands_the_embedding_to_residual_blocks_only(rng):
    residual = [residual_block(rng, 4, c).block for c in (4, 6)]
    attention = AttentionBlock(4, 2, groups=2, rng=rng, dtype=np.float64)
    x, e = rng.standard_normal((3, 5, 2, 4)), rng.standard_normal((2, 5))
    stage = Stage([residual[0], attention, residual[1]])
    assert error(stage(x, e), residual[1](attention(residual[0](x, e)), e)) < 1e-12
    assert nn.gradcheck(WithEmbedding(stage, e), x, rng=rng) <= 1e-6


@pytest.mark.parametrize("dim", [8, 7])
def test_time_embedding(dim, rng):
    layer = TimeEmbedding(dim, 6, rng=rng, dtype=np.float64)
    layer.flat_parameters[...] = rng.standard_normal(layer.num_parameters)
    t, p = np.array([3, 500, 1]), layer.parameters()
    h = reference.silu(nn.timestep_embedding(t, dim) @ p["linear1.weight"] + p["linear1.bias"])
    assert error(layer(t, 3, np), h @ p["linear2.weight"] + p["linear2.bias"]) < 1e-12
    assert error(layer(500, 3, np), np.tile(layer(t, 3, np)[1], (3, 1))) < 1e-12       # one int for all
    theta, dy, v = layer.flat_parameters, rng.standard_normal((3, 6)), rng.standard_normal(layer.num_parameters)
    layer.zero_grad()
    layer(t, 3, np)
    layer.backward(dy)
    start, ends = theta.copy(), []
    for step in (1e-6, -1e-6):
        theta[...] = start + step * v
        ends.append((dy * layer(t, 3, np)).sum())
    assert abs((layer.flat_gradients * v).sum() / ((ends[0] - ends[1]) / 2e-6) - 1) <= 1e-6
