"""The step's covariance by name: every source against an exact world, what it costs, and what it says when it can't."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ddpm import covariance, samplers
from ddpm.covariance import METHODS, NoiseStatistics, ReverseCovariance, hutchinson, jacobian, noise_statistics, sources
from ddpm.covariance import reverse_covariance as of_name
from ddpm.covariance.methods import as_reverse_covariance
from ddpm.ddpm import fixed_variance
from ddpm.denoiser import Denoiser, Prediction
from ddpm.iddpm import reverse_log_variance
from ddpm.mixture import GaussianMixture
from ddpm.network_denoiser import NetworkDenoiser
from ddpm.samplers.ddim import ddim_posterior
from ddpm.schedule import NoiseSchedule
from nn.backend import array_module, to_host
from nn.mlp import MLP
from tests.helpers import general_schedule, mixtures, property_test, schedules, zscore

LINEAR, GENERAL = NoiseSchedule.linear(1000), general_schedule()
WORLD = GaussianMixture.grid(std=0.3, rotation_degrees=30)


@pytest.fixture(params=[LINEAR, GENERAL], ids=["linear", "general"])
def schedule(request):
    return request.param


def exact(schedule, world=WORLD):
    return Denoiser.from_world(world, schedule)


def heads(schedule, world=WORLD):
    """What the three heads learn, where they learn it perfectly."""
    def moment(x_t, t):
        prediction = exact(schedule, world).predict(x_t, t)
        return prediction.var_eps + prediction.eps**2
    return {"sn": moment, "npr": lambda x_t, t: exact(schedule, world).predict(x_t, t).var_eps,
            "ocm": lambda x_t, t: exact(schedule, world).predict(x_t, t).var_eps - 1}


def states(schedule, t, n, rng, world=WORLD):
    return schedule.add_noise(world.sample(n, rng), t, rng.standard_normal((n, world.means.shape[1])))


# ---- every source says the same

@pytest.mark.parametrize("t", [1, 7, 20, np.array([1, 5, 12, 20])], ids=str)
def test_C08_C10_C11_C12_all_sources_know_the_exact_covariance(t, schedule, rng):
    denoiser, x_t = exact(schedule), states(schedule, t, 4, rng)
    prediction, (_, cov) = denoiser.predict(x_t, t), WORLD.posterior_x0(x_t, t, schedule)
    diagonal = np.einsum("nii->ni", cov)
    digits = 1e-12 * (1 + 1 / np.min(schedule.snr[t]))
    for name, head in heads(schedule).items():
        found = of_name(name, head=head).of_x0(denoiser, prediction, x_t, t)
        np.testing.assert_allclose(found, diagonal, rtol=1e-8, atol=digits)
    for name, truth in (("learned", diagonal), ("diagonal", diagonal), ("full", cov)):
        found = of_name(name).of_x0(denoiser, prediction, x_t, t)
        np.testing.assert_allclose(found, truth, rtol=1e-8, atol=digits)
    np.testing.assert_allclose(ReverseCovariance(sources.of_world).of_x0(denoiser, prediction, x_t, t), cov, rtol=1e-9,
                               atol=1e-12)
    probes = of_name("hutchinson", rng=rng, probes=4000).of_x0(denoiser, prediction, x_t, t)
    J = jacobian.jacobian(denoiser.vjp, x_t, t)
    n2s = np.reshape(1 / schedule.snr[t] * schedule.sigma2_bar[t]**0.5, (-1, 1))
    error = n2s * hutchinson.diagonal_variance(J, 4000)**0.5
    assert (np.abs(probes - diagonal) < 4.5 * error + digits).all()


@property_test
@given(mixtures(), schedules(), st.data())
def test_C08_backward_passes_give_the_covariance_of_any_mixture(world, schedule, data):
    t = data.draw(st.integers(1, schedule.T))
    x_t = states(schedule, t, 3, np.random.default_rng(t), world)
    denoiser, cov = exact(schedule, world), world.posterior_x0(x_t, t, schedule)[1]
    found = of_name("full").of_x0(denoiser, None, x_t, t)
    digits = 1e-9 * (np.abs(cov).max() + 1 / schedule.snr[t])
    np.testing.assert_allclose(found, cov, rtol=1e-9, atol=digits)
    np.testing.assert_allclose(of_name("diagonal").of_x0(denoiser, None, x_t, t), np.einsum("nii->ni", cov), rtol=1e-9,
                               atol=digits)
    wrong = found * schedule.snr[t]                          # control: without the factor it is the noise's
    assert np.abs(wrong - cov).max() > digits or abs(schedule.snr[t] - 1) < 1e-6 or np.abs(cov).max() < 1e-6


def test_C08_rows_columns_and_the_symmetric_part(rng):
    """Of a Jacobian that isn't symmetric: vjps give its rows, and the covariance uses half of it and its transpose."""
    A = rng.standard_normal((3, 3))
    denoiser = Denoiser.from_eps(lambda x, t: x @ A.T, GENERAL, vjp=lambda x, t, v: v @ A)
    x_t, t = rng.standard_normal((2, 3)), 9
    np.testing.assert_allclose(jacobian.jacobian(denoiser.vjp, x_t, t)[0], A)
    np.testing.assert_allclose(jacobian.jacobian_diagonal(denoiser.vjp, x_t, t)[1], np.diag(A))
    found = sources.exact_full()(denoiser, None, x_t, t)[0]
    noise, lam = GENERAL.sigma2_bar[t], GENERAL.lam_bar[t]
    np.testing.assert_allclose(found, noise / lam**2 * (np.eye(3) - noise**0.5 * (A + A.T) / 2), rtol=1e-12)
    np.testing.assert_array_equal(found, found.T)
    assert np.abs(found - noise / lam**2 * (np.eye(3) - noise**0.5 * A)).max() > 0.1


