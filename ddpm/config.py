"""The configuration of a training run: one frozen dataclass from which flags, --help and config.json all derive.

A setting is one entry of `TrainConfig`: type, default, help text, choices. Nothing about it is said twice, so flags,
help and file cannot disagree. Bad values are refused when the object is made, wherever they came from.
"""

import argparse
import dataclasses
import json
import math
from dataclasses import dataclass, field

EXAMPLE = """example, small enough for a laptop:
  python -m ddpm.train --model gddm --data digits --T 100 --steps 500 --out runs/first
larger, on a GPU:
  python -m ddpm.train --model gddm --data cifar10 --device cuda --base-channels 96 --batch-size 128 --steps 200000
a variance for a mean that is trained already:
  python -m ddpm.train --model ocm --from runs/ddpm-mnist5k-1
"""

Ints = tuple[int, ...]


def setting(default, group, help, *, choices=None, free=False):
    """A field of TrainConfig. A `free` one says how a run is carried out, not what it is: it may change on resuming."""
    return field(default=default, metadata={"group": group, "help": help, "choices": choices, "free": free})


@dataclass(frozen=True)
class TrainConfig:
    """Everything a training run depends on; ValueError, naming flag and value, for a setting that makes no sense."""

    model: str = setting("gddm", "model", "what the network says about x_0: ddpm its mean, iddpm also the reverse "
                         "variance, gddm a Gaussian p(x_0|x_t); sn, npr and ocm are small heads that learn the "
                         "variance of a network that is trained already, see --from",
                         choices=("ddpm", "iddpm", "gddm", "sn", "npr", "ocm"))
    backbone: str = setting("own", "model", "what the network below a head of sn, npr or ocm was trained as; --from "
                            "sets it", choices=("own", "ddpm", "iddpm", "gddm"))
    objective: str = setting("default", "model", "training loss, the model's first by default (gddm that predicts v: "
                             "balanced-v); ddpm: simple, vlb; iddpm: hybrid, vlb; gddm: balanced, balanced-v, kl (as "
                             "published), pairs, simple+kl")
    prediction: str = setting("default", "model", "what the network's first output is: the noise eps, or v = lam_bar "
                              "eps - sigma_bar x_0 (scaled to unit variance), from which eps follows; default: v for "
                              "gddm, eps for the others",
                              choices=("default", "eps", "v"))
    T: int = setting(1000, "model", "number of noising steps")
    schedule: str = setting("linear", "model", "how the noise grows: linear step variances, or cosine; "
                            "variance-exploding adds it to an image that is not faded; sub-vp fades as linear, with "
                            "less noise", choices=("linear", "cosine", "variance-exploding", "sub-vp"))
    conditional: bool = setting(False, "model", "tell the network the labels of the data, so that images of one class "
                                "can be asked for; bits/dim stay those of images without a label")

    data: str = setting("mnist5k", "data", "mnist5k and digits need no download; mnist, fashion-mnist, cifar10 and "
                        "svhn are looked for and else downloaded; folder:PATH takes PNG and JPEG files of one size")
    data_dir: str | None = setting(None, "data", "folder with the official files (else $DDPM_DATA, a cache, the "
                                   "network)", free=True)

    steps: int = setting(1000, "training", "optimiser steps", free=True)
    batch_size: int = setting(32, "training", "images a step")
    micro_batch: int = setting(8, "training", "images that go through the network at once; sets memory and speed, "
                               "not the result", free=True)
    lr: float = setting(1e-3, "training", "learning rate of Adam, after warm-up")
    warmup: int = setting(100, "training", "steps over which the learning rate rises from 0")
    lr_decay: str = setting("cosine", "training", "how the learning rate falls after warm-up",
                            choices=("cosine", "none"))
    ema: float = setting(0.995, "training", "decay of the moving average of the weights, which samples come from")
    clip: float = setting(1.0, "training", "largest norm of the gradient; 0 leaves it as it is")
    weight_decay: float = setting(0.0, "training", "decoupled weight decay")
    dropout: float = setting(0.0, "training", "share of features dropped in each residual block")
    label_dropout: float = setting(0.1, "training", "with --conditional, share of images whose label is left out: the "
                                   "network learns both predictions that guidance needs")
    seed: int = setting(0, "training", "all randomness is a function of seed, step and image")

    base_channels: int = setting(32, "network", "width of the U-Net at full resolution")
    channel_mults: Ints = setting((1, 2, 2), "network", "width of each level, as multiples of --base-channels")
    blocks_per_level: int = setting(1, "network", "residual blocks at each level")
    attention_levels: Ints = setting((2,), "network", "levels with self-attention, counted from 0 at full "
                                     "resolution; none for no level")
    heads: int = setting(4, "network", "attention heads")
    groups: int = setting(8, "network", "groups of GroupNorm")

    device: str = setting("cpu", "running", "where the arrays live", choices=("cpu", "cuda"), free=True)
    workers: int = setting(0, "running", "local processes that share a batch; 0 takes the cores this process may use",
                           free=True)
    save_every: int = setting(200, "running", "steps between checkpoints", free=True)
    log_every: int = setting(10, "running", "steps between lines of metrics.jsonl", free=True)
    samples: int = setting(64, "running", "images drawn for samples.png at the end; 0 for none", free=True)

    def __post_init__(self):
        for f in dataclasses.fields(self):
            object.__setattr__(self, f.name, _typed(f, getattr(self, f.name)))
        for name in ("T", "steps", "batch_size", "micro_batch", "base_channels", "blocks_per_level", "heads", "groups",
                     "save_every", "log_every"):
            self._check(name, getattr(self, name) >= 1, "at least 1")
        for name in ("warmup", "clip", "weight_decay", "seed", "workers", "samples"):
            self._check(name, getattr(self, name) >= 0, "at least 0")
        for name in ("ema", "dropout"):
            self._check(name, 0 <= getattr(self, name) < 1, "at least 0 and below 1")
        self._check("lr", self.lr > 0, "above 0")
        self._check("label_dropout", 0 < self.label_dropout < 1, "above 0 and below 1 (guidance needs both)")
        self._check("objective", self.objective, "a name")
        self._check_head()
        self._check("data", self.data, "the name of a data set")
        self._check_network()

    def _check_head(self):
        if self.model in ("sn", "npr", "ocm"):
            if self.backbone == "own":
                raise ValueError(f"--model {self.model} is a head on a trained network: name that network's run with "
                                 "--from RUN")
            self._check("objective", self.objective == "default", f"left out (the head of {self.model} has one loss)")
        else:
            self._check("backbone", self.backbone == "own", f"left out (model {self.model} trains its own network)")

    def _check_network(self):
        levels = range(len(self.channel_mults))
        self._check("base_channels", self.base_channels % 2 == 0, "even (half cosines of the time, half sines)")
        self._check("channel_mults", self.channel_mults and min(self.channel_mults) >= 1,
                    "one or more integers from 1 up")
        self._check("attention_levels", all(level in levels for level in self.attention_levels),
                    f"among the levels 0 to {levels[-1]} that --channel-mults gives")
        widths = tuple(self.base_channels * mult for mult in self.channel_mults)
        self._check("groups", all(width % self.groups == 0 for width in (self.base_channels, *widths)),
                    f"a divisor of the width of every level ({_text(widths)} channels)")
        attended = tuple(widths[i] for i in sorted({*self.attention_levels, levels[-1]}))     # the middle attends too
        self._check("heads", all(width % self.heads == 0 for width in attended),
                    f"a divisor of the widths with attention ({_text(attended)} channels)")

    def _check(self, name, holds, wish):
        if not holds:
            raise ValueError(f"{flag(name)} must be {wish}, got {_text(getattr(self, name))}")

    @property
    def network_predicts(self):
        """`prediction` with the default filled in: "eps" or "v"."""
        return ("v" if self.model == "gddm" else "eps") if self.prediction == "default" else self.prediction

    # ---- config.json

    def to_dict(self):
        """The settings as values that JSON holds (tuples become lists)."""
        return {name: list(v) if isinstance(v, tuple) else v for name, v in dataclasses.asdict(self).items()}

    def to_json(self):
        """The settings as indented JSON text; `from_json` gives the equal object back."""
        return json.dumps(self.to_dict(), indent=2) + "\n"

    @classmethod
    def from_dict(cls, settings):
        """A configuration from a dictionary; absent settings take their default, unknown ones raise ValueError."""
        if not isinstance(settings, dict):
            raise ValueError(f"a configuration must be an object of settings, got {type(settings).__name__}")
        known = [f.name for f in dataclasses.fields(cls)]
        for name in settings:
            if name not in known:
                raise ValueError(f"there is no setting {name!r}; the settings are {', '.join(known)}")
        return cls(**settings)

    @classmethod
    def from_json(cls, text):
        """A configuration from the text of a config.json; ValueError if it is no JSON or holds a bad setting."""
        try:
            settings = json.loads(text)
        except ValueError as error:
            raise ValueError(f"this is not JSON ({error})") from None
        return cls.from_dict(settings)

    def differences(self, other):
        """Names of the settings that make `self` and `other` different runs; `free` settings do not count."""
        return [f.name for f in dataclasses.fields(self)
                if not f.metadata["free"] and getattr(self, f.name) != getattr(other, f.name)]


