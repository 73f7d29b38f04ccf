"""A run folder survives SIGKILL at any instruction, full disks and second processes; what is wrong is one sentence."""

import dataclasses
import errno
import json
import math
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest

from ddpm.config import TrainConfig
from ddpm.runs import CHECKPOINT, CONFIG, METRICS, PREVIOUS, RunFolder, UserError, read_metrics, write_atomically

ROOT = Path(__file__).parents[2]
CONFIGURATION = TrainConfig(model="gddm", data="digits", T=50)


def state(step, size=100):
    """A checkpoint in which every value tells its step."""
    return {"weights": np.full(size, step, np.float32), "adam.m": np.full(size, -step, np.float32)}, {"step": step}


def assert_whole(run):
    """The step of the newest checkpoint, after a look at all its values."""
    arrays, metadata = run.load_checkpoint()
    assert (arrays["weights"] == metadata["step"]).all() and (arrays["adam.m"] == -metadata["step"]).all()
    return metadata["step"]


@pytest.fixture
def run(tmp_path):
    with RunFolder.create(tmp_path / "run", CONFIGURATION) as run:
        yield run


def one_line(error):
    assert "\n" not in str(error.value)
    return str(error.value)


# ---- create and open

def test_create_writes_the_configuration_and_open_reads_it(run):
    assert RunFolder.open(run.path).config == CONFIGURATION
    assert {p.name for p in run.path.iterdir()} == {CONFIG, ".lock"}


