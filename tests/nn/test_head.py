"""A head on a U-Net's features: a second output that leaves the network as it is."""

import numpy as np
import pytest

import nn


def network(dtype=np.float64, channels=1):
    net = nn.UNet(channels, channels, base_channels=8, channel_mults=(1, 2), attention_levels=(1,), groups=4, heads=2,
                  rng=np.random.default_rng(0), dtype=dtype)
    net.flat_parameters[...] += 0.1 * np.random.default_rng(1).standard_normal(net.num_parameters)
    return net


def head(dtype=np.float64, out=1, random=True):
    made = nn.Head(8, out, groups=4, rng=np.random.default_rng(2), dtype=dtype)
    if random:
        made.flat_parameters[...] += 0.1 * np.random.default_rng(3).standard_normal(made.num_parameters)
    return made


@pytest.mark.parametrize("shape", [(3, 5, 2, 8), (4, 4, 1, 8)])
def test_gradients_match_finite_differences(shape, rng):
    assert nn.gradcheck(head(out=2), rng.standard_normal(shape)) < 1e-6


def test_it_starts_at_zero_and_gives_images():
    x = np.random.default_rng(4).standard_normal((3, 6, 8, 1))
    net = network()
    net(x, 5)
    out = head(out=3, random=False)(net.features)
    assert out.shape == (3, 6, 8, 3) and (out == 0).all()
    assert net.features.shape == (6, 8, 3, 8)


def test_the_features_are_what_the_output_is_made_of(rng):
    """The U-Net's own last two layers, put on its features, give its output."""
    x, net = rng.standard_normal((2, 4, 4, 1)), network()
    y = net(x, 3)
    again = net.output(net.norm(net.features)).transpose(2, 0, 1, 3)
    np.testing.assert_array_equal(again, y)
    np.testing.assert_array_equal(head()(net.features)[:1], head()(net.features[:, :, :1]))      # an image's own


def test_there_are_none_before_a_forward():
    with pytest.raises(RuntimeError, match="UNet.features: call forward first"):
        network().features  # noqa: B018


def test_the_network_can_still_go_backward_afterwards(rng):
    """A head that reads the features, and learns, changes neither the network's gradient nor its vjp."""
    x, net, small = rng.standard_normal((2, 4, 4, 1)), network(), head()
    y = net(x, 3)
    expected = net.backward(np.ones_like(y), params=False)
    net(x, 3)
    small.backward(np.ones_like(small(net.features)))
    np.testing.assert_array_equal(net.backward(np.ones_like(y), params=False), expected)
    assert np.abs(small.flat_gradients).max() > 0 and (net.flat_gradients == 0).all()


def test_runs_on_a_device(fake, rng):
    x = rng.standard_normal((4, 4, 2, 8)).astype(np.float32)
    host, device = head(np.float32), head(np.float32)
    for p in (p for _, p in device.named_parameters()):
        p.value, p.grad = fake.asarray(p.value), fake.asarray(p.grad)
    device._flat = None
    expected = host(x)
    y = device(fake.asarray(x))
    np.testing.assert_allclose(fake.asnumpy(y), expected, atol=1e-5)
    dx = device.backward(fake.asarray(np.ones_like(expected)))
    np.testing.assert_allclose(fake.asnumpy(dx), host.backward(np.ones_like(expected)), atol=1e-5)
