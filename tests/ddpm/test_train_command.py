"""The training command: killed, interrupted, starved of workers or fed nonsense, it leaves a run to go on from."""

import contextlib
import functools
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ddpm import data, runs, train, training
from ddpm.commands import run_command
from ddpm.config import TrainConfig
from ddpm.parallel import Alone
from ddpm.runs import CHECKPOINT, CONFIG, PREVIOUS, RunFolder
from nn import checkpoint
from tests.ddpm.test_parallel import all_gone, needs_fork

ROOT = Path(__file__).parents[2]
TINY = ("--data digits --T 20 --schedule cosine --base-channels 8 --channel-mults 1,2 --attention-levels none "
        "--groups 4 --heads 2 --batch-size 8 --steps 12 --save-every 3 --log-every 1 --samples 0").split()
LONG = [*TINY, *"--steps 1000000 --save-every 2".split()]
PATIENCE = 120


# ---- commands in processes of their own

load = functools.cache(data.load)


class Command:
    """A command in a forked process, which need not import or read anything again; `before()` runs there first."""

    def __init__(self, folder, argv, before=lambda: None, main=train.main):
        load("digits")
        self.files = [open(folder / name, "w+") for name in ("stdout", "stderr")]
        self.pid = os.fork()
        if self.pid == 0:
            self._run(main, [str(word) for word in argv], before)

    def _run(self, main, argv, before):
        status = 1
        try:
            os.setsid()
            for number, file in enumerate(self.files, 1):
                os.dup2(file.fileno(), number)
            sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            data.load = lambda name, data_dir: load(name)
            before()
            run_command(lambda: main(argv))
        except SystemExit as end:
            status = end.code
        except BaseException:
            traceback.print_exc()
        finally:
            with contextlib.suppress(BaseException):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(status)

    def wait(self):
        """(exit status, minus the signal for one that was killed; stdout; stderr)."""
        deadline = time.monotonic() + PATIENCE
        while (done := os.waitpid(self.pid, os.WNOHANG))[0] == 0:
            if time.monotonic() > deadline:
                os.killpg(self.pid, signal.SIGKILL)
            time.sleep(0.005)
        texts = []
        for file in self.files:
            file.seek(0)
            texts.append(file.read())
            file.close()
        return os.waitstatus_to_exitcode(done[1]), *texts


def command(folder, *argv, before=lambda: None):
    return Command(folder, argv, before).wait()


def no_summary():
    """Leave out bits/dim and pictures at the end of training, which take longer than these trainings do."""
    train._summarise = lambda *_: None


def finished(folder, *argv):
    status, out, err = command(folder, *argv, before=no_summary)
    assert status == 0, err
    return out


def until(condition):
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


def children_of(pid):
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            parent = (folder / "stat").read_text().rpartition(")")[2].split()[1]
            if int(parent) == pid:
                found.append(int(folder.name))
    return found


def stored(run):
    """(arrays, metadata) of the newest checkpoint, without the seconds it took."""
    arrays, header = checkpoint.load(run / CHECKPOINT)
    return arrays, {name: v for name, v in header["metadata"].items() if name != "seconds"}


def identical(run, other):
    (a, about_a), (b, about_b) = stored(run), stored(other)
    return about_a == about_b and a.keys() == b.keys() and all(a[n].tobytes() == b[n].tobytes() for n in a)


def sentence(err):
    """The one error in what a command wrote to stderr, besides its progress bar."""
    assert "Traceback" not in err and "Warning" not in err and err.count("error: ") == 1, err
    last = err.replace("\r", "\n").splitlines()[-1]
    assert last.startswith("error: ")
    return last


