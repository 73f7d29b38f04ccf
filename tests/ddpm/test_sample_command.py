"""The sampling command: pictures and arrays that depend on the seed alone, or one sentence."""

import re
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from ddpm import sample
from ddpm.runs import CHECKPOINT, PREVIOUS, UserError
from nn import checkpoint
from tests.ddpm.test_train_command import PATIENCE, ROOT, refused, untrained


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return untrained(tmp_path_factory.mktemp("gddm") / "run")


def sampled(out, run, *flags):
    assert sample.main([str(word) for word in (run, "--out", out, *flags)]) == 0
    with np.load(out / "samples.npz") as file:
        return file["images"]


def test_what_it_writes(run, tmp_path, capsys):
    out = tmp_path / "pictures"
    images = sampled(out, run, "--num", 5, "--steps", 4, "--workers", 2)
    assert images.shape == (5, 8, 8, 1) and images.dtype == np.uint8 and images.max() <= 16
    assert {p.name for p in out.iterdir()} == {"samples.png", "samples.npz", "uncertainty.png"}
    for name in ("samples.png", "uncertainty.png"):
        Image.open(out / name).verify()
    said, err = capsys.readouterr()
    assert f"5 images in {out}: samples.png, samples.npz, uncertainty.png\n" in said
    assert f"next: python -m ddpm.evaluate bpd {run}" in said and "sampling: 100%" in err


def test_an_image_is_a_function_of_the_seed_and_its_number(run, tmp_path):
    """To rounding: at most a pixel here and there falls on the other side of a level."""
    whole = sampled(tmp_path / "a", run, "--num", 6, "--steps", 3, "--workers", 1)
    np.testing.assert_array_equal(whole, sampled(tmp_path / "b", run, "--num", 6, "--steps", 3, "--workers", 1))
    for n, (num, workers) in enumerate(((6, 2), (3, 1))):
        other = sampled(tmp_path / str(n), run, "--num", num, "--steps", 3, "--workers", workers)
        assert (other == whole[:num]).mean() > 0.99
    other = sampled(tmp_path / "c", run, "--num", 6, "--steps", 3, "--seed", 1, "--workers", 1)
    assert (other == whole).mean() < 0.5


def test_C16_U13_samplers(run, tmp_path, capsys):
    """Each flag changes the images, and what doesn't belong together is said in a sentence."""
    few = ("--num", 4, "--steps", 3, "--workers", 1)
    kinds = {"ddpm": (), "ddim": ("--sampler", "ddim"), "eta": ("--sampler", "ddim", "--eta", "0.7"),
             "own": ("--sampler", "ddim", "--variance", "learned"), "solver": ("--sampler", "dpm-solver"),
             "flow": ("--sampler", "flow"), "trailing": ("--sampler", "ddim", "--spacing", "trailing")}
    images = {name: sampled(tmp_path / name, run, *few, *flags).tobytes() for name, flags in kinds.items()}
    assert len(set(images.values())) == len(kinds)
    capsys.readouterr()
    for flags, message in ((("--eta", "0.5"), "--eta belongs to --sampler ddim, not to ddpm"),
                           (("--sampler", "ddim", "--eta", "1.5"), "--eta must lie between 0 and 1, got 1.5"),
                           (("--sampler", "dpm-solver", "--variance", "learned"), "has no --variance"),
                           (("--sampler", "flow", "--last-noise", "1"), "--sampler flow draws no noise"),
                           (("--sampler", "ddim", "--variance", "large"), "ddim takes one of the image, or none")):
        assert message in refused(capsys, sample.main, run, *flags)


def test_defaults(run, tmp_path, monkeypatch, capsys):
    """Without --steps as many as the model has, up to 250; without --out a folder in the run; without --num 16."""
    assert sample.main([str(run), "--workers", "1"]) == 0
    with np.load(run / "samples-seed-0-steps-20" / "samples.npz") as file:
        assert len(file["images"]) == 16
    capsys.readouterr()
    assert "samples-seed-0-steps-20 exists already and is not an empty folder" in refused(capsys, sample.main, run)


