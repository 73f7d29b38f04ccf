"""A command ends in status 0, in one sentence with status 2, or, for a bug, in a traceback."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ddpm.commands import run_command
from ddpm.errors import UserError, one_sentence

ROOT = Path(__file__).parents[2]


def outcome(capsys, main):
    with pytest.raises(SystemExit) as exit:
        run_command(main)
    return exit.value.code, capsys.readouterr().err


def raises(error):
    def main():
        raise error
    return main


@pytest.mark.parametrize("error, text", [
    (UserError("put it right"), "put it right"), (ValueError("--T must be\n at least 1"), "--T must be at least 1"),
    (RuntimeError("device cuda needs CuPy"), "device cuda needs CuPy"),
    (FileNotFoundError(errno.ENOENT, "No such file", "a.png"), "cannot use a.png: No such file"),
    (OSError(errno.ENOSPC, "full", "out.png"), "no space left to write out.png; free some space"),
    (FileNotFoundError("there is no checkpoint c"), "there is no checkpoint c"),
    (MemoryError(), "out of memory; use a smaller --micro-batch"), (ValueError(), "ValueError (DDPM_DEBUG=1")])
def test_what_a_person_can_put_right_is_one_sentence(capsys, error, text):
    status, message = outcome(capsys, raises(error))
    assert status == 2 and message.startswith(f"error: {text}") and message.count("\n") == 1


@pytest.mark.parametrize("error", [TypeError, KeyError, NotImplementedError, RecursionError, ZeroDivisionError])
def test_bugs_keep_their_traceback(error):
    with pytest.raises(error):
        run_command(raises(error("bug")))


def test_debug_brings_the_traceback_back(capsys, monkeypatch):
    monkeypatch.setenv("DDPM_DEBUG", "1")
    status, message = outcome(capsys, raises(ValueError("wrong")))
    assert status == 2 and "Traceback" in message and message.endswith("error: wrong\n")


def test_success_interruption_and_own_status(capsys):
    assert outcome(capsys, lambda: None) == (0, "")
    assert outcome(capsys, lambda: 3) == (3, "")
    assert outcome(capsys, raises(KeyboardInterrupt()))[0] == 130


def test_warnings_for_people_are_one_line():
    code = ("import warnings; from ddpm.commands import run_command\n"
            "run_command(lambda: warnings.warn('going on from the previous checkpoint'))")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stderr) == (0, "warning: going on from the previous checkpoint\n")


def test_a_reader_that_leaves_early_causes_no_traceback():
    code = "from ddpm.commands import run_command\nrun_command(lambda: [print('x' * 100) for _ in range(10000)] and 0)"
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([sys.executable, "-c", code], stdout=writer, stderr=subprocess.PIPE, text=True,
                          cwd=ROOT)
    os.close(writer)
    assert done.returncode == 1 and done.stderr == ""


def test_one_sentence_names_the_file_and_the_remedy():
    with pytest.raises(UserError, match="^the disk is full: the table t.md could not be written .*then run it again$"):
        with one_sentence("the table", "t.md", remedy="run it again"):
            raise OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(UserError, match=r"^t.md cannot be written \(Permission denied\); choose another$"):
        with one_sentence("", "t.md", remedy="choose another"):
            raise PermissionError(errno.EACCES, "Permission denied")