# ---- flags

def flag(name):
    """The flag of a setting: `batch_size` -> `--batch-size`."""
    return "--" + name.replace("_", "-")


def add_flags(parser):
    """Add one flag for each setting, in groups, with its default in the help, and an example below (if none is set).

    A flag that is not given leaves no attribute in the namespace, so `given` tells what a person asked for.
    """
    groups = {}
    for f in dataclasses.fields(TrainConfig):
        title, choices = f.metadata["group"], f.metadata["choices"]
        group = groups.get(title) or groups.setdefault(title, parser.add_argument_group(title))
        default = "" if f.default is None else f" (default: {_text(f.default)})"
        metavar = None if choices else {int: "N", float: "X", Ints: "N,N"}.get(f.type, "NAME")
        parse = {int: int, float: float, Ints: _ints}.get(f.type, str)
        kind = {"action": "store_true"} if f.type is bool else {"type": parse, "choices": choices, "metavar": metavar}
        group.add_argument(flag(f.name), **kind, default=argparse.SUPPRESS,
                           help=(f.metadata["help"] + default).replace("%", "%%"))
    if parser.epilog is None:
        parser.epilog, parser.formatter_class = EXAMPLE, argparse.RawDescriptionHelpFormatter


def given(namespace):
    """The settings that were given as flags, as a dictionary."""
    return {f.name: getattr(namespace, f.name) for f in dataclasses.fields(TrainConfig) if hasattr(namespace, f.name)}


