"""The covariance of a reverse step by name: var I + a^2 Cov[x_0 | x_t] from any source, for any step (G03, C15, C16).

`METHODS` has the names, each with what it needs and what it costs, in network passes for each image and step beyond
the one that gives the mean (a vjp is two: a forward pass, and the backward pass through it):

    large, small           the two that depend on the times only (C04)                                    0
    learned                the model's own: a GDDM's Var[x_0 | x_t] (G03), or an I-DDPM's v (C05)          0
    analytic, residual     a number for each t, from statistics of the data (C06, C09)                     0
    sn, npr, ocm           a head of the network that was trained for it (C10, C12)                        the head's
    hutchinson             M random probes (C11)                                                           2 M
    diagonal, full         the exact derivative of the predicted noise (C08)                               2 D

"large" and an I-DDPM's v are variances of the chain's own step x_s | x_t, not of x_0. All the others go with every
member of the family that keeps the marginals (`ddpm.posterior.marginal_preserving`): with the exact covariance each
step then has the mean and covariance of x_s | x_t, even one that without it draws no noise.
"""

from typing import NamedTuple

from ddpm.covariance import shapes, sources
from ddpm.covariance.jacobian import FULL_LIMIT
from ddpm.ddpm import fixed_variance
from ddpm.iddpm import reverse_log_variance
from nn.backend import array_module, per_example


class ReverseCovariance:
    """var I + a^2 Cov[x_0 | x_t], a function (denoiser, prediction, x_t, s, t, schedule) -> number, diagonal, matrix.

    Parameters
    ----------
    source : function (denoiser, prediction, x_t, t) -> Cov[x_0 | x_t]
        See `ddpm.covariance.sources`.
    largest : float or None
        Upper end for the variances of x_0, ((high - low) / 2)^2 for data in [low, high]: 1 for images. Of a matrix the
        eigenvalues are held below D times that: it is coordinates that are bounded. The lower end is 0 always.
    average : bool
        Replace the diagonal by its mean over coordinates, a number for each x_t.
    """

    def __init__(self, source, *, largest=None, average=False):
        if largest is not None and not largest > 0:
            raise ValueError(f"largest must be above 0, or None for no upper end, got {largest}")
        self.source, self.largest, self.average = source, largest, average

    def of_x0(self, denoiser, prediction, x_t, t):
        """Cov[x_0 | x_t], clipped."""
        cov = self.source(denoiser, prediction, x_t, t)
        if self.average:
            cov = shapes.isotropic(cov, x_t)
        full = shapes.is_full(cov, x_t)
        return shapes.clip(cov, 0, self.largest and self.largest * (cov.shape[-1] if full else 1), x_t)

    def __call__(self, denoiser, prediction, x_t, s, t, schedule, posterior=None):
        """The covariance of x_s | x_t; `posterior` is a member of the family, the chain's own unless given."""
        posterior = schedule.posterior(s, t) if posterior is None else posterior
        return shapes.step_covariance(posterior, self.of_x0(denoiser, prediction, x_t, t), x_t)

    def with_rng(self, rng):
        """The same, drawing from `rng` where it draws at all: those who know which samples x_t are give their own."""
        return self


class ProbedCovariance(ReverseCovariance):
    """From Hutchinson's random probes, whose signs come from `rng` (C11)."""

    def __init__(self, probes, rng, **clipping):
        super().__init__(sources.probes(probes, rng), **clipping)
        self.probes = probes

    def with_rng(self, rng):
        return ProbedCovariance(self.probes, rng, largest=self.largest, average=self.average)


class FixedVariance(ReverseCovariance):
    """The variances that depend on the times only, "large" or "small" (C04), with their rule at s = 0."""

    def __init__(self, kind):
        super().__init__(sources.zero)
        self.kind = kind

    def __call__(self, denoiser, prediction, x_t, s, t, schedule, posterior=None):
        if posterior is None:
            return per_example(fixed_variance(self.kind, s, t, schedule), x_t)
        if self.kind == "large":
            raise ValueError('variance "large" belongs to DDPM\'s own step: choose one that is a covariance of x_0')
        return per_example(posterior.var, x_t)


