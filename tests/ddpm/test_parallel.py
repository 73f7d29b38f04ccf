"""Groups of ranks: sums, shards, the same bits on each run, and what is left when somebody dies (nothing)."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ddpm.parallel import Alone, Group, LocalProcesses, WorkerDied, make_group, processes
from nn.backend import available_cores

ROOT = Path(__file__).parents[2]
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
pytestmark = needs_fork

SIZES = [1, 2, 3, 5]
NUMBERS = (10.0 ** np.random.default_rng(0).uniform(-8, 8, (5, 40_000))).astype(np.float32)     # sums that round


# What the groups compute


def everybody(group, value):
    """`value` (n,) of every rank, as rank 0 sees it: (size, n). The children's results come back this way."""
    table = np.zeros((group.size, len(value)))
    table[group.rank] = value
    return group.allreduce(table)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(n=st.integers(0, 10**7), size=st.integers(1, 64))
def test_shards_cover_the_buffer_once_and_evenly(n, size):
    group = Group()
    group.size = size
    shards = [group.shard_of(rank, n) for rank in range(size)]
    lengths = [shard.stop - shard.start for shard in shards]
    assert [shard.start for shard in shards] == [0] + [shard.stop for shard in shards[:-1]]
    assert shards[-1].stop == n
    assert max(lengths) - min(lengths) <= 1


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("n", [1, 2, 7, 40_000])
def test_reduce_scatter_sums_in_rank_order_and_all_gather_completes(size, n):
    group = make_group(size)
    gradients, parameters = group.rank_array((n,)), group.shared_array((n,))

    def program(group):
        gradients[:] = NUMBERS[group.rank, :n]
        group.reduce_scatter(gradients)
        shard = group.shard(n)
        parameters[shard] = gradients[shard]
        group.all_gather(parameters)
        group.all_gather(gradients)
        return everybody(group, parameters), everybody(group, gradients)

    expected = NUMBERS[0, :n].copy()
    for rank in range(1, size):
        expected += NUMBERS[rank, :n]
    for seen in group.run(program):
        np.testing.assert_array_equal(seen, np.tile(expected, (size, 1)).astype(np.float64))
    if n > 1000 and size > 2:                     # the order matters to the bits, so the check above can fail
        backwards = NUMBERS[size - 1, :n].copy()
        for rank in range(size - 2, -1, -1):
            backwards += NUMBERS[rank, :n]
        assert (backwards != expected).any()


def test_collectives_take_part_of_a_buffer():
    group = LocalProcesses(3)
    gradients = group.rank_array((100,), np.float64)

    def program(group):
        gradients[:] = group.rank + 1
        part = gradients[13:30]
        group.reduce_scatter(part)
        group.all_gather(part)
        return gradients.copy()

    np.testing.assert_array_equal(group.run(program), np.where((np.arange(100) >= 13) & (np.arange(100) < 30), 6.0, 1))