def lines(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


# ---- killed at any moment, a run goes on bit for bit

def die_at(owner, name, when, after=False):
    """A `before` under which the command's own process is killed as `owner.name` is called, where `when(*args)`."""
    def before():
        no_summary()
        boss, method = os.getpid(), getattr(owner, name)

        def deadly(*args, **kwargs):
            fatal = os.getpid() == boss and when(*args, **kwargs)
            result = method(*args, **kwargs) if after or not fatal else None
            if fatal:
                os.kill(boss, signal.SIGKILL)
            return result
        setattr(owner, name, deadly)
    return before


KINDS = {
    "gddm on 2 workers": ["--workers", "2", "--dropout", "0.1"],
    "gddm on 1 worker": ["--workers", "1"],
    "iddpm with importance-sampled times": "--workers 2 --model iddpm --objective vlb --T 3".split(),
}
MOMENTS = {
    "before the first checkpoint": (RunFolder, "save_checkpoint", lambda run, arrays, about: about["step"] == 0),
    "within a batch": (training.Trainer, "_accumulate", lambda trainer, number, *_: number == 5),
    "before an update": (training.Adam, "step", lambda adam, span: adam.steps == 7),
    "half through an update": (training.EMA, "update", lambda ema, span: ema.updates == 4),
    "logged but not saved": (RunFolder, "log", lambda run, step, **_: step == 9, True),
    "within a save": (runs.os, "replace", lambda source, target: str(source).endswith("next.partial")
                      and (Path(target).parent / PREVIOUS).exists()),
    "after a save": (RunFolder, "save_checkpoint", lambda run, arrays, about: about["step"] == 9, True),
}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """Each kind's run that nobody disturbed."""
    found = {}

    def of(kind):
        if kind not in found:
            folder = tmp_path_factory.mktemp("uninterrupted")
            finished(folder, *TINY, *KINDS[kind], "--out", folder / "run")
            found[kind] = folder / "run"
        return found[kind]
    return of


@needs_fork
@pytest.mark.parametrize("kind, moment", [(kind, moment) for kind in KINDS for moment in MOMENTS
                                          if kind == "gddm on 2 workers" or moment == "logged but not saved"])
def test_a_killed_run_goes_on_bit_for_bit(kind, moment, tmp_path, uninterrupted):
    whole, run = uninterrupted(kind), tmp_path / "run"
    status, _, _ = command(tmp_path, *TINY, *KINDS[kind], "--out", run, before=die_at(*MOMENTS[moment]))
    assert status == -signal.SIGKILL
    assert not (run / CHECKPOINT).exists() or stored(run)[1]["step"] < 12
    finished(tmp_path, "--resume", run)
    assert identical(run, whole)
    assert [row["step"] for row in lines(run)] == list(range(1, 13))
    assert [row["loss"] for row in lines(run)] == [row["loss"] for row in lines(whole)]
    assert not list(run.glob(".*.partial"))


@needs_fork
def test_all_of_the_state_is_needed_to_go_on(tmp_path, uninterrupted):
    """Another Adam or other losses of importance-sampled times make another run: the test above can fail."""
    kind = "iddpm with importance-sampled times"
    assert stored(uninterrupted(kind))[0]["times/count"][1:].min() >= 10
    for lost in ("adam.v/input.weight", "ema/input.weight", "times/history"):
        run = tmp_path / lost.replace("/", "-")
        status, _, _ = command(tmp_path, *TINY, *KINDS[kind], "--out", run,
                               before=die_at(*MOMENTS["after a save"]))
        arrays, header = checkpoint.load(run / CHECKPOINT)
        assert status == -signal.SIGKILL and header["metadata"]["step"] == 9
        checkpoint.save(run / CHECKPOINT, arrays | {lost: np.roll(arrays[lost], 1, axis=0)}, header)
        finished(tmp_path, "--resume", run)
        assert not identical(run, uninterrupted(kind))


@needs_fork
def test_killed_again_and_again(tmp_path, uninterrupted):
    """From the outside, the whole group at once, at moments that nobody chose."""
    run, rng = tmp_path / "run", np.random.default_rng(0)
    argv, kills = [*TINY, *KINDS["gddm on 2 workers"], "--out", run], 0
    for _ in range(4):
        process = Command(tmp_path, argv, no_summary)
        until(lambda: (run / CONFIG).exists())
        time.sleep(rng.uniform(0, 0.3))
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        kills += process.wait()[0] == -signal.SIGKILL
        argv = ["--resume", run]
    finished(tmp_path, "--resume", run)
    assert kills and identical(run, uninterrupted("gddm on 2 workers"))


@pytest.mark.slow
@needs_fork
def test_a_real_command_killed_at_random_moments(tmp_path):
    def start(*argv):
        return subprocess.Popen([sys.executable, "-m", "ddpm.train", *map(str, argv)], cwd=ROOT, start_new_session=True,
                                stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    settings, rng, run = [*TINY, "--steps", "200", "--workers", "2"], np.random.default_rng(1), tmp_path / "run"
    assert start(*settings, "--out", tmp_path / "whole").wait(PATIENCE) == 0
    argv = [*settings, "--out", run]
    for _ in range(8):
        process = start(*argv)
        until(lambda: (run / CONFIG).exists() or process.poll() is not None)         # noqa: B023
        time.sleep(rng.uniform(0, 2))
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        argv = ["--resume", run]
    assert start("--resume", run).wait(PATIENCE) == 0
    assert identical(run, tmp_path / "whole")


# ---- Ctrl-C

@needs_fork
@pytest.mark.parametrize("workers, number", [(1, signal.SIGINT), (2, signal.SIGINT), (1, signal.SIGTERM)])
def test_ctrl_c_saves_and_says_how_to_go_on(workers, number, tmp_path):
    folder = tmp_path / "with a space"
    folder.mkdir()

    def before():
        no_summary()
        log, boss = RunFolder.log, os.getpid()

        def and_interrupt(run, step, **values):
            log(run, step=step, **values)
            if step == 4:
                os.killpg(boss, number)
        RunFolder.log = and_interrupt

    settings = [*TINY, "--workers", workers]
    status, out, err = command(tmp_path, *settings, "--out", folder / "run", before=before)
    assert status == 130 and "Traceback" not in err
    assert stored(folder / "run")[1]["step"] == 5            # not a multiple of --save-every: it was saved now
    *_, how = re.findall(r"^stopped after step 5; go on with: python -m ddpm.train (.*)$", out, re.M)
    finished(tmp_path, *shlex.split(how))
    finished(tmp_path, *settings, "--out", tmp_path / "whole")
    assert identical(folder / "run", tmp_path / "whole")


@needs_fork
def test_ctrl_c_in_a_run_that_was_made_longer_goes_on_to_its_new_end(tmp_path):
    run = tmp_path / "run"
    finished(tmp_path, *TINY, "--workers", "1", "--steps", "3", "--out", run)

    def before():
        no_summary()
        log = RunFolder.log
        RunFolder.log = lambda run, step, **values: (
            log(run, step=step, **values), step == 4 and os.kill(os.getpid(), signal.SIGINT))
    assert command(tmp_path, "--resume", run, "--steps", "8", before=before)[0] == 130
    assert stored(run)[1]["step"] == 5 and RunFolder.open(run).config.steps == 8
    finished(tmp_path, "--resume", run)
    assert stored(run)[1]["step"] == 8


# ---- what is not finite, and workers that die

@needs_fork
@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("how", ["nan", "a learning rate of 1e30"])
def test_a_loss_that_is_not_finite_ends_in_one_sentence(how, workers, tmp_path):
    run = tmp_path / "run"

    def before():
        no_summary()
        if how == "nan":
            accumulate = training.Trainer._accumulate
            training.Trainer._accumulate = lambda trainer, number, *rest: (
                accumulate(trainer, number, *rest) * (np.nan if number == 8 else 1))
    lr = () if how == "nan" else ("--lr", "1e30", "--clip", "0")
    status, _, err = command(tmp_path, *TINY, "--workers", workers, *lr, "--out", run, before=before)
    step = int(re.search(r"loss became (nan|inf).* at step (\d+);.*smaller --lr", sentence(err))[2])
    assert status == 2 and str(run) in err
    arrays, about = stored(run)
    assert about["step"] == (step - 1) // 3 * 3 and all(np.isfinite(a).all() for a in arrays.values())
    assert step == 8 or how != "nan"


@needs_fork
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds the workers in /proc")
def test_a_worker_that_is_killed_ends_the_run_with_one_sentence(tmp_path):
    run = tmp_path / "run"
    process = Command(tmp_path, [*LONG, "--workers", "3", "--out", run])
    until(lambda: (run / "metrics.jsonl").exists() and len(lines(run)) > 4)
    workers = children_of(process.pid)
    assert len(workers) == 2
    os.kill(workers[-1], signal.SIGKILL)
    status, _, err = process.wait()
    said = sentence(err)
    assert status == 2
    assert re.search(r"worker \d was killed by SIGKILL .*; the last checkpoint is intact, go on with", said)
    assert all_gone(workers, 20)
    arrays, about = stored(run)
    assert about["step"] >= 4 and all(np.isfinite(a).all() for a in arrays.values())
    how = shlex.split(said.partition("go on with: python -m ddpm.train ")[2])
    finished(tmp_path, *how, "--steps", about["step"] + 3)
    assert stored(run)[1]["step"] == about["step"] + 3


@needs_fork
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds the workers in /proc")
def test_no_worker_outlives_its_killed_parent(tmp_path):
    run = tmp_path / "run"
    process = Command(tmp_path, [*LONG, "--workers", "3", "--out", run])
    until(lambda: (run / "metrics.jsonl").exists() and len(lines(run)) > 2)
    workers = children_of(process.pid)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait()[0] == -signal.SIGKILL and len(workers) == 2
    assert all_gone(workers, 20)
    last = stored(run)[1]["step"]
    finished(tmp_path, "--resume", run, "--steps", last + 3)


# ---- a whole run

@needs_fork
@pytest.mark.parametrize("schedule", ["cosine", "variance-exploding"])
def test_a_run_leaves_what_it_promises(schedule, tmp_path):
    run = tmp_path / "run"
    status, out, err = command(tmp_path, *TINY, *"--steps 3 --T 8 --samples 4 --workers 2 --log-every 2".split(),
                               "--schedule", schedule, "--out", run)
    assert status == 0, err
    assert {path.name for path in run.iterdir()} == {
        CONFIG, CHECKPOINT, PREVIOUS, "metrics.jsonl", ".lock",
        "samples.png", "curves.png", "uncertainty.png", "bits.png"}
    rows = lines(run)
    assert [row["step"] for row in rows] == [2, 3]           # every second, and the last
    for row in rows:
        assert row["loss"] > 0 and row["images_per_second"] > 0 and row["grad_norm"] > 0
    assert 0 < rows[0]["seconds"] < rows[1]["seconds"]
    assert json.loads((run / CONFIG).read_text())["model"] == "gddm"
    arrays, about = stored(run)
    assert about["step"] == 3 and about["image_shape"] == [8, 8, 1] and about["levels"] == 17
    assert f"results in {run}: samples.png, uncertainty.png, curves.png, bits.png" in out
    assert re.search(r"^test bits/dim \d+\.\d{3} ± \d\.\d{3} \(prior", out, re.M)
    assert f"next: python -m ddpm.sample {run} --num 16 --steps 8, or python -m ddpm.evaluate bpd {run}" in out
    assert "training: 100%" in err and "images/s" in err


@needs_fork
def test_C20_a_conditional_run_shows_every_class_in_a_column(tmp_path):
    run = tmp_path / "run"

    def before():
        from ddpm import report
        draw = report.draw_images
        report.draw_images = lambda *args, **options: print("labels", *options["labels"]) or draw(*args, **options)
    status, out, err = command(tmp_path, *TINY, *"--steps 3 --T 8 --samples 23 --workers 2 --conditional".split(),
                               "--out", run, before=before)
    assert status == 0, err
    assert f"labels {' '.join(str(i % 10) for i in range(23))}\n" in out
    assert "1618 images of 8x8x1 in 10 classes, " in out and " images without their labels)" in out
    assert f"next: python -m ddpm.sample {run} --num 16 --steps 8 --label all --guidance-scale 2, or" in out
    about = stored(run)[1]
    assert about["label_names"] == list("0123456789") and RunFolder.open(run).config.conditional
    assert (run / "samples.png").exists()


def test_help_is_quick_and_names_every_flag():
    """In a process of its own: importing the command must not load the mathematics."""
    code = ("import sys; from ddpm import train\ntry: train.main(['--help'])\n"
            "finally: print({'scipy', 'matplotlib'} & set(sys.modules), file=sys.stderr)")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0 and done.stderr == "set()\n"
    for flag in ("--model --data --data-dir --steps --batch-size --lr --T --schedule --seed --device --workers --out "
                 "--resume --base-channels --channel-mults --blocks-per-level --attention-levels --objective").split():
        assert re.search(rf"^ +{flag}\b", done.stdout, re.M), flag
    assert "python -m ddpm.train --model gddm" in done.stdout


# ---- bad input: one sentence, status 2, and nothing is left behind

def refused(capsys, main, *argv):
    """What a command answers to bad input."""
    with pytest.raises(SystemExit) as end:
        run_command(lambda: main([str(word) for word in argv]))
    out, err = capsys.readouterr()
    assert end.value.code == 2 and err.count("\n") == 1 and out == ""
    return sentence(err)


@pytest.mark.parametrize("flags, message", [
    ("--model vae", "invalid choice: 'vae'"),
    ("--data nothing", "--data must be one of mnist5k, digits, .* or folder:PATH, got 'nothing'"),
    ("--data folder:/nowhere", "/nowhere is not a folder"),
    ("--objective best", "--objective of model gddm must be one of .*, got 'best'"),
    ("--model ddpm --objective kl", "--objective of model ddpm must be one of simple, vlb, got 'kl'"),
    ("--schedule cubic", "invalid choice: 'cubic'"),
    ("--schedule linear", "T=20 is too small for a linear schedule"),
    ("--schedule sub-vp", "T=20 is too small for a linear schedule"),
    ("--channel-mults 1,1,1,1,1", "images of 8x8 can't be halved 4 times; use fewer levels"),
    ("--attention-levels 2", "--attention-levels must be among the levels 0 to 1"),
    ("--groups 3", "--groups must be a divisor of the width of every level"),
    ("--workers 9", "--batch-size 8 leaves some of 9 workers without an image; use fewer --workers"),
    ("--workers -1", "--workers must be at least 0"), ("--steps 0", "--steps must be at least 1"),
    ("--steps many", "argument --steps: invalid int value: 'many'"), ("--lr nan", "--lr must be a finite number"),
    ("--dropout 1", "--dropout must be at least 0 and below 1"),
    ("--conditional --label-dropout 0", "--label-dropout must be above 0 and below 1 .guidance needs both., got 0.0"),
    ("--conditional yes", "unrecognized arguments: yes"),
    ("--step 5", "unrecognized arguments: --step 5"),
])
def test_bad_flags(flags, message, capsys, tmp_path):
    said = refused(capsys, train.main, *TINY, "--out", tmp_path / "run", *flags.split())
    assert re.search(message, said) and not (tmp_path / "run").exists()


def pictures(folder, *names):
    """A few gray pictures of 8 x 8 pixels in files of these names, some in subfolders."""
    for i, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8), 10 * i, np.uint8)).save(folder / name)
    return f"folder:{folder}"


