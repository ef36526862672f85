"""Metrics: against closed forms and slow, plain references; the ruler: against real MNIST."""

import itertools
import math

import keras
import numpy as np
import pytest
import scipy.linalg
import scipy.ndimage
from conftest import WEIGHTS, synthetic_digits

import gan_mnist
from gan_mnist import (
    frechet_distance,
    inception_score,
    kernel_inception_distance,
    precision_recall,
)


@pytest.fixture
def random():
    """Random numbers that don't depend on which tests ran before."""
    return np.random.default_rng(0)


def covariance(size, seed):
    """Return a well-conditioned covariance (size, size)."""
    samples = np.random.default_rng(seed).normal(size=(4 * size, size))
    return samples.T @ samples / len(samples) + np.eye(size)


# ----- Fréchet distance


def test_frechet_distance_of_equal_covariances_is_the_squared_distance_of_the_means(random):
    mean_1, mean_2 = random.normal(size=(2, 30))
    both = covariance(30, seed=1)
    expected = np.sum((mean_1 - mean_2) ** 2)
    assert frechet_distance(mean_1, both, mean_2, both) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(mean_1, both, mean_1, both) == pytest.approx(0, abs=1e-9)


def test_frechet_distance_of_diagonal_covariances_is_the_sum_of_one_dimensional_ones(random):
    variances_1, variances_2 = random.uniform(0.1, 9, size=(2, 20))
    distance = frechet_distance(
        np.zeros(20), np.diag(variances_1), np.ones(20), np.diag(variances_2)
    )
    expected = 20 + np.sum((np.sqrt(variances_1) - np.sqrt(variances_2)) ** 2)
    assert distance == pytest.approx(expected, rel=1e-9)


def test_frechet_distance_of_rank_one_covariances_has_its_closed_form(random):
    first, second = random.normal(size=(2, 40))
    distance = frechet_distance(
        np.zeros(40), np.outer(first, first), np.zeros(40), np.outer(second, second)
    )
    expected = first @ first + second @ second - 2 * abs(first @ second)
    assert distance == pytest.approx(expected, rel=1e-6)


def test_frechet_distance_to_a_point_is_the_mean_squared_distance_to_it(random):
    mean, spread = random.normal(size=16), covariance(16, seed=2)
    zero = np.zeros((16, 16))
    expected = mean @ mean + np.trace(spread)
    assert frechet_distance(mean, spread, np.zeros(16), zero) == pytest.approx(expected)
    assert frechet_distance(np.zeros(16), zero, mean, spread) == pytest.approx(expected)
    assert frechet_distance(mean, zero, mean, zero) == 0


def test_frechet_distance_agrees_with_the_matrix_square_root_of_scipy():
    for seed in range(3):
        first, second = covariance(25, seed), 3 * covariance(25, seed + 10)
        means = np.random.default_rng(seed).normal(size=(2, 25))
        root = scipy.linalg.sqrtm(first @ second).real
        expected = np.sum((means[0] - means[1]) ** 2) + np.trace(first + second - 2 * root)
        assert frechet_distance(means[0], first, means[1], second) == pytest.approx(expected)


def test_frechet_distance_is_symmetric_and_never_negative():
    for seed in range(5):
        samples = np.random.default_rng(seed).normal(size=(2, 5, 50))  # rank 4 of 50
        pair = [(x.mean(axis=0), np.cov(x, rowvar=False)) for x in samples]
        there, back = frechet_distance(*pair[0], *pair[1]), frechet_distance(*pair[1], *pair[0])
        assert there == pytest.approx(back) and there > 0
        assert 0 <= frechet_distance(*pair[0], *pair[0]) < 1e-6


# ----- Inception score


def test_inception_score_of_uniform_probabilities_is_one():
    mean, deviation = inception_score(np.full((500, 10), 0.1))
    assert mean == pytest.approx(1) and deviation == pytest.approx(0, abs=1e-12)