def test_rank_array_keeps_views_that_were_made_before_the_fork():
    group = LocalProcesses(3)
    flat = group.rank_array((2, 1500), np.float64)
    weight = flat[1].reshape(30, 50)              # as a network's gradients are views of one flat buffer

    def program(group):
        weight[...] = 10.0 ** group.rank          # if all wrote to one memory, the sum would be a multiple of 3
        group.barrier()
        own = everybody(group, weight[3])
        group.reduce_scatter(flat.reshape(-1))
        group.all_gather(flat.reshape(-1))
        return own, flat.copy()

    own, total = group.run(program)
    np.testing.assert_array_equal(own, np.tile([[1.0], [10.0], [100.0]], (1, 50)))
    np.testing.assert_array_equal(total, [[0.0] * 1500, [111.0] * 1500])


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int64])
@pytest.mark.parametrize("shape", [(), (3,), (0,), (130, 200)])
def test_allreduce_and_broadcast(size, dtype, shape):
    def program(group):
        total = group.allreduce(np.full(shape, group.rank + 1, dtype))
        last = group.broadcast(np.full(shape, group.rank, dtype), root=group.size - 1)
        strided = np.full((4, 6), group.rank + 1, dtype)[:, ::2]
        assert group.allreduce(strided) is strided
        agreed = group.allreduce(np.array([(total == size * (size + 1) // 2).all(), (last == size - 1).all(),
                                           (strided == size * (size + 1) // 2).all()], np.int64))
        return total, last, agreed

    total, last, agreed = make_group(size).run(program)
    np.testing.assert_array_equal(total, np.full(shape, size * (size + 1) // 2, dtype), strict=True)
    np.testing.assert_array_equal(last, np.full(shape, size - 1, dtype), strict=True)
    assert (agreed == size).all()                 # every rank saw the same


def test_mailboxes_are_not_overwritten_before_all_have_read():
    def program(group):
        rng, wrong = np.random.default_rng(group.rank), 0
        for k in range(300):
            if rng.random() < 0.1:
                time.sleep(1e-4)                  # ranks get out of step
            wrong += int(group.allreduce(np.array([k * (group.rank + 1)]))[0] != 6 * k)
        return int(group.allreduce(np.array([wrong]))[0])

    assert LocalProcesses(3).run(program) == 0


# Training


def descend(size, steps=30, scatter=True):
    """Sharded momentum descent on a least squares fit; each rank has its share of the rows of the data."""
    rng = np.random.default_rng(1)
    x, n = rng.standard_normal((24, 7)), 7
    y = x @ rng.standard_normal(n)
    group = make_group(size)
    p, g = group.shared_array((n,), np.float64), group.rank_array((n,), np.float64)

    def program(group):
        mine, shard = group.shard(len(x)), group.shard(n)
        momentum, history = np.zeros(shard.stop - shard.start), []
        for _ in range(steps):
            error = x[mine] @ p - y[mine]
            g[:] = error @ x[mine] / len(x)
            if scatter:
                group.reduce_scatter(g)
            norm2 = group.allreduce(np.array([g[shard] @ g[shard], error @ error]))
            momentum *= 0.5
            momentum += g[shard] / max(1.0, np.sqrt(norm2[0]))
            p[shard] -= 0.3 * momentum
            group.all_gather(p)
            history.append(norm2[1])
        return np.concatenate([p, history])

    return group.run(program)


def test_training_is_equal_to_rounding_for_any_number_of_workers_and_to_the_bit_for_a_fixed_one():
    alone = descend(1)
    assert alone[7 + 29] < 1e-2 * alone[7]        # it learns
    for size in (2, 3):
        together = descend(size)
        np.testing.assert_allclose(together, alone, rtol=1e-9)
        np.testing.assert_array_equal(descend(size), together)
    with pytest.raises(AssertionError):           # without the sum it is another computation
        np.testing.assert_allclose(descend(2, scatter=False), alone, rtol=1e-3)


def test_blas_has_one_thread_in_each_rank_and_gets_its_threads_back():
    from threadpoolctl import threadpool_info

    def threads():
        return [library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"]

    matrix = np.random.default_rng(0).standard_normal((400, 400))
    product, before = matrix @ matrix, threads()  # BLAS threads exist when the fork comes

    def program(group):
        same = np.abs(matrix @ matrix - product).max() < 1e-9
        return everybody(group, [max(threads(), default=1), same])

    for size in (1, 3):
        np.testing.assert_array_equal(make_group(size).run(program), np.ones((size, 2)))
    assert threads() == before


def test_a_group_runs_again_also_after_a_failure():
    group = LocalProcesses(2)
    rows = group.rank_array((4,))

    def fail(group):
        group.allreduce(np.ones(1))
        if group.rank == 1:
            raise KeyError("once")
        group.barrier()

    def count(group):
        rows[:] = group.rank + 1
        group.reduce_scatter(rows)
        group.all_gather(rows)
        return rows.tolist()

    assert group.run(count) == [3.0] * 4
    with pytest.raises(WorkerDied):
        group.run(fail)
    assert group.run(count) == [3.0] * 4


def test_memory_goes_back_when_the_group_does():
    files = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else None
    for _ in range(3):
        group = LocalProcesses(3)
        group.rank_array((10,))
        group.shared_array((10,))
        group.run(lambda group: group.barrier())
        del group
    if files is not None:
        assert len(os.listdir("/proc/self/fd")) == files


# Wrong use


def test_make_group():
    assert isinstance(make_group(1), Alone)
    group = make_group(3)
    assert isinstance(group, LocalProcesses) and group.size == 3
    assert make_group().size == available_cores()
    for workers in (0, -1, 1.5, "2", True):
        with pytest.raises(ValueError, match="workers must be a positive integer"):
            make_group(workers)
    with pytest.raises(ValueError, match="device must be"):
        make_group(2, device="tpu")


def test_make_group_without_fork(monkeypatch):
    monkeypatch.delattr(os, "fork")
    with pytest.warns(UserWarning, match="cannot fork"):
        assert isinstance(make_group(4), Alone)


def test_alone_leaves_arrays_of_any_library_untouched():
    group, device_array = Alone(), object()
    assert group.allreduce(device_array) is device_array and group.broadcast(device_array) is device_array
    group.reduce_scatter(device_array)
    group.all_gather(device_array)
    group.barrier()
    assert group.shard(9) == slice(0, 9) and group.rank == 0 and group.size == 1
    assert group.rank_array((2, 3)).dtype == np.float32


def test_wrong_use_is_told_in_one_sentence():
    group = LocalProcesses(2)
    mine, shared = group.rank_array((4, 4)), group.shared_array((4,))
    with pytest.raises(RuntimeError, match="inside run"):
        group.barrier()

    def program(group):
        if group.rank == 0:
            for collective, flat in [(group.reduce_scatter, shared), (group.reduce_scatter, np.zeros(4, np.float32)),
                                     (group.all_gather, np.zeros(4)), (group.all_gather, mine),
                                     (group.reduce_scatter, mine.reshape(-1)[::2])]:
                with pytest.raises(ValueError, match="flat must be"):
                    collective(flat)
            for call in (lambda: group.shared_array((1,)), lambda: group.rank_array((1,)), lambda: group.run(program)):
                with pytest.raises(RuntimeError, match="run"):
                    call()
            with pytest.raises(TypeError, match="NumPy array"):
                group.allreduce(1.0)

    group.run(program)


# Death


def test_a_worker_that_raises_ends_the_run_with_one_sentence():
    def program(group):
        group.barrier()
        if group.rank == 2:
            raise ValueError("no such pixel\nsecond line")
        try:
            group.barrier()
        except WorkerDied as death:               # the survivors know too
            seen[group.rank] = death.number
            raise

    group = LocalProcesses(4)
    seen = group.shared_array((4,), np.int64)
    with pytest.raises(WorkerDied) as caught:
        group.run(program)
    assert str(caught.value) == "worker 2 raised ValueError: no such pixel"
    assert caught.value.number == 2
    assert "in program" in caught.value.__notes__[0]
    assert seen.tolist() == [2, 2, 0, 2]
    assert no_children()


@pytest.mark.parametrize("how, reason", [
    (lambda: os.kill(os.getpid(), signal.SIGKILL), "was killed by SIGKILL"),
    (lambda: os.kill(os.getpid(), signal.SIGTERM), "was killed by SIGTERM"),
    (lambda: os._exit(7), "left with exit status 7"),
    (lambda: sys.exit("enough"), "raised SystemExit: enough"),
])
def test_a_worker_that_is_killed_or_exits(how, reason):
    def program(group):
        group.barrier()
        if group.rank == 1:
            how()
        group.barrier()

    start = time.monotonic()
    with pytest.raises(WorkerDied, match=f"worker 1 {reason}"):
        LocalProcesses(3).run(program)
    assert time.monotonic() - start < 2
    assert no_children()


def test_a_worker_that_is_killed_while_it_waits():
    group = LocalProcesses(3)
    pids, killed = group.shared_array((3,), np.int64), []

    def program(group):
        pids[group.rank] = os.getpid()
        group.barrier()
        if group.rank == 0:
            time.sleep(0.1)                       # by now the others sleep in their barrier
            os.kill(int(pids[2]), signal.SIGKILL)
            killed.append(time.monotonic())
        group.barrier()                           # it had arrived; the next one can't do without it
        group.barrier()

    with pytest.raises(WorkerDied, match="worker 2 was killed by SIGKILL"):
        group.run(program)
    assert time.monotonic() - killed[0] < 1
    assert no_children()


def test_a_worker_that_computes_on_is_killed():
    def program(group):
        if group.rank == 2:
            os._exit(1)
        while group.rank == 1:
            pass
        group.barrier()

    start = time.monotonic()
    with pytest.raises(WorkerDied, match="worker 2"):
        LocalProcesses(3).run(program)
    assert time.monotonic() - start < 2
    assert no_children()


@pytest.mark.parametrize("hasty", [0, 1])
def test_ranks_that_part_are_told_apart_from_a_hang(hasty):
    def program(group):
        if group.rank != hasty:
            group.barrier()

    with pytest.raises(WorkerDied, match="different points"):
        LocalProcesses(2).run(program)
    assert no_children()


def test_an_exception_of_rank_0_is_the_callers():
    def program(group):
        group.barrier()
        if group.rank == 0:
            raise ZeroDivisionError("mine")
        group.barrier()

    with pytest.raises(ZeroDivisionError, match="mine"):
        LocalProcesses(3).run(program)
    assert no_children()


def no_children():
    """No child of this process is left, not even one that has ended."""
    try:
        return os.waitpid(-1, os.WNOHANG) is None
    except ChildProcessError:
        return True


PROGRAM = """
import atexit, os, signal, sys, time
import numpy as np
from ddpm.parallel import LocalProcesses, WorkerDied, processes
signal.signal(signal.SIGINT, signal.default_int_handler)    # a shell starts its background jobs without
print("once", end=" ")                            # still in the buffer when the fork comes
atexit.register(lambda: os.write(1, b"atexit "))
group = LocalProcesses(3)
pids = group.shared_array((3,), np.int64)
rows = group.rank_array((100_000,))

def start(group):
    pids[group.rank] = os.getpid()
    rows[:] = 1
    group.reduce_scatter(rows)
    if group.rank == 0:
        print(*pids, flush=True)
    group.barrier()
"""


def run_program(tail):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": ""}
    return subprocess.Popen([sys.executable, "-c", PROGRAM + tail], cwd=ROOT, env=environment, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)


def pids_of(program):
    first, *pids = program.stdout.readline().split()
    assert first == "once" and len(pids) == 3
    return [int(pid) for pid in pids]


def rest_of(program):
    """What else it writes, to both streams, until it ends (within 10 seconds)."""
    watchdog = threading.Timer(10, program.kill)
    watchdog.start()
    out, err = program.stdout.read(), program.stderr.read()
    program.wait()
    watchdog.cancel()
    return out, err


def alive(pid):
    """Whether a process runs (one that has ended but has not been reaped doesn't)."""
    try:
        os.kill(pid, 0)
        state = Path(f"/proc/{pid}/stat")
        return not state.exists() or state.read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (ProcessLookupError, FileNotFoundError):
        return False


def all_gone(pids, seconds=2.0):
    deadline = time.monotonic() + seconds
    while any(alive(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.01)
    return not any(alive(pid) for pid in pids)


def shared_memory_files():
    return sorted(os.listdir("/dev/shm")) if os.path.isdir("/dev/shm") else []


WAIT = """
def program(group):
    start(group)
    if group.rank == 0:
        time.sleep(60)
    group.barrier()
"""
COMPUTE = """
def program(group):
    start(group)
    while True:
        pass
"""
NO_DEATH_SIGNAL = """
processes._die_with = lambda parent: None         # as on systems without prctl
"""


@pytest.mark.parametrize("tail", [
    WAIT,
    NO_DEATH_SIGNAL + WAIT,
    pytest.param(COMPUTE, marks=pytest.mark.skipif(sys.platform != "linux", reason="needs PR_SET_PDEATHSIG")),
], ids=["waiting", "waiting, no death signal", "computing"])
def test_no_orphan_and_no_memory_is_left_when_the_parent_is_killed(tail):
    before = shared_memory_files()
    with run_program(tail + "\ngroup.run(program)") as program:
        pids = pids_of(program)
        assert all(alive(pid) for pid in pids)    # the check can fail
        assert shared_memory_files() == before
        os.kill(program.pid, signal.SIGKILL)
        assert all_gone(pids)
    assert shared_memory_files() == before


def test_ctrl_c_ends_all_ranks():
    tail = WAIT + """
try:
    group.run(program)
except KeyboardInterrupt:
    print("interrupted", flush=True)
"""
    with run_program(tail) as program:
        pids = pids_of(program)
        os.killpg(program.pid, signal.SIGINT)     # as a terminal does: to all of them
        assert rest_of(program) == ("interrupted\natexit ", "")
        assert program.returncode == 0
        assert all_gone(pids, 0.0)


def test_ctrl_c_in_quick_succession_leaves_nobody():
    with run_program(COMPUTE + "\ngroup.run(program)") as program:
        pids = pids_of(program)
        deadline = time.monotonic() + 10
        while program.poll() is None and time.monotonic() < deadline:
            os.killpg(program.pid, signal.SIGINT)
            time.sleep(0.02)
        ended = program.poll() is not None
        program.kill()
        assert ended and all_gone(pids)


@pytest.mark.parametrize("ending", ["return 5", "assert group.rank == 0; group.barrier()"])
def test_children_run_nothing_of_the_callers(ending):
    tail = f"""
def program(group):
    start(group)
    print("rank", group.rank)
    {ending}

try:
    result = group.run(program)
except WorkerDied as death:
    result = "died"
finally:
    os.write(2, b"finally ")
sys.stdout.flush()
os.write(1, str(result).encode() + b" ")
"""
    with run_program(tail) as program:
        pids = pids_of(program)
        out, err = rest_of(program)
        ranks, rest = out.splitlines()[:-1], out.splitlines()[-1]
        if ending == "return 5":
            assert sorted(ranks) == ["rank 0", "rank 1", "rank 2"] and rest == "5 atexit "
        else:
            assert "rank 0" in ranks and rest == "died atexit "
        assert err == "finally "
        assert all_gone(pids, 0.0)


# Cost


def test_barrier_is_cheap(capsys):
    def program(group):
        seconds = []
        for _ in range(500):
            start = time.perf_counter()
            group.barrier()
            seconds.append(time.perf_counter() - start)
        cpu = time.process_time()
        if group.rank == 0:
            time.sleep(0.3)
        group.barrier()
        cpu = everybody(group, [time.process_time() - cpu])
        return np.median(seconds), cpu.max()

    latency, cpu = LocalProcesses(2).run(program)
    with capsys.disabled():
        print(f"\nbarrier of 2 ranks: {1e6 * latency:.0f} us; a wait of 0.3 s costs {1e3 * cpu:.1f} ms of a core")
    assert cpu < 0.1                              # a waiting rank sleeps


def test_waiting_looks_for_a_moment_only():
    assert processes.SPIN_SECONDS <= 1e-3
