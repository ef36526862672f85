"""The metrics on fixed features: against independent references, and where they degenerate."""

import itertools

import numpy as np
import pytest
import scipy.linalg
import scipy.spatial

import gan_mnist
from gan_mnist import (
    class_divergence,
    density_coverage,
    feature_statistics,
    frechet_distance,
    frechet_distance_per_class,
    frechet_interval,
    inception_score,
    kernel_inception_distance,
    nearest,
    precision_recall,
)


def fid(features, others):
    return frechet_distance(*feature_statistics(features), *feature_statistics(others))


def fid_by_the_book(features, others):
    """The formula with SciPy's matrix square root; only for covariances of full rank."""
    mean_1, mean_2 = features.mean(axis=0), others.mean(axis=0)
    first, second = np.cov(features, rowvar=False), np.cov(others, rowvar=False)
    root = scipy.linalg.sqrtm(first @ second).real
    return np.sum((mean_1 - mean_2) ** 2) + np.trace(first + second - 2 * root)


def features(count, size, seed, spread=1.0):
    """Return correlated features (count, size), none of them Gaussian."""
    random = np.random.default_rng(seed)
    return spread * np.maximum(
        random.normal(size=(count, size)) @ random.normal(size=(size, size)), 0
    )


def test_fid_agrees_with_the_formula_to_a_millionth():
    for seed in range(3):
        ours, theirs = features(400, 24, seed), features(500, 24, seed + 9, 1.2)
        assert fid(ours, theirs) == pytest.approx(fid_by_the_book(ours, theirs), rel=1e-6)


def test_fid_of_fewer_samples_than_features_is_that_of_their_own_subspace():
    """Rotating few samples into the space that they span makes full rank of rank-deficient ones."""
    ours, theirs = features(30, 100, 1), features(25, 100, 2)
    basis = np.linalg.qr(np.concatenate([ours, theirs]).T)[0]
    few, fewer = ours @ basis, theirs @ basis  # 55 features, ranks 29 and 24
    first, second = np.cov(few, rowvar=False), np.cov(fewer, rowvar=False)
    tiny = 1e-11 * np.eye(55)
    values = scipy.linalg.eigvals((first + tiny) @ (second + tiny))
    expected = np.sum((few.mean(axis=0) - fewer.mean(axis=0)) ** 2) + np.trace(first + second)
    expected -= 2 * np.sqrt(np.maximum(values.real, 0)).sum()
    assert fid(ours, theirs) == pytest.approx(expected, rel=1e-6)


def test_inception_score_agrees_with_the_papers_code_to_a_millionth():
    probabilities = np.random.default_rng(0).dirichlet(np.full(1008, 0.02), size=500) + 1e-12
    scores = []
    for k in range(10):
        part = probabilities[k * 50 : (k + 1) * 50]
        divergence = part * (np.log(part) - np.log(part.mean(axis=0, keepdims=True)))
        scores.append(np.exp(divergence.sum(axis=1).mean()))
    expected = (np.mean(scores), np.std(scores))
    assert inception_score(probabilities) == pytest.approx(expected, rel=1e-6)


def test_kernel_distance_agrees_with_all_pairs_to_a_millionth():
    ours, theirs = features(200, 40, 1), features(200, 40, 2)
    kernels = [(a @ b.T / 40 + 1) ** 3 for a, b in ((ours, ours), (theirs, theirs), (ours, theirs))]
    within = [k[~np.eye(200, dtype=bool)].mean() for k in kernels[:2]]
    expected = sum(within) - 2 * kernels[2].mean()
    assert kernel_inception_distance(ours, theirs, 2, 200)[0] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("counts", [(300, 300), (80, 640), (700, 50)])
def test_the_neighbour_metrics_count_exactly_as_all_distances_say(counts):
    real, drawn = features(counts[0], 12, 1), features(counts[1], 12, 2, 0.9)
    between = scipy.spatial.distance.cdist(real, drawn)
    radii = {
        (k, side): np.sort(scipy.spatial.distance.cdist(points, points))[:, k]
        for k, (side, points) in itertools.product((3, 5), (("real", real), ("drawn", drawn)))
    }
    in_real = between <= radii[3, "real"][:, np.newaxis]
    expected = in_real.any(axis=0).mean(), (between <= radii[3, "drawn"]).any(axis=1).mean()
    assert precision_recall(real, drawn) == expected
    in_real = between <= radii[5, "real"][:, np.newaxis]
    expected = in_real.sum(axis=0).mean() / 5, in_real.any(axis=1).mean()
    assert density_coverage(real, drawn) == pytest.approx(expected, rel=1e-12)