# ---- the step

@property_test
@given(mixtures(), schedules(), st.floats(0, 1), st.data())
def test_G03_C15_C16_var_I_plus_a2_cov_for_any_member_of_the_family(world, schedule, eta, data):
    """For the chain's own step it is the exact covariance of x_s | x_t, of any mixture (C15)."""
    t = data.draw(st.integers(1, schedule.T))
    s = data.draw(st.integers(0, t - 1))
    x_t, denoiser = states(schedule, t, 3, np.random.default_rng(t), world), exact(schedule, world)
    cov, scale = world.posterior_x0(x_t, t, schedule)[1], 1e-9 * (1 + schedule.sigma2_bar[t])
    source = ReverseCovariance(sources.of_world)
    own = source(denoiser, None, x_t, s, t, schedule)
    np.testing.assert_allclose(own, world.reverse(x_t, s, t, schedule).cov(), rtol=1e-7, atol=scale)
    member = ddim_posterior(s, t, schedule, eta)
    eye = np.eye(x_t.shape[1])
    found = source(denoiser, None, x_t, s, t, schedule, member)
    np.testing.assert_allclose(found, member.var * eye + member.a**2 * cov, rtol=1e-9, atol=scale)
    small = of_name("small")
    assert small(denoiser, None, x_t, s, t, schedule, member) == member.var
    assert small(denoiser, None, x_t, s, t, schedule) == (fixed_variance("small", s, t, schedule))
    assert of_name("large")(denoiser, None, x_t, s, t, schedule) == schedule.between(s, t)[1]


def test_C05_an_iddpms_v_is_a_variance_of_the_chains_step_only(rng):
    x_t, v = rng.standard_normal((2, 2, 3))
    prediction = Prediction(eps=x_t, x0=x_t, v=v)
    found = of_name("learned")(None, prediction, x_t, 4, 9, LINEAR)
    np.testing.assert_array_equal(found, np.exp(reverse_log_variance(v, 4, 9, LINEAR)))
    member = ddim_posterior(4, 9, LINEAR, 0.5)
    with pytest.raises(ValueError, match="I-DDPM's variance belongs to DDPM's own step"):
        of_name("learned")(None, prediction, x_t, 4, 9, LINEAR, member)
    with pytest.raises(ValueError, match='"large" belongs to DDPM\'s own step'):
        of_name("large")(None, prediction, x_t, 4, 9, LINEAR, member)
    with pytest.raises(ValueError, match="needs a model with a variance"):
        of_name("learned")(None, prediction._replace(v=None), x_t, 4, 9, LINEAR)


