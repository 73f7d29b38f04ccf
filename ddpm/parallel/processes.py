"""A process and its forked children, which wait for each other, and live and die together.

Rank 0 is the calling process. It holds one socket to each child, and that child, alone, the other end. All that
travels there is one byte at a time (data is in shared memory):

    meet        every child sends ARRIVED; when rank 0 has heard all of them, it answers ARRIVED to each
    the end     every child sends DONE and exits
    a failure   the child sends FAILED with its exception and exits; rank 0 passes it on and raises WorkerDied

A waiting process sleeps in the kernel, and it is the kernel that reports deaths: whatever kills a process, its socket
closes, and the reader at the other end wakes up to an empty message. The sockets also order memory: what was written
before `meet` is seen by everybody after it. A child whose parent dies while it computes is killed by the kernel on
Linux (PR_SET_PDEATHSIG); elsewhere it ends when it next meets the others.
"""

import contextlib
import ctypes
import os
import select
import signal
import socket
import sys
import time
import traceback

from ddpm.parallel.group import WorkerDied

ARRIVED, DONE, FAILED = b".", b"=", b"!"
SPIN_SECONDS = 1e-4         # ranks that arrive together are not put to sleep and woken up again
GRACE_SECONDS = 0.5         # for children to leave by themselves after a failure


class Family:
    """`size` processes: this one and, during `run`, size - 1 children. Whatever happens, no child outlives `run`."""

    def __init__(self, size):
        self.size = size
        self.running = False
        self._rank = 0
        self._links = {}    # rank 0: child's rank -> socket; in a child: {0: socket}
        self._pids = {}     # rank 0: child's rank -> process id, until the child has been reaped

    def run(self, function):
        """Call function(rank) in every process; return rank 0's result when all have returned.

        Raises WorkerDied when a child has raised or died, RuntimeError when called inside itself, and what `function`
        raises on rank 0.
        """
        if self.running:
            raise RuntimeError("run: this group is running already; start it once, outside")
        pairs = {rank: socket.socketpair() for rank in range(1, self.size)}
        self._links = {rank: ours for rank, (ours, _) in pairs.items()}
        self.running = True
        try:
            _flush_output()                             # or the children would write the same text again
            with _interrupts_held():
                parent = os.getpid()
                try:
                    for rank in pairs:
                        pid = os.fork()
                        if pid == 0:
                            self._live_as_child(rank, pairs, parent, function)
                        self._pids[rank] = pid
                finally:
                    for _, theirs in pairs.values():
                        theirs.close()
            result = function(0)
            self._hear_all(DONE)
            return result
        finally:
            self._end()

    def meet(self):
        """Return when every process has called this; raise WorkerDied as soon as one of them no longer can."""
        if not self.running:
            raise RuntimeError("the other ranks exist inside run(function) only: call collectives there")
        if self._rank == 0:
            self._hear_all(ARRIVED)
        for link in self._links.values():
            with contextlib.suppress(OSError):          # its reader has died: that is found out when it is next heard
                link.send(ARRIVED)
        if self._rank != 0:
            self._hear_all(ARRIVED)

    def _live_as_child(self, rank, pairs, parent, function):
        """The whole life of a child: it never returns, since all that is below on the stack belongs to the parent."""
        status = 1
        try:
            for other, (ours, theirs) in pairs.items():
                ours.close()
                if other != rank:
                    theirs.close()
            self._rank, self._links, self._pids = rank, {0: pairs[rank][1]}, {}
            _die_with(parent)
            signal.signal(signal.SIGINT, signal.SIG_IGN)    # Ctrl-C reaches all processes; rank 0 decides
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT, signal.SIGTERM})
            function(rank)
            self._links[0].send(DONE)
            status = 0
        except BaseException as error:
            first_line = f"{type(error).__name__}: {error}".partition("\n")[0]
            _tell_failure(self._links[0], rank, f"raised {first_line}", traceback.format_exc())
        finally:
            with contextlib.suppress(BaseException):
                _flush_output()
            os._exit(status)

    def _hear_all(self, expected):
        """Hear `expected` on every link, in whatever order they speak; raise WorkerDied for anything else."""
        poller, waiting = select.poll(), {link.fileno(): rank for rank, link in self._links.items()}
        for file in waiting:
            poller.register(file, select.POLLIN)
        while waiting:
            for file, _ in _ready(poller):
                poller.unregister(file)
                rank = waiting.pop(file)
                message = _receive(self._links[rank])
                if message != expected:
                    self._fail(rank, message)

    def _fail(self, rank, message):
        """Raise WorkerDied for what was heard from `rank`; rank 0 also lets the other children know."""
        details = ""
        if message.startswith(FAILED):
            rank, reason, details = message[1:].decode(errors="replace").split("\n", 2)
        elif message:
            reason = "and worker 0 have called different collectives or returned at different points"
        else:
            reason = self._cause_of_death(rank)
        if self._rank == 0:
            for link in self._links.values():
                _tell_failure(link, rank, reason, details)
        death = WorkerDied(int(rank), reason)
        if details:
            death.add_note(details)
        raise death

    def _cause_of_death(self, rank):
        if rank not in self._pids:                      # a child has lost rank 0
            return "has ended"
        try:
            status = os.waitstatus_to_exitcode(os.waitpid(self._pids.pop(rank), 0)[1])
        except ChildProcessError:                       # reaped by somebody else
            return "has ended"
        if status >= 0:
            return f"left with exit status {status}"
        hint = " (the system does this when memory runs out)" if -status == signal.SIGKILL else ""
        return f"was killed by {signal.Signals(-status).name}{hint}"

    def _end(self):
        """Let the children leave (they read the end of the stream when they next meet), kill the rest, reap all."""
        try:
            deadline = time.monotonic() + GRACE_SECONDS
            for link in self._links.values():
                with contextlib.suppress(OSError):
                    link.shutdown(socket.SHUT_WR)
            for link in self._links.values():
                with contextlib.suppress(OSError):      # one of them is TimeoutError
                    link.settimeout(max(1e-3, deadline - time.monotonic()))
                    while link.recv(4096):
                        pass
        finally:
            with _interrupts_held():
                for pid in self._pids.values():
                    os.kill(pid, signal.SIGKILL)        # not reaped yet, so the number is still this child's
                for pid in self._pids.values():
                    with contextlib.suppress(ChildProcessError):
                        os.waitpid(pid, 0)
                for link in self._links.values():
                    link.close()
                self._links, self._pids, self.running = {}, {}, False


