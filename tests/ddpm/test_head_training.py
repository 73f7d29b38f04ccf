"""A head is trained on a network that stays as it is, by the command, and resumes with the same bits."""

import re
import shutil

import numpy as np
import pytest

from ddpm import data, heads, train
from ddpm.config import TrainConfig
from ddpm.generate import draw_images
from ddpm.head_training import HeadTrainer, head_config
from ddpm.models import build_network, load_denoiser
from ddpm.parallel import make_group
from ddpm.runs import CHECKPOINT, RunFolder, UserError
from nn import checkpoint
from tests.ddpm.test_train_command import TINY, refused, untrained

KINDS = tuple(heads.HEADS)
SHORT = "--steps 6 --batch-size 8 --micro-batch 4 --save-every 3 --log-every 1 --samples 0 --workers 1".split()


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The run of a ddpm whose network says something."""
    return untrained(tmp_path_factory.mktemp("base") / "run", model="ddpm")


def headed(tmp_path, base, kind, *flags):
    out = tmp_path / kind
    assert train.main(["--model", kind, "--from", str(base), "--out", str(out), *SHORT, *map(str, flags)]) == 0
    return out


@pytest.mark.parametrize("kind", KINDS)
def test_C10_C12_only_the_head_learns(kind, base, tmp_path, capsys):
    """The network in the run is the other run's average, bit for bit; the mean it predicts is the same; only the
    variance is new."""
    run = RunFolder.open(headed(tmp_path, base, kind))
    said = capsys.readouterr().out
    assert f"{kind}, a head on a trained ddpm, on digits" in said and "next: python -m ddpm.sample" in said
    arrays, metadata = run.load_checkpoint()
    original, _ = RunFolder.open(base).load_checkpoint()
    for name, value in original.items():
        if name.startswith("ema/"):
            np.testing.assert_array_equal(arrays[name.replace("ema/", "backbone/")], value)
    assert metadata["step"] == 6 and np.abs(arrays["parameters/output.weight"]).max() > 0
    x_t, t = np.random.default_rng(0).standard_normal((3, 8, 8, 1), dtype=np.float32), np.array([1, 7, 20])
    found, mean = (load_denoiser(r)[0].predict(x_t, t) for r in (run, RunFolder.open(base)))
    np.testing.assert_array_equal(found.eps, mean.eps)
    np.testing.assert_array_equal(found.x0, mean.x0)
    assert mean.var_x0 is None and (found.var_x0 >= 0).all() and found.var_x0.max() <= 1
    snr = load_denoiser(run)[0].schedule.snr[t].reshape(-1, 1, 1, 1)
    np.testing.assert_allclose(found.var_eps, snr * found.var_x0, rtol=1e-5)
    assert (run.path / "bits.png").exists() and run.metrics()[-1]["step"] == 6


def test_a_run_that_stopped_goes_on_with_the_same_bits(base, tmp_path):
    """Even if the run that it started from is gone; and another number of workers gives the same to rounding."""
    constant = "--lr-decay", "none"                         # a decaying rate depends on the number of steps
    whole, two = headed(tmp_path / "a", base, "ocm", *constant), headed(tmp_path / "b", base, "ocm", *constant,
                                                                        "--workers", 2)
    moved = shutil.copytree(base, tmp_path / "moved")
    part = headed(tmp_path / "c", moved, "ocm", *constant, "--steps", 3)
    shutil.rmtree(moved)
    assert train.main(["--resume", str(part), "--steps", "6", "--workers", "1"]) == 0
    expected, resumed, shared = (checkpoint.load(run / CHECKPOINT)[0] for run in (whole, part, two))
    assert resumed.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(resumed[name], value, err_msg=name)
        np.testing.assert_allclose(shared[name], value, atol=1e-5, err_msg=name)


def trainer(kind, base, batch_size=8, **settings):
    run = RunFolder.open(base)
    config = head_config(run.config, run.path, {"model": kind, "batch_size": batch_size, "micro_batch": 4} | settings)
    arrays, _ = run.load_checkpoint()
    backbone = {name.removeprefix("ema/"): a for name, a in arrays.items() if name.startswith("ema/")}
    return HeadTrainer(config, data.load("digits"), make_group(1), backbone)


@pytest.mark.parametrize("kind", KINDS)
def test_C10_C12_the_gradient_of_a_step_is_that_of_the_heads_loss(kind, base):
    """By finite differences of the loss of one whole batch, in a random direction of the head's parameters."""
    made = trainer(kind, base)
    head, rng = made.network, np.random.default_rng(0)
    head.flat_parameters[...] += rng.standard_normal(head.num_parameters, dtype=np.float32) * 0.1
    indices, t = np.arange(8), np.array([1, 2, 5, 8, 11, 14, 17, 20])

    def loss():
        head.zero_grad()
        return made._accumulate(3, indices, t, np.ones(8), slice(0, 8)).mean()
    loss()
    gradient, direction = head.flat_gradients.copy(), rng.standard_normal(head.num_parameters, dtype=np.float32)
    h, start = 3e-3, head.flat_parameters.copy()
    values = []
    for sign in (1, -1):
        head.flat_parameters[...] = start + sign * h * direction
        values.append(loss())
    assert (values[0] - values[1]) / (2 * h) == pytest.approx(float(gradient @ direction), rel=3e-2)


