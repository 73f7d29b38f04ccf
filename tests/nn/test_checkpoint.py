"""Checkpoints come back bit for bit, are replaced whole or not at all, and say so when they are broken."""

import errno
import os
import pickle

import numpy as np
import pytest

from nn import checkpoint
from tests import fake_device

ARRAYS = {"down0/conv1/w": np.arange(24, dtype=np.float32).reshape(2, 3, 4), "scalar": np.float64(np.pi) * np.ones(()),
          "step": np.array([3], np.int64), "mask": np.array([True, False]), "empty": np.zeros((0, 2), np.float32),
          "half": np.array([1.5], np.float16)}
METADATA = {"step": 7, "model": "gddm", "mults": [1, 2, 2], "nested": {"ä": None, "x": 0.1}}


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "c.safetensors"
    checkpoint.save(path, ARRAYS, METADATA)
    return path


def assert_same(path, arrays=ARRAYS, metadata=METADATA):
    loaded, found = checkpoint.load(path)
    assert found == metadata and loaded.keys() == arrays.keys()
    for name, x in arrays.items():
        assert loaded[name].dtype == x.dtype and loaded[name].shape == x.shape
        assert loaded[name].tobytes() == np.ascontiguousarray(x).tobytes(), name


def test_arrays_and_metadata_round_trip_bit_for_bit(saved):
    assert_same(saved)
    assert os.listdir(saved.parent) == [saved.name]


def test_loaded_arrays_are_writable_and_metadata_keeps_special_floats(tmp_path):
    checkpoint.save(tmp_path / "c", {"x": np.array([np.nan, -0.0, np.inf])}, {})
    x = checkpoint.load(tmp_path / "c")[0]["x"]
    assert np.isnan(x[0]) and np.signbit(x[1]) and np.isinf(x[2])
    x[:] = 0


@pytest.mark.parametrize("x", [np.arange(6.0).reshape(2, 3).T, np.arange(12.0)[::-2],
                               np.arange(12.0).reshape(3, 4)[:, 1:3],
                               np.asfortranarray(np.arange(6.0).reshape(2, 3))], ids=str)
def test_strided_arrays_are_saved_by_value(tmp_path, x):
    checkpoint.save(tmp_path / "c", {"x": x}, {})
    assert np.array_equal(checkpoint.load(tmp_path / "c")[0]["x"], x)


def test_foreign_byte_order_is_saved_by_value(tmp_path):
    checkpoint.save(tmp_path / "c", {"x": np.arange(5, dtype=">f4")}, {})
    x = checkpoint.load(tmp_path / "c")[0]["x"]
    assert x.dtype == np.float32 and x.tolist() == [0, 1, 2, 3, 4]


def test_device_arrays_are_moved_to_the_host(tmp_path, fake):
    checkpoint.save(tmp_path / "c", {"x": fake_device.xp.asarray(np.arange(3.0))}, {})
    loaded = checkpoint.load(tmp_path / "c")[0]["x"]
    assert type(loaded) is np.ndarray and loaded.tolist() == [0, 1, 2]


@pytest.mark.parametrize("arrays, metadata, word", [
    ({"x": np.array(["text"])}, {}, "'x' must be real"), ({"x": np.zeros(2, complex)}, {}, "'x' must be real"),
    ({"x": np.array([object()])}, {}, "'x' must be real"), ({"__metadata__": np.zeros(1)}, {}, "array names"),
    ({1: np.zeros(1)}, {}, "array names"), ({}, {"x": np.zeros(2)}, "JSON"), ({}, {"x": object()}, "JSON")])
def test_what_the_format_cannot_hold_is_refused_and_the_earlier_file_stays(saved, arrays, metadata, word):
    with pytest.raises(TypeError, match=word):
        checkpoint.save(saved, arrays, metadata)
    assert_same(saved)


def test_every_cut_is_noticed(saved):
    whole = saved.read_bytes()
    for length in [*range(0, len(whole), 37), len(whole) - 1]:
        saved.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="c.safetensors is no complete checkpoint .*use the previous checkpoint"):
            checkpoint.load(saved)
    saved.write_bytes(whole)
    assert_same(saved)


def test_every_flipped_byte_is_noticed(saved):
    """Every third: in the length, the header, the metadata and the values."""
    whole, unnoticed = saved.read_bytes(), 0
    for position in range(0, len(whole), 3):
        broken = bytearray(whole)
        broken[position] ^= 0x01
        saved.write_bytes(broken)
        try:
            loaded, metadata = checkpoint.load(saved)
        except ValueError as error:
            assert str(saved) in str(error) and "\n" not in str(error)
        else:                                                 # only padding may differ unnoticed
            unnoticed += 1
            assert metadata == METADATA and all(loaded[name].tobytes() == x.tobytes() for name, x in ARRAYS.items())
    assert unnoticed < 8


def test_one_changed_value_fails_the_checksum(saved):
    whole = bytearray(saved.read_bytes())
    whole[-1] ^= 0x80
    saved.write_bytes(whole)
    with pytest.raises(ValueError, match="is damaged .*checksum"):
        checkpoint.load(saved)


def test_foreign_files_are_refused(tmp_path):
    from safetensors.numpy import save_file
    path = tmp_path / "weights.safetensors"
    save_file({"x": np.zeros(2)}, path)
    with pytest.raises(ValueError, match="weights.safetensors is a safetensors file, but not a checkpoint of this"):
        checkpoint.load(path)
    for content in (b"", b"PK\x03\x04 a zip file", pickle.dumps({"x": 1}), b"{" * 100):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="weights.safetensors is no complete checkpoint"):
            checkpoint.load(path)
    with pytest.raises(ValueError, match="no complete checkpoint"):
        checkpoint.load(tmp_path)
    with pytest.raises(FileNotFoundError, match="there is no checkpoint"):
        checkpoint.load(tmp_path / "nothing")


def test_no_pickle_is_ever_executed(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "executed"),))
    (tmp_path / "c").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(ValueError):
        checkpoint.load(tmp_path / "c")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_full_disk_keeps_the_earlier_file_and_leaves_nothing_behind(saved, monkeypatch, call):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with monkeypatch.context() as patch:
        patch.setattr(os, call, full)
        with pytest.raises(OSError, match="No space left"):
            checkpoint.save(saved, {"x": np.zeros(1000)}, {})
    assert_same(saved)
    assert os.listdir(saved.parent) == [saved.name]


def test_interruption_while_writing_keeps_the_earlier_file(tmp_path):
    path = tmp_path / "f"
    path.write_bytes(b"earlier")

    def write(file):
        file.write(b"half of the new")
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        checkpoint.write_atomically(path, write)
    assert path.read_bytes() == b"earlier" and os.listdir(tmp_path) == ["f"]


def test_a_place_that_cannot_be_written_raises_oserror(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file" / "c", tmp_path / "missing" / "c"):
        with pytest.raises(OSError):
            checkpoint.save(path, {}, {})
