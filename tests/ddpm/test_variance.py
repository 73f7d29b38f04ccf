"""A trained model's reverse variance by name: what it needs is made once, kept with the run, and said where missing."""

import numpy as np
import pytest

from ddpm import data, evaluate, sample
from ddpm.config import TrainConfig
from ddpm.covariance import METHODS, noise_statistics
from ddpm.denoiser import Denoiser
from ddpm.errors import UserError
from ddpm.models import load_denoiser
from ddpm.parallel import make_group
from ddpm.randomness import SampleStreams
from ddpm.runs import RunFolder
from ddpm.schedule import NoiseSchedule
from ddpm.variance import (
    STATISTICS,
    check_variance,
    default_decoder,
    measure_statistics,
    prepare_variance,
    run_statistics,
)
from tests.ddpm.test_evaluate_command import measured
from tests.ddpm.test_train_command import refused, untrained


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return untrained(tmp_path_factory.mktemp("ddpm") / "run", model="ddpm")


@pytest.fixture(scope="module")
def headed(tmp_path_factory, plain):
    """A head of ocm on the plain run, hardly trained."""
    from ddpm import train
    out = tmp_path_factory.mktemp("ocm") / "run"
    train.main(["--model", "ocm", "--from", str(plain), "--out", str(out), "--steps", "2", "--samples", "0",
                "--workers", "1"])
    return out


def digits():
    return data.load("digits")


def prepared(path, name, **options):
    run = RunFolder.open(path)
    return prepare_variance(name, run, load_denoiser(run)[0], digits, make_group, **options)


# ---- statistics

def test_C06_C09_statistics_are_measured_once_and_kept(plain):
    run = RunFolder.open(plain)
    denoiser, _ = load_denoiser(run)
    first = run_statistics(run, denoiser, digits, make_group)
    assert (plain / STATISTICS).exists() and denoiser.evaluations > 0 or make_group().size > 1

    def nobody():
        raise AssertionError("measured again")
    again = run_statistics(run, denoiser, nobody, nobody)
    for kept, found in zip(again, first, strict=True):
        np.testing.assert_array_equal(kept, found)
    (plain / STATISTICS).write_bytes((plain / STATISTICS).read_bytes()[:-3])        # cut off: it is measured anew
    with pytest.raises(AssertionError, match="measured again"):
        run_statistics(run, denoiser, nobody, nobody)


def test_C06_C09_statistics_belong_to_a_checkpoint(tmp_path):
    run = RunFolder.open(untrained(tmp_path / "run", model="ddpm"))
    denoiser, _ = load_denoiser(run)
    run_statistics(run, denoiser, digits, make_group)
    arrays, metadata = run.load_checkpoint()
    run.save_checkpoint(arrays, metadata | {"step": 1})
    with pytest.raises(ZeroDivisionError):
        run_statistics(run, denoiser, lambda: 1 / 0, make_group)


def test_C06_C09_the_ranks_do_not_matter_and_the_numbers_are_right(plain):
    """Two processes find what one does; and that is the library's own statistics of the same images and noise."""
    denoiser, _ = load_denoiser(RunFolder.open(plain))
    seen = []
    one = measure_statistics(denoiser, digits(), make_group(1), per_time=5, seed=3, progress=seen.append)
    assert sum(seen) == denoiser.schedule.T
    two = measure_statistics(denoiser, digits(), make_group(2), per_time=5, seed=3)
    for a, b in zip(one, two, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)
    streams = SampleStreams(3, 7, range(5), purpose="statistics")
    found = noise_statistics(denoiser, denoiser.schedule, digits().train_images, streams, per_time=5, times=[7],
                             scale=digits().scale)
    assert one.residual[7] == pytest.approx(found.residual[7], rel=1e-5) and found.residual[8] == 0
    other = measure_statistics(denoiser, digits(), make_group(1), per_time=5, seed=4)
    assert (other.residual != one.residual)[1:].all()


def test_C09_statistics_over_some_times_are_those_over_all(rng):
    schedule = NoiseSchedule.cosine(10)
    denoiser, images = Denoiser.from_eps(lambda x_t, t: 0.5 * x_t, schedule), rng.standard_normal((20, 3))
    parts = [noise_statistics(denoiser, schedule, images, np.random.default_rng(t), times=[t]) for t in range(1, 11)]
    for t, part in enumerate(parts, 1):
        assert (part.square > 0).nonzero()[0].tolist() == [t]
    assert denoiser.evaluations == 200


