"""The experiments on images: how the least number of steps is read off, and tables that grow by rows."""

import numpy as np

from experiments import few_steps, guidance
from experiments.image_methods import METHODS, update_table
from experiments.tables import read_csv


def curve(distances, error=0.0):
    return [{"steps": steps, "frechet": d, "frechet_error": error}
            for steps, d in zip(few_steps.STEPS, distances, strict=True)]


FALLING = [50.0, 20.0, 12.0, 11.0, 10.6, 10.4, 10.2, 10.0, 10.0, 10.0, 10.0, 10.0]


def test_C19_the_least_steps_within_five_percent():
    assert few_steps.least_steps(curve(FALLING), 10.0, 0.0) == 30
    assert few_steps.least_steps(curve(FALLING), 8.0, 0.0) is None
    assert few_steps.least_steps(curve([9.0] * 12), 10.0, 0.0) == 5
    dip = [50.0, 10.1, 12.0, *FALLING[3:]]                  # the first crossing counts, as published
    assert few_steps.least_steps(curve(dip), 10.0, 0.0) == 10


def test_C19_errors_move_it_either_way():
    rows = curve(FALLING, error=0.3)
    assert few_steps.least_steps(rows, 10.0, 0.0, sigmas=-1) == 25 < few_steps.least_steps(rows, 10.0, 0.0) == 30
    assert few_steps.least_steps(rows, 10.0, 0.0, sigmas=1) == 45
    assert few_steps.least_steps(curve(FALLING, error=9.0), 10.0, 1.0, sigmas=1) == 1000         # itself, at the latest


def rows(frechet=3.0, steps=few_steps.STEPS, data="mnist"):
    return [{"data": data, "seed": 0, "method": name, "steps": k, "images": 96, "frechet": frechet + 1 / k,
             "frechet_error": 0.1} | ({} if name == "ddim" else {"bits_per_dim": 2.0, "bits_error": 0.1,
                                                                  "bits_images": 32})
            for name in METHODS for k in steps]


def test_C18_a_table_grows_by_rows_and_is_read_back(tmp_path):
    key, made = ("data", "seed", "method", "steps"), {"report": few_steps.report, "picture": few_steps.picture}
    path = tmp_path / "few_steps"
    for part in (rows(steps=(10,)), rows(steps=(5,)), rows(steps=(1000,)), rows(5.0, steps=(10,)),
                 rows(data="fashion-mnist", steps=(5,))):
        update_table(path, part, key, **made)
    found = read_csv(path.with_suffix(".csv"))
    assert len(found) == 4 * len(METHODS) and path.with_suffix(".png").exists()
    assert [row["method"] for row in found if row["data"] == "mnist"][:3] == ["large"] * 3       # in the methods' order
    assert [row["steps"] for row in found if (row["data"], row["method"]) == ("mnist", "sn")] == [5, 10, 1000]
    assert {row["frechet"] for row in found if row["steps"] == 10} == {5.1}                      # replaced, not doubled
    assert all("bits_per_dim" not in row for row in found if row["method"] == "ddim")
    text = path.with_suffix(".md").read_text()
    assert "## mnist" in text and "## fashion-mnist" in text and "(no thousand-step distance yet)" in text
    assert "| ocm | 5 (5 to 5) |" not in text and "| ocm |" in text


def test_C20_the_sweeps_table_has_both_measures():
    made = [{"data": "mnist", "seed": 0, "method": name, "steps": 10, "scale": scale, "images": 64, "frechet": 2.0,
             "frechet_error": 0.1, "accuracy": 0.9, "accuracy_error": 0.01}
            for name in ("small", "ocm") for scale in (0.0, 2.0)]
    text = guidance.report(made)
    assert "| Frechet distance | 0.0 |" in text and text.count("0.90 ± 0.01") == 4 and text.count("2.00 ± 0.10") == 4
    assert len(guidance.picture(made).axes) == 2


def test_the_number_of_images_does_not_bias_the_distance():
    """What the jackknife takes out: with the plain distance fewer images look farther away."""
    from ddpm.metrics import frechet_distance
    from ddpm.metrics.features import jackknifed_frechet, moments
    rng, F = np.random.default_rng(0), 8
    mu, cov = np.zeros(F), np.eye(F)
    draws = [rng.standard_normal((64, F)) * 1.3 for _ in range(200)]
    plain = np.array([frechet_distance(*moments(x), mu, cov) for x in draws])
    free, errors = np.array([jackknifed_frechet(x, mu, cov) for x in draws]).T
    truth = F * 0.3**2
    standard_error = free.std() / len(free)**0.5
    assert abs(free.mean() - truth) < 4 * standard_error < 0.2 * (plain.mean() - truth)
    assert 0.8 < errors.mean() / free.std() < 1.3           # and its error is the scatter
    wider = 1.02 * draws[0]                                 # a difference of pairs is known far better than either
    means = 5 * np.eye(F)                                   # classes in turn, 8 of them, 8 of each: balanced
    mixed = np.cov(means.T, bias=True) + np.eye(F)
    balanced = [rng.standard_normal((64, F)) + np.tile(means, (8, 1)) for _ in range(200)]
    together, scattered = (np.array([jackknifed_frechet(x, means.mean(axis=0), mixed, groups=8, block=block)[0]
                                     for x in balanced]) for block in (F, 1))
    assert abs(together.mean()) < 0.1 < 0.3 < abs(scattered.mean())
    difference, error = jackknifed_frechet(wider, mu, cov, minus=draws[0])
    assert error < 0.2 * errors[0]
    apart = jackknifed_frechet(wider, mu, cov)[0] - jackknifed_frechet(draws[0], mu, cov)[0]
    assert abs(difference - apart) < 1e-9 and jackknifed_frechet(draws[0], mu, cov, minus=draws[0]) == (0.0, 0.0)