def test_default_names_count_up(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = []
    for _ in range(3):
        with RunFolder.create(None, CONFIGURATION) as run:
            names.append(str(run.path))
    assert names == ["runs/gddm-digits-1", "runs/gddm-digits-2", "runs/gddm-digits-3"]
    Path("runs/gddm-digits-12").mkdir()
    Path("runs/gddm-digits-old").mkdir()
    with RunFolder.create(None, CONFIGURATION) as run:
        assert run.path.name == "gddm-digits-13"
    with RunFolder.create(None, dataclasses.replace(CONFIGURATION, data="folder:/some/My Pictures/")) as run:
        assert run.path.name == "gddm-folder-some-My-Pictures-1"


def test_create_refuses_a_run_other_files_and_a_file(run, tmp_path):
    run.close()
    with pytest.raises(UserError, match="already holds a run; continue it with --resume .*/run or choose another"):
        RunFolder.create(run.path, CONFIGURATION)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("")
    with pytest.raises(UserError, match="is not empty .it holds thesis.tex.; choose another folder with --out"):
        RunFolder.create(tmp_path / "full", CONFIGURATION)
    for path in (tmp_path / "full" / "thesis.tex", tmp_path / "full" / "thesis.tex" / "run"):
        with pytest.raises(UserError, match="the run folder .*thesis.tex.* cannot be written .*; choose another"):
            RunFolder.create(path, CONFIGURATION)
    (tmp_path / "empty").mkdir()
    RunFolder.create(tmp_path / "empty", CONFIGURATION).close()


def test_create_in_a_read_only_place(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied")
    monkeypatch.setattr(Path, "mkdir", refuse)
    for path in (tmp_path / "run", None):
        with pytest.raises(UserError, match="the run folder.* cannot be written .Permission denied.; choose another"):
            RunFolder.create(path, CONFIGURATION)


def test_a_create_that_failed_can_be_repeated(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", _full)
        with pytest.raises(UserError, match="disk is full"):
            RunFolder.create(tmp_path / "run", CONFIGURATION)
    RunFolder.create(tmp_path / "run", CONFIGURATION).close()


@pytest.mark.parametrize("text, message", [
    (None, "holds no run .there is no .*config.json.; name a folder that training made"),
    ("{", "config.json is no configuration of this project: this is not JSON"),
    ('{"wings": 2}', "config.json is no configuration of this project: there is no setting 'wings'"),
    ('{"T": 0}', "--T must be at least 1, got 0")])
def test_open_refuses_what_is_no_run(tmp_path, text, message):
    if text is not None:
        (tmp_path / CONFIG).write_text(text)
    with pytest.raises(UserError, match=message) as error:
        RunFolder.open(tmp_path)
    one_line(error)


def test_open_refuses_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="holds no run"):
        RunFolder.open(tmp_path / "file")


# ---- checkpoints

def test_the_previous_checkpoint_is_kept(run):
    for step in (1, 2, 3):
        run.save_checkpoint(*state(step))
        assert assert_whole(run) == step
    (run.path / CHECKPOINT).unlink()
    with pytest.warns(UserWarning, match="going on from .*previous"):
        assert assert_whole(run) == 2
    assert {p.name for p in run.path.iterdir()} == {CONFIG, ".lock", PREVIOUS}


@pytest.mark.parametrize("cut", [0, 100, -1])
def test_a_cut_off_checkpoint_falls_back_to_the_previous_one_and_never_replaces_it(run, cut):
    run.save_checkpoint(*state(1))
    run.save_checkpoint(*state(2))
    (run.path / CHECKPOINT).write_bytes((run.path / CHECKPOINT).read_bytes()[:cut])
    with pytest.warns(UserWarning, match="going on from .*previous.*because .* is no complete checkpoint"):
        assert assert_whole(run) == 1
    run.save_checkpoint(*state(2))
    assert assert_whole(run) == 2
    (run.path / CHECKPOINT).unlink()
    with pytest.warns(UserWarning):
        assert assert_whole(run) == 1                         # not the cut-off one


def test_no_usable_checkpoint(run):
    with pytest.raises(UserError, match="has no checkpoint to go on from: there is no checkpoint .*safetensors$"):
        run.load_checkpoint()
    (run.path / CHECKPOINT).write_bytes(b"broken")
    (run.path / PREVIOUS).write_bytes(b"broken too")
    with pytest.raises(UserError, match="has no checkpoint to go on from: .*checkpoint.safetensors is no .*previous"):
        run.load_checkpoint()


def test_a_checkpoint_of_another_configuration_is_refused(run, tmp_path):
    with RunFolder.create(tmp_path / "other", dataclasses.replace(CONFIGURATION, base_channels=48)) as other:
        other.save_checkpoint(*state(1))
    (other.path / CHECKPOINT).rename(run.path / CHECKPOINT)
    with pytest.raises(UserError, match="another configuration: --base-channels is 48 there and 32 in config.json"):
        run.load_checkpoint()


def test_what_may_change_on_resuming_does_not_make_another_configuration(run):
    run.save_checkpoint(*state(4))
    longer = RunFolder(run.path, dataclasses.replace(CONFIGURATION, steps=9999, workers=2, device="cuda"))
    assert assert_whole(longer) == 4


def test_a_checkpoint_of_something_else_is_refused(run):
    from nn import checkpoint
    for metadata in ({}, {"config": {"wings": 2}}, {"config": 3}):
        checkpoint.save(run.path / CHECKPOINT, {}, metadata)
        with pytest.raises(UserError, match="was not written by a run of this version") as error:
            run.load_checkpoint()
        one_line(error)


def test_file_systems_without_hard_links(run, monkeypatch):
    def no_links(*_):
        raise PermissionError(errno.EPERM, "Operation not permitted")
    monkeypatch.setattr(os, "link", no_links)
    run.save_checkpoint(*state(1))
    run.save_checkpoint(*state(2))
    assert assert_whole(run) == 2
    (run.path / CHECKPOINT).unlink()
    with pytest.warns(UserWarning):
        assert assert_whole(run) == 1


@pytest.mark.parametrize("links", [True, False], ids=["links", "no links"])
def test_a_kill_at_any_system_call_leaves_a_complete_checkpoint(tmp_path, links):
    """A forked process saves a third checkpoint and dies before its k-th change of the disk, for k = 1, 2, ..."""
    for k in range(1, 100):
        with RunFolder.create(tmp_path / str(k), CONFIGURATION) as run:
            run.save_checkpoint(*state(1))
            run.save_checkpoint(*state(2))
        if not (child := os.fork()):
            _save_and_die_at(run.path, k, links)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        with RunFolder.open(run.path, exclusive=True) as again, warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            step = assert_whole(again)
            assert step in (2, 3) and (status != 0 or step == 3)
            assert not list(run.path.glob(".*partial"))
            again.save_checkpoint(*state(4))
            assert assert_whole(again) == 4
        if status == 0:
            break
    assert 5 < k < 20, "the kills must have happened, at several places"


def _save_and_die_at(path, k, links):
    calls = 0

    def counted(function):
        def call(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == k:
                os._exit(9)
            return function(*args, **kwargs)
        return call
    try:
        run = RunFolder.open(path, exclusive=True)
        for name in ("open", "fsync", "replace", "link", "unlink"):
            setattr(os, name, counted(getattr(os, name)))
        if not links:
            os.link = _full
        run.save_checkpoint(*state(3))
        os._exit(0)
    finally:
        os._exit(1)


SAVER = """
import sys
from ddpm.runs import RunFolder
from tests.ddpm.test_runs import state
run = RunFolder.open(sys.argv[1], exclusive=True)
for step in range(int(sys.argv[2]), 10**9):
    run.log(step=step, loss=1 / step, padding="x" * 5000)
    run.save_checkpoint(*state(step, 200_000))
    print(step, flush=True)
"""


def test_sigkill_at_random_moments_loses_nothing_that_was_reported(tmp_path):
    with RunFolder.create(tmp_path / "run", CONFIGURATION) as run:
        run.save_checkpoint(*state(1))
    step, moments = 1, np.random.default_rng(0).uniform(0, 0.03, 4)
    for moment in moments:
        process = subprocess.Popen([sys.executable, "-c", SAVER, run.path, str(step + 1)], stdout=subprocess.PIPE,
                                   text=True, cwd=ROOT)
        reported = int(process.stdout.readline())
        time.sleep(moment)
        process.send_signal(signal.SIGKILL)
        reported = int((process.stdout.read().split() or [reported])[-1])
        process.wait()
        with RunFolder.open(run.path, exclusive=True) as again:
            step = assert_whole(again)
            assert step >= reported
            again.truncate_log(step)
            assert [row["step"] for row in again.metrics()] == list(range(2, step + 1))


# ---- full disk

def _full(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_is_one_sentence_and_the_earlier_checkpoints_stay(run, monkeypatch):
    run.save_checkpoint(*state(1))
    run.save_checkpoint(*state(2))
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", _full)
        with pytest.raises(UserError, match="^the disk is full: the checkpoint .* could not be written .what was there "
                                            "before is intact.; free some space, then continue with --resume") as error:
            run.save_checkpoint(*state(3))
        one_line(error)
        with pytest.raises(UserError, match="the disk is full: .*curves.png could not be written"):
            write_atomically(run.path / "curves.png", lambda file: file.write(b"picture"))
    assert assert_whole(run) == 2
    assert {p.name for p in run.path.iterdir()} == {CONFIG, ".lock", CHECKPOINT, PREVIOUS}


FILLER = """
import resource, sys
from ddpm.commands import run_command
from ddpm.runs import RunFolder
from tests.ddpm.test_runs import state
def main():
    run = RunFolder.open(sys.argv[1], exclusive=True)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    run.save_checkpoint(*state(1))
    run.log(step=1)
    if sys.argv[2] == "checkpoint":
        run.save_checkpoint(*state(2, 100_000))
    for step in range(2, 10_000):
        run.log(step=step, loss=0.5)
run_command(main)
"""


@pytest.mark.parametrize("what", ["checkpoint", "metrics"])
def test_a_file_that_cannot_grow_is_one_sentence_with_status_2(run, what):
    run.close()
    done = subprocess.run([sys.executable, "-c", FILLER, run.path, what], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2 and done.stderr.startswith("error: the disk is full: ") and done.stderr.count("\n") == 1
    assert what in done.stderr and assert_whole(run) == 1
    rows = read_metrics(run.path / METRICS)
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    assert (run.path / METRICS).read_bytes().endswith(b"}\n"), "no half line"
    assert not list(run.path.glob(".*partial"))


# ---- lock

def test_two_cannot_write_one_run_but_any_may_look(run):
    run.save_checkpoint(*state(1))
    with pytest.raises(UserError, match="another process is training in .*; wait for it or choose another folder"):
        RunFolder.open(run.path, exclusive=True)
    with pytest.raises(UserError, match="another process is training in"):
        RunFolder.create(run.path, CONFIGURATION)
    assert assert_whole(RunFolder.open(run.path)) == 1
    run.close()
    RunFolder.open(run.path, exclusive=True).close()


HOLDER = """
import os, sys, time
from ddpm.runs import RunFolder
run = RunFolder.open(sys.argv[1], exclusive=True)
if os.fork() == 0:
    time.sleep(60)                                            # a worker that outlives its parent
    os._exit(0)
print("locked", flush=True); time.sleep(60)
"""


def test_a_killed_process_frees_its_lock_even_if_a_worker_lives_on(run):
    run.close()
    process = subprocess.Popen([sys.executable, "-c", HOLDER, run.path], stdout=subprocess.PIPE, cwd=ROOT,
                               start_new_session=True)
    try:
        process.stdout.readline()
        with pytest.raises(UserError, match="another process"):
            RunFolder.open(run.path, exclusive=True)
        process.kill()
        process.wait()
        RunFolder.open(run.path, exclusive=True).close()
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.stdout.close()


def test_locking_removes_what_a_kill_left(run):
    run.close()
    (run.path / ".checkpoint.safetensors.123.partial").write_text("half")
    with RunFolder.open(run.path, exclusive=True):
        assert {p.name for p in run.path.iterdir()} == {CONFIG, ".lock"}


# ---- metrics

def test_metrics_are_one_object_a_line(run):
    run.log(step=1, loss=np.float32(0.5), seconds=1.25, images_per_second=np.float64(10), grad_norm=math.inf)
    run.log(step=np.int64(2), loss=math.nan, note="warm")
    first, second = (run.path / METRICS).read_text().splitlines()
    assert json.loads(first) == {"step": 1, "loss": 0.5, "seconds": 1.25, "images_per_second": 10.0, "grad_norm": None}
    assert json.loads(second) == {"step": 2, "loss": None, "note": "warm"}
    assert math.isnan(run.metrics()[1]["loss"]) and run.metrics()[0]["loss"] == 0.5


def test_no_metrics_yet(run):
    run.truncate_log(3)
    assert run.metrics() == [] and not (run.path / METRICS).exists()


@pytest.mark.parametrize("tail", [b"", b'{"step": 5, "lo', b'{"step": 5, "loss": 1}', b"\xff\xfe", b"3",
                                  b'{"step": 2}'], ids=str)
def test_a_cut_off_last_line_is_tolerated_and_dropped_on_resuming(run, tail):
    for step in range(1, 5):
        run.log(step=step, loss=step)
    with open(run.path / METRICS, "ab") as file:
        file.write(tail)
    assert [row["step"] for row in run.metrics()] == [1, 2, 3, 4]
    run.truncate_log(3)
    run.log(step=4, loss=40)
    assert [row["loss"] for row in run.metrics()] == [1, 2, 3, 40]


def test_damage_in_the_middle_is_named(run):
    (run.path / METRICS).write_text('{"step": 1}\nnonsense\n{"step": 3}\n')
    with pytest.raises(ValueError, match="line 2 of .*metrics.jsonl is no JSON object; remove it"):
        run.metrics()


# ---- files

def test_write_atomically_replaces_whole_files(tmp_path):
    path = tmp_path / "samples.png"
    write_atomically(path, lambda file: file.write(b"first"))

    def broken(file):
        file.write(b"half")
        raise ZeroDivisionError
    with pytest.raises(ZeroDivisionError):
        write_atomically(path, broken)
    assert path.read_bytes() == b"first" and os.listdir(tmp_path) == ["samples.png"]
    with pytest.raises(UserError, match="cannot be written .*; write it somewhere else"):
        write_atomically(path / "below" / "a.file", lambda file: None)


