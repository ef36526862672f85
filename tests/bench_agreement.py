"""Print this program's metrics beside reference implementations, on the same random features.

    pip install scikit-learn prdc
    python tests/bench_agreement.py

Whatever is not installed is left out. SciPy's matrix square root needs covariances of full rank.
"""

import importlib
import sys
from pathlib import Path

import numpy as np
import scipy.linalg

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import gan_mnist


def fid_of_scipy(real, drawn):
    """The formula of arXiv 1706.08500 with scipy.linalg.sqrtm, as most codes have it."""
    difference = real.mean(axis=0) - drawn.mean(axis=0)
    first, second = np.cov(real, rowvar=False), np.cov(drawn, rowvar=False)
    root = scipy.linalg.sqrtm(first @ second).real
    return difference @ difference + np.trace(first + second - 2 * root)


def kid_of_sklearn(real, drawn):
    """The unbiased estimate with scikit-learn's polynomial kernel, all pairs."""
    kernel = importlib.import_module("sklearn.metrics.pairwise").polynomial_kernel
    count = len(real)
    within = [(k.sum() - np.trace(k)) / (count * (count - 1)) for k in map(kernel, (real, drawn))]
    return sum(within) - 2 * kernel(real, drawn).mean()


def of_prdc(name, neighbours):
    """One of the four numbers of the prdc package, by the authors of arXiv 2002.09797."""

    def measure(real, drawn):
        return importlib.import_module("prdc").compute_prdc(real, drawn, neighbours)[name]

    return measure


def ours(name, *details, part=0):
    """One of the numbers that a function of this program returns."""
    return lambda real, drawn: getattr(gan_mnist, name)(real, drawn, *details)[part]


def our_fid(real, drawn):
    statistics = [x for features in (real, drawn) for x in gan_mnist.feature_statistics(features)]
    return gan_mnist.frechet_distance(*statistics)


ROWS = (
    ("FID", our_fid, "scipy.linalg.sqrtm", fid_of_scipy),
    ("KID", ours("kernel_inception_distance", 1, 2000), "scikit-learn", kid_of_sklearn),
    ("precision, k = 3", ours("precision_recall", 3), "prdc", of_prdc("precision", 3)),
    ("recall, k = 3", ours("precision_recall", 3, part=1), "prdc", of_prdc("recall", 3)),
    ("density, k = 5", ours("density_coverage", 5), "prdc", of_prdc("density", 5)),
    ("coverage, k = 5", ours("density_coverage", 5, part=1), "prdc", of_prdc("coverage", 5)),
)


def main():
    """Print the table."""
    random = np.random.default_rng(0)
    mix = random.normal(size=(64, 64)) / 8
    real, drawn = (np.maximum(random.normal(size=(2000, 64)) @ mix, 0) for _ in range(2))
    drawn = drawn * 1.1 + 0.02
    print("| metric | ours | theirs | relative difference | theirs is |\n|---|---|---|---|---|")
    for name, our_metric, package, their_metric in ROWS:
        try:
            theirs = their_metric(real, drawn)
        except ImportError:
            print(f"| {name} | | | | {package}: not installed |")
            continue
        mine = our_metric(real, drawn)
        print(
            f"| {name} | {mine:.10g} | {theirs:.10g} | {abs(mine / theirs - 1):.1e} | {package} |"
        )


if __name__ == "__main__":
    main()
