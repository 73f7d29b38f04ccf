"""The three models by name: how many outputs the network has, what it is trained on, and how its output is read.

    ddpm     eps                      reverse variance fixed
    iddpm    eps, v                   reverse variance between the two fixed ones (C05)
    gddm     eps, log Var[eps]        p(x_0 | x_t) is a Gaussian, and the reverse variance follows from it (G03)

An objective is a function (output, batch, schedule, bin_width) -> (values (N,), gradient of their sum). Each model's
first one is its default.
"""

from typing import Any, NamedTuple

import numpy as np

from ddpm import ddpm, gddm, iddpm
from ddpm.denoiser import Denoiser, Prediction
from ddpm.parameterization import eps_from_v, eps_from_v_derivatives, x0_from_eps
from ddpm.randomness import generator
from ddpm.schedule import NoiseSchedule
from nn.backend import array_module, per_example
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


def build_network(config, channels, rng, *, num_classes=None):
    """The U-Net that a configuration describes, for images with `channels` channels."""
    return UNet(channels, OUTPUTS[config.model] * channels, base_channels=config.base_channels,
                channel_mults=config.channel_mults, blocks_per_level=config.blocks_per_level,
                attention_levels=config.attention_levels, heads=config.heads, groups=config.groups,
                dropout=config.dropout, num_classes=num_classes, rng=rng)


def load_denoiser(run, device="cpu"):
    """The trained model in a run folder, with averaged weights: (NetworkDenoiser, metadata of its checkpoint).

    The metadata say what the model was trained on: `image_shape` (H, W, C), `levels`, `step`, and for a conditional run
    `label_names`. UserError, in one sentence, where the checkpoint is missing, cut off or of another configuration.
    """
    arrays, metadata = run.load_checkpoint()
    num_classes = len(metadata["label_names"]) if run.config.conditional else None
    network = build_network(run.config, metadata["image_shape"][2], generator(run.config.seed, "weights"),
                            num_classes=num_classes)
    network.load({name.removeprefix("ema/"): a for name, a in arrays.items() if name.startswith("ema/")})
    config = run.config
    return NetworkDenoiser(network.to(device), config.model, build_schedule(config), config.network_predicts), metadata


# ---- at the network's doors: what goes in has unit variance, and what comes out is read as noise (L22)

def network_input(x_t, t, schedule):
    """x_t / sqrt(marginal_var_t), of unit variance for data of unit variance: x_t itself where variance preserving."""
    return x_t if schedule.is_variance_preserving else x_t / per_example(np.sqrt(schedule.marginal_var[t]), x_t)


def noise_output(output, x_t, t, schedule, prediction):
    """The network's output with its first C channels as eps, where it predicts v (see `ddpm.parameterization`).

    An error of v is at most of its own size in x_0; an error of eps grows by sigma_bar / lam_bar, which at t = T is a
    hundred and more. A network that predicts v starts from eps = sigma_bar x_t / marginal_var, right for pure noise.
    """
    if prediction == "eps":
        return output
    eps = eps_from_v(output[..., :x_t.shape[-1]], x_t, t, schedule)
    return array_module(output).concatenate([eps, output[..., x_t.shape[-1]:]], axis=-1)


def noise_output_backward(gradient, x_t, t, schedule, prediction):
    """The gradient with respect to the network's output, from that of `noise_output`, which it overwrites."""
    if prediction == "v":
        _, of_v = eps_from_v_derivatives(t, schedule)
        gradient[..., :x_t.shape[-1]] *= per_example(of_v, x_t)
    return gradient


class NetworkDenoiser(Denoiser):
    """A trained network as a denoiser; `model` says how to read its output.

    Parameters
    ----------
    network : UNet or MLP
        Called as network(network_input(x_t, t, schedule), t), with labels as a third argument where there are any;
        channels of x_t last.
    model : "ddpm", "iddpm" or "gddm"
    schedule : NoiseSchedule
    prediction : "eps" or "v"
        What the network's first output is.
    """

    def __init__(self, network, model, schedule, prediction="eps"):
        super().__init__(schedule)
        self.network, self.model, self.prediction = network.eval(), model, prediction

    def predict(self, x_t, t, labels=None):
        """Prediction for x_t at time t, an int or (N,) host integers; var_x0 for gddm, v for iddpm.

        `labels` (an int or (N,) host integers) are for networks that were trained with them; samplers and metrics,
        which know of none, are given a `ddpm.guidance.Guided` (C20).
        """
        self.evaluations += len(x_t)
        output = noise_output(self._output(x_t, t, labels), x_t, t, self.schedule, self.prediction)
        eps, head = output[..., :x_t.shape[-1]], output[..., x_t.shape[-1]:]
        if self.model == "ddpm":
            return Prediction(eps=eps, x0=x0_from_eps(eps, x_t, t, self.schedule))
        if self.model == "iddpm":
            return Prediction(eps=eps, x0=x0_from_eps(eps, x_t, t, self.schedule), v=head)
        var_eps = array_module(head).exp(gddm.log_variance(head)[0])
        mean_x0, var_x0 = gddm.noise_to_data(eps, var_eps, x_t, t, self.schedule)
        return Prediction(eps=eps, x0=mean_x0, var_x0=var_x0, var_eps=var_eps)

    def vjp(self, x_t, t, v, labels=None):
        """v times the Jacobian d eps / d x_t, by one hand-written backward pass that leaves the parameters alone."""
        self.vjps += len(x_t)
        output = self._output(x_t, t, labels)
        if self.prediction == "eps":
            return self._input_gradient(output, v, t)
        of_x, of_v = (per_example(w, x_t) for w in eps_from_v_derivatives(t, self.schedule))
        return of_x * v + self._input_gradient(output, of_v * v, t)

    def _output(self, x_t, t, labels):
        given = () if labels is None else (labels,)
        return self.network(network_input(x_t, t, self.schedule), t, *given)

    def _input_gradient(self, output, d_eps, t):
        """The gradient of x_t from that of the first channels of the last `_output`."""
        dx = self.network.backward(ddpm.output_gradient(output, d_eps=d_eps), params=False)
        return network_input(dx, t, self.schedule)                              # scaling is its own transpose