# ---- by name

def test_every_method_has_a_flag_and_every_flag_a_method():
    from ddpm.commands import VARIANCES
    assert set(VARIANCES) == set(METHODS)


@pytest.mark.parametrize("name", ["large", "small", "analytic", "residual", "hutchinson"])
def test_C13_variances_without_training(name, plain, rng):
    """All bits of the bound are finite, and images have the mean of the model and another spread."""
    variance = prepared(plain, name)
    denoiser, _ = load_denoiser(RunFolder.open(plain))
    x_t = rng.standard_normal((3, 8, 8, 1)).astype(np.float32)
    method = variance.with_rng(SampleStreams(0, 0, range(3)))
    var = method(denoiser, denoiser.predict(x_t, 15), x_t, 4, 15, denoiser.schedule)
    assert np.all(np.asarray(var) > 0)
    if name not in ("large", "small"):
        a, base = denoiser.schedule.posterior(4, 15).a, denoiser.schedule.posterior(4, 15).var
        assert np.max(var) <= base + a**2 * 1.0 + 1e-6      # no pixel in [-1, 1] has a larger variance


def test_a_heads_own_name_and_learned_are_one(headed, rng):
    run = RunFolder.open(headed)
    denoiser, _ = load_denoiser(run)
    x_t = rng.standard_normal((2, 8, 8, 1)).astype(np.float32)
    prediction = denoiser.predict(x_t, 9)
    ocm, learned, default = (prepared(headed, name)(denoiser, prediction, x_t, 3, 9, denoiser.schedule)
                             for name in ("ocm", "learned", None))
    np.testing.assert_array_equal(ocm, learned)
    np.testing.assert_array_equal(ocm, default)
    posterior = denoiser.schedule.posterior(3, 9)
    np.testing.assert_allclose(ocm, posterior.var + posterior.a**2 * prediction.var_x0, rtol=1e-5)


@pytest.mark.parametrize("name, model, sampler, message", [
    ("learned", "ddpm", "ddpm", "--variance learned needs a model that has one"),
    ("ocm", "ddpm", "ddpm", "--variance ocm needs a head that has learned it: train one with python -m ddpm.train "
                            "--model ocm --from RUN"),
    ("npr", "ocm", "ddpm", "--variance npr needs a head"),
    ("small", "gddm", "dpm-solver", "--sampler dpm-solver draws no noise"),
    ("large", "gddm", "ddim", "--variance large is one of DDPM's own step"),
    ("learned", "iddpm", "ddim", "--variance learned is one of DDPM's own step")])
def test_what_does_not_go_together_is_said(name, model, sampler, message):
    config = TrainConfig(model=model, backbone="ddpm" if model == "ocm" else "own")
    with pytest.raises(UserError, match=message):
        check_variance(name, config, sampler)


def test_what_goes_together_passes():
    for name, model, sampler in ((None, "ddpm", "ddpm"), ("residual", "ddpm", "ddim"), ("learned", "gddm", "ddim"),
                                 ("ocm", "ocm", "ddim"), ("analytic", "iddpm", "ddpm"), (None, "ddpm", "dpm-solver")):
        check_variance(name, TrainConfig(model=model, backbone="ddpm" if model == "ocm" else "own"), sampler)


def test_the_last_step_is_scored_with_a_models_own_variance_only_if_it_was_trained_for_that():
    own = [(model, name) for model in ("ddpm", "iddpm", "gddm", "ocm") for name in ("small", "learned", "analytic")
           if default_decoder(TrainConfig(model=model, backbone="ddpm" if model == "ocm" else "own"), name) == "model"]
    assert own == [("iddpm", "learned"), ("gddm", "learned")]


# ---- the commands

