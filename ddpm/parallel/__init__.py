"""Data-parallel training behind one small interface: the same program alone, on local processes, or elsewhere.

    from ddpm.parallel import make_group
    group = make_group(workers)                  # Alone or LocalProcesses
    gradients = group.rank_array((n,))           # memory first ...
    result = group.run(train)                    # ... then every rank calls train(group); rank 0's result comes back

`ddpm.parallel.group` says what a group promises and how a training step uses it; `local` has the processes and
`memory` what they share.
"""

import os
import warnings

from ddpm.parallel.group import Alone, Group, WorkerDied
from ddpm.parallel.local import LocalProcesses
from nn.backend import available_cores, device_module

__all__ = ["Alone", "Group", "LocalProcesses", "WorkerDied", "make_group"]


def make_group(workers=None, device="cpu"):
    """The group for `workers` local processes (default: the cores this process may use) on `device`.

    One worker, or device "cuda" (one process drives the GPU), gives `Alone`. Where processes cannot be forked
    (Windows) the answer is `Alone` too, with a warning. Raises ValueError when `workers` is not a positive
    integer, and the errors of `nn.backend.device_module` for a bad device.
    """
    xp = device_module(device)
    workers = available_cores() if workers is None else workers
    if isinstance(workers, bool) or not hasattr(workers, "__index__") or workers < 1:
        raise ValueError(f"make_group: workers must be a positive integer, not {workers!r}")
    if workers == 1 or device != "cpu":
        return Alone(xp)
    if not hasattr(os, "fork"):
        warnings.warn(f"make_group: this system cannot fork processes, so one worker runs instead of {workers}",
                      stacklevel=2)
        return Alone(xp)
    return LocalProcesses(workers)
