"""How a contestant obeys: commands on its standard input, one line of JSON as the answer, asleep in between."""

import json
import sys
import time

import numpy as np


def micro_batches(group, batch, size):
    """Slices of the batch that this rank works on, one after the other."""
    mine = group.shard(batch)
    return [slice(start, min(start + size, mine.stop)) for start in range(mine.start, mine.stop, size)]


def serve(actions, receive=sys.stdin.readline, *, speak=True):
    """Obey lines "action repetitions" and "check path" until an empty one.

    The answer has each repetition's seconds, the CPU seconds of this process among them, and the last result.
    """
    if speak:
        answer(ready=True)
    while line := receive().split():
        action, argument = actions[line[0]], line[1]
        seconds, cpu, result = [], [], None
        if line[0] == "check":
            action(argument)
        else:
            for _ in range(int(argument)):
                start = time.perf_counter(), time.process_time()
                result = action()
                cpu.append(time.process_time() - start[1])
                seconds.append(time.perf_counter() - start[0])
        if speak:
            answer(seconds=seconds, cpu=cpu, result=None if result is None else float(result))


def serve_group(group, actions):
    """`serve` on all ranks: rank 0 reads the commands, the others sleep until they are told."""
    def receive():
        line = np.zeros(4096, np.uint8)
        if group.rank == 0:
            text = sys.stdin.readline().encode()
            line[:len(text)] = np.frombuffer(text, np.uint8)
        return group.broadcast(line).tobytes().rstrip(b"\0").decode()

    serve(actions, receive, speak=group.rank == 0)


def answer(**what):
    """One line of JSON to the parent."""
    print(json.dumps(what), flush=True)