def test_C18_bits_of_a_chain_of_few_steps(plain, headed, capsys):
    """Fewer steps need more bits; the fixed variances most; the whole chain is the default."""
    flags = "--images", 12, "--workers", 1
    whole, all_steps = measured(capsys, plain, *flags), measured(capsys, plain, *flags, "--steps", 20)
    assert whole == all_steps
    few = {name: measured(capsys, plain, *flags, "--steps", 4, "--variance", name)["bits_per_dim"]
           for name in ("small", "residual")}
    assert few["residual"] < few["small"] and few["small"] > whole["bits_per_dim"]
    trailing = measured(capsys, plain, *flags, "--steps", 4, "--spacing", "trailing")
    assert trailing["steps"] != measured(capsys, plain, *flags, "--steps", 4)["steps"]
    ocm = measured(capsys, headed, *flags, "--steps", 4)
    assert ocm == measured(capsys, headed, *flags, "--steps", 4, "--variance", "ocm", "--decoder", "small")
    assert ocm != measured(capsys, headed, *flags, "--steps", 4, "--decoder", "model")
    assert evaluate.main(["bpd", str(headed), "--images", "4", "--steps", "4", "--workers", "1"]) == 0
    out = capsys.readouterr().out
    assert "variance learned, 4 steps\n" in out and "sum over 3 of them" in out


def test_images_with_any_variance(plain, headed, tmp_path, capsys):
    images = {}
    for run, name in ((plain, "small"), (plain, "residual"), (plain, "hutchinson"), (headed, "ocm")):
        out = tmp_path / name
        assert sample.main([str(run), "--out", str(out), "--num", "3", "--steps", "3", "--variance", name, "--workers",
                            "1"]) == 0
        images[name] = (out / "samples.npz").read_bytes()
        assert (out / "uncertainty.png").exists() == (name == "ocm")
    assert len(set(images.values())) == 4
    for flags, message in ((("--variance", "ocm"), "--variance ocm needs a head that has learned it"),
                           (("--probes", "2"), "--probes is a number from 1 up that belongs to --variance hutchinson"),
                           (("--variance", "hutchinson", "--probes", "0"), "--probes is a number from 1 up"),
                           (("--last-noise", "-1"), "--last-noise must be at least 0, got -1")):
        capsys.readouterr()
        assert message in refused(capsys, sample.main, plain, "--out", tmp_path / "new", *flags)
    assert "--steps must lie in 1..20" in refused(capsys, evaluate.main, "bpd", plain, "--steps", "21")


def test_the_last_noise_can_be_held_down(plain, tmp_path):
    """With few steps and the large variance the last noise shows; held to one level of 255, hardly."""
    def drawn(name, *flags):
        out = tmp_path / name
        assert sample.main([str(plain), "--out", str(out), "--num", "4", "--steps", "3", "--variance", "large",
                            "--workers", "1", *flags]) == 0
        with np.load(out / "samples.npz") as file:
            return file["images"]
    free, held, wide = drawn("free"), drawn("held", "--last-noise", "1"), drawn("wide", "--last-noise", "1000")
    assert (free != held).any()
    np.testing.assert_array_equal(free, wide)


def test_each_image_as_a_png(plain, tmp_path, capsys):
    from PIL import Image
    out, pictures = tmp_path / "out", tmp_path / "png"
    flags = [str(plain), "--num", "3", "--steps", "2", "--workers", "1", "--export", str(pictures)]
    assert sample.main([*flags, "--out", str(out)]) == 0
    assert sorted(p.name for p in pictures.iterdir()) == ["00000.png", "00001.png", "00002.png"]
    assert f"3 PNG files in {pictures}\n" in capsys.readouterr().out
    with np.load(out / "samples.npz") as file:                              # digits have 17 levels, a PNG 256
        images = file["images"]
    for i, image in enumerate(images):
        with Image.open(pictures / f"{i:05d}.png") as picture:
            assert picture.mode == "L" and picture.size == (8, 8)
            assert np.abs(np.asarray(picture) / 255 - image[..., 0] / 16).max() <= 0.5 / 16 + 0.5 / 255
    said = refused(capsys, sample.main, *flags, "--out", tmp_path / "again")
    assert "png exists already and is not an empty folder; choose another with --export" in said
    assert not (tmp_path / "again").exists()
    said = refused(capsys, sample.main, *flags[:-1], tmp_path / "x", "--out", tmp_path / "x")
    assert "--export needs a folder of its own" in said
