"""The file formats of the official data sets. Each reader checks what the file says about itself and its length.

    idx            0, 0, type, number of axes; one big-endian int32 an axis; then the values (MNIST)
    CIFAR binary   records of 1 label byte and 3 x 32 x 32 pixels, channel by channel
    .mat           X (32, 32, 3, N) and y (N, 1), in which the digit 0 is labelled 10 (SVHN)

Nothing here unpickles, and archives are read without being unpacked. Every ValueError names the file.
"""

import gzip
import math
import tarfile
import zlib

import numpy as np

UNSIGNED_BYTE = 8
CIFAR_RECORD = 1 + 3 * 32 * 32


def read_bytes(path):
    """The content of a file, decompressed if it is gzip."""
    try:
        data = path.read_bytes()
        return gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data
    except (EOFError, zlib.error, gzip.BadGzipFile):
        raise ValueError(f"{path} is cut off or damaged; fetch it again") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None


def read_idx(path, axes):
    """The uint8 array of an idx file, gzipped or not, with so many axes."""
    data = read_bytes(path)
    if len(data) < 8 or data[:3] != bytes([0, 0, UNSIGNED_BYTE]):
        raise ValueError(f"{path} is no idx file of bytes (its first bytes are {data[:4].hex(' ') or 'missing'}); "
                         "fetch the official one")
    if data[3] != axes:
        raise ValueError(f"{path} holds an array of {data[3]} axes where {axes} belong; are images and labels swapped?")
    shape = tuple(int.from_bytes(data[i:i + 4], "big") for i in range(4, 4 + 4 * axes, 4))
    values = np.frombuffer(data[4 + 4 * axes:], np.uint8)
    if values.size == 0 or values.size != math.prod(shape):
        raise ValueError(f"{path} holds {values.size} values where its header announces {' x '.join(map(str, shape))}; "
                         "it is cut off or damaged, fetch it again")
    return values.reshape(shape)


def read_cifar_bin(data, path):
    """(images (N, 32, 32, 3), labels (N,)) from the bytes of a .bin file; `path` is for the message."""
    records = np.frombuffer(data, np.uint8)
    if records.size == 0 or records.size % CIFAR_RECORD:
        raise ValueError(f"{path} has {records.size} bytes, not a multiple of the {CIFAR_RECORD} of an image; it is "
                         "cut off or not of the binary version of CIFAR-10, fetch it again")
    records = records.reshape(-1, CIFAR_RECORD)
    labels, planes = records[:, 0].astype(np.int64), records[:, 1:].reshape(-1, 3, 32, 32)
    if labels.max() > 9:
        raise ValueError(f"{path} has a label {labels.max()}, and CIFAR-10 has 0 to 9; fetch the official file")
    return np.ascontiguousarray(planes.transpose(0, 2, 3, 1)), labels


def bins_in_tar(path, files):
    """{name: bytes} of the named files, in whatever folder of the archive they are."""
    contents = {}
    try:
        with tarfile.open(path) as tar:
            for member in tar:
                name = member.name.rpartition("/")[2]
                if name in files and member.isfile():
                    contents[name] = tar.extractfile(member).read()
    except (tarfile.TarError, EOFError, zlib.error, OSError):
        raise ValueError(f"{path} is cut off, damaged or no archive; fetch it again") from None
    for name in files:
        if name not in contents:
            raise ValueError(f"{path} does not contain {name}; fetch the binary version of CIFAR-10")
    return contents


def read_svhn(path):
    """(images (N, 32, 32, 3), labels (N,)) of a cropped-digits .mat file."""
    from scipy.io import loadmat
    try:
        content = loadmat(path, variable_names=("X", "y"))
    except Exception as error:                                # scipy's readers raise a dozen kinds on bad bytes
        raise ValueError(f"{path} cannot be read as a MATLAB file ({error}); fetch it again") from None
    X, y = content.get("X"), content.get("y")
    if X is None or y is None or X.dtype != np.uint8 or X.shape != (32, 32, 3, y.size) or y.size == 0:
        raise ValueError(f"{path} does not hold SVHN's X (32, 32, 3, N) and y (N, 1); fetch train_32x32.mat or "
                         "test_32x32.mat of the cropped digits")
    labels = y.reshape(-1).astype(np.int64) % 10
    return np.ascontiguousarray(X.transpose(3, 0, 1, 2)), labels
