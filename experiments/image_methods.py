"""Reverse variances on images, by name: whose network each runs, and a bench that trains, draws and remembers.

`few_steps` and `guidance` measure the same models. Training a case, drawing images and taking their features is done
once, in folders below --runs, and whatever is there already is read back. Their tables grow by rows and their pictures
have a line for each method.
"""

import dataclasses
from functools import cached_property
from pathlib import Path

import numpy as np

from ddpm import data, plots
from ddpm.generate import draw_images
from ddpm.metrics.features import image_features, load_classifier, moments
from ddpm.models import load_denoiser
from ddpm.parallel import make_group
from ddpm.runs import write_atomically
from ddpm.variance import default_decoder, prepare_variance
from experiments.tables import read_csv, write_csv, write_text
from experiments.training_runs import trained

NETWORK = "--base-channels 16 --conditional --steps 3000 --batch-size 32 --micro-batch 16 --save-every 500".split()
HEAD = "--steps 1500 --batch-size 32 --micro-batch 16 --lr 2e-3 --save-every 500".split()
REAL = 10_000


@dataclasses.dataclass(frozen=True)
class Method:
    """A chain: whose network it runs, by which sampler and with which variance; and the look of its line."""

    model: str
    variance: str | None
    color: str
    line: str = "-"
    marker: str = "o"
    sampler: str = "ddpm"
    published: int | None = None


GREY, BLUE, ORANGE, GREEN, RED = "#8c8c8c", "#0b3c6f", "#e08a1e", "#4f9d69", "#b3242b"
METHODS = {
    "large": Method("ddpm", "large", GREY, "-", "v", published=90),
    "small": Method("ddpm", "small", GREY, "--", "^"),
    "ddim": Method("ddpm", None, ORANGE, ":", "P", "ddim", published=30),
    "iddpm": Method("iddpm", "learned", ORANGE, "--", "X", published=45),
    "analytic": Method("ddpm", "analytic", BLUE, ":", "s", published=25),
    "residual": Method("ddpm", "residual", BLUE, "-", "s"),
    "sn": Method("sn", "learned", GREEN, "--", "D", published=17),
    "npr": Method("npr", "learned", GREEN, "-", "o", published=23),
    "ocm": Method("ocm", "learned", RED, "-", "x", published=16),
    "gddm": Method("gddm", "learned", RED, "--", "*"),
    "hutchinson": Method("ddpm", "hutchinson", GREEN, ":", "d"),
}


def add_flags(parser, images):
    """The flags that say which models and how many images; see `Bench`."""
    parser.add_argument("--data", default="mnist", help="mnist, fashion-mnist or cifar10 (default: mnist)")
    parser.add_argument("--data-dir", metavar="DIR", help="folder with the data's official files")
    parser.add_argument("--images", type=int, default=images, metavar="N", help=f"samples of each case (default: "
                        f"{images})")
    parser.add_argument("--seed", type=int, default=0, help="of training and of all noise (default: 0)")
    parser.add_argument("--runs", default="runs/few-steps", help="where runs and features live (default: "
                        "runs/few-steps)")
    parser.add_argument("--out", default="results", help="where the table and the picture go (default: results)")


