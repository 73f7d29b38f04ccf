"""What every layer promises: gradients, one flat buffer, and a backward that belongs to the last forward."""

import copy
import pickle

import numpy as np
import pytest

import nn
from nn.blocks import AttentionBlock
from nn.module import Module, Parameter
from tests.reference import error


def fixed_dropout(shape, rng, dtype):
    layer = nn.Dropout(0.3, rng=rng)
    layer.mask = ((rng.random(shape) > 0.3) / 0.7).astype(dtype)
    return layer


LAYERS = {
    "linear": ((2, 4, 5), lambda rng, dtype: nn.Linear(5, 3, rng=rng, dtype=dtype)),
    "linear, no bias": ((3, 5), lambda rng, dtype: nn.Linear(5, 4, rng=rng, bias=False, dtype=dtype)),
    "conv 1x1": ((3, 5, 2, 4), lambda rng, dtype: nn.Conv2d(4, 3, 1, rng=rng, dtype=dtype)),
    "conv 1x1, stride 2": ((3, 5, 2, 4), lambda rng, dtype: nn.Conv2d(4, 3, 1, stride=2, rng=rng, dtype=dtype)),
    "conv 3x3, narrow": ((5, 4, 2, 2), lambda rng, dtype: nn.Conv2d(2, 3, rng=rng, dtype=dtype)),
    "conv 3x3, narrowing": ((5, 4, 2, 5), lambda rng, dtype: nn.Conv2d(5, 2, rng=rng, dtype=dtype)),
    "conv 3x3, Winograd": ((7, 5, 2, 8), lambda rng, dtype: nn.Conv2d(8, 9, rng=rng, dtype=dtype)),
    "conv 3x3, no bias": ((3, 6, 1, 9), lambda rng, dtype: nn.Conv2d(9, 8, bias=False, rng=rng, dtype=dtype)),
    "conv 5x5": ((6, 3, 2, 3), lambda rng, dtype: nn.Conv2d(3, 4, 5, rng=rng, dtype=dtype)),
    "conv 5x5, stride 2": ((6, 3, 2, 3), lambda rng, dtype: nn.Conv2d(3, 2, 5, stride=2, rng=rng, dtype=dtype)),
    "downsample": ((5, 8, 2, 3), lambda rng, dtype: nn.Downsample(3, rng=rng, dtype=dtype)),
    "upsample": ((3, 4, 2, 3), lambda rng, dtype: nn.Upsample(3, rng=rng, dtype=dtype)),
    "group norm": ((3, 5, 2, 6), lambda rng, dtype: nn.GroupNorm(3, 6, dtype=dtype)),
    "group norm, SiLU": ((3, 5, 2, 6), lambda rng, dtype: nn.GroupNorm(2, 6, dtype=dtype, silu=True)),
    "SiLU": ((3, 5, 2, 4), lambda rng, dtype: nn.SiLU()),
    "attention": ((3, 4, 2, 6), lambda rng, dtype: nn.SelfAttention(6, 2, rng=rng, dtype=dtype)),
    "attention block": ((2, 3, 1, 6), lambda rng, dtype: AttentionBlock(6, 3, groups=2, rng=rng, dtype=dtype)),
    "dropout": ((3, 5, 2, 4), lambda rng, dtype: fixed_dropout((3, 5, 2, 4), rng, dtype)),
    "dropout, eval": ((3, 5, 2, 4), lambda rng, dtype: nn.Dropout(0.3, rng=rng).eval()),
}


def has_parameters(layer):
    return any(True for _ in layer.named_parameters())


def layer_and_input(name, rng, dtype=np.float64):
    shape, make = LAYERS[name]
    layer = make(rng, dtype)
    if has_parameters(layer):
        layer.flat_parameters[...] = 0.5 * rng.standard_normal(layer.num_parameters)     # no zero biases
    return layer, rng.standard_normal(shape).astype(dtype)


every_layer = pytest.mark.parametrize("name", LAYERS)


# ---- gradients

@every_layer
def test_gradients_match_central_differences(name, rng):
    layer, x = layer_and_input(name, rng)
    assert nn.gradcheck(layer, x, rng=rng) <= 1e-6