def test_inception_score_of_certain_and_balanced_classes_is_their_number():
    mean, deviation = inception_score(np.eye(10)[np.arange(1000) % 10])
    assert mean == pytest.approx(10) and deviation == pytest.approx(0, abs=1e-12)


def test_inception_score_of_a_collapsed_generator_is_one():
    assert inception_score(np.eye(10)[np.zeros(1000, int)])[0] == pytest.approx(1)


def test_inception_score_is_the_mean_over_the_splits_of_the_formula(random):
    probabilities = random.dirichlet(np.full(10, 0.3), size=300).astype(np.float32)
    scores = []
    for part in probabilities.astype(float).reshape(3, 100, 10):
        marginal = part.mean(axis=0)
        scores.append(np.exp(np.mean(np.sum(part * np.log(part / marginal), axis=1))))
    expected = (np.mean(scores), np.std(scores))
    assert inception_score(probabilities, splits=3) == pytest.approx(expected, rel=1e-5)


# ----- Kernel distance, precision and recall


def kernel_distance_by_the_book(first, second):
    """Return the unbiased squared MMD with the kernel (x.y / F + 1)^3, one pair at a time."""

    def kernel(a, b):
        return (sum(u * v for u, v in zip(a, b, strict=True)) / len(a) + 1) ** 3

    def within(points):
        pairs = itertools.permutations(range(len(points)), 2)
        total = sum(kernel(points[i], points[j]) for i, j in pairs)
        return total / (len(points) * (len(points) - 1))

    between = [kernel(a, b) for a in first for b in second]
    return within(first) + within(second) - 2 * sum(between) / len(between)


def test_kernel_distance_equals_the_double_loop(random):
    first, second = random.normal(size=(30, 6)), random.normal(size=(30, 6)) + 0.5
    mean, deviation = kernel_inception_distance(first, second, subsets=3, subset_size=30)
    assert mean == pytest.approx(kernel_distance_by_the_book(first, second), rel=1e-9)
    assert deviation == pytest.approx(0, abs=1e-9)


def test_kernel_distance_of_equal_distributions_is_nought_within_its_deviation(random):
    samples = random.normal(size=(2, 1000, 16))
    mean, deviation = kernel_inception_distance(*samples, subsets=40, subset_size=300)
    assert abs(mean) < deviation
    assert kernel_inception_distance(samples[0], samples[1] + 1, 40, 300)[0] > 20 * deviation


def share_within_by_the_book(points, manifold, neighbours):
    radii = []
    for i, point in enumerate(manifold):
        others = [math.dist(point, other) for j, other in enumerate(manifold) if j != i]
        radii.append(sorted(others)[neighbours - 1])
    inside = 0
    for point in points:
        inside += any(math.dist(point, m) <= r for m, r in zip(manifold, radii, strict=True))
    return inside / len(points)


@pytest.mark.parametrize("neighbours", [1, 3, 5])
def test_precision_and_recall_count_exactly_as_the_plain_loops_do(neighbours, random):
    real, generated = random.normal(size=(60, 5)), random.normal(size=(45, 5)) + 0.8
    precision, recall = precision_recall(real, generated, neighbours)
    assert precision == share_within_by_the_book(generated, real, neighbours)
    assert recall == share_within_by_the_book(real, generated, neighbours)
    assert 0 < recall < 1 and 0 < precision < 1


def test_precision_and_recall_of_a_set_with_itself_are_one(random):
    features = random.normal(size=(1500, 64)).astype(np.float32)
    assert precision_recall(features, features) == (1, 1)


def test_precision_and_recall_of_repeated_points_with_themselves_are_one(random):
    features = np.repeat(random.normal(size=(7, 64)), 30, axis=0)
    assert precision_recall(features, features) == (1, 1)
    assert precision_recall(features, features[:120]) == (1, 4 / 7)