def _ready(poller):
    """What `poller` reports: look again and again for a moment, then sleep until there is something.

    Between looks the core is offered to others, since on a busy machine the awaited rank may need this very one.
    """
    deadline = time.perf_counter() + SPIN_SECONDS
    while time.perf_counter() < deadline:
        if ready := poller.poll(0):
            return ready
        os.sched_yield()
    return poller.poll()


def _receive(link):
    """One message: ARRIVED, DONE, FAILED with its text (to the end of the stream), or b"" from the dead."""
    try:
        message = link.recv(1)
        while message.startswith(FAILED) and (more := link.recv(4096)):
            message += more
        return message
    except ConnectionError:
        return b""


def _tell_failure(link, rank, reason, details):
    with contextlib.suppress(OSError):                  # whoever has died needn't know
        link.sendall(FAILED + f"{rank}\n{reason}\n{details[-8192:]}".encode(errors="replace"))


def _die_with(parent):
    """Ask the kernel to kill this process when its parent dies, also by SIGKILL (Linux only)."""
    if sys.platform == "linux":
        PR_SET_PDEATHSIG = 1
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:                          # it died before we asked
        os._exit(1)


@contextlib.contextmanager
def _interrupts_held():
    """Let Ctrl-C and termination wait while processes are started or ended, so that none is lost from sight."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _flush_output():
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()
