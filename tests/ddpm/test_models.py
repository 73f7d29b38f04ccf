"""The three models by name: what a network's output means, its derivative, and the way back from a run folder."""

import dataclasses

import numpy as np
import pytest

from ddpm import gddm
from ddpm.config import TrainConfig
from ddpm.covariance.methods import learned_variance
from ddpm.models import (
    OBJECTIVES,
    OUTPUTS,
    SCHEDULES,
    Batch,
    build_network,
    build_schedule,
    default_variance,
    find_objective,
    load_denoiser,
)
from ddpm.network_denoiser import NetworkDenoiser, network_input, noise_output, noise_output_backward
from ddpm.runs import RunFolder, UserError
from ddpm.schedule import NoiseSchedule
from nn.ema import EMA
from nn.unet import UNet
from tests.helpers import general_schedule, zscore

MODELS = ("ddpm", "iddpm", "gddm")
SCHEDULE, VE = NoiseSchedule.cosine(20), NoiseSchedule.variance_exploding(20)
TINY = TrainConfig(data="digits", T=20, schedule="cosine", base_channels=8, channel_mults=(1, 2), attention_levels=(1,),
                   groups=4, heads=2, batch_size=8)


def denoiser(model, channels=2, dtype=np.float64, prediction="eps", schedule=SCHEDULE):
    """A network without zeros; each call gives the same one."""
    network = UNet(channels, OUTPUTS[model] * channels, base_channels=8, channel_mults=(1, 2), attention_levels=(1,),
                   groups=4, heads=2, rng=np.random.default_rng(0), dtype=dtype)
    network.flat_parameters[...] += 0.1 * np.random.default_rng(1).standard_normal(network.num_parameters)
    return NetworkDenoiser(network, model, schedule, prediction)


def noisy(rng, n=3, channels=2, dtype=np.float64):
    return rng.standard_normal((n, 4, 4, channels)).astype(dtype)


TIMES = [1, 7, 20, np.array([1, 12, 20])]


@pytest.mark.parametrize("t", TIMES, ids=str)
@pytest.mark.parametrize("schedule", [SCHEDULE, VE], ids=["VP", "VE"])
@pytest.mark.parametrize("prediction", ["eps", "v"])
@pytest.mark.parametrize("model", MODELS)
def test_L22_mean_of_the_image_and_of_the_noise_say_the_same(model, prediction, schedule, t, rng):
    """And the network is shown z, of unit variance, in which every schedule is variance preserving."""
    d = denoiser(model, prediction=prediction, schedule=schedule)
    lam, noise = (np.reshape(v[t], (-1, 1, 1, 1)) for v in (schedule.lam_bar, np.sqrt(schedule.sigma2_bar)))
    spread = np.hypot(lam, noise)
    x_t = spread * noisy(rng)
    prediction = d.predict(x_t, t)
    np.testing.assert_allclose(lam * prediction.x0 + noise * prediction.eps, x_t, rtol=1e-9, atol=1e-9)
    z = x_t / spread
    first = d.network(z, t)[..., :2]
    expected = first if d.prediction == "eps" else (lam * first + noise * z) / spread
    np.testing.assert_allclose(prediction.eps, expected, rtol=1e-9, atol=1e-12)
    assert d.prediction == "eps" or np.abs(prediction.eps - (lam * first - noise * z) / spread).max() > 0.01
    assert schedule is SCHEDULE or np.abs(prediction.eps - d.network(x_t, t)[..., :2]).max() > 1e-5
    assert prediction.x0.shape == prediction.eps.shape == x_t.shape
    assert (d.evaluations, d.vjps) == (3, 0)


