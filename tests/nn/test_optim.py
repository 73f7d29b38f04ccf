"""Adam and clipping against textbook loops, whole and in spans."""

import math

import numpy as np
import pytest

from nn import Adam, Linear, clip_grad_norm
from tests.reference import error


def textbook_adam(theta, gradients, lr, b1, b2, eps, weight_decay):
    """Every parameter after every step, one number at a time."""
    m, v = [0.0] * len(theta), [0.0] * len(theta)
    theta, history = list(theta), []
    for k, g in enumerate(gradients, start=1):
        for i in range(len(theta)):
            m[i] = b1 * m[i] + (1 - b1) * g[i]
            v[i] = b2 * v[i] + (1 - b2) * g[i]**2
            m_hat, v_hat = m[i] / (1 - b1**k), v[i] / (1 - b2**k)
            theta[i] -= lr * (m_hat / (math.sqrt(v_hat) + eps) + weight_decay * theta[i])
        history.append(list(theta))
    return np.array(history)


def layer(rng, dtype=np.float64, size=6):
    return Linear(size, size, rng=rng, dtype=dtype)


def run(module, optimisers, gradients, spans=(slice(None),)):
    history = []
    for g in gradients:
        module.flat_gradients[...] = g
        for optimiser, span in zip(optimisers, spans, strict=True):
            optimiser.step(span)
        history.append(module.flat_parameters.copy())
    return np.array(history)


@pytest.mark.parametrize("options", [
    {}, {"lr": 0.1, "betas": (0.5, 0.9), "eps": 1e-3}, {"lr": 0.02, "weight_decay": 0.3},
    {"betas": (0.0, 0.0)}], ids=str)
def test_adam_is_the_textbooks(options, rng):
    module = layer(rng)
    full = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0} | options
    start, gradients = module.flat_parameters.copy(), rng.standard_normal((7, module.num_parameters))
    expected = textbook_adam(start, gradients, full["lr"], *full["betas"], full["eps"], full["weight_decay"])
    assert error(run(module, [Adam(module, **options)], gradients), expected) < 1e-13


@pytest.mark.parametrize("wrong", ["no correction", "decay in the gradient", "eps under the root"])
def test_nearby_formulas_are_noticed(wrong, rng):
    module, options = layer(rng), dict(lr=0.02, b1=0.9, b2=0.99, eps=1e-2, weight_decay=0.3)
    start, gradients = module.flat_parameters.copy(), rng.standard_normal((5, module.num_parameters))
    optimiser = Adam(module, 0.02, (0.9, 0.99), 1e-2, 0.3)
    actual = run(module, [optimiser], gradients)
    theta, m, v, (b1, b2) = start.copy(), 0, 0, (0.9, 0.99)
    for k, g in enumerate(gradients, start=1):
        g = g + 0.3 * theta if wrong == "decay in the gradient" else g
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
        c1, c2 = (1, 1) if wrong == "no correction" else (1 - b1**k, 1 - b2**k)
        root = np.sqrt(v / c2 + 1e-2) if wrong == "eps under the root" else np.sqrt(v / c2) + 1e-2
        theta = theta - 0.02 * (m / c1 / root + 0.3 * theta * (wrong != "decay in the gradient"))
    moved = textbook_adam(start, gradients, **options)[-1] - start
    assert error(actual[-1] - start, moved) < 1e-12
    assert error(theta - start, moved) > 1e-3


def test_adam_over_several_blocks(rng):
    module = layer(rng, size=200)                                           # 40,200 float64: three blocks of 128 KB
    start, gradients = module.flat_parameters.copy(), rng.standard_normal((2, module.num_parameters))
    expected = textbook_adam(start, gradients, 0.01, 0.9, 0.999, 1e-8, 0.1)
    assert error(run(module, [Adam(module, 0.01, weight_decay=0.1)], gradients), expected) < 1e-13


