"""The fake device must be strict, or the tests that lean on it prove nothing."""

import copy

import numpy as np
import pytest

from nn.backend import array_module, to_host
from tests.fake_device import NOT_IN_CUPY, FakeArray, Transfer, synchronisation_allowed, xp

HOST = np.ones((3, 4))


def device():
    return xp.asarray(np.arange(12.0).reshape(3, 4))


MIXTURES = {
    "device + host": lambda x: x + HOST,
    "host + device": lambda x: HOST + x,
    "host * 0-d device": lambda x: HOST * x[0, 0],
    "device += host": lambda x: x.__iadd__(HOST),
    "host += device": lambda x: np.add(HOST, x, out=HOST),
    "device @ host": lambda x: x @ HOST.T,
    "host @ device": lambda x: HOST.T @ x,
    "device == host": lambda x: x == HOST,
    "host < device": lambda x: HOST < x,
    "device + list": lambda x: x + [1, 2, 3, 4],
    "np ufunc": np.exp,
    "np function": np.sum,
    "np.matmul": lambda x: np.matmul(HOST.T, x),
    "np out=": lambda x: np.add(HOST, HOST, out=x),
    "np.asarray": np.asarray,
    "np.float64": lambda x: np.float64(x[0, 0]),
    "xp function of host": lambda x: xp.exp(HOST),
    "xp function of both": lambda x: xp.where(x > 1, HOST, x),
    "xp.concatenate of both": lambda x: xp.concatenate([x, HOST]),
    "xp.array of both": lambda x: xp.array([x, HOST]),
    "xp out=host": lambda x: xp.exp(x, out=HOST.copy()),
    "host index of device": lambda x: x[np.array([0, 1])],
    "list index of device": lambda x: x[[0, 1]],
    "device index of host": lambda x: HOST[x.astype(int)],
    "assign host to device": lambda x: x.__setitem__(0, HOST[0]),
    "assign device to host": lambda x: HOST.copy().__setitem__(0, x[0]),
    "array_module": lambda x: array_module(x, HOST),
    "where=": lambda x: xp.sum(x, where=x > 1),
}

SYNCHRONISATIONS = {
    "float": lambda x: float(x[0, 1]),
    "int": lambda x: int(x[0, 1]),
    "bool": lambda x: bool((x > 1).any()),
    "if": lambda x: 1 if x.sum() else 0,
    "item": lambda x: x.sum().item(),
    "tolist": lambda x: x.tolist(),
    "range": lambda x: range(x[0, 1].astype(int)),
    "boolean mask": lambda x: x[x > 1],
    "nonzero": lambda x: xp.nonzero(x),
    "where of one argument": lambda x: xp.where(x > 1),
}


@pytest.mark.parametrize("mixture", MIXTURES.values(), ids=MIXTURES)
def test_host_and_device_do_not_mix(mixture):
    with pytest.raises(TypeError):
        mixture(device())


@pytest.mark.parametrize("look", SYNCHRONISATIONS.values(), ids=SYNCHRONISATIONS)
def test_hidden_synchronisation_is_refused_unless_allowed(look, fake):
    x = device()
    with pytest.raises(TypeError, match="wait for the device"):
        look(x)
    fake.transfers.clear()
    with synchronisation_allowed():
        look(x)
    assert [transfer.direction for transfer in fake.transfers] == ["to_host"]


@pytest.mark.parametrize("name", sorted(NOT_IN_CUPY))
def test_what_cupy_lacks_is_absent(name):
    module = xp
    *parents, last = name.split(".")
    for parent in parents:
        module = getattr(module, parent)
    with pytest.raises(AttributeError, match="does not exist on the device"):
        getattr(module, last)


def test_generator_offers_what_cupys_does():
    rng = xp.random.default_rng([0, 1])
    draw = rng.standard_normal((2, 3), dtype=np.float32)
    assert isinstance(draw, FakeArray) and draw.dtype == np.float32
    host = np.random.default_rng([0, 1]).standard_normal((2, 3), dtype=np.float32)
    np.testing.assert_array_equal(to_host(draw), host)
    with pytest.raises(AttributeError):
        _ = rng.normal


def test_views_share_memory():
    x = device()
    view = x[1:, ::2]
    view += 100
    x[0, 1][...] = -1                                   # a full index is a 0-d view
    x.T[3, 0] = -2
    x.reshape(4, 3)[0, 0] = -3
    xp.lib.stride_tricks.as_strided(x, shape=(2,), strides=(16,))[1] = -4
    np.testing.assert_array_equal(to_host(x), [[-3, -1, -4, -2], [104, 5, 106, 7], [108, 9, 110, 11]])
    twin = copy.deepcopy(x)
    twin += 1
    assert to_host(x)[0, 0] == -3


def test_results_equal_numpys():
    x, host = device(), np.arange(12.0).reshape(3, 4)
    for f in (lambda x, xp: x.sum(axis=1), lambda x, xp: xp.tanh(x) @ x.T, lambda x, xp: xp.einsum("ij,kj->ik", x, x),
              lambda x, xp: xp.concatenate([x, 1 / (1 + x)], axis=1), lambda x, xp: xp.where(x > 3, x, -1.0),
              lambda x, xp: xp.pad(x, ((1, 0), (0, 2))), lambda x, xp: x.astype(xp.float32).transpose(1, 0),
              lambda x, xp: xp.linalg.eigh(x.T @ x)[0], lambda x, xp: xp.mean(x), lambda x, xp: np.float64(2) * x,
              lambda x, xp: 2**x, lambda x, xp: -x % 3, lambda x, xp: xp.zeros((2, 2), dtype=x.dtype)):
        result = f(x, xp)
        assert isinstance(result, FakeArray) and result.dtype == f(host, np).dtype
        np.testing.assert_array_equal(to_host(result), f(host, np))


def test_in_place_results_are_the_same_object():
    x = device()
    assert xp.exp(x, out=x) is x and x.sum(axis=0, out=x[0]).shape == (4,)
    before = x
    x *= 2
    assert x is before


def test_transfers_are_recorded(fake):
    x = fake.asarray(HOST)
    y = fake.tanh(x[:2] * 3.0 + np.float64(1))
    assert fake.asarray(y) is y and fake.zeros(3).ndim == 1
    assert fake.transfers == [Transfer("to_device", (3, 4))]
    y.get()
    assert fake.transfers[1:] == [Transfer("to_host", (2, 4))]


def test_scipys_special_functions():
    assert array_module(xp.special.log_ndtr(device())) is xp
    with pytest.raises(AttributeError):
        _ = xp.special.wrightomega
