"""The models by name: how many outputs the network has, what it is trained on, and the way back from a run folder.

    ddpm     eps                      reverse variance fixed
    iddpm    eps, v                   reverse variance between the two fixed ones (C05)
    gddm     eps, log Var[eps]        p(x_0 | x_t) is a Gaussian, and the reverse variance follows from it (G03)
    sn, npr, ocm                      a trained network of the above, held fixed, and a head that learns its Var[eps]
                                      (C10, C12): see `ddpm.heads`

An objective is a function (output, batch, schedule, bin_width) -> (values (N,), gradient of their sum). Each model's
first one is its default.
"""

from typing import Any, NamedTuple

from ddpm import ddpm, gddm, iddpm
from ddpm.heads import HEADS
from ddpm.network_denoiser import HeadedDenoiser, NetworkDenoiser
from ddpm.parameterization import eps_from_v_derivatives
from ddpm.randomness import generator
from ddpm.schedule import NoiseSchedule
from nn.backend import per_example
from nn.head import Head
from nn.unet import UNet


class Batch(NamedTuple):
    """What a loss may look at: data, noise, and x_t between them at time t; s is a uniform time before t."""

    x0: Any
    eps: Any
    x_t: Any
    t: Any
    s: Any


def _objective(loss, **options):
    def evaluate(output, batch, schedule, bin_width):
        return loss(output, batch.x0, batch.eps, batch.x_t, batch.t, schedule, bin_width=bin_width, **options)
    return evaluate


def _weighted_sum(*terms):
    """The objective sum of weight * objective over (weight, objective) pairs."""
    def evaluate(output, batch, schedule, bin_width):
        parts = [(weight, *objective(output, batch, schedule, bin_width)) for weight, objective in terms]
        return sum(w * values for w, values, _ in parts), sum(w * gradient for w, _, gradient in parts)
    return evaluate


def _pairs(stop_mean_gradient):
    """GDDM's KL of the pair (s, t) for a uniform s < t: the long steps in which the variance shows."""
    def evaluate(output, batch, schedule, bin_width):
        return gddm.kl_loss(output, batch.x0, batch.eps, batch.x_t, batch.t, schedule, bin_width=bin_width, s=batch.s,
                            stop_mean_gradient=stop_mean_gradient)
    return evaluate


def _simple_in_v(output, batch, schedule, bin_width):
    """Mean over dimensions of (v - v_hat)^2: the squared error of eps divided by (d eps/d v)^2 at each t (L22)."""
    values, gradient = SIMPLE(output, batch, schedule, bin_width)
    weight = eps_from_v_derivatives(batch.t, schedule)[1]**-2
    return per_example(weight, values) * values, per_example(weight, gradient) * gradient


SIMPLE = _objective(ddpm.simple_loss)
KL = _objective(gddm.kl_loss)
PAIRS, PAIRS_OF_VARIANCE = _pairs(stop_mean_gradient=False), _pairs(stop_mean_gradient=True)

OBJECTIVES = {
    "ddpm": {"simple": SIMPLE, "vlb": _objective(ddpm.vlb_loss)},
    "iddpm": {"hybrid": _objective(iddpm.hybrid_loss), "vlb": _objective(iddpm.vlb_loss)},
    "gddm": {
        # The squared error trains the mean at every t; a little of the bound makes it exact where the noise is low, and
        # the variance right there; random pairs do the same for the variance at high noise, which a single
        # step hardly depends on (G05: c^2/var is 0.01 there). results/README.md has the table that chose it.
        "balanced": _weighted_sum((1, SIMPLE), (0.003, KL), (0.0003, PAIRS_OF_VARIANCE)),
        # The same with the squared error of v, which asks more of the mean at high noise, where shapes are decided: for
        # networks that predict v.
        "balanced-v": _weighted_sum((1, _simple_in_v), (0.003, KL), (0.0003, PAIRS_OF_VARIANCE)),
        "kl": KL,
        "pairs": PAIRS,
        "simple+kl": _weighted_sum((1, SIMPLE), (0.01, KL)),
    },
}
OUTPUTS = {"ddpm": 1, "iddpm": 2, "gddm": 2}

SCHEDULES = {"linear": NoiseSchedule.linear, "cosine": NoiseSchedule.cosine,
             "variance-exploding": NoiseSchedule.variance_exploding, "sub-vp": NoiseSchedule.sub_variance_preserving}


def default_variance(model):
    """The reverse variance that a model samples and is evaluated with: "small" for ddpm, else its own."""
    return "small" if model == "ddpm" else "learned"


def find_objective(model, name="default", prediction="eps"):
    """The objective `name` of `model`; ValueError that lists the names for another.

    "default" is the model's first, and "balanced-v" for a gddm whose network predicts v.
    """
    objectives = OBJECTIVES[model]
    if name == "default":
        return objectives["balanced-v"] if (model, prediction) == ("gddm", "v") else next(iter(objectives.values()))
    if name not in objectives:
        raise ValueError(f"--objective of model {model} must be one of {', '.join(objectives)}, got {name!r}")
    return objectives[name]


def build_schedule(config):
    """The noise schedule that a configuration names."""
    return SCHEDULES[config.schedule](config.T)


def build_network(config, channels, *, num_classes=None):
    """The U-Net that a configuration describes, for images with `channels` channels; of a head's run, the backbone."""
    model = config.model if config.backbone == "own" else config.backbone
    return UNet(channels, OUTPUTS[model] * channels, base_channels=config.base_channels,
                channel_mults=config.channel_mults, blocks_per_level=config.blocks_per_level,
                attention_levels=config.attention_levels, heads=config.heads, groups=config.groups,
                dropout=config.dropout, num_classes=num_classes, rng=generator(config.seed, "weights"))


def build_head(config, channels):
    """The head that a configuration of sn, npr or ocm describes, for images with `channels` channels."""
    return Head(config.base_channels * config.channel_mults[0], channels, groups=config.groups,
                rng=generator(config.seed, "head"))


def build_denoiser(config, network, head=None):
    """A network, and for sn, npr and ocm a head, as the denoiser that a configuration describes."""
    schedule, prediction = build_schedule(config), config.network_predicts
    if head is None:
        return NetworkDenoiser(network, config.model, schedule, prediction)
    return HeadedDenoiser(network, config.backbone, schedule, head, config.model, prediction)


def load_denoiser(run, device="cpu"):
    """The trained model in a run folder, with averaged weights: (NetworkDenoiser, metadata of its checkpoint).

    The metadata say what the model was trained on: `image_shape` (H, W, C), `levels`, `step`, and for a conditional run
    `label_names`. UserError, in one sentence, where the checkpoint is missing, cut off or of another configuration.
    """
    arrays, metadata = run.load_checkpoint()
    config, channels = run.config, metadata["image_shape"][2]
    network = build_network(config, channels, num_classes=len(metadata["label_names"]) if config.conditional else None)
    if config.model not in HEADS:
        network.load(arrays_below("ema/", arrays))
        return build_denoiser(config, network.to(device)), metadata
    network.load(arrays_below("backbone/", arrays))
    head = build_head(config, channels)
    head.load(arrays_below("ema/", arrays))
    return build_denoiser(config, network.to(device), head.to(device)), metadata


def arrays_below(prefix, arrays):
    """The arrays whose names start with the prefix, without it."""
    return {name.removeprefix(prefix): a for name, a in arrays.items() if name.startswith(prefix)}