class LearnedVariance(ReverseCovariance):
    """The model's own: from var_x0 (G03), or for a model without from v, which is a variance of the step (C05)."""

    def __init__(self, **clipping):
        super().__init__(sources.own, **clipping)

    def __call__(self, denoiser, prediction, x_t, s, t, schedule, posterior=None):
        if prediction.var_x0 is not None or prediction.v is None:
            return super().__call__(denoiser, prediction, x_t, s, t, schedule, posterior)
        if posterior is not None:
            raise ValueError("an I-DDPM's variance belongs to DDPM's own step: choose one that is a covariance of x_0")
        return array_module(x_t).exp(reverse_log_variance(prediction.v, s, t, schedule))


def learned_variance(prediction, x_t, s, t, schedule):
    """The model's own variance of x_s | x_t: from var_x0 (G03) or from v (C05). ValueError where it has neither."""
    return LearnedVariance()(None, prediction, x_t, s, t, schedule)


# ---- by name

class Method(NamedTuple):
    """What a method is, in a line, and the option of `reverse_covariance` that it can't do without, or None."""

    says: str
    needs: str | None = None


METHODS = {
    "large": Method("the variance of the noising step itself, for every pixel"),
    "small": Method("the posterior's, as if the image were known, for every pixel"),
    "learned": Method("the model's own, each pixel (gddm, iddpm)"),
    "analytic": Method("one number for each t, from the size of the predicted noise", "statistics"),
    "residual": Method("one number for each t, from the error of the predicted noise", "statistics"),
    "hutchinson": Method("each pixel, from random probes of two passes each", "rng"),
    "diagonal": Method("each pixel, exact, in two passes for each"),
    "full": Method("all pairs of pixels, exact, in two passes for each pixel"),
    "sn": Method("each pixel, from a head that learned the squared noise", "head"),
    "npr": Method("each pixel, from a head that learned the squared residual", "head"),
    "ocm": Method("each pixel, from a head that learned the diagonal", "head"),
}

NEEDS = {"statistics": "statistics of the data under this model: pass statistics=noise_statistics(...)",
         "head": "a head of the network that was trained for it: pass head=, a function (x_t, t)",
         "rng": "a generator for its probes: pass rng="}


def reverse_covariance(name, *, statistics=None, head=None, rng=None, probes=1, limit=FULL_LIMIT, largest=None,
                       average=False):
    """The ReverseCovariance of that name in `METHODS`, from what it needs.

    Parameters
    ----------
    statistics : NoiseStatistics, for "analytic" and "residual"
    head : function (x_t, t) -> array shaped as x_t, for "sn", "npr" and "ocm"
    rng, probes : generator and int >= 1, for "hutchinson"
    limit : int, for "full"
        Coordinates up to which matrices are made.
    largest, average
        See `ReverseCovariance`; of "large", "small" and an I-DDPM's v nothing is clipped or averaged.

    ValueError for another name, and where a method lacks what it needs.
    """
    if name not in METHODS:
        raise ValueError(f"variance must be one of {', '.join(METHODS)}, not {name!r}")
    needs = METHODS[name].needs
    if needs and {"statistics": statistics, "head": head, "rng": rng}[needs] is None:
        raise ValueError(f'variance "{name}" needs {NEEDS[needs]}')
    if name in ("large", "small"):
        return FixedVariance(name)
    if name == "learned":
        return LearnedVariance(largest=largest, average=average)
    if name == "hutchinson":
        return ProbedCovariance(probes, rng, largest=largest, average=average)
    source = {"analytic": lambda: sources.score_form(statistics),
              "residual": lambda: sources.residual_form(statistics),
              "diagonal": lambda: sources.exact_diagonal,
              "full": lambda: sources.exact_full(limit),
              "sn": lambda: sources.squared_noise_head(head),
              "npr": lambda: sources.residual_head(head),
              "ocm": lambda: sources.ocm_head(head)}[name]()
    return ReverseCovariance(source, largest=largest, average=average)


def as_reverse_covariance(variance):
    """`variance` itself where it is a ReverseCovariance, or the one of that name; ValueError for anything else."""
    return variance if isinstance(variance, ReverseCovariance) else reverse_covariance(variance)