@every_layer
def test_gradients_of_one_image(name, rng):
    if name == "dropout":
        return                                                              # its mask is made for two
    layer, x = layer_and_input(name, rng)
    assert nn.gradcheck(layer, x[..., :1, :], rng=rng) <= 1e-6


@every_layer
def test_non_contiguous_input_and_gradient_change_nothing(name, rng):
    layer, x = layer_and_input(name, rng)
    y = layer(x).copy()
    dy = rng.standard_normal(y.shape)
    dx = layer.backward(dy).copy()
    strided = np.repeat(np.moveaxis(np.moveaxis(x, -1, 0).copy(), 0, -1), 2, axis=1)[:, ::2]
    assert strided.shape == x.shape and not strided.flags.c_contiguous
    np.testing.assert_allclose(layer(strided), y, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(layer.backward(np.asfortranarray(dy)), dx, rtol=1e-12, atol=1e-12)
    assert nn.gradcheck(layer, strided, rng=rng) <= 1e-6


@every_layer
def test_float32_stays_float32_and_agrees_with_float64(name):
    results = {}
    for dtype in (np.float64, np.float32):
        rng = np.random.default_rng(3)
        layer, x = layer_and_input(name, rng, dtype)
        y = layer(x)
        dx = layer.backward(rng.standard_normal(y.shape).astype(dtype))
        results[dtype] = [y, dx] + ([layer.flat_gradients] if has_parameters(layer) else [])
    for single, double in zip(results[np.float32], results[np.float64], strict=True):
        assert single.dtype == np.float32 and double.dtype == np.float64
        assert error(single, double) < 2e-5


# ---- params=False

@every_layer
def test_backward_without_params_leaves_gradients_alone(name, rng):
    layer, x = layer_and_input(name, rng)
    dy = rng.standard_normal(layer(x).shape)
    dx = layer.backward(dy).copy()
    layer(x)
    if has_parameters(layer):
        layer.flat_gradients[...] = np.nan
    np.testing.assert_array_equal(layer.backward(dy, params=False), dx)
    if has_parameters(layer):
        assert np.isnan(layer.flat_gradients).all()


# ---- forward and backward, in any order

@every_layer
def test_backward_belongs_to_the_last_forward(name, rng):
    layer, first = layer_and_input(name, rng)
    second = rng.standard_normal(first.shape)
    y_first = layer(first)
    kept = y_first.copy()
    y_second = layer(second)
    dy = rng.standard_normal(y_second.shape)
    dx = layer.backward(dy).copy()
    np.testing.assert_array_equal(y_first, kept)                            # not overwritten by the second forward
    fresh, _ = layer_and_input(name, np.random.default_rng(0))
    if has_parameters(layer):
        fresh.load(layer.parameters())
    elif name == "dropout":
        fresh.mask = layer.mask
    np.testing.assert_array_equal(fresh(second), y_second)
    np.testing.assert_array_equal(fresh.backward(dy), dx)
    if has_parameters(layer):
        np.testing.assert_array_equal(fresh.flat_gradients, layer.flat_gradients)


@every_layer
def test_backward_twice_doubles_the_gradients_and_inputs_are_read_only(name, rng):
    layer, x = layer_and_input(name, rng)
    dy = rng.standard_normal(layer(x).shape)
    x.flags.writeable = dy.flags.writeable = False
    layer(x)
    dx = layer.backward(dy).copy()
    if not has_parameters(layer):
        np.testing.assert_array_equal(layer.backward(dy), dx)
        return
    once = layer.flat_gradients.copy()
    np.testing.assert_array_equal(layer.backward(dy), dx)
    np.testing.assert_array_equal(layer.flat_gradients, 2 * once)
    assert np.abs(once).max() > 0


@every_layer
def test_backward_without_forward_raises(name, rng):
    layer, x = layer_and_input(name, rng)
    with pytest.raises(RuntimeError, match="call forward first"):
        layer.backward(x)


@every_layer
def test_backward_with_another_shape_raises(name, rng):
    layer, x = layer_and_input(name, rng)
    y = layer(x)
    for wrong in (np.ones(y.shape[:-1] + (y.shape[-1] + 1,)), np.ones((y.shape[0] + 1,) + y.shape[1:])):
        with pytest.raises(ValueError, match="dy has shape"):
            layer.backward(wrong)


# ---- on a device

@every_layer
def test_a_device_gives_the_same_numbers_without_a_transfer(name, rng, fake):
    layer, x = layer_and_input(name, rng)
    y = layer(x)
    dy = rng.standard_normal(y.shape)
    dx = layer.backward(dy)
    gradients = layer.flat_gradients.copy() if has_parameters(layer) else None
    for p in (p for _, p in layer.named_parameters()):
        p.value, p.grad = fake.asarray(p.value), fake.zeros(p.value.shape)
    if name == "dropout":
        layer.mask = fake.asarray(layer.mask)
    moved_x, moved_dy = fake.asarray(x), fake.asarray(dy)
    layer(moved_x)                                                          # brings the constants of Winograd over
    fake.transfers.clear()
    moved_y = layer(moved_x)
    moved_dx = layer.backward(moved_dy)
    assert fake.transfers == []
    assert error(fake.asnumpy(moved_y), y) < 1e-12 and error(fake.asnumpy(moved_dx), dx) < 1e-12
    if gradients is not None:
        assert error(fake.asnumpy(layer.flat_gradients), gradients) < 1e-12


# ---- the flat buffers

class Pair(Module):
    """Two linear layers with a scale of their own between them, enough of a tree to walk."""

    def __init__(self, rng):
        self.layers = [nn.Linear(2, 3, rng=rng, dtype=np.float64), nn.Linear(3, 1, rng=rng, dtype=np.float64)]
        self.scale = Parameter(np.ones(3))

    def forward(self, x):
        h = self.layers[0](x)
        return self._remember(self.layers[1](h * self.scale.value), h)

    def backward(self, dy, *, params=True):
        h, d = self._recall(dy), self.layers[1].backward(dy, params=params)
        if params:
            self.scale.grad += (d * h).sum(axis=0)
        return self.layers[0].backward(d * self.scale.value, params=params)


NAMES = ["scale", "layers.0.weight", "layers.0.bias", "layers.1.weight", "layers.1.bias"]


def test_names_come_in_order_and_gradients_have_the_parameters_shapes(rng):
    module = Pair(rng)
    assert list(module.parameters()) == list(module.gradients()) == NAMES
    for name, value in module.parameters().items():
        assert module.gradients()[name].shape == value.shape
    assert module.num_parameters == 3 + 6 + 3 + 3 + 1 == module.flat_parameters.size == module.flat_gradients.size


def test_parameters_and_gradients_are_views_of_the_flat_buffers(rng):
    module = Pair(rng)
    before = np.concatenate([p.value.ravel() for _, p in module.named_parameters()])
    np.testing.assert_array_equal(module.flat_parameters, before)
    for flat, arrays in ((module.flat_parameters, module.parameters()), (module.flat_gradients, module.gradients())):
        assert flat.flags.c_contiguous
        assert all(np.shares_memory(flat, a) for a in arrays.values())
        flat[...] = np.arange(flat.size)
        np.testing.assert_array_equal(np.concatenate([a.ravel() for a in arrays.values()]), np.arange(flat.size))
        arrays["layers.1.bias"][...] = -5
        assert flat[-1] == -5
    assert module.flat_parameters is module.flat_parameters                 # made once
    assert nn.gradcheck(module, rng.standard_normal((4, 2)), rng=rng) <= 1e-6
    module.zero_grad()
    assert not module.flat_gradients.any()


def test_a_module_without_parameters_says_so():
    with pytest.raises(ValueError, match="SiLU has no parameters"):
        _ = nn.SiLU().flat_parameters


def test_use_buffers_keeps_the_values_and_stays_in_the_given_memory(rng):
    module = Pair(rng)
    values, shared = module.flat_parameters.copy(), np.zeros((3, module.num_parameters))
    module.flat_gradients[...] = 7
    # Rows of a larger array are views themselves, as pieces of a memory that processes share are.
    module.use_buffers(shared[0], shared[2])
    np.testing.assert_array_equal(shared, [values, 0 * values, 0 * values + 7])
    module.flat_parameters[...] += 1
    module.parameters()["scale"][...] = 9
    module.zero_grad()
    module(np.ones((2, 2)))
    module.backward(np.ones((2, 1)))
    np.testing.assert_array_equal(shared[0], np.r_[9, 9, 9, values[3:] + 1])
    assert shared[2].any() and np.shares_memory(module.flat_gradients, shared)


def test_use_buffers_refuses_another_size(rng):
    with pytest.raises(ValueError, match="vectors of 16 entries"):
        Pair(rng).use_buffers(np.zeros(16), np.zeros(15))


def test_a_parent_adopts_a_part_that_had_buffers_of_its_own(rng):
    part = nn.Linear(2, 3, rng=rng, dtype=np.float64)
    part.flat_parameters[...] = 5
    part.flat_gradients[...] = 6
    module = Pair(rng)
    module.flat_parameters[...] = 1
    module.layers[0] = part
    assert (module.flat_parameters[3:12] == 5).all() and (module.flat_gradients[3:12] == 6).all()
    assert (module.flat_parameters[12:] == 1).all()
    module.flat_parameters[...] = 2
    assert (part.parameters()["weight"] == 2).all()
    assert nn.gradcheck(module, rng.standard_normal((4, 2)), rng=rng) <= 1e-6


def test_a_parameter_that_came_later_is_taken_in(rng):
    module = Pair(rng)
    module.flat_parameters[...] = 1
    module.layers.append(nn.Linear(1, 1, rng=rng, dtype=np.float64))
    assert module.flat_parameters.size == module.flat_gradients.size == 18
    assert (module.flat_parameters[:16] == 1).all()
    module.flat_parameters[...] = 3
    assert (module.layers[2].weight.value == 3).all()


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))],
                         ids=["deepcopy", "pickle"])