def test_C12_targets_are_those_of_the_predicted_noises_jacobian(base):
    """The vjp that a head of ocm learns from, v^T d eps/d x_t of the frozen network, against finite differences."""
    denoiser = trainer("ocm", base).denoiser
    rng = np.random.default_rng(0)
    x_t, v, direction = rng.standard_normal((3, 2, 8, 8, 1), dtype=np.float32)
    t, h = np.array([3, 15]), np.float32(1e-2)
    product = (denoiser.vjp(x_t, t, v) * direction).sum()
    along = [(v * denoiser.predict(x_t + s * h * direction, t).eps).sum(dtype=np.float64) for s in (1, -1)]
    assert product == pytest.approx((along[0] - along[1]) / (2 * float(h)), rel=1e-2)
    assert (denoiser.network.flat_gradients == 0).all()


def test_dropout_of_the_network_is_off_while_its_head_learns(tmp_path):
    noisy = untrained(tmp_path / "run", model="ddpm", dropout=0.5)
    made = trainer("npr", noisy)
    made.network.train()
    x_t, t = np.random.default_rng(0).standard_normal((2, 8, 8, 1), dtype=np.float32), np.array([3, 15])
    np.testing.assert_array_equal(made.denoiser.predict(x_t, t).eps, made.denoiser.predict(x_t, t).eps)


def test_labels_reach_the_network(tmp_path):
    """A conditional run's head learns with the labels, some of them left out, and samples of a class can be drawn."""
    conditional = untrained(tmp_path / "run", model="ddpm", conditional=True)
    run = RunFolder.open(headed(tmp_path, conditional, "ocm"))
    assert run.config.conditional
    denoiser, metadata = load_denoiser(run)
    assert len(metadata["label_names"]) == 10
    images = draw_images(denoiser, denoiser.schedule, (8, 8, 1), 3, make_group(1), steps=4, variance="learned",
                         labels=np.array([1, 2, 3]), guidance_scale=2.0)
    assert images.shape == (3, 8, 8, 1) and np.ptp(images) > 0


@pytest.mark.parametrize("settings", [{"model": "gddm"}, {"model": "iddpm", "schedule": "variance-exploding"}], ids=str)
def test_a_head_stands_on_the_mean_of_any_model(settings, tmp_path):
    base = untrained(tmp_path / "run", **settings)
    run = RunFolder.open(headed(tmp_path, base, "npr"))
    assert run.config.backbone == settings["model"]
    prediction = "v" if settings["model"] == "gddm" else "eps"
    assert run.config.network_predicts == prediction == RunFolder.open(base).config.network_predicts
    x_t, t = np.random.default_rng(0).standard_normal((2, 8, 8, 1), dtype=np.float32), np.array([3, 15])
    found, mean = (load_denoiser(r)[0].predict(x_t, t) for r in (run, RunFolder.open(base)))
    np.testing.assert_array_equal(found.eps, mean.eps)
    assert found.v is None and (found.var_x0 >= 0).all()


@pytest.mark.parametrize("flags, message", [
    ("--model gddm", "--from goes with --model sn, npr, ocm, the heads that stand on a trained network"),
    ("", "--from goes with --model sn, npr, ocm"),
    ("--model ocm --T 30", "--T comes with the network of .* \\(there it is 20\\); leave it out"),
    ("--model ocm --base-channels 16", "--base-channels comes with the network of"),
    ("--model ocm --data mnist", "--data comes with the network of"),
    ("--model ocm --objective kl", "--objective comes with the network of"),
    ("--model ocm --batch-size 0", "--batch-size must be at least 1"),
    ("--model ocm --backbone gddm", "--backbone comes with the network of")])
def test_bad_flags_are_a_sentence(flags, message, base, capsys, tmp_path):
    said = refused(capsys, train.main, "--from", base, "--out", tmp_path / "out", *flags.split())
    assert re.search(message, said) and not (tmp_path / "out").exists()


def test_a_head_needs_a_network_and_not_a_head(base, capsys, tmp_path):
    assert "--model npr is a head on a trained network: name that network's run with --from RUN" in refused(
        capsys, train.main, "--model", "npr", *TINY)
    head = headed(tmp_path, base, "npr")
    capsys.readouterr()
    said = refused(capsys, train.main, "--model", "ocm", "--from", head)
    assert "is a head's run itself (model npr); name the run of a network" in said
    assert "--from and --resume exclude each other" in refused(capsys, train.main, "--resume", head, "--from", base)
    assert "holds no run" in refused(capsys, train.main, "--model", "ocm", "--from", tmp_path / "nothing")
    with pytest.raises(ValueError, match="--backbone must be left out"):
        TrainConfig(model="gddm", backbone="ddpm")


def test_the_settings_of_a_head_are_its_networks_and_its_own():
    base = TrainConfig(model="gddm", T=30, base_channels=16, steps=777, lr=0.5, dropout=0.3, conditional=True)
    made = head_config(base, "RUN", {"model": "ocm", "steps": 5})
    assert (made.model, made.backbone, made.prediction, made.objective) == ("ocm", "gddm", "v", "default")
    assert (made.T, made.base_channels, made.conditional) == (30, 16, True)
    assert (made.steps, made.lr, made.dropout) == (5, TrainConfig().lr, 0.0)
    with pytest.raises(UserError, match="is a head's run itself"):
        head_config(made, "RUN", {"model": "sn"})
    network = build_network(made, 1)
    assert network.output.weight.value.shape[-1] == 2            # a gddm's own two outputs
