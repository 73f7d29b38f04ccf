"""How the lectures' figures look: readable at notebook width, and in grey.

Colours differ in lightness, not only in hue, and come with their own line style, so a page printed in grey
says the same. `use()` is called once, in the first cell of a lecture.
"""

import matplotlib as mpl
from cycler import cycler

INK = "#1a1a1a"
BLUE, ORANGE, GREEN, RED = "#0b3c6f", "#e08a1e", "#4f9d69", "#b3242b"
GREY, PALE = "#8c8c8c", "#e9e9e9"

WIDTH = 8.0
"""Width of a figure in inches; a notebook shows it without scaling."""


def use():
    """Set matplotlib's defaults for a lecture."""
    mpl.rcParams.update({
        "figure.figsize": (WIDTH, 3.4),
        "figure.dpi": 100,
        "savefig.dpi": 100,
        "savefig.bbox": "tight",
        "figure.constrained_layout.use": True,
        "font.size": 11,
        "axes.titlesize": 11,
        "axes.labelsize": 11,
        "xtick.labelsize": 10,
        "ytick.labelsize": 10,
        "legend.fontsize": 10,
        "legend.frameon": False,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.color": PALE,
        "axes.axisbelow": True,
        "lines.linewidth": 1.8,
        "axes.edgecolor": INK,
        "axes.labelcolor": INK,
        "text.color": INK,
        "image.cmap": "gray",
        "image.interpolation": "nearest",
        "axes.prop_cycle": (cycler(color=[BLUE, ORANGE, GREEN, RED])
                            + cycler(linestyle=["-", "--", "-.", ":"])),
        "mathtext.fontset": "cm",
    })


def bare(axes):
    """An axes for a drawing or an image: no ticks, no frame, no grid."""
    axes.set_axis_off()
    axes.grid(False)
    return axes
