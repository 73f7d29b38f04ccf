"""The whole U-Net: its layout written out, its size, its gradients, its arguments."""

import numpy as np
import pytest

import nn
from nn import Adam, UNet
from nn.dropout import Dropout
from tests import reference
from tests.reference import error

SMALL = dict(base_channels=8, channel_mults=(1, 2), attention_levels=(1,), heads=2, groups=4)


def make(rng, **options):
    """A small float64 network with no zeros among its parameters."""
    net = UNet(1, 2, **SMALL | {"rng": rng, "dtype": np.float64} | options)
    net.flat_parameters[...] = 0.3 * rng.standard_normal(net.num_parameters)
    return net


def hold_masks(net, *inputs):
    """Keep the dropout masks of one forward for all that follow; the list of masks."""
    net(*inputs)
    layers = [m for m in net.modules() if isinstance(m, Dropout)]
    for layer in layers:
        layer.mask = layer._cache[0]
    return [layer.mask for layer in layers]


# ---- what it computes

def written_out(p, x, t, y, *, channel_mults=(1, 2), blocks_per_level=1, attention_levels=(1,), heads=2, groups=4):
    """The network from its parameters p and the loops of tests/reference.py."""
    def linear(name, v):
        return v @ p[name + ".weight"] + p[name + ".bias"]

    def conv(name, v, stride=1):
        return reference.conv(v, p[name + ".weight"], p[name + ".bias"], stride)

    def norm(name, v):
        return reference.group_norm(v, p[name + ".weight"], p[name + ".bias"], groups)

    def residual(name, v):
        h = conv(name + ".conv1", silu(norm(name + ".norm1", v))) + linear(name + ".project", e)
        h = conv(name + ".conv2", silu(norm(name + ".norm2", h)))
        return h + (conv(name + ".skip", v) if v.shape[3] != h.shape[3] else v)

    def attention(name, v):
        qkv = linear(name + ".attention.qkv", norm(name + ".norm", v).reshape(-1, *v.shape[2:]))
        return v + linear(name + ".attention.out", reference.attention(qkv, heads)).reshape(v.shape)

    silu, last = reference.silu, len(channel_mults) - 1
    e = linear("time.linear2", silu(linear("time.linear1", nn.timestep_embedding(t, p["input.bias"].size))))
    if y is not None:
        e = e + p["label.table"][y]
    e, h = silu(e), conv("input", x.transpose(1, 2, 0, 3))
    skips, stage = [h], 0
    for level in range(last + 1):
        for _ in range(blocks_per_level):
            h = residual(f"down.{stage}.layers.0", h)
            h = attention(f"down.{stage}.layers.1", h) if level in attention_levels else h
            skips.append(h)
            stage += 1
        if level < last:
            h = conv(f"down.{stage}.layers.0", h, stride=2)
            skips.append(h)
            stage += 1
    h = residual("middle.layers.2", attention("middle.layers.1", residual("middle.layers.0", h)))
    stage = 0
    for level in range(last, -1, -1):
        for i in range(blocks_per_level + 1):
            h = residual(f"up.{stage}.layers.0", np.concatenate([h, skips.pop()], axis=3))
            h = attention(f"up.{stage}.layers.1", h) if level in attention_levels else h
            if level > 0 and i == blocks_per_level:
                h = conv(f"up.{stage}.layers.{1 + (level in attention_levels)}", reference.upsample(h))
            stage += 1
    assert not skips
    return conv("output", silu(norm("norm", h))).transpose(2, 0, 1, 3)


@pytest.mark.parametrize("options", [
    {}, {"blocks_per_level": 2}, {"channel_mults": (1, 1, 2), "attention_levels": (0, 2)},
    {"channel_mults": (1,), "attention_levels": ()}], ids=str)
