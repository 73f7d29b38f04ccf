"""A training step on a GPU is the step on the CPU, to float32 rounding."""

import dataclasses

import numpy as np
import pytest

from ddpm.data import load
from ddpm.parallel import make_group
from ddpm.training import Trainer
from nn.backend import to_host
from tests.ddpm.test_training import MODELS, TINY, distance, identical

cupy = pytest.importorskip("cupy")
pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module", autouse=True)
def a_gpu():
    try:
        cupy.cuda.runtime.getDeviceCount()
    except Exception as error:
        pytest.skip(f"no usable GPU ({error})")


def trained(config, dataset, steps):
    """(state on the host, losses) after some steps from a network without zeros."""
    trainer = Trainer(config, dataset, make_group(1, config.device))
    theta = trainer.network.flat_parameters
    theta += 0.1 * trainer.xp.asarray(np.random.default_rng(0).standard_normal(theta.shape, dtype=np.float32))
    losses = [trainer.step(number).loss for number in range(1, steps + 1)]
    assert type(trainer.network.flat_parameters) is trainer.xp.ndarray
    return {name: to_host(a) for name, a in trainer.state()[0].items()}, losses


@pytest.mark.parametrize("settings", [{"model": model} for model in MODELS]
                         + [{"model": "gddm", "dropout": 0.2, "attention_levels": (1,)},
                            {"model": "iddpm", "objective": "vlb"}], ids=str)
def test_a_step_on_the_gpu_is_the_step_on_the_cpu(settings):
    config, digits = dataclasses.replace(TINY, clip=0.0, **settings), load("digits")
    on_gpu = dataclasses.replace(config, device="cuda")
    host, losses = trained(config, digits, 1)
    device, device_losses = trained(on_gpu, digits, 1)
    np.testing.assert_allclose(device_losses, losses, rtol=1e-4)
    for prefix in ("adam.m", "ema", "parameters"):
        assert distance(host, device, prefix) < 1e-3
    other, _ = trained(dataclasses.replace(on_gpu, seed=1), digits, 1)
    assert distance(host, other, "adam.m") > 0.1
    np.testing.assert_allclose(trained(on_gpu, digits, 3)[1], trained(config, digits, 3)[1], rtol=1e-2)


def test_a_state_goes_from_the_gpu_to_the_cpu_and_back():
    digits, states = load("digits"), []
    for device in ("cuda", "cpu", "cuda"):
        config = dataclasses.replace(TINY, device=device)
        trainer = Trainer(config, digits, make_group(1, device))
        if states:
            trainer.restore(*states[-1])
        else:
            trainer.step(1)
        arrays, counters = trainer.state()
        states.append(({name: to_host(a).copy() for name, a in arrays.items()}, counters))
    for arrays, counters in states[1:]:
        assert identical(arrays, states[0][0]) and counters == states[0][1]
