"""What a head's raw output stands for, its losses and their gradients: sn, npr and ocm (C10, C12)."""

import numpy as np
import pytest

from ddpm import heads
from ddpm.covariance import ocm
from ddpm.denoiser import Denoiser
from ddpm.mixture import GaussianMixture
from ddpm.schedule import NoiseSchedule
from tests.helpers import general_schedule, zscore

LINEAR, GENERAL = NoiseSchedule.linear(1000), general_schedule(20)
KINDS = tuple(heads.HEADS)


def gaussian(variance):
    return GaussianMixture([1.0], [[0.3, -0.2]], [variance * np.eye(2)])


def raw_of(variance, t, schedule):
    """The raw output that stands for this Var[eps | x_t]."""
    return (variance / heads.var_eps("npr", np.zeros_like(variance), None, t, schedule))**0.5 - 1


@pytest.mark.parametrize("schedule", [LINEAR, GENERAL], ids=["linear", "general"])
@pytest.mark.parametrize("variance", [1.0, 0.2])
def test_C10_C12_raw_0_is_data_of_unit_variance_at_every_time(variance, schedule):
    """npr and ocm give Var[eps | x_t] in units of what N(0, I) data have; for other data raw is what it has to be."""
    denoiser = Denoiser.from_world(gaussian(variance), schedule)
    t = np.array([1, schedule.T // 2, schedule.T])
    exact = denoiser.predict(np.zeros((3, 2)), t).var_eps
    for kind in ("npr", "ocm"):
        found = heads.var_eps(kind, np.zeros((3, 2)), None, t, schedule)
        assert (np.abs(found / exact - 1) < 1e-9).all() == (variance == 1.0)
        raw = raw_of(exact, t, schedule)
        np.testing.assert_allclose(heads.var_eps(kind, raw, None, t, schedule), exact, rtol=1e-9)


def test_npr_and_ocm_are_variances_whatever_the_network_says(rng):
    raw = 100 * rng.standard_normal((50, 2))
    for kind in ("npr", "ocm"):
        found = heads.var_eps(kind, raw, None, np.full(50, 500), LINEAR)
        assert (found >= 0).all() and np.isfinite(found).all()
    assert (heads.var_eps("sn", raw, raw, np.full(50, 500), LINEAR) < 0).any()


@pytest.mark.parametrize("kind", KINDS)
def test_statistic_is_what_the_methods_formula_takes(kind, rng):
    """The same variance through `ddpm.covariance`'s sources, which take h, as from the raw output."""
    from ddpm.covariance import reverse_covariance
    world = gaussian(0.5)
    denoiser = Denoiser.from_world(world, LINEAR)
    x_t, raw, t = rng.standard_normal((4, 2)), rng.uniform(0.1, 1.0, (4, 2)), np.array([3, 100, 400, 900])
    prediction = denoiser.predict(x_t, t)
    method = reverse_covariance(kind, head=lambda x, t: heads.statistic(kind, raw, t, LINEAR))
    var_x0 = method.source(denoiser, prediction, x_t, t)
    np.testing.assert_allclose(var_x0, heads.var_eps(kind, raw, prediction.eps, t, LINEAR) / LINEAR.snr[t][:, None],
                               rtol=1e-9)


@pytest.mark.parametrize("schedule", [LINEAR, GENERAL], ids=["linear", "general"])
@pytest.mark.parametrize("kind", KINDS)
def test_C10_C12_gradients_match_finite_differences(kind, schedule, rng):
    raw, eps, eps_hat = rng.standard_normal((3, 4, 3, 3, 2))[:3]
    t = np.array([1, schedule.T // 2, schedule.T, 2])
    targets = rng.standard_normal((2, 4, 3, 3, 2))

    def loss(raw):
        return heads.loss(kind, raw, eps, eps_hat, t, schedule, targets)
    values, gradient = loss(raw)
    assert values.shape == (4,) and gradient.shape == raw.shape
    direction, h = rng.standard_normal(raw.shape), 1e-6
    slope = (loss(raw + h * direction)[0] - loss(raw - h * direction)[0]).sum() / (2 * h)
    assert slope == pytest.approx((gradient * direction).sum(), rel=1e-6)
    if kind != "sn":                                        # without the variance's own derivative it is another number
        variance = heads.var_eps(kind, raw, None, t, schedule)
        assert slope != pytest.approx((gradient / variance * direction).sum(), rel=1e-2)


@pytest.mark.parametrize("kind", KINDS)
def test_C10_C12_the_mean_gradient_vanishes_at_the_variance_and_not_beside_it(kind, rng):
    """Gaussian data, where Var[eps | x_t] is one number: over many draws, within 4 standard errors of 0."""
    n, t, world = 100_000, 300, gaussian(0.5)
    denoiser = Denoiser.from_world(world, LINEAR)
    eps = rng.standard_normal((n, 2))
    x_t = LINEAR.add_noise(world.sample(n, rng), t, eps)
    exact = denoiser.predict(x_t, t)
    targets = ocm.draw_targets(denoiser.vjp, x_t, t, 1, rng, LINEAR) if kind == "ocm" else None
    right = exact.var_eps + exact.eps**2 - 1 if kind == "sn" else raw_of(exact.var_eps, t, LINEAR)

    def gradient(raw):
        return heads.loss(kind, raw, eps, exact.eps, np.full(n, t), LINEAR, targets)[1]
    if kind == "ocm":                                       # one probe of a diagonal Jacobian is exact
        assert np.abs(gradient(right)).max() < 1e-12 < np.abs(gradient(right + 0.1)).min()
    else:
        assert abs(zscore(gradient(right).ravel())) < 4 < abs(zscore(gradient(right + 0.1).ravel()))


def test_runs_on_a_device(fake, rng):
    raw, eps, eps_hat = (rng.standard_normal((2, 3, 3, 1)).astype(np.float32) for _ in range(3))
    t, targets = np.array([5, 900]), rng.standard_normal((1, 2, 3, 3, 1)).astype(np.float32)
    for kind in KINDS:
        host = heads.loss(kind, raw, eps, eps_hat, t, LINEAR, targets)
        device = heads.loss(kind, *map(fake.asarray, (raw, eps, eps_hat)), t, LINEAR, fake.asarray(targets))
        for ours, theirs in zip(host, device, strict=True):
            np.testing.assert_allclose(fake.asnumpy(theirs), ours, rtol=1e-5, atol=1e-6)
        found = heads.var_eps(kind, fake.asarray(raw), fake.asarray(eps_hat), t, LINEAR)
        np.testing.assert_allclose(fake.asnumpy(found), heads.var_eps(kind, raw, eps_hat, t, LINEAR), rtol=1e-5)