def test_clipping_and_averaging(rng):
    """Between 0 and `largest`; of a matrix the eigenvalues, up to D times that; the average is taken before."""
    x_t, values = np.zeros((2, 3)), np.array([[-1.0, 0.5, 4.0], [2.0, 2.0, 2.0]])
    def source(cov):
        return lambda *_: cov
    clipped = ReverseCovariance(source(values), largest=1.0).of_x0(None, None, x_t, 5)
    np.testing.assert_array_equal(clipped, [[0, 0.5, 1], [1, 1, 1]])
    np.testing.assert_array_equal(ReverseCovariance(source(values)).of_x0(None, None, x_t, 5), np.maximum(values, 0))
    average = ReverseCovariance(source(values), average=True).of_x0(None, None, x_t, 5)
    np.testing.assert_allclose(average, values.mean(axis=1, keepdims=True))
    matrix = np.stack([np.diag(row) for row in values])
    np.testing.assert_allclose(ReverseCovariance(source(matrix), largest=1.0).of_x0(None, None, x_t, 5)[0],
                               np.diag([0, 0.5, 3.0]), atol=1e-12)
    np.testing.assert_allclose(ReverseCovariance(source(matrix), average=True).of_x0(None, None, x_t, 5), average)
    assert ReverseCovariance(source(-0.2), largest=1.0).of_x0(None, None, x_t, 5) == 0
    for bad in (0, -1.0):
        with pytest.raises(ValueError, match="largest must be above 0"):
            ReverseCovariance(source(1.0), largest=bad)


# ---- A-DDPM's table

def test_C06_C09_statistics_of_a_model_on_its_data(rng):
    """Over all data and all t: the sum of the two means is 1, and both forms give E tr Cov / D."""
    schedule, n = GENERAL, 4000
    x0, denoiser = WORLD.sample(n, rng), exact(GENERAL)
    statistics = noise_statistics(denoiser, schedule, x0, rng, batch=999)
    assert denoiser.evaluations == n * schedule.T and isinstance(statistics, NoiseStatistics)
    assert statistics.square.shape == statistics.residual.shape == (schedule.T + 1,) and statistics.square[0] == 0
    prediction = denoiser.predict(x0, 3)
    for t in (1, 5, 20):
        x_t = states(schedule, t, 20_000, rng)
        var_x0 = WORLD.posterior_x0(x_t, t, schedule)[1].trace(0, 1, 2) / 2
        error = var_x0.std() / np.sqrt(n)
        for name, slack in (("residual", 3.0), ("analytic", 1 / schedule.snr[t] / np.sqrt(n) / (error + 1e-300))):
            found = of_name(name, statistics=statistics).of_x0(denoiser, prediction, x0, t)
            assert isinstance(found, float) and abs(found - var_x0.mean()) < 4 * (1 + slack) * error
    means = statistics.square[1:] + statistics.residual[1:]
    assert (np.abs(means - 1) < 4.5 * np.sqrt(2 / (2 * n)) * 2).all()
    several = of_name("residual", statistics=statistics).of_x0(denoiser, prediction, x0[:3], np.array([1, 5, 20]))
    assert several.shape == (3, 1)
    for row, t in zip(several[:, 0], (1, 5, 20), strict=True):
        assert row == of_name("residual", statistics=statistics).of_x0(denoiser, prediction, x0, t)


def test_C06_the_score_form_is_bounded_and_the_residual_is_right_for_a_wrong_mean(rng):
    """1 - E|eps_hat|^2 / D is clipped at 0 and never above 1; a wrong mean adds its squared error to the other only."""
    schedule = GENERAL
    for square, residual in ((1.3, 0.2), (0.0, 1.7), (0.4, 0.6)):
        table = NoiseStatistics(np.full(21, square), np.full(21, residual))
        factor = 1 / schedule.snr[7]
        found = of_name("analytic", statistics=table).of_x0(exact(schedule), None, np.zeros((1, 2)), 7)
        assert found == pytest.approx(factor * max(0.0, 1 - square), rel=1e-12) and 0 <= found <= factor * (1 + 1e-12)
        found = of_name("residual", statistics=table).of_x0(exact(schedule), None, np.zeros((1, 2)), 7)
        assert found == pytest.approx(factor * residual, rel=1e-12)
        clipped = of_name("residual", statistics=table, largest=0.01)
        assert clipped.of_x0(exact(schedule), None, np.zeros((1, 2)), 7) == 0.01
    world, right = GaussianMixture.two_component(), exact(schedule, GaussianMixture.two_component())
    biased = Denoiser.from_eps(lambda x, t: right.predict(x, t).eps + 0.3, schedule)
    x0 = world.sample(20_000, rng)
    good, bad = (noise_statistics(d, schedule, x0, np.random.default_rng(1), per_time=2000) for d in (right, biased))
    np.testing.assert_allclose(bad.residual[1:] - good.residual[1:], 0.09, atol=0.06)
    assert zscore(bad.residual[1:] - good.residual[1:], 0.09) < 5


