"""The whole network on a device: the same numbers as on the host, and nothing moved or waited for behind one's back.

The strict fake device (tests/fake_device.py) refuses hidden copies and hidden waits and records the open ones; where
there is a GPU, `pytest -m gpu` compares CuPy itself with NumPy.
"""

import copy

import numpy as np
import pytest

from nn import EMA, MLP, Adam, UNet, clip_grad_norm
from nn.backend import to_host
from nn.dropout import Dropout
from tests.reference import error

SMALL = dict(base_channels=8, channel_mults=(1, 2), attention_levels=(1,), heads=2, groups=4)


def make_unet(rng, dtype=np.float64, **options):
    net = UNet(1, 2, rng=rng, dtype=dtype, **SMALL | options)
    net.flat_parameters[...] = (0.3 * rng.standard_normal(net.num_parameters)).astype(dtype)
    return net


def on_device(net, xp):
    """A copy of the network with its parameters and gradients in the library `xp`."""
    net = copy.deepcopy(net)
    for _, p in net.named_parameters():
        p.value, p.grad = xp.asarray(p.value), xp.asarray(p.grad)
    return net


class Training:
    """A network with everything that a step changes."""

    def __init__(self, net):
        self.net, self.adam, self.ema = net, Adam(net, 1e-2, weight_decay=0.1), EMA(net)

    def step(self, x, t, y, dy):
        """Forward, backward, clip, Adam, EMA; the output, the input's gradient and the norm."""
        self.net.zero_grad()
        output = self.net(x, t, y)
        dx = self.net.backward(dy)
        norm = clip_grad_norm(self.net, 0.5)
        self.adam.step()
        self.ema.update()
        return output, dx, norm

    def state(self):
        return self.net.flat_parameters, self.net.flat_gradients, self.adam.m, self.adam.v, self.ema.average


def batch(rng, dtype=np.float64):
    """x, t, labels and dy for three images of 10x6."""
    return (rng.standard_normal((3, 10, 6, 1)).astype(dtype), rng.integers(1, 1000, 3), np.array([0, 2, 1]),
            rng.standard_normal((3, 10, 6, 2)).astype(dtype))


def test_training_steps_equal_numpys_and_transfer_times_and_labels_only(rng, fake):
    net = make_unet(rng, num_classes=2)
    host, device = Training(net), Training(on_device(net, fake))
    for k in range(3):
        x, t, y, dy = batch(rng)
        moved_x, moved_dy = fake.asarray(x), fake.asarray(dy)
        fake.transfers.clear()
        results = device.step(moved_x, t, y, moved_dy)
        transfers = list(fake.transfers)
        assert all(isinstance(a, fake.ndarray) for a in results + device.state())
        if k:                                                               # the first brings Winograd's constants over
            assert transfers == [("to_device", (3,)), ("to_device", (3,))]
        for actual, expected in zip(results, host.step(x, t, y, dy), strict=True):
            assert error(fake.asnumpy(actual), np.asarray(expected)) < 1e-9
    for actual, expected in zip(device.state(), host.state(), strict=True):
        assert error(fake.asnumpy(actual), expected) < 1e-9


@pytest.mark.parametrize("t", ["int", "host", "device"])
def test_times_may_be_anywhere(t, rng, fake):
    net, (x, _, _, dy) = make_unet(rng), batch(rng)
    device, moved_x, moved_dy = on_device(net, fake), fake.asarray(x), fake.asarray(dy)
    times = {"int": 70, "host": np.full(3, 70), "device": fake.asarray(np.full(3, 70))}[t]
    device(moved_x, 1)
    fake.transfers.clear()
    y = device(moved_x, times)
    dx = device.backward(moved_dy, params=False)
    assert fake.transfers == ([("to_device", (3,))] if t == "host" else [])
    assert error(fake.asnumpy(y), net(x, 70)) < 1e-10
    assert error(fake.asnumpy(dx), net.backward(dy)) < 1e-10


def test_dropout_moves_one_mask_a_layer_and_the_same_as_on_the_host(rng, fake):
    net, (x, _, _, _) = make_unet(rng, dropout=0.3), batch(rng)
    device, moved_x = on_device(net, fake), fake.asarray(x)
    layers = [m for m in device.modules() if isinstance(m, Dropout)]
    for seed in (1, 2):
        for each in (net, device):
            for i, m in enumerate(m for m in each.modules() if isinstance(m, Dropout)):
                m.rng = np.random.default_rng([seed, i])
        expected = net(x, 5)
        fake.transfers.clear()
        y = device(moved_x, 5)
    assert [direction for direction, _ in fake.transfers] == ["to_device"] * len(layers) and len(layers) == 8
    assert error(fake.asnumpy(y), expected) < 1e-10


