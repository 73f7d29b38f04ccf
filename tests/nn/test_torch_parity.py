"""The U-Net against the same network in PyTorch: outputs, and gradients of every parameter and of the input.

PyTorch differentiates by itself, so an error would have to be made twice, in two notations, to pass.
"""

import itertools

import numpy as np
import pytest

from nn import UNet

torch = pytest.importorskip("torch")
from benchmarks.torch_unet import TorchUNet, gradients, load_from  # noqa: E402  (needs torch)

SMALL = dict(base_channels=16, channel_mults=(1, 2), attention_levels=(1,), heads=2, groups=4)
NETWORKS = {
    "small": SMALL,
    "labels": SMALL | dict(num_classes=3),
    "two blocks, three levels, no attention on them": dict(base_channels=8, channel_mults=(1, 2, 3), blocks_per_level=2,
                                                           attention_levels=(), heads=1, groups=2),
    "default": {},
}


@pytest.fixture(autouse=True)
def one_thread():
    """Idle threads of a second BLAS would only disturb ours."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make(options, dtype, rng, channels=(2, 3)):
    """The network, its twin and a batch; every weight is drawn, also those that start at zero or one."""
    ours = UNet(*channels, **options, rng=rng, dtype=dtype)
    ours.flat_parameters[...] += 0.1 * rng.standard_normal(ours.num_parameters)
    theirs = load_from(TorchUNet(*channels, **options), ours.parameters())
    x = rng.standard_normal((3, 20, 12, channels[0])).astype(dtype)
    dy = rng.standard_normal((3, 20, 12, channels[1])).astype(dtype)
    return ours, theirs, x, rng.integers(1, 1001, 3), dy


def run_ours(network, x, t, y, dy):
    network.zero_grad()
    output = network(x, t, y)
    dx = network.backward(dy)
    return {"output": output, "x": dx} | {name: g.copy() for name, g in network.gradients().items()}


def run_theirs(network, x, t, y, dy):
    x, dy = (torch.from_numpy(a).permute(0, 3, 1, 2) for a in (x, dy))
    x = x.contiguous().requires_grad_()
    network.zero_grad()
    output = network(x, torch.from_numpy(t), None if y is None else torch.from_numpy(y))
    output.backward(dy)
    images = {"output": output.detach(), "x": x.grad}
    return {name: a.permute(0, 2, 3, 1).numpy() for name, a in images.items()} | gradients(network)


def differences(found, expected):
    """Largest difference in each array, relative to the array's largest entry."""
    assert found.keys() == expected.keys()
    return {name: np.abs(a - expected[name]).max() / np.abs(expected[name]).max() for name, a in found.items()}


def labels(options, N):
    """None and, for a network with classes, labels (the last is "no label")."""
    classes = options.get("num_classes")
    return [None] if classes is None else [None, np.arange(N) % (classes + 1)]


@pytest.mark.parametrize("options", NETWORKS.values(), ids=NETWORKS)
def test_outputs_and_gradients_agree_in_float64(options, rng):
    ours, theirs, *batch, dy = make(options, np.float64, rng)
    for y in labels(options, 3):
        apart = differences(run_ours(ours, *batch, y, dy), run_theirs(theirs, *batch, y, dy))
        assert max(apart.values()) < 1e-9, max(apart.items(), key=lambda item: item[1])


@pytest.mark.parametrize("options", NETWORKS.values(), ids=NETWORKS)
def test_outputs_and_gradients_agree_in_float32(options, rng):
    """Rounding of Winograd's products shows: 1e-4 of an array's largest entry bounds it, several times over."""
    ours, theirs, *batch, dy = make(options, np.float32, rng)
    for y in labels(options, 3):
        apart = differences(run_ours(ours, *batch, y, dy), run_theirs(theirs, *batch, y, dy))
        assert apart["output"] < 3e-5
        assert max(apart.values()) < 1e-4, max(apart.items(), key=lambda item: item[1])


def test_the_comparison_sees_a_wrong_weight_anywhere(rng):
    """Negative control: one entry of one parameter off by 1 %, and the same check fails by a wide margin."""
    ours, theirs, *batch, dy = make(SMALL | dict(num_classes=3), np.float64, rng)
    expected = run_theirs(theirs, *batch, np.array([0, 1, 3]), dy)
    for value in itertools.islice(ours.parameters().values(), 0, None, 7):
        entry = np.unravel_index(np.abs(value).argmax(), value.shape)
        kept = value[entry]
        value[entry] *= 1.01
        apart = differences(run_ours(ours, *batch, np.array([0, 1, 3]), dy), expected)
        value[entry] = kept
        assert max(apart.values()) > 1e-6


def test_loading_refuses_other_networks(rng):
    ours = UNet(1, 1, **SMALL, rng=rng)
    with pytest.raises(ValueError, match="names differ"):
        load_from(TorchUNet(1, 1, **SMALL, num_classes=2), ours.parameters())
