"""Guidance adds the gradient of log p(label | x_t), in a world where that is known, and for networks by its formula."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ddpm import samplers
from ddpm.config import TrainConfig
from ddpm.data import load
from ddpm.denoiser import Denoiser
from ddpm.generate import draw_images
from ddpm.guidance import Guided, MixtureDenoiser
from ddpm.likelihood import image_bits
from ddpm.mixture import GaussianMixture
from ddpm.models import OUTPUTS, default_variance
from ddpm.network_denoiser import NetworkDenoiser
from ddpm.parallel import Alone
from ddpm.parameterization import score_from_eps
from ddpm.schedule import NoiseSchedule
from ddpm.training import Trainer
from nn.unet import UNet
from tests.ddpm.test_ddpm import SCHEDULES
from tests.helpers import mixtures, property_test, schedules, zscore

WORLD = GaussianMixture.stripes()                            # three long Gaussians side by side: labels 0, 1, 2
PAIR = GaussianMixture.two_component()                       # at -1.2 and 0.8 on the line: labels 0, 1
MODELS = ("ddpm", "iddpm", "gddm")


def component(world, k):
    """The k-th Gaussian of a mixture as a world of its own."""
    return GaussianMixture([1.0], world.means[k:k + 1], world.covariances[k:k + 1])


def log_posterior(world, k, x_t, t, schedule):
    """log p(label = k | x_t) by Bayes' rule, up to a constant."""
    return component(world, k).noised(t, schedule).log_density(x_t) - world.noised(t, schedule).log_density(x_t)


@pytest.fixture(params=SCHEDULES)
def schedule(request):
    return SCHEDULES[request.param]


# ---- an exact world

@property_test
@given(mixtures(), schedules(), st.data())
def test_C20_scale_1_is_the_component_and_0_the_mixture(world, schedule, data):
    t, rng = data.draw(st.integers(1, schedule.T)), np.random.default_rng(0)
    x_t, labels = world.noised(t, schedule).sample(8, rng), rng.integers(0, len(world.weights), 8)
    exact, digits = MixtureDenoiser(world, schedule), 1e-8 * (1 + schedule.snr[t])
    without, whole = Guided(exact, labels, 0).predict(x_t, t), Denoiser.from_world(world, schedule).predict(x_t, t)
    np.testing.assert_array_equal(without.eps, whole.eps)
    np.testing.assert_array_equal(without.var_x0, whole.var_x0)
    given = Guided(exact, labels, 1).predict(x_t, t)
    for row, k in enumerate(labels):                         # each row has its own label
        alone = Denoiser.from_world(component(world, k), schedule).predict(x_t[row:row + 1], t)
        for name in ("eps", "x0", "var_x0", "var_eps"):
            expected = getattr(alone, name)
            np.testing.assert_allclose(getattr(given, name)[row:row + 1], expected, rtol=1e-8, atol=digits)