def test_C20_classes_that_are_not_there_or_no_longer_the_same(capsys, tmp_path):
    plain = pictures(tmp_path / "plain", "a.png", "b.png", "c.png")
    said = refused(capsys, train.main, *TINY, "--data", plain, "--conditional", "--out", tmp_path / "run")
    assert f"--conditional needs labels, and --data {plain} has none; put the pictures of each class in a subf" in said
    assert not (tmp_path / "run").exists()
    data = pictures(tmp_path / "pets", "cat/1.png", "cat/2.png", "dog/1.png", "dog/2.png")
    run = untrained(tmp_path / "run", data=data, conditional=True)
    (tmp_path / "pets" / "cat").rename(tmp_path / "pets" / "owl")
    load.cache_clear()
    said = refused(capsys, train.main, "--resume", run)
    assert f"--data {data} has other classes than this run was trained with (cat, dog); put its pictures back" in said
    assert "--conditional can't change on resuming (False in this run)" in refused(
        capsys, train.main, "--resume", untrained(tmp_path / "without"), "--conditional")


def test_no_gpu(capsys, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)           # importing it fails, as where it is not installed
    said = refused(capsys, train.main, *TINY, "--device", "cuda", "--out", tmp_path / "run")
    assert "device cuda needs CuPy" in said and not (tmp_path / "run").exists()


