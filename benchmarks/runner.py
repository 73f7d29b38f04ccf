"""Processes that take turns: starting them, asking them for a step, and what they and the rest of the machine use."""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


class Runner:
    """A contestant (benchmarks/contestants.py) in a process of its own, asleep until it is asked.

    Attributes
    ----------
    imports : int or None
        Bytes it held after its imports, before it made a network.
    """

    def __init__(self, name, **options):
        self.name = name
        command = [sys.executable, "-m", "benchmarks.contestants", json.dumps(options)]
        self.process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._hear()
        self.imports = memory(self.process.pid)
        self._say("go")
        self._hear()

    def ask(self, action, argument):
        """Dict of seconds, CPU seconds and last result of so many repetitions of an action (see `serve`)."""
        self._say(f"{action} {argument}")
        return self._hear()

    def peak_memory(self, action, repetitions):
        """Most bytes held at once while an action runs, looked at every few milliseconds; None if unknown."""
        seen, done = [memory(self.process.pid)], threading.Event()

        def watch():
            while not done.wait(0.01):
                seen.append(memory(self.process.pid))

        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            self.ask(action, repetitions)
        finally:
            done.set()
            watcher.join()
        return max((m for m in seen if m is not None), default=None)

    def close(self):
        self.process.stdin.close()
        try:
            self.process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self.process.kill()

    def _say(self, line):
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def _hear(self):
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.name} has ended with status {self.process.wait()}")
        return json.loads(line)


# ---- what /proc tells (Linux; elsewhere None)

def family(pid):
    """A process and its children."""
    children = (Path(task).read_text().split() for task in Path(f"/proc/{pid}/task").glob("*/children"))
    return [pid, *(int(child) for some in children for child in some)]


def memory(pid):
    """Bytes that a process and its children hold, each page counted once.

    Own and shared pages by their proportional size: a page that k of the processes share counts 1/k in each. Files
    (libraries) by the largest resident size among them, since others on the machine may share them too.
    """
    try:
        held = [_fields(f"/proc/{p}/smaps_rollup") | _fields(f"/proc/{p}/status") for p in family(pid)]
        return 1024 * (sum(h["Pss_Anon"] + h["Pss_Shmem"] for h in held) + max(h["RssFile"] for h in held))
    except (OSError, KeyError):
        return None


def _fields(path):
    """The lines "Name: 123 kB" of a file of /proc."""
    lines = (line.split() for line in Path(path).read_text().splitlines())
    return {words[0].rstrip(":"): int(words[1]) for words in lines if len(words) == 3 and words[2] == "kB"}


def machine_seconds():
    """CPU seconds that all processes of the machine have used since it started."""
    try:
        user, nice, system, _idle, _wait, *more = map(int, Path("/proc/stat").read_text().split("\n")[0].split()[1:])
        return (user + nice + system + sum(more[:2])) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError):
        return None


def family_seconds(pid):
    """CPU seconds that a process and its children have used."""
    try:
        stats = (Path(f"/proc/{p}/stat").read_text().rpartition(")")[2].split() for p in family(pid))
        return sum(int(words[11]) + int(words[12]) for words in stats) / os.sysconf("SC_CLK_TCK")
    except (OSError, IndexError):
        return 0.0


def cpu_model():
    """The processor's name."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    import platform
    return platform.processor() or platform.machine()