def test_a_model_without_variance(tmp_path, capsys):
    run = untrained(tmp_path / "run", model="ddpm")
    for variance in ("small", "large"):
        sampled(tmp_path / variance, run, "--num", 1, "--steps", 2, "--variance", variance, "--workers", 1)
        assert not (tmp_path / variance / "uncertainty.png").exists()
    assert "1 image in " in capsys.readouterr().out
    said = refused(capsys, sample.main, run, "--variance", "learned")
    assert "--variance learned needs a model that has one (gddm, iddpm, or a head: sn, npr, ocm); use large" in said


@pytest.fixture(scope="module")
def conditional(tmp_path_factory):
    """A run whose labels matter as much as if it were trained."""
    run = untrained(tmp_path_factory.mktemp("conditional") / "run", conditional=True)
    arrays, header = checkpoint.load(run / CHECKPOINT)
    arrays["ema/label.table"] = 100 * arrays["ema/label.table"]
    checkpoint.save(run / CHECKPOINT, arrays, header)
    return run


def test_C20_labels_and_guidance(conditional, tmp_path, capsys):
    def of(name, *flags):
        return sampled(tmp_path / name, conditional, "--num", 6, "--steps", 3, "--workers", 1, *flags)
    seven, three = of("7", "--label", "7"), of("3", "--label", "3")
    every, guided, none = of("all", "--label", "all"), of("7x2", "--label", "7", "--guidance-scale", "2"), of("none")
    for other in (three, every, guided, none):
        assert (other != seven).any()
    np.testing.assert_array_equal(of("one", "--label", "7", "--guidance-scale", "1"), seven)
    np.testing.assert_array_equal(of("zero", "--label", "7", "--guidance-scale", "0"), none)
    assert (every[3] == three[3]).mean() > 0.99              # image i of label k, among whichever others
    with np.load(tmp_path / "all" / "samples.npz") as file:
        np.testing.assert_array_equal(file["labels"], np.arange(6))
    with np.load(tmp_path / "none" / "samples.npz") as file:
        assert file.files == ["images"]
    assert "columns of samples.png: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9\n" in capsys.readouterr().out
    flags = "--num 2 --steps 2 --workers 1 --label 7 --guidance-scale 2.5".split()
    assert sample.main([str(conditional), *flags]) == 0
    assert (conditional / "samples-seed-0-steps-2-label-7-scale-2.5" / "samples.npz").exists()


def test_C20_labels_by_name_and_by_number(tmp_path):
    flags = sample.parser().parse_args

    def label(text, names, num=2):
        return sample._asked(flags(["run", "--num", str(num), "--label", text]), {"label_names": names})
    names = ["cat", "T-shirt/top", "3D", "all"]
    for text, k in (("cat", 0), ("T-shirt/top", 1), ("1", 1), ("2", 2), ("3D", 2), ("3", 3)):
        np.testing.assert_array_equal(label(text, names)["labels"], [k, k])
    for text in ("dog", "4", "-1", "Cat", "1.0", ""):
        with pytest.raises(UserError, match="--label must be one of cat, T-shirt/top, 3D, all, or 0 to 3, or all, got"):
            label(text, names)
    np.testing.assert_array_equal(label("2", ["1", "2", "3"])["labels"], [1, 1])     # names that are numbers win
    with pytest.raises(UserError, match="--label must be one of 1, 2, 3, or all, got 0$"):
        label("0", ["1", "2", "3"])
    every = label("all", ["a", "b", "c"], num=7)
    np.testing.assert_array_equal(every["labels"], [0, 1, 2, 0, 1, 2, 0])
    assert every["columns"] == 3
    folder = sample._folder(flags(["run", "--steps", "5", "--label", "T-shirt/top", "--guidance-scale", "2"]))
    assert folder == "samples-seed-0-steps-5-label-T-shirt-top-scale-2"


