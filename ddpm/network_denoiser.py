"""Networks as denoisers: what a network is shown of x_t, and how its output is read (L22).

What goes in has unit variance, what comes out is read as noise, and a denoiser says the rest: E[x_0 | x_t], and where
the model has one, a variance. That is a second half of the network's own output, or comes from a head that stands on
its features.
"""

import numpy as np

from ddpm import ddpm, gddm, heads
from ddpm.covariance import var_x0
from ddpm.denoiser import Denoiser, Prediction
from ddpm.parameterization import eps_from_v, eps_from_v_derivatives, x0_from_eps
from nn.backend import array_module, per_example

# ---- at the network's doors

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

    @property
    def knows_var_x0(self):
        """Whether `predict` gives Var[x_0 | x_t]."""
        return self.model == "gddm"

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


class HeadedDenoiser(NetworkDenoiser):
    """A trained network with a head that learned the spread of its noise: the mean is the network's own (C10, C12).

    Parameters
    ----------
    network, model, schedule, prediction
        As for `NetworkDenoiser`; of a gddm or an iddpm only the mean is used.
    head : nn.Head
        On the network's features, so that the variance costs a convolution and no pass.
    kind : "sn", "npr" or "ocm"
    largest : float
        Upper end for Var[x_0 | x_t], as for data in [-1, 1]; where the noise is high an estimate is far outside.
    """

    def __init__(self, network, model, schedule, head, kind, prediction="eps", largest=1.0):
        super().__init__(network, model, schedule, prediction)
        self.head, self.kind, self.largest = head.eval(), kind, largest

    @property
    def knows_var_x0(self):
        return True

    def predict_mean(self, x_t, t, labels=None):
        """The network's own prediction, which leaves its features behind for the head."""
        return super().predict(x_t, t, labels)

    def predict(self, x_t, t, labels=None):
        """The network's prediction, with var_x0 within [0, largest] and the var_eps that belongs to it."""
        mean = self.predict_mean(x_t, t, labels)
        var_eps = heads.var_eps(self.kind, self.head(self.network.features), mean.eps, t, self.schedule)
        var = var_x0(var_eps, t, self.schedule, self.largest)
        return Prediction(mean.eps, mean.x0, var, per_example(self.schedule.snr[t], var) * var)