class Bench:
    """The data set, its classifier, and the models of one seed, each made ready when it is first asked for."""

    def __init__(self, flags):
        self.flags, self.runs, self.prepared = flags, Path(flags.runs), {}
        self.dataset = data.load(flags.data, flags.data_dir)
        self.classifier, _ = load_classifier(flags.data)

    @cached_property
    def real(self):
        """(mean, covariance) of the features of training images."""
        return moments(image_features(self.classifier, self.dataset.train_images[:REAL]))

    def run(self, model):
        """The trained run of a model: of a head, on the ddpm's network."""
        where = ["--model", model, "--seed", str(self.flags.seed)]
        own = [*where, "--data", self.flags.data, *NETWORK]
        if model in ("sn", "npr", "ocm"):
            own = [*where, "--from", str(self.run("ddpm").path), *HEAD]
        places = ["--data-dir", self.flags.data_dir] if self.flags.data_dir else []
        return trained(self.runs / f"{self.flags.data}-{model}-{self.flags.seed}", own + places)

    def prepare(self, name):
        """(denoiser, variance, decoder) of a method; the variance is None for a sampler that draws no noise."""
        if name not in self.prepared:
            method = METHODS[name]
            run = self.run(method.model)
            denoiser, _ = load_denoiser(run)
            variance = method.variance and prepare_variance(method.variance, run, denoiser, lambda: self.dataset,
                                                            make_group)
            self.prepared[name] = denoiser, variance, default_decoder(run.config, method.variance)
        return self.prepared[name]

    def features(self, name, steps, labels=None, guidance_scale=None):
        """Features of the first images of a method, (images, F): kept ones, and those that are missing, drawn now.

        With a `guidance_scale`, image i is asked to be of the class labels[i].
        """
        guided = "" if guidance_scale is None else f"-scale-{guidance_scale:g}"
        path = self.runs / "features" / f"{self.flags.data}-{self.flags.seed}-{name}-{steps}{guided}.npy"
        kept = np.load(path) if path.exists() else np.empty((0, len(self.real[0])))
        if len(kept) < self.flags.images:
            denoiser, variance, _ = self.prepare(name)
            asked = {} if labels is None else {"labels": labels[len(kept):], "guidance_scale": guidance_scale}
            images = draw_images(denoiser, denoiser.schedule, self.dataset.image_shape, self.flags.images - len(kept),
                                 make_group(), first=len(kept), steps=steps, variance=variance, seed=self.flags.seed,
                                 sampler=METHODS[name].sampler, **asked)
            kept = np.concatenate([kept, image_features(self.classifier, images)])
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, lambda file: np.save(file, kept))
        return kept[:self.flags.images]

    def classes(self, features):
        """What the classifier takes images with these features for, (N,)."""
        return self.classifier.head(features.astype(np.float32)).argmax(axis=1)


# ---- tables that grow, and their pictures

def update_table(path, new, key, report, picture):
    """Bring path.csv up to date with new rows, those of the same `key` replaced, and path.md and path.png with it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = {tuple(row[name] for name in key): row for row in [*read_csv(path.with_suffix(".csv")), *new]}

    def place(row):
        return [list(METHODS).index(row[name]) if name == "method" else row[name] for name in key]
    rows = sorted(rows.values(), key=place)
    write_csv(path.with_suffix(".csv"), rows)
    write_text(path.with_suffix(".md"), report(rows))
    plots.save(picture(rows), path.with_suffix(".png"))


def methods_plot(rows, x, measures, xlabel, xscale="linear", xticks=None):
    """A column for each data set, a row for each measure (value, error, label, yscale), a line for each method."""
    names = list(dict.fromkeys(row["data"] for row in rows))
    fig, axes = plots.figure(len(measures), len(names), figsize=(1 + 5 * len(names), 3.6 * len(measures)),
                             squeeze=False)
    for column, name in zip(axes.T, names, strict=True):
        for ax, (value, error, label, yscale) in zip(column, measures, strict=True):
            for method, look in METHODS.items():
                points = sorted((row[x], row[value], row[error]) for row in rows
                                if (row["data"], row["method"]) == (name, method) and value in row)
                if points:
                    ax.errorbar(*zip(*points, strict=True), color=look.color, ls=look.line, marker=look.marker, ms=4,
                                lw=1.2, elinewidth=0.8, label=method)
            ax.set(xscale=xscale, yscale=yscale, xlabel=xlabel, ylabel=label)
            if xticks:
                ax.set_xticks(xticks, [str(tick) for tick in xticks])
            if yscale == "log":
                low, high = ax.get_ylim()
                ticks = [digit * 10**power for power in range(-2, 4) for digit in (1, 2, 5)]
                ax.set_yticks([tick for tick in ticks if low <= tick <= high])
                ax.yaxis.set_major_formatter("{x:g}")
            ax.minorticks_off()
        column[0].set(title=name)
    shown = {label: handle for ax in axes.flat for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    fig.legend(shown.values(), shown, loc="outside lower center", ncols=5)
    return fig