@pytest.mark.parametrize("flags, message", [
    ("--label 10", "--label must be one of 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, or all, got 10"),
    ("--label cat", "--label must be one of 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, or all, got cat"),
    ("--label 7 --guidance-scale -1", "--guidance-scale must be a finite number from 0 up .*, got -1.0"),
    ("--label 7 --guidance-scale nan", "--guidance-scale must be a finite number from 0 up"),
    ("--label 7 --guidance-scale big", "invalid float value: 'big'"),
    ("--guidance-scale 2", "--guidance-scale needs a --label to guide to"), ("--label", "expected one argument")])
def test_C20_bad_labels_and_scales(flags, message, conditional, capsys, tmp_path):
    said = refused(capsys, sample.main, conditional, "--out", tmp_path / "out", *flags.split())
    assert re.search(message, said) and not (tmp_path / "out").exists()


def test_C20_a_run_without_labels(run, capsys, tmp_path):
    said = refused(capsys, sample.main, run, "--label", "7", "--out", tmp_path / "out")
    assert f"--label needs a model that knows labels, and {run} was trained without --conditional" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("settings", [{"schedule": "variance-exploding"}, {"schedule": "sub-vp", "T": 30},
                                      {"schedule": "variance-exploding", "model": "iddpm"},
                                      {"schedule": "sub-vp", "T": 30, "model": "ddpm"}], ids=str)
def test_a_model_of_any_schedule(settings, tmp_path, capsys):
    run = untrained(tmp_path / "run", **settings)
    images = sampled(tmp_path / "out", run, "--num", 2, "--steps", 4, "--workers", 1)
    assert images.shape == (2, 8, 8, 1) and np.ptp(images) > 0


@pytest.mark.parametrize("flags, message", [
    ("--num 0", "--num must be at least 1, got 0"), ("--num x", "invalid int value"),
    ("--steps 21", "--steps must lie in 1..20, the number of steps this model was trained with, got 21"),
    ("--steps 0", "--steps must lie in 1..20"), ("--seed -1", "--seed and --workers must be at least 0"),
    ("--workers -2", "--seed and --workers must be at least 0"), ("--variance tiny", "invalid choice: 'tiny'"),
    ("--model ddpm", "unrecognized arguments"),
])
def test_bad_flags(flags, message, run, capsys, tmp_path):
    assert message in refused(capsys, sample.main, run, "--out", tmp_path / "out", *flags.split())
    assert not (tmp_path / "out").exists()


def test_bad_places(run, capsys, tmp_path, monkeypatch):
    assert "holds no run" in refused(capsys, sample.main, tmp_path)
    (tmp_path / "file").write_text("")
    for place, message in (("file", "file exists already and is not an empty folder; choose another with --out"),
                           ("file/out", "the folder .*file/out cannot be written .*; choose another with --out")):
        assert re.search(message, refused(capsys, sample.main, run, "--out", tmp_path / place))
    monkeypatch.setitem(sys.modules, "cupy", None)
    assert "device cuda needs CuPy" in refused(capsys, sample.main, run, "--device", "cuda", "--out", tmp_path / "out")
    broken = untrained(tmp_path / "broken")
    for name in (CHECKPOINT, PREVIOUS):
        (broken / name).write_bytes((broken / name).read_bytes()[:1000])
    assert "has no checkpoint to go on from" in refused(capsys, sample.main, broken)
    (broken / CHECKPOINT).write_bytes((untrained(tmp_path / "other", T=30) / CHECKPOINT).read_bytes())
    said = refused(capsys, sample.main, broken)
    assert "belongs to another configuration: --T is 30 there and 20 in config.json" in said
    assert not list(broken.glob("samples*"))


def test_help_is_quick_and_names_every_flag():
    code = ("import sys; from ddpm import sample\ntry: sample.main(['--help'])\n"
            "finally: print({'scipy', 'matplotlib'} & set(sys.modules), file=sys.stderr)")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0 and done.stderr == "set()\n"
    for flag in "--num --steps --label --guidance-scale --variance --out --seed --device --workers".split():
        assert re.search(rf"^ +{flag}\b", done.stdout, re.M), flag
    assert "python -m ddpm.sample" in done.stdout and "RUN" in done.stdout
