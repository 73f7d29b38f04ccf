"""A training step is the same whoever computes which part of it, and a saved state goes on as if nothing had been."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import nn.module
from ddpm import training
from ddpm.config import TrainConfig
from ddpm.data import Dataset, load
from ddpm.generate import draw_images
from ddpm.likelihood import image_bits
from ddpm.models import Batch, default_variance
from ddpm.network_denoiser import NetworkDenoiser, network_input, noise_output, noise_output_backward
from ddpm.parallel import Alone, make_group
from ddpm.training import DropoutDraws, NotFinite, Trainer, UniformTimes, batch_indices, learning_rate, named_views
from nn.dropout import Dropout, dropout_mask
from tests.helpers import property_test, zscore

TINY = TrainConfig(data="digits", T=20, schedule="cosine", base_channels=8, channel_mults=(1, 2), attention_levels=(),
                   groups=4, heads=2, batch_size=8, micro_batch=4, steps=12, warmup=3, lr=1e-2)
MODELS = ("ddpm", "iddpm", "gddm")


def tiny(**settings):
    return dataclasses.replace(TINY, **settings)


@pytest.fixture(scope="module")
def digits():
    return load("digits")


def trained(config, dataset, workers=1, steps=3, trainer=None, first=1):
    """(state arrays, losses) after some steps, by default of a network that has no zeros; the arrays are copies."""
    if trainer is None:
        trainer = Trainer(config, dataset, make_group(workers))
        theta = trainer.network.flat_parameters
        theta += 0.1 * trainer.xp.asarray(np.random.default_rng(0).standard_normal(theta.shape, dtype=np.float32))

    def program(group):
        losses = [trainer.step(number).loss for number in range(first, first + steps)]
        trainer.gather()
        return losses
    losses = trainer.group.run(program)
    return {name: a.copy() for name, a in trainer.state()[0].items()}, losses


def distance(a, b, prefix):
    """Euclidean distance of the arrays that begin with `prefix`, in units of their norm."""
    names = [name for name in a if name.startswith(prefix)]
    assert a.keys() == b.keys() and names
    x, y = (np.concatenate([arrays[n].ravel() for n in names]).astype(np.float64) for arrays in (a, b))
    return np.linalg.norm(x - y) / np.linalg.norm(x)


def identical(a, b):
    return a.keys() == b.keys() and all(a[name].tobytes() == b[name].tobytes() for name in a)


# ---- how the work is shared out

@pytest.mark.parametrize("workers", [1, 2, 3])
def test_a_fixed_number_of_workers_gives_the_same_bits(workers, digits):
    first, losses = trained(TINY, digits, workers)
    again, losses_again = trained(TINY, digits, workers)
    assert identical(first, again) and losses == losses_again
    other, _ = trained(tiny(seed=1), digits, workers)
    assert not identical(first, other)


@pytest.mark.parametrize("settings", [{}, {"dropout": 0.2}, {"model": "iddpm", "objective": "vlb"},
                                      {"conditional": True, "label_dropout": 0.5}],
                         ids=["plain", "dropout", "importance", "labels"])
def test_gradients_do_not_depend_on_workers_or_micro_batches(settings, digits):
    """After one step adam.m is the gradient over the batch, times 1 - b1; after three, parameters agree as well."""
    config = tiny(clip=0.0, **settings)
    one, _ = trained(config, digits, 1, steps=1)
    three, losses = trained(config, digits, 1)
    for workers, micro_batch in ((1, 8), (2, 3), (3, 2)):
        other = dataclasses.replace(config, micro_batch=micro_batch)
        assert distance(one, trained(other, digits, workers, steps=1)[0], "adam.m") < 1e-5
        if workers < 3:
            state, other_losses = trained(other, digits, workers)
            np.testing.assert_allclose(other_losses, losses, rtol=1e-4)
            assert distance(three, state, "parameters") < 1e-3
    for change in ({"seed": 1}, {"dropout": 0.21}):
        assert distance(one, trained(dataclasses.replace(config, **change), digits, steps=1)[0], "adam.m") > 0.01


@pytest.mark.parametrize("schedule", ["cosine", "variance-exploding"])
@pytest.mark.parametrize("model", MODELS)
def test_the_gradient_is_that_of_the_mean_over_the_batch(model, schedule, digits):
    config = tiny(model=model, schedule=schedule, clip=0.0)
    trainer, reference = (Trainer(config, digits, Alone()) for _ in range(2))
    positions = range(config.batch_size)
    t, _ = reference.times.sample(config.batch_size, reference._streams(1, positions, "time"))
    indices = batch_indices(config.seed, 1, config.batch_size, len(digits.train_images))
    batch = reference._batch(1, indices, t, positions)
    where = batch.x_t, batch.t, reference.schedule, config.network_predicts
    shown = network_input(batch.x_t, batch.t, reference.schedule)
    assert (shown is batch.x_t) == (schedule == "cosine")
    output = noise_output(reference.network(shown, batch.t), *where)
    values, gradient = reference.objective(output, batch, reference.schedule, digits.bin_width)
    reference.network.backward(noise_output_backward(gradient / config.batch_size, *where))
    result = trainer.step(1)
    expected = reference.network.flat_gradients
    assert result.loss == pytest.approx(values.mean(), rel=1e-5)
    assert result.grad_norm == pytest.approx(np.linalg.norm(expected), rel=1e-4)
    np.testing.assert_allclose(trainer.adam.m / 0.1, expected, atol=1e-5 * abs(expected).max())


def test_importance_weights_enter_the_gradient_and_the_loss(digits):
    config = tiny(model="iddpm", objective="vlb", T=4, clip=0.0)
    trainer, plain = (Trainer(config, digits, Alone()) for _ in range(2))
    trainer.times.history[1:], trainer.times.count[:] = np.array([[1.0], [2], [4], [8]]), 10
    t, weight = trainer.times.sample(8, trainer._streams(1, range(8), "time"))
    assert len(set(weight)) > 1

    class Same:                                             # the same times without the weights: another gradient
        sample, update = staticmethod(lambda n, rng: (t, np.ones(n))), staticmethod(lambda t, losses: None)
    plain.times = Same
    loss, unweighted = trainer.step(1).loss, plain.step(1).loss
    losses = trainer.times.history[t, 0] if len(set(t)) == 8 else None
    assert loss != pytest.approx(unweighted, rel=1e-3) and losses is None
    assert trainer.times.count[1:].sum() == 4 * 10 + 8
    assert abs(trainer.adam.m - plain.adam.m).max() > 1e-3 * abs(trainer.adam.m).max()


# ---- any schedule trains any model

@pytest.mark.parametrize("schedule", ["variance-exploding", "sub-vp"])
@pytest.mark.parametrize("model", MODELS)
def test_a_short_training_on_any_schedule(model, schedule, digits):
    """The loss falls, and so do bits/dim; samples are images with bright middles. Digits take a minute more."""
    config = tiny(model=model, schedule=schedule, T=50, lr=5e-3, batch_size=16, micro_batch=16, steps=60, warmup=5)
    trainer = Trainer(config, digits, Alone())
    denoiser = NetworkDenoiser(trainer.network, model, trainer.schedule, config.network_predicts)
    options = {"variance": default_variance(model)}

    def bits():
        denoiser.network.eval()
        return image_bits(denoiser, trainer.schedule, digits.scale(digits.test_images[:10]), strata=12,
                          bin_width=digits.bin_width, **options).total
    before = bits()
    losses = [trainer.step(number).loss for number in range(1, config.steps + 1)]
    after = bits()
    assert np.mean(losses[-10:]) < 0.8 * np.mean(losses[:5])
    assert np.isfinite(before).all() and np.isfinite(after).all() and after.mean() < 0.97 * before.mean()
    images = draw_images(denoiser, trainer.schedule, digits.image_shape, 10, Alone(), steps=25, **options)
    assert np.isfinite(images).all() and 0.1 < images.std() < 1
    likeness = np.corrcoef(images.mean(axis=0).ravel(), digits.scale(digits.train_images).mean(axis=0).ravel())[0, 1]
    assert likeness > 0.5


# ---- what a step draws

@property_test
@given(n=st.integers(1, 50), batch_size=st.integers(1, 60), epochs=st.integers(1, 3), seed=st.integers(0, 9))
def test_every_image_comes_once_in_each_epoch(n, batch_size, epochs, seed):
    batches = -(-n * epochs // batch_size)
    order = np.concatenate([batch_indices(seed, number, batch_size, n) for number in range(1, batches + 1)])
    assert len(order) == batches * batch_size
    for epoch in range(epochs):
        np.testing.assert_array_equal(np.sort(order[n * epoch:n * (epoch + 1)]), np.arange(n))
    if n > 20 and epochs > 1:                                # in a new order
        assert (order[:n] != order[n:2 * n]).any()


def test_uniform_times_are_1_to_T_and_earlier_times_0_to_t_minus_1(digits):
    t, weight = UniformTimes(5).sample(1000, np.random.default_rng(0))
    assert set(t) == {1, 2, 3, 4, 5} and (weight == 1).all()
    assert abs(zscore(t.astype(float), 3.0)) < 4
    trainer = Trainer(tiny(batch_size=400), digits, Alone())
    batch = trainer._batch(1, np.zeros(400, dtype=int), np.full(400, 4), range(400))
    assert isinstance(batch, Batch) and set(batch.s) == {0, 1, 2, 3}
    np.testing.assert_allclose(batch.x_t, trainer.schedule.add_noise(batch.x0, batch.t, batch.eps))
    assert abs(zscore(batch.eps.astype(float).ravel())) < 4 and abs(batch.eps.std() - 1) < 0.02


def test_dropout_masks_belong_to_the_position_in_the_batch():
    whole, part = DropoutDraws(3, 7, range(6)), DropoutDraws(3, 7, range(2, 5))
    for shape in ((4, 4, 6, 2), (2, 2, 6, 5)):               # one layer after the other
        H, W, _, C = shape
        a = dropout_mask(shape, 0.5, whole, np.float32, np)
        b = dropout_mask((H, W, 3, C), 0.5, part, np.float32, np)
        np.testing.assert_array_equal(a[:, :, 2:5], b)
        assert set(np.unique(a)) == {0, 2} and (a[:, :, 0] != a[:, :, 1]).any()
    uniform = DropoutDraws(0, 1, range(4)).random((16, 16, 4, 8), np.float32)
    assert uniform.dtype == np.float32 and abs(zscore(uniform.astype(float).ravel(), 0.5)) < 4
    assert (DropoutDraws(0, 2, range(4)).random((16, 16, 4, 8), np.float32) != uniform).any()


def test_C20_labels_are_left_out_by_seed_step_and_position(digits):
    config = tiny(conditional=True, label_dropout=0.3, batch_size=2000)
    trainer, indices = Trainer(config, digits, Alone()), np.arange(2000) % len(digits.train_labels)
    whole = trainer._labels(1, indices, range(2000))
    assert trainer.label_names == list("0123456789") and trainer.network.num_classes == 10
    left_out = whole == 10                                   # the last row of the table: "no label"
    np.testing.assert_array_equal(whole[~left_out], digits.train_labels[indices][~left_out])
    assert abs(zscore(left_out.astype(float), 0.3)) < 4 < abs(zscore(left_out.astype(float), 0.7))
    part = trainer._labels(1, indices[500:700], range(500, 700))
    np.testing.assert_array_equal(part, whole[500:700])      # whoever asks for whichever part
    for number, seed in ((2, 0), (1, 1)):
        other = Trainer(tiny(conditional=True, seed=seed), digits, Alone())
        assert ((other._labels(number, indices, range(2000)) == 10) != left_out).mean() > 0.1
    unconditional = Trainer(TINY, digits, Alone())
    assert unconditional._labels(1, indices, range(2000)) is None is unconditional.label_names
    assert unconditional.network.num_classes is None


@pytest.mark.parametrize("model", MODELS)
def test_C20_labels_reach_the_network_and_its_table(model, digits):
    """The gradient of a row of the table is that of the images with its label; rows without any have none."""
    config = tiny(model=model, conditional=True, label_dropout=0.4, clip=0.0)
    trainer = Trainer(config, digits, Alone())
    trainer.network.flat_parameters[...] += np.float32(0.05)
    labels = trainer._labels(1, batch_indices(0, 1, 8, len(digits.train_images)), range(8))
    trainer.step(1)
    table = trainer.network.gradients()["label.table"]
    assert table.shape[0] == 11 and {10} < set(labels) < set(range(11))
    np.testing.assert_array_equal(np.flatnonzero(abs(table).max(axis=1)), np.unique(labels))
    denoiser = NetworkDenoiser(trainer.network, model, trainer.schedule, config.network_predicts)
    x_t = np.random.default_rng(0).standard_normal((2, 8, 8, 1), dtype=np.float32)
    with_label, without = denoiser.predict(x_t, 5, np.array([3, 4])).eps, denoiser.predict(x_t, 5).eps
    assert abs(with_label - without).max() > 0
    np.testing.assert_array_equal(denoiser.predict(x_t, 5, 10).eps, without)


def test_dropout_is_on_in_a_step(digits):
    trainer = Trainer(tiny(dropout=0.5), digits, Alone())
    trainer.network.eval()
    with_dropout, _ = trained(tiny(dropout=0.5), digits, steps=4, trainer=trainer)
    assert all(m.training for m in trainer.network.modules() if isinstance(m, Dropout))
    assert not identical(with_dropout, trained(TINY, digits, steps=4, trainer=Trainer(TINY, digits, Alone()))[0])


def test_warm_up_and_cosine():
    config = tiny(lr=0.1, warmup=10, steps=110)
    assert learning_rate(config, 1) == pytest.approx(0.01) and learning_rate(config, 10) == pytest.approx(0.1)
    assert learning_rate(config, 60) == pytest.approx(0.05)
    assert learning_rate(config, 110) == pytest.approx(0, abs=1e-15) == learning_rate(config, 500)
    flat = tiny(lr=0.1, warmup=0, lr_decay="none")
    assert [learning_rate(flat, number) for number in (1, 12, 500)] == [0.1] * 3


def test_clipping_bounds_what_adam_sees(digits):
    free, clipped = (Trainer(tiny(clip=clip), digits, Alone()) for clip in (0.0, 0.01))
    norm = free.step(1).grad_norm
    assert norm > 0.02 and clipped.step(1).grad_norm == norm
    assert np.linalg.norm(clipped.adam.m / 0.1) == pytest.approx(0.01, rel=1e-4)
    np.testing.assert_allclose(clipped.adam.m * (norm / 0.01), free.adam.m, rtol=1e-3, atol=1e-6)


# ---- when something goes wrong

@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_loss_that_is_not_finite_updates_nothing_and_names_the_step(workers, where, digits):
    trainer = Trainer(TINY, digits, make_group(workers))
    good = trainer.objective

    def objective(output, batch, *rest):
        values, gradient = good(output, batch, *rest)
        if trainer.adam.steps == 2 and trainer.group.rank == trainer.group.size - 1:
            (values if where == "loss" else gradient)[-1:] = np.inf
        return values, gradient
    trainer.objective = objective

    def program(group):
        trainer.step(1)
        trainer.step(2)
        trainer.gather()
        before = {name: a.copy() for name, a in trainer.state()[0].items()}
        with pytest.raises(NotFinite, match="the loss became .* at step 3$"):
            trainer.step(3)
        trainer.gather()
        return before
    before = trainer.group.run(program)
    assert identical(before, trainer.state()[0]) and all(np.isfinite(a).all() for a in before.values())


# ---- saving and going on

@pytest.mark.parametrize("settings", [{}, {"model": "iddpm", "objective": "vlb", "T": 3, "dropout": 0.1},
                                      {"conditional": True, "label_dropout": 0.5}],
                         ids=["plain", "importance", "labels"])
@pytest.mark.parametrize("workers", [1, 2])
def test_a_restored_trainer_goes_on_bit_for_bit(settings, workers, digits):
    config = tiny(**settings)
    whole, losses = trained(config, digits, steps=10, trainer=Trainer(config, digits, make_group(workers)))
    trainer = Trainer(config, digits, make_group(workers))
    half, first_losses = trained(config, digits, steps=7, trainer=trainer)
    counters = {"adam_steps": 7, "ema_updates": 7}
    if workers == 1:                                         # the children's counters end with them
        assert trainer.state()[1] == counters

    def resumed(arrays, counters):
        trainer = Trainer(config, digits, make_group(workers))
        trainer.restore(arrays, counters)
        return trained(config, digits, steps=3, trainer=trainer, first=8)

    rest, last_losses = resumed(half, counters)
    assert identical(whole, rest) and first_losses + last_losses == losses
    for missing in ("ema/input.weight", "adam.m/input.weight", "adam.v/input.weight", "times/history"):
        if missing in half and workers == 1:                 # each part is needed
            assert abs(half[missing]).max() > 0
            assert not identical(whole, resumed(half | {missing: 0 * half[missing]}, counters)[0]), missing
    assert not identical(whole, resumed(half, counters | {"adam_steps": 0})[0])
    if "objective" in settings:
        assert half["times/count"][1:].min() >= 10           # the times are drawn by importance by now


def test_named_views_are_the_parameters_themselves(digits):
    trainer = Trainer(TINY, digits, Alone())
    views = named_views(trainer.network, trainer.network.flat_parameters)
    assert views.keys() == trainer.network.parameters().keys()
    for name, value in trainer.network.parameters().items():
        assert views[name].shape == value.shape and np.shares_memory(views[name], value)


# ---- other devices

@pytest.mark.parametrize("settings", [{"model": model} for model in MODELS]
                         + [{"model": "gddm", "dropout": 0.2, "attention_levels": (1,)},
                            {"model": "iddpm", "objective": "vlb"}, {"conditional": True}], ids=str)
def test_a_whole_step_runs_on_a_device(settings, fake, digits, monkeypatch):
    """Data, loss, network, Adam and average on the strict fake device, where hidden copies are errors."""
    config = tiny(**settings)
    host, losses = trained(config, digits, steps=2, trainer=Trainer(config, digits, Alone()))
    monkeypatch.setattr(training, "device_module", lambda device: fake)
    monkeypatch.setattr(nn.module, "device_module", lambda device: fake)
    monkeypatch.setattr(nn.module, "to_device", lambda x, device: fake.asarray(x))
    trainer = Trainer(dataclasses.replace(config, device="cuda"), digits, Alone(fake))
    assert type(trainer.network.flat_parameters) is fake.ndarray is type(trainer.adam.m) is type(trainer.ema.average)
    device_losses = [trainer.step(1).loss]
    fake.transfers.clear()
    device_losses.append(trainer.step(2).loss)
    to_host = [shape for direction, shape in fake.transfers if direction == "to_host"]
    assert sorted(to_host) == [(), (4,), (4,)]               # the norm, and the losses of each micro-batch
    np.testing.assert_allclose(device_losses, losses, rtol=1e-5)
    state = {name: a if isinstance(a, np.ndarray) else fake.asnumpy(a) for name, a in trainer.state()[0].items()}
    for prefix in ("parameters", "ema", "adam.m", "adam.v"):
        assert distance(host, state, prefix) < 1e-5
    again = Trainer(dataclasses.replace(config, device="cuda"), digits, Alone(fake))
    again.restore({name: a.copy() for name, a in state.items()}, trainer.state()[1])
    assert trainer.step(3).loss == again.step(3).loss


def test_a_small_data_set_repeats_within_a_batch():
    images = np.random.default_rng(0).integers(0, 17, (3, 8, 8, 1)).astype(np.uint8)
    dataset = Dataset("three", images, None, images.copy(), None, levels=17)
    assert np.isfinite(trained(TINY, dataset, steps=2)[1]).all()
    with pytest.raises(ValueError, match="--conditional needs labels, and --data digits has none; put the pictures"):
        Trainer(tiny(conditional=True), dataset, Alone())
