"""Train the classifier whose features samples are judged in: python -m experiments.classifier --data mnist

Adam on the training images, each moved by up to two pixels at every draw, for a few epochs; then its accuracy on the
test images. Writes ddpm/metrics/weights/DATA.safetensors, with the accuracy, the seed and this command in the file.
"""

import math

import numpy as np

import nn
from ddpm import data
from ddpm.commands import CommandParser, progress_bar, run_command
from ddpm.metrics.features import WEIGHTS
from ddpm.randomness import generator

WIDTHS, GROUPS = (32, 64, 64), 8


def main(argv=None):
    """Train, measure, write."""
    p = CommandParser(prog="python -m experiments.classifier", description=__doc__)
    p.add_argument("--data", default="mnist", help="mnist, fashion-mnist or cifar10 (default: mnist)")
    p.add_argument("--data-dir", metavar="DIR", help="folder with the data's official files")
    p.add_argument("--called", metavar="NAME", help="what the data are really, where not what their files' names say")
    p.add_argument("--epochs", type=int, default=3)
    p.add_argument("--batch-size", type=int, default=64)
    p.add_argument("--lr", type=float, default=2e-3)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--out", help="file to write (default: ddpm/metrics/weights/DATA.safetensors)")
    flags = p.parse_args(argv)
    dataset = data.load(flags.data, flags.data_dir)
    net = train(dataset, flags)
    accuracy = (predictions(net, dataset.test_images) == dataset.test_labels).mean()
    error = math.sqrt(accuracy * (1 - accuracy) / len(dataset.test_labels))
    out = flags.out or WEIGHTS / f"{flags.data}.safetensors"
    WEIGHTS.mkdir(exist_ok=True)
    nn.save(out, net.parameters(), {
        "data": flags.called or flags.data, "channels": dataset.image_shape[2], "widths": WIDTHS, "groups": GROUPS,
        "classes": len(dataset.label_names), "accuracy": float(accuracy), "standard_error": error,
        "command": f"python -m experiments.classifier --data {flags.data} --epochs {flags.epochs} --batch-size "
                   f"{flags.batch_size} --lr {flags.lr:g} --seed {flags.seed}"})
    print(f"{net.num_parameters:,} parameters, test accuracy {accuracy:.4f} ± {error:.4f} "
          f"({len(dataset.test_labels):,} images); written to {out}")
    return 0


def train(dataset, flags):
    """A Classifier after `epochs` passes over the training images, the step falling to 0 along half a cosine."""
    images, labels = dataset.train_images, dataset.train_labels
    net = nn.Classifier(dataset.image_shape[2], len(dataset.label_names), widths=WIDTHS, groups=GROUPS,
                        rng=generator(flags.seed, "weights"))
    adam, steps = nn.Adam(net, flags.lr), flags.epochs * (len(images) // flags.batch_size)
    with progress_bar(steps, "classifier", "step") as bar:
        for step in range(steps):
            rng = generator(flags.seed, "batch", step)
            rows = rng.integers(0, len(images), flags.batch_size)
            logits = net(dataset.scale(moved(images[rows], rng)))
            values, gradient = nn.softmax_cross_entropy(logits, labels[rows])
            net.zero_grad()
            net.backward(gradient / np.float32(flags.batch_size))
            nn.clip_grad_norm(net, 1.0)
            adam.lr = flags.lr * 0.5 * (1 + math.cos(math.pi * step / steps))
            adam.step()
            bar.set_postfix_str(f"loss {values.mean():.3f}", refresh=False)
            bar.update()
    return net.eval()


def moved(images, rng, by=2):
    """Images moved by up to `by` pixels either way; what comes in is the nearest edge."""
    N, H, W, _ = images.shape
    padded = np.pad(images, ((0, 0), (by, by), (by, by), (0, 0)), mode="edge")
    top, left = rng.integers(0, 2 * by + 1, (2, N, 1))
    rows, columns = top + np.arange(H), left + np.arange(W)
    return padded[np.arange(N)[:, None, None], rows[:, :, None], columns[:, None, :]]


def predictions(net, images, chunk=500):
    """The likeliest class of each image."""
    return np.concatenate([net(data.scale(images[i:i + chunk])).argmax(axis=1) for i in range(0, len(images), chunk)])


if __name__ == "__main__":
    run_command(main)