@pytest.mark.parametrize("t", TIMES, ids=str)
def test_G04_gddm_has_the_variance_of_the_noise_and_of_the_image(t, rng):
    x_t, d = noisy(rng), denoiser("gddm")
    prediction, head = d.predict(x_t, t), d.network(x_t, t)[..., 2:]
    u = gddm.log_variance(head)[0]
    np.testing.assert_allclose(prediction.var_eps, np.exp(u), rtol=1e-12)
    ratio = np.reshape(SCHEDULE.sigma2_bar[t] / SCHEDULE.lam_bar[t]**2, (-1, 1, 1, 1))
    np.testing.assert_allclose(prediction.var_x0, ratio * np.exp(u), rtol=1e-12)
    assert prediction.v is None and np.ptp(prediction.var_x0) > 0
    assert np.abs(prediction.var_x0 / np.exp(head) - ratio).max() > 1e-6             # not the raw head


def test_C05_iddpm_has_its_head_and_ddpm_nothing(rng):
    x_t, d = noisy(rng), denoiser("iddpm")
    prediction = d.predict(x_t, 5)
    np.testing.assert_array_equal(prediction.v, d.network(x_t, 5)[..., 2:])
    assert prediction.var_x0 is None and prediction.var_eps is None
    assert denoiser("ddpm").predict(x_t, 5)[2:] == (None, None, None)
    for model in ("iddpm", "gddm"):
        assert default_variance(model) == "learned"
        assert (learned_variance(denoiser(model).predict(x_t, 5), x_t, 4, 5, SCHEDULE) > 0).all()
    assert default_variance("ddpm") == "small"
    with pytest.raises(ValueError, match="needs a model with a variance"):
        learned_variance(denoiser("ddpm").predict(x_t, 5), x_t, 4, 5, SCHEDULE)


@pytest.mark.parametrize("t", [1, 20, np.array([1, 12, 20])], ids=str)
@pytest.mark.parametrize("model", MODELS)
def test_vjp_is_the_derivative_of_eps_and_leaves_gradients_alone(model, t, rng):
    d, x_t, v, direction = denoiser(model), noisy(rng), noisy(rng), noisy(rng)
    d.network.flat_gradients[...] = 7.0
    product = (d.vjp(x_t, t, v) * direction).sum()
    assert (d.network.flat_gradients == 7.0).all() and (d.evaluations, d.vjps) == (0, 3)

    def along(h, part=slice(0, 2)):
        return (v * d.network(x_t + h * direction, t)[..., part]).sum()
    expected = (along(1e-5) - along(-1e-5)) / 2e-5
    assert product == pytest.approx(expected, rel=1e-6)
    if model != "ddpm":                                      # the other half of the output has another derivative
        other = (along(1e-5, slice(2, 4)) - along(-1e-5, slice(2, 4))) / 2e-5
        assert product != pytest.approx(other, rel=1e-2)


def test_dropout_is_off_in_a_denoiser(rng):
    network = UNet(1, 1, base_channels=8, channel_mults=(1, 2), attention_levels=(), groups=4, heads=2, dropout=0.5,
                   rng=rng)
    network.flat_parameters[...] += 0.1
    d, x_t = NetworkDenoiser(network.train(), "ddpm", SCHEDULE), noisy(rng, channels=1, dtype=np.float32)
    np.testing.assert_array_equal(d.predict(x_t, 3).eps, d.predict(x_t, 3).eps)


