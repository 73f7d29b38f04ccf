"""Figures show what they are given, and reach the disk whole."""

import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from ddpm import plots
from ddpm.likelihood import Bits


def pictures(n, channels=1, rng=None):
    return (rng or np.random.default_rng(0)).uniform(-1, 1, (n, 4, 5, channels)).astype(np.float32)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("n, columns, rows", [(1, 1, 1), (5, 3, 2), (6, None, 2), (7, 7, 1)])
def test_tile_puts_each_image_in_its_place(n, columns, rows, channels):
    images = pictures(n, channels)
    page, across = plots.tile(images, columns, gap=2), columns or 3
    assert page.shape == (rows * 6 - 2, across * 7 - 2, 3)
    white = np.ones(page.shape, bool)
    for i, image in enumerate(images):
        spot = slice(6 * (i // across), 6 * (i // across) + 4), slice(7 * (i % across), 7 * (i % across) + 5)
        np.testing.assert_allclose(page[spot], np.broadcast_to((image + 1) / 2, (4, 5, 3)))
        white[spot] = False
    assert (page[white] == 1).all()
    np.testing.assert_array_equal(plots.tile(3 * images), plots.tile(np.clip(3 * images, -1, 1)))


def test_save_writes_a_png_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    plots.save(plots.sample_grid(pictures(4)), path)
    with Image.open(path) as picture:
        assert picture.format == "PNG" and min(picture.size) > 10
    before, fig = path.read_bytes(), plots.sample_grid(pictures(9))
    monkeypatch.setattr(fig, "savefig", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        plots.save(fig, path)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["a.png"]


@pytest.mark.parametrize("rows", [1, 2, 100])
def test_training_curves(rows, tmp_path):
    metrics = [{"step": 10 * i, "loss": 1 / i, "grad_norm": np.nan if i == 2 else 2.0} for i in range(1, rows + 1)]
    fig = plots.training_curves(metrics, "title")
    raw, smooth = fig.axes[0].lines
    np.testing.assert_array_equal(raw.get_xdata(), [row["step"] for row in metrics])
    np.testing.assert_array_equal(raw.get_ydata(), [row["loss"] for row in metrics])
    if rows == 100:                                          # the mean of the last five
        assert smooth.get_xdata()[-1] == 1000
        assert smooth.get_ydata()[-1] == pytest.approx(np.mean([1 / i for i in range(96, 101)]))
    plots.save(fig, tmp_path / "curves.png")


def test_bits_curve_shows_the_density_over_t_and_the_parts(tmp_path):
    rng = np.random.default_rng(0)
    bits = Bits(rng.uniform(0, 1, 6), rng.uniform(1, 2, (3, 6)), rng.uniform(0, 1, 6), np.array([2, 3, 7, 21]),
                np.arange(21))
    fig = plots.bits_curve(bits)
    left, right = fig.axes
    np.testing.assert_allclose(left.lines[0].get_ydata(), (bits.steps / [[1], [4], [14]]).mean(axis=1))
    middle = left.lines[0].get_xdata()
    assert (bits.edges[:-1] <= middle).all() and (middle < bits.edges[1:]).all()
    parts = bits.summary()
    np.testing.assert_allclose([bar.get_height() for bar in right.patches],
                               [parts[name] for name in ("prior", "steps", "decoder")])
    assert f"{parts['bits_per_dim']:.3f}" in right.get_title()
    plots.save(fig, tmp_path / "bits.png")


@pytest.mark.parametrize("num, show, channels", [(2, 4, 1), (1, 1, 3)])
def test_G10_uncertainty_along_has_three_rows_an_image(num, show, channels, tmp_path):
    rng = np.random.default_rng(0)
    x_t, mean = (rng.uniform(-1, 1, (show, num, 4, 4, channels)) for _ in range(2))
    std = rng.uniform(0, 1, (show, num, 4, 4, channels))
    fig = plots.uncertainty_along(list(range(show, 0, -1)), x_t, mean, std)
    panels = [ax for ax in fig.axes if ax.images]
    assert len(panels) == 3 * num * show and panels[0].get_title() == f"t={show}"
    assert panels[0].get_ylabel() == "$x_t$" and panels[show].get_ylabel() == "$E[x_0|x_t]$"
    shown = [np.asarray(ax.images[0].get_array()) for ax in panels[:3 * show:show]]
    for picture, expected in zip(shown, ((x_t + 1) / 2, (mean + 1) / 2, std.mean(axis=-1, keepdims=True)), strict=True):
        np.testing.assert_allclose(picture, expected[0, 0] if picture.ndim == 3 else expected[0, 0, ..., 0])
    plots.save(fig, tmp_path / "uncertainty.png")


def test_no_window_and_no_pyplot():
    code = "import sys, numpy as np\nfrom ddpm import plots\nplots.sample_grid(np.zeros((1, 4, 4, 1)))\n" \
           "sys.exit('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0
