"""The Frechet distance in a classifier's features: of a set to itself, to another, and the weights that are shipped."""

import numpy as np
import pytest

import nn
from ddpm import data
from ddpm.metrics import features
from ddpm.metrics.features import classifier_frechet, image_features, load_classifier, moments


@pytest.fixture
def classifier(rng):
    return nn.Classifier(1, 3, widths=(8, 8), groups=2, rng=rng)


def test_features_do_not_depend_on_the_chunks_or_on_the_scale_they_come_in(classifier, rng):
    images = rng.integers(0, 256, (7, 8, 8, 1)).astype(np.uint8)
    whole = image_features(classifier, images)
    assert whole.shape == (7, 8) and whole.dtype == np.float64
    np.testing.assert_allclose(image_features(classifier, images, chunk=3), whole, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(image_features(classifier, data.scale(images)), whole, rtol=1e-5, atol=1e-6)


def test_C18_distance_is_zero_to_itself_symmetric_and_sees_a_change(classifier, rng):
    images = rng.standard_normal((200, 8, 8, 1)).astype(np.float32)
    more, barred = rng.standard_normal((200, 8, 8, 1)).astype(np.float32), images.copy()
    barred[:, 3:5] += 3
    assert classifier_frechet(classifier, images, images) == pytest.approx(0, abs=1e-6)
    near, far = (classifier_frechet(classifier, images, other) for other in (more, barred))
    assert 0 < near < far / 3
    assert classifier_frechet(classifier, barred, images) == pytest.approx(far, rel=1e-6)


def test_moments_are_numpys(rng):
    x = rng.standard_normal((50, 4))
    mean, cov = moments(x)
    np.testing.assert_allclose(cov, (x - mean).T @ (x - mean) / 49, rtol=1e-12)
    with pytest.raises(ValueError, match="at least two images"):
        moments(x[:1])


def test_a_data_set_without_a_classifier_is_named():
    with pytest.raises(ValueError, match=r"no classifier has been trained on 'digits', only on .*mnist.*experiments"):
        load_classifier("digits")


@pytest.mark.parametrize("name", sorted(path.stem for path in features.WEIGHTS.glob("*.safetensors")))
def test_shipped_weights_say_what_they_are(name):
    net, metadata = load_classifier(name)
    assert not net.training and metadata["command"].startswith(f"python -m experiments.classifier --data {name} ")
    assert 0.5 < metadata["accuracy"] < 1 and 0 < metadata["standard_error"] < 0.01


def test_the_mnist_classifier_reads_digits():
    net, _ = load_classifier("mnist5k")
    dataset = data.load("mnist5k")
    found = net(data.scale(dataset.test_images)).argmax(axis=1)
    assert (found == dataset.test_labels).mean() > 0.97