@pytest.mark.parametrize("model", MODELS)
def test_runs_on_a_device(model, fake, rng):
    host, d = denoiser(model, dtype=np.float32), denoiser(model, dtype=np.float32)
    for _, p in d.network.named_parameters():
        p.value, p.grad = fake.asarray(p.value), fake.asarray(p.grad)
    x_t, v, t = noisy(rng, dtype=np.float32), noisy(rng, dtype=np.float32), np.array([1, 5, 20])
    for ours, theirs in zip(d.predict(fake.asarray(x_t), t), host.predict(x_t, t), strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            np.testing.assert_allclose(fake.asnumpy(ours), theirs, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(fake.asnumpy(d.vjp(fake.asarray(x_t), t, fake.asarray(v))), host.vjp(x_t, t, v),
                               rtol=1e-3, atol=1e-5)


# ---- objectives

def a_batch(rng, n=6):
    t = np.array([1, 2, 3, 10, 19, 20])[:n]
    x0, eps = rng.uniform(-1, 1, (n, 4, 4, 1)), rng.standard_normal((n, 4, 4, 1))
    return Batch(x0, eps, SCHEDULE.add_noise(x0, t, eps), t, t // 2)


@pytest.mark.parametrize("model, name", [(model, name) for model in MODELS for name in OBJECTIVES[model]])
def test_every_objective_gives_a_value_per_image_and_a_gradient(model, name, rng):
    batch, output = a_batch(rng), rng.standard_normal((6, 4, 4, OUTPUTS[model]))
    objective = find_objective(model, name)
    values, gradient = objective(output, batch, SCHEDULE, 2 / 16)
    assert values.shape == (6,) and gradient.shape == output.shape
    assert np.isfinite(values).all() and np.isfinite(gradient).all() and np.abs(gradient).max() > 0
    one = Batch(*(a[2:3] for a in batch))                    # an image's value doesn't depend on its company
    np.testing.assert_allclose(objective(output[2:3], one, SCHEDULE, 2 / 16)[0], values[2:3], rtol=1e-12)


@pytest.mark.parametrize("model, name", [("ddpm", "simple"), ("ddpm", "vlb"), ("iddpm", "vlb"), ("gddm", "kl"),
                                         ("gddm", "pairs")])
def test_gradients_are_those_of_the_values(model, name, rng):
    batch, output = a_batch(rng), 0.5 * rng.standard_normal((6, 4, 4, OUTPUTS[model]))
    direction, objective = rng.standard_normal(output.shape), find_objective(model, name)

    def value(h):
        return objective(output + h * direction, batch, SCHEDULE, 2 / 16)[0].sum()
    gradient = objective(output, batch, SCHEDULE, 2 / 16)[1]
    assert (gradient * direction).sum() == pytest.approx((value(1e-6) - value(-1e-6)) / 2e-6, rel=1e-5)


def test_G06_pairs_go_to_the_earlier_time_of_the_batch(rng):
    batch, output = a_batch(rng), rng.standard_normal((6, 4, 4, 2))
    kl, pairs = (find_objective("gddm", name)(output, batch, SCHEDULE, 2 / 16)[0] for name in ("kl", "pairs"))
    data = (output, batch.x0, batch.eps, batch.x_t, batch.t, SCHEDULE)
    np.testing.assert_array_equal(kl, gddm.kl_loss(*data, bin_width=2 / 16)[0])
    np.testing.assert_array_equal(pairs, gddm.kl_loss(*data, bin_width=2 / 16, s=batch.t // 2)[0])
    assert kl[0] == pairs[0] and (kl[2:] != pairs[2:]).all()         # for t = 1 and 2 the pair is a single step


@pytest.mark.parametrize("model", MODELS)
def test_the_default_is_the_first_and_unknown_names_are_told(model):
    assert find_objective(model) is find_objective(model, "default") is next(iter(OBJECTIVES[model].values()))
    first = next(iter(OBJECTIVES[model]))
    with pytest.raises(ValueError, match=f"--objective of model {model} must be one of {first}.*'x'"):
        find_objective(model, "x")


# ---- from a configuration, and back from a run folder

@pytest.mark.parametrize("model", MODELS)
def test_network_and_schedule_are_the_configurations(model, rng):
    config = dataclasses.replace(TINY, model=model, schedule="linear", T=50, dropout=0.1)
    schedule, network = build_schedule(config), build_network(config, 3)
    np.testing.assert_array_equal(schedule.sigma2, NoiseSchedule.linear(50).sigma2)
    np.testing.assert_array_equal(build_schedule(TINY).sigma2, NoiseSchedule.cosine(20).sigma2)
    assert network(noisy(rng, channels=3, dtype=np.float32), 1).shape == (3, 4, 4, 3 * OUTPUTS[model])
    assert build_network(config, 3, num_classes=4).num_parameters == network.num_parameters + 5 * 32


@pytest.mark.parametrize("name, constructor", [
    ("linear", NoiseSchedule.linear), ("cosine", NoiseSchedule.cosine),
    ("variance-exploding", NoiseSchedule.variance_exploding), ("sub-vp", NoiseSchedule.sub_variance_preserving)])
def test_schedules_by_name(name, constructor):
    built = build_schedule(dataclasses.replace(TINY, schedule=name, T=50))
    np.testing.assert_array_equal(built.lam, constructor(50).lam)
    np.testing.assert_array_equal(built.sigma2, constructor(50).sigma2)


def test_every_schedule_that_may_be_asked_for_can_be_built():
    asked, = (f for f in dataclasses.fields(TrainConfig) if f.name == "schedule")
    assert list(SCHEDULES) == list(asked.metadata["choices"])


@pytest.fixture
def saved(tmp_path, rng):
    """A run folder whose parameters and average differ: (path, network with the parameters, the average)."""
    network = build_network(TINY, 1)
    network.flat_parameters[...] += 0.1 * rng.standard_normal(network.num_parameters).astype(np.float32)
    average = EMA(network, 0.9).average.copy()
    network.flat_parameters[...] += 0.1 * rng.standard_normal(network.num_parameters).astype(np.float32)
    arrays = {f"parameters/{name}": a for name, a in network.parameters().items()}
    start = 0
    for name, a in network.parameters().items():
        arrays[f"ema/{name}"] = average[start:start + a.size].reshape(a.shape)
        start += a.size
    with RunFolder.create(tmp_path / "run", TINY) as run:
        run.save_checkpoint(arrays, {"step": 3, "image_shape": [4, 4, 1], "levels": 17})
    return tmp_path / "run", network, average


def test_load_denoiser_takes_the_averaged_weights(saved, rng):
    path, network, average = saved
    d, metadata = load_denoiser(RunFolder.open(path))
    np.testing.assert_array_equal(d.network.flat_parameters, average)
    assert metadata == {"step": 3, "image_shape": [4, 4, 1], "levels": 17}
    assert d.model == "gddm" and d.schedule.T == 20 and not d.network.training
    x_t = noisy(rng, channels=1, dtype=np.float32)
    same = NetworkDenoiser(network, "gddm", SCHEDULE, TINY.network_predicts)
    eps, current = d.predict(x_t, 5).eps, same.predict(x_t, 5).eps
    network.flat_parameters[...] = average
    np.testing.assert_array_equal(eps, same.predict(x_t, 5).eps)
    assert np.abs(eps - current).max() > 1e-3


def test_load_denoiser_says_what_is_wrong(saved):
    path, *_ = saved
    checkpoint = path / "checkpoint.safetensors"
    checkpoint.write_bytes(checkpoint.read_bytes()[:-50])
    with pytest.raises(UserError, match="has no checkpoint to go on from"):
        load_denoiser(RunFolder.open(path))


def test_help_names_every_objective_in_order():
    """The help text is written by hand, because reading it must not import the models."""
    from dataclasses import fields

    from ddpm.config import TrainConfig
    text = next(f for f in fields(TrainConfig) if f.name == "objective").metadata["help"].replace(" (as published)", "")
    for model, objectives in OBJECTIVES.items():
        assert f"{model}: {', '.join(objectives)}" in text


@pytest.mark.parametrize("schedule", [SCHEDULE, VE, general_schedule()], ids=["VP", "VE", "general"])
def test_L22_v_as_output_and_its_gradient(schedule, rng):
    """v = (lam_bar eps - sigma_bar x_0)/r at the door, and the transpose of that map on the way back."""
    x0, eps, t = noisy(rng), noisy(rng), np.array([1, 12, 20])
    head, x_t = noisy(rng), schedule.add_noise(x0, t, eps)
    lam, noise = (np.reshape(v[t], (-1, 1, 1, 1)) for v in (schedule.lam_bar, np.sqrt(schedule.sigma2_bar)))
    output = np.concatenate([(lam * eps - noise * x0) / np.hypot(lam, noise), head], axis=-1)
    read = noise_output(output, x_t, t, schedule, "v")
    np.testing.assert_allclose(read, np.concatenate([eps, head], axis=-1), atol=1e-12)
    assert noise_output(output, x_t, t, schedule, "eps") is output
    w, d = rng.standard_normal(output.shape), rng.standard_normal(output.shape)
    moved = noise_output(output + d, x_t, t, schedule, "v") - read
    np.testing.assert_allclose((w * moved).sum(), (noise_output_backward(w.copy(), x_t, t, schedule, "v") * d).sum(),
                               rtol=1e-9)
    assert abs((w * moved).sum() - (w * d).sum()) > 0.01                             # forgetting the factor shows


@pytest.mark.parametrize("schedule", [VE, NoiseSchedule.sub_variance_preserving(30), general_schedule()],
                         ids=["VE", "sub-VP", "general"])
def test_a_network_is_shown_unit_variance(schedule, rng):
    """Pixels +-1 have variance 1, and so has what the network gets of them, at every time."""
    for t in (1, 10, schedule.T):
        x0 = rng.choice([-1.0, 1.0], (200, 8, 8, 1))
        x_t = schedule.add_noise(x0, t, rng.standard_normal(x0.shape))
        shown = network_input(x_t, t, schedule)
        assert abs(zscore(shown.ravel()**2, 1.0)) < 4
        np.testing.assert_allclose(network_input(x_t[:2], np.array([t, t]), schedule), shown[:2], rtol=1e-12)
    assert network_input(x_t.astype(np.float32), np.full(200, t), schedule).dtype == np.float32
    assert network_input(x_t, t, SCHEDULE) is x_t            # variance preserving: nothing to do, not even a copy


@pytest.mark.parametrize("schedule", [SCHEDULE, VE, general_schedule()], ids=["VP", "VE", "general"])
@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_vjp_contains_what_happens_at_the_doors(prediction, schedule, rng):
    d, t, v = denoiser("gddm", prediction=prediction, schedule=schedule), np.array([1, 12, 20]), noisy(rng)
    spread = np.reshape(np.sqrt(schedule.marginal_var[t]), (-1, 1, 1, 1))
    x_t, w = spread * noisy(rng), spread * noisy(rng)
    for times in (t, 12):
        step = 1e-6
        moved = (d.predict(x_t + step * w, times).eps - d.predict(x_t - step * w, times).eps) / (2 * step)
        np.testing.assert_allclose((v * moved).sum(), (d.vjp(x_t, times, v) * w).sum(), rtol=1e-7)
    forgotten = d.network.backward(np.concatenate([v, 0 * v], axis=-1), params=False)
    assert schedule is SCHEDULE or abs((forgotten * w).sum() / (v * moved).sum() - 1) > 1e-3


def test_C20_a_conditional_run_remembers_its_classes(tmp_path, rng):
    config, names = dataclasses.replace(TINY, conditional=True), ["cat", "dog", "T-shirt/top"]
    network = build_network(config, 1, num_classes=3)
    with RunFolder.create(tmp_path / "run", config) as run:
        run.save_checkpoint({f"ema/{name}": a for name, a in network.parameters().items()},
                            {"image_shape": [8, 8, 1], "levels": 17, "step": 0, "label_names": names})
    d, metadata = load_denoiser(RunFolder.open(tmp_path / "run"))
    assert metadata["label_names"] == names and d.network.num_classes == 3
    np.testing.assert_array_equal(d.network.flat_parameters, network.flat_parameters)


def test_labels_are_refused_by_a_network_without_them(rng):
    with pytest.raises(ValueError, match="labels were given, but the network was made without num_classes"):
        denoiser("gddm").predict(noisy(rng), 5, np.array([0, 1, 2]))


def test_a_run_remembers_what_its_network_predicts(tmp_path):
    for prediction in ("v", "eps"):
        config = dataclasses.replace(TINY, prediction=prediction)
        network = build_network(config, 1)
        with RunFolder.create(tmp_path / prediction, config) as run:
            run.save_checkpoint({f"ema/{name}": a for name, a in network.parameters().items()},
                                {"image_shape": [8, 8, 1], "levels": 17, "step": 0})
            assert load_denoiser(run)[0].prediction == prediction