def test_spans_equal_the_whole(rng):
    """Three ranks that share buffers, each with an optimiser of its own, update a third each."""
    whole, shared = layer(rng), layer(rng)
    shared.load(whole.parameters())
    n = whole.num_parameters
    spans = [slice(0, n // 3), slice(n // 3, n // 2), slice(n // 2, n)]
    state = np.full(n, np.nan), np.full(n, np.nan)
    ranks = [Adam(shared, 0.1, weight_decay=0.2, state=state) for _ in spans]
    gradients = rng.standard_normal((4, n))
    np.testing.assert_array_equal(run(shared, ranks, gradients, spans),
                                  run(whole, [Adam(whole, 0.1, weight_decay=0.2)], gradients))
    assert all(rank.m is state[0] and rank.v is state[1] and rank.steps == 4 for rank in ranks)
    before = shared.flat_parameters.copy()
    ranks[1].step(spans[1])
    changed = shared.flat_parameters != before
    assert changed[spans[1]].all() and not changed[spans[0]].any() and not changed[spans[2]].any()


def test_float32_stays_float32_and_close(rng):
    single, double = layer(rng, np.float32), layer(rng)
    double.load(single.parameters())
    gradients = rng.standard_normal((10, single.num_parameters))
    optimiser = Adam(single, 0.01)
    actual = run(single, [optimiser], gradients.astype(np.float32))
    assert actual.dtype == optimiser.m.dtype == optimiser.v.dtype == np.float32
    assert error(actual, run(double, [Adam(double, 0.01)], gradients)) < 1e-5


def test_the_rate_may_change_between_steps(rng):
    module = layer(rng)
    optimiser, start = Adam(module, 0.0), module.flat_parameters.copy()
    module.flat_gradients[...] = 1
    optimiser.step()
    np.testing.assert_array_equal(module.flat_parameters, start)
    optimiser.lr = 0.5
    optimiser.step()
    np.testing.assert_allclose(start - module.flat_parameters, 0.5, rtol=1e-7)


def test_adam_follows_a_network_that_moved_to_other_buffers(rng):
    module = layer(rng)
    optimiser, n = Adam(module, 0.1), module.num_parameters
    module.use_buffers(np.empty(n), np.empty(n))
    module.flat_gradients[...] = 1
    before = module.weight.value.copy()
    optimiser.step()
    np.testing.assert_allclose(before - module.weight.value, 0.1, rtol=1e-6)


@pytest.mark.parametrize("options", [{"lr": -1}, {"betas": (1.0, 0.9)}, {"betas": (0.9, -0.1)}, {"eps": 0},
                                     {"weight_decay": -1}, {"lr": float("nan")}], ids=str)
def test_bad_arguments_raise(options, rng):
    with pytest.raises(ValueError, match="Adam: need lr >= 0"):
        Adam(layer(rng), **options)


# ---- clipping

@pytest.mark.parametrize("dtype, bound", [(np.float64, 1e-12), (np.float32, 1e-6)])
def test_clipping_scales_all_gradients_to_the_norm(dtype, bound, rng):
    module = layer(rng, dtype)
    module.flat_gradients[...] = g = rng.standard_normal(module.num_parameters).astype(dtype)
    norm = math.sqrt(sum(float(v)**2 for v in g))
    assert abs(float(clip_grad_norm(module, 0.5)) / norm - 1) < bound
    assert error(module.flat_gradients, g * dtype(0.5 / norm)) < bound and module.flat_gradients.dtype == dtype
    assert abs(float(np.linalg.norm(module.flat_gradients)) / 0.5 - 1) < bound
    per_entry = np.clip(g, -0.5, 0.5)                                       # each entry by itself: another direction
    assert error(per_entry, g * dtype(0.5 / norm)) > 1e-2


def test_small_gradients_stay(rng):
    module = layer(rng)
    for scale in (1.0, 1e-20, 0.0):
        module.flat_gradients[...] = g = scale * rng.standard_normal(module.num_parameters)
        norm = clip_grad_norm(module, 100.0)
        np.testing.assert_array_equal(module.flat_gradients, g)
        assert abs(norm - np.linalg.norm(g)) <= 1e-12 * scale


def test_a_nan_gradient_is_not_hidden(rng):
    module = layer(rng)
    module.flat_gradients[...] = 1
    module.flat_gradients[3] = np.nan
    assert np.isnan(clip_grad_norm(module, 1.0)) and np.isnan(module.flat_gradients).all()


@pytest.mark.parametrize("max_norm", [0, -1.0, float("nan")])
def test_a_bad_bound_raises(max_norm, rng):
    with pytest.raises(ValueError, match="max_norm must be > 0"):
        clip_grad_norm(layer(rng), max_norm)