def test_equals_the_layout_written_out(options, rng):
    net = make(rng, num_classes=3, **options)
    x, t, y = rng.standard_normal((2, 4, 8, 1)), np.array([3, 700]), np.array([2, 0])
    assert error(net(x, t, y), written_out(net.parameters(), x, t, y, **options)) < 1e-10
    assert error(net(x, t), written_out(net.parameters(), x, t, np.array([3, 3]), **options)) < 1e-10
    unlabelled = make(rng, **options)
    assert error(unlabelled(x, t), written_out(unlabelled.parameters(), x, t, None, **options)) < 1e-10


def test_sizes(rng):
    assert UNet(1, 2, rng=rng).num_parameters == 1_113_090
    larger = UNet(1, 2, base_channels=48, channel_mults=(1, 2, 3), blocks_per_level=2, rng=rng)
    assert larger.num_parameters == 5_853_554
    small, labelled = make(rng), make(rng, num_classes=10)
    assert labelled.num_parameters - small.num_parameters == 11 * 4 * 8


def test_it_starts_at_zero_in_float32(rng):
    net = UNet(3, 6, rng=rng, **SMALL)
    y = net(rng.standard_normal((2, 4, 6, 3), dtype=np.float32), 5)
    assert y.shape == (2, 4, 6, 6) and y.dtype == np.float32 and not y.any()
    assert y.flags.c_contiguous


# ---- gradients

@pytest.mark.parametrize("mode", ["train", "eval", "fixed masks"])
@pytest.mark.parametrize("N", [1, 2])
def test_gradients(mode, N, rng):
    net = make(rng, num_classes=3, dropout=0.0 if mode == "train" else 0.2)
    x, t, y = rng.standard_normal((N, 6, 10, 1)), rng.integers(1, 1000, N), rng.integers(0, 4, N)
    if mode == "eval":
        net.eval()
    if mode == "fixed masks":
        assert all((mask == 0).any() for mask in hold_masks(net, x, t, y))
    assert nn.gradcheck(net, x, t, y, rng=rng) <= 1e-6
    assert nn.gradcheck(net, x, t, rng=rng, directions=1) <= 1e-6


def test_gradients_of_three_levels_with_attention_on_two(rng):
    net = make(rng, channel_mults=(1, 2, 1), attention_levels=(1, 2), blocks_per_level=2)
    assert nn.gradcheck(net, rng.standard_normal((1, 4, 8, 1)), 300, rng=rng) <= 1e-6


def test_gradient_of_every_parameter_on_its_own(rng):
    """One difference per array, so that no small gradient hides behind a large one."""
    net = make(rng, num_classes=2)
    x, t, y = rng.standard_normal((2, 6, 4, 1)), np.array([5, 900]), np.array([1, 0])
    dy = rng.standard_normal(net(x, t, y).shape)
    net.zero_grad()
    net(x, t, y)
    net.backward(dy)
    gradients = {name: g.copy() for name, g in net.gradients().items()}
    for name, value in net.parameters().items():
        start, v, ends = value.copy(), rng.standard_normal(value.shape), []
        for step in (1e-5, -1e-5):
            value[...] = start + step * v
            ends.append((dy * net(x, t, y)).sum())
        value[...] = start
        difference = (ends[0] - ends[1]) / 2e-5
        assert abs((gradients[name] * v).sum() - difference) <= 1e-6 * max(abs(difference), 1e-2), name


@pytest.mark.parametrize("levels, H, W", [(1, 7, 5), (1, 1, 1), (2, 28, 28), (2, 14, 10), (2, 6, 10), (2, 2, 2),
                                          (3, 4, 12)])
def test_any_divisible_size(levels, H, W, rng):
    net = make(rng, channel_mults=(1,) * levels, attention_levels=(levels - 1,))
    x = rng.standard_normal((1, H, W, 1))
    assert net(x, 7).shape == (1, H, W, 2)
    assert nn.gradcheck(net, x, 7, rng=rng, directions=1) <= 1e-6


def test_non_contiguous_images(rng):
    net = make(rng)
    x, dy = rng.standard_normal((2, 6, 4, 1)), rng.standard_normal((2, 6, 4, 2))
    y = net(x, 9)
    dx = net.backward(dy)
    strided, dstrided = np.asfortranarray(x), np.repeat(dy, 2, axis=2)[:, :, ::2]
    np.testing.assert_array_equal(net(strided, 9), y)
    np.testing.assert_array_equal(net.backward(dstrided), dx)