def test_float32_stays_float32(rng, fake):
    net, (x, t, _, dy) = make_unet(rng, np.float32), batch(rng, np.float32)
    device = Training(on_device(net, fake))
    output, dx, norm = device.step(fake.asarray(x), t, None, fake.asarray(dy))
    assert {a.dtype for a in (output, dx, norm) + device.state()} == {np.dtype(np.float32)}
    expected = Training(net).step(x, t, None, dy)
    assert error(fake.asnumpy(output), expected[0]) < 1e-4 and error(fake.asnumpy(dx), expected[1]) < 1e-4


def test_swap_and_load_on_the_device(rng, fake):
    net = make_unet(rng)
    device = Training(on_device(net, fake))
    device.net.flat_parameters[...] += 1
    device.ema.swap()
    np.testing.assert_array_equal(fake.asnumpy(device.net.flat_parameters), net.flat_parameters)
    device.net.load({name: value + 2 for name, value in net.parameters().items()})      # host arrays: moved by load
    np.testing.assert_array_equal(fake.asnumpy(device.net.flat_parameters), net.flat_parameters + 2)


def test_mlp(rng, fake):
    net = MLP(2, 3, hidden=(8, 8), time_dim=6, rng=rng, dtype=np.float64)
    x, t, dy = rng.standard_normal((5, 2)), rng.integers(1, 1000, 5), rng.standard_normal((5, 3))
    y = net(x, t)
    dx = net.backward(dy)
    device, moved_x, moved_dy = on_device(net, fake), fake.asarray(x), fake.asarray(dy)
    device.zero_grad()
    fake.transfers.clear()
    moved_y = device(moved_x, t)
    moved_dx = device.backward(moved_dy)
    assert fake.transfers == [("to_device", (5,))]
    assert error(fake.asnumpy(moved_y), y) < 1e-12 and error(fake.asnumpy(moved_dx), dx) < 1e-12
    assert error(fake.asnumpy(device.flat_gradients), net.flat_gradients) < 1e-12


def test_images_on_the_wrong_side_are_refused(rng, fake):
    net, (x, _, _, _) = make_unet(rng), batch(rng)
    with pytest.raises(TypeError):
        net(fake.asarray(x), 5)
    with pytest.raises(TypeError):
        on_device(net, fake)(x, 5)


# ---- CuPy itself

@pytest.fixture
def cupy():
    cupy = pytest.importorskip("cupy")
    try:
        cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError:
        pytest.skip("no CUDA device")
    return cupy


@pytest.mark.gpu
@pytest.mark.parametrize("dtype, bound", [(np.float64, 1e-9), (np.float32, 1e-3)])
def test_gpu_training_steps_equal_numpys(dtype, bound, rng, cupy):
    net = make_unet(rng, dtype, num_classes=2)
    host, device = Training(net), Training(copy.deepcopy(net).to("cuda"))
    for _ in range(3):
        x, t, y, dy = batch(rng, dtype)
        results = device.step(cupy.asarray(x), t, y, cupy.asarray(dy))
        assert all(isinstance(a, cupy.ndarray) and a.dtype == dtype for a in results + device.state())
        for actual, expected in zip(results, host.step(x, t, y, dy), strict=True):
            assert error(to_host(actual), np.asarray(expected)) < bound
        if dtype == np.float32:     # Adam divides by the gradient's size: rounding where that is ~0 would pile up
            device.net.load(host.net.parameters())
    if dtype == np.float64:
        for actual, expected in zip(device.state(), host.state(), strict=True):
            assert error(to_host(actual), expected) < bound


@pytest.mark.gpu
def test_gpu_unet_in_its_default_size(rng, cupy):
    net = UNet(1, 2, rng=rng)
    net.flat_parameters[...] += 0.02 * rng.standard_normal(net.num_parameters, dtype=np.float32)
    device, t = copy.deepcopy(net).to("cuda"), rng.integers(1, 1000, 4)
    x, dy = rng.standard_normal((4, 28, 28, 1), np.float32), rng.standard_normal((4, 28, 28, 2), np.float32)
    assert error(to_host(device(cupy.asarray(x), t)), net(x, t)) < 1e-3
    assert error(to_host(device.backward(cupy.asarray(dy))), net.backward(dy)) < 1e-3
    assert error(to_host(device.flat_gradients), net.flat_gradients) < 1e-3


@pytest.mark.gpu
def test_gpu_round_trip_of_a_network(rng, cupy):
    net = make_unet(rng)
    before = net.flat_parameters.copy()
    assert isinstance(net.to("cuda").flat_parameters, cupy.ndarray)
    assert isinstance(net.to("cpu").flat_parameters, np.ndarray)
    np.testing.assert_array_equal(net.flat_parameters, before)