def test_statistics_take_every_image_in_turn_and_any_batch(fake):
    seen = []

    def eps(x_t, t):
        seen.extend(zip(np.asarray(t).tolist(), to_host(x_t)[:, 0].tolist(), strict=True))
        return 0 * x_t

    class NoNoise:
        def standard_normal(self, shape, dtype):
            return np.zeros(shape, dtype)
    images = np.arange(6, dtype=np.uint8).reshape(6, 1)
    schedule = NoiseSchedule(np.ones(12), np.full(12, 0.1))  # lam_bar = 1: x_t is the image itself
    progress = []
    noise_statistics(Denoiser.from_eps(eps, schedule), schedule, images, NoNoise(), per_time=2, batch=5,
                     scale=lambda v: v.astype(np.float64), progress=progress.append)
    assert progress == [5, 5, 5, 5, 4] and [t for t, _ in seen] == [t for t in range(1, 13) for _ in range(2)]
    assert sorted(image for _, image in seen) == sorted(4 * [0.0, 1, 2, 3, 4, 5])
    assert all(abs(a[1] - b[1]) == 3 for a, b in zip(seen[::2], seen[1::2], strict=True))
    x0 = np.random.default_rng(0).standard_normal((6, 4)).astype(np.float32)
    model = Denoiser.from_eps(lambda x, t: 0.3 * x, schedule)
    host = noise_statistics(model, schedule, x0, np.random.default_rng(1), batch=7)
    device = noise_statistics(model, schedule, fake.asarray(x0), fake.random.default_rng(1), batch=7)
    for a, b in zip(host, device, strict=True):
        assert type(b) is np.ndarray and b.dtype == np.float64
        np.testing.assert_array_equal(a, b)
    for bad in (0, 7):
        with pytest.raises(ValueError, match="per_time must be an integer from 1 to the number of images, 6"):
            noise_statistics(model, schedule, x0, None, per_time=bad)


# ---- C13: what it costs

@pytest.mark.parametrize("name", METHODS)
def test_C13_passes_are_counted(name, schedule, rng):
    """On images of D = 6 pixels and a network: extra passes for each image and step, by counting, not by typing."""
    network = MLP(6, 6, hidden=(8,), time_dim=4, rng=rng, dtype=np.float64)
    network.flat_parameters[...] += 0.1 * rng.standard_normal(network.flat_parameters.shape)
    denoiser, x_t = NetworkDenoiser(network, "ddpm", schedule), rng.standard_normal((3, 6))
    if name == "learned":
        denoiser = NetworkDenoiser(MLP(6, 12, hidden=(8,), time_dim=4, rng=rng, dtype=np.float64), "gddm", schedule)
    method = of_name(name, statistics=NoiseStatistics(np.full(schedule.T + 1, 0.5), np.full(schedule.T + 1, 0.5)),
                     head=lambda x, t: np.abs(x), rng=rng, probes=5)
    times, steps = schedule.timesteps(4), []
    samplers.ddpm(denoiser, schedule, x_t, timesteps=times, variance=method, rng=rng, callback=steps.append)
    extra = {"hutchinson": 2 * 5, "diagonal": 2 * 6, "full": 2 * 6}.get(name, 0)
    assert denoiser.passes == 3 * (4 + 3 * extra)            # nothing is asked at s = 0
    assert denoiser.evaluations == 3 * 4 and denoiser.vjps == 3 * 3 * extra // 2
    shape = {"large": (), "small": (), "analytic": (), "residual": (), "full": (3, 6, 6)}.get(name, (3, 6))
    assert [np.shape(step.var) for step in steps] == [shape, shape, shape, ()]
    assert all(np.isfinite(step.x_s).all() for step in steps)


# ---- what is missing is said