def test_float32_is_close_to_float64(rng):
    double = make(rng, num_classes=2)
    single = UNet(1, 2, **SMALL, num_classes=2, rng=rng)
    single.load(double.parameters())
    x, dy, t = rng.standard_normal((2, 8, 8, 1)), rng.standard_normal((2, 8, 8, 2)), np.array([1, 1000])
    assert error(single(x.astype(np.float32), t), double(x, t)) < 1e-4
    assert error(single.backward(dy.astype(np.float32)), double.backward(dy)) < 1e-4
    assert error(single.flat_gradients, double.flat_gradients) < 1e-4


def test_without_params_gradients_stay(rng):
    net = make(rng, num_classes=2)
    x, dy = rng.standard_normal((2, 6, 4, 1)), rng.standard_normal((2, 6, 4, 2))
    net(x, 5)
    dx = net.backward(dy)
    net.flat_gradients[...] = np.nan
    np.testing.assert_array_equal(net.backward(dy, params=False), dx)
    assert np.isnan(net.flat_gradients).all()


def test_without_params_no_layer_does_parameter_work(rng, monkeypatch):
    def forbidden(*args, **kwargs):
        raise AssertionError("parameter work")
    net = make(rng, num_classes=2)
    x, dy = rng.standard_normal((2, 6, 4, 1)), rng.standard_normal((2, 6, 4, 2))
    net(x, 5)
    for target in ("nn.conv.filter_transform_backward", "nn.embedding.embedding_backward",
                   "nn.blocks.TimeEmbedding.backward"):
        monkeypatch.setattr(target, forbidden)
    for layer in net.modules():
        if hasattr(layer, "project"):
            layer.project.backward = forbidden
    net.backward(dy, params=False)
    with pytest.raises(AssertionError, match="parameter work"):
        net.backward(dy)


def test_two_micro_batches_add_up_to_one_batch(rng):
    net = make(rng, num_classes=2)
    x, dy = rng.standard_normal((5, 6, 4, 1)), rng.standard_normal((5, 6, 4, 2))
    t, labels = rng.integers(1, 1000, 5), rng.integers(0, 3, 5)
    net.zero_grad()
    y = net(x, t, labels)
    dx = net.backward(dy)
    whole = net.flat_gradients.copy()
    net.zero_grad()
    for part in (slice(0, 2), slice(2, 5)):
        assert error(net(x[part], t[part], labels[part]), y[part]) < 1e-11  # images do not see each other
        assert error(net.backward(dy[part]), dx[part]) < 1e-11
    assert error(net.flat_gradients, whole) < 1e-11
    net.zero_grad()
    net(x[:2], t[:2], labels[:2])
    net.backward(dy[:2])
    assert error(net.flat_gradients, whole) > 1e-2                          # one of them is not enough


# ---- time, labels, modes

def test_time_is_an_int_or_one_for_each_image(rng):
    net, x = make(rng), rng.standard_normal((3, 4, 4, 1))
    y = net(x, np.array([5, 900, 5]))
    assert error(net(x, 5)[[0, 2]], y[[0, 2]]) < 1e-12 and error(net(x, 900)[1:2], y[1:2]) < 1e-12
    assert error(net(x, 5)[1:2], y[1:2]) > 1e-3


def test_no_label_is_the_last_row_of_the_table(rng):
    net, x = make(rng, num_classes=3), rng.standard_normal((2, 4, 4, 1))
    np.testing.assert_array_equal(net(x, 5), net(x, 5, np.array([3, 3])))
    np.testing.assert_array_equal(net(x, 5, 1), net(x, 5, np.array([1, 1])))
    assert error(net(x, 5, 1), net(x, 5, 2)) > 1e-3
    net.zero_grad()
    net(x, 5)
    net.backward(np.ones((2, 4, 4, 2)))
    assert net.gradients()["label.table"][3].any() and not net.gradients()["label.table"][:3].any()


