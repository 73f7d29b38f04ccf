"""Checkpoints: named arrays and a JSON-able dictionary in one safetensors file, written whole or not at all.

A process can be killed between any two instructions, so nothing is ever written over a file that is still needed:

    write a temporary file beside it  ->  fsync  ->  os.replace (atomic)  ->  fsync of the folder

Whoever looks at the path sees the earlier file or the new one, never half of one. The header carries a CRC-32 of all
names, shapes and bytes, so that damage which leaves the layout intact is noticed as well. Nothing is ever unpickled:
loading a stranger's checkpoint cannot run a stranger's code.
"""

import contextlib
import json
import os
import zlib
from pathlib import Path

import numpy as np

from nn.backend import to_host

FORMAT = "diffusion-by-hand 1"
TEMPORARY = ".partial"
"""Suffix of temporary files; one that outlives its process was left by a kill and may be deleted."""


def save(path, arrays, metadata):
    """Write `arrays` and `metadata` to `path`, whole: an earlier file there stays until the new one is complete.

    Parameters
    ----------
    path : str or Path
    arrays : dict of str to array
        Real or boolean arrays of any shape, on the host or on a device (moved by `to_host`).
    metadata : dict
        Anything that `json.dumps` takes.

    Raises
    ------
    TypeError
        For an array or a value that the format cannot hold.
    OSError
        When the disk is full or the place cannot be written; the earlier file is then untouched.
    """
    from safetensors.numpy import save as to_bytes
    arrays = {name: _plain(name, to_host(x)) for name, x in arrays.items()}
    try:
        text = json.dumps(metadata)
    except (TypeError, ValueError) as error:
        raise TypeError(f"metadata must be values that JSON can hold ({error})") from None
    header = {"format": FORMAT, "metadata": text, "crc32": str(_checksum(arrays, text))}
    write_atomically(path, lambda file: file.write(to_bytes(arrays, header)))


def load(path):
    """(arrays, metadata) as they were given to `save`, the arrays on the host.

    Raises FileNotFoundError if there is no such file, and ValueError, naming the file and what to do, if it is cut
    off, damaged or not a checkpoint of this project.
    """
    from safetensors import SafetensorError, safe_open
    try:
        with safe_open(path, framework="numpy") as file:
            header = file.metadata() or {}
            if header.get("format") != FORMAT:
                raise ValueError(f"{path} is a safetensors file, but not a checkpoint of this project; "
                                 "name a checkpoint.safetensors that training wrote")
            arrays = {name: file.get_tensor(name) for name in file.keys()}
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no checkpoint {path}") from None
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is no complete checkpoint ({error}); "
                         "use the previous checkpoint or train again") from None
    if header.get("crc32") != str(_checksum(arrays, header.get("metadata", ""))):
        raise ValueError(f"{path} is damaged (its checksum does not match its content); "
                         "use the previous checkpoint or train again")
    return arrays, json.loads(header["metadata"])


def _plain(name, x):
    """x contiguous, in native byte order: safetensors writes memory as it lies, ignoring strides."""
    if not isinstance(name, str) or name == "__metadata__":
        raise TypeError(f"array names must be strings other than '__metadata__', got {name!r}")
    if x.dtype.kind not in "biuf" or x.dtype.itemsize > 8:
        raise TypeError(f"array {name!r} must be real or boolean to go into a checkpoint, got dtype {x.dtype}")
    return np.asarray(x, dtype=x.dtype.newbyteorder("="), order="C")


def _checksum(arrays, text):
    crc = zlib.crc32(text.encode())
    for name, x in sorted(arrays.items()):
        crc = zlib.crc32(f"{name} {x.dtype} {x.shape}".encode(), crc)
        crc = zlib.crc32(x.reshape(-1).view(np.uint8), crc)
    return crc


def write_atomically(path, write):
    """Fill the file `path` by `write(file)`, `file` being open for bytes: afterwards it is there whole, or as before.

    Whatever `write` raises (and OSError, for a full disk) passes through after the temporary file is removed.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}{TEMPORARY}")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    sync_folder(path.parent)


def sync_folder(path):
    """Make the names in a folder durable, after a rename (a file system that cannot do so is left alone)."""
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
