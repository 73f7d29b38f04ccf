"""Training a head on a network that is held fixed: the step is a Trainer's, only the loss is another (C10, C12).

A run of sn, npr or ocm starts from the run of a network, and keeps a copy of that network's averaged weights in its
checkpoints, so that it stays whole whatever becomes of the other. The network is shown the noisy images without
dropout, as it is when it predicts, and none of the head's gradient goes back into it.
"""

import dataclasses

from ddpm import heads
from ddpm.config import TrainConfig, flag
from ddpm.covariance import ocm
from ddpm.errors import UserError
from ddpm.models import arrays_below, build_denoiser, build_head, build_network
from ddpm.training import Trainer

OWN_GROUPS = ("training", "running")
"""Groups of settings that a head's run has of its own; the others come with the network. (And its model's name.)"""


def head_config(base, base_path, given):
    """The configuration of a head on the network of a run: the network's settings, and the flags `given` as a dict.

    UserError for a model that is no head, for a network that is a head's itself, and for flags that speak of what comes
    with the network.
    """
    kind = given.get("model")
    if kind not in heads.HEADS:
        raise UserError(f"--from goes with --model {', '.join(heads.HEADS)}, the heads that stand on a trained "
                        "network; other models train their own")
    if base.model in heads.HEADS:
        raise UserError(f"{base_path} is a head's run itself (model {base.model}); name the run of a network, ddpm, "
                        "iddpm or gddm, with --from")
    own = {f.name for f in dataclasses.fields(TrainConfig) if f.metadata["group"] in OWN_GROUPS}
    for name in given.keys() - own - {"model", "data_dir"}:
        raise UserError(f"{flag(name)} comes with the network of {base_path} (there it is {getattr(base, name)}); "
                        "leave it out")
    settings = {name: value for name, value in base.to_dict().items() if name not in own}
    return TrainConfig(**settings | {"prediction": base.network_predicts, "objective": "default",
                                     "backbone": base.model} | given)


def backbone_of(run):
    """The averaged weights of a run's network, arrays by name: what a head stands on."""
    arrays, _ = run.load_checkpoint()
    return arrays_below("ema/", arrays)


class HeadTrainer(Trainer):
    """Head, optimiser and average of one run, on a network whose weights are `backbone`, arrays by name."""

    def __init__(self, config, dataset, group, backbone):
        self.backbone = backbone
        super().__init__(config, dataset, group)

    def _build(self):
        config, channels = self.config, self.dataset.image_shape[2]
        network = build_network(config, channels, num_classes=len(self.label_names or ()) or None)
        network.load(self.backbone)
        head = build_head(config, channels)
        self.denoiser = build_denoiser(config, network.to(config.device), head)
        return head

    def _loss(self, number, batch, labels, positions):
        """The head's loss at one batch; of ocm, on one probe for each image."""
        kind, denoiser, eps_hat, targets = self.config.model, self.denoiser, None, None
        if kind == "ocm":                                       # a vjp is a forward pass too, and leaves the features
            def vjp(x_t, t, v):
                return denoiser.vjp(x_t, t, v, labels)
            rng = self._streams(number, positions, "probes")
            targets = ocm.draw_targets(vjp, batch.x_t, batch.t, 1, rng, self.schedule)
        else:
            eps_hat = denoiser.predict_mean(batch.x_t, batch.t, labels).eps
        raw = self.network(denoiser.network.features)
        values, gradient = heads.loss(kind, raw, batch.eps, eps_hat, batch.t, self.schedule, targets)
        return values, gradient, self.network.backward

    def state(self):
        """As a Trainer's, and the network that the head stands on."""
        arrays, counters = super().state()
        return arrays | {f"backbone/{name}": a for name, a in self.denoiser.network.parameters().items()}, counters