def test_bad_places(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("")
    for place, message in (("file/run", "the run folder .* cannot be written .*; choose another folder with --out"),
                           ("full", "full is not empty .it holds thesis.tex.; choose another folder with --out")):
        assert re.search(message, refused(capsys, train.main, *TINY, "--workers", "1", "--out", tmp_path / place))
    assert "exclude each other" in refused(capsys, train.main, "--out", "a", "--resume", "b")
    for place in ("full", "nowhere"):
        assert f"{place} holds no run" in refused(capsys, train.main, "--resume", tmp_path / place)


def untrained(path, **settings):
    """A run folder as it is before the first step, with its checkpoint twice (newest and previous)."""
    config = TrainConfig(**dict(data="digits", T=20, schedule="cosine", base_channels=8, channel_mults=(1, 2), groups=4,
                                attention_levels=(), heads=2, batch_size=8, workers=1, samples=0, steps=2) | settings)
    dataset = load(config.data)
    trainer = training.Trainer(config, dataset, Alone())
    theta = trainer.network.flat_parameters
    theta += 0.05 * np.random.default_rng(0).standard_normal(theta.shape, dtype=np.float32)
    trainer.ema.average[...] = theta
    arrays, counters = trainer.state()
    with RunFolder.create(path, config) as run:
        for _ in range(2):
            run.save_checkpoint(arrays, {"step": 0, "seconds": 0.0, "counters": counters, "levels": dataset.levels,
                                         "image_shape": list(dataset.image_shape), "label_names": trainer.label_names})
    return path


def test_bad_runs_to_resume(capsys, tmp_path):
    run = untrained(tmp_path / "run")
    said = refused(capsys, train.main, *TINY, "--out", run)
    assert f"{run} already holds a run; continue it with --resume {run} or choose another folder with --out" in said
    for flags, message in (("--model ddpm", "--model can't change on resuming .gddm in this run.; start a new run"),
                           ("--lr 0.1", "--lr can't change on resuming .0.001 in this run.")):
        assert re.search(message, refused(capsys, train.main, "--resume", run, *flags.split()))
    whole = (run / CHECKPOINT).read_bytes()
    for name in (CHECKPOINT, PREVIOUS):
        (run / name).write_bytes(whole[:len(whole) // 2])
    assert "has no checkpoint to go on from" in refused(capsys, train.main, "--resume", run)
    other = untrained(tmp_path / "other", base_channels=16)
    (run / CHECKPOINT).write_bytes((other / CHECKPOINT).read_bytes())
    assert "belongs to another configuration: --base-channels is 16 there and 8" in refused(
        capsys, train.main, "--resume", run)
    (run / CONFIG).write_text("{")
    assert "is no configuration of this project" in refused(capsys, train.main, "--resume", run)


@needs_fork
def test_a_newest_checkpoint_that_is_cut_off_gives_way_to_the_previous_one(tmp_path, uninterrupted):
    run = tmp_path / "run"
    command(tmp_path, *TINY, *KINDS["gddm on 2 workers"], "--out", run, before=die_at(*MOMENTS["after a save"]))
    (run / CHECKPOINT).write_bytes((run / CHECKPOINT).read_bytes()[:-100])
    status, out, err = command(tmp_path, "--resume", run, before=no_summary)
    assert status == 0 and "warning: going on from" in err and "after step 6 of 12" in out
    assert identical(run, uninterrupted("gddm on 2 workers"))