def test_a_copy_is_a_network_of_its_own(duplicate, rng):
    module, x = Pair(rng), rng.standard_normal((4, 2))
    module.flat_gradients[...] = 4
    y = module(x)
    other = duplicate(module)
    np.testing.assert_array_equal(other.flat_parameters, module.flat_parameters)
    np.testing.assert_array_equal(other.flat_gradients, module.flat_gradients)
    other.flat_parameters[...] = 0
    assert not other(x).any() and not other.parameters()["scale"].any()     # its buffer is its own parameters
    np.testing.assert_array_equal(module(x), y)
    assert nn.gradcheck(other, x, rng=rng) <= 1e-6


def test_load_copies_and_refuses_what_does_not_fit(rng):
    source, target = Pair(rng), Pair(rng)
    target.load(source.parameters())
    np.testing.assert_array_equal(target.flat_parameters, source.flat_parameters)
    source.flat_parameters[...] = 0
    assert target.flat_parameters.any()                                     # a copy, not a view
    arrays = dict(source.parameters())
    with pytest.raises(ValueError, match=r"missing \['scale'\], unknown \['size'\]"):
        target.load({("size" if name == "scale" else name): a for name, a in arrays.items()})
    with pytest.raises(ValueError, match=r"layers.0.weight has shape \(3, 2\), but the network needs \(2, 3\)"):
        target.load(arrays | {"layers.0.weight": np.zeros((3, 2))})


def test_train_and_eval_reach_every_module(rng):
    module = Pair(rng)
    assert module.training
    assert module.eval() is module and not any(m.training for m in module.modules())
    assert module.train() is module and all(m.training for m in module.modules())
    assert [type(m).__name__ for m in module.modules()] == ["Pair", "Linear", "Linear"]


def test_to_refuses_unknown_devices_and_forgets_the_last_forward(rng):
    module = Pair(rng)
    values = module.flat_parameters.copy()
    with pytest.raises(ValueError, match='"cpu" or "cuda"'):
        module.to("tpu")
    y = module(np.ones((2, 2)))
    assert module.to("cpu") is module
    np.testing.assert_array_equal(module.flat_parameters, values)
    with pytest.raises(RuntimeError, match="call forward first"):
        module.backward(y)
