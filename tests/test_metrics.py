"""Metrics, functions of arrays: against closed forms and slow, plain references."""

import itertools
import math

import numpy as np
import pytest
import scipy.linalg
import scipy.spatial

from gan_mnist import (
    class_divergence,
    density_coverage,
    feature_statistics,
    frechet_distance,
    frechet_distance_per_class,
    inception_score,
    kernel_inception_distance,
    memorisation,
    nearest,
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


def fid(features, others):
    return frechet_distance(*feature_statistics(features), *feature_statistics(others))


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


def test_inception_score_is_the_mean_over_parts_by_the_book(random):
    probabilities = random.dirichlet(np.ones(10) / 3, 1003)
    scores = []
    for part in range(10):  # the first three have an image more
        own = probabilities[100 * part + min(part, 3) : 100 * (part + 1) + min(part + 1, 3)]
        terms = own * (np.log(own) - np.log(own.mean(axis=0, keepdims=True)))
        scores.append(np.exp(terms.sum(axis=1).mean()))
    expected = np.mean(scores), np.std(scores)
    assert inception_score(probabilities) == pytest.approx(expected, rel=1e-9)


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


def test_density_and_coverage_count_exactly_as_all_distances_say(random):
    real, drawn = random.normal(size=(80, 12)), random.normal(size=(640, 12)) + 1
    radii = np.sort(scipy.spatial.distance.cdist(real, real))[:, 5]  # the nearest is itself
    within = scipy.spatial.distance.cdist(real, drawn) <= radii[:, np.newaxis]
    expected = within.sum(axis=0).mean() / 5, within.any(axis=1).mean()
    assert density_coverage(real, drawn) == pytest.approx(expected, rel=1e-12)
    assert 0 < expected[1] < 1


def test_density_and_coverage_of_another_draw_are_near_one_and_of_strangers_nought(random):
    real, same = random.normal(size=(2, 1000, 8))
    density, coverage = density_coverage(real, same)
    assert density == pytest.approx(1, abs=0.1) and coverage > 0.9
    assert density_coverage(real, same + 50) == (0, 0) == precision_recall(real, same + 50)
    assert density_coverage(real, np.repeat(real[:1], 1000, axis=0))[1] < 0.05


def test_the_nearest_of_a_set_to_itself_are_its_own(random):
    features = random.normal(size=(700, 20)) + 1000  # far from nought, where digits are lost
    indices, distances = nearest(features, features)
    assert indices.tolist() == list(range(700)) and not distances.any()


@pytest.mark.parametrize("one_image", [False, True])
def test_a_repeated_sample_gives_finite_numbers(one_image, random):
    real = random.normal(size=(300, 20))
    drawn = np.repeat(real[:1] if one_image else np.ones((1, 20)), 300, axis=0)
    expected = ((real.mean(axis=0) - drawn[0]) ** 2).sum() + np.trace(np.cov(real, rowvar=False))
    assert fid(drawn, real) == pytest.approx(expected)
    assert np.isfinite(kernel_inception_distance(real, drawn, 3, 100)).all()
    assert precision_recall(real, drawn)[1] <= 1 / 300 and density_coverage(real, drawn)[1] <= 0.1


def test_two_images_are_enough_for_every_metric(random):
    few, real = random.normal(size=(2, 20)), random.normal(size=(50, 20))
    assert fid(few, real) > 0
    assert np.isfinite(kernel_inception_distance(few, real)).all()
    for metric in (precision_recall, density_coverage):
        assert np.isfinite(metric(few, real, 1)).all()


# ----- Classes


def test_class_divergence_is_nought_for_equal_shares_and_the_logarithm_for_one_class_of_two():
    both = np.arange(100_000) % 2
    assert class_divergence([0.5, 0.5], both) == pytest.approx(0, abs=1e-9)
    assert class_divergence([1.0, 0.0], both) == pytest.approx(np.log(2), rel=1e-4)
    assert np.isfinite(class_divergence([0.0, 0.0, 1.0], both))


def test_fid_per_class_looks_at_each_class_alone_and_leaves_out_classes_of_one_image(random):
    ours, theirs = random.normal(size=(91, 5)), random.normal(size=(120, 5))
    classes, others = np.append(np.arange(90) % 3, 3), np.arange(120) % 5
    *distances, one_image, none = frechet_distance_per_class(ours, classes, theirs, others)
    assert one_image is None and none is None
    for number, distance in enumerate(distances):
        assert distance == pytest.approx(fid(ours[classes == number], theirs[others == number]))


# ----- Memorisation


def test_copies_of_training_images_are_told_from_unseen_ones(random):
    real, unseen, new = random.normal(size=(3, 2000, 8))
    assert memorisation(real[:900], unseen, real) < 0.001
    assert memorisation(new, unseen, real) == pytest.approx(1, abs=0.1)
    mixed = np.concatenate([real[:800], new[:1200]])
    assert 0.3 < memorisation(mixed, unseen, real) < 0.95


def test_memorisation_does_not_depend_on_how_the_unseen_images_are_sorted():
    real, unseen = np.zeros((10, 1)), np.repeat([[1.0], [3.0]], [5000, 15_000], axis=0)
    assert memorisation(np.full((10, 1), 3.0), unseen, real) == 1  # the first 5,000 would give 3


# ----- What is given


def test_what_is_not_finite_is_refused():
    with pytest.raises(ValueError, match="infs or NaNs"):
        inception_score(np.array([[np.nan, 0.5]]))
    with pytest.raises(ValueError, match="infs or NaNs"):
        frechet_distance(np.zeros(1), np.ones((1, 1)), np.zeros(1), np.array([[np.inf]]))


def test_a_mean_that_is_not_a_number_is_at_no_distance():
    one = np.ones((1, 1))
    assert np.isnan(frechet_distance(np.zeros(1), one, np.array([np.nan]), one))