def test_a_method_says_what_it_lacks():
    for name, needs in (("analytic", "statistics of the data"), ("residual", "statistics of the data"),
                        ("sn", "a head of the network"), ("npr", "a head"), ("ocm", "a head"),
                        ("hutchinson", "a generator for its probes")):
        with pytest.raises(ValueError, match=f'variance "{name}" needs {needs}'):
            of_name(name)
        assert METHODS[name].needs is not None
    for name in ("large", "small", "learned", "diagonal", "full"):
        assert METHODS[name].needs is None and isinstance(of_name(name), ReverseCovariance)
        assert as_reverse_covariance(of_name(name)) is not None
    for bad in ("tiny", None, 3):
        with pytest.raises(ValueError, match="variance must be one of large, small, learned, analytic"):
            as_reverse_covariance(bad)
    assert all(method.says and "\n" not in method.says for method in METHODS.values())


def test_too_large_for_a_matrix(rng):
    denoiser = Denoiser.from_eps(lambda x, t: x, LINEAR, vjp=lambda x, t, v: v)
    with pytest.raises(ValueError, match="D = 4107 coordinates takes 4107 vjps, 8214 network passes"):
        of_name("full").of_x0(denoiser, None, np.zeros((1, 37, 37, 3)), 5)
    assert denoiser.vjps == 0
    with pytest.raises(ValueError, match="the limit is D = 3"):
        of_name("full", limit=3).of_x0(denoiser, None, np.zeros((1, 4)), 5)
    with pytest.raises(NotImplementedError, match="covariance of x_0"):
        ReverseCovariance(sources.of_world).of_x0(denoiser, None, np.zeros((1, 4)), 5)


# ---- precision and devices

@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_images_precision_and_device(name, dtype, fake, rng):
    x = rng.standard_normal((3, 2, 2, 1)).astype(dtype)
    denoiser = Denoiser.from_moments(lambda x, t: (0.4 * x, 0.1 * x * x), LINEAR, vjp=lambda x, t, v: 0.3 * v)
    statistics = NoiseStatistics(np.full(1001, 0.5), np.full(1001, 0.4))

    def answers(x, xp, t):
        method = of_name(name, statistics=statistics, head=lambda x, t: 0.5 * x * x, rng=xp.random.default_rng(1))
        return method(denoiser, denoiser.predict(x, t), x, t - 5, t, LINEAR)
    for t in (300, np.array([6, 300, 1000])):
        host, device = answers(x, np, t), answers(fake.asarray(x), fake, t)
        if not hasattr(host, "ndim") or host.ndim == 0:
            assert host == device and type(host) is float
            continue
        assert array_module(device) is fake
        np.testing.assert_array_equal(to_host(device), host)
        assert host.dtype == (np.float64 if name == "full" else dtype)
        rows = [answers(x[i:i + 1], np, int(time)) for i, time in enumerate(np.broadcast_to(t, 3))]
        if name != "hutchinson":                             # whose probes are those of the batch
            np.testing.assert_allclose(host, np.concatenate([np.broadcast_to(r, (1, *host.shape[1:])) for r in rows]),
                                       rtol=1e-4)


def test_a_covariance_serves_each_sampler_on_a_device(fake, rng):
    x = rng.standard_normal((3, 2, 2, 1)).astype(np.float32)
    denoiser = Denoiser.from_moments(lambda x, t: (0.4 * x, 0.1 * x * x), LINEAR, vjp=lambda x, t, v: 0.3 * v)
    for name in ("full", "diagonal", "learned", "small"):
        for sampler, options in ((samplers.ddpm, {"variance": name}), (samplers.renoise, {"covariance": name}),
                                 (samplers.ddim, {"covariance": name, "eta": 0.4})):
            def run(x, xp, sampler=sampler, options=options):
                return sampler(denoiser, LINEAR, x, timesteps=[900, 400, 3], rng=xp.random.default_rng(2), clip=(-1, 1),
                               last_variance=1e-4, **options)
            host, device = run(x, np), run(fake.asarray(x), fake)
            assert array_module(device) is fake and host.dtype == np.float32
            np.testing.assert_array_equal(to_host(device), host)


def test_var_x0_is_the_clipped_form_of_the_noises():
    var_eps = np.array([[-0.2, 0.5]])
    np.testing.assert_allclose(sources.from_noise(var_eps, 3, GENERAL), var_eps / GENERAL.snr[3], rtol=1e-12)
    np.testing.assert_allclose(covariance.var_x0(var_eps, 3, GENERAL), np.maximum(var_eps, 0) / GENERAL.snr[3])


def test_E25_the_method_is_called_sn():
    assert "sn" in METHODS and "squared noise" in METHODS["sn"].says
    with pytest.raises(ValueError, match="variance must be one of"):
        of_name("ns", head=lambda x, t: x)
