"""Which array library an array belongs to, and the few places where arrays change sides.

Every array function in this project asks `array_module(x)` for the library of its argument and uses that
library only, so the same line runs on NumPy and on CuPy. CuPy is imported by nobody unless a run asks for
`--device cuda`; transfers between host and device happen only through `to_host` and `to_device`.
"""

import ctypes
import os
import sys

import numpy as np

BLOCK_BYTES = 128 * 1024
"""Rows that are worked on at once by chained elementwise passes: small enough to stay in the L2 cache."""

_registered = {}


def register_array_type(array_type, module):
    """Make `array_module` answer `module` for arrays of `array_type` (used by the tests' strict fake device)."""
    _registered[array_type] = module


def array_module(*arrays):
    """The array library (`numpy`, `cupy`, or a registered one) that the arguments live in.

    Python scalars and NumPy scalars go with any library. Mixing arrays of two libraries raises TypeError:
    a transfer is always written out with `to_host` or `to_device`.
    """
    if len(arrays) == 1 and type(arrays[0]) is np.ndarray:                # the hot path asks a hundred times a step
        return np
    found = None
    for x in arrays:
        module = _module_of(x)
        if module is not None and module is not found:
            if found is not None:
                raise TypeError(f"array_module: arrays of {found.__name__} and {module.__name__} are mixed; "
                                "move them to one side with to_host or to_device")
            found = module
    return np if found is None else found


def _module_of(x):
    for array_type, module in _registered.items():
        if isinstance(x, array_type):
            return module
    if isinstance(x, np.ndarray):
        return np
    if type(x).__module__.partition(".")[0] == "cupy":
        return sys.modules["cupy"]
    return None


def special_module(*arrays):
    """`log_ndtr`, `erfcx`, ... for these arrays: SciPy's, CuPy's or a registered library's."""
    xp = array_module(*arrays)
    if xp is np:
        import scipy.special
        return scipy.special
    if xp.__name__ == "cupy":
        import cupyx.scipy.special
        return cupyx.scipy.special
    return xp.special


def to_host(x):
    """The same values as a NumPy array (waits for the device; a NumPy array is returned as it is)."""
    module = _module_of(x)
    return np.asarray(x) if module is None or module is np else module.asnumpy(x)


def to_device(x, device):
    """The same values on `device`, "cpu" or "cuda".

    Raises ValueError for another name and RuntimeError when there is no usable GPU.
    """
    return to_host(x) if device_module(device) is np else device_module(device).asarray(x)


def device_module(device):
    """The array library that serves `device`: numpy for "cpu", cupy for "cuda" (errors as `to_device`)."""
    if device == "cpu":
        return np
    if device != "cuda":
        raise ValueError(f'device must be "cpu" or "cuda", not {device!r}')
    try:
        import cupy
        cupy.cuda.runtime.getDeviceCount()
    except ImportError:
        raise RuntimeError("device cuda needs CuPy: pip install -r requirements-gpu.txt") from None
    except Exception as error:
        raise RuntimeError(f"device cuda was asked for, but no usable GPU was found ({error}); "
                           "use device cpu") from None
    return cupy


def per_example(values, x):
    """Shape a scalar or (N,) array so that it broadcasts over the (N, ...) array `x`, in x's library and dtype.

    Schedule tables are float64 on the host; here they are cast at the point of use.
    """
    xp = array_module(x)
    if not hasattr(values, "ndim") or values.ndim == 0:
        return float(values) if _module_of(values) in (None, np) else values.astype(x.dtype)
    if _module_of(values) is np and xp is not np:
        values = xp.asarray(values)
    return values.astype(x.dtype).reshape((-1,) + (1,) * (x.ndim - 1))


def row_blocks(rows, row_bytes, xp, block_bytes=BLOCK_BYTES):
    """Slices that cut `rows` rows of `row_bytes` bytes into cache-sized blocks (one block on a device).

    A chain of elementwise passes over a block that stays in cache costs one trip to memory instead of one
    per pass; a GPU wants the opposite, few large launches.
    """
    if xp is not np:
        return [slice(0, rows)]
    step = max(1, block_bytes // max(1, row_bytes))
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def available_cores():
    """Number of cores that this process may use (its affinity, not the machine's total)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def limit_blas_threads(threads=1):
    """Hold the BLAS libraries to `threads` threads from here on; parallelism is one process per core."""
    import threadpoolctl
    return threadpoolctl.threadpool_limits(threads)


def keep_freed_memory():
    """Ask glibc to reuse freed arrays instead of returning their pages to the system.

    A training step frees and allocates the same shapes again and again; with this, the second step finds
    warm pages and never calls the kernel. Elsewhere than on glibc nothing happens.
    """
    try:
        libc = ctypes.CDLL("libc.so.6")
        M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
        libc.mallopt(M_MMAP_THRESHOLD, 1 << 30)
        libc.mallopt(M_TRIM_THRESHOLD, 1 << 30)
    except (OSError, AttributeError):
        pass
