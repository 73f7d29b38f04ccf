"""Pictures of runs: image grids, training curves, bits per time, and uncertainty along a trajectory.

Each function draws one figure and returns it; `save` writes it whole or not at all.
"""

import io

import numpy as np

from ddpm.runs import write_atomically

STYLE = {"figure.dpi": 120, "savefig.bbox": "tight", "axes.spines.top": False, "axes.spines.right": False,
         "axes.grid": True, "grid.alpha": 0.25, "font.size": 10, "image.cmap": "gray"}


def figure(*args, **kwargs):
    """(fig, axes) in the project's style, without a window."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    with matplotlib.rc_context(STYLE):
        fig = Figure(figsize=kwargs.pop("figsize", None), layout="constrained")
        FigureCanvasAgg(fig)
        return fig, fig.subplots(*args, **kwargs)


def save(fig, path):
    """Write a figure as PNG, atomically."""
    buffer = io.BytesIO()
    fig.savefig(buffer, format="png", dpi=STYLE["figure.dpi"])
    write_atomically(path, lambda file: file.write(buffer.getvalue()))


def tile(images, columns=None, gap=2):
    """Images (N, H, W, C) in [-1, 1] side by side in one array (rows, columns, 3) in [0, 1], white between them."""
    n, H, W, C = images.shape
    columns = columns or int(np.ceil(np.sqrt(n)))
    rows = -(-n // columns)
    page = np.ones((rows * (H + gap) - gap, columns * (W + gap) - gap, 3))
    for i, image in enumerate(np.clip((images + 1) / 2, 0, 1)):
        y, x = (H + gap) * (i // columns), (W + gap) * (i % columns)
        page[y:y + H, x:x + W] = image if C == 3 else image[..., :1]
    return page


def sample_grid(images, columns=None):
    """The images alone, large enough to be read."""
    page = tile(images, columns)
    fig, axes = figure(figsize=(page.shape[1] / 40, page.shape[0] / 40))
    axes.imshow(page, interpolation="nearest")
    axes.set_axis_off()
    return fig


def training_curves(metrics, title):
    """Loss and gradient norm against the step, raw and smoothed."""
    fig, axes = figure(1, 2, figsize=(9, 3.2))
    step = np.array([row["step"] for row in metrics])
    for ax, name, label in zip(axes, ("loss", "grad_norm"), ("training loss", "gradient norm"), strict=True):
        values = np.array([row.get(name, np.nan) for row in metrics], dtype=float)
        ax.plot(step, values, color="0.75", linewidth=1)
        window = max(1, len(values) // 20)
        smooth = np.convolve(values, np.ones(window) / window, mode="valid")
        ax.plot(step[window - 1:], smooth, color="black")
        ax.set(xlabel="step", ylabel=label)
    fig.suptitle(title)
    return fig


def bits_curve(bits):
    """Where the bits of an image go: the density over t of the steps' part, and the three parts."""
    fig, (left, right) = figure(1, 2, figsize=(9, 3.2), width_ratios=(2, 1))
    widths = np.diff(bits.edges)
    per_time = bits.steps / widths[:, None]
    mean, error = per_time.mean(axis=1), per_time.std(axis=1) / np.sqrt(per_time.shape[1])
    middle = np.sqrt(bits.times[bits.edges[:-1]] * bits.times[bits.edges[1:] - 1])
    left.plot(middle, mean, color="black", drawstyle="steps-mid")
    left.fill_between(middle, mean - 2 * error, mean + 2 * error, color="0.8", step="mid")
    left.set(xscale="log", yscale="log", xlabel="t", ylabel="bits/dim per step")
    parts = bits.summary()
    names = ("prior", "steps", "decoder")
    right.bar(names, [parts[name] for name in names], color=("0.8", "0.5", "0.2"))
    right.set(ylabel="bits/dim", title=f"{parts['bits_per_dim']:.3f} ± {parts['standard_error']:.3f} bits/dim")
    return fig


def uncertainty_along(times, x_t, mean_x0, std_x0):
    """For each image three rows against time: x_t, the predicted clean image, and how uncertain each pixel of it is."""
    show, num = x_t.shape[:2]
    fig, axes = figure(3 * num, show, figsize=(1.05 * show, 3.3 * num), squeeze=False)
    for i in range(num):
        for j in range(show):
            shown = (np.clip((x_t[j, i] + 1) / 2, 0, 1), np.clip((mean_x0[j, i] + 1) / 2, 0, 1))
            for row, image in enumerate(shown):
                pixels = image if image.shape[-1] == 3 else image[..., 0]
                axes[3 * i + row, j].imshow(pixels, cmap="gray", vmin=0, vmax=1)
            map_ = axes[3 * i + 2, j].imshow(std_x0[j, i].mean(axis=-1), cmap="magma", vmin=0, vmax=1)
            axes[3 * i, j].set_title(f"t={times[j]}", fontsize=9)
        for row, label in enumerate(("$x_t$", "$E[x_0|x_t]$", "std of $x_0|x_t$")):
            axes[3 * i + row, 0].set_ylabel(label, fontsize=8)
    for ax in axes.flat:
        ax.set(xticks=[], yticks=[])
        ax.grid(False)
        for spine in ax.spines.values():
            spine.set_visible(False)
    fig.colorbar(map_, ax=axes[2::3], shrink=0.8, label="std, pixel scale [-1, 1]")
    return fig
