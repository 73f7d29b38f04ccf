"""The evaluation command: a table for people, one JSON object for scripts, or one sentence."""

import json
import re
import subprocess
import sys

import pytest
from PIL import Image

from ddpm import evaluate
from ddpm.runs import CHECKPOINT, PREVIOUS
from tests.ddpm.test_train_command import PATIENCE, ROOT, refused, untrained

KEYS = {"bits_per_dim", "prior", "steps", "decoder", "standard_error"}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return untrained(tmp_path_factory.mktemp("gddm") / "run")


def measured(capsys, run, *flags):
    """What --json says."""
    assert evaluate.main(["bpd", *(str(word) for word in (run, "--json", *flags))]) == 0
    return json.loads(capsys.readouterr().out)


def test_json_is_one_object_and_nothing_else(run):
    """From the outside, so that stray prints and warnings would be seen."""
    argv = ["bpd", run, "--json", "--images", 4, "--strata", 3, "--workers", 2]
    done = subprocess.run([sys.executable, "-m", "ddpm.evaluate", *map(str, argv)], cwd=ROOT, capture_output=True,
                          text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1 and "bits/dim: 100%" in done.stderr
    parts = json.loads(done.stdout)
    assert parts.keys() == KEYS and all(isinstance(part, float) for part in parts.values())
    assert parts["bits_per_dim"] == pytest.approx(parts["prior"] + parts["steps"] + parts["decoder"])
    assert parts["standard_error"] > 0
    Image.open(run / "bits.png").verify()


def test_the_numbers_are_functions_of_the_seed(run, capsys):
    flags = "--images", 6, "--strata", 4
    parts = measured(capsys, run, *flags, "--workers", 1)
    assert measured(capsys, run, *flags, "--workers", 1) == parts
    assert measured(capsys, run, *flags, "--workers", 3) == pytest.approx(parts, rel=1e-4)
    other = measured(capsys, run, *flags, "--workers", 1, "--seed", 1)
    assert other["prior"] == parts["prior"] and other["steps"] != parts["steps"]
    assert measured(capsys, run, *flags, "--variance", "small", "--workers", 1)["steps"] != parts["steps"]


def test_the_table_says_what_was_measured_and_what_comes_next(run, capsys):
    flags = "--images", 4, "--strata", 99, "--workers", 1
    parts = measured(capsys, run, *flags)
    assert evaluate.main(["bpd", *(str(word) for word in (run, *flags))]) == 0
    out = capsys.readouterr().out
    assert out.startswith("gddm after 0 steps, 4 test images of digits, variance learned\n")
    for name in ("prior", "steps", "decoder"):
        assert re.search(rf"^  {name} +{parts[name]:.4f}   ", out, re.M)
    assert re.search(rf"^  total +{parts['bits_per_dim']:.4f} ± {parts['standard_error']:.4f} bits/dim$", out, re.M)
    assert f"curve over t: {run / 'bits.png'}" in out and f"next: python -m ddpm.sample {run}" in out


@pytest.mark.parametrize("settings", [{"schedule": "variance-exploding"}, {"schedule": "sub-vp", "T": 30},
                                      {"schedule": "variance-exploding", "model": "iddpm"},
                                      {"schedule": "variance-exploding", "model": "ddpm"}], ids=str)
def test_a_model_of_any_schedule(settings, tmp_path, capsys):
    parts = measured(capsys, untrained(tmp_path / "run", **settings), "--images", 4, "--strata", 5, "--workers", 1)
    assert all(isinstance(part, float) for part in parts.values())
    assert 0 < parts["prior"] < 0.01                         # against N(0, 1) it would be a thousand bits and more


def test_json_has_null_where_there_is_no_standard_error(tmp_path, capsys):
    """A folder of two pictures has one to test with."""
    (tmp_path / "pictures").mkdir()
    for name in ("a", "b"):
        Image.new("L", (8, 8), 100).save(tmp_path / "pictures" / f"{name}.png")
    run = untrained(tmp_path / "run", data=f"folder:{tmp_path / 'pictures'}")
    parts = measured(capsys, run, "--strata", 2, "--workers", 1)
    assert parts["standard_error"] is None and parts["bits_per_dim"] > 0


@pytest.mark.parametrize("flags, message", [
    ("--images 1", "--images must be at least 2 (a standard error needs two)"),
    ("--strata 0", "and --strata at least 1"), ("--seed -1", "--seed and --workers must be at least 0"),
    ("--workers -1", "--seed and --workers must be at least 0"), ("--variance tiny", "invalid choice: 'tiny'"),
    ("--step 3", "unrecognized arguments"),
])
def test_bad_flags(flags, message, run, capsys):
    assert message in refused(capsys, evaluate.main, "bpd", run, *flags.split())


def test_bad_runs(run, capsys, tmp_path, monkeypatch):
    assert "invalid choice: 'beauty'" in refused(capsys, evaluate.main, "beauty", run)
    assert "holds no run" in refused(capsys, evaluate.main, "bpd", tmp_path)
    plain = untrained(tmp_path / "plain", model="ddpm")
    said = refused(capsys, evaluate.main, "bpd", plain, "--variance", "learned")
    assert "--variance learned needs a model that has one" in said
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "cupy", None)
        assert "device cuda needs CuPy" in refused(capsys, evaluate.main, "bpd", plain, "--device", "cuda")
    (plain / CHECKPOINT).write_bytes((run / CHECKPOINT).read_bytes())
    assert "belongs to another configuration: --model is gddm there and ddpm" in refused(
        capsys, evaluate.main, "bpd", plain)
    for name in (CHECKPOINT, PREVIOUS):
        (plain / name).write_bytes((plain / name).read_bytes()[:-1])
    assert "has no checkpoint to go on from" in refused(capsys, evaluate.main, "bpd", plain)


def test_help_is_quick_and_names_every_flag():
    code = ("import sys; from ddpm import evaluate\ntry: evaluate.main(['--help'])\n"
            "finally: print({'scipy', 'matplotlib'} & set(sys.modules), file=sys.stderr)")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0 and done.stderr == "set()\n"
    for flag in "--json --images --strata --variance --data-dir --seed --device --workers".split():
        assert re.search(rf"^ +{flag}\b", done.stdout, re.M), flag
    assert "python -m ddpm.evaluate bpd RUN" in done.stdout