def test_precision_and_recall_of_sets_far_apart_are_nought(random):
    real, generated = random.normal(size=(2, 100, 8))
    assert precision_recall(real, generated + 100) == (0, 0)


# ----- The ruler


@pytest.fixture(scope="module")
def ruler():
    """The ruler of MNIST, which needs no MNIST: its statistics are shipped."""
    with np.load(WEIGHTS / "mnist_inception_1.npz") as shipped:
        return gan_mnist.RULERS["mnist"](None)._replace(**shipped)


@pytest.fixture(scope="module")
def test_images(mnist):
    return mnist["x_test"][..., np.newaxis]


def test_the_ruler_reads_real_test_images_at_least_995_in_a_thousand(ruler, test_images, mnist):
    features, probabilities = gan_mnist.measure(ruler, test_images)
    assert len(features) == len(probabilities) == 10_000
    assert np.allclose(probabilities.sum(axis=1), 1, atol=1e-5)
    assert np.mean(probabilities.argmax(axis=1) == mnist["y_test"]) >= 0.995


def test_the_ruler_has_at_most_300_000_parameters_and_the_weights_10_megabytes(ruler):
    network = keras.models.load_model(WEIGHTS / f"{ruler.name}.h5", compile=False)
    assert network.count_params() <= 300_000
    assert sum(path.stat().st_size for path in WEIGHTS.rglob("*")) < 10_000_000


def test_the_shipped_statistics_are_those_of_the_training_images(ruler, mnist):
    features, _ = gan_mnist.reference_outputs(ruler, mnist["x_train"][..., np.newaxis])
    features = features.astype(np.float64)
    for shipped, ours in (
        (ruler.mean, features.mean(axis=0)),
        (ruler.covariance, np.cov(features, rowvar=False)),
    ):
        assert shipped.shape == ours.shape and shipped.dtype == np.float64
        assert np.linalg.norm(shipped - ours) < 1e-3 * np.linalg.norm(ours)


def test_measuring_does_not_depend_on_the_images_beside(ruler):
    images = synthetic_digits(503)[0][..., np.newaxis]
    features, probabilities = gan_mnist.measure(ruler, images)
    for part in (slice(0, 7), slice(500, 503)):
        few_features, few_probabilities = gan_mnist.measure(ruler, images[part])
        assert np.allclose(features[part], few_features, atol=1e-4)
        assert np.allclose(probabilities[part], few_probabilities, atol=1e-4)


def test_fid_puts_test_images_before_blurred_before_noise(ruler, test_images, random):
    blurred = scipy.ndimage.gaussian_filter(test_images, (0, 1, 1, 0))
    noise = random.integers(0, 256, test_images.shape, np.uint8)
    real, soft, worst = (
        gan_mnist.quick_metrics(ruler, images) for images in (test_images, blurred, noise)
    )
    assert 0 < real["fid"] < soft["fid"] / 3 < worst["fid"] / 9
    assert real["inception_score"] > soft["inception_score"] > worst["inception_score"] >= 1
    assert real["inception_score"] > 9.5 and real["classes_covered"] == 10


def test_a_collapsed_generator_gets_a_large_finite_fid_and_covers_one_class(ruler):
    image = synthetic_digits(1)[0][..., np.newaxis]
    metrics = gan_mnist.quick_metrics(ruler, np.repeat(image, 1000, axis=0))
    assert math.isfinite(metrics["fid"]) and metrics["fid"] > np.trace(ruler.covariance)
    assert metrics["inception_score"] == pytest.approx(1, abs=1e-3)
    assert metrics["classes_covered"] == 1