def from_flags(namespace, base=None):
    """The configuration that parsed flags ask for; what was not given comes from `base` (default: TrainConfig())."""
    return dataclasses.replace(base or TrainConfig(), **given(namespace))


def _ints(text):
    """(1, 2, 2) from "1,2,2"; () from "none"."""
    try:
        return () if text.strip() in ("", "none") else tuple(int(part) for part in text.split(","))
    except ValueError:
        wish = f"must be integers with commas between them, like 1,2,2, got {text!r}"
        raise argparse.ArgumentTypeError(wish) from None


def _text(value):
    """A value as one would type it behind its flag."""
    if isinstance(value, bool):                             # a flag that stands alone
        return "on" if value else "off"
    return (",".join(map(str, value)) or "none") if isinstance(value, tuple) else str(value)


def _typed(f, value):
    """The value in the type of its field (an int will do for a float, a list for a tuple), or ValueError."""
    whole = isinstance(value, int) and not isinstance(value, bool)
    choices = f.metadata["choices"]
    if f.type is int:
        fits, wish = whole, "an integer"
    elif f.type is bool:
        fits, wish = isinstance(value, bool), "true or false"
    elif f.type is float:
        fits, wish = (whole or isinstance(value, float)) and math.isfinite(value), "a finite number"
        value = float(value) if fits else value
    elif f.type == Ints:
        fits = isinstance(value, (list, tuple)) and all(isinstance(v, int) and not isinstance(v, bool) for v in value)
        value, wish = tuple(value) if fits else value, "integers with commas between them"
    elif choices:
        fits, wish = value in choices, f"one of {', '.join(choices)}"
    else:
        fits, wish = isinstance(value, str) or (value is None and f.default is None), "text"
    if not fits:
        raise ValueError(f"{flag(f.name)} must be {wish}, got {value!r}")
    return value