@property_test
@given(mixtures(), schedules(), st.floats(0, 8), st.data())
def test_C20_guided_score_adds_the_gradient_of_the_log_posterior(world, schedule, scale, data):
    """score_s = score(label) + (s - 1) grad log p(label | x_t), the gradient from closed forms of the density."""
    t = data.draw(st.integers(1, schedule.T))
    label = data.draw(st.integers(0, len(world.weights) - 1))
    x_t = world.noised(t, schedule).sample(8, np.random.default_rng(1))
    whole, own = world.noised(t, schedule).score(x_t), component(world, label).noised(t, schedule).score(x_t)
    prediction = Guided(MixtureDenoiser(world, schedule), label, scale).predict(x_t, t)
    guided, digits = score_from_eps(prediction.eps, t, schedule), 1e-8 * (1 + np.abs(own).max()) * (1 + schedule.snr[t])
    np.testing.assert_allclose(guided, own + (scale - 1) * (own - whole), atol=digits)
    np.testing.assert_allclose(schedule.add_noise(prediction.x0, t, prediction.eps), x_t, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("scale", [0, 0.5, 1, 3])
def test_C20_guided_score_matches_finite_differences(scale, schedule, rng):
    t, h = schedule.T // 2, 1e-5
    x_t, direction = WORLD.noised(t, schedule).sample(20, rng), rng.standard_normal((20, 2))
    guided = Guided(MixtureDenoiser(WORLD, schedule), 2, scale).predict(x_t, t).eps
    along = (score_from_eps(guided, t, schedule) * direction).sum(axis=1)

    def expected(s):
        """The derivative along `direction` of log q(x_t | label) + (s - 1) log p(label | x_t)."""
        def value(x):
            return (component(WORLD, 2).noised(t, schedule).log_density(x)
                    + (s - 1) * log_posterior(WORLD, 2, x, t, schedule))
        return (value(x_t + h * direction) - value(x_t - h * direction)) / (2 * h)
    np.testing.assert_allclose(along, expected(scale), atol=1e-6 * np.abs(along).max())
    for wrong in (scale + 1, scale - 1, -scale - 1):         # control: the w of other papers, and a sign
        assert np.abs(along - expected(wrong)).max() > 0.01 * np.abs(along).max()


@pytest.mark.parametrize("scale", [0.5, 1, 3])
def test_C20_only_at_scale_1_do_the_guided_laws_belong_together(scale, schedule):
    """q(x_t) E[p(y|x_0)^s | x_t], what noising a tilted law gives, and q(x_t) p(y|x_t)^s, by quadrature."""
    world = GaussianMixture([0.4, 0.6], [[-1.0], [0.8]], [[[0.5]]] * 2)
    t = int(np.argmin(np.abs(schedule.snr[1:] - 1))) + 1
    x0, x_t = np.linspace(-10, 10, 4001), np.linspace(-6, 6, 301)
    lam, var = schedule.lam_bar[t], schedule.sigma2_bar[t]

    def posterior(x, law, own):
        return np.exp(np.log(0.4) + own.log_density(x[:, None]) - law.log_density(x[:, None]))

    noised, own = world.noised(t, schedule), component(world, 0)
    data = np.exp(world.log_density(x0[:, None])) * posterior(x0, world, own)**scale
    diffused = np.exp(-(x_t[:, None] - lam * x0)**2 / (2 * var)) @ data
    guided = np.exp(noised.log_density(x_t[:, None])) * posterior(x_t, noised, own.noised(t, schedule))**scale
    distance = 0.5 * np.abs(diffused / diffused.sum() - guided / guided.sum()).sum()
    assert distance < 1e-9 if scale == 1 else distance > 0.01
    moments = Guided(MixtureDenoiser(world, schedule), 0, scale).predict(x_t[100:200, None], t)
    slope = np.gradient(np.log(guided), x_t)[100:200]        # what guidance does follow is the latter
    np.testing.assert_allclose(score_from_eps(moments.eps[:, 0], t, schedule), slope, atol=2e-3 * np.abs(slope).max())


@pytest.mark.parametrize("steps", [10, 50])
@pytest.mark.parametrize("schedule", [NoiseSchedule.cosine(50), NoiseSchedule.variance_exploding(50)], ids=["VP", "VE"])
def test_C20_samples_at_scale_1_have_the_moments_of_the_component_and_more_pushes_away(schedule, steps):
    """The component is a Gaussian, so the reverse chain is exact in any number of steps; its last step is a mean."""
    n, own = 4000, component(PAIR, 0)

    def drawn(scale):
        rng = np.random.default_rng(3)
        start = (own if scale else PAIR).noised(schedule.T, schedule).sample(n, rng)
        guided = Guided(MixtureDenoiser(PAIR, schedule), 0, scale)
        x = samplers.ddpm(guided, schedule, start, timesteps=schedule.timesteps(steps), variance="learned", rng=rng)
        assert guided.evaluations == n * steps * (1 if scale in (0, 1) else 2)
        return x[:, 0]
    x, var = drawn(1), 0.04 - own.posterior_x0(np.zeros((1, 1)), 1, schedule)[1].item()
    assert abs(zscore(x, -1.2)) < 4 and abs(zscore((x + 1.2)**2, var)) < 4
    assert abs(zscore(drawn(0), PAIR.mean()[0])) < 4 < abs(zscore(x, PAIR.mean()[0]))
    means = [drawn(scale).mean() for scale in (0, 0.5, 1, 2, 5)]
    assert (np.diff(means) < 0).all()                        # ever further from the other component, at 0.8
    assert means[3] < -1.2 - 4 * x.std() / np.sqrt(n)


def test_C20_variances_are_those_given_the_label(schedule, rng):
    """The line through the variances is no alternative: where the label makes x_0 certain, it falls below zero."""
    x_t, t = np.linspace(-1.2, 0.8, 30)[:, None], int(np.argmin(np.abs(schedule.snr[1:] - 2))) + 1
    exact = MixtureDenoiser(PAIR, schedule)
    guided, without, given = (d.predict(x_t, t) for d in (Guided(exact, 1, 3), exact, Guided(exact, 1)))
    np.testing.assert_array_equal(guided.var_x0, given.var_x0)
    np.testing.assert_array_equal(guided.var_eps, given.var_eps)
    assert (without.var_x0 + 3 * (given.var_x0 - without.var_x0)).min() < -0.1 < 0 < guided.var_x0.min()


def test_C20_vjp_is_the_derivative_of_the_guided_noise(schedule, rng):
    x_t, v, u = WORLD.noised(5, schedule).sample(6, rng), *rng.standard_normal((2, 6, 2))
    labels, h = np.array([0, 1, 2, 2, 1, 0]), 1e-5
    for scale, passes in ((0, 1), (1, 1), (2.5, 2)):
        guided = Guided(MixtureDenoiser(WORLD, schedule), labels, scale)
        slope = (guided.predict(x_t + h * u, 5).eps - guided.predict(x_t - h * u, 5).eps) / (2 * h)
        product = (guided.vjp(x_t, 5, v) * u).sum(axis=1)
        np.testing.assert_allclose(product, (v * slope).sum(axis=1), atol=1e-5 * np.abs(v).max() * np.abs(slope).max())
        assert (guided.predictions, guided.evaluations, guided.vjps) == (passes, 12 * passes, 6 * passes)
        assert (guided.denoiser.evaluations, guided.denoiser.vjps) == (12 * passes, 6 * passes)
    other = Guided(MixtureDenoiser(WORLD, schedule), labels, 1).vjp(x_t, 5, v)
    assert np.abs((other * u).sum(axis=1) - product).max() > 1e-4 * np.abs(product).max()


# ---- networks

def network_denoiser(model, prediction="eps", dtype=np.float64, schedule=SCHEDULES["cosine"]):
    network = UNet(2, 2 * OUTPUTS[model], base_channels=8, channel_mults=(1, 2), attention_levels=(), groups=4, heads=2,
                   num_classes=3, rng=np.random.default_rng(0), dtype=dtype)
    network.flat_parameters[...] += 0.3 * np.random.default_rng(1).standard_normal(network.num_parameters)
    return NetworkDenoiser(network, model, schedule, prediction)


@pytest.mark.parametrize("t", [1, 40, np.array([1, 12, 40])], ids=str)
@pytest.mark.parametrize("prediction", ["eps", "v"])
@pytest.mark.parametrize("model", MODELS)
def test_C20_a_network_is_guided_by_its_two_predictions(model, prediction, t, rng):
    d, x_t, labels = network_denoiser(model, prediction), rng.standard_normal((3, 4, 4, 2)), np.array([2, 0, 1])
    without, given, scale = d.predict(x_t, t), d.predict(x_t, t, labels), 2.5
    guided = Guided(d, labels, scale)
    seen = guided.predict(x_t, t)
    np.testing.assert_allclose(seen.eps, scale * given.eps + (1 - scale) * without.eps, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(seen.x0, scale * given.x0 + (1 - scale) * without.x0, rtol=1e-7, atol=1e-7)
    np.testing.assert_allclose(d.schedule.add_noise(seen.x0, t, seen.eps), x_t, rtol=1e-9, atol=1e-9)
    assert np.abs(seen.eps - ((1 + scale) * given.eps - scale * without.eps)).max() > 1e-4          # control
    for ours, theirs in zip(seen[2:], given[2:], strict=True):
        assert (ours is None) == (theirs is None)
        assert ours is None or (ours == theirs).all()
    for one, of in ((1, given), (0, without)):
        assert (Guided(d, labels, one).predict(x_t, t).eps == of.eps).all()
    for row, label in enumerate(labels):                     # one label each, as if it were alone
        at = t if np.ndim(t) == 0 else t[row:row + 1]
        alone = Guided(d, int(label), scale).predict(x_t[row:row + 1], at)
        np.testing.assert_allclose(alone.eps, seen.eps[row:row + 1], rtol=1e-9, atol=1e-12)
        assert np.abs(d.predict(x_t[row:row + 1], at, (label + 1) % 3).eps - given.eps[row]).max() > 1e-5


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_C20_vjp_of_a_guided_network(prediction, rng):
    d, t, labels = network_denoiser("gddm", prediction), np.array([1, 12, 40]), np.array([2, 0, 1])
    x_t, v, u = rng.standard_normal((3, 3, 4, 4, 2))
    d.network.flat_gradients[...] = 7.0
    for scale in (0, 1, 3):
        guided, h = Guided(d, labels, scale), 1e-6
        moved = (guided.predict(x_t + h * u, t).eps - guided.predict(x_t - h * u, t).eps) / (2 * h)
        np.testing.assert_allclose((guided.vjp(x_t, t, v) * u).sum(), (v * moved).sum(), rtol=1e-6)
    assert (d.network.flat_gradients == 7.0).all()


def test_C20_bits_given_the_label_are_those_of_scale_1(rng):
    """A Guided is a denoiser like any other to the metrics: bits/dim of p(x | label)."""
    d, x0 = network_denoiser("gddm", dtype=np.float32), rng.uniform(-1, 1, (3, 4, 4, 2)).astype(np.float32)
    bits = [image_bits(model, d.schedule, x0, variance="learned", bin_width=2 / 255, strata=5).total
            for model in (d, Guided(d, np.array([0, 1, 2])), Guided(d, np.array([0, 1, 2]), 0))]
    np.testing.assert_array_equal(bits[0], bits[2])
    assert np.isfinite(bits[1]).all() and (bits[0] != bits[1]).all()


def test_C20_labels_and_scales_run_on_a_device(fake, rng):
    x_t, v, labels = *rng.standard_normal((2, 3, 4, 4, 2)).astype(np.float32), np.array([2, 0, 1])
    host, d = (network_denoiser("gddm", dtype=np.float32) for _ in range(2))
    for _, p in d.network.named_parameters():
        p.value, p.grad = fake.asarray(p.value), fake.asarray(p.grad)
    ours, theirs = Guided(d, labels, 2).predict(fake.asarray(x_t), 5), Guided(host, labels, 2).predict(x_t, 5)
    for a, b in zip(ours[:4], theirs[:4], strict=True):
        np.testing.assert_allclose(fake.asnumpy(a), b, rtol=1e-3, atol=1e-4)
        assert b.dtype == np.float32
    np.testing.assert_allclose(fake.asnumpy(Guided(d, labels, 2).vjp(fake.asarray(x_t), 5, fake.asarray(v))),
                               Guided(host, labels, 2).vjp(x_t, 5, v), rtol=1e-3, atol=1e-4)
    points = WORLD.sample(3, rng)
    for k in (1, labels):
        exact = Guided(MixtureDenoiser(WORLD, d.schedule), k, 2)
        np.testing.assert_allclose(fake.asnumpy(exact.predict(fake.asarray(points), 5).eps),
                                   exact.predict(points, 5).eps, rtol=1e-12)


def test_what_makes_no_sense_is_said():
    exact = MixtureDenoiser(WORLD, SCHEDULES["cosine"])
    for scale in (-0.5, float("nan"), float("inf"), "2"):
        with pytest.raises(ValueError, match="scale must be a finite number from 0 up .*, got"):
            Guided(exact, 0, scale)
    with pytest.raises(ValueError, match="labels must be an int or integers"):
        Guided(exact, None, 2)
    for label in (3, -1, np.array([0, 3])):
        with pytest.raises(ValueError, match=r"labels must lie in 0\.\.2"):
            Guided(exact, label).predict(np.zeros((2, 2)), 5)
    with pytest.raises(ValueError, match=r"labels must lie in 0\.\.3"):
        network_denoiser("ddpm").predict(np.zeros((2, 4, 4, 2)), 5, 4)


# ---- training

@pytest.mark.slow
def test_C20_a_trained_network_draws_what_its_label_says():
    """On 8x8 digits: how often the class whose mean image is nearest to a sample is the one that was asked for."""
    config = TrainConfig(data="digits", T=100, schedule="cosine", base_channels=16, channel_mults=(1, 2), groups=4,
                         attention_levels=(), heads=2, conditional=True, lr=3e-3, steps=600, warmup=50, ema=0.99)
    digits = load("digits")
    trainer = Trainer(config, digits, Alone())
    for number in range(1, config.steps + 1):
        trainer.step(number)
    trainer.ema.swap()
    denoiser = NetworkDenoiser(trainer.network, config.model, trainer.schedule, config.network_predicts)
    images, labels = digits.scale(digits.train_images), digits.train_labels
    means = np.stack([images[labels == k].mean(axis=0) for k in range(10)])

    def nearest(images):
        return ((images[:, None] - means)**2).sum(axis=(2, 3, 4)).argmin(axis=1)
    asked = np.arange(200) % 10
    hits = [(nearest(draw_images(denoiser, trainer.schedule, digits.image_shape, 200, Alone(), steps=20, labels=asked,
                                 variance=default_variance(config.model), guidance_scale=scale)) == asked).mean()
            for scale in (0, 1, 3)]
    assert (nearest(images) == labels).mean() > 0.85         # the judge itself
    assert hits[0] < 0.2 and hits[1] > 0.6 and hits[2] > 0.9, hits


def test_old_configurations_are_unconditional():
    assert dataclasses.replace(TrainConfig(), conditional=True) != TrainConfig.from_json('{"model": "gddm"}')