def test_evaluate_images_gives_every_metric_and_praises_real_ones(test_images, monkeypatch):
    monkeypatch.setattr(gan_mnist, "NEIGHBOUR_IMAGES", 1000)  # takes a tenth of the time
    metrics = gan_mnist.evaluate_images(test_images[:500], gan_mnist.Settings())
    assert metrics["inception_score"] > 8.5 and metrics["classes_covered"] == 10
    assert metrics["fid"] < 20 and abs(metrics["kid"]) < 0.05
    assert metrics["precision"] > 0.75 and metrics["recall"] > 0.75
    assert metrics["density"] > 0.8 and metrics["coverage"] > 0.8
    assert metrics["class_divergence"] < 0.02 and 0.9 < metrics["memorisation"] < 1.1


def test_copies_of_training_images_are_told_from_unseen_ones(mnist, test_images, ruler):
    real, _ = gan_mnist.reference_outputs(ruler, mnist["x_train"][..., np.newaxis])
    unseen, _ = gan_mnist.measure(ruler, test_images[:1000])
    tests = test_images[1000:2000]
    for features, low, high in (
        (real[:900], 0, 0.001),
        (unseen, 0.9, 1.1),
        (np.concatenate([real[:400], unseen[:600]]), 0.3, 0.95),
    ):
        assert low <= gan_mnist.memorisation(ruler, features, real, tests) <= high


def test_inception_score_cuts_where_the_papers_code_does(random):
    probabilities = random.dirichlet(np.ones(10) / 3, 1003)
    scores = []
    for part in range(10):
        own = probabilities[part * 1003 // 10 : (part + 1) * 1003 // 10]
        terms = own * (np.log(own) - np.log(own.mean(axis=0, keepdims=True)))
        scores.append(np.exp(terms.sum(axis=1).mean()))
    expected = np.mean(scores), np.std(scores)
    assert np.allclose(gan_mnist.inception_score(probabilities), expected, rtol=1e-9)


def test_whole_numbers_are_measured_as_numbers():
    one, other = np.array([1], np.uint8), np.array([20], np.uint8)
    nothing = np.zeros((1, 1), np.uint8)
    assert gan_mnist.frechet_distance(one, nothing, other, nothing) == 361


@pytest.mark.parametrize("measure", [gan_mnist.inception_score, gan_mnist.frechet_distance])
def test_what_is_not_finite_is_refused_by_the_metrics(measure):
    parts = (
        ([[np.nan, 0.5]],)
        if measure is gan_mnist.inception_score
        else ([0], [[1]], [np.nan], [[1]])
    )
    with pytest.raises(ValueError, match="infs or NaNs"):
        measure(*parts)


def test_the_order_of_images_changes_no_metric(test_images, mnist, monkeypatch):
    monkeypatch.setattr(gan_mnist, "NEIGHBOUR_IMAGES", 1000)  # takes a tenth of the time
    test_images = test_images[:3000]
    labels = mnist["y_test"][:3000]
    settings, by_class = gan_mnist.Settings(), np.argsort(labels, kind="stable")
    mixed = gan_mnist.evaluate_images(test_images, settings, labels)
    ordered = gan_mnist.evaluate_images(test_images[by_class], settings, labels[by_class])
    for name in ("inception_score", "fid", "precision", "recall", "coverage"):
        assert ordered[name] == pytest.approx(mixed[name], rel=0.05), name
    few = gan_mnist.evaluate_images(test_images[by_class], settings, count=400)
    assert few["images"] == 400 and few["classes_covered"] == 10


def test_classes_of_a_folder_with_only_some_are_those_that_the_images_show(
    test_images, mnist, monkeypatch
):
    monkeypatch.setattr(gan_mnist, "NEIGHBOUR_IMAGES", 1000)  # takes a tenth of the time
    labels = mnist["y_test"][: len(test_images)]
    some = np.isin(labels, (3, 7))
    numbered = (labels[some] == 7).astype(np.uint8)  # 0 and 1, as the folders 3/ and 7/ give
    metrics = gan_mnist.evaluate_images(test_images[some], gan_mnist.Settings(), numbered)
    distances = metrics["fid_per_class"]
    assert max(distances[3], distances[7]) < 5