def test_density_and_coverage_of_another_draw_are_near_one_and_of_strangers_nought():
    random = np.random.default_rng(0)
    real, same = random.normal(size=(2, 1000, 8))
    density, coverage = density_coverage(real, same)
    assert density == pytest.approx(1, abs=0.1) and coverage > 0.9
    assert density_coverage(real, same + 50) == (0, 0)
    assert density_coverage(real, np.repeat(real[:1], 1000, axis=0))[1] < 0.05


def test_identical_sets_score_best():
    same = features(300, 20, 3)
    assert fid(same, same) == pytest.approx(0, abs=1e-9)
    assert kernel_inception_distance(same, same, 1, 300)[0] < 0  # unbiased: pairs, not squares
    assert precision_recall(same, same) == (1, 1)
    assert density_coverage(same, same)[1] == 1
    assert nearest(same, same)[0].tolist() == list(range(300))
    assert np.all(nearest(same, same)[1] == 0)


@pytest.mark.parametrize("drawn", [np.repeat(features(1, 20, 5), 300, 0), np.zeros((300, 20))])
def test_a_repeated_sample_and_constant_features_give_finite_numbers(drawn):
    real = features(300, 20, 4)
    expected = ((real.mean(axis=0) - drawn[0]) ** 2).sum() + np.trace(np.cov(real, rowvar=False))
    assert fid(drawn, real) == pytest.approx(expected)
    assert np.isfinite(kernel_inception_distance(real, drawn, 3, 100)).all()
    assert precision_recall(real, drawn)[1] == 0 and density_coverage(real, drawn)[1] <= 0.1
    low, high = frechet_interval(drawn, *feature_statistics(real))
    assert low == pytest.approx(expected) and high == pytest.approx(expected)


def test_two_images_are_enough_for_every_metric():
    few, real = features(2, 20, 1), features(50, 20, 2)
    assert fid(few, real) > 0
    low, high = frechet_interval(few, *feature_statistics(real))
    assert 0 <= low <= high < np.inf
    assert np.isfinite(kernel_inception_distance(few, real)).all()
    for metric in (precision_recall, density_coverage):
        assert np.isfinite(metric(few, real, 1)).all()
        with pytest.raises(ValueError, match="out of bounds"):
            metric(few, real, 2)


# ----- Classes


def test_class_divergence_is_nought_for_equal_shares_and_the_logarithm_for_one_class_of_two():
    both = np.arange(100_000) % 2
    assert class_divergence(both[:1000], both) == pytest.approx(0, abs=1e-9)
    assert class_divergence(np.zeros(1000, int), both) == pytest.approx(np.log(2), rel=1e-4)
    assert np.isfinite(class_divergence(np.full(10, 7), both))


def test_fid_per_class_looks_at_each_class_alone():
    ours, theirs = features(90, 5, 1), features(120, 5, 2)
    classes, others = np.arange(90) % 3, np.arange(120) % 4
    others[others == 3] = 1
    distances = frechet_distance_per_class(ours, classes, theirs, others)
    assert len(distances) == 3
    for number, distance in enumerate(distances):
        assert distance == pytest.approx(fid(ours[classes == number], theirs[others == number]))


def test_a_class_with_fewer_than_two_images_has_no_fid():
    classes = np.array([0] * 20 + [2])
    distances = frechet_distance_per_class(
        features(21, 5, 1), classes, features(20, 5, 2), classes[:20]
    )
    assert distances[1:] == [None, None] and distances[0] > 0


# ----- The interval


@pytest.mark.parametrize("offset", [1.0, 0.3])
def test_the_interval_holds_the_mean_fid_of_as_many_images_in_about_95_of_100_draws(offset):
    random = np.random.default_rng(0)
    mean, covariance = np.zeros(4), np.diag([1.0, 2.0, 0.5, 1.0])

    def draw():
        return np.maximum(random.normal(size=(200, 4)) + offset, -1)

    draws = [draw() for _ in range(2000)]
    truth = np.mean([frechet_distance(*feature_statistics(x), mean, covariance) for x in draws])
    intervals = [frechet_interval(x, mean, covariance) for x in draws[:200]]
    assert 0.9 <= np.mean([low <= truth <= high for low, high in intervals]) <= 0.99


def test_the_interval_is_narrower_where_the_classes_were_asked_for():
    classes = np.arange(600) % 2
    drawn = features(600, 4, 1) * 0.2 + 5 * classes[:, np.newaxis]
    statistics = feature_statistics(features(600, 4, 2))
    plain, asked = (
        frechet_interval(drawn, *statistics),
        frechet_interval(drawn, *statistics, classes),
    )
    assert asked[1] - asked[0] < (plain[1] - plain[0]) / 2
    assert sum(asked) == pytest.approx(sum(plain))  # about the same distance


def test_features_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="infs or NaNs"):
        frechet_distance(
            *gan_mnist.feature_statistics(np.full((5, 3), np.nan)), np.zeros(3), np.eye(3)
        )
