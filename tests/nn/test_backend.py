"""Which library an array belongs to, and how arrays change sides."""

import pathlib
import subprocess
import sys

import numpy as np
import pytest

from nn.backend import (
    BLOCK_BYTES,
    array_module,
    available_cores,
    device_module,
    limit_blas_threads,
    per_example,
    row_blocks,
    to_device,
    to_host,
)


def test_array_module_follows_the_array(fake):
    host, device = np.ones(2), fake.ones(2)
    assert array_module(host) is np and array_module(device) is fake
    assert array_module(1.0, host, np.float64(2), None) is np and array_module(2, device, np.float32(1)) is fake
    assert array_module(1.0) is np and array_module() is np


def test_a_cpu_run_never_imports_cupy():
    code = "import sys, numpy, nn.backend as b; b.array_module(numpy.ones(1)); sys.exit('cupy' in sys.modules)"
    root = pathlib.Path(__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0


def test_array_module_refuses_to_mix(fake):
    with pytest.raises(TypeError, match="to_host or to_device"):
        array_module(np.ones(2), fake.ones(2))


def test_to_host(fake):
    host = np.arange(3.0)
    assert to_host(host) is host and to_host(2.5) == 2.5
    moved = to_host(fake.asarray(host))
    assert type(moved) is np.ndarray and (moved == host).all()


def test_to_device():
    host = np.arange(3.0)
    assert to_device(host, "cpu") is host
    with pytest.raises(ValueError, match='"cpu" or "cuda"'):
        to_device(host, "gpu")


def test_cuda_without_cupy_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)              # makes `import cupy` an ImportError
    with pytest.raises(RuntimeError, match="requirements-gpu.txt"):
        device_module("cuda")


def test_cuda_without_a_gpu_says_so(monkeypatch):
    class Runtime:
        @staticmethod
        def getDeviceCount():
            raise OSError("no driver")

    cupy = type(sys)("cupy")
    cupy.cuda = type("cuda", (), {"runtime": Runtime})
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    with pytest.raises(RuntimeError, match="no usable GPU.*no driver.*use device cpu"):
        device_module("cuda")


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_per_example_scalars_keep_the_dtype(dtype):
    x = np.ones((2, 3, 3, 1), dtype)
    for value in (0.5, np.float64(0.5), np.array(0.5), 1):
        assert (per_example(value, x) * x).dtype == dtype and not hasattr(per_example(value, x), "shape")


@pytest.mark.parametrize("shape", [(3,), (3, 2), (3, 4, 4, 2)])
def test_per_example_broadcasts_over_the_image(shape):
    x, values = np.ones(shape, np.float32), np.array([1.0, 2.0, 4.0])
    scaled = per_example(values, x) * x
    assert scaled.shape == shape and scaled.dtype == np.float32
    np.testing.assert_array_equal(scaled.reshape(3, -1)[:, 0], values)


def test_per_example_meets_a_device_array_on_the_device(fake):
    x = fake.ones((2, 3, 3, 1), dtype=np.float32)
    assert (per_example(0.5, x) * x).dtype == np.float32 and not fake.transfers
    scaled = per_example(np.array([1.0, 2.0]), x) * x
    assert array_module(scaled) is fake and scaled.dtype == np.float32
    assert [transfer.shape for transfer in fake.transfers] == [(2,)]
    on_device = per_example(fake.asarray(np.array([1.0, 2.0])), x)
    assert on_device.shape == (2, 1, 1, 1)
    assert per_example(fake.ones(()), x).shape == ()


@pytest.mark.parametrize("rows, row_bytes", [(1, 10), (1000, 1000), (7, 10 * BLOCK_BYTES), (64, BLOCK_BYTES // 64),
                                             (5, 0)])
def test_row_blocks_cover_every_row_once(rows, row_bytes):
    blocks = row_blocks(rows, row_bytes, np)
    assert [i for block in blocks for i in range(rows)[block]] == list(range(rows))
    assert all((block.stop - block.start) * row_bytes <= max(BLOCK_BYTES, row_bytes) for block in blocks)


def test_row_blocks_are_one_block_on_a_device(fake):
    assert row_blocks(1000, 10**6, fake) == [slice(0, 1000)]


def test_cores_and_threads():
    assert available_cores() >= 1
    with limit_blas_threads(1):
        np.ones((2, 2)) @ np.ones((2, 2))