def test_dropout_is_on_in_training_only(rng):
    net, x = make(rng, dropout=0.5), rng.standard_normal((2, 4, 4, 1))
    assert error(net(x, 5), net(x, 5)) > 1e-3
    net.eval()
    np.testing.assert_array_equal(net(x, 5), net(x, 5))
    without = make(rng)
    without.load(net.parameters())
    np.testing.assert_array_equal(net(x, 5), without(x, 5))


def test_backward_belongs_to_the_last_forward(rng):
    net = make(rng)
    with pytest.raises(RuntimeError, match="UNet.backward: call forward first"):
        net.backward(np.ones((2, 4, 4, 2)))
    first, second, dy = (rng.standard_normal(s) for s in ((2, 4, 4, 1), (3, 4, 6, 1), (3, 4, 6, 2)))
    y = net(first, 5)
    kept = y.copy()
    net(second, 8)
    dx = net.backward(dy)
    np.testing.assert_array_equal(y, kept)
    net(second, 8)
    np.testing.assert_array_equal(net.backward(dy), dx)
    with pytest.raises(ValueError, match=r"dy has shape \(2, 4, 4, 2\), but the last forward returned \(3, 4, 6, 2\)"):
        net.backward(np.ones((2, 4, 4, 2)))


def test_inputs_are_left_alone(rng):
    net, x = make(rng, num_classes=2), rng.standard_normal((2, 4, 4, 1))
    t, y, dy = np.array([1, 2]), np.array([0, 1]), rng.standard_normal((2, 4, 4, 2))
    for a in (x, t, y, dy):
        a.flags.writeable = False
    net(x, t, y)
    net.backward(dy)


def test_training_lowers_a_loss(rng):
    net = UNet(1, 1, rng=rng, **SMALL)
    x, target = rng.standard_normal((2, 4, 4, 1), dtype=np.float32), rng.standard_normal((2, 4, 4, 1), dtype=np.float32)
    optimiser, losses = Adam(net, lr=3e-3), []
    for _ in range(30):
        difference = net(x, 5) - target
        losses.append(float((difference**2).mean()))
        net.zero_grad()
        net.backward(difference)
        optimiser.step()
    assert losses[-1] < 0.2 * losses[0]


# ---- errors

def test_bad_arguments_raise(rng):
    net = make(rng)
    with pytest.raises(ValueError, match=r"images of 5x4 can't be halved 1 times.*divisible by 2"):
        net(np.zeros((1, 5, 4, 1)), 1)
    with pytest.raises(ValueError, match=r"divisible by 4"):
        make(rng, channel_mults=(1, 1, 1))(np.zeros((1, 4, 6, 1)), 1)
    for shape in ((1, 4, 4, 2), (4, 4, 1)):
        with pytest.raises(ValueError, match=r"x must be \(N, H, W, 1\)"):
            net(np.zeros(shape), 1)
    with pytest.raises(ValueError, match="x is float32, but the network computes in float64"):
        net(np.zeros((1, 4, 4, 1), np.float32), 1)
    with pytest.raises(ValueError, match="made without num_classes"):
        net(np.zeros((1, 4, 4, 1)), 1, np.array([0]))
    labelled = make(rng, num_classes=3)
    for label in (-1, 4):
        with pytest.raises(ValueError, match=r"labels must lie in 0..3"):
            labelled(np.zeros((2, 4, 4, 1)), 1, np.array([0, label]))
    for label in (np.array([0, 1, 2]), np.array([0.0, 1.0])):
        with pytest.raises(ValueError, match=r"labels must be an int or 2 integers"):
            labelled(np.zeros((2, 4, 4, 1)), 1, label)
    with pytest.raises(ValueError, match="t must be an int or 2 integers"):
        net(np.zeros((2, 4, 4, 1)), np.array([1, 2, 3]))
    with pytest.raises(ValueError, match=r"attention_levels \(2,\) must lie in 0..1"):
        make(rng, attention_levels=(2,))
    with pytest.raises(ValueError, match="do not divide into 3 groups"):
        make(rng, groups=3)
